"""The only room that knows Ray: a cluster, shards over pools of actors, training workers.

A stage is a plain class, made by a picklable factory in the worker: ``stage(shard) -> result``. A shard
that fails is tried again; one that goes on failing is quarantined with its reason, and the others go on.
A :class:`ClipmillError` is the run's fault, not the shard's (a full disk, another encoder): it ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from pipeline.engine import pool, training
from pipeline.engine.cluster import Cluster, Resources
from pipeline.engine.pool import Done, Quarantined
from pipeline.engine.training import Rank

__all__ = ["Done", "Engine", "Quarantined", "Rank", "Resources"]

S = TypeVar("S")
R = TypeVar("R")


class Engine(Cluster):
    """A Ray cluster, joined or started at the first work, with the two kinds of work that jobs give it."""

    def map(
        self,
        factory: Callable[[], Callable[[S], R]],
        shards: Iterable[S],
        resources: Resources | None = None,
        *,
        retries: int = 2,
    ) -> Iterator[Done[S, R] | Quarantined[S]]:
        """Work off ``shards`` on a pool of actors, each of which makes its stage once; in order of completion.

        At most ``overlap`` shards a worker are under way and one waits (back-pressure: ``shards`` is drawn as
        needed). A dead worker costs its own shards, which others take over: each alone, since one of them may have
        killed it. A stage's method ``close()``, where it has one, is called once all shards are worked off.

        Raises:
            ClipmillError: raised by a stage: the run cannot go on. Work under way is cancelled.
        """
        todo = pool.Peekable(shards)
        if not todo.empty():
            resources = resources or Resources()
            yield from pool.work_off(factory, todo, resources, self.slots(resources), retries)

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
