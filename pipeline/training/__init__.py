"""Training: one loop for CLIP, prior and decoder, on rows of the tables, resumable bit for bit."""
