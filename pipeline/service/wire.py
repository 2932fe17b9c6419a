"""clip-retrieval's wire protocol, as its ClipClient 2.45 sends and reads it: its programs run against us unchanged.

Source: rom1504/clip-retrieval, clip_retrieval/clip_client.py and clip_back.py. What differs: ids are pair_keys;
``use_mclip`` means nothing (the index has the encoder that it has); safety and aesthetics are columns of scores
(``embed --heads``), where there are any, instead of models of the service's own; an error says what it is.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from pydantic import Base64Bytes, BaseModel, Field

from pipeline.service.errors import Refused
from pipeline.service.routes import PROBLEMS
from pipeline.service.searching import Row, Searcher
from pipeline.service.service import Service
from schemas.questions import Modality, Question, Term

_SAME = 0.94
"""Cosine from which its back end takes two results for the same picture."""
_UNSAFE = {"use_safety_model": "score_nsfw", "use_violence_detector": "score_violence"}
_UNSAFE_FROM = 0.5
_AESTHETIC = "score_aesthetic"
_SCALE = 10
"""Aesthetic scores go from 0 to 10."""
_MOST_IDS = 10_000


class KnnBody(BaseModel):
    """What ``ClipClient.query`` sends. Of text, image, image_url and embedding_input the first that is given counts."""

    text: str | None = Field(None, max_length=10_000)
    image: Base64Bytes | None = None
    image_url: str | None = Field(None, max_length=8_192)
    embedding_input: tuple[float, ...] | None = Field(None, description="D numbers")
    modality: Modality = "image"
    num_images: int = Field(100, ge=1, description="results with their metadata")
    num_result_ids: int | None = Field(None, ge=1, description="results; the further ones with id and similarity alone")
    indice_name: str | None = Field(None, max_length=500)
    deduplicate: bool = False
    use_safety_model: bool = Field(False, description="leave out results with score_nsfw above 0.5")
    use_violence_detector: bool = Field(False, description="leave out results with score_violence above 0.5")
    use_mclip: bool = Field(False, description="ignored")
    aesthetic_score: int | float | str | None = Field(None, description="0 to 10: score_aesthetic should be near it")
    aesthetic_weight: float | str | None = Field(None, description="how much that counts beside the similarity")

    def question(self) -> Question:
        """Raises Refused where nothing is asked."""
        if self.text:
            term = Term(text=self.text)
        elif self.image is not None:
            term = Term.model_construct(image=self.image)
        elif self.image_url is not None:
            term = Term(image_url=self.image_url)
        elif self.embedding_input is not None:
            term = Term(vector=self.embedding_input)
        else:
            raise Refused(422, "empty", "nothing is asked", expected="text, image, image_url or embedding_input")
        return Question(
            terms=(term,),
            k=self.num_result_ids or self.num_images,
            modality=self.modality,
            unique=_SAME if self.deduplicate else None,
        )


class MetadataBody(BaseModel):
    ids: list[int] = Field(max_length=_MOST_IDS)
    indice_name: str | None = Field(None, max_length=500)


def add_wire(app: FastAPI, service: Service) -> None:
    """The three routes."""

    @app.post("/knn-service", responses=PROBLEMS, tags=["clip-retrieval"])
    async def knn(body: KnnBody) -> list[dict[str, Any]]:
        """Nearest neighbours of a text, an image or a vector."""
        searcher = service.searcher(body.indice_name)
        found, _ = await searcher.answer(body.question())
        rows = _pleasing([row for row in found.rows if _safe(row, body)], body)
        return [_as_theirs(row, described=i < body.num_images) for i, row in enumerate(rows)]

    @app.get("/indices-list", responses=PROBLEMS, tags=["clip-retrieval"])
    async def indices() -> list[str]:
        """Names for ``indice_name``."""
        return list(service.searchers)

    @app.post("/metadata", responses=PROBLEMS, tags=["clip-retrieval"])
    async def metadata(body: MetadataBody) -> list[dict[str, Any]]:
        """What is known of pairs, by their ids."""
        searcher = service.searcher(body.indice_name)
        await service.require(searcher, body.ids)
        return await asyncio.to_thread(_described, searcher, body.ids)


def _described(searcher: Searcher, ids: list[int]) -> list[dict[str, Any]]:
    """In a thread."""
    rows = {row["pair_key"]: row for row in searcher.collection.records(ids).to_pylist()}
    return [{"id": key, "metadata": _metadata(rows[key])} for key in ids if key in rows]


def _metadata(row: Row) -> dict[str, Any]:
    left_out = {"pair_key", "rank", "file", "query"}
    return {name: v for name, v in row.items() if name not in left_out and not isinstance(v, (bytes, bytearray))}


def _as_theirs(row: Row, *, described: bool) -> dict[str, Any]:
    known = _metadata(row) if described else {}
    return {**known, "id": row["pair_key"], "similarity": row["similarity"]}


def _safe(row: Row, body: KnnBody) -> bool:
    return not any(getattr(body, name) and (row.get(column) or 0) > _UNSAFE_FROM for name, column in _UNSAFE.items())


def _pleasing(rows: list[Row], body: KnnBody) -> list[Row]:
    """By similarity + weight * closeness to the wanted aesthetic score, where the index has such scores."""
    if body.aesthetic_score in (None, "") or not rows or rows[0].get(_AESTHETIC) is None:
        return rows
    wanted, weight = float(body.aesthetic_score or 0), float(body.aesthetic_weight or 0)

    def score(row: Row) -> float:
        off = abs(float(row.get(_AESTHETIC) or 0) - wanted) / _SCALE
        return float(row["similarity"]) + weight * (1 - off)

    return sorted(rows, key=score, reverse=True)
