"""Images of questions: under the download's policy and limits, whatever way they come in by."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs.fetching import clean_image, fetch_image, read_image
from schemas.errors import UsageError
from tests.servers import Server, number_of, picture, png_bomb


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def test_a_url_a_file_and_bytes_give_the_same(server: Server, tmp_path: Path) -> None:
    (tmp_path / "7.png").write_bytes(picture(7, "png"))
    fetched = fetch_image(server.url("ok/7.png"), [server.host])
    assert fetched == clean_image(picture(7, "png")) == read_image(str(tmp_path / "7.png"))
    assert number_of(fetched) == 7 and number_of(fetch_image(server.url("redirect/2"), [server.host])) == 7
    assert read_image(server.url("ok/7.png"), [server.host]) == fetched


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("status/404", "http_4xx"), ("status/500", "http_5xx"), ("loop", "too_many_redirects"),
        ("to?url=file:///etc/hostname", "scheme_refused"), ("to?url=http://169.254.169.254/x", "address_refused"),
    ],
)  # fmt: skip
def test_what_the_download_refuses(path: str, reason: str, server: Server) -> None:
    with pytest.raises(UsageError, match=reason):
        fetch_image(server.url(path), [server.host])


def test_private_addresses_are_closed(server: Server) -> None:
    before = sum(server.hits.values())
    for url in (server.url("ok/7.png"), "http://[::1]/x.png", "http://10.0.0.1/", "ftp://h/x", "http://u:p@h.example/"):
        with pytest.raises(UsageError, match="cannot be fetched"):
            fetch_image(url)
    assert sum(server.hits.values()) == before


def test_no_longer_than_its_time(server: Server) -> None:
    begun = time.monotonic()
    with pytest.raises(UsageError, match="timeout"):
        fetch_image(server.url("ok/7.png?wait=60"), [server.host], timeout=1.0)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"), (b"<html></html>", "not_an_image"), (png_bomb(50_000), "too_many_pixels"),
        (picture(1)[:-20], "decode"), (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format_refused"),
    ],
)  # fmt: skip
def test_no_images(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        clean_image(data)
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(UsageError, match=reason):
        read_image(str(tmp_path / "x.png"))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path, "a\0b"):
        with pytest.raises(UsageError, match="no readable image"):
            read_image(str(path))


def test_upright_and_no_larger_than_needed() -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (2000, 1200), (200, 10, 10)).save(out, "JPEG", exif=exif)
    with Image.open(io.BytesIO(clean_image(out.getvalue()))) as image:
        assert image.size == (512, 853)
