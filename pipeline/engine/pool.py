"""Shards over a pool of actors: back-pressure, retries, and workers that die."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

import ray

from pipeline.engine.cluster import Resources
from pipeline.engine.failures import cause, is_lost, reason
from pipeline.lean import import_arrow_without_pandas
from schemas.errors import ClipmillError

S = TypeVar("S")
R = TypeVar("R")

_STARTS = 5
"""Workers in a row that may die as they start."""
_CLOSE_SECONDS = 30.0
"""How long a stage may take for its ``close()``."""


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
    factory: Callable[[], Callable[[S], R]], todo: Peekable[S], resources: Resources, size: int, retries: int
) -> Iterator[Done[S, R] | Quarantined[S]]:
    """See :meth:`pipeline.engine.Engine.map`. Ray is up; ``size`` workers."""
    pool = _Pool(factory, size, resources)
    again: deque[_Task[S]] = deque()
    flying: dict[Any, _Task[S]] = {}
    in_order = False
    try:
        while again or flying or not todo.empty():
            flying.update(_submit(pool, again, todo))
            ref = pool.wait(flying)
            if ref is None:
                continue
            task = flying.pop(ref)
            try:
                result = ray.get(ref)
            except ray.exceptions.RayError as exc:
                pool.failed(task, exc)
                if task.tries > retries:
                    yield Quarantined(task.shard, reason(exc))
                else:
                    again.append(task)
                continue
            pool.release(task)
            yield Done(task.shard, result)
        in_order = True
    finally:
        pool.close(in_order)


def _submit(pool: _Pool, again: deque[_Task[S]], todo: Peekable[S]) -> Iterator[tuple[Any, _Task[S]]]:
    """Hand out what there is a place for, retries first: each call with its shard."""
    while again and pool.room(again[0]):
        yield pool.submit(again[0]), again.popleft()
    # A suspect needs a worker to itself: while one waits, one worker gets nothing new, and the others go on.
    spare = len(again) > 0
    while pool.room(None, spare) and not todo.empty():
        task = _Task(todo.pop())
        yield pool.submit(task, spare), task


@dataclass
class _Task(Generic[S]):
    """A shard on its way: how often it failed, and where it is now."""

    shard: S
    tries: int = 0
    suspect: bool = False
    slot: int = -1
    actor: Any = None


class _Worker:
    """Holds one stage, made at the first shard (so that its errors arrive whole); a call works off a shard."""

    def __init__(self, factory: bytes) -> None:
        self.factory = factory  # pickled: what it imports is imported after pyarrow
        self.stage: Callable[[Any], Any] | None = None
        self.lock = Lock()

    def ready(self) -> None:
        """Answers once the worker is up."""

    def work(self, shard: Any) -> Any:
        with self.lock:
            if self.stage is None:
                import_arrow_without_pandas()
                self.stage = ray.cloudpickle.loads(self.factory)()
        return self.stage(shard)

    def close(self) -> None:
        close = getattr(self.stage, "close", None)
        if callable(close):
            close()


class _Pool:
    """Actors, with the number of shards that each has. A dead one is replaced; none has shards before it is up.

    (Where a node was lost for good, there may be no room for the replacement: a shard would wait there for ever.)
    """

    def __init__(self, factory: Callable[[], Callable[[Any], Any]], size: int, resources: Resources) -> None:
        self._factory = ray.put(ray.cloudpickle.dumps(factory))
        self._options = {
            "num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_concurrency": resources.overlap,
        }  # fmt: skip
        self._places = resources.overlap + 1
        self._load = [0] * size
        self._starting: dict[Any, int] = {}
        self._lost_starts = 0
        self._actors: list[Any] = [None] * size
        for slot in range(size):
            self._start(slot)

    def _start(self, slot: int) -> None:
        self._actors[slot] = ray.remote(_Worker).options(**self._options).remote(self._factory)
        self._starting[self._actors[slot].ready.remote()] = slot

    def _up(self) -> list[int]:
        """The slots of workers that are up, the emptiest first."""
        down = set(self._starting.values())
        return sorted((s for s in range(len(self._load)) if s not in down), key=self._load.__getitem__)

    def _open(self, spare: bool) -> list[int]:
        """:meth:`_up`; ``spare``: without a worker to be left for a suspect (one that starts will do, too)."""
        return self._up()[1:] if spare and not self._starting else self._up()

    def room(self, task: _Task[Any] | None, spare: bool = False) -> bool:
        """Is there a place for this shard (None: a new one)?"""
        return any(self._load[s] + self._weight(task) <= self._places for s in self._open(spare))

    def submit(self, task: _Task[Any], spare: bool = False) -> Any:
        task.slot = self._open(spare)[0]
        task.actor = self._actors[task.slot]
        self._load[task.slot] += self._weight(task)
        return task.actor.work.remote(task.shard)

    def wait(self, flying: Iterable[Any]) -> Any | None:
        """Wait until something ends: the call of ``flying`` that did, or None where a worker came up or failed to."""
        (ref,), _ = ray.wait([*self._starting, *flying], num_returns=1)
        if ref not in self._starting:
            return ref
        slot = self._starting.pop(ref)
        try:
            ray.get(ref)
            self._lost_starts = 0
        except ray.exceptions.RayError as exc:
            self._lost_starts += 1
            if self._lost_starts == _STARTS:
                raise ClipmillError(
                    f"{_STARTS} workers in a row died as they started",
                    actual=reason(exc),
                    remedy="check that the nodes have this code and some memory, then run the command again",
                ) from exc
            self._start(slot)
        return None

    def release(self, task: _Task[Any]) -> None:
        self._load[task.slot] -= self._weight(task)

    def _weight(self, task: _Task[Any] | None) -> int:
        return self._places if task is not None and task.suspect else 1

    def failed(self, task: _Task[Any], exc: Exception) -> None:
        """Raise what ends the run, else count the failure, and replace the worker if it is lost."""
        self.release(task)
        task.tries += 1
        if isinstance(error := cause(exc), ClipmillError):
            raise error from exc
        if is_lost(exc):
            task.suspect = True
            if self._actors[task.slot] is task.actor:
                ray.kill(task.actor)  # it may only be out of reach: it must not work beside its replacement
                self._start(task.slot)

    def close(self, in_order: bool) -> None:
        """End the workers; ``in_order``: after closing their stages (an error of that is none of the run's)."""
        if in_order:
            closing = [self._actors[s].close.remote() for s in self._up()]
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        for actor in self._actors:
            ray.kill(actor)
