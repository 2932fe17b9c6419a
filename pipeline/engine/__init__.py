"""The only room that knows Ray: a cluster, shards over pools of actors, training workers.

A stage is a plain class, made by a picklable factory in the worker: ``stage(shard) -> result``. A shard
that fails is tried again; one that goes on failing is quarantined with its reason, and the others go on.
A :class:`ClipmillError` is the run's fault, not the shard's (a full disk, another encoder): it ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pipeline.engine import flow, training
from pipeline.engine.cluster import Cluster, Resources
from pipeline.engine.flow import Done, Quarantined
from pipeline.engine.pool import Pool
from pipeline.engine.training import Rank

__all__ = ["Done", "Engine", "Quarantined", "Rank", "Resources"]

S = TypeVar("S")
R = TypeVar("R")

Prepare = tuple[Callable[[], Callable[[S], Any]], Resources]
"""A stage that works before the other one, and what each of its workers needs."""


class Engine(Cluster):
    """A Ray cluster, joined or started at the first work, with the two kinds of work that jobs give it."""

    def map(
        self,
        factory: Callable[[], Callable[[Any], R]],
        shards: Iterable[S],
        resources: Resources | None = None,
        *,
        prepare: Prepare[S] | None = None,
        retries: int = 2,
    ) -> Iterator[Done[S, R] | Quarantined[S]]:
        """Work off ``shards`` on a pool of actors, each of which makes its stage once; in order of completion.

        At most ``overlap`` shards a worker are under way and one waits (back-pressure: ``shards`` is drawn as
        needed). A dead worker costs its own shards, which others take over: each alone, since one of them may have
        killed it. A stage's method ``close()``, where it has one, is called once all shards are worked off.

        With ``prepare`` a shard goes through a stage of that pool first, and ``factory``'s takes what that one
        returned. It passes through Ray's object store, and this process never holds it. The two pools work at once;
        shards begun but not worked off are as many as the second pool has places for, and one for each worker of the
        first. What fails in either begins again in the first.

        Raises:
            ClipmillError: raised by a stage: the run cannot go on. Work under way is cancelled.
        """
        todo = flow.Peekable(shards)
        if todo.empty():
            return
        resources = resources or Resources()
        if prepare is None:
            yield from flow.work_off([Pool(factory, self.slots(resources), resources)], todo, retries)
            return
        before, needs = prepare
        fewer, size = self.slots_of_two(needs, resources)
        pools = [Pool(before, fewer, needs, last=False), Pool(factory, size, resources)]
        yield from flow.work_off(pools, todo, retries, most=fewer * needs.overlap + pools[1].places)

    def train(
        self,
        function: Callable[[Rank, Callable[[dict[str, Any]], None]], R],
        resources: Resources,
        on_progress: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> R:
        """Run ``function(rank, report)`` on ``resources.workers`` workers at once; rank 0's result.

        What rank 0 reports is handed to ``on_progress`` here, every second at most.

        Raises:
            ClipmillError: raised by a worker, or a worker died: training resumes from its last checkpoint when the
                command is run again.
        """
        self.start()
        return training.train(function, resources, on_progress)
