"""demo: the whole chain on a small drawn world. The only part of the project that knows that world."""

from __future__ import annotations

from jobs.demo.chain import main

__all__ = ["main"]
