"""Bytes -> a stored image."""
