"""A pool of actors that hold a stage each: how many shards each of them has, and what becomes of dead ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar

import ray

from pipeline.engine.cluster import Resources
from pipeline.engine.failures import cause, is_lost, reason
from pipeline.lean import import_arrow_without_pandas
from schemas.errors import ClipmillError

S = TypeVar("S")

_STARTS = 5
"""Workers in a row that may die as they start."""
_PATIENCE = 30.0
"""Seconds in which nothing ends, after which it is time to see whether something can."""
_CLOSE_SECONDS = 30.0
"""How long a stage may take for its ``close()``."""


@dataclass
class Task(Generic[S]):
    """A shard on its way: how often it failed, which pool's turn it is, and where it is now.

    ``made``: what the pool before made of it, a reference to an object in Ray's store.
    """

    shard: S
    tries: int = 0
    suspected: set[int] = field(default_factory=set)
    stage: int = 0
    made: Any = None
    slot: int = -1
    actor: Any = None

    @property
    def suspect(self) -> bool:
        """May it have killed a worker of the pool that it is in, or waits for?"""
        return self.stage in self.suspected

    def restart(self) -> None:
        """Back to its beginning: nothing that was made of it is kept."""
        self.stage, self.made = 0, None


class _Worker:
    """Holds one stage, made at the first shard (so that its errors arrive whole); a call works off a shard."""

    def __init__(self, factory: bytes) -> None:
        self.factory = factory  # pickled: what it imports is imported after pyarrow
        self.stage: Callable[[Any], Any] | None = None
        self.lock = Lock()

    def ready(self) -> None:
        """Answers once the worker is up."""

    def work(self, given: Any) -> Any:
        with self.lock:
            if self.stage is None:
                import_arrow_without_pandas()
                self.stage = ray.cloudpickle.loads(self.factory)()
        return self.stage(given)

    def make(self, given: Any) -> tuple[None, Any]:
        """:meth:`work` in two answers: that it is done, which the driver reads, and what was made, which stays here."""
        return None, self.work(given)

    def close(self) -> None:
        close = getattr(self.stage, "close", None)
        if callable(close):
            close()


class Pool:
    """Actors, with the number of shards that each has. A dead one is replaced; none has shards before it is up.

    (Where a node was lost for good, there may be no room for the replacement: a shard would wait there for ever.)

    ``last``: its results are the driver's. Else they stay in Ray's object store, for the pool that comes next.
    """

    def __init__(
        self, factory: Callable[[], Callable[[Any], Any]], size: int, resources: Resources, *, last: bool = True
    ) -> None:
        self._factory = ray.put(ray.cloudpickle.dumps(factory))
        self._options = {
            "num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_concurrency": resources.overlap,
        }  # fmt: skip
        self._needs, self._last = resources, last
        self._places = resources.overlap + 1
        self._load = [0] * size
        self.starting: dict[Any, int] = {}
        self._retired: set[int] = set()
        self._lost_starts = 0
        self._actors: list[Any] = [None] * size
        for slot in range(size):
            self._start(slot)

    @property
    def places(self) -> int:
        """Shards that all workers have at most: under way, and one more each that waits."""
        return self._places * len(self._load)

    def _start(self, slot: int) -> None:
        self._actors[slot] = ray.remote(_Worker).options(**self._options).remote(self._factory)
        self.starting[self._actors[slot].ready.remote()] = slot

    def _up(self) -> list[int]:
        """The slots of workers that are up, the emptiest first."""
        down = {*self.starting.values(), *self._retired}
        return sorted((s for s in range(len(self._load)) if s not in down), key=self._load.__getitem__)

    def _open(self, spare: bool) -> list[int]:
        """:meth:`_up`; ``spare``: without a worker to be left for a suspect (one that starts will do, too)."""
        return self._up()[1:] if spare and not self.starting else self._up()

    def room(self, task: Task[Any] | None, spare: bool = False) -> bool:
        """Is there a place for this shard (None: a new one)?"""
        return any(self._load[s] + self._weight(task) <= self._places for s in self._open(spare))

    def submit(self, task: Task[Any], spare: bool = False) -> Any:
        """Give it to the emptiest worker: the reference that tells of its end."""
        task.slot = self._open(spare)[0]
        task.actor = self._actors[task.slot]
        self._load[task.slot] += self._weight(task)
        given = task.shard if task.stage == 0 else task.made
        if self._last:
            return task.actor.work.remote(given)
        ref, task.made = task.actor.make.options(num_returns=2).remote(given)
        return ref

    def started(self, ref: Any) -> None:
        """A worker of :attr:`starting` came up, or failed to: then another one is started."""
        slot = self.starting.pop(ref)
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

    def crowded_out(self) -> bool:
        """Are none of its workers up, for want of CPUs? As when a node was lost, and others took what was left."""
        free = ray.available_resources()
        room = free.get("CPU", 0) >= self._needs.cpus
        return not self._up() and not room and free.get("GPU", 0) >= self._needs.gpus

    def retire(self) -> bool:
        """End an idle worker for good, to make room, if another remains. Was there one?"""
        up = self._up()
        if len(up) < 2 or self._load[up[0]]:
            return False
        self._retired.add(up[0])
        ray.kill(self._actors[up[0]])
        return True

    def release(self, task: Task[Any]) -> None:
        self._load[task.slot] -= self._weight(task)

    def _weight(self, task: Task[Any] | None) -> int:
        return self._places if task is not None and task.suspect else 1

    def failed(self, task: Task[Any], exc: Exception) -> None:
        """Raise what ends the run, else count the failure, and replace the worker if it is lost."""
        self.release(task)
        task.tries += 1
        if isinstance(error := cause(exc), ClipmillError):
            raise error from exc
        if is_lost(exc):
            task.suspected.add(task.stage)
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


def wait(pools: Sequence[Pool], flying: Iterable[Any]) -> Any | None:
    """Wait until something ends: the call of ``flying`` that did, or None where a worker came up or failed to."""
    starting = {ref: pool for pool in pools for ref in pool.starting}
    awaited = [*starting, *flying]
    while not (ended := ray.wait(awaited, num_returns=1, timeout=_PATIENCE)[0]):
        without = [pool for pool in pools if pool.crowded_out()]
        if any(other.retire() for pool in without for other in pools if other is not pool):
            continue
        if len(awaited) == len(starting):  # else there is work under way
            print(f"waiting for room in the cluster for {len(starting)} workers", file=sys.stderr, flush=True)
    ref = ended[0]
    if ref not in starting:
        return ref
    starting[ref].started(ref)
    return None
