"""Natural batching: while one batch is worked off in a thread, what arrives waits, and goes together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batcher(Generic[Item, Answer]):
    """Asks ``work`` once for many callers. A lone caller waits for nobody; under load the batches grow by themselves.

    Args:
        work: items -> their answers, in the same order. Runs in one thread of its own.
        most: items in one batch.
        seen: told the size of each batch.
    """

    def __init__(
        self, work: Callable[[list[Item]], Sequence[Answer]], most: int, seen: Callable[[int], None] = lambda _: None
    ) -> None:
        self._work, self._most, self._seen = work, most, seen
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._busy = False
        self._thread = ThreadPoolExecutor(1, "batch")

    def ask(self, item: Item) -> asyncio.Future[Answer]:
        """The answer to one item. Called on the event loop; a future that is cancelled leaves the queue."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((item, future))
        if not self._busy:
            self._busy = True
            loop.call_soon(self._next, loop)  # after what else has just arrived
        return future

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        batch: list[tuple[Item, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self._most:
            entry = self._waiting.popleft()
            if not entry[1].done():  # else: given up while it waited
                batch.append(entry)
        self._busy = bool(batch)
        if batch:
            self._seen(len(batch))
            self._thread.submit(self._run, loop, batch)

    def _run(self, loop: asyncio.AbstractEventLoop, batch: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        """In the thread."""
        answers = self._answers([item for item, _ in batch])
        loop.call_soon_threadsafe(self._done, loop, [future for _, future in batch], answers)

    def _answers(self, items: list[Item]) -> list[Answer | Exception]:
        try:
            return list(self._work(items))
        except Exception as exc:
            # One bad item must not fail the others of its batch: each is tried alone.
            return [exc] if len(items) == 1 else [answer for item in items for answer in self._answers([item])]

    def _done(
        self,
        loop: asyncio.AbstractEventLoop,
        futures: list[asyncio.Future[Answer]],
        answers: list[Answer | Exception],
    ) -> None:
        self._next(loop)  # first: the thread goes on while these are answered
        for future, answer in zip(futures, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
