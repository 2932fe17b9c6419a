"""Download: pairs of (url, caption) -> rows of the table images, one row each, ok or with its reason."""
