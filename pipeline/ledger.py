"""The wrapper around every run: its row in the table runs, its counts, its seconds by stage.

The row is written before the run's first commit of data (so that every row names a run that is there) and
completed at its end. A run that commits nothing leaves no row.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from pipeline.tables import Commit, Part
from pipeline.workspace import Workspace
from schemas.errors import ClipmillError, CountsError, GateRefused
from schemas.tables import RUNS

_OUTCOMES: dict[type[BaseException], str] = {KeyboardInterrupt: "interrupted", GateRefused: "refused"}


class Run:
    """One run of one job, as a context manager.

    ``counts`` must add up when it ends well: in = out + failed. ``figures`` and ``outputs`` go to ``--json``.
    """

    def __init__(self, workspace: Workspace, job: str, config: BaseModel) -> None:
        self.workspace, self.job, self.config = workspace, job, config
        self.started = _now()
        self.id = f"{self.started:%Y%m%dT%H%M%S}-{job.replace(' ', '-')}-{uuid.uuid4().hex[:8]}"
        self.counts = {"in": 0, "out": 0, "failed": 0}
        self.seconds: dict[str, float] = {}
        self.figures: dict[str, Any] = {}
        self.outputs: dict[str, str] = {}
        self.input_versions: dict[str, int] = {}
        self.encoder: str | None = None
        self.outcome = "running"
        self.error: str | None = None
        self._begun = False
        self._lock = Lock()

    def __enter__(self) -> Self:
        self._clock = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.seconds["total"] = time.monotonic() - self._clock
        unequal = self._unequal_counts() if exc is None else None
        exc = exc or unequal
        if exc is None:
            self.outcome = "done"
        else:
            self.outcome = _OUTCOMES.get(type(exc), "failed")
            self.error = str(exc) if isinstance(exc, ClipmillError) else f"{type(exc).__name__}: {exc}"
        if self._begun:
            self._write(ended=_now())
        if unequal is not None:
            raise unequal

    def begin(self) -> None:
        """Write the run's row. Called before anything is committed or published; again, it does nothing."""
        with self._lock:
            if not self._begun:
                self._mark_killed()
                self._write(ended=None)
                self._begun = True

    def commit(self, table: str, parts: Sequence[Part]) -> Commit:
        """Commit workers' parts to a table, in this run's name."""
        if not any(p.rows for p in parts):
            return Commit(self.workspace.table(table).version(), 0)
        self.begin()
        return self.workspace.table(table).commit(parts, self.id)

    def append(self, table: str, rows: pa.Table) -> Commit:
        """Commit rows of the driver to a table, in this run's name."""
        return self.commit(table, [self.workspace.table(table).write_part(rows)] if rows.num_rows else [])

    def upsert(self, table: str, rows: pa.Table, replace: str | None = None, touch: Sequence[str] = ()) -> None:
        """Replace or add rows by key, in this run's name: see :meth:`Table.upsert`."""
        if rows.num_rows:
            self.begin()
            self.workspace.table(table).upsert(rows, self.id, replace, touch)

    def reads(self, table: str) -> int:
        """Note the version of an input table, for lineage, and return it."""
        self.input_versions[table] = self.workspace.table(table).version()
        return self.input_versions[table]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``seconds[name]``."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def summary(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {
            "job": self.job,
            "run": self.id,
            "outcome": self.outcome,
            "counts": self.counts,
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "outputs": self.outputs,
            **({"error": self.error} if self.error else {}),
            **self.figures,
        }

    def _unequal_counts(self) -> CountsError | None:
        c = self.counts
        if c["in"] == c["out"] + c["failed"]:
            return None
        return CountsError(
            f"{self.job} lost or doubled rows",
            expected=f"in = out + failed, in = {c['in']}",
            actual=f"out = {c['out']}, failed = {c['failed']}",
            remedy="nothing is committed twice: run again, and report this as a bug",
        )

    def _mark_killed(self) -> None:
        """Runs of this host that never ended and whose process is gone: killed."""
        rows = self.workspace.table("runs").read(
            where=(pc.field("outcome") == "running") & (pc.field("host") == socket.gethostname())
        )
        dead = rows.filter(pa.array([not alive(pid) for pid in rows["pid"].to_pylist()], pa.bool_()))
        if dead.num_rows:
            column = pa.array(["killed"] * dead.num_rows, pa.string())
            dead = dead.set_column(dead.column_names.index("outcome"), "outcome", column)
            self.workspace.table("runs").upsert(dead, self.id)

    def _write(self, ended: dt.datetime | None) -> None:
        row = {
            "run": self.id,
            "job": self.job,
            "config": self.config.model_dump_json(),
            "code_version": code_version(),
            "started": self.started,
            "ended": ended,
            "outcome": self.outcome,
            "error": self.error,
            "counts_in": self.counts["in"],
            "counts_out": self.counts["out"],
            "counts_failed": self.counts["failed"],
            "seconds": json.dumps(self.seconds),
            "encoder": self.encoder,
            "input_versions": json.dumps(self.input_versions),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self.workspace.table("runs").upsert(pa.Table.from_pylist([row], schema=RUNS.schema), self.id)


@cache
def code_version() -> str:
    """Version of the package, with the git commit where there is one."""
    try:
        release = version("clipmill")
    except PackageNotFoundError:
        release = "unknown"
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return release
    return f"{release}+{found.stdout.strip()}" if found.returncode == 0 and found.stdout.strip() else release


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def alive(pid: int) -> bool:
    """Is there a process of this number on this machine?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
