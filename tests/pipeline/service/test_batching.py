"""Batches grow by themselves while one is worked off; a bad item fails alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.service.batching import Batcher


class Work:
    """Doubles numbers, notes the batches, and waits in the first one until it is let go."""

    def __init__(self, *, hold: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.go, self.begun = threading.Event(), threading.Event()
        if not hold:
            self.go.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.begun.set()
        assert self.go.wait(10)
        if any(item < 0 for item in items):
            raise ValueError(f"no {min(items)}")
        return [2 * item for item in items]


def run(work: Work, most: int, body: Callable[[Batcher[int, int]], Awaitable[None]]) -> list[int]:
    sizes: list[int] = []

    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(work, most, sizes.append)
        try:
            await asyncio.wait_for(body(batcher), 20)
        finally:
            batcher.close()

    asyncio.run(main())
    return sizes


def test_what_arrives_meanwhile_goes_together() -> None:
    work = Work(hold=True)

    async def body(batcher: Batcher[int, int]) -> None:
        first = batcher.ask(1)
        await asyncio.to_thread(work.begun.wait, 10)
        rest = [batcher.ask(i) for i in range(2, 8)]
        work.go.set()
        assert await asyncio.gather(first, *rest) == [2, 4, 6, 8, 10, 12, 14]
        assert await batcher.ask(50) == 100  # and again from rest

    assert run(work, 4, body) == [1, 4, 2, 1]
    assert work.batches == [[1], [2, 3, 4, 5], [6, 7], [50]]


def test_what_is_given_up_while_it_waits_is_not_worked_off() -> None:
    work = Work(hold=True)

    async def body(batcher: Batcher[int, int]) -> None:
        first = batcher.ask(1)
        await asyncio.to_thread(work.begun.wait, 10)
        gone, kept = batcher.ask(2), batcher.ask(3)
        gone.cancel()
        work.go.set()
        assert (await first, await kept) == (2, 6)

    run(work, 8, body)
    assert work.batches == [[1], [3]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 20), min_size=1, max_size=30), st.integers(1, 8))
def test_each_gets_its_own_answer_or_its_own_error(items: list[int], most: int) -> None:
    async def body(batcher: Batcher[int, int]) -> None:
        answers = await asyncio.gather(*(batcher.ask(item) for item in items), return_exceptions=True)
        for item, answer in zip(items, answers, strict=True):
            if item < 0:
                assert isinstance(answer, ValueError) and str(answer) == f"no {item}"
            else:
                assert answer == 2 * item

    assert max(run(Work(), most, body)) <= most


def test_an_error_reaches_the_one_who_asked() -> None:
    async def body(batcher: Batcher[int, int]) -> None:
        with pytest.raises(ValueError, match="no -1"):
            await batcher.ask(-1)

    assert run(Work(), 3, body) == [1]
