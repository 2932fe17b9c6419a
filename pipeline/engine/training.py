"""Training workers: the same function on all of them at once."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray

from pipeline.engine.cluster import Resources
from pipeline.engine.failures import cause, reason
from schemas.errors import ClipmillError

R = TypeVar("R")
_Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Rank:
    """A training worker's place among its peers; ``address`` is where rank 0 waits for the others."""

    rank: int
    world: int
    address: str
    gpu: bool


def train(function: Callable[[Rank, _Report], R], resources: Resources, on_progress: _Report) -> R:
    """See :meth:`pipeline.engine.Engine.train`. Ray is up."""
    world = resources.workers or 1
    actors = [
        ray.remote(_Trainer).options(num_cpus=resources.cpus, num_gpus=resources.gpus, max_concurrency=2).remote()
        for _ in range(world)
    ]
    try:
        address = ray.get(actors[0].address.remote())
        refs = [
            actor.run.remote(function, Rank(r, world, address, resources.gpus > 0)) for r, actor in enumerate(actors)
        ]
        waiting = list(refs)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
            if refs[0] not in done:
                on_progress(ray.get(actors[0].progress.remote()))
            ray.get(done)
        return ray.get(refs[0])  # type: ignore[no-any-return]
    except ray.exceptions.RayError as exc:
        if isinstance(error := cause(exc), ClipmillError):
            raise error from exc
        raise ClipmillError(
            "a training worker failed",
            actual=reason(exc),
            remedy="run the command again: it resumes at its checkpoint",
        ) from exc
    finally:
        for actor in actors:
            ray.kill(actor)


class _Trainer:
    """One training worker. A second thread answers for the progress."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}

    def address(self) -> str:
        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        return f"{ray.util.get_node_ip_address()}:{port}"

    def progress(self) -> dict[str, Any]:
        return self.latest

    def run(self, function: Callable[[Rank, _Report], Any], rank: Rank) -> Any:
        def report(figures: dict[str, Any]) -> None:
            self.latest = figures

        return function(rank, report)
