"""kill -9 at random moments: of the driver, of a worker, of a node's raylet; then the same command again.

    python -m tests.kills [--moments 10] [--images 5000] [--seed 0]

Checked after each: a row for every pair, no key twice, a run that finds nothing to do, and how many images were
fetched a second time. Prints a line a moment and a table at the end; about eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.workspace import Workspace
from tests.servers import Server
from tests.test_cluster import CLUSTER

KINDS = ("driver", "worker", "raylet")
SHARD = 250
Environment = dict[str, str]


@dataclass
class Lab:
    """The list and its server; ``seconds``: how long an undisturbed run takes."""

    server: Server
    pairs: Path
    images: int
    seconds: float = 0.0

    def command(self, workspace: Path, *more: str) -> list[str]:
        return [
            sys.executable, "-m", "jobs.cli", "download", "--workspace", str(workspace), "--pairs", str(self.pairs),
            "--allow-hosts", self.server.host, "--shard-size", str(SHARD), "--retry-delay", "0", "--json", *more,
        ]  # fmt: skip

    def start(self, workspace: Path, env: Environment, *more: str) -> subprocess.Popen[str]:
        command = self.command(workspace, *more)
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def summary(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of a process's children and theirs, oldest first."""
    parents, lines = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    found, row = [], [pid]
    while row:
        row = [child for child, parent in parents.items() if parent in row]
        found += row
    return [(child, lines[child]) for child in sorted(found)]


def victims(kind: str, root: int) -> list[int]:
    """Processes to choose from: fetching workers, or the raylets of all nodes but the first, which has no CPU."""
    if kind == "worker":
        return [pid for pid, line in descendants(root) if line.startswith("ray::_Worker")]
    return [pid for pid, line in descendants(root) if line.split(" ")[0].endswith("/raylet")][1:]


@contextmanager
def cluster() -> Iterator[tuple[str, Environment, int]]:
    """Address, environment and root process of a head without CPUs and two nodes of one."""
    env = os.environ | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory(prefix="cmk-") as folder:
        env["RAY_TMPDIR"] = folder
        script = CLUSTER.replace('"num_cpus": 1', '"num_cpus": 0')
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), env, process.pid
        finally:
            process.communicate(timeout=60)


def check(lab: Lab, workspace: Path) -> None:
    """One row a pair, each of them ok."""
    rows = Workspace(workspace).table("images").read(["pair_key", "status"])
    assert rows.num_rows == lab.images, f"{rows.num_rows} rows of {lab.images}"
    assert len(set(rows["pair_key"].to_pylist())) == lab.images, "a key twice"
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert Workspace(workspace).table("pairs").count() == lab.images


def moment(lab: Lab, kind: str, at: float, workspace: Path) -> str:
    """One kill, ``at`` seconds into the run, and the run after it. Returns what is to be told of it."""
    before = sum(lab.server.hits.values())
    if kind == "raylet":
        with cluster() as (address, env, root):
            told = _kill(lab, kind, at, workspace, (root, env, "--address", address))
    else:
        told = _kill(lab, kind, at, workspace, (0, dict(os.environ)))
    done = Workspace(workspace).table("images").count()
    again = summary(lab.start(workspace, dict(os.environ)))
    assert again["counts"]["in"] == lab.images - done
    check(lab, workspace)
    last = summary(lab.start(workspace, dict(os.environ)))
    assert last["counts"]["in"] == 0, "a third run finds nothing to do"
    twice = sum(lab.server.hits.values()) - before - lab.images
    return f"{told}; {done:,} rows there before the second run; {twice:,} fetched again"


def _kill(lab: Lab, kind: str, at: float, workspace: Path, where: tuple[Any, ...]) -> str:
    root, env, *more = where
    process = lab.start(workspace, env, *more)
    begun = time.monotonic()
    target: list[int] = []
    while process.poll() is None and not target:
        time.sleep(0.05)
        if time.monotonic() - begun >= at:
            target = [process.pid] if kind == "driver" else victims(kind, root or process.pid)
    if target:
        os.kill(random.choice(target), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == (-signal.SIGKILL if kind == "driver" and target else 0), err[-2000:]
    return f"killed after {at:.1f} s" if target else "over before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    random.seed(given.seed)
    with Server() as server, tempfile.TemporaryDirectory(prefix="kills-") as folder:
        pairs = Path(folder, "pairs.parquet")
        urls = [server.url(f"ok/{i % 1000}.jpg?{i}") for i in range(given.images)]
        pq.write_table(pa.table({"url": urls, "caption": [f"picture {i}" for i in range(given.images)]}), pairs)
        lab = Lab(server, pairs, given.images)
        begun = time.monotonic()
        summary(lab.start(Path(folder, "undisturbed"), dict(os.environ)))
        check(lab, Path(folder, "undisturbed"))
        lab.seconds = time.monotonic() - begun
        print(f"undisturbed: {lab.seconds:.1f} s", flush=True)
        for kind in given.kinds:
            for number in range(given.moments):
                # Of a single machine's run about the first third is Ray's start; a cluster is there already.
                at = lab.seconds * random.uniform(0.05 if kind == "driver" else 0.3, 0.95)
                print(kind, number, moment(lab, kind, at, Path(folder, f"{kind}-{number}")), flush=True)
        print(f"{given.moments} moments each of {', '.join(given.kinds)}: every pair has one row, none twice")


if __name__ == "__main__":
    main()
