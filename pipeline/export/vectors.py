"""Vectors and their metadata as shards: npy files, clip-retrieval's layout, dalle2-pytorch's, Parquet with lists.

Row i of every file of a shard is the same pair's. Source: clip-retrieval 2.45, ``clip_inference/writer.py``;
dalle2-pytorch 1.15, ``dataloaders/prior_loader.py``; embedding-reader 1.8, which reads for both of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from pipeline.export.files import output_error, whole_file
from pipeline.export.metadata import shard_name
from pipeline.vectors.folders import npy_shape, parquet_rows
from pipeline.vectors.metadata import METADATA
from schemas.errors import CountsError
from schemas.tables import EMBEDDINGS, IMAGES, PAIRS

VectorLayout = Literal["npy", "clip-retrieval", "dalle2-pytorch", "parquet-list"]
LAYOUTS: frozenset[str] = frozenset(get_args(VectorLayout))
FOLDERS = {"image": "img_emb", "text": "text_emb"}
LISTS = {"image": "image_embedding", "text": "text_embedding"}
"""Columns of the layout parquet-list."""
_LIST_ROWS = 4096

FROM_EMBEDDINGS = ("caption", "similarity", "sha256")
FROM_PAIRS = ("url",)
FROM_IMAGES = ("status", "width", "height", "original_width", "original_height")
DETAILS = pa.schema(
    [
        EMBEDDINGS.schema.field("pair_key"),
        *(EMBEDDINGS.schema.field(n) for n in FROM_EMBEDDINGS),
        *(PAIRS.schema.field(n) for n in FROM_PAIRS),
        *(IMAGES.schema.field(n) for n in FROM_IMAGES),
    ]
)
"""The door: what the tables know of a pair with vectors."""


@dataclass(frozen=True)
class VectorShard:
    """A shard's number, and which of the sorted keys are in it."""

    number: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


def shard_files(layout: VectorLayout, number: int, count: int, modalities: tuple[str, ...]) -> dict[str, str]:
    """The files of shard ``number`` of ``count``: what is in it (image, text, keys, metadata or lists) -> path."""
    if layout == "parquet-list":
        return {"lists": f"{shard_name(number)}.parquet"}
    # clip-retrieval pads to as many digits as the number of its partitions has.
    name = f"{number:0{int(math.log10(count)) + 1}d}" if layout == "clip-retrieval" else shard_name(number)
    files = {m: f"{FOLDERS[m]}/{FOLDERS[m]}_{name}.npy" for m in modalities}
    if layout == "npy":
        # Not beside the vectors: readers take every npy file of a folder for vectors.
        return files | {"keys": f"keys/keys_{name}.npy"}
    folder = "metadata" if layout == "clip-retrieval" else "meta"
    return files | {"metadata": f"{folder}/{folder}_{name}.parquet"}


def is_written(folder: UPath, files: Mapping[str, str]) -> bool:
    """Whether a shard is there: none of its files has its name before it is whole."""
    return all((folder / path).exists() for path in files.values())


def write_shard(
    folder: UPath, files: Mapping[str, str], vectors: Mapping[str, NDArray[np.float16]], details: pa.Table
) -> int:
    """Write a shard's files, the same bytes every time. Returns their size.

    ``details``: :data:`DETAILS` and further columns of embeddings, row for row with the vectors [n, D].

    Raises:
        WorkspaceError: the folder cannot be written.
    """
    size = 0
    for what, name in files.items():
        try:
            with whole_file(folder / name) as sink:
                if what == "lists":
                    _write_lists(sink, vectors, metadata(details))
                elif what == "metadata":
                    pq.write_table(metadata(details), sink)
                else:
                    np.save(sink, vectors[what] if what in vectors else details["pair_key"].to_numpy())
            size += (folder / name).stat().st_size
        except OSError as exc:
            raise output_error(exc, str(folder)) from exc
    return size


def metadata(details: pa.Table) -> pa.Table:
    """As clip-retrieval names the columns; ``image_path`` is the key, since no image has a path here."""
    paths = details["pair_key"].cast(pa.string())
    further = [n for n in details.column_names if n not in DETAILS.names]
    return details.append_column("image_path", paths).select([*METADATA, *further])


def check_counts(folder: UPath, files: Mapping[str, str], rows: int) -> None:
    """Raises CountsError, naming the file and both counts, if a file has not ``rows`` rows."""
    for name in files.values():
        path = folder / name
        found = npy_shape(path)[0][0] if name.endswith(".npy") else parquet_rows(path)
        if found != rows:
            raise CountsError(
                f"{path} is not what was exported",
                expected=f"{rows} rows",
                actual=f"{found}",
                remedy="delete it, and run the same command again",
            )


def _write_lists(sink: object, vectors: Mapping[str, NDArray[np.float16]], rows: pa.Table) -> None:
    names = {LISTS[m]: matrix for m, matrix in vectors.items()}
    lists = [pa.field(name, pa.list_(pa.float32())) for name in names]
    rows = rows.drop_columns(["image_path"])
    schema = pa.schema([*rows.schema, *lists])
    with pq.ParquetWriter(sink, schema, use_dictionary=rows.column_names) as writer:
        for start in range(0, rows.num_rows, _LIST_ROWS):
            columns = [_lists(matrix[start : start + _LIST_ROWS]) for matrix in names.values()]
            part = rows.slice(start, _LIST_ROWS).combine_chunks()
            writer.write_table(pa.table([*part.columns, *columns], schema=schema))


def _lists(matrix: NDArray[np.float16]) -> pa.Array:
    """[n, D] -> list<float32>[n]"""
    n, d = matrix.shape
    return pa.ListArray.from_arrays(
        pa.array(np.arange(n + 1, dtype=np.int32) * d), pa.array(np.ascontiguousarray(matrix, np.float32).ravel())
    )
