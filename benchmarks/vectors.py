"""Vectors in Parquet: our binary column against Arrow's list types and .npy files.

    python -m benchmarks vectors -- --rows 50000 --dim 512

Each form holds the same unit-norm float16 vectors. Writing starts at a NumPy matrix and ends at a closed file;
reading starts at the file and ends at a NumPy matrix, which must equal what was written. The binary column is
written and read as ``pipeline.tables`` does it. Medians of ``--repeats`` rounds, forms taken in turn; CPU
seconds of this process, all its threads.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline.tables import ROW_GROUP
from schemas.vectors import normalise, pack, unpack

Matrix = NDArray[np.float16]


@dataclass(frozen=True)
class Form:
    """One way of keeping vectors in a file."""

    name: str
    write: Callable[[Matrix, Path], None]
    read: Callable[[Path, int], NDArray[np.floating]]


def _parquet(column: pa.Array, path: Path) -> None:
    """As pipeline.tables writes a vector column: no dictionary, no compression."""
    table = pa.table({"vec": column})
    pq.write_table(table, path, row_group_size=ROW_GROUP, use_dictionary=False, compression="none")


def _write_binary(vectors: Matrix, path: Path) -> None:
    _parquet(pack(vectors), path)


def _read_binary(path: Path, dim: int) -> NDArray[np.floating]:
    return unpack(pq.read_table(path)["vec"], dim)


def _write_list(vectors: Matrix, path: Path) -> None:
    n, d = vectors.shape
    values = pa.array(vectors.astype(np.float32).ravel())
    _parquet(pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * d), values), path)


def _write_fixed(vectors: Matrix, path: Path) -> None:
    _parquet(pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]), path)


def _read_lists(path: Path, dim: int) -> NDArray[np.floating]:
    values = pq.read_table(path)["vec"].combine_chunks().flatten()
    flat: NDArray[np.floating] = values.to_numpy(zero_copy_only=False)
    return flat.reshape(-1, dim)


def _write_npy(vectors: Matrix, path: Path) -> None:
    np.save(path, vectors)


def _read_npy(path: Path, dim: int) -> NDArray[np.floating]:
    loaded: NDArray[np.floating] = np.load(path)
    return loaded


FORMS = (
    Form("binary, float16 (ours)", _write_binary, _read_binary),
    Form("list<float32>", _write_list, _read_lists),
    Form("fixed_size_list<float16>", _write_fixed, _read_lists),
    Form(".npy, float16", _write_npy, _read_npy),
)


def cpu_seconds(action: Callable[[], object]) -> float:
    """CPU seconds of this process, all threads."""
    start = time.process_time()
    action()
    return time.process_time() - start


def measure(vectors: Matrix, repeats: int) -> dict[str, dict[str, float]]:
    """Form -> median CPU seconds of writing and reading, and bytes.

    Raises:
        AssertionError: a form does not give back what was written.
    """
    seconds: dict[str, dict[str, list[float]]] = {f.name: {"write": [], "read": []} for f in FORMS}
    size: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        for round_ in range(repeats + 1):
            for form in FORMS:
                path = Path(folder, "vectors.npy")  # np.save adds the suffix where it is missing
                write = cpu_seconds(lambda form=form, path=path: form.write(vectors, path))
                read = cpu_seconds(lambda form=form, path=path: form.read(path, vectors.shape[1]))
                if round_ == 0:  # warms up, and checks
                    assert np.array_equal(form.read(path, vectors.shape[1]).astype(np.float16), vectors), form.name
                    size[form.name] = path.stat().st_size
                    continue
                seconds[form.name]["write"].append(write)
                seconds[form.name]["read"].append(read)
    return {
        name: {what: statistics.median(taken) for what, taken in both.items()} | {"bytes": float(size[name])}
        for name, both in seconds.items()
    }


def show(results: dict[str, dict[str, float]]) -> None:
    """Medians, and ratios to the binary column."""
    ours = results[FORMS[0].name]
    table = Table("form", "write, CPU s", "x ours", "read, CPU s", "x ours", "MB", box=None)
    for name, r in results.items():
        ratios = [f"{r[what] / max(ours[what], 1e-9):.1f}" for what in ("write", "read")]
        table.add_row(name, f"{r['write']:.3f}", ratios[0], f"{r['read']:.3f}", ratios[1], f"{r['bytes'] / 1e6:.1f}")
    Console(width=100).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vectors", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    vectors = normalise(rng.standard_normal((given.rows, given.dim), dtype=np.float32)).astype(np.float16)
    print(
        f"{given.rows:,} x {given.dim}, medians of {given.repeats}, Python {platform.python_version()}, "
        f"pyarrow {pa.__version__}, {platform.machine()}"
    )
    show(measure(vectors, given.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
