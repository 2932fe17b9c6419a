"""Objects of other schemes (s3, gs, file, ...), where the config opens them."""

from __future__ import annotations

from upath import UPath

from pipeline.download.web.answers import Fetched
from schemas.errors import Reason


def read_object(url: str, max_bytes: int) -> Fetched:
    """An object, through fsspec. Never raises: whatever the store's client raises is the answer."""
    try:
        path = UPath(url)
        size = path.stat().st_size
        if size > max_bytes:
            return Fetched(Reason.TOO_LARGE, error=f"{size} bytes, {max_bytes} allowed")
        body = path.read_bytes()
    except FileNotFoundError as exc:
        return Fetched(Reason.HTTP_4XX, error=f"not there: {exc}"[:300])
    except Exception as exc:
        return Fetched(Reason.CONNECT, error=f"{type(exc).__name__}: {exc}"[:300])
    return Fetched(Reason.OK, body) if body else Fetched(Reason.EMPTY_BODY, error="empty object")
