"""What is refused and why, as an HTTP status and a JSON object. No traceback and no path of this machine goes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from schemas.errors import ClipmillError, UsageError

_ERRORS_SHOWN = 5
THEIRS = frozenset({"/knn-service", "/indices-list", "/metadata"})
"""Routes of clip-retrieval's protocol: its errors have a text under ``message``, and so have ours there."""


class Problem(BaseModel):
    """Why a request was refused, and what would help."""

    code: str
    problem: str
    expected: str = ""
    actual: str = ""
    remedy: str = ""


class ProblemAnswer(BaseModel):
    """The body of every answer whose status is 400 or more."""

    error: Problem


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, code: str, problem: str, *, headers: Mapping[str, str] | None = None, **more: str
    ) -> None:
        super().__init__(problem)
        self.status, self.headers = status, dict(headers or {})
        self.problem = Problem(code=code, problem=problem, **more)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.problem.model_dump()}


def unknown(what: str, name: object, known: str = "") -> Refused:
    return Refused(404, "unknown", f"there is no {what} {name}", expected=known)


def refusal(exc: BaseException) -> Refused | None:
    """What an exception means for whoever asked, or None where it is no fault of the request."""
    if isinstance(exc, Refused):
        return exc
    if isinstance(exc, (ValidationError, RequestValidationError)):
        return _invalid(exc)
    if isinstance(exc, HTTPException):
        phrase = HTTPStatus(exc.status_code).phrase
        return Refused(exc.status_code, phrase.lower().replace(" ", "_"), phrase, headers=exc.headers)
    if isinstance(exc, UsageError):
        return Refused(
            422, "refused", exc.problem, expected=exc.expected, actual=exc.actual, remedy=exc.remedy
        )  # fmt: skip
    if isinstance(exc, ClipmillError) and exc.retryable:
        return busy("the workspace cannot be read just now")
    return None


def busy(problem: str) -> Refused:
    return Refused(503, "busy", problem, remedy="ask again a little later", headers={"retry-after": "1"})


def failed() -> Refused:
    """An error of ours: what it was stands in the log, not in the answer."""
    return Refused(500, "failed", "the service failed at this request", remedy="its log says why")


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Plain Python values or models as JSON; NaN and infinities as null."""
    data = to_json(content, inf_nan_mode="null")
    return Response(data, status, headers, media_type="application/json")


async def handle(request: Request, exc: Exception) -> Response:
    """Exception handler of the app. Anything that is no refusal goes on to :class:`pipeline.service.guard.Guard`."""
    found = refusal(exc)
    if found is None:
        raise exc
    return problem_response(found, request.scope["path"])


def problem_response(found: Refused, path: str) -> Response:
    """An error as the route of that path reports it."""
    body = found.body | {"message": found.problem.problem} if path in THEIRS else found.body
    return json_response(body, found.status, found.headers)


HANDLED = (Refused, ValidationError, RequestValidationError, HTTPException, ClipmillError)
GONE = (ClientDisconnect,)
"""Whoever asked is gone: nobody to answer, and nothing to log."""


def _invalid(exc: ValidationError | RequestValidationError) -> Refused:
    errors: Sequence[Any] = exc.errors()
    if errors and errors[0]["type"] == "json_invalid":
        return Refused(400, "json", "the body is no JSON", actual=errors[0]["msg"])
    lines = [": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in errors[:_ERRORS_SHOWN]]
    return Refused(422, "invalid", "the request does not fit its schema", actual="; ".join(lines))
