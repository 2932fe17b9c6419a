"""demo: the whole chain on a small drawn world. The only part of the project that knows that world."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill demo``. (The chain is imported here, so that ``jobs.demo.world`` alone stays light.)"""
    from jobs.demo.chain import main as run

    return run(argv)
