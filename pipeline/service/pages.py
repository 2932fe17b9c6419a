"""The web page at /, its scripts and styles, and what watches a service: health, readiness, metrics."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from pipeline.service.errors import busy, unknown
from pipeline.service.service import Service

FOLDER = Path(__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""No inline scripts or styles, nothing from elsewhere, in no frame."""
_SERVED = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def add_page(app: FastAPI) -> None:
    """The page's files, read once."""
    files = {path.name: path.read_bytes() for path in sorted(FOLDER.glob("*")) if path.suffix in _SERVED}

    def file(name: str, request: Request) -> Response:
        if name not in files:
            raise unknown("page", name)
        tag = f'"{hashlib.sha256(files[name]).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": "no-cache", "content-security-policy": POLICY}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(files[name], headers=headers, media_type=_SERVED[Path(name).suffix])

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return file("index.html", request)

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def part(request: Request, name: str) -> Response:
        return file(name, request)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


def add_watch(app: FastAPI, service: Service) -> None:
    """Health, readiness and metrics."""

    @app.get("/healthz", tags=["watch"])
    async def health() -> dict[str, str]:
        """Is the process there and answering?"""
        return {"status": "ok"}

    @app.get("/readyz", tags=["watch"])
    async def ready() -> dict[str, str]:
        """Are the indices open and the encoders loaded? 503 until then, and while it ends."""
        if not service.ready:
            raise busy("not ready yet")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, tags=["watch"])
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})
