"""Our own API: /v1/search, /v1/batch, /v1/vectors, /v1/indices, /v1/images, /v1/generated."""

from __future__ import annotations

import asyncio
import hashlib
import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from fastapi import FastAPI, Query, Request
from starlette.responses import Response

from pipeline.service import generated
from pipeline.service.errors import Refused, refusal, unknown
from pipeline.service.models import (
    BatchAnswer,
    BatchBody,
    Deleted,
    Generated,
    Indices,
    Record,
    SearchAnswer,
    SearchBody,
    Vectors,
    VectorsBody,
)
from pipeline.service.routes import PROBLEMS
from pipeline.service.searching import Searcher
from pipeline.service.service import Service, key_of
from schemas.questions import Question

_MAGIC = (
    (b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"), (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"), (b"II*\0", "image/tiff"), (b"MM\0*", "image/tiff"),
)  # fmt: skip
_BIG = 1 << 53
"""JavaScript's whole numbers end here."""


def add_search(app: FastAPI, service: Service) -> None:
    """Searching."""

    @app.post("/v1/search", response_model=SearchAnswer, responses=PROBLEMS, tags=["search"])
    async def search(body: SearchBody) -> dict[str, Any]:
        """Search one index by a text, an image, a key, a vector, or a weighted mix of them."""
        return await service.answer(body, body.index)

    @app.post("/v1/batch", response_model=BatchAnswer, responses=PROBLEMS, tags=["search"])
    async def batch(body: BatchBody) -> dict[str, Any]:
        """Many questions in one request. One that cannot be answered has its error in its place."""
        _check_number(service, "questions", len(body.questions), "search in bulk: clipmill query --queries")
        service.searcher(body.index)
        return {"answers": await asyncio.gather(*(_one(service, q, body.index) for q in body.questions))}

    @app.post("/v1/vectors", response_model=Vectors, responses=PROBLEMS, tags=["search"])
    async def vectors(body: VectorsBody) -> dict[str, Any]:
        """The vectors of texts, images and keys, as a search would use them."""
        _check_number(service, "terms", len(body.terms), "read the table: pipeline.vectors.read_vectors")
        return await service.vectors(body.terms, body.modality, body.index)

    @app.get("/v1/indices", responses=PROBLEMS, tags=["search"])
    async def indices() -> Indices:
        """The published indices with what was measured when they were built."""
        return Indices(indices=[service.info(s) for s in service.searchers.values()])


def _check_number(service: Service, what: str, number: int, instead: str) -> None:
    """Raises Refused for more of them than one request may have."""
    most = service.options.max_batch
    if number > most:
        raise Refused(
            422, "batch", f"too many {what} at once", expected=f"up to {most}", actual=str(number),
            remedy=f"send them in parts, or {instead}",
        )  # fmt: skip


async def _one(service: Service, question: Question, index: str | None) -> dict[str, Any]:
    try:
        return await service.answer(question, index)
    except Exception as exc:
        found = refusal(exc)
        if found is None:
            raise
        return found.body


def add_images(app: FastAPI, service: Service) -> None:
    """Single pairs: picture, record, deletion."""

    @app.get("/v1/images/{key}", responses=PROBLEMS, response_class=Response, tags=["images"])
    async def image(request: Request, key: str, index: str | None = None) -> Response:
        """The stored picture, as it is."""
        searcher, number = service.searcher(index), key_of(key)
        found = await asyncio.to_thread(searcher.collection.images, [number])
        if number not in found:
            raise unknown("picture of", key)
        return picture(found[number], request.headers.get("if-none-match"))

    @app.get("/v1/images/{key}/record", responses=PROBLEMS, tags=["images"])
    async def record(key: str, index: str | None = None) -> Record:
        """Everything known of a pair."""
        searcher, number = service.searcher(index), key_of(key)
        return await asyncio.to_thread(_record, service, searcher, number)

    @app.delete("/v1/images/{key}", responses=PROBLEMS, tags=["images"])
    async def delete(key: str, index: str | None = None) -> Deleted:
        """Take a pair out of the index: no search of any replica that begins after the answer finds it."""
        if not service.options.deletions:
            raise Refused(403, "deletions", "this service deletes nothing", remedy="start it with --deletions")
        searcher, number = service.searcher(index), key_of(key)
        await service.require(searcher, [number])
        await asyncio.to_thread(searcher.collection.delete, [number])
        return Deleted(key=key, index=searcher.name, deleted=True)


def add_generated(app: FastAPI, service: Service) -> None:
    """What ``clipmill generate`` made."""

    @app.get("/v1/generated", responses=PROBLEMS, tags=["generated"])
    async def prompts(
        prompt: str = Query("", max_length=1000, description="part of the prompt; case does not matter"),
        limit: int = Query(50, ge=1, le=1000),
    ) -> Generated:
        """Prompts, newest run first, with the pictures that were kept, and the ranks of all candidates."""
        return await asyncio.to_thread(generated.prompts, service.options.workspace, prompt, limit)

    @app.get("/v1/generated/{prompt_key}/{number}", responses=PROBLEMS, response_class=Response, tags=["generated"])
    async def candidate(request: Request, prompt_key: str, number: int, run: str | None = None) -> Response:
        """A kept picture; by default the best one of that number."""
        key = key_of(prompt_key)
        data = await asyncio.to_thread(generated.picture, service.options.workspace, key, number, run)
        return picture(data, request.headers.get("if-none-match"))


def picture(data: bytes, known: str | None) -> Response:
    """Encoded image bytes with their type, by content, and an ETag; 304 where the asker has them."""
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {"etag": tag, "cache-control": "private, no-cache"}
    if known is not None and tag in known:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type=_media_type(data))


def _media_type(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "image/avif"
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), "application/octet-stream")


def _record(service: Service, searcher: Searcher, key: int) -> Record:
    """In a thread. Raises Refused for an unknown key."""
    found = searcher.collection.records([key])
    if found.num_rows == 0:
        raise unknown("key", key)
    kept = [name for name in found.column_names if not name.endswith("_vec") and name != "file"]
    sections: dict[str, Any] = {"record": found.select(kept), "image": None, "pair": None}
    workspace = service.options.workspace
    if workspace is not None:
        for section, name, left_out in (("image", "images", "image"), ("pair", "pairs", "")):
            table = workspace.table(name)
            columns = [c for c in table.columns() if c not in (left_out, "pair_key")]
            sections[section] = table.read(columns, pc.field("pair_key") == key)
    return Record(key=str(key), index=searcher.name, **{name: _plain(rows) for name, rows in sections.items()})


def _plain(rows: pa.Table | None) -> dict[str, Any]:
    """The first row in values that JSON and JavaScript know: large whole numbers as texts, times in ISO 8601."""
    if rows is None or rows.num_rows == 0:
        return {}
    row: dict[str, Any] = rows.slice(0, 1).to_pylist()[0]
    return {name: _value(value) for name, value in row.items() if not isinstance(value, (bytes, bytearray))}


def _value(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return value if abs(value) < _BIG else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
