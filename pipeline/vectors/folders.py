"""Folders of vectors as clip-retrieval's inference writes them and LAION publishes them.

``img_emb/img_emb_0.npy``, ``text_emb/text_emb_0.npy`` and ``metadata/metadata_0.parquet`` of one number belong
together, row by row. That is the only join by position here, so counts are compared file by file before a row is read.

Source: clip-retrieval 2.45, ``clip_inference/writer.py`` (``OutputSink``).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from schemas.errors import UsageError

CARD = "card.json"
IMAGE, TEXT, METADATA = ("img_emb", "images"), ("text_emb", "texts"), ("metadata", "meta", "*-metadata")
"""What the folders are called, by clip-retrieval, by LAION and by us."""
ROWS = 65_536

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class VectorFiles:
    """Files of one number: ``rows`` rows each, joined by position. One of ``image`` and ``text`` may be missing."""

    image: UPath | None
    text: UPath | None
    metadata: UPath
    rows: int
    dim: int


@dataclass(frozen=True)
class Stretch:
    """Consecutive rows of such files, from row ``first`` on: metadata, and vectors [n, D] in the file's own type."""

    files: VectorFiles
    first: int
    metadata: pa.Table
    image: Floats | None
    text: Floats | None


def is_vector_folder(source: str) -> bool:
    """Whether a source is a folder with a folder of npy files by one of the names above."""
    path = UPath(source)
    return path.is_dir() and any(_numbered(path, names, "npy") for names in (IMAGE, TEXT))


def find_vector_files(source: str) -> list[VectorFiles]:
    """The files of a folder, by number, with all counts compared.

    Raises:
        UsageError: a file without its fellows, one of another number of rows (it names both), or no matrix of floats.
    """
    folder = UPath(source)
    image, text = (_numbered(folder, names, "npy") for names in (IMAGE, TEXT))
    metadata = _numbered(folder, METADATA, "parquet")
    if not metadata:
        raise UsageError(
            f"{folder} has vectors, but no metadata to tell whose they are",
            expected="metadata/*.parquet with the columns url and caption, one file for each npy file",
        )
    numbers = {name: set(files) for name, files in (("image", image), ("text", text), ("metadata", metadata)) if files}
    everything = set().union(*numbers.values())
    for name, there in numbers.items():
        if missing := sorted(everything - there):
            raise UsageError(
                f"{folder}: {name} files are missing",
                expected=f"one of each number: {len(everything)}",
                actual=f"none numbered {', '.join(map(str, missing[:10]))}",
            )
    return [_checked(image.get(n), text.get(n), metadata[n]) for n in sorted(everything)]


def stretches(files: VectorFiles, size: int = ROWS) -> Iterator[Stretch]:
    """The rows, at most ``size`` at a time. Local vectors stay on disk until they are used."""
    image, text = (None if path is None else _load(path) for path in (files.image, files.text))
    with files.metadata.open("rb") as file:
        first = 0
        for batch in pq.ParquetFile(file).iter_batches(size):
            here = slice(first, first + batch.num_rows)
            parts = (None if matrix is None else matrix[here] for matrix in (image, text))
            yield Stretch(files, first, pa.Table.from_batches([batch]), *parts)
            first += batch.num_rows


def npy_shape(path: UPath) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an npy file, from its header.

    Raises:
        UsageError: it is none.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
    except ValueError as exc:
        raise UsageError(f"{path} is no npy file", actual=str(exc)) from exc
    return shape, dtype


def parquet_rows(path: UPath) -> int:
    """Number of rows of a Parquet file, from its footer.

    Raises:
        UsageError: it is none.
    """
    try:
        with path.open("rb") as file:
            return int(pq.read_metadata(file).num_rows)
    except pa.ArrowInvalid as exc:
        raise UsageError(f"{path} is no Parquet file", actual=str(exc)) from exc


def _numbered(folder: UPath, names: Sequence[str], suffix: str) -> dict[int, UPath]:
    """The files of the first folder of these names that has any, by the number at the end of their names."""
    for candidate in (found for name in names for found in sorted(folder.glob(name), key=str)):
        files = sorted(candidate.glob(f"*.{suffix}"), key=str) if candidate.is_dir() else []
        numbered = {int(m[1]): f for f in files if (m := re.search(r"(\d+)$", f.stem))}
        if len(numbered) < len(files):
            raise UsageError(
                f"{candidate}: which of its files belong to which others?",
                expected=f"names that end in a number of their own, as in {names[0]}_0.{suffix}",
                actual=", ".join(f.name for f in files[:5]),
            )
        if files:
            return numbered
    return {}


def _checked(image: UPath | None, text: UPath | None, metadata: UPath) -> VectorFiles:
    rows, dims = parquet_rows(metadata), []
    for path in (image, text):
        if path is None:
            continue
        shape, dtype = npy_shape(path)
        if len(shape) != 2 or dtype.kind != "f":
            raise UsageError(f"{path} holds no vectors", expected="a matrix of floats", actual=f"{dtype} {shape}")
        if shape[0] != rows:
            raise UsageError(
                f"{path} does not belong to {metadata}",
                expected=f"{rows} rows, as in {metadata.name}",
                actual=f"{shape[0]} rows in {path.name}",
                remedy="they are joined by position: get both files again",
            )
        dims.append(shape[1])
    if len(set(dims)) > 1:
        raise UsageError(f"{image} and {text} are not of one encoder", actual=f"D={dims[0]} and D={dims[1]}")
    return VectorFiles(image, text, metadata, rows, dims[0])


def _load(path: UPath) -> Floats:
    if path.protocol in ("", "file"):
        mapped: Floats = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped
    loaded: Floats = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return loaded
