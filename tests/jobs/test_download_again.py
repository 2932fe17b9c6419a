"""The download job, run again: refresh, duplicates, filters, and pairs that take their worker down."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import jobs.download
from jobs.base import execute
from jobs.download import Shard, Worker
from jobs.download import run as download_body
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.tables import Part
from pipeline.workspace import Workspace
from schemas.configs import DownloadConfig
from tests.pipeline.download.pictures.pictures import photo
from tests.servers import number_of, picture


class Handler(BaseHTTPRequestHandler):
    """Answers what the site's ``pages`` hold: path -> (status, body, headers); an ETag is compared."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        site = self.server.site
        status, body, headers = site.pages.get(self.path, (404, b"", {}))
        if headers.get("ETag") and self.headers.get("If-None-Match") == headers["ETag"]:
            status, body = 304, b""
        site.hits[self.path, status] += 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Site:
    """A site whose pages change."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self.hits: Counter[tuple[str, int]] = Counter()
        self.server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.site = self
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.server.shutdown()
    made.server.server_close()


def download(engine: Engine, site: Site, ws: Path, paths: list[str], **settings: Any) -> Run:
    """One run over a list of the site's paths, captions their names."""
    listed = ws.parent / "list.parquet"
    urls = [f"http://{site.host}{path}" for path in paths]
    pq.write_table(pa.table({"url": urls, "caption": [p.strip("/") for p in paths]}), listed)
    config = {
        "workspace": str(ws), "pairs": [str(listed)], "allow_hosts": [site.host], "workers": 1, "retries": 0,
        "retry_delay": 0.0, "format": "png", "dedup": "off",
    }  # fmt: skip
    return execute("download", DownloadConfig.model_validate(config | settings), download_body, engine)


def rows(ws: Path) -> dict[str, dict[str, Any]]:
    return {row["caption"]: row for row in Workspace(ws).table("images").read().to_pylist()}


def test_refresh(engine: Engine, site: Site, tmp_path: Path) -> None:
    """Unchanged ones cost a 304; changed ones are replaced; lost ones are kept; opt-outs are honoured."""
    ws, names = tmp_path / "ws", ["/same", "/new", "/gone", "/out"]
    site.pages = {name: (200, picture(i), {"ETag": f'"{i}"'}) for i, name in enumerate(names)}
    download(engine, site, ws, names)
    first = rows(ws)
    assert {r["etag"] for r in first.values()} == {'"0"', '"1"', '"2"', '"3"'}

    assert download(engine, site, ws, names).counts["in"] == 0, "by default stored images stay"
    assert download(engine, site, ws, names, refresh="1h").counts["in"] == 0, "they are younger"
    site.pages["/new"] = (200, picture(77), {"ETag": '"77"'})
    site.pages["/out"] = (200, picture(3), {"X-Robots-Tag": "noai"})
    del site.pages["/gone"]
    again = download(engine, site, ws, names, refresh="always")
    assert again.counts == {"in": 4, "out": 2, "failed": 2}
    assert again.figures["statuses"] == {"ok": 2, "http_4xx": 1, "opted_out": 1}
    assert site.hits["/same", 304] == 1 and site.hits["/same", 200] == 1

    now = rows(ws)
    untouched = [c for c in first["same"] if c != "fetched_at"]
    for kept in ("same", "gone"):
        assert {c: now[kept][c] for c in untouched} == {c: first[kept][c] for c in untouched}
        assert now[kept]["fetched_at"] > first[kept]["fetched_at"]
    assert number_of(now["new"]["image"]) == 77 and now["new"]["etag"] == '"77"'
    assert (now["out"]["status"], now["out"]["image"]) == ("opted_out", None)


def test_duplicates_are_marked(engine: Engine, site: Site, tmp_path: Path) -> None:
    ws = tmp_path / "ws"
    one, other = (Image.fromarray(photo(320, 240, seed)) for seed in (1, 2))
    bodies = {"/a": one, "/b": one, "/c": other, "/d": one.resize((300, 225))}
    for path, image in bodies.items():
        file = tmp_path / "image.png"
        image.save(file)
        site.pages[path] = (200, file.read_bytes(), {})
    exact = download(engine, site, ws, ["/a", "/b"], dedup="exact")
    assert exact.figures["duplicates"] == {"exact": 1, "near": 0}
    near = download(engine, site, ws, ["/a", "/b", "/c", "/d"], dedup="near")
    assert near.figures["duplicates"] == {"exact": 0, "near": 1}
    found, marks = rows(ws), Workspace(ws).table("duplicates").read().to_pylist()
    key = {name: row["pair_key"] for name, row in found.items()}
    kept = min(key["a"], key["b"])
    assert {m["pair_key"]: (m["kept_key"], m["kind"]) for m in marks} == {
        max(key["a"], key["b"]): (kept, "exact"), key["d"]: (kept, "near"),
    }  # fmt: skip
    version = Workspace(ws).table("duplicates").version()
    assert download(engine, site, ws, ["/a", "/b", "/c", "/d"]).figures["duplicates"] == {}
    assert Workspace(ws).table("duplicates").version() == version


def test_filters_and_their_change(engine: Engine, site: Site, tmp_path: Path) -> None:
    ws, names = tmp_path / "ws", ["/dog", "/a-dog-on-grass", "/cat"]
    site.pages = {name: (200, picture(i), {}) for i, name in enumerate(names)}
    run = download(engine, site, ws, names, caption_match="dog", min_caption_length=4, min_image_size=10)
    assert run.figures["statuses"] == {"ok": 1, "caption_filtered": 2}
    assert sum(site.hits.values()) == 1, "what is filtered is not asked for"
    again = download(engine, site, ws, names, caption_match="dog", retry=["caption_filtered"])
    assert again.figures["statuses"] == {"ok": 1, "caption_filtered": 1}
    assert {name for name, row in rows(ws).items() if row["status"] == "ok"} == {"dog", "a-dog-on-grass"}


class Fatal(Worker):
    """A worker that dies of one picture, as of a decoder's crash."""

    def __call__(self, shard: Shard) -> Part | pa.Table:
        if "kills" in shard.pairs["caption"].to_pylist():
            os._exit(7)
        return super().__call__(shard)


@pytest.mark.slow
def test_a_pair_that_kills_its_worker(
    engine: Engine, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its neighbours get their images; it gets its row, and another try in a later run."""
    ws, names = tmp_path / "ws", [*(f"/{i}" for i in range(40)), "/kills"]
    site.pages = {name: (200, picture(i), {}) for i, name in enumerate(names)}
    monkeypatch.setattr(jobs.download, "Worker", Fatal)
    run = download(engine, site, ws, names, shard_size=64)
    assert run.counts == {"in": 41, "out": 40, "failed": 1}
    assert run.figures["statuses"] == {"ok": 40, "worker_lost": 1}
    assert rows(ws)["kills"]["retryable"] and rows(ws)["kills"]["error"]
    monkeypatch.undo()
    assert download(engine, site, ws, names).figures["statuses"] == {"ok": 1}
    assert rows(ws)["kills"]["attempts"] == 2
