"""One collection as the service asks it: searches and texts of concurrent requests go together."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.collection import Collection
from pipeline.service.batching import Batcher
from pipeline.service.errors import Refused, busy
from pipeline.service.metrics import Metrics
from pipeline.service.options import Options
from schemas.errors import UsageError
from schemas.questions import Question, Term

Vector = NDArray[np.float32]
Found = tuple[NDArray[np.float32], NDArray[np.int64]]
Row = dict[str, Any]

_TEXTS_KEPT = 4096
_TEXTS_AT_ONCE = 256
_SIDE_THREADS = 4
"""For slow work that does not go in batches: filters, images, diversity."""

_LEAST, _MOST = 1e-15, 1e15
"""Length of a vector whose square is still a float32."""
_TRIES = 3
"""Times that a search is done again because a new version came in between."""

T = TypeVar("T")


@dataclass(frozen=True)
class Answered:
    """Results best first, as the collection's rows, and the version that they are of."""

    version: str
    rows: list[Row]


class Searcher:
    """Searches in one collection. All its methods but those said otherwise are called on the event loop."""

    def __init__(self, name: str, collection: Collection, options: Options, metrics: Metrics) -> None:
        self.name, self.collection = name, collection
        self.loading = options.warm
        """Is its encoder being loaded? Whoever starts with that ends it: see :meth:`Service.lifespan`."""
        self._options, self._metrics = options, metrics
        self._searches: dict[tuple[str, int], Batcher[tuple[Question, Vector], Found | Answered]] = {}
        self._texts = Batcher(self._encode, _TEXTS_AT_ONCE, metrics.batch(name, "texts").observe)
        self._known: OrderedDict[str, Vector] = OrderedDict()
        self._side = ThreadPoolExecutor(_SIDE_THREADS, f"side-{name}")

    async def _aside(self, work: partial[T]) -> T:
        """The result of ``work``, done in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._side, work)

    def close(self) -> None:
        self._texts.close()
        for batcher in self._searches.values():
            batcher.close()
        self._side.shutdown(wait=False, cancel_futures=True)

    # ---- a question --------------------------------------------------------------------------------

    async def answer(self, question: Question) -> tuple[Answered, dict[str, float]]:
        """The results, and milliseconds: encode, search, total.

        Raises:
            Refused: too many results asked for, no vectors of this modality here, or the encoder is still being loaded.
            UsageError: an image that is none, a URL that is refused, a vector of another length, no predicate.
        """
        start = time.perf_counter()
        vector = await self.vector(question)
        encoded = time.perf_counter()
        answered = await self._answered(question, vector)
        end = time.perf_counter()
        spans = {"encode": encoded - start, "search": end - encoded, "total": end - start}
        return answered, {name: round(1e3 * seconds, 3) for name, seconds in spans.items()}

    def _check(self, question: Question) -> None:
        if question.k > self._options.max_k:
            raise Refused(
                422, "k", "too many results asked for", expected=f"k up to {self._options.max_k}",
                actual=str(question.k), remedy="ask for fewer, or search in bulk: clipmill query --queries",
            )  # fmt: skip
        if question.modality not in self.collection.modalities:
            raise Refused(
                422, "modality", f"this index has no {question.modality} vectors",
                expected=" or ".join(self.collection.modalities), actual=question.modality,
            )  # fmt: skip
        if self.loading and any(term.key is None and term.vector is None for term in question.terms):
            raise busy("the encoder is being loaded")

    # ---- its vector --------------------------------------------------------------------------------

    async def vector(self, question: Question) -> Vector:
        """The question's unit vector, float32 [D]. Raises what :meth:`answer` does."""
        self._check(question)
        terms = question.terms
        if len(terms) == 1 and terms[0].text is not None and terms[0].weight:
            vector = await self.text(terms[0].text)
            return vector if terms[0].weight > 0 else -vector
        if len(terms) == 1 and terms[0].vector is not None and terms[0].weight:
            with np.errstate(over="ignore"):  # infinite: refused below
                given = np.array(terms[0].vector, np.float32)
                length = math.sqrt(given @ given)
            if given.shape == (self.collection.dim,) and _LEAST < length < _MOST:  # else: it is explained below
                scaled: Vector = given * np.float32(math.copysign(1 / length, terms[0].weight))
                return scaled
        terms = tuple(await asyncio.gather(*(self._plain(term) for term in terms)))
        plain = question.model_copy(update={"terms": terms})
        if all(term.vector is not None for term in terms):
            return self.collection.vector_of(plain)
        return await self._aside(partial(self.collection.vector_of, plain))

    async def _plain(self, term: Term) -> Term:
        """A text as its vector, a URL as the image there; the rest as it is."""
        if term.text is not None:
            vector: Any = await self.text(term.text)
            return Term.model_construct(vector=vector, weight=term.weight)
        if term.image_url is not None:
            return Term.model_construct(image=await self._fetched(term.image_url), weight=term.weight)
        return term

    async def _fetched(self, url: str) -> bytes:
        if self._options.fetch is None:
            raise Refused(422, "image_url", "this service fetches no images", remedy="send the image itself")
        return await self._aside(partial(self._options.fetch, url))

    async def text(self, text: str) -> Vector:
        """A text's unit vector, float32 [D]; the last ones asked for are remembered."""
        vector = self._known.get(text)
        if vector is None:
            vector = await self._texts.ask(text)
            self._known[text] = vector
            if len(self._known) > _TEXTS_KEPT:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(text)
        return vector

    def _encode(self, texts: list[str]) -> Sequence[Vector]:
        """In the thread of the texts."""
        return list(self.collection.encode_texts(texts))

    # ---- its results -------------------------------------------------------------------------------

    async def _answered(self, question: Question, vector: Vector) -> Answered:
        if question.where is not None:
            return await self._aside(partial(self._filtered, question, vector))
        found = await self._batcher(question).ask((question, vector))
        if isinstance(found, Answered):
            return found
        finish = partial(self.collection.finish, question, vector, *found)
        return Answered(*await self._aside(partial(self._steady, lambda: finish().rows())))

    def _batcher(self, question: Question) -> Batcher[tuple[Question, Vector], Found | Answered]:
        # A search asks for the largest k of its batch: those who want 10 are not to wait for one who wants 10,000.
        kind = question.modality, self.collection.over_fetch(question).bit_length() // 4
        if kind not in self._searches:
            work = partial(self._search, question.modality)
            seen = self._metrics.batch(self.name, question.modality).observe
            self._searches[kind] = Batcher(work, self._options.max_batch, seen)
        return self._searches[kind]

    def _search(self, modality: str, asked: list[tuple[Question, Vector]]) -> list[Found | Answered]:
        """In the thread of the batches: results, or what was found where to finish them would hold the others up."""
        ks = [self.collection.over_fetch(question) for question, _ in asked]
        queries, plain = np.stack([v for _, v in asked]), [i for i, (q, _) in enumerate(asked) if _is_plain(q)]
        last = np.array([ks[i] for i in plain], np.int64)[:, None]

        def search() -> tuple[Found, list[list[Row]]]:
            similarity, keys = self.collection.search_vectors(queries, max(ks), modality)
            wanted = np.where(np.arange(max(ks)) < last, keys[plain], -1)
            # The records of all of them are read at once.
            return (similarity, keys), self.collection.rows(similarity[plain], wanted) if plain else []

        version, ((similarity, keys), rows) = self._steady(search)
        answers: list[Found | Answered] = [(similarity[i, :k], keys[i, :k]) for i, k in enumerate(ks)]
        for i, found in zip(plain, rows, strict=True):
            answers[i] = Answered(version, found)
        return answers

    def _filtered(self, question: Question, vector: Vector) -> Answered:
        """In a thread."""
        k, modality, where = self.collection.over_fetch(question), question.modality, question.where

        def search() -> list[Row]:
            try:
                similarity, keys = self.collection.search_vectors(vector[None], k, modality, where)
            except UsageError as exc:
                raise Refused(
                    422, "where", exc.problem, expected=exc.expected, actual=exc.actual, remedy=exc.remedy
                ) from exc
            return self.collection.finish(question, vector, similarity[0], keys[0]).rows()

        return Answered(*self._steady(search))

    def _steady(self, work: Callable[[], T]) -> tuple[str, T]:
        """What ``work`` returns, and the version that it saw: it is done again where a new one came in between."""
        for _ in range(_TRIES):
            version = self.collection.card.version
            done = work()
            if self.collection.card.version == version:
                break
        return version, done


def _is_plain(question: Question) -> bool:
    return question.threshold is None and question.unique is None and not question.diversity
