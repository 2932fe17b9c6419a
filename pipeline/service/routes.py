"""How JSON comes in and goes out: pydantic-core reads and writes it in one go, beside FastAPI's own machinery."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from pipeline.service.errors import ProblemAnswer, json_response

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemAnswer, "description": text}
    for status, text in {
        400: "no JSON, or a strange Host header",
        401: "no token, or a wrong one",
        404: "no such index, key or picture",
        413: "the body is too large",
        422: "a question that cannot be answered",
        503: "too much at once: ask again",
        504: "it took too long",
    }.items()
}


class JsonRoute(APIRoute):
    """A route whose endpoint takes one model, ``body``, and returns models.

    FastAPI documents it as any other; a request skips its dependencies, its second parse and its second validation,
    which cost more than a search. ``straight`` is its handler, for :class:`pipeline.service.guard.Guard`.
    """

    straight: Handler | None = None

    def get_route_handler(self) -> Handler:
        model = get_type_hints(self.endpoint).get("body")
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return super().get_route_handler()
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            return json_response(await endpoint(model.model_validate_json(await request.body())))

        self.straight = handle
        return handle
