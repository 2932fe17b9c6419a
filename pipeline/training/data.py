"""Samples of the tables for training, ordered by key: pictures as pixels, captions, vectors."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.vectors import read_vectors
from pipeline.workspace import Workspace
from schemas.errors import NothingToDo, Reason
from schemas.vectors import pack, unpack

_IN_MEMORY = 2 << 30
_BUCKETS = 1_000_000
_CHUNK = 1 << 30


class Pictures:
    """Encoded images as uint8 pixels [N, 3, S, S]: decoded once where that fits into memory, else when asked."""

    def __init__(self, images: pa.ChunkedArray, size: int) -> None:
        self._images, self._size = images.combine_chunks(), size
        self._pixels: NDArray[np.uint8] | None = None
        if len(images) * 3 * size * size <= _IN_MEMORY:
            self._pixels = self._decode(np.arange(len(images)))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: NDArray[np.int64]) -> Tensor:
        """uint8 [B, 3, S, S]"""
        return torch.from_numpy(self._decode(rows) if self._pixels is None else self._pixels[rows])

    def _decode(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        out = np.empty((len(rows), 3, self._size, self._size), np.uint8)
        for i, row in enumerate(rows.tolist()):
            with Image.open(io.BytesIO(self._images[row].as_py())) as image:
                out[i] = np.asarray(_square(image.convert("RGB"), self._size)).transpose(2, 0, 1)
        return out


def _square(image: Image.Image, size: int) -> Image.Image:
    """The middle square, ``size`` pixels wide."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def held_out(keys: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Which keys are kept for validation: a function of the key alone, so the split is the same everywhere."""
    return np.asarray(keys % _BUCKETS < share * _BUCKETS)


def read_pairs(workspace: Workspace, version: int) -> pa.Table:
    """(pair_key, caption, image) of all images that are ok, by key.

    Raises:
        NothingToDo: there are none.
    """
    rows = workspace.table("images").read(
        ["pair_key", "caption", "image"], pc.field("status") == str(Reason.OK), version
    )
    if rows.num_rows == 0:
        raise NothingToDo("there are no images to train on", remedy="clipmill download first")
    return rows.sort_by("pair_key")


def read_embeddings(workspace: Workspace, encoder: str, version: int, columns: Sequence[str] = ()) -> pa.Table:
    """(pair_key, image_vec, text_vec, ...) of one encoder, by key; rows that lack one of the vectors are left out.

    Raises:
        NothingToDo: there are none.
    """
    table = workspace.table("embeddings")
    found: dict[str, tuple[NDArray[np.int64], NDArray[np.float16]]] = {}
    for modality in ("image", "text"):
        try:
            found[modality] = read_vectors(table, encoder, modality, ordered=True, version=version)
        except NothingToDo as exc:
            raise NothingToDo(f"no {modality} vectors of {encoder} to train on", remedy="clipmill embed first") from exc
    keys = np.intersect1d(found["image"][0], found["text"][0], assume_unique=True)
    both = {m: v if len(k) == len(keys) else v[np.isin(k, keys)] for m, (k, v) in found.items()}
    rows = pa.table({"pair_key": keys, **{f"{m}_vec": _packed(v) for m, v in both.items()}})
    if not columns:
        return rows
    more = table.read(["pair_key", *columns], pc.field("encoder") == encoder, version).sort_by("pair_key")
    if more.num_rows > len(keys):
        more = more.filter(pa.array(np.isin(more["pair_key"].to_numpy(), keys)))
    for name in columns:
        rows = rows.append_column(name, more[name])
    return rows


def _packed(vectors: NDArray[np.float16]) -> pa.ChunkedArray:
    """[N, D] as a binary column, in chunks whose bytes one array can hold."""
    size = max(1, _CHUNK // max(1, 2 * vectors.shape[1]))
    return pa.chunked_array([pack(vectors[i : i + size]) for i in range(0, max(len(vectors), 1), size)], pa.binary())


def vectors(rows: pa.Table, column: str, dim: int) -> Tensor:
    """A vector column as unit-norm float32 [N, D] (float16 rounding undone)."""
    return torch.nn.functional.normalize(torch.from_numpy(unpack(rows[column], dim).astype(np.float32)), dim=-1)


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 in [-1, 1]"""
    return pixels.float().div_(127.5).sub_(1.0)
