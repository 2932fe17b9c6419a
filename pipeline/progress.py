"""Progress of long work, on stderr: a bar in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_EVERY_SECONDS = 10.0


class Progress:
    """``with Progress("download", total, "images") as p: p.advance(100, failed=3)``."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.notes = 0, ""
        self._told = -1
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        self._start = self._last = time.monotonic()
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[notes]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(self.title, total=self.total, rate="", notes="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done > max(self._told, 0):
            self._line()

    def advance(self, n: int, **notes: float) -> None:
        """``n`` more are done; ``notes`` are shown beside, as they are."""
        self.at(self.done + n, **notes)

    def at(self, done: int, **notes: float) -> None:
        """``done`` in all are done."""
        moved, self.done = done > self.done, done
        self.notes = "  ".join(f"{k} {v:,.4g}" for k, v in notes.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{self._rate():,.0f} {self.unit}/s", notes=self.notes)
        elif moved and time.monotonic() - self._last > _EVERY_SECONDS:
            self._line()

    @property
    def seconds(self) -> float:
        """Since it began; never zero."""
        return max(time.monotonic() - self._start, 1e-9)

    def _rate(self) -> float:
        return self.done / self.seconds

    def _line(self) -> None:
        self._last, self._told = time.monotonic(), self.done
        rate = self._rate()
        left = (self.total - self.done) / rate if rate else float("inf")
        text = (
            f"{self.title}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {left:,.0f} s left  {self.notes}"
        )
        print(text.rstrip(), file=sys.stderr, flush=True)
