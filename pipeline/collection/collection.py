"""The one class to search with from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from pipeline.collection import choice
from pipeline.collection.exact import Found
from pipeline.collection.opened import Opened
from pipeline.collection.results import Results, as_results, plain
from pipeline.collection.terms import Encoding, Vectors, checked_vector, describe, question_of, weighted
from pipeline.encoders import only_one
from pipeline.keys import Keys
from pipeline.tombstones import Tombstones
from pipeline.workspace import Workspace
from schemas.cards import IndexCard
from schemas.errors import CardError, EncoderMismatch, NothingToDo, UsageError
from schemas.questions import Question, Term
from schemas.vectors import normalise

_VANISHED = 3
"""Versions in a row that may be removed while they are being opened."""
_WIDER = 4
_LAST = np.iinfo(np.int64).max


class Collection:
    """The published index of one encoder in a workspace: search it, and get what is known of its pairs.

    >>> collection = Collection(workspace)
    >>> results = collection.search("a red circle", k=3, where="width >= 8")
    >>> [row["rank"] for row in results.rows()]
    [1, 2, 3]
    >>> first = results.rows()[0]["pair_key"]
    >>> collection.search(key=first, k=1).rows()[0]["pair_key"] == first
    True
    >>> collection.vectors([first], "image").shape == (1, collection.dim)
    True

    In a notebook the results show their pictures. No Ray is needed. Threads may search at once; the version that is
    open stays as it is until :meth:`refresh`. What is deleted is found by no search from then on.

    Args:
        workspace: a directory, a URL, or a Workspace.
        encoder: id or model name; by default the only one indexed.
        fetch: how to get the image of a URL; without it there are no questions by URL.
        clean: what an encoded image passes through before it is decoded; by default its header is checked.
        version: of the index; it stays that one. By default the one that is published.
        verify: compare the sha256 of every file with its card; a number: if they have no more bytes than that together.
            Sizes are compared in any case.

    Raises:
        UsageError: no workspace, no such index, or several and none named.
        CardError: a file of the index is missing, truncated or changed.
        EncoderMismatch: the index lies under another encoder's name.
    """

    def __init__(
        self,
        workspace: str | Workspace,
        encoder: str | None = None,
        *,
        fetch: Callable[[str], bytes] | None = None,
        clean: Callable[[bytes], bytes] | None = None,
        version: str | None = None,
        verify: bool | int = True,
    ) -> None:
        self.workspace = (workspace if isinstance(workspace, Workspace) else Workspace(workspace)).require()
        remedy = f"clipmill index --workspace {self.workspace.root}"
        self.encoder_id = only_one(encoder, self.workspace.indexed_encoders(), "index", remedy)
        self._folder, self._verify, self._fetch = self.workspace.index_dir(self.encoder_id), verify, fetch
        self._tombstones = Tombstones(self._folder / "deleted")
        self._lock, self._version = Lock(), version
        self._opened = self._open()
        self._encoding = Encoding(self.workspace, self.card.encoder, clean)

    # -- what there is ---------------------------------------------------------------------------------

    @property
    def card(self) -> IndexCard:
        """Of the version that is open."""
        return self._opened.card

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of the vectors that can be searched: image, text or both."""
        return self._opened.modalities

    @property
    def columns(self) -> list[str]:
        """What a predicate may speak of. ``similarity`` is that of a pair's caption and its image."""
        return self._opened.records.columns

    @property
    def dim(self) -> int:
        """D."""
        return self.card.encoder.dim

    @property
    def tombstones(self) -> Keys:
        """All keys that were ever deleted, sorted."""
        return self._tombstones.keys()

    @property
    def deleted(self) -> Keys:
        """The deleted keys that the open version still has, sorted."""
        return self._opened.gone(self._tombstones.keys())

    def __len__(self) -> int:
        return len(self._opened.records) - len(self.deleted)

    # -- searching -------------------------------------------------------------------------------------

    def search(self, question: str | Question | None = None, **options: Any) -> Results:
        """The results of a question: a text, a :class:`~schemas.questions.Question`, or one of the options ``text``,
        ``image`` (bytes, or a file's path), ``image_url``, ``key``, ``vector``; with ``k``, ``modality``, ``where``,
        ``threshold``, ``unique`` and ``diversity`` as a Question has them.

        Raises:
            UsageError: it cannot be asked so; it says why.
        """
        asked = question_of(question, options)
        vector = self.vector_of(asked)
        similarity, keys = self.search_vectors(vector[None], self.over_fetch(asked), asked.modality, asked.where)
        return self.finish(asked, vector, similarity[0], keys[0])

    def search_vectors(
        self, vectors: NDArray[np.floating], k: int, modality: str = "image", where: str | None = None
    ) -> Found:
        """The k nearest of each unit-norm query [Q, D]: similarities float32 [Q, k] and keys int64 [Q, k].

        Fewer than k come back only where there are no more: their keys are -1, at the end. Similarities are those of
        the stored vectors. With a predicate the k nearest of its matches come back: exactly, if they are few or the
        index is an exact one.

        Raises:
            UsageError: another D, no such modality, or ``where`` is no predicate.
        """
        queries = np.ascontiguousarray(vectors, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.dim or not np.isfinite(queries).all():
            raise UsageError(
                "the queries do not fit the index",
                expected=f"[Q, {self.dim}] finite numbers",
                actual=str(list(queries.shape)),
            )
        return self._opened.search(queries, k, modality, where, self._tombstones.keys())

    def vector_of(self, question: Question) -> Vectors:
        """The question as a unit-norm vector float32 [D]: see :meth:`vectors_of`."""
        return np.asarray(self.vectors_of([question])[0], np.float32)

    def vectors_of(self, questions: Sequence[Question]) -> Vectors:
        """Questions as unit-norm vectors float32 [Q, D]; the encoder is loaded at the first text or image.

        A key stands for its own vector of the question's modality, or for the other one where it has only that.

        Raises:
            UsageError: an unreadable image, no such key, a vector of another D, terms that cancel each other out.
            EncoderMismatch: the encoder is no longer the one that the index was made with.
        """
        terms = [(question.modality, term) for question in questions for term in question.terms]
        vectors = np.empty((len(terms), self.dim), np.float32)
        texts = [i for i, (_, t) in enumerate(terms) if t.text is not None]
        images = [i for i, (_, t) in enumerate(terms) if t.image is not None or t.image_url is not None]
        if texts:
            vectors[texts] = self.encode_texts([terms[i][1].text or "" for i in texts])
        if images:
            vectors[images] = self._encoding.images([self._picture(terms[i][1]) for i in images])
        for i, (modality, term) in enumerate(terms):
            if term.key is not None:
                wanted = np.array([min(term.key, _LAST)])
                self._require(wanted)
                vectors[i] = self.own_vectors(wanted, modality)[0][0]
            elif term.vector is not None:
                vectors[i] = checked_vector(term.vector, self.dim)
        ends = np.cumsum([0, *(len(question.terms) for question in questions)]).tolist()
        sums = [weighted(vectors[a:b], [term.weight for _, term in terms[a:b]]) for a, b in pairwise(ends)]
        return np.stack(sums) if sums else np.empty((0, self.dim), np.float32)

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """Texts as unit-norm vectors float32 [n, D]."""
        return self._encoding.texts(texts)

    def over_fetch(self, question: Question) -> int:
        """How many results to ask :meth:`search_vectors` for, so that :meth:`finish` has k to choose."""
        k = choice.pool(question.k) if question.diversity > 0 else question.k
        return max(1, min(2 * k if question.unique is not None else k, len(self._opened.records)))

    def finish(self, question: Question, vector: Vectors, similarity: NDArray[np.float32], keys: Keys) -> Results:
        """The results of a question whose vector [D] found ``keys`` [n] (-1: none) with their ``similarity`` [n].

        Those below the threshold are dropped; then, with ``unique``, each that is as near as that to a better one, and
        more are searched for until k are left; then, with ``diversity``, k are chosen by maximal marginal relevance.
        """
        opened, deleted = self._opened, self._tombstones.keys()
        least = -np.inf if question.threshold is None else question.threshold
        while True:
            asked = len(keys)
            there = opened.finds(keys, question.modality, deleted) & (similarity >= least)
            found, scores = keys[there], similarity[there]
            chosen = _chosen(opened, question, scores, found)
            ended = asked >= len(opened.records) or (keys < 0).any() or (similarity < least).any()
            if len(chosen) >= question.k or ended:
                break
            more = min(_WIDER * asked, len(opened.records))
            some = opened.search(vector[None], more, question.modality, question.where, deleted)
            similarity, keys = some[0][0], some[1][0]
        ranks = np.arange(1, len(chosen) + 1)
        table = as_results(opened.records.take(found[chosen]), ranks, scores[chosen])
        return Results(table, describe(question), self.images)

    def table(self, similarity: NDArray[np.float32], keys: Keys) -> tuple[pa.Table, NDArray[np.bool_]]:
        """What :meth:`search_vectors` found [Q, k] as one table of :class:`Results`, query after query; and which of
        the [Q, k] are in it: those that are there, still."""
        opened = self._opened
        there = opened.finds(keys, None, self._tombstones.keys())
        ranks = np.cumsum(there, axis=1)[there]
        return as_results(opened.records.take(keys[there]), ranks, similarity[there]), there

    def rows(self, similarity: NDArray[np.float32], keys: Keys) -> list[list[dict[str, Any]]]:
        """The same as rows of :class:`Results`, a list for each query."""
        table, there = self.table(similarity, keys)
        rows, ends = table.to_pylist(), np.cumsum([0, *there.sum(axis=1)]).tolist()
        return [[plain(row) for row in rows[a:b]] for a, b in pairwise(ends)]

    # -- pairs -----------------------------------------------------------------------------------------

    def known(self, keys: ArrayLike) -> NDArray[np.bool_]:
        """Which of these keys, of any shape, are there and not deleted."""
        return self._opened.finds(np.asarray(keys, np.int64), None, self._tombstones.keys())

    def records(self, keys: ArrayLike) -> pa.Table:
        """What is known of pairs, in the order of ``keys``; those that are not there, or deleted, are left out."""
        rows = np.asarray(keys, np.int64).ravel()
        opened = self._opened
        return opened.records.take(rows[opened.finds(rows, None, self._tombstones.keys())])

    def vectors(self, keys: ArrayLike, modality: str = "image") -> NDArray[np.float16]:
        """The stored vectors of ``keys`` [n], float16 [n, D]. Raises UsageError for a key without one."""
        rows = np.asarray(keys, np.int64).ravel()
        self._require(rows)
        return self._opened.records.vectors(rows, modality)

    def own_vectors(self, keys: Keys, modality: str) -> tuple[Vectors, NDArray[np.bool_]]:
        """What keys [n] stand for in a question, float32 [n, D]: their vectors of this modality, of the other one
        where they have only that; and which of them are there (the others' are zero)."""
        opened, deleted = self._opened, self._tombstones.keys()
        vectors, known = np.zeros((len(keys), self.dim), np.float32), np.zeros(len(keys), np.bool_)
        for own in (modality, "text" if modality == "image" else "image"):
            there = opened.finds(keys, own, deleted) & ~known
            vectors[there] = opened.records.vectors(keys[there], own)
            known |= there
        return vectors, known

    def matching(self, where: str, modality: str = "image") -> Keys:
        """The keys for which a predicate is true, with a vector of this modality, not deleted; sorted, int64 [n].

        Raises:
            UsageError: it is no predicate.
        """
        opened = self._opened
        opened.require(modality)
        return opened.matching(where, modality, opened.gone(self._tombstones.keys()))

    def images(self, keys: ArrayLike) -> dict[int, bytes]:
        """The stored images of keys, encoded; keys without one, or deleted, are left out."""
        rows = np.asarray(keys, np.int64).ravel()
        return self._opened.records.images(self.workspace, rows[self.known(rows)])

    # -- changes ---------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Open the version that is published now, if it is another one. Searches under way end on the old one.

        Returns:
            Whether there was another one.

        Raises:
            CardError: the new version is damaged; the old one stays open.
        """
        with self._lock:
            current = self._current()
            if current is None or current.version == self.card.version:
                return False
            self._opened = self._open()
            return True

    def delete(self, keys: ArrayLike) -> None:
        """Let no search find these keys any more, in any version, from the moment this returns."""
        self._tombstones.add(keys)

    # -- inside ----------------------------------------------------------------------------------------

    def _open(self) -> Opened:
        for _ in range(_VANISHED):
            card = self._current()
            if card is None:
                break
            if card.encoder.id != self.encoder_id:
                raise _mismatch(self.encoder_id, card)
            try:
                verify = self._verify if isinstance(self._verify, bool) else _bytes(card) <= self._verify
                return Opened(self._folder, card, verify)
            except CardError:
                # A later version may have been published, and this one removed, while it was being opened.
                now = self._current()
                if now is None or now.version == card.version:
                    raise
        raise NothingToDo(f"no index of {self.encoder_id} is published", remedy="clipmill index first")

    def _current(self) -> IndexCard | None:
        if self._version is None:
            return self.workspace.published_index(self.encoder_id)
        path = self._folder / self._version / "card.json"
        if not path.exists():
            raise CardError(f"there is no version {self._version} of the index", expected=str(path))
        return IndexCard.from_json(path.read_text(), str(path))

    def _require(self, keys: Keys) -> None:
        known = self.known(keys)
        if not known.all():
            raise UsageError(
                f"there is no pair {keys[~known][0]} in the index",
                expected=f"one of {len(self):,} keys",
                remedy="it may be deleted, or not indexed yet",
            )

    def _picture(self, term: Term) -> bytes:
        if term.image is not None:
            return term.image
        if self._fetch is None:
            raise UsageError("images are not fetched from URLs here", actual=term.image_url or "")
        return self._fetch(term.image_url or "")


def _chosen(opened: Opened, question: Question, similarity: NDArray[np.float32], keys: Keys) -> NDArray[np.int64]:
    """The places of the results among candidates [n], best first."""
    kept = np.arange(len(keys))
    if question.unique is None and question.diversity == 0:
        return kept[: question.k]
    vectors = normalise(opened.records.vectors(keys, question.modality))
    if question.unique is not None:
        enough = choice.pool(question.k) if question.diversity > 0 else question.k
        kept = choice.distinct(vectors, question.unique, enough)
    if question.diversity > 0:
        kept = kept[choice.varied(vectors[kept], similarity[kept], question.k, question.diversity)]
    return kept[: question.k]


def _bytes(card: IndexCard) -> int:
    return sum(file.total_bytes for file in card.files) + sum(segment.bytes for segment in card.segments)


def _mismatch(encoder: str, card: IndexCard) -> EncoderMismatch:
    return EncoderMismatch(
        f"the index in the folder of {encoder} was made with another encoder",
        expected=encoder,
        actual=f"{card.encoder.id} (D={card.encoder.dim})",
        remedy="build it again: clipmill index --rebuild",
    )
