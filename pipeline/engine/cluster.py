"""A Ray cluster: joined, or started in this process with a folder and a token of its own."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import ray

from schemas.errors import ClipmillError

_INIT_ATTEMPTS = 4
_OBJECT_STORE_BYTES = 1 << 30
"""Of a cluster of our own, at least; a tenth of the memory, where that is more and fits into /dev/shm."""
_TEMP = "clipmill-"
_TEMP_ROOT = "/tmp" if os.name == "posix" else None  # noqa: S108 - Unix sockets inside: at most 107 characters


@dataclass(frozen=True)
class Resources:
    """What one worker needs. ``workers=None``: as many as the cluster has room for.

    ``overlap``: shards that a worker works on at once, in threads; its stage must be thread-safe where it is not 1.
    """

    workers: int | None = None
    cpus: float = 1
    gpus: float = 0
    overlap: int = 1


class Cluster:
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
            os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # every call's own error is looked at
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
                with _without_monitors() if attempt == 0 else nullcontext():
                    ray.init(
                        address="local",
                        num_cpus=self._cpus,
                        object_store_memory=_object_store_bytes(),
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _temp_dir=self._temp_dir,
                    )
                self._joined = True
                return
            except Exception as exc:  # on a loaded machine Ray gives up after 15 s on its agent's port file
                ray.shutdown()
                _end_leftovers(self._temp_dir)
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
        """How many workers of these resources to start: as many as run side by side.

        On a cluster that was joined, as many as were asked for. For those that find no room it may grow: Ray's
        autoscaler sees them waiting. Until then they hold nothing.

        Raises:
            ClipmillError: the cluster has no such GPU.
        """
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
        if self.address and resources.workers:
            return resources.workers
        return max(1, min(room, resources.workers or room))

    def slots_of_two(self, first: Resources, second: Resources) -> tuple[int, int]:
        """How many workers of two pools to start, of which the first feeds the second: at least one of each.

        The second pool's come first, where there are GPUs or their number was asked for; else the first pool's.

        Raises:
            ClipmillError: the cluster has no room for both.
        """
        wanted = self.slots(second)
        cpus = float(ray.cluster_resources().get("CPU", 1))
        grows = bool(self.address and second.gpus and second.workers)
        asked = 1 if second.gpus or second.workers else first.workers or 1
        reserved = max(1, min(asked, _fit(cpus - second.cpus, first.cpus)))
        room = min(wanted, _fit(cpus - reserved * first.cpus, second.cpus))
        before = _fit(cpus - room * second.cpus, first.cpus)
        if min(room, before) < 1:
            raise ClipmillError(
                "the cluster has no room for two kinds of workers side by side",
                expected=f"{first.cpus + second.cpus:g} CPUs",
                actual=f"{cpus:g}",
                remedy="use one kind, which does both (embed: --decoders 0), or a larger cluster",
            )
        return min(first.workers or before, before), wanted if grows else room


def _fit(room: float, each: float) -> int:
    return int(max(room, 0) // each) if each else 1 << 30


def _object_store_bytes() -> int:
    """What a local cluster's object store may take; Ray takes it as it is needed."""
    try:
        shm = os.statvfs("/dev/shm")  # noqa: S108 - where Ray keeps it
        most = shm.f_bavail * shm.f_frsize * 9 // 10
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return _OBJECT_STORE_BYTES
    return max(_OBJECT_STORE_BYTES, min(memory // 10, most))


@contextmanager
def _without_monitors() -> Iterator[None]:
    """A cluster of this process alone has nothing to scale, sends no logs and has no page: three processes fewer.

    There is no public setting for it. Where Ray's inside has changed, the next attempt starts all of them.
    """
    parameters, node = ray._private.parameter, ray._private.node.Node
    whole, server = parameters.RayParams, node.start_api_server
    parameters.RayParams = partial(whole, no_monitor=True, include_log_monitor=False)
    node.start_api_server = lambda *_, **__: None
    try:
        yield
    finally:
        parameters.RayParams, node.start_api_server = whole, server


def _end_leftovers(temp_dir: str) -> None:
    """End the processes of a cluster that did not come up: Ray forgets them."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and temp_dir.encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def _sweep() -> None:
    """Remove the folders of clusters whose process was killed."""
    for folder in Path(_TEMP_ROOT or tempfile.gettempdir()).glob(f"{_TEMP}[0-9]*-*"):
        pid = folder.name.removeprefix(_TEMP).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)
