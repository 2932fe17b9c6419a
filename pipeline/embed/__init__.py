"""The room of embedding: what is left to embed, images to pixels, pixels and captions to vectors, vectors to scores."""
