"""The only room that knows Ray: shards over tasks and actor pools, training workers, progress.

A stage is a plain class, made by a picklable factory in the worker: ``stage(shard) -> result``. A shard
that fails is tried again; one that goes on failing is quarantined with its reason, and the others go on.
A :class:`ClipmillError` is the run's fault, not the shard's (a full disk, another encoder): it ends the run.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import ray

from schemas.errors import ClipmillError

S = TypeVar("S")
R = TypeVar("R")

_INIT_ATTEMPTS = 4
_PLACES = 2
"""Shards that a worker has at once: one under way, one waiting."""
_OBJECT_STORE_BYTES = 1 << 30
_TEMP = "clipmill-"
_TEMP_ROOT = "/tmp" if os.name == "posix" else None  # noqa: S108 - Unix sockets inside: at most 107 characters


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


@dataclass(frozen=True)
class Rank:
    """A training worker's place among its peers; ``address`` is where rank 0 waits for the others."""

    rank: int
    world: int
    address: str
    gpu: bool


@dataclass(frozen=True)
class Resources:
    """What one worker needs. ``workers=None``: as many as the cluster has room for."""

    workers: int | None = None
    cpus: float = 1
    gpus: float = 0


class Engine:
    """A Ray cluster: one joined at ``address``, or one started in this process and ended with it."""

    def __init__(self, address: str | None = None, *, cpus: int | None = None, temp_dir: str | None = None) -> None:
        # Inside a submitted Ray job RAY_ADDRESS is set: the cluster that it was submitted to is meant.
        self.address = address or os.environ.get("RAY_ADDRESS") or None
        self._cpus, self._temp_dir = cpus, temp_dir
        self._own_temp: str | None = None
        self._joined = False
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start or join Ray, once. Jobs that find nothing to do never pay for it.

        Raises:
            ClipmillError: no cluster at ``address``, or Ray would not start after several tries.
        """
        with self._lock:
            if ray.is_initialized():
                return
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            on_terminate = signal.getsignal(signal.SIGTERM)
            if self.address is not None:
                self._join()
            else:
                self._start_local()
            if callable(on_terminate) and threading.current_thread() is threading.main_thread():
                # Ray puts its own handler in place, which ends the process before the run is written down.
                signal.signal(signal.SIGTERM, on_terminate)

    def _join(self) -> None:
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as exc:
            raise ClipmillError(
                f"no Ray cluster answers at {self.address}",
                actual=str(exc).splitlines()[0] if str(exc) else type(exc).__name__,
                remedy="check --address (inside a Ray job: auto), or leave it out to run in this process",
            ) from exc
        self._joined = True

    def _start_local(self) -> None:
        if self._temp_dir is None:
            _sweep()
            self._temp_dir = self._own_temp = tempfile.mkdtemp(prefix=f"{_TEMP}{os.getpid()}-", dir=_TEMP_ROOT)
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            # A token for this cluster alone; Ray would put one into the home directory.
            token = Path(self._temp_dir, "token")
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        for attempt in range(_INIT_ATTEMPTS):
            try:
                ray.init(
                    address="local",
                    num_cpus=self._cpus,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=self._temp_dir,
                )
                self._joined = True
                return
            except Exception as exc:  # on a loaded machine Ray gives up after 15 s on its agent's port file
                ray.shutdown()
                if attempt + 1 == _INIT_ATTEMPTS:
                    raise ClipmillError(
                        "Ray does not start in this process",
                        actual=str(exc),
                        remedy="free some CPU or memory, or name a running cluster with --address",
                    ) from exc
                time.sleep(2.0 * (attempt + 1))

    def stop(self) -> None:
        """Leave the cluster; end it where it was started here."""
        if self._joined:
            ray.shutdown()
            self._joined = False
        if self._own_temp is not None:
            if os.environ.get("RAY_AUTH_TOKEN_PATH", "").startswith(self._own_temp):
                del os.environ["RAY_AUTH_TOKEN_PATH"]
            shutil.rmtree(self._own_temp, ignore_errors=True)
            self._own_temp = self._temp_dir = None

    def slots(self, resources: Resources) -> int:
        """How many workers of these resources run side by side."""
        self.start()
        total = ray.cluster_resources()
        room = int(total.get("CPU", 1) // resources.cpus) if resources.cpus else 1 << 30
        if resources.gpus:
            room = min(room, int(total.get("GPU", 0) // resources.gpus))
            if room == 0:
                raise ClipmillError(
                    "the cluster has no such GPU",
                    expected=f"{resources.gpus} GPU a worker",
                    actual=f"{total.get('GPU', 0)} in the cluster",
                    remedy="leave out --gpus-per-worker, or join a cluster with GPUs",
                )
        return max(1, min(room, resources.workers or room))

    def map(
        self,
        factory: Callable[[], Callable[[S], R]],
        shards: Iterable[S],
        resources: Resources | None = None,
        *,
        retries: int = 2,
    ) -> Iterator[Done[S, R] | Quarantined[S]]:
        """Work off ``shards`` on a pool of actors, each of which makes its stage once; in order of completion.

        At most one shard a worker is under way and one waits (back-pressure: ``shards`` is drawn as needed).
        A dead worker costs its own shards, which others take over: each alone, since one of them may have killed it.

        Raises:
            ClipmillError: raised by a stage: the run cannot go on. Work under way is cancelled.
        """
        todo = _Peekable(shards)
        if todo.empty():
            return
        resources = resources or Resources()
        size = self.slots(resources)
        pool = _Pool(factory, size, resources)
        again: deque[_Task[S]] = deque()
        flying: dict[Any, _Task[S]] = {}
        try:
            while True:
                while again or not todo.empty():
                    if not pool.room(again[0] if again else None):
                        break
                    task = again.popleft() if again else _Task(todo.pop())
                    flying[pool.submit(task)] = task
                if not flying:
                    return
                ready, _ = ray.wait(list(flying), num_returns=1)
                task = flying.pop(ready[0])
                try:
                    result = ray.get(ready[0])
                except ray.exceptions.RayError as exc:
                    pool.failed(task, exc)
                    if task.tries > retries:
                        yield Quarantined(task.shard, _reason(exc))
                    else:
                        again.append(task)
                    continue
                pool.release(task)
                yield Done(task.shard, result)
        finally:
            pool.close()

    def train(
        self,
        function: Callable[[Rank, Callable[[dict[str, Any]], None]], R],
        resources: Resources,
        on_progress: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> R:
        """Run ``function(rank, report)`` on ``resources.workers`` workers at once; rank 0's result.

        What rank 0 reports is handed to ``on_progress`` here, every second at most. A worker that dies is an
        error: training resumes from its last checkpoint when the command is run again.
        """
        self.start()
        world = resources.workers or 1
        actors = [
            ray.remote(_Trainer).options(num_cpus=resources.cpus, num_gpus=resources.gpus, max_concurrency=2).remote()
            for _ in range(world)
        ]
        try:
            address = ray.get(actors[0].address.remote())
            refs = [
                actor.run.remote(function, Rank(r, world, address, resources.gpus > 0))
                for r, actor in enumerate(actors)
            ]
            waiting = list(refs)
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
                if refs[0] not in done:
                    on_progress(ray.get(actors[0].progress.remote()))
                ray.get(done)
            return ray.get(refs[0])  # type: ignore[no-any-return]
        except ray.exceptions.RayError as exc:
            if isinstance(cause := _cause(exc), ClipmillError):
                raise cause from exc
            raise ClipmillError(
                "a training worker failed",
                actual=_reason(exc),
                remedy="run the command again: it resumes at its checkpoint",
            ) from exc
        finally:
            for actor in actors:
                ray.kill(actor)


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

    def __init__(self, factory: Callable[[], Callable[[Any], Any]]) -> None:
        self.factory = factory
        self.stage: Callable[[Any], Any] | None = None

    def work(self, shard: Any) -> Any:
        if self.stage is None:
            self.stage = self.factory()
        return self.stage(shard)


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

    def run(self, function: Callable[[Rank, Callable[[dict[str, Any]], None]], Any], rank: Rank) -> Any:
        def report(figures: dict[str, Any]) -> None:
            self.latest = figures

        return function(rank, report)


class _Pool:
    """Actors, with the number of shards that each has; a dead one is replaced."""

    def __init__(self, factory: Callable[[], Callable[[Any], Any]], size: int, resources: Resources) -> None:
        self._factory = ray.put(factory)
        self._options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
        self._actors = [self._new() for _ in range(size)]
        self._load = [0] * size

    def _new(self) -> Any:
        return ray.remote(_Worker).options(**self._options).remote(self._factory)

    def room(self, task: _Task[Any] | None) -> bool:
        """Is there a place for this shard (None: a new one)?"""
        return min(self._load) + self._weight(task) <= _PLACES

    def submit(self, task: _Task[Any]) -> Any:
        task.slot = min(range(len(self._load)), key=self._load.__getitem__)
        task.actor = self._actors[task.slot]
        self._load[task.slot] += self._weight(task)
        return task.actor.work.remote(task.shard)

    def release(self, task: _Task[Any]) -> None:
        self._load[task.slot] -= self._weight(task)

    @staticmethod
    def _weight(task: _Task[Any] | None) -> int:
        return _PLACES if task is not None and task.suspect else 1

    def failed(self, task: _Task[Any], exc: Exception) -> None:
        """Raise what ends the run, else count the failure, and replace the actor if it died."""
        self.release(task)
        task.tries += 1
        if isinstance(cause := _cause(exc), ClipmillError):
            raise cause from exc
        if isinstance(exc, ray.exceptions.RayActorError):
            task.suspect = True
            if self._actors[task.slot] is task.actor:
                self._actors[task.slot] = self._new()

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


class _Peekable(Generic[S]):
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


def _sweep() -> None:
    """Remove the folders of clusters whose process was killed."""
    for folder in Path(_TEMP_ROOT or tempfile.gettempdir()).glob(f"{_TEMP}[0-9]*-*"):
        pid = folder.name.removeprefix(_TEMP).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _cause(exc: Exception) -> Exception:
    """What a stage raised, out of what Ray wraps it in."""
    return exc.cause if isinstance(exc, ray.exceptions.RayTaskError) and exc.cause is not None else exc


def _reason(exc: Exception) -> str:
    cause = _cause(exc)
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}"
