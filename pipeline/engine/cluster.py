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
