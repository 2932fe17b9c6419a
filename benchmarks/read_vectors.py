"""Reading vectors: one encoder's from the table embeddings against .npy, embedding-reader and Arrow's own decoding.

    python -m benchmarks read_vectors                      # 500,000 x 512, about six minutes on two cores
    python -m benchmarks read_vectors -- --rows 50000

The same unit-norm float16 vectors in all forms: the table, in parts as ``embed`` writes and commits them (2,048 rows,
both modalities, captions); one .npy file; and list<float32> columns with Parquet's default compression, in files of
10,000 rows as ``export --format parquet-list`` writes them, so that embedding-reader, which reads a file anew for each
piece, reads each once. It runs in a venv of its own (made in ``--cache``).

Each reader is a process of its own; imports are not timed. Reading starts at the folder and ends at a matrix in memory,
of which a sample is compared with what was written. It reads once to warm files and memory, then up to nine times
in three seconds, of which the median is taken. Medians of ``--rounds``, readers in turn; ratios are the medians of the
rounds' ratios. Wall seconds, and CPU seconds of all threads.

Before that, embedding-reader reads what ``export`` writes, in every layout: each key's vector must be the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.lab.report import Line, Report, machine, table
from benchmarks.lab.tools import make_venv
from jobs.cli import main as main_of_clipmill
from pipeline.encoders import save_card
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.tables import EMBEDDINGS
from schemas.vectors import normalise, pack

RIVAL = "embedding-reader==1.8.1"
ENCODER = "bench-000000000000"
PART, LISTS = 2048, 10_000
_SAMPLE = 1000

TIMED = """
import json, sys, time
import numpy as np

def timed(read, source):
    read()
    taken = []
    while not taken or (len(taken) < 9 and sum(w for w, _ in taken) < 3):
        keys = vectors = None
        wall, cpu = time.perf_counter(), time.process_time()
        keys, vectors = read()
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = (sorted(seconds)[len(taken) // 2] for seconds in zip(*taken))
    at = np.random.default_rng(1).permutation(len(vectors))[:1000]
    rows = np.load(source + "/vectors.npy", mmap_mode="r")
    known = np.load(source + "/keys.npy")
    place = at if keys is None else np.argsort(known)[np.searchsorted(np.sort(known), keys[at])]
    right = len(vectors) == len(rows) and (keys is None or (known[place] == keys[at]).all())
    right = bool(right and np.array_equal(np.asarray(vectors[at], np.float16), rows[place]))
    print(json.dumps({"wall": wall, "cpu": cpu, "right": right}))

"""
OURS = """
from pipeline.vectors import read_vectors
from pipeline.workspace import Workspace
table = Workspace(sys.argv[1] + "/ws").table("embeddings")
"""
ARROW = """
import pyarrow.compute as pc
from schemas.vectors import unpack
def arrow():
    rows = table.read(["pair_key", "image_vec"], pc.field("encoder") == "bench-000000000000")
    return rows["pair_key"].to_numpy(), unpack(rows["image_vec"], int(sys.argv[2]))
"""
READER = """
from embedding_reader import EmbeddingReader
def reader(**what):
    found = EmbeddingReader(**what)
    (vectors, _), = found(batch_size=int(sys.argv[3]), show_progress=False)
    return None, vectors
"""
LAYOUTS = """
import json, sys
import numpy as np
from embedding_reader import EmbeddingReader
folder, found = sys.argv[1], {}
for layout, meta in (("clip-retrieval", "metadata"), ("dalle2-pytorch", "meta"), ("npy", None), ("parquet-list", None)):
    here = folder + "/" + layout
    for what, name in (("image", "img_emb"), ("text", "text_emb")):
        if layout == "parquet-list":
            given = dict(embeddings_folder=here, file_format="parquet", embedding_column=what + "_embedding",
                         meta_columns=["pair_key"])
        elif meta:
            given = dict(embeddings_folder=here + "/" + name, file_format="parquet_npy",
                         metadata_folder=here + "/" + meta, meta_columns=["pair_key", "caption"])
        else:
            given = dict(embeddings_folder=here + "/" + name, file_format="npy")
        batches = list(EmbeddingReader(**given)(batch_size=70, show_progress=False))
        rows = np.concatenate([v for v, _ in batches]).astype(np.float16)
        if layout == "npy":
            files = sorted(__import__("glob").glob(here + "/keys/*.npy"))
            keys = np.concatenate([np.load(f) for f in files]).tolist()
        else:
            keys = [int(k) for _, m in batches for k in m["pair_key"]]
        found[layout + " " + what] = {str(k): v.tobytes().hex() for k, v in zip(keys, rows)}
print(json.dumps(found))
"""
READERS = {
    "ours": (OURS, 'lambda: read_vectors(table, "bench-000000000000")'),
    "ours, ordered": (OURS, 'lambda: read_vectors(table, "bench-000000000000", ordered=True)'),
    "Arrow's decoding": (OURS + ARROW, "arrow"),
    "np.load": ("", 'lambda: (None, np.load(sys.argv[1] + "/vectors.npy"))'),
    "np.load, mapped": ("", 'lambda: (None, np.array(np.load(sys.argv[1] + "/vectors.npy", mmap_mode="r")))'),
    "embedding-reader, parquet": (
        READER,
        'lambda: reader(embeddings_folder=sys.argv[1] + "/lists", file_format="parquet", embedding_column="embedding")',
    ),
    "embedding-reader, npy": (READER, 'lambda: reader(embeddings_folder=sys.argv[1] + "/npy", file_format="npy")'),
}


def write(folder: Path, rows: int, dim: int) -> None:
    """The same vectors in all forms."""
    rng = np.random.default_rng(0)
    vectors = np.concatenate(
        [
            normalise(rng.standard_normal((min(65_536, rows - i), dim), dtype=np.float32)).astype(np.float16)
            for i in range(0, rows, 65_536)
        ]
    )
    keys = np.unique(rng.integers(0, 2**63 - 1, rows, dtype=np.int64))
    assert len(keys) == rows
    keys = keys[rng.permutation(rows)]
    np.save(folder / "keys.npy", keys)
    np.save(folder / "vectors.npy", vectors)
    (folder / "npy").mkdir()
    (folder / "npy" / "vectors.npy").hardlink_to(folder / "vectors.npy")
    embeddings = Workspace(folder / "ws").prepare().table("embeddings")
    parts = [embeddings.write_part(_rows(keys[i : i + PART], vectors[i : i + PART])) for i in range(0, rows, PART)]
    embeddings.commit(parts, "bench")
    (folder / "lists").mkdir()
    for n, start in enumerate(range(0, rows, LISTS)):
        some = vectors[start : start + LISTS].astype(np.float32)
        offsets = pa.array(np.arange(len(some) + 1, dtype=np.int32) * dim)
        column = pa.ListArray.from_arrays(offsets, pa.array(some.ravel()))
        pq.write_table(pa.table({"embedding": column}), folder / "lists" / f"{n:05d}.parquet")


def _rows(keys: NDArray[np.int64], vectors: NDArray[np.float16]) -> pa.Table:
    n = len(keys)
    return pa.table(
        {
            "pair_key": keys,
            "encoder": pa.array([ENCODER] * n, pa.string()),
            "image_vec": pack(vectors),
            "text_vec": pack(vectors[::-1]),
            "similarity": pa.array(np.full(n, 0.3), pa.float32()),
            "caption": pa.array([f"a photograph of number {k}" for k in keys.tolist()], pa.string()),
            "sha256": pa.nulls(n, pa.string()),
            "run": pa.array(["bench"] * n, pa.string()),
        },
        schema=EMBEDDINGS.schema,
    )


def read(name: str, folder: Path, rows: int, dim: int, rival: Path) -> dict[str, float]:
    """One reading in a process of its own. Raises SystemExit if it gives something else than was written."""
    setup, call = READERS[name]
    python = str(rival / "bin" / "python") if setup is READER else sys.executable
    code = f"{TIMED}{setup}\ntimed({call}, sys.argv[1])\n"
    done = subprocess.run(
        [python, "-c", code, str(folder), str(dim), str(rows)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not found.pop("right"):
        raise SystemExit(f"{name} gives other vectors than were written")
    return found


def check_layouts(folder: Path, rival: Path) -> None:
    """What ``export`` writes, embedding-reader reads: every key's vector, in every layout it knows."""
    workspace, rows, dim = Workspace(folder / "small").prepare(), 1000, 16
    rng = np.random.default_rng(0)
    vectors = normalise(rng.standard_normal((rows, dim))).astype(np.float16)
    keys = np.sort(rng.integers(0, 2**63 - 1, rows, dtype=np.int64))[rng.permutation(rows)]
    table = _rows(keys, vectors)
    workspace.table("embeddings").append(table, "bench")
    card = EncoderCard(
        model="bench", pretrained="", weights_sha256="0" * 64, dim=dim, image_size=8, mean=(0, 0, 0), std=(1, 1, 1),
        interpolation="bicubic", resize_mode="shortest", context_length=8, dtype="float32",
    )  # fmt: skip
    save_card(workspace, card)
    for layout in ("clip-retrieval", "dalle2-pytorch", "npy", "parquet-list"):
        arguments = ["--format", layout, "--output", str(folder / "layouts" / layout), "--shard-size", "90"]
        if main_of_clipmill(["export", "--workspace", str(folder / "small"), *arguments]):
            raise SystemExit(f"export --format {layout} failed")
    done = subprocess.run(
        [rival / "bin" / "python", "-c", LAYOUTS, str(folder / "layouts")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        column = table[f"{name.rpartition(' ')[2]}_vec"].to_pylist()
        if found != {str(k): v.hex() for k, v in zip(keys.tolist(), column, strict=True)}:
            raise SystemExit(f"embedding-reader reads something else from {name}")
        print(f"    embedding-reader reads {name}: all {rows:,} vectors, bit for bit", flush=True)


def measure(folder: Path, rows: int, dim: int, rival: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Reader -> seconds of each round, after one that warms up."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}
    for round_ in range(rounds + 1):
        for name, seconds in taken.items():
            found = read(name, folder, rows, dim, rival)
            print(f"    {name:<26} wall {found['wall']:7.3f} s  cpu {found['cpu']:7.3f} s", flush=True)
            if round_:
                seconds.append(found)
    return taken


def lines(taken: dict[str, list[dict[str, float]]], size: int) -> list[Line]:
    """Ratios to ours: how many times faster ours is."""
    goals = {"np.load": 0.6, "embedding-reader, parquet": 10.0}
    made = []
    for what, unit in (("wall", "s"), ("cpu", "CPU s")):
        for name in READERS:
            if name == "ours":
                continue
            mine, theirs = ([r[what] for r in taken[n]] for n in ("ours", name))
            ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
            medians = [statistics.median(s) for s in (mine, theirs)]
            shown = [f"{s:.3f} {unit} ({size / s / 1e9:.2f} GB/s)" for s in medians]
            goal = goals.get(name) if what == "wall" else None
            made.append(Line(f"{name} / ours, {unit}", *shown, ratio, goal))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.read_vectors", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "clipmill-benchmarks"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(argv)
    rival = make_venv(given.cache / "embedding-reader", [RIVAL])
    folder = Path(tempfile.mkdtemp(prefix="clipmill-bench-"))
    try:
        check_layouts(folder, rival)
        write(folder, given.rows, given.dim)
        taken = measure(folder, given.rows, given.dim, rival, given.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = lines(taken, given.rows * given.dim * 2)
    setting = machine(("pyarrow", "numpy", "deltalake")) | {
        "embedding-reader": RIVAL.partition("==")[2], "rows": f"{given.rows:,}", "D": str(given.dim),
        "rounds": str(given.rounds),
    }  # fmt: skip
    report = Report(given.results, "read_vectors", "Reading vectors, compared")
    report.add("read", setting, found, taken)
    print("\n".join(table(found)))
    print(f"\nwritten: {report.markdown}, {report.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
