"""CPU seconds and memory of a whole command: every process that it starts, daemons and orphans included.

Where a control group can be made (root, cgroup v1 or v2), the kernel counts: exact. Elsewhere orphans are adopted and
the larger of two lower bounds is taken: what ``wait`` reports, and what sampling /proc has seen. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_V1, _V2 = Path("/sys/fs/cgroup/cpuacct"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Cost:
    """What a command took. ``cpu``: user and system seconds; ``peak``: bytes (PSS) of all its processes at once."""

    status: int
    wall: float
    cpu: float
    peak: int
    output: str


class ControlGroup:
    """A control group of one command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls) -> ControlGroup | None:
        """A fresh one, or None where this user may make none."""
        for root, counter in ((_V1, "cpuacct.usage"), (_V2, "cpu.stat")):
            path = root / f"clipmill-bench-{uuid.uuid4().hex[:8]}"
            with contextlib.suppress(OSError):
                path.mkdir()
                if (path / counter).exists():
                    return cls(path)
                path.rmdir()
        return None

    def cpu(self) -> float:
        """Seconds used by its processes, living and dead."""
        if (self.path / "cpuacct.usage").exists():
            return int((self.path / "cpuacct.usage").read_text()) / 1e9
        lines = dict(line.split() for line in (self.path / "cpu.stat").read_text().splitlines())
        return int(lines["usage_usec"]) / 1e6

    def pids(self) -> set[int]:
        return {int(p) for p in (self.path / "cgroup.procs").read_text().split()}

    def inside(self, command: Sequence[str]) -> list[str]:
        """``command``, made to join the group before it starts."""
        return ["sh", "-c", 'echo 0 > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *command]

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self.path.rmdir()


@dataclass
class _Samples:
    """What sampling saw of a command's processes. ``cpu``: (pid, start) -> seconds."""

    peak: int = 0
    cpu: dict[tuple[int, float], float] = field(default_factory=dict)

    def take(self, pids: set[int], cpu: bool) -> None:
        total = 0
        for pid in pids:
            with contextlib.suppress(psutil.Error, OSError):
                total += _pss(pid)
                if cpu:
                    process = psutil.Process(pid)
                    times = process.cpu_times()
                    self.cpu[pid, process.create_time()] = times.user + times.system
        self.peak = max(self.peak, total)


def _pss(pid: int) -> int:
    """Bytes of a process, shared pages divided among those who share them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _descendants() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def measure(
    command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 1800.0, *, kernel: bool = True
) -> Cost:
    """Run ``command`` to its end, and to the end of every process that it left behind.

    Args:
        command: program and arguments.
        env: added to this process's environment.
        timeout: seconds after which it is killed, with all that it started.
        kernel: count with a control group where one can be made.
    """
    group = ControlGroup.make() if kernel else None
    if group is None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    bystanders, before = _descendants(), _reaped()

    def alive() -> set[int]:
        return group.pids() if group else _descendants() - bystanders

    with tempfile.TemporaryFile("w+b") as output, _sampling(alive, cpu=group is None) as samples:
        start, wall, status = time.perf_counter(), 0.0, -1
        process = subprocess.Popen(
            group.inside(command) if group else list(command), env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout)
                wall = time.perf_counter() - start
        finally:  # killed at once where it ran too long, or this benchmark is stopped
            _settle(alive, patience=10.0 if wall else 0.0)
            process.wait()
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    cpu = group.cpu() if group else max(_reaped() - before, sum(samples.cpu.values()))
    if group:
        group.remove()
    return Cost(status, wall, cpu, samples.peak, text)


@contextlib.contextmanager
def _sampling(alive: Callable[[], set[int]], cpu: bool) -> Iterator[_Samples]:
    """Samples of the processes that are alive, taken in a thread."""
    samples, done = _Samples(), threading.Event()

    def watch() -> None:
        while not done.wait(0.1 if cpu else 0.5):
            samples.take(alive(), cpu)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()


def _settle(alive: Callable[[], set[int]], patience: float) -> None:
    """Wait for the processes left behind; kill what stays."""
    start = time.monotonic()
    while (pids := alive()) and time.monotonic() - start < patience + 10.0:
        for pid in pids:
            with contextlib.suppress(ChildProcessError):  # not ours, but for adopted orphans
                os.waitpid(pid, os.WNOHANG)
            if time.monotonic() - start >= patience:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _reaped() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


_BURN = "import time\nwhile time.process_time() < {s}: pass\n"
_ORPHAN = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}], start_new_session=True)"


def known_load(seconds: float = 1.0, *, kernel: bool = True) -> float:
    """Measured / burnt CPU seconds of a command that leaves a daemon behind, which does all the work: about 1."""
    command = [sys.executable, "-c", _ORPHAN.format(burn=_BURN.format(s=seconds))]
    idle = [sys.executable, "-c", _ORPHAN.format(burn="")]
    return (measure(command, kernel=kernel).cpu - measure(idle, kernel=kernel).cpu) / seconds
