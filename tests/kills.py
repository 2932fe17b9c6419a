"""kill -9 at random moments: of the driver, of a worker, of a node's raylet; then the same command again.

    python -m tests.kills [--job download] [--moments 10] [--number 5000] [--seed 0] [--kinds driver worker raylet]

Checked after each, for ``download``: a row for every pair, no key twice, how many images were fetched a second time;
for ``embed``: the table equals, row for row (run ids apart), an undisturbed run's. For both: the second run's work is
what was missing, and a third finds nothing to do. Prints a line a moment; about eight minutes on two cores for
``download``, half an hour for ``embed`` (a worker loads torch and the model).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.models.clip import build_clip
from pipeline.models.encoder import read_model_config
from pipeline.workspace import Workspace
from schemas.keys import pair_key
from schemas.tables import IMAGES, PAIRS
from tests.servers import Server
from tests.test_cluster import CLUSTER

KINDS = ("driver", "worker", "raylet")
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
"""A CLIP with random weights, slow enough that there is a middle to be killed in."""
Environment = dict[str, str]


# ---- what is run -----------------------------------------------------------------------------------


@dataclass
class Download:
    """A list and its server."""

    folder: Path
    server: Server
    number: int
    shard: int = 250

    def prepare(self, workspace: Path) -> None:
        """Write the list, if it is not there yet."""
        if not self.pairs.exists():
            urls = [self.server.url(f"ok/{i % 1000}.jpg?{i}") for i in range(self.number)]
            captions = [f"picture {i}" for i in range(self.number)]
            pq.write_table(pa.table({"url": urls, "caption": captions}), self.pairs)

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.parquet"

    def command(self, workspace: Path) -> list[str]:
        return [
            "download", "--workspace", str(workspace), "--pairs", str(self.pairs), "--allow-hosts", self.server.host,
            "--shard-size", str(self.shard), "--retry-delay", "0",
        ]  # fmt: skip

    def done(self, workspace: Path) -> int:
        return Workspace(workspace).table("images").count()

    def fetched(self) -> int:
        return sum(self.server.hits.values())

    def check(self, workspace: Path, fetched: int) -> str:
        """One row a pair, each of them ok; how many of the ``fetched`` were so again."""
        rows = Workspace(workspace).table("images").read(["pair_key", "status"])
        assert rows.num_rows == self.number, f"{rows.num_rows} rows of {self.number}"
        assert len(set(rows["pair_key"].to_pylist())) == self.number, "a key twice"
        assert set(rows["status"].to_pylist()) == {"ok"}
        assert Workspace(workspace).table("pairs").count() == self.number
        return f"{fetched - self.number:,} fetched again"


@dataclass
class Embed:
    """Images with captions, and a small CLIP. The first workspace checked is the one that the others must equal."""

    folder: Path
    number: int
    shard: int = 100
    model: Mapping[str, Any] | None = None
    reference: pa.Table | None = None

    def prepare(self, workspace: Path) -> None:
        """A workspace with the images, none of them embedded."""
        if not (self.folder / "clip").exists():
            save_clip(self.folder / "clip", self.model or SMALL)
            side = int((self.model or SMALL)["vision_cfg"]["image_size"])
            for start in range(0, self.number, 1000):
                add_images(Workspace(self.folder / "images"), range(start, min(start + 1000, self.number)), side)
        shutil.copytree(self.folder / "images", workspace)

    def command(self, workspace: Path) -> list[str]:
        encoder = f"local-dir:{self.folder / 'clip'}"
        return ["embed", "--workspace", str(workspace), "--encoder", encoder, "--shard-size", str(self.shard)]

    def done(self, workspace: Path) -> int:
        return Workspace(workspace).table("embeddings").count()

    def fetched(self) -> int:
        return 0

    def check(self, workspace: Path, fetched: int) -> str:
        """Every image's row, equal to the undisturbed run's."""
        rows = embeddings(workspace)
        assert rows.num_rows == self.number, f"{rows.num_rows} rows of {self.number}"
        if self.reference is None:
            self.reference = rows
        other, most = same_rows(rows, self.reference)
        return (
            f"{other:,} rows with vectors that are not bit-equal, by {most:.0e} at most" if other else "all bit-equal"
        )


def save_clip(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """A CLIP with random weights, as ``local-dir:`` loads it. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    grey = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "model.json").write_text(json.dumps({"model_cfg": dict(config), "preprocess_cfg": grey}))
    (folder / "open_clip_config.json").write_text(json.dumps(read_model_config(str(folder / "model.json"))))
    torch.manual_seed(seed)
    save_file(build_clip(config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def image_row(number: int, side: int = 16, picture: int | None = None) -> dict[str, Any]:
    """A row of images, made of its number alone. ``picture``: another picture under the same key."""
    rng = np.random.default_rng(number if picture is None else picture)
    file = io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    small.resize((side, side), Image.Resampling.BICUBIC).save(file, "PNG")
    url, caption = f"https://h/{number}.png", f"picture {number}"
    return dict.fromkeys(IMAGES.schema.names) | {
        "pair_key": pair_key(url, caption), "url": url, "caption": caption, "status": "ok", "attempts": 1,
        "retryable": False, "sha256": hashlib.sha256(file.getvalue()).hexdigest(), "width": side, "height": side,
        "original_width": side, "original_height": side, "image": file.getvalue(), "format": "png", "run": "download",
    }  # fmt: skip


def add_images(workspace: Workspace, numbers: Sequence[int], side: int = 16) -> None:
    """Pairs and their images, as a download leaves them."""
    rows = [image_row(number, side) for number in numbers]
    pairs = [{n: row.get(n) for n in PAIRS.schema.names} | {"added_run": "download"} for row in rows]
    workspace.table("pairs").append(pa.Table.from_pylist(pairs, schema=PAIRS.schema), "download")
    workspace.table("images").append(pa.Table.from_pylist(rows, schema=IMAGES.schema), "download")


def embeddings(workspace: Path) -> pa.Table:
    """All rows of embeddings by key, run ids apart."""
    rows = Workspace(workspace).table("embeddings").read().drop_columns(["run"])
    return rows.sort_by([("pair_key", "ascending"), ("encoder", "ascending")]).combine_chunks()


def same_rows(rows: pa.Table, expected: pa.Table) -> tuple[int, float]:
    """How many rows hold a vector that is not bit-equal, and the largest difference of two numbers.

    (How a matrix product rounds its sums depends on its other rows, and on where in memory they lie.)

    Raises:
        AssertionError: any other difference, or one larger than float16's rounding of a unit vector.
    """
    vectors = ["image_vec", "text_vec", "similarity"]
    assert rows.drop_columns(vectors).equals(expected.drop_columns(vectors)), "other rows"
    np.testing.assert_allclose(rows["similarity"].to_numpy(), expected["similarity"].to_numpy(), atol=1e-4)
    other, most = np.zeros(rows.num_rows, np.bool_), 0.0
    for column in vectors[:2]:
        a, b = (np.frombuffer(b"".join(t[column].to_pylist()), "<f2").reshape(len(t), -1) for t in (rows, expected))
        apart = np.abs(a.astype(np.float32) - b.astype(np.float32))
        assert apart.max(initial=0.0) <= 1e-3, f"{column} differs by {apart.max()}"
        other |= (a != b).any(1)
        most = max(most, float(apart.max(initial=0.0)))
    return int(other.sum()), most


Job = Download | Embed


# ---- killing ---------------------------------------------------------------------------------------


def start(job: Job, workspace: Path, env: Environment, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.cli", *job.command(workspace), "--json", *more]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def summary(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=600)
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
    """Processes to choose from: actors of any stage, or the raylets of all nodes but the first, which has no CPU."""
    if kind == "worker":
        return [pid for pid, line in descendants(root) if line.startswith("ray::_")]
    return [pid for pid, line in descendants(root) if line.split(" ")[0].endswith("/raylet")][1:]


@contextmanager
def cluster() -> Iterator[tuple[str, Environment, int]]:
    """Address, environment and root process of a head without CPUs and two nodes of one."""
    env = os.environ | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory(prefix="cmk-", ignore_cleanup_errors=True) as folder:  # Ray may still write logs
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


@dataclass(frozen=True)
class Moment:
    """So many seconds into the run, and not before so many rows are there."""

    seconds: float
    rows: int = 0


def some_moment(job: Job, kind: str, seconds: float) -> Moment:
    """A random one of a run of ``seconds``."""
    if random.random() < 0.7:
        # Most of a short run is its start, and how long that takes varies: count what is committed.
        return Moment(0.0, int(job.number * random.uniform(0.02, 0.9)))
    # Of a single machine's run about the first third is Ray's start; a cluster is there already.
    return Moment(seconds * random.uniform(0.05 if kind == "driver" else 0.3, 0.95))


def moment(job: Job, kind: str, at: Moment, workspace: Path) -> str:
    """One kill and the run after it. Returns what is to be told of it."""
    before = job.fetched()
    job.prepare(workspace)
    if kind == "raylet":
        with cluster() as (address, env, root):
            told = _kill(job, kind, at, workspace, (root, env, "--address", address))
    else:
        told = _kill(job, kind, at, workspace, (0, dict(os.environ)))
    done = job.done(workspace)
    again = summary(start(job, workspace, dict(os.environ)))
    assert again["counts"]["in"] == job.number - done, f"{again['counts']} after {done}"
    checked = job.check(workspace, job.fetched() - before)
    last = summary(start(job, workspace, dict(os.environ)))
    assert last["counts"]["in"] == 0, "a third run finds nothing to do"
    return f"{told}; {done:,} rows there before the second run; {checked}"


def _kill(job: Job, kind: str, at: Moment, workspace: Path, where: tuple[Any, ...]) -> str:
    root, env, *more = where
    process = start(job, workspace, env, *more)
    begun = time.monotonic()
    target: list[int] = []
    while process.poll() is None and not target:
        time.sleep(0.05)
        if time.monotonic() - begun >= at.seconds and (at.rows == 0 or job.done(workspace) >= at.rows):
            time.sleep(random.uniform(0.0, 0.3) if at.rows else 0.0)
            target = [process.pid] if kind == "driver" else victims(kind, root or process.pid)
    killed = time.monotonic() - begun
    try:
        if target:
            os.kill(random.choice(target), signal.SIGKILL)
    except ProcessLookupError:  # it ended while its rows were counted
        target = []
    _, err = process.communicate(timeout=600)
    assert process.returncode == (-signal.SIGKILL if kind == "driver" and target else 0), err[-2000:]
    return f"killed after {killed:.1f} s" if target else "over before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=("download", "embed"), default="download")
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--number", "--images", type=int, default=5000, help="of pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    random.seed(given.seed)
    with Server() as server, tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        job: Job = Download(folder, server, given.number) if given.job == "download" else Embed(folder, given.number)
        job.prepare(folder / "undisturbed")
        begun = time.monotonic()
        summary(start(job, folder / "undisturbed", dict(os.environ)))
        seconds = time.monotonic() - begun
        job.check(folder / "undisturbed", given.number)
        print(f"undisturbed: {seconds:.1f} s", flush=True)
        for kind in given.kinds:
            for number in range(given.moments):
                at = some_moment(job, kind, seconds)
                print(kind, number, moment(job, kind, at, folder / f"{kind}-{number}"), flush=True)
                shutil.rmtree(folder / f"{kind}-{number}")
        print(f"{given.moments} moments each of {', '.join(given.kinds)}: every pair has one row, none twice")


if __name__ == "__main__":
    main()
