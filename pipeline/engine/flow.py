"""Shards through a pool of actors, or through two, of which the second takes what the first one made.

What the first makes stays in Ray's object store and goes to the second by reference: the driver never holds it.
Whatever fails, in either pool or between them, sends the shard back to its beginning.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray

from pipeline.engine.failures import reason
from pipeline.engine.pool import Pool, Task, wait

S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class Done(Generic[S, R]):
    """A shard that was worked off."""

    shard: S
    result: R


@dataclass(frozen=True)
class Quarantined(Generic[S]):
    """A shard that failed on every try, with the last reason."""

    shard: S
    reason: str


class Peekable(Generic[S]):
    """An iterator that knows whether it is at its end."""

    def __init__(self, items: Iterable[S]) -> None:
        self._items = iter(items)
        self._head: list[S] = []

    def empty(self) -> bool:
        if not self._head:
            self._head.extend(itertools.islice(self._items, 1))
        return not self._head

    def pop(self) -> S:
        """The next item. Raises IndexError at the end."""
        self.empty()
        return self._head.pop()


def work_off(
    pools: Sequence[Pool], shards: Peekable[S], retries: int, most: int | None = None
) -> Iterator[Done[S, Any] | Quarantined[S]]:
    """See :meth:`pipeline.engine.Engine.map`. ``most``: shards on their way at once, None: as many as have a place."""
    flow = _Flow(pools, shards, most)
    in_order = False
    try:
        while flow.left():
            flow.hand_out()
            ref = wait(pools, flow.flying)
            if ref is None:
                continue
            task = flow.flying.pop(ref)
            pool = pools[task.stage]
            try:
                result = ray.get(ref)
            except ray.exceptions.RayError as exc:
                pool.failed(task, exc)
                task.restart()
                if task.tries > retries:
                    yield Quarantined(task.shard, reason(exc))
                else:
                    flow.first[0].append(task)
                continue
            pool.release(task)
            if pool is pools[-1]:
                task.made = None
                yield Done(task.shard, result)
            else:
                flow.hand_on(task)
        in_order = True
    finally:
        for pool in pools:
            pool.close(in_order)


class _Flow(Generic[S]):
    """Where every shard is: ``flying``, in a pool; or before one, in ``first`` (retries, suspects) or in ``rest``."""

    def __init__(self, pools: Sequence[Pool], shards: Peekable[S], most: int | None) -> None:
        self.pools, self.shards, self.most = pools, shards, most
        self.flying: dict[Any, Task[S]] = {}
        self.first: list[deque[Task[S]]] = [deque() for _ in pools]
        self.rest: list[deque[Task[S]]] = [deque() for _ in pools]

    def left(self) -> bool:
        """Is anything still to be done?"""
        return bool(self.flying) or any(self.first) or any(self.rest) or not self.shards.empty()

    def hand_out(self) -> None:
        """Give the pools what they have a place for; the last pool first, since it makes room before it."""
        for stage in reversed(range(len(self.pools))):
            pool, first = self.pools[stage], self.first[stage]
            while first and self._admits(stage) and pool.room(first[0]):
                self._submit(first.popleft())
            # A suspect needs a worker to itself: while one waits, one worker gets nothing new, and the others go on.
            spare = len(first) > 0
            while pool.room(None, spare) and (task := self._next(stage)) is not None:
                self._submit(task, spare)

    def hand_on(self, task: Task[S]) -> None:
        """Its pool is done with it: the next one's turn."""
        task.stage += 1
        (self.first if task.suspect else self.rest)[task.stage].append(task)

    def _next(self, stage: int) -> Task[S] | None:
        if self.rest[stage]:
            return self.rest[stage].popleft()
        if stage == 0 and self._admits(stage) and not self.shards.empty():
            return Task(self.shards.pop())
        return None

    def _admits(self, stage: int) -> bool:
        """May another shard begin? (Back-pressure: what was made waits in the object store.)"""
        begun = len(self.flying) + sum(map(len, self.first[1:])) + sum(map(len, self.rest[1:]))
        return stage > 0 or self.most is None or begun < self.most

    def _submit(self, task: Task[S], spare: bool = False) -> None:
        self.flying[self.pools[task.stage].submit(task, spare)] = task
