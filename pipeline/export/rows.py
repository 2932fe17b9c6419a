"""Rows of a table by ranges of the key, in bounded memory, whatever order the table's files have.

Where each file of a table has rows of every range of keys (they are hashes), N ranges cannot be read without reading
it all N times. Then sorted runs are written once, and a range is some row groups of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from pipeline.export.files import output_error, whole_file
from schemas.errors import WorkspaceError

KEY = "pair_key"
RUN_BYTES = 64 << 20
"""Most bytes that are sorted at once, and bytes of table files that make one run."""
RUN_ROW_GROUP = 64


@dataclass(frozen=True)
class File:
    """A Parquet file, its size and the range of its keys; None: not known."""

    path: str
    bytes: int = 0
    low: int | None = None
    high: int | None = None

    @property
    def span(self) -> pc.Expression | None:
        if self.low is None or self.high is None:
            return None
        return (pc.field(KEY) >= self.low) & (pc.field(KEY) <= self.high)


@dataclass(frozen=True)
class Rows:
    """Columns of some Parquet files, to be read by key."""

    files: tuple[File, ...]
    schema: pa.Schema

    def batches(self, where: pc.Expression | None = None) -> Iterator[pa.RecordBatch]:
        """The rows, some at a time; missing columns are null. It reads ahead by one batch and no more."""
        if not self.files:
            return
        layout, (filesystem, _) = ds.ParquetFileFormat(), pa_fs.FileSystem.from_uri(self.files[0].path)
        fragments = [
            layout.make_fragment(pa_fs.FileSystem.from_uri(f.path)[1], filesystem, partition_expression=f.span)
            for f in self.files
        ]
        dataset = ds.FileSystemDataset(fragments, self.schema, layout, filesystem)
        yield from dataset.to_batches(
            filter=where, batch_size=256, batch_readahead=1, fragment_readahead=1, use_threads=False
        )

    def effort(self, shards: Iterable[pa.Array]) -> float:
        """How often, on average, a byte is read when these sorted keys are read shard after shard."""
        ends = [(keys[0].as_py(), keys[-1].as_py()) for keys in shards]
        lows = np.sort([low for low, _ in ends])
        highs = np.sort([high for _, high in ends])
        read = 0
        for file in self.files:
            if file.low is None or file.high is None:
                read += file.bytes * len(ends)
            else:  # shards follow one another: those that begin before its end, less those that end before it begins
                met = np.searchsorted(lows, file.high, "right") - np.searchsorted(highs, file.low, "left")
                read += file.bytes * int(met)
        return read / max(1, sum(file.bytes for file in self.files))

    def of(self, keys: pa.Array) -> Iterator[dict[str, Any]]:
        """The rows of these sorted keys, in their order. Keys that are not there are left out."""
        if not len(keys):
            return
        near = (pc.field(KEY) >= keys[0]) & (pc.field(KEY) <= keys[-1])
        batches = [b for b in self.batches(near & pc.field(KEY).isin(keys)) if b.num_rows]
        if not batches:
            return
        # Not sorted as one table: its images may be more than the 2 GiB that one array of bytes holds.
        numbers = np.concatenate([np.full(b.num_rows, i) for i, b in enumerate(batches)])
        places = np.concatenate([np.arange(b.num_rows) for b in batches])
        for i in np.argsort(np.concatenate([b[KEY].to_numpy() for b in batches]), kind="stable"):
            yield batches[numbers[i]].slice(places[i], 1).to_pylist()[0]


class SortStage:
    """Some files of a table -> one file of the selected rows, in stretches sorted by key. Returns its path."""

    def __init__(self, schema: pa.Schema, selected: NDArray[np.int64], folder: str) -> None:
        self.schema, self.selected, self.folder = schema, selected, folder

    def __call__(self, group: tuple[str, tuple[File, ...]]) -> str:
        """``group``: the run's name and the table's files. A run that is there already is kept."""
        name, files = group
        path = UPath(self.folder) / f"{name}.parquet"
        if path.exists():
            return str(path)
        try:
            with whole_file(path) as sink, pq.ParquetWriter(sink, self.schema, compression="none") as writer:
                self._write(writer, files)
        except OSError as exc:
            raise output_error(exc, self.folder) from exc
        return str(path)

    def _write(self, writer: pq.ParquetWriter, files: tuple[File, ...]) -> None:
        held: list[pa.RecordBatch] = []
        size = 0
        for batch in Rows(files, self.schema).batches():
            mine = batch.filter(pa.array(is_in(self.selected, batch[KEY].to_numpy())))
            held.append(mine)
            size += mine.get_total_buffer_size()
            if size > RUN_BYTES:
                self._sorted(held, writer)
                held, size = [], 0
        self._sorted(held, writer)

    def _sorted(self, batches: list[pa.RecordBatch], writer: pq.ParquetWriter) -> None:
        if batches:
            rows = pa.Table.from_batches(batches).sort_by(KEY)
            writer.write_table(rows, row_group_size=RUN_ROW_GROUP)


def is_in(keys: NDArray[np.int64], these: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of ``these`` are among the sorted ``keys``."""
    if not len(keys):
        return np.zeros(len(these), np.bool_)
    at = np.minimum(np.searchsorted(keys, these), len(keys) - 1)
    return np.asarray(keys[at] == these)


def groups(files: Sequence[File], size: int = RUN_BYTES) -> Iterator[tuple[str, tuple[File, ...]]]:
    """``files`` in groups of about ``size`` bytes, each with a name."""
    held: list[File] = []
    total = number = 0
    for file in files:
        held.append(file)
        total += file.bytes
        if total >= size:
            yield f"{number:05d}", tuple(held)
            held, total, number = [], 0, number + 1
    if held:
        yield f"{number:05d}", tuple(held)


def missing(number: int, expected: int, found: int) -> WorkspaceError:
    """What to tell where a shard's rows are gone."""
    return WorkspaceError(
        f"the table images has changed under shard {number}",
        expected=f"{expected} rows",
        actual=f"{found}",
        remedy="do not vacuum while a job runs; run it again",
    )
