"""A published index with its records and its encoder, as one object: search, vectors, images."""

from pipeline.collection.collection import Collection
from pipeline.collection.results import Results
from pipeline.collection.terms import term

__all__ = ["Collection", "Results", "term"]
