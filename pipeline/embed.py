"""Embed: a shard of images with captions -> rows of the table embeddings, one encoder's."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.models.encoder import Encoder
from schemas.tables import EMBEDDINGS
from schemas.vectors import pack


class EmbedStage:
    """(pair_key, caption, image) -> (embeddings of the same keys, keys whose image no longer decodes)."""

    def __init__(self, encoder: Encoder, batch_size: int, run: str) -> None:
        self.encoder, self.batch_size, self.run = encoder, batch_size, run

    def __call__(self, images: pa.Table) -> tuple[pa.Table, list[int]]:
        size = self.batch_size
        batches = [self._images(images.slice(i, size)) for i in range(0, max(images.num_rows, 1), size)]
        good = np.concatenate([g for g, _ in batches])  # [N_in], bool
        image = np.concatenate([v for _, v in batches])  # [N, D]
        rows = images.filter(pa.array(good))
        text = self.encoder.texts(rows["caption"].to_pylist(), size)  # [N, D]
        n = rows.num_rows
        table = pa.table(
            {
                "pair_key": rows["pair_key"],
                "encoder": pa.array([self.encoder.card.id] * n, pa.string()),
                "image_vec": pack(image),
                "text_vec": pack(text),
                "similarity": np.einsum("nd,nd->n", image, text).astype(np.float32),
                "caption": rows["caption"],
                "run": pa.array([self.run] * n, pa.string()),
            }
        )
        return EMBEDDINGS.conform(table), images["pair_key"].to_numpy()[~good].tolist()

    def _images(self, images: pa.Table) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Which rows decode, bool[B], and the vectors of those, [<= B, D]."""
        good = np.zeros(images.num_rows, np.bool_)
        pixels = []
        for i, data in enumerate(images["image"].to_pylist()):
            try:
                pixels.append(self.encoder.pixels(data))
                good[i] = True
            except (OSError, ValueError, SyntaxError, TypeError):
                continue
        if not pixels:
            return good, np.empty((0, self.encoder.card.dim), np.float32)
        return good, self.encoder.encode(torch.stack(pixels))
