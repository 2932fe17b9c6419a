"""The stage against a hostile server: every misbehaviour gives exactly its reason, and its neighbours are fine."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import pyarrow as pa
import pytest

from pipeline.download.stage import DownloadStage
from schemas.configs import DownloadConfig
from schemas.keys import pair_keys
from schemas.tables import IMAGES, SHARD
from tests.servers import Server, free_port, number_of, picture


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


@pytest.fixture(scope="module")
def canary() -> Iterator[Server]:
    """A private server that nobody allowed: it must never be asked."""
    with Server() as started:
        yield started


def download(urls: list[str], server: Server, **settings: object) -> list[dict[str, object]]:
    """One shard through the stage, without Ray: its rows in the order of ``urls``."""
    config = DownloadConfig.model_validate(
        {"allow_hosts": [server.host], "timeout": 5.0, "retries": 0, "max_bytes": 200_000, "format": "png"} | settings
    )
    captions = [f"caption {i}" for i in range(len(urls))]
    keys = pair_keys(urls, captions)
    given = {"pair_key": keys, "url": urls, "caption": captions, "attempts": [0] * len(urls)}
    nothing = dict.fromkeys(("problem", "etag", "last_modified"), [None] * len(urls))
    stage = DownloadStage(config, "a-run")
    rows = stage(pa.table(given | nothing).select(SHARD.names).cast(SHARD))
    stage.close()
    assert rows.schema == IMAGES.schema
    by_key = {row["pair_key"]: row for row in rows.to_pylist()}
    assert rows.num_rows == len(by_key) == len(urls), "pairs in = rows out"
    found = [by_key[int(key)] for key in keys]
    assert [(r["url"], r["caption"]) for r in found] == list(zip(urls, captions, strict=True))
    return found


# path or URL -> reason, HTTP status
CASES: dict[str, tuple[str, int | None]] = {
    "ok/1.jpg": ("ok", 200),
    "ok/12.png": ("ok", 200),
    "ok/123.webp": ("ok", 200),
    "ok/34.gif": ("ok", 200),
    "ok/45.bmp": ("ok", 200),
    "ok/56.tiff": ("ok", 200),
    "status/404": ("http_4xx", 404),
    "status/410": ("http_4xx", 410),
    "status/403": ("http_4xx", 403),
    "status/429": ("http_429", 429),
    "status/500": ("http_5xx", 500),
    "status/503": ("http_5xx", 503),
    "redirect/5": ("ok", 200),
    "redirect/6": ("too_many_redirects", None),
    "loop": ("too_many_redirects", None),
    "to?url=file:///etc/passwd": ("scheme_refused", None),
    "to?url=" + quote("http://169.254.169.254/latest/meta-data"): ("address_refused", None),
    "to?url=" + quote("http://user:secret@example.com/"): ("credentials_in_url", None),
    "to?url=" + quote("http://[::1/"): ("bad_url", None),
    "large-declared": ("too_large", 200),
    "large-streamed": ("too_large", 200),
    "truncated": ("truncated", 200),
    "truncated-chunks": ("truncated", 200),
    "drip": ("timeout", 200),
    "silent": ("timeout", None),
    "empty": ("empty_body", 200),
    "html": ("not_an_image", 200),
    "svg": ("format_refused", 200),
    "bomb/30000": ("too_many_pixels", 200),
    "bomb/10001": ("too_many_pixels", 200),
    "damaged": ("decode", 200),
    "robots?tag=noai": ("opted_out", 200),
    "robots?tag=" + quote("noimageai, nofollow"): ("opted_out", 200),
    "robots?tag=" + quote("max-image-preview: large, noai"): ("opted_out", 200),
    "robots?tag=" + quote("otherbot: noai"): ("ok", 200),
    "robots?tag=nofollow": ("ok", 200),
    "too-short-length": ("decode", 200),
    "bad-length": ("bad_response", 200),
    "reset": ("reset", None),
    "garbage": ("bad_response", None),
    "gzip-lie": ("bad_response", 200),
    "ftp://127.0.0.1/a.png": ("scheme_refused", None),
    "": ("bad_url", None),
    "http://nobody.invalid/a.png": ("dns", None),
    "http://[::ffff:127.0.0.1]:1/a.png": ("address_refused", None),
}


@pytest.fixture(scope="module")
def outcomes(server: Server) -> dict[str, dict[str, object]]:
    """All cases in one shard, at once."""
    urls = [path if "://" in path.partition("?")[0] or not path else server.url(path) for path in CASES]
    return dict(zip(CASES, download(urls, server), strict=True))


@pytest.mark.parametrize("path", CASES, ids=lambda p: p or "empty")
def test_reason(path: str, outcomes: dict[str, dict[str, object]]) -> None:
    row = outcomes[path]
    assert (row["status"], row["http_status"]) == CASES[path], row["error"]
    if row["status"] == "ok":
        assert row["image"] and row["error"] is None and row["sha256"]
    else:
        assert row["image"] is None and row["error"]
    assert row["attempts"] == 1 and row["run"] == "a-run"


@pytest.mark.parametrize("path", [p for p in CASES if p.startswith("ok/")])
def test_every_row_holds_its_own_picture(path: str, outcomes: dict[str, dict[str, object]]) -> None:
    number = int(path.removeprefix("ok/").partition(".")[0])
    row = outcomes[path]
    assert number_of(row["image"]) == number  # type: ignore[arg-type]
    assert (row["original_width"], row["original_height"]) == (24, 16)


def test_a_connection_refused(server: Server) -> None:
    port = free_port()
    (row,) = download([f"http://127.0.0.1:{port}/a.png"], server, allow_hosts=[f"127.0.0.1:{port}"])
    assert (row["status"], row["retryable"]) == ("connect", True)


def test_plain_http_where_tls_was_asked_for(server: Server) -> None:
    (row,) = download([f"https://{server.host}/ok/1.png"], server)
    assert row["status"] == "tls"


@pytest.mark.parametrize("status", [429, 503])
def test_tried_again_until_it_works(status: int, server: Server) -> None:
    path = f"flaky/{status}/2/ok/3.png"
    (row,) = download([server.url(path)], server, retries=2)
    assert (row["status"], row["attempts"]) == ("ok", 1)
    assert number_of(row["image"]) == 3  # type: ignore[arg-type]
    assert server.hits[path] == 3


def test_tried_no_more_often_than_asked(server: Server) -> None:
    paths = [f"flaky/503/9/ok/{n}.png" for n in (1, 2)]
    rows = download([server.url(p) for p in paths], server, retries=1)
    assert [r["status"] for r in rows] == ["http_5xx"] * 2
    assert [server.hits[p] for p in paths] == [2, 2]


def test_what_cannot_pass_is_not_tried_again(server: Server) -> None:
    before = server.hits["status/404"]
    download([server.url("status/404")], server, retries=3)
    assert server.hits["status/404"] == before + 1


def test_no_private_address_is_asked_for(server: Server, canary: Server) -> None:
    """Directly, by another spelling, by name, and by redirect from an allowed host."""
    spellings = ["127.0.0.1", "127.1", "0x7f.1", "2130706433", "0.0.0.0", "localhost", "[::1]", "[::ffff:127.0.0.1]"]
    targets = [canary.url("ok/1.png", host) for host in spellings]
    redirected = [server.url("to?url=" + quote(target)) for target in targets]
    twice = server.url("to?url=" + quote(server.url("to?url=" + quote(targets[0]))))
    rows = download([*targets, *redirected, twice], server)
    assert {r["url"]: r["status"] for r in rows if r["status"] != "address_refused"} == {}
    assert sum(canary.hits.values()) == 0


def test_an_allowed_port_opens_no_other(server: Server, canary: Server) -> None:
    by_port = download([server.url("ok/1.png"), canary.url("ok/1.png")], server, allow_hosts=[server.host])
    assert [r["status"] for r in by_port] == ["ok", "address_refused"]
    assert sum(canary.hits.values()) == 0
    by_host = download([server.url("ok/1.png")], server, allow_hosts=["127.0.0.1"])
    assert by_host[0]["status"] == "ok"


def test_a_name_is_allowed_by_its_name(server: Server) -> None:
    url = server.url("ok/4.png", "localhost")
    refused, allowed = (
        download([url], server, allow_hosts=hosts)[0]["status"]
        for hosts in ([server.host], [f"localhost:{server.port}"])
    )
    assert (refused, allowed) == ("address_refused", "ok")


def test_opt_outs_can_be_switched_off(server: Server) -> None:
    (row,) = download([server.url("robots?tag=noai")], server, respect_opt_out=False)
    assert row["status"] == "ok" and number_of(row["image"]) == 8  # type: ignore[arg-type]


def test_size_limits(server: Server) -> None:
    urls = [server.url("ok/1.png")]
    assert download(urls, server, min_image_size=17)[0]["status"] == "too_small"
    assert download(urls, server, min_image_size=16)[0]["status"] == "ok"
    assert download(urls, server, max_aspect_ratio=1.4)[0]["status"] == "aspect_ratio"
    assert download(urls, server, max_pixels=24 * 16 - 1)[0]["status"] == "too_many_pixels"
    assert download(urls, server, max_pixels=24 * 16)[0]["status"] == "ok"
    assert download(urls, server, max_bytes=len(picture(1)) - 1)[0]["status"] == "too_large"
    assert download(urls, server, max_bytes=len(picture(1)))[0]["status"] == "ok"


def test_resized_and_encoded_as_asked(server: Server) -> None:
    urls = [server.url("ok/77.png")]
    big = download(urls, server, image_size=48, upscale=True, resize_mode="border", format="webp")[0]
    assert (big["width"], big["height"], big["format"]) == (48, 48, "webp")
    assert bytes(big["image"])[8:12] == b"WEBP"  # type: ignore[arg-type]
    small = download(urls, server, image_size=8, resize_mode="center_crop", format="jpg")[0]
    assert (small["width"], small["height"]) == (8, 8)
    assert number_of(small["image"]) == 77  # type: ignore[arg-type]


def test_more_urls_than_places(server: Server) -> None:
    urls = [server.url(f"ok/{i}.png?wait=0.01") for i in range(60)]
    rows = download(urls, server, concurrency=7, per_host=3)
    assert [number_of(r["image"]) for r in rows] == list(range(60))  # type: ignore[arg-type]


def test_waiting_for_a_busy_host_is_no_timeout(server: Server) -> None:
    """Twelve requests of 0.4 s through one connection take longer than one image may."""
    rows = download([server.url(f"ok/{i}.png?wait=0.4") for i in range(12)], server, per_host=1, timeout=2.0)
    assert {r["status"] for r in rows} == {"ok"}
