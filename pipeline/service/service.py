"""The state behind the routes: the collections, kept up to date, and what they have in common."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pipeline.collection import Collection
from pipeline.service.errors import unknown
from pipeline.service.metrics import Metrics
from pipeline.service.models import FileInfo, IndexInfo
from pipeline.service.options import Options, Source
from pipeline.service.searching import Row, Searcher
from schemas.questions import Modality, Question, Term

_KEYS = 1 << 63
"""pair_keys are below it."""
_PATIENCE = 10
"""Times as long as between two looks, after something could not be opened: checking it costs time."""

log = logging.getLogger(__name__)


class Service:
    """The collections by name, and the searchers over them."""

    def __init__(self, collections: Mapping[str, Collection], options: Options) -> None:
        self.options, self.metrics = options, Metrics(options.replica)
        self.searchers = {name: self._searcher(name, collection) for name, collection in collections.items()}
        self.ready = False
        self._tasks: list[asyncio.Task[None]] = []

    def _searcher(self, name: str, collection: Collection) -> Searcher:
        return Searcher(name, collection, self.options, self.metrics)

    @asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """While the app runs: looks for new versions and new indices; ready once the encoders are loaded."""
        self._start(self._warm_all())
        for searcher in self.searchers.values():
            self._start(self._follow(searcher))
        if self.options.source is not None:
            self._start(self._discover(self.options.source))
        try:
            yield
        finally:
            self.ready = False
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for searcher in self.searchers.values():
                searcher.close()

    def _start(self, task: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(task))

    async def _warm_all(self) -> None:
        for searcher in list(self.searchers.values()):
            await self._warm(searcher)
        self.ready = True

    async def _warm(self, searcher: Searcher) -> None:
        """A first text may take a minute, while torch and the model are loaded: not one that somebody waits for."""
        try:
            if searcher.loading:
                await searcher.text("a picture")
        except Exception:  # keys and vectors are answered all the same
            log.exception("the encoder of %s cannot be loaded: its texts and images fail", searcher.name)
        searcher.loading = False

    async def _follow(self, searcher: Searcher) -> None:
        """Take up what is published. The old version answers until the new one is open, and if it cannot be opened."""
        while True:
            await asyncio.sleep(self.options.refresh)
            try:
                if await asyncio.to_thread(searcher.collection.refresh):
                    self.metrics.swapped(searcher.name)
            except Exception:
                self.metrics.refresh_failed(searcher.name)
                log.exception("the new version of %s cannot be opened: the old one is still served", searcher.name)
                await asyncio.sleep(_PATIENCE * self.options.refresh)

    async def _discover(self, source: Source) -> None:
        """Take up indices that were not there at the start: those of another encoder."""
        while True:
            await asyncio.sleep(self.options.refresh)
            try:
                names = await asyncio.to_thread(source.names)
                done = [await self._take_up(name, source) for name in names if name not in self.searchers]
            except Exception:
                log.exception("new indices cannot be looked for")
                done = [False]
            if not all(done):
                await asyncio.sleep(_PATIENCE * self.options.refresh)

    async def _take_up(self, name: str, source: Source) -> bool:
        """Serve another index. False where it cannot be opened: those beside it are served all the same."""
        try:
            searcher = self._searcher(name, await asyncio.to_thread(source.open, name))
        except Exception:
            self.metrics.refresh_failed(name)
            log.exception("the index of %s cannot be opened: it is not served", name)
            return False
        self.searchers[name] = searcher
        self._start(self._follow(searcher))
        self._start(self._warm(searcher))
        return True

    # ---- what is asked for -------------------------------------------------------------------------

    def searcher(self, index: str | None) -> Searcher:
        """By encoder id, or by its model's name where that is enough; by default the first.

        Raises:
            Refused: there is none of that name, or several.
        """
        if index in self.searchers:
            return self.searchers[index]
        found = [s for n, s in self.searchers.items() if index is None or n.rpartition("-")[0] == index]
        if not found or (index is not None and len(found) > 1):
            raise unknown("index", index or "here", known=", ".join(self.searchers))
        return found[0]

    async def answer(self, question: Question, index: str | None) -> dict[str, Any]:
        """A :class:`SearchAnswer` as a dict: a model for each result would cost more than the search.

        Raises what :meth:`Searcher.answer` does, and Refused for an unknown index or key.
        """
        searcher = self.searcher(index)
        await self.require(searcher, [term.key for term in question.terms if term.key is not None])
        found, ms = await searcher.answer(question)
        results = [result(row) for row in found.rows]
        return {"index": searcher.name, "version": found.version, "results": results, "ms": ms}

    async def vectors(self, terms: Sequence[Term], modality: Modality, index: str | None) -> dict[str, Any]:
        """:class:`Vectors` as a dict. Raises what :meth:`answer` does."""
        searcher = self.searcher(index)
        await self.require(searcher, [term.key for term in terms if term.key is not None])
        alone = ((term.model_copy(update={"weight": 1.0}),) for term in terms)
        questions = [Question(terms=each, modality=modality) for each in alone]
        found = await asyncio.gather(*map(searcher.vector, questions))
        return {
            "index": searcher.name, "dim": searcher.collection.dim, "vectors": [vector.tolist() for vector in found],
        }  # fmt: skip

    async def require(self, searcher: Searcher, keys: list[int]) -> None:
        """Raises Refused unless all these keys are in the index."""
        if not keys:
            return
        for key in keys:
            if key >= _KEYS:
                raise unknown("key", key)
        there = await asyncio.to_thread(searcher.collection.known, keys)
        for key, known in zip(keys, there.tolist(), strict=True):
            if not known:
                raise unknown("key", key)

    def info(self, searcher: Searcher) -> IndexInfo:
        collection, card = searcher.collection, searcher.collection.card
        fields = [name for name in FileInfo.model_fields if name != "bytes"]
        return IndexInfo(
            name=searcher.name,
            encoder=collection.encoder_id,
            model=card.encoder.model,
            version=card.version,
            modalities=list(collection.modalities),
            count=len(collection),
            deleted=len(collection.deleted),
            dim=card.encoder.dim,
            columns=list(collection.columns),
            files=[
                FileInfo(bytes=file.total_bytes, **{name: getattr(file, name) for name in fields})
                for file in card.files
            ],
        )

    def exposition(self) -> bytes:
        found = [(s.name, s.collection.card.version, len(s.collection)) for s in self.searchers.values()]
        return self.metrics.text(found)


def result(row: Row) -> dict[str, Any]:
    """A row of a collection's results, which is used up, as :class:`pipeline.service.models.Result`."""
    take = row.pop
    return {
        "key": str(take("pair_key")),
        "similarity": take("similarity"),
        "rank": take("rank"),
        "caption": take("caption"),
        "url": take("url"),
        "width": take("width"),
        "height": take("height"),
        "scores": row,
    }


def key_of(text: str) -> int:
    """A key out of a path. Raises Refused for what is none."""
    if not text.isascii() or not text.isdecimal() or len(text) > 19 or int(text) >= _KEYS:
        raise unknown("key", text[:40])
    return int(text)
