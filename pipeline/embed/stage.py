"""The stages: images of a shard -> pixels; images or pixels, with captions -> rows of embeddings, one encoder's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.embed.scores import Scores
from schemas.errors import AuditError
from schemas.vectors import pack

if TYPE_CHECKING:
    from pipeline.models.encoder import Encoder

IMAGE_COLUMNS = ("pair_key", "caption", "sha256", "image")
"""What is read of images."""
_UNDECODABLE = (OSError, ValueError, SyntaxError, TypeError)
_LENGTH = 1e-3
"""How far from 1 the length of a unit-norm vector may be."""
_NAMED = 10

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Decoded:
    """Images of a shard that decode: ``rows`` without their bytes, and their pixels [N, 3, S, S], in one order.

    ``bad``: pair_key and sha256 of the others.
    """

    rows: pa.Table
    pixels: Pixels
    bad: pa.Table


@dataclass(frozen=True)
class Embedded:
    """``rows`` of embeddings, and how many images and texts went through the model for them.

    ``bad``: pair_key and sha256 of images that do not decode.
    """

    rows: pa.Table
    bad: pa.Table
    images: int
    texts: int


class DecodeStage:
    """Rows of images -> :class:`Decoded`. Needs no model."""

    def __init__(self, decode: Callable[[bytes], Pixels], size: int) -> None:
        self.decode, self.size = decode, size

    def __call__(self, images: pa.Table) -> Decoded:
        pixels = np.empty((images.num_rows, 3, self.size, self.size), np.uint8)
        good = np.zeros(images.num_rows, np.bool_)
        n = 0
        for i, data in enumerate(images["image"]):
            try:
                pixels[n] = self.decode(data.as_py())
            except _UNDECODABLE:
                continue
            good[i] = True
            n += 1
        rows, bad = _apart(images, good)
        return Decoded(rows, pixels[:n], bad)


class EmbedStage:
    """Rows of images, or :class:`Decoded` ones -> :class:`Embedded`. Equal captions of a shard are encoded once.

    Raises:
        AuditError: vectors that are not finite, or of zeros: the model's weights are damaged.
    """

    def __init__(self, encoder: Encoder, batch_size: int, run: str, scores: Scores | None = None) -> None:
        self.encoder, self.run = encoder, run
        self.batch_size = encoder.batch_size(batch_size)
        self.scores = scores or Scores()

    def __call__(self, given: pa.Table | Decoded) -> Embedded:
        if isinstance(given, Decoded):
            n, size = len(given.pixels), self.batch_size
            image = self._vectors(given.pixels[i : i + size] for i in range(0, n, size))
            rows, bad = given.rows, given.bad
        else:
            good = np.zeros(given.num_rows, np.bool_)
            image = self._vectors(self._decoded(given, good))
            rows, bad = _apart(given, good)
        captions = [caption or "" for caption in rows["caption"].to_pylist()]
        text = self.encoder.texts(captions)  # [N, D]
        for what, vectors in (("image", image), ("text", text)):
            self._check(what, rows["pair_key"].to_numpy(), vectors)
        return Embedded(self._rows(rows, image, text), bad, len(image), len(set(captions)))

    def _decoded(self, images: pa.Table, good: NDArray[np.bool_]) -> Iterator[Pixels]:
        """Full batches of those that decode (the last one smaller), which are noted in ``good``."""
        batch: list[Pixels] = []
        for i, data in enumerate(images["image"]):
            try:
                batch.append(self.encoder.decode(data.as_py()))
            except _UNDECODABLE:
                continue
            good[i] = True
            if len(batch) == self.batch_size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    def _vectors(self, batches: Iterator[Pixels]) -> NDArray[np.float32]:
        """[N, D] of all batches together."""
        empty = np.empty((0, self.encoder.card.dim), np.float32)
        return np.concatenate([empty, *self.encoder.encode_stream(batches)])

    def _check(self, what: str, keys: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        length = np.linalg.norm(vectors, axis=1)  # [N], NaN where a number is
        wrong = keys[~(np.abs(length - 1) <= _LENGTH)]
        if len(wrong):
            card = self.encoder.card
            raise AuditError(
                f"the encoder {card.id} makes {what} vectors that are not finite, or zero",
                expected="vectors of length 1",
                actual=f"{len(wrong)} of {len(keys)} are not, keys {', '.join(map(str, wrong[:_NAMED].tolist()))}"
                + (", ..." if len(wrong) > _NAMED else ""),
                remedy=f"check the weights of {card.model} ({card.pretrained}); on a GPU try --precision float32",
            )

    def _rows(self, rows: pa.Table, image: NDArray[np.float32], text: NDArray[np.float32]) -> pa.Table:
        n = rows.num_rows
        columns = {
            "pair_key": rows["pair_key"],
            "encoder": pa.array([self.encoder.card.id] * n, pa.string()),
            "image_vec": pack(image),
            "text_vec": pack(text),
            "similarity": np.einsum("nd,nd->n", image, text).astype(np.float32),
            "caption": rows["caption"],
            "sha256": rows["sha256"],
            "run": pa.array([self.run] * n, pa.string()),
        }
        return pa.table(columns | self.scores(image))


def _apart(images: pa.Table, good: NDArray[np.bool_]) -> tuple[pa.Table, pa.Table]:
    """Rows of the good ones without their bytes, and (pair_key, sha256) of the others."""
    rows = images.drop_columns(["image"]).filter(pa.array(good))
    return rows, images.select(["pair_key", "sha256"]).filter(pa.array(~good))
