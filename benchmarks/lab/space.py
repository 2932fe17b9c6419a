"""Vectors with cluster structure, as an embedding's are, and workspaces that hold them.

A vector is the centre of one of N/100 clusters, large and small ones (Zipf), and a point about it, with some noise in
all D; scaled to unit length. Centres lie in a space of 256 dimensions, points about them in one of 64, both with
falling variances, so that clusters overlap and neighbours differ in distance (isotropic noise would make all of a
cluster equally near): lists have borders, and codes of a few bits have something to lose.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.encoders import save_card
from pipeline.tables import Part
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.tables import EMBEDDINGS, IMAGES, PAIRS
from schemas.vectors import normalise, pack

Vectors = NDArray[np.float16]
Keys = NDArray[np.int64]

_BLOCK, _PART = 65_536, 16_384
_OUTER, _INNER = 256, 64
_WITHIN, _NOISE = 1.0, 0.45
"""Lengths of what is about a centre, and of the noise, beside a centre of length 1."""


@dataclass(frozen=True)
class Space:
    """``count`` vectors to be indexed, of ``dim`` dimensions; more are drawn beyond them, queries among them."""

    count: int
    dim: int = 512
    seed: int = 0

    @property
    def clusters(self) -> int:
        return max(16, self.count // 100)

    def draw(self, first: int, count: int, kind: int = 0) -> Vectors:
        """Unit-norm float16 [n, D]: the same place always has the same vector. ``kind`` 1 is of captions: other
        points of the same clusters. ``first`` is a multiple of 65,536, or all comes out of one block."""
        rng = np.random.default_rng([self.seed, 99])
        outer, basis = (self._basis(rng, n, length) for n, length in ((_OUTER, 1.0), (_INNER, _WITHIN)))
        centres = rng.standard_normal((self.clusters, _OUTER), dtype=np.float32) @ outer
        share = 1 / np.sqrt(1 + np.arange(self.clusters))
        parts = [np.empty((0, self.dim), np.float16)]
        for block in range(first // _BLOCK, -(-(first + count) // _BLOCK)):
            which = np.random.default_rng([self.seed, block])
            cluster = which.choice(self.clusters, _BLOCK, p=share / share.sum())
            own = np.random.default_rng([self.seed, block, kind])
            rows = centres[cluster] + own.standard_normal((_BLOCK, _INNER), dtype=np.float32) @ basis
            rows += own.standard_normal((_BLOCK, self.dim), dtype=np.float32) * np.float32(_NOISE / self.dim**0.5)
            low, high = max(first - block * _BLOCK, 0), min(first + count - block * _BLOCK, _BLOCK)
            parts.append(normalise(rows[low:high]).astype(np.float16))
        return np.concatenate(parts)

    def _basis(self, rng: np.random.Generator, dimensions: int, length: float) -> NDArray[np.float32]:
        """[n, D], variances falling with 1/n."""
        rows = rng.standard_normal((dimensions, self.dim), dtype=np.float32)
        rows /= np.sqrt(1 + np.arange(dimensions, dtype=np.float32))[:, None]
        return rows * np.float32(length / np.linalg.norm(rows))

    def keys(self, first: int, count: int) -> Keys:
        """Spread over the non-negative int64 as hashes are, and known from the place."""
        places = np.arange(first, first + count, dtype=np.uint64)
        mixed = (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # odd: no two are the same
        mixed ^= mixed >> np.uint64(32)
        return (mixed >> np.uint64(1)).astype(np.int64)

    def queries(self, count: int) -> Vectors:
        """Held out: far beyond what is ever indexed."""
        return self.draw((2 * self.count // _BLOCK + 1) * _BLOCK, count)


def add_rows(workspace: Workspace, space: Space, card: EncoderCard, first: int, count: int) -> None:
    """Rows of pairs, images and embeddings for these places, in one commit each. There are no pictures."""
    tables = {name: workspace.table(name) for name in ("pairs", "images", "embeddings")}
    parts: dict[str, list[Part]] = {name: [] for name in tables}
    for start, some in _blocks(first, count):
        keys = space.keys(start, some)
        image, text = (space.draw(start, some, kind) for kind in (0, 1))
        captions = [f"a photograph of number {n} at dusk" for n in range(start, start + some)]
        common: dict[str, Any] = {
            "pair_key": keys,
            "url": [f"https://h/{n}.jpg" for n in range(start, start + some)],
            "caption": captions,
        }
        for low in range(0, some, _PART):
            part = slice(low, low + _PART)
            rows = {name: column[part] for name, column in common.items()}
            n = len(rows["caption"])
            image_part, text_part = image[part], text[part]
            similarity = np.einsum("nd,nd->n", image_part.astype(np.float32), text_part.astype(np.float32))
            embedded = {
                "pair_key": rows["pair_key"], "encoder": [card.id] * n, "image_vec": pack(image_part),
                "text_vec": pack(text_part), "similarity": similarity, "caption": rows["caption"],
                "sha256": ["0" * 64] * n, "run": ["bench"] * n,
            }  # fmt: skip
            stored = rows | {"status": ["ok"] * n, "sha256": ["0" * 64] * n, "width": [256] * n, "height": [256] * n}
            parts["pairs"].append(
                tables["pairs"].write_part(_filled(rows | {"added_run": ["bench"] * n}, PAIRS.schema))
            )
            parts["images"].append(tables["images"].write_part(_filled(stored | {"run": ["bench"] * n}, IMAGES.schema)))
            parts["embeddings"].append(tables["embeddings"].write_part(pa.table(embedded, schema=EMBEDDINGS.schema)))
    for name, table in tables.items():
        table.commit(parts[name], "bench")


def _blocks(first: int, count: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the pieces of each block that is drawn at once."""
    while count > 0:
        some = min(count, _BLOCK - first % _BLOCK)
        yield first, some
        first, count = first + some, count - some


def _filled(rows: dict[str, object], schema: pa.Schema) -> pa.Table:
    """With nulls in the columns that are not given."""
    n = len(rows["caption"])  # type: ignore[arg-type]
    return pa.table({f.name: rows.get(f.name, pa.nulls(n, f.type)) for f in schema}, schema=schema)


def make_workspace(folder: Path, space: Space, card: EncoderCard) -> Workspace:
    """A workspace with ``space.count`` rows by this encoder; one that is complete already is copied.

    The master copy lies beside, so that each measurement begins with an index of nothing.
    """
    master = folder.with_name(f"master-{space.count}-{space.dim}-{space.seed}-{card.id}")
    done = master / "done"
    if not done.exists():
        shutil.rmtree(master, ignore_errors=True)
        workspace = Workspace(master).prepare()
        save_card(workspace, card)
        add_rows(workspace, space, card, 0, space.count)
        done.write_text("")
    shutil.rmtree(folder, ignore_errors=True)
    # Parquet files never change: links will do. The log and cards are copied.
    shutil.copytree(master, folder, copy_function=_linked)
    return Workspace(folder)


def _linked(source: str, target: str) -> None:
    if source.endswith(".parquet"):
        Path(target).hardlink_to(source)
    else:
        shutil.copy2(source, target)


def bench_card(dim: int) -> EncoderCard:
    """Of an encoder that nobody will load."""
    return EncoderCard(
        model="bench", pretrained="", weights_sha256="0" * 64, dim=dim, image_size=224, mean=(0, 0, 0), std=(1, 1, 1),
        interpolation="bicubic", resize_mode="shortest", context_length=77, dtype="float32",
    )  # fmt: skip
