"""The fetcher on its own, against a well-behaved server: politeness, memory, refresh, robots.txt, many callers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.download.web.answers import Fetched
from pipeline.download.web.fetch import Fetcher, Request
from schemas.configs import DownloadConfig

MODIFIED = "Sat, 21 Nov 2026 10:00:00 GMT"


class Handler(BaseHTTPRequestHandler):
    """/SIZE/NAME?... answers SIZE bytes; /slow/... after 0.2 s; /wait/SECONDS/TIMES/... 429 the first TIMES times."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        site = self.server.site
        with site.lock:
            site.hits[self.path] += 1
            site.times.append(time.monotonic())
            site.active += 1
            site.most_active = max(site.most_active, site.active)
            hits = site.hits[self.path]
        first, *rest = self.path.strip("/").split("/")
        if first == "slow":
            time.sleep(0.2)
        with site.lock:
            site.active -= 1
        if first == "wait" and hits <= int(rest[1]):
            self.reply(429, b"", {"Retry-After": rest[0]})
        elif first == "robots.txt":
            self.reply(site.robots[0], site.robots[1])
        elif first == "tagged" and self.headers.get("If-None-Match") == '"one"':
            self.reply(304, b"", {"ETag": '"one"'})
        elif first == "dated" and self.headers.get("If-Modified-Since") == MODIFIED:
            self.reply(304, b"")
        else:
            headers = {"tagged": {"ETag": '"one"'}, "dated": {"Last-Modified": MODIFIED}}.get(first, {})
            body = self.path.encode() * (int(first) // len(self.path) + 1) if first.isdigit() else self.path.encode()
            self.reply(200, body, headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Site:
    """The server, and what it saw."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hits: Counter[str] = Counter()
        self.times: list[float] = []
        self.active = self.most_active = 0
        self.robots = (404, b"")
        self.server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.site = self
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://{self.host}/{path}"


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.server.shutdown()
    made.server.server_close()


def fetcher(site: Site, **settings: object) -> Fetcher:
    return Fetcher(DownloadConfig.model_validate({"allow_hosts": [site.host], "timeout": 5.0} | settings))


def answers(fetched: Fetcher, requests: list[Request]) -> list[Fetched]:
    found = dict(fetched.fetch_all(requests))
    assert sorted(found) == list(range(len(requests)))
    return [found[i] for i in range(len(requests))]


def test_every_answer_belongs_to_its_request(site: Site) -> None:
    """Three shards at once, from three threads: each gets its own bodies."""
    fetched = fetcher(site)

    def shard(name: int) -> None:
        paths = [f"{name}/{i}" for i in range(100)]
        got = answers(fetched, [Request(site.url(p)) for p in paths])
        assert [a.body[: len(p) + 1].decode() for a, p in zip(got, paths, strict=True)] == [f"/{p}" for p in paths]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(shard, range(3)))
    fetched.close()
    assert sum(site.hits.values()) == 300


def test_no_more_connections_to_a_host_than_allowed(site: Site) -> None:
    fetched = fetcher(site, per_host=3)
    answers(fetched, [Request(site.url(f"slow/{i}")) for i in range(12)])
    fetched.close()
    assert site.most_active == 3


def test_a_rate_is_kept(site: Site) -> None:
    fetched = fetcher(site, host_rate=20.0)
    answers(fetched, [Request(site.url(f"1/{i}")) for i in range(11)])
    fetched.close()
    assert site.times[-1] - site.times[0] >= 10 / 20.0 - 0.05


def test_memory_bounds_what_is_held(site: Site) -> None:
    """100 bodies of 100 kB, taken slowly, with room for ten: no more are ever fetched ahead than fit."""
    fetched = fetcher(site, memory=1 << 20, max_bytes=200_000)
    most = 0
    requests = [Request(site.url(f"100000/{i}")) for i in range(100)]
    for taken, (_, answer) in enumerate(fetched.fetch_all(requests), 1):
        most = max(most, sum(site.hits.values()) - taken)
        time.sleep(0.002)
        assert len(answer.body) > 99_000
    fetched.close()
    assert most * 100_000 <= 2 * (1 << 20), "what is on its way included"
    assert (fetched._held, fetched._waiting) == (0, 0), "all is given back"


def test_the_youngest_give_way_when_bodies_are_larger_than_thought(site: Site) -> None:
    """Thirty bodies of 1 MB at once with room for 2 MB: all arrive in the end, a few at a time."""
    fetched = fetcher(site, memory=1 << 20, max_bytes=1_100_000, per_host=32)
    got = answers(fetched, [Request(site.url(f"1000000/{i}")) for i in range(30)])
    fetched.close()
    assert {a.reason for a in got} == {"ok"}
    assert {len(a.body) >= 1_000_000 for a in got} == {True}


def test_an_abandoned_shard_gives_back_what_it_held(site: Site) -> None:
    fetched = fetcher(site)
    half = fetched.fetch_all([Request(site.url(f"1000/{i}")) for i in range(50)])
    for _ in range(10):
        next(half)
    half.close()
    answers(fetched, [Request(site.url("1/after"))])
    fetched.close()
    assert (fetched._held, fetched._waiting) == (0, 0)


def test_refresh_asks_only_for_what_has_changed(site: Site) -> None:
    fetched = fetcher(site)
    first = answers(fetched, [Request(site.url("tagged/a")), Request(site.url("dated/b"))])
    assert [(a.etag, a.last_modified) for a in first] == [('"one"', None), (None, MODIFIED)]
    asked = [Request(site.url("tagged/a"), etag='"one"'), Request(site.url("dated/b"), last_modified=MODIFIED)]
    again = answers(fetched, [*asked, Request(site.url("tagged/a"), etag='"old"')])
    fetched.close()
    assert [(a.not_modified, a.http_status) for a in again] == [(True, 304), (True, 304), (False, 200)]


def test_retry_after_is_waited_for_or_left_to_a_later_run(site: Site) -> None:
    fetched = fetcher(site, retries=2)
    start = time.monotonic()
    soon, later = answers(fetched, [Request(site.url("wait/2/1/a")), Request(site.url("wait/3600/9/b"))])
    fetched.close()
    assert soon.reason == "ok" and time.monotonic() - start >= 2
    assert (later.reason, later.retry_after, site.hits["/wait/3600/9/b"]) == ("http_429", 3600.0, 1)


def test_robots_txt_is_asked_for_once(site: Site) -> None:
    site.robots = (200, b"User-agent: clipmill\nDisallow: /no/\n")
    fetched = fetcher(site, robots_txt=True)
    got = answers(fetched, [Request(site.url(f"{path}/{i}")) for i in range(5) for path in ("no", "yes")])
    fetched.close()
    assert [str(a.reason) for a in got] == ["robots_txt", "ok"] * 5
    assert site.hits["/robots.txt"] == 1
    assert not [path for path in site.hits if path.startswith("/no/")]


def test_an_unreachable_robots_txt_closes_the_host(site: Site) -> None:
    site.robots = (503, b"")
    fetched = fetcher(site, robots_txt=True, retries=0)
    (got,) = answers(fetched, [Request(site.url("yes/1"))])
    fetched.close()
    assert (got.reason, got.reason.retryable) == ("http_5xx", True)


def test_objects_of_other_schemes_only_where_opened(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"picture")
    asked = [Request(f"file://{tmp_path}/a.bin"), Request(f"file://{tmp_path}/none"), Request(site.url("1/x"))]
    closed, opened = fetcher(site), fetcher(site, schemes=["http", "file"], max_bytes=100)
    assert [str(a.reason) for a in answers(closed, asked)] == ["scheme_refused", "scheme_refused", "ok"]
    found = answers(opened, asked)
    assert [str(a.reason) for a in found] == ["ok", "http_4xx", "ok"]
    assert found[0].body == b"picture"
    closed.close()
    opened.close()


def test_closed_while_requests_are_under_way(site: Site) -> None:
    fetched = fetcher(site)
    flying = fetched.fetch_all([Request(site.url(f"slow/{i}")) for i in range(4)])
    threading.Timer(0.05, fetched.close).start()
    with pytest.raises(RuntimeError, match="ended"):
        list(flying)
