"""Images that a question brings along: files, bytes, URLs under the download's policy; judged before decoding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.configs import DownloadConfig
from schemas.errors import UsageError

if TYPE_CHECKING:  # OpenCV and Pillow: for questions with an image alone
    from pipeline.download.pictures.images import ImageStage

TIMEOUT = 10.0
_SIDE = 512
"""Shorter side, pixels, to which larger images are scaled: more than encoders look at."""


def fetch_image(url: str, allow_hosts: Sequence[str] = (), timeout: float = TIMEOUT) -> bytes:
    """The image at a URL, as :func:`clean_image` leaves it; what the download refuses is refused here.

    Args:
        allow_hosts: private addresses to open, ``HOST[:PORT]``.
        timeout: seconds for all of it, redirects included.

    Raises:
        UsageError: naming the reason, as the table images has it.
    """
    from pipeline.download.web.fetch import Fetcher, Request

    config = DownloadConfig(
        workspace="", allow_hosts=tuple(allow_hosts), timeout=timeout, retries=0, concurrency=1, per_host=1
    )
    fetcher = Fetcher(config)
    try:
        [(_, answer)] = fetcher.fetch_all([Request(url)])
    finally:
        fetcher.close()
    if answer.reason != "ok":
        raise UsageError(
            f"the image {url[:200]} cannot be fetched",
            expected="an image at a public address",
            actual=f"{answer.reason}: {answer.error or answer.reason.meaning}",
            remedy="open a private address with --allow-hosts" if answer.reason == "address_refused" else "",
        )
    return clean_image(answer.body)


def clean_image(data: bytes) -> bytes:
    """An encoded image as the download would store it: upright, in sRGB, of at most 512 pixels on its shorter side.

    So a picture asks the same question as a file, as a URL and out of the workspace. Its format, pixels and frames are
    held against the download's limits before it is decoded.

    Raises:
        UsageError: naming the reason.
    """
    from pipeline.download.web.policy import Refused

    stage = _stage()
    if len(data) > stage.config.max_bytes:
        raise UsageError(
            "the image is too large", expected=f"{stage.config.max_bytes:,} bytes at most", actual=f"{len(data):,}"
        )
    try:
        return stage(data).image
    except Refused as exc:
        raise UsageError("that is no image to search with", actual=f"{exc.reason}: {exc.detail}") from exc


def read_image(place: str, allow_hosts: Sequence[str] = ()) -> bytes:
    """The image in a file, or at an http(s) URL, as :func:`clean_image` leaves it.

    Raises:
        UsageError: it cannot be read or fetched, or is no image.
    """
    if place.lower().startswith(("http://", "https://")):
        return fetch_image(place, allow_hosts)
    try:
        data = Path(place).read_bytes()
    except (OSError, ValueError) as exc:
        raise UsageError(f"--image {place} is no readable image", actual=str(exc)) from exc
    return clean_image(data)


@cache
def _stage() -> ImageStage:
    from pipeline.download.pictures.images import ImageStage

    return ImageStage(DownloadConfig(workspace="", image_size=_SIDE, format="png", quality=1))
