"""Single images out of the files of the table images: no more of a file is read than what lies before them."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq

from pipeline.keys import Keys, among
from pipeline.tables import Table

_AT_ONCE = 64
"""Rows that are decoded at once."""
_KEY, _IMAGE = "pair_key", "image"

Picture = tuple[int, bytes | None]


def pictures(table: Table, files: dict[str, Keys]) -> Iterator[Picture]:
    """The images of sorted keys by the file that has them, as the log names it; where that is gone, out of the table.

    (A file that the table no longer holds, since its rows were changed or it was compacted, is there until a vacuum.)
    """
    filesystem, folder = pa_fs.FileSystem.from_uri(table.uri)
    moved = [np.empty(0, np.int64)]
    for path, keys in files.items():
        try:
            found = list(_of_file(filesystem, f"{folder.rstrip('/')}/{unquote(path)}", keys))
        except (OSError, pa.ArrowInvalid):
            found = []
        yield from found
        moved.append(np.setdiff1d(keys, np.array([key for key, _ in found], np.int64)))
    missing = np.concatenate(moved)
    if len(missing):
        rows = table.read([_KEY, _IMAGE], pc.field(_KEY).isin(pa.array(missing)))
        yield from zip(rows[_KEY].to_pylist(), rows[_IMAGE].to_pylist(), strict=True)


def _of_file(filesystem: pa_fs.FileSystem, path: str, keys: Keys) -> Iterator[Picture]:
    local = isinstance(filesystem, pa_fs.LocalFileSystem)
    with pa.memory_map(path) if local else filesystem.open_input_file(path) as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            own = parquet.read_row_group(group, [_KEY], use_threads=False)[_KEY].to_numpy()
            places = np.flatnonzero(among(keys, own))
            if not len(places):
                continue
            first = 0
            for batch in parquet.iter_batches(_AT_ONCE, row_groups=[group], columns=[_IMAGE], use_threads=False):
                inside = places[(places >= first) & (places < first + batch.num_rows)]
                yield from ((int(own[at]), batch.column(0)[int(at - first)].as_py()) for at in inside)
                first += batch.num_rows
                if first > places[-1]:
                    break
