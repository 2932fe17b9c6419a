"""Vectors that are there already, in clip-retrieval's layout -> tables pairs and embeddings. Without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from upath import UPath

from pipeline.encoders import load_encoder, save_card, stamp_of
from pipeline.export.rows import is_in
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.tables import Part
from pipeline.vectors.folders import CARD, Stretch, VectorFiles, find_vector_files, stretches
from pipeline.vectors.metadata import Described, describe
from schemas.cards import EncoderCard
from schemas.configs import ImportConfig
from schemas.errors import AuditError, UsageError
from schemas.tables import EMBEDDINGS, PAIRS
from schemas.vectors import normalise, pack

UNIT = 2e-3
"""How far from 1 the length of a unit vector in float16 may be."""
AGREES = 0.999
_ZERO = 1e-6
_AUDITED = 64
_TOGETHER = 16
"""Parts in one commit."""
_SHOWN = 10


@dataclass
class Figures:
    """What became of the rows; ``named``: the first vectors that were left out."""

    rows: int = 0
    added: int = 0
    known: int = 0
    doubles: int = 0
    normalised: int = 0
    zero: int = 0
    not_finite: int = 0
    bad_captions: int = 0
    other_keys: int = 0
    named: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        return self.zero + self.not_finite + self.bad_captions

    def shown(self) -> dict[str, Any]:
        return {
            "rows": self.rows, "embeddings": self.added, "already_known": self.known, "doubles": self.doubles,
            "normalised": self.normalised, "other_keys": self.other_keys,
            "left_out": {"zero": self.zero, "not_finite": self.not_finite, "bad_caption": self.bad_captions},
            "left_out_rows": self.named,
        }  # fmt: skip


def take_in(config: ImportConfig, run: Run, folders: Sequence[str]) -> dict[str, Any]:
    """Read folders of vectors into pairs and embeddings, and add to the run's counts. Returns figures.

    Raises:
        UsageError: counts that differ, vectors of another D, or no card to tell the encoder. Nothing is added then.
        AuditError: the text vectors are not what the encoder named makes of the captions.
    """
    found = {folder: find_vector_files(folder) for folder in folders}
    encoder = load_encoder(run.workspace, config.encoder) if config.encoder is not None else None
    cards = {folder: card_of(folder, encoder.card if encoder else None) for folder in folders}
    for folder, files in found.items():
        _agree(cards[folder], files)
        if encoder is not None:
            audit(encoder, folder, files)
    figures = {}
    for folder, files in found.items():
        figures[folder] = Importer(run, cards[folder], folder)(files).shown()
    return {"vectors": figures, "encoder": run.encoder}


def card_of(folder: str, named: EncoderCard | None) -> EncoderCard:
    """The card of a folder's encoder: that of the one named, which must be that in the folder if there is one.

    Raises:
        UsageError: neither is there.
        EncoderMismatch: they differ.
    """
    path = UPath(folder) / CARD
    there = EncoderCard.from_json(path.read_text(), str(path)) if path.exists() else None
    if there is not None and named is not None:
        there.require(named, f"{path} says that {folder}")
    card = named or there
    if card is None:
        raise UsageError(
            f"which encoder made the vectors in {folder}?",
            expected=f"--encoder MODEL:PRETRAINED, or its card as {path}",
            actual="npy files do not say, and vectors of two encoders must never meet in one index",
            remedy="name the encoder; it is loaded once, so that its weights are what the card says",
        )
    return card


def _agree(card: EncoderCard, files: Sequence[VectorFiles]) -> None:
    for some in files:
        if some.dim != card.dim:
            raise UsageError(
                f"{some.image or some.text} holds vectors of another encoder",
                expected=f"D={card.dim} ({card.id})",
                actual=f"D={some.dim}",
                remedy="name the encoder that made them with --encoder",
            )


def audit(encoder: Any, folder: str, files: Sequence[VectorFiles]) -> None:
    """Encode some captions again: the stored text vectors must agree. Images are not there to be encoded."""
    stretch = next((s for some in files if some.text is not None for s in stretches(some)), None)
    if stretch is None or stretch.text is None:
        return
    captions = described(stretch, folder).captions
    lengths = np.linalg.norm(stretch.text.astype(np.float32), axis=1)
    usable = np.isfinite(lengths) & (lengths > _ZERO)  # the others are left out
    told = [i for i, caption in enumerate(captions) if caption and usable[i]]
    chosen = told[:: max(1, len(told) // _AUDITED)][:_AUDITED]
    if not chosen:
        return
    stored = normalise(np.asarray(stretch.text[chosen], np.float32))  # [A, D]
    made = encoder.texts([captions[i] or "" for i in chosen])
    cosine = float(np.median(np.einsum("nd,nd->n", stored, made)))
    if not cosine >= AGREES:
        raise AuditError(
            f"the text vectors in {folder} were not made by {encoder.card.id}",
            expected=f"a cosine of at least {AGREES} with its own vectors of the captions",
            actual=f"{cosine:.4f}, the median of {len(chosen)}",
            remedy="name the encoder that made them with --encoder",
        )


class Importer:
    """Files of vectors -> rows of pairs and embeddings, some thousand at a time."""

    def __init__(self, run: Run, card: EncoderCard, folder: str) -> None:
        self._run, self._card, self._folder = run, card, folder
        self._pairs, self._embeddings = run.workspace.table("pairs"), run.workspace.table("embeddings")
        self._known = np.sort(self._embeddings.keys(pc.field("encoder") == card.id)["pair_key"].to_numpy())
        self._parts: list[tuple[Part, Part]] = []
        self.figures = Figures()
        run.encoder = card.id

    def __call__(self, files: Sequence[VectorFiles]) -> Figures:
        with Progress("import", sum(f.rows for f in files), "vectors") as progress:
            for some in files:
                for stretch in stretches(some):
                    self._take(stretch)
                    progress.advance(stretch.metadata.num_rows)
        self._commit()
        self._run.counts["failed"] += self.figures.bad
        self._run.counts["in"] += self.figures.added + self.figures.bad
        self._run.counts["out"] += self.figures.added
        return self.figures

    def _take(self, stretch: Stretch) -> None:
        figures = self.figures
        figures.rows += stretch.metadata.num_rows
        pairs = described(stretch, self._folder)
        figures.other_keys += pairs.other_keys
        vectors = {m: np.asarray(v) for m, v in (("image", stretch.image), ("text", stretch.text)) if v is not None}
        good = self._good(stretch, pairs, vectors)
        known = is_in(self._known, pairs.keys) & good
        figures.known += int(known.sum())
        rows = np.flatnonzero(good & ~known)
        _, first = np.unique(pairs.keys[rows], return_index=True)
        figures.doubles += len(rows) - len(first)
        rows = rows[np.sort(first)]
        if not len(rows):
            return
        halves = {m: self._halves(v[rows]) for m, v in vectors.items()}
        self._parts.append(
            (
                self._pairs.write_part(pair_rows(pairs, rows, str(stretch.files.metadata), self._run.id)),
                self._embeddings.write_part(embedding_rows(pairs, rows, halves, (self._card.id, self._run.id))),
            )
        )
        if len(self._parts) >= _TOGETHER:
            self._commit()

    def _good(self, stretch: Stretch, pairs: Described, vectors: dict[str, NDArray[np.floating]]) -> NDArray[np.bool_]:
        """Which rows can be used; the others are counted and named."""
        reasons = np.full(stretch.metadata.num_rows, "", dtype="U12")
        reasons[[caption is None for caption in pairs.captions]] = "bad_captions"
        for matrix in vectors.values():
            lengths = np.linalg.norm(matrix.astype(np.float32), axis=1)
            reasons[lengths < _ZERO] = "zero"
            reasons[~np.isfinite(lengths)] = "not_finite"
        for row in np.flatnonzero(reasons != ""):
            why = str(reasons[row])
            setattr(self.figures, why, getattr(self.figures, why) + 1)
            if len(self.figures.named) < _SHOWN:
                where = stretch.files.image or stretch.files.text
                self.figures.named.append(f"{where} row {stretch.first + int(row)}: {why.replace('_', ' ')}")
        return np.asarray(reasons == "")

    def _halves(self, matrix: NDArray[np.floating]) -> NDArray[np.float16]:
        """[N, D] as unit vectors in float16. Those that are so already keep their bits."""
        lengths = np.linalg.norm(matrix.astype(np.float32), axis=1)
        off = np.abs(lengths - 1) > UNIT
        self.figures.normalised += int(off.sum())
        with np.errstate(over="ignore"):  # of the rows that are scaled
            halves = matrix.astype("<f2")
        halves[off] = normalise(matrix[off]).astype("<f2")
        return halves

    def _commit(self) -> None:
        """Pairs first, so that every vector has its pair. Keys that an earlier row brought are left out."""
        if not self._parts:
            return
        pairs, embeddings = (list(parts) for parts in zip(*self._parts, strict=True))
        self._run.begin()
        save_card(self._run.workspace, self._card)
        self._run.workspace.table("embeddings").stamp(stamp_of(self._card), self._run.id)
        self._run.commit("pairs", pairs)
        committed = self._run.commit("embeddings", embeddings)
        self.figures.added += committed.rows
        self.figures.doubles += sum(part.rows for part in embeddings) - committed.rows
        self._parts = []


def described(stretch: Stretch, folder: str) -> Described:
    """The pairs of a stretch; relative paths are the folder's."""
    place = UPath(folder)
    whole = str(place.absolute()) if place.protocol in ("", "file") else folder
    return describe(stretch.metadata, whole, str(stretch.files.metadata), stretch.first)


def pair_rows(pairs: Described, rows: NDArray[np.int64], source: str, run: str) -> pa.Table:
    """Rows of the table pairs."""
    n = len(rows)
    chosen = rows.tolist()
    return pa.table(
        {
            "pair_key": pairs.keys[rows],
            "url": pa.array([pairs.urls[i] for i in chosen], pa.string()),
            "caption": pa.array([pairs.captions[i] for i in chosen], pa.string()),
            "source": pa.array([source] * n, pa.string()),
            "extra": pa.array([pairs.extras[i] for i in chosen], pa.string()),
            "problem": pa.nulls(n, pa.string()),
            "added_run": pa.array([run] * n, pa.string()),
        },
        schema=PAIRS.schema,
    )


def embedding_rows(
    pairs: Described, rows: NDArray[np.int64], vectors: dict[str, NDArray[np.float16]], by: tuple[str, str]
) -> pa.Table:
    """Rows of the table embeddings; ``by``: encoder and run."""
    n, (encoder, run) = len(rows), by
    taken = pa.array(rows)
    both = len(vectors) == 2
    similarity = pairs.similarity.take(taken)
    if both:
        made = np.einsum("nd,nd->n", *(v.astype(np.float32) for v in vectors.values())).astype(np.float32)
        similarity = pc.coalesce(similarity, pa.array(made))
    return pa.table(
        {
            "pair_key": pairs.keys[rows],
            "encoder": pa.array([encoder] * n, pa.string()),
            **{f"{m}_vec": pack(vectors[m]) if m in vectors else pa.nulls(n, pa.binary()) for m in ("image", "text")},
            "similarity": similarity,
            "caption": pa.array([pairs.captions[i] for i in rows.tolist()], pa.string()),
            "sha256": pairs.sha256.take(taken),
            "run": pa.array([run] * n, pa.string()),
        },
        schema=EMBEDDINGS.schema,
    )
