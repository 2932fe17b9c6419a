"""The audit before vectors are trained on or published: sound, and what their encoder makes of its input today."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.audit import Standing, VectorCheck, again, compare_with_images, named
from pipeline.encoders import encoder_of
from pipeline.ledger import Run
from pipeline.storage import write_atomic
from schemas.cards import EncoderCard
from schemas.errors import AuditError, CardError, EncoderMismatch, Reason, UsageError
from schemas.vectors import normalise, unpack

if TYPE_CHECKING:
    from pipeline.models.encoder import Encoder

COSINE = 0.999
"""Least cosine of a stored vector with the one made of the same image or caption again."""
_INT8_COSINE = 0.98
"""The same for int8, whose activations are scaled by the batch that an image happens to be in."""
_AT_ONCE = 256
_UNDECODABLE = (OSError, ValueError, SyntaxError, TypeError)
_TABLES = ("embeddings", "images")
_MODALITIES = ("image", "text")

Versions = dict[str, int | None]
"""Of the tables read; None where there is no table."""


@dataclass(frozen=True)
class New:
    """Files that came since an earlier audit. ``images``: None where others went, too."""

    embeddings: set[str]
    images: set[str] | None


def audit(run: Run, card: EncoderCard, sample: int, new: New | None = None) -> None:
    """Check one encoder's rows of the table embeddings, at the versions that ``run`` reads (or the newest).

    All rows: keys once, finite unit-norm vectors, and none of an image that is another one by now. Then ``sample``
    pairs, drawn by the tables' version, are embedded again from the stored images and captions: both vectors must
    agree with the stored ones (cosine of at least 0.999). Images without vectors, and vectors whose image is gone or no
    longer ok, are told in the run's figures. What has passed is noted under reports/audits, and not audited again
    before a table changes. ``new``: files to look at, where the others passed an earlier audit; None: all.

    Raises:
        AuditError: with the keys that are wrong; or the encoder cannot be loaded.
    """
    versions = {name: run.input_versions[name] if name in run.input_versions else run.reads(name) for name in _TABLES}
    path = run.workspace.reports_dir("audits") / f"{card.id}.json"
    asked = {"weights": card.weights_sha256, "versions": versions}
    before = json.loads(path.read_text()) if path.exists() else {}
    passed = {name: before.get(name) for name in asked} == asked and before["asked"] >= sample
    if passed and (before.get("whole", True) or new is not None):
        run.figures["audit"] = before
        return
    at = {name: version if version >= 0 else None for name, version in versions.items()}
    with run.stage("audit"):
        _check_all(run, card, at["embeddings"], None if new is None else new.embeddings)
        standing = _standing(run, card, at, new)
        _check_changed(card, standing)
        keys = _drawn(standing, sample, versions["embeddings"])
        agreed = _check_sample(run, card, keys, at) if len(keys) else None
    found = {
        "rows": len(standing.same) + len(standing.gone), "sampled": len(keys), "least_cosine": agreed,
        "not_embedded": standing.missing, "without_image": len(standing.gone),
        "without_image_keys": standing.gone[:10].tolist(),
    }  # fmt: skip
    note = asked | {"asked": sample, "whole": new is None, "run": run.id} | found
    write_atomic(path, json.dumps(note, indent=2).encode())
    run.figures["audit"] = found
    if len(standing.gone):
        print(f"audit: {len(standing.gone)} vectors without their image: {named(standing.gone)}", file=sys.stderr)


def _check_all(run: Run, card: EncoderCard, version: int | None, paths: set[str] | None) -> None:
    check = VectorCheck(card.id)
    columns = ("pair_key", "encoder", "image_vec", "text_vec", "similarity")
    for batch in run.workspace.table("embeddings").batches(columns, version, paths):
        rows = batch.filter(pc.equal(batch.column("encoder"), card.id))
        there = {m: np.asarray(rows.column(f"{m}_vec").is_valid()) for m in _MODALITIES}
        for has in ({"image", "text"}, {"image"}, {"text"}, set()):
            # Rows with these vectors and no others.
            chosen = np.logical_and.reduce([there[m] == (m in has) for m in _MODALITIES])
            some = rows.filter(pa.array(chosen))
            vectors = {m: unpack(some.column(f"{m}_vec"), card.dim) for m in _MODALITIES if m in has}
            similarity = some.column("similarity").to_numpy(zero_copy_only=False)
            check.add(some.column("pair_key").to_numpy(), vectors, similarity)
    check.finish()


def _standing(run: Run, card: EncoderCard, at: Versions, new: New | None) -> Standing:
    """Of new rows beside new images, if these are one another's; else of all."""
    embeddings, images = (run.workspace.table(name) for name in _TABLES)
    if new is not None and new.images is not None:
        files = {"embeddings": new.embeddings, "images": new.images}
        standing = compare_with_images(embeddings, images, card.id, at, files)
        if not len(standing.gone) and not standing.missing:
            return standing
    return compare_with_images(embeddings, images, card.id, at)


def _check_changed(card: EncoderCard, standing: Standing) -> None:
    if len(standing.changed):
        raise AuditError(
            f"{len(standing.changed)} vectors of {card.id} are of images that are other ones by now",
            expected="the sha256 of the image in the table images",
            actual=named(standing.changed),
            remedy="clipmill embed embeds changed images again",
        )


def _drawn(standing: Standing, sample: int, seed: int) -> NDArray[np.int64]:
    """Keys to embed again: of pairs with their image, or of the others (for their captions) where there are none."""
    keys = standing.same if len(standing.same) else standing.gone
    rng = np.random.default_rng(max(seed, 0))
    return np.sort(rng.choice(keys, min(sample, len(keys)), replace=False))


@dataclass(frozen=True)
class _Pairs:
    """Keys, stored vectors of one modality, float32 [N, D], and what they were made of."""

    keys: NDArray[np.int64]
    stored: NDArray[np.float32]
    inputs: list[Any]


def _check_sample(run: Run, card: EncoderCard, keys: NDArray[np.int64], at: Versions) -> float:
    """Embed these pairs again. Returns the least cosine."""
    encoder = _encoder(run, card, len(keys))
    allowed = _INT8_COSINE if card.dtype == "int8" else COSINE
    wrong: list[str] = []
    least = 1.0
    for start in range(0, len(keys), _AT_ONCE):
        image, text = _stored(run, card, keys[start : start + _AT_ONCE], at)
        for modality, pairs, encode in (("image", image, encoder.images), ("text", text, encoder.texts)):
            good, fresh = _encode(encode, pairs.inputs, card.dim)
            cosines = np.einsum("nd,nd->n", fresh, pairs.stored[good])  # [N]
            least = min([least, *cosines.tolist()])
            wrong += [f"image of {key} no longer decodes" for key in pairs.keys[~good].tolist()]
            low = ~(cosines >= allowed)
            wrong += [f"{modality} of {k}: {c:.4f}" for k, c in zip(pairs.keys[good][low], cosines[low], strict=True)]
    if wrong:
        raise AuditError(
            f"{len(wrong)} of {2 * len(keys)} vectors of {card.id}, embedded again, do not agree with the stored ones",
            expected=f"cosines of at least {allowed}",
            actual="; ".join(wrong[:10]) + ("; ..." if len(wrong) > 10 else ""),
            remedy="they were made by another model or preprocessing, or rows were mixed up: " + again(card.id),
        )
    return float(least)


def _encoder(run: Run, card: EncoderCard, pairs: int) -> Encoder:
    try:
        return encoder_of(run.workspace, card)
    except (UsageError, CardError, EncoderMismatch) as exc:
        raise AuditError(
            f"the audit cannot load the encoder {card.id} to embed {pairs} pairs again",
            expected=f"{card.id} from {card.pretrained}",
            actual=f"{exc.problem}: {exc.actual}",
            remedy="bring its weights back, or go on without embedding again: --audit 0",
        ) from exc


def _stored(run: Run, card: EncoderCard, keys: NDArray[np.int64], at: Versions) -> tuple[_Pairs, _Pairs]:
    """Images and captions of these keys, with the vectors stored for them. Where an image is gone, its text alone."""
    where = pc.field("pair_key").isin(keys)
    columns = ["pair_key", "image_vec", "text_vec", "caption"]
    of_encoder = where & (pc.field("encoder") == card.id)
    rows = run.workspace.table("embeddings").read(columns, of_encoder, at["embeddings"]).sort_by("pair_key")
    ok = where & (pc.field("status") == str(Reason.OK))
    images = run.workspace.table("images").read(["pair_key", "image"], ok, at["images"])
    found = dict(zip(images["pair_key"].to_pylist(), images["image"].to_pylist(), strict=True))
    pictures = rows.filter(pc.is_in(rows["pair_key"], images["pair_key"].combine_chunks()))
    return (
        _pairs(pictures, "image_vec", [found[key] for key in pictures["pair_key"].to_pylist()], card.dim),
        _pairs(rows, "text_vec", rows["caption"].to_pylist(), card.dim),
    )


def _pairs(rows: pa.Table, column: str, inputs: list[Any], dim: int) -> _Pairs:
    """Of the rows that have this vector and an input."""
    there = np.asarray(rows[column].is_valid()) & np.array([x is not None for x in inputs], np.bool_)
    rows = rows.filter(pa.array(there))
    stored = normalise(unpack(rows[column], dim))
    return _Pairs(rows["pair_key"].to_numpy(), stored, [x for x, ok in zip(inputs, there, strict=True) if ok])


def _encode(encode: Any, inputs: list[Any], dim: int) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which inputs can be encoded, bool [N], and the vectors of those [M, D]."""
    try:
        return np.ones(len(inputs), np.bool_), encode(inputs)
    except _UNDECODABLE:
        good, vectors = np.zeros(len(inputs), np.bool_), [np.empty((0, dim), np.float32)]
    for i, one in enumerate(inputs):
        with suppress(*_UNDECODABLE):
            vectors.append(encode([one]))
            good[i] = True
    return good, np.concatenate(vectors)
