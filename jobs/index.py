"""index: embeddings of one encoder -> a new version of its FAISS indices, measured, then published."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.audit import audit
from jobs.base import command, only_encoder
from jobs.encoders import embedded_encoders, read_card
from pipeline.engine import Engine
from pipeline.index import (
    Keys,
    Vectors,
    add,
    build,
    choose_factory,
    from_bytes,
    keys_sha256,
    measure,
    read_keys,
    to_bytes,
    vectors_sha256,
)
from pipeline.ledger import Run
from pipeline.storage import write_atomic
from pipeline.vectors import read_vectors
from schemas.cards import EncoderCard, IndexCard, IndexFile
from schemas.configs import IndexConfig
from schemas.errors import GateRefused, NothingToDo

_GROWTH = 1.25
"""An index is added to until it has grown by this factor; then its lists are trained anew."""


def run(config: IndexConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`IndexConfig`. Runs in the driver: FAISS uses all its cores by itself."""
    workspace = run.workspace.require()
    encoder = only_encoder(run, config.encoder, embedded_encoders(workspace), "embeddings")
    run.encoder = encoder
    with run.stage("read"):
        version = run.reads("embeddings")
        keys, vectors = _read(run, encoder, version)
    run.counts["in"] = run.counts["out"] = len(keys)
    before = workspace.published_index(encoder)
    digest = vectors_sha256(keys, *vectors.values())
    wanted = set(config.modality)
    same = before is not None and (before.keys_sha256, before.vectors_sha256) == (keys_sha256(keys), digest)
    if before and same and not config.rebuild and wanted <= {f.modality for f in before.files}:
        run.counts |= {"in": 0, "out": 0}
        run.figures |= _figures(before)
        return
    run.begin()
    encoder_card = read_card(workspace, encoder)
    audit(run, encoder_card, config.audit)
    name = run.id
    files = []
    for modality in config.modality:
        with run.stage(modality):
            files.append(_file(config, run, before, modality, keys, vectors, name))
    card = IndexCard(
        encoder=encoder_card,
        version=name,
        count=len(keys),
        keys_sha256=keys_sha256(keys),
        vectors_sha256=digest,
        table_version=version,
        files=tuple(files),
        run=run.id,
    )
    folder = workspace.index_dir(encoder)
    write_atomic(folder / name / "card.json", card.to_json().encode())
    run.figures |= _figures(card)
    low = [f for f in files if f.recall_at_10 < config.recall]
    if low:
        raise GateRefused(
            f"the recall@10 of {', '.join(f.modality for f in low)} is too low to publish",
            expected=f"at least {config.recall}",
            actual=", ".join(f"{f.recall_at_10:.3f} ({f.factory})" for f in low),
            remedy="use --factory auto or a finer one, or ask for less with --recall",
        )
    write_atomic(folder / "CURRENT", name.encode())
    run.outputs["index"] = str(folder / name)


def _file(
    config: IndexConfig, run: Run, before: IndexCard | None, modality: str, keys: Keys,
    vectors: dict[str, Vectors], name: str,
) -> IndexFile:  # fmt: skip
    """Build or extend one modality's index, measure it and write it."""
    own, other = vectors[modality], vectors["text" if modality == "image" else "image"]
    factory = choose_factory(len(keys), own.shape[1]) if config.factory == "auto" else config.factory
    index = None if config.rebuild else _extended(run, before, modality, factory, keys, vectors)
    if index is None:
        index = build(keys, own, factory)
    rng = np.random.default_rng(0)
    held_out = rng.permutation(len(keys))[: config.queries]
    # The other modality's vectors are never in this index: real queries, and held out.
    measured = measure(index, factory, keys, own, other[held_out].astype(np.float32), config.recall)
    data = to_bytes(index)
    path = f"{modality}.faiss"
    write_atomic(run.workspace.index_dir(run.encoder or "") / name / path, data)
    return IndexFile(
        path=path,
        modality=modality,
        factory=factory,
        count=int(index.ntotal),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        recall_at_1=measured.recall_at_1,
        recall_at_10=measured.recall_at_10,
        ms_per_query=measured.ms_per_query,
        search=measured.search,
    )


def _extended(
    run: Run, before: IndexCard | None, modality: str, factory: str, keys: Keys, vectors: dict[str, Vectors]
) -> Any | None:
    """The published index with the new keys added, or None where it must be built anew."""
    if before is None or modality not in {f.modality for f in before.files}:
        return None
    old = before.file(modality)
    if old.factory != factory or len(keys) > _GROWTH * old.count or len(keys) < old.count:
        return None
    path = run.workspace.index_dir(before.encoder.id) / before.version / old.path
    index = from_bytes(path.read_bytes(), old.sha256, str(path))
    known = read_keys(index)
    new = ~np.isin(keys, known)
    if int(new.sum()) != len(keys) - len(known):  # something was deleted
        return None
    if before.vectors_sha256 != vectors_sha256(keys[~new], *(v[~new] for v in vectors.values())):  # or embedded again
        return None
    add(index, keys[new], vectors[modality][new])
    return index


def _read(run: Run, encoder: str, version: int) -> tuple[Keys, dict[str, Vectors]]:
    """Keys int64[N] and float16 [N, D] vectors of both modalities of one encoder, where there are both.

    Raises:
        NothingToDo: there are none of one modality.
    """
    table = run.workspace.table("embeddings")
    found = {m: read_vectors(table, encoder, m, version=version) for m in ("image", "text")}
    (image_keys, _), (text_keys, _) = found.values()
    if np.array_equal(image_keys, text_keys):
        return image_keys, {m: v for m, (_, v) in found.items()}
    keys, image, text = np.intersect1d(image_keys, text_keys, assume_unique=True, return_indices=True)
    run.figures["without_both_vectors"] = len(image_keys) + len(text_keys) - 2 * len(keys)
    return keys, {"image": found["image"][1][image], "text": found["text"][1][text]}


def _figures(card: IndexCard) -> dict[str, Any]:
    return {
        "version": card.version,
        "count": card.count,
        **{
            f"{f.modality}_{name}": getattr(f, name)
            for f in card.files
            for name in ("factory", "recall_at_1", "recall_at_10", "ms_per_query", "bytes")
        },
    }


def load_published(run: Run, encoder: str) -> tuple[EncoderCard, IndexCard]:
    """The published index's card, with its encoder's.

    Raises:
        NothingToDo: nothing is published for this encoder.
    """
    card = run.workspace.published_index(encoder)
    if card is None:
        raise NothingToDo(f"no index of {encoder} is published", remedy="clipmill index first")
    return card.encoder, card


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill index``."""
    return command("index", IndexConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
