"""Fetching: what is allowed, how it is asked for, and what the answer means."""
