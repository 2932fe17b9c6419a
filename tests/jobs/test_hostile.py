"""The hostile corpus through the command: one run over all cases, then one look at each of them."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.cli import main
from pipeline.engine import Engine
from pipeline.workspace import Workspace
from schemas.errors import Reason
from schemas.keys import pair_key
from tests.hostile import CASES
from tests.hostile.case import MAX_BYTES, MAX_FRAMES, MAX_PIXELS, TIMEOUT, Case
from tests.servers import Reset, Server, certificate, free_port, number_of

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Site:
    """The servers of one run. ``canary`` is private, and nobody allowed it."""

    server: Server
    canary: Server
    hosts: Mapping[str, str]
    """What the cases' URLs and answers are filled in with."""

    @property
    def allowed(self) -> str:
        return ",".join(self.hosts[name] for name in ("server", "tls", "mute", "hangup", "resets", "ssh", "closed"))


@dataclass(frozen=True)
class Outcome:
    """What one run of the command left behind."""

    site: Site
    summary: dict[str, Any]
    stderr: str
    seconds: float
    memory: int
    """Bytes that the largest worker had at its peak."""
    rows: list[dict[str, Any]]
    cases: dict[str, dict[str, Any]]
    """The row of every case, by its name."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    greetings = {
        "mute": [600.0], "hangup": [], "resets": [Reset()], "ssh": [b"SSH-2.0-OpenSSH_9.6\r\n", 0.5],
    }  # fmt: skip
    with ExitStack() as stack:
        answers: dict[str, Any] = {}
        server = stack.enter_context(Server(answers))
        canary = stack.enter_context(Server(hosts=("127.0.0.1", "::1")))
        tls = stack.enter_context(Server(tls=certificate(tmp_path_factory.mktemp("tls"))))
        others = {name: stack.enter_context(Server(greeting=steps)) for name, steps in greetings.items()}
        hosts = {name: other.host for name, other in others.items()} | {
            "server": server.host, "canary": canary.host, "tls": tls.host, "closed": f"127.0.0.1:{free_port()}",
            "sport": str(server.port), "cport": str(canary.port), "tlsport": str(tls.port),
        }  # fmt: skip
        answers |= {case.name: case.steps(hosts) for case in CASES if case.parts is not None}
        yield Site(server, canary, hosts)


def url_of(case: Case, site: Site) -> str:
    return case.own(site.hosts).fill(case.url)


def write_list(file: Path, site: Site) -> str:
    """The cases as a parquet list; two rows of it are doubles."""
    urls = [None if case.url == "<null>" else url_of(case, site) for case in CASES]
    captions = [case.caption for case in CASES]
    at = [i for i, case in enumerate(CASES) if case.name in ("status-200", "redirect-to-file")]
    pq.write_table(
        pa.table({"url": urls + [urls[i] for i in at], "caption": captions + [captions[i] for i in at]}), file
    )
    return str(file)


class Memory(threading.Thread):
    """Watches Ray's workers: ``peak`` is the most bytes that one of them ever held."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(0.2):
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it is gone
                    if (process / "cmdline").read_bytes().startswith(b"ray::"):
                        found = re.search(r"VmHWM:\s*(\d+) kB", (process / "status").read_text())
                        self.peak = max(self.peak, 1024 * int(found[1]) if found else 0)


def call(site: Site, workspace: Path, *more: str) -> tuple[dict[str, Any], str]:
    """``clipmill download`` under the corpus' limits: its summary, and what it said on stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main([
            "download", "--workspace", str(workspace), "--allow-hosts", site.allowed, "--json",
            "--timeout", str(TIMEOUT), "--retries", "0", "--format", "png", "--image-size", "4000",
            "--max-bytes", str(MAX_BYTES), "--max-pixels", str(MAX_PIXELS), "--max-frames", str(MAX_FRAMES),
            "--workers", "2", "--per-host", "256", "--shard-size", "300", *more,
        ])  # fmt: skip
    assert status == 0, stderr.getvalue()[-5000:]
    return json.loads(stdout.getvalue().splitlines()[-1]), stderr.getvalue()


@pytest.fixture(scope="module")
def outcome(engine: Engine, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One run over all cases, in shards that hold slow and fast ones."""
    folder = tmp_path_factory.mktemp("hostile")
    listed = write_list(folder / "list.parquet", site)
    began = time.monotonic()
    with Memory() as memory:
        summary, stderr = call(site, folder / "ws", "--pairs", listed)
    seconds = time.monotonic() - began
    rows = Workspace(folder / "ws").table("images").read().to_pylist()
    by_pair = {(row["url"].strip(), row["caption"]): row for row in rows}
    cases = {case.name: by_pair[_url(case, site).strip(), case.caption or ""] for case in CASES}
    return Outcome(site, summary, stderr, seconds, memory.peak, rows, cases)


def _url(case: Case, site: Site) -> str:
    return "" if case.url == "<null>" else url_of(case, site)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, outcome: Outcome) -> None:
    row = outcome.cases[case.name]
    assert row["status"] in case.expected, (row["http_status"], row["error"])
    assert case.http_status in (None, row["http_status"])
    assert outcome.site.server.hits["c/" + case.name] <= case.requests
    assert outcome.site.server.sent[case.name] <= case.sent
    if row["status"] != "ok":
        assert row["image"] is None and row["error"] and row["sha256"] is None
        return
    assert row["error"] is None and len(row["sha256"]) == 64
    assert case.size in (None, (row["original_width"], row["original_height"]))
    if case.number >= 0:
        assert number_of(row["image"]) == case.number, "another case's picture"


def test_every_row_of_the_list_is_one_row(outcome: Outcome) -> None:
    ok = sum(row["status"] == "ok" for row in outcome.rows)
    assert outcome.summary["counts"] == {"in": len(CASES), "out": ok, "failed": len(CASES) - ok}
    assert outcome.summary["doubles"] == 2
    assert Counter(outcome.summary["statuses"]) == Counter(row["status"] for row in outcome.rows)
    keys = Counter(row["pair_key"] for row in outcome.rows)
    assert set(keys.values()) == {1} and len(keys) == len(CASES)
    for row in outcome.rows:
        assert row["pair_key"] == pair_key(row["url"], row["caption"])
        assert row["retryable"] == Reason(row["status"]).retryable
        assert row["attempts"] == 1


def test_there_are_enough_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 220
    assert {case.family for case in CASES} == {
        "statuses", "redirects", "addresses", "bodies", "encodings", "content", "optout", "rows",
    }  # fmt: skip


def test_the_canary_is_never_asked(outcome: Outcome) -> None:
    """Not even a connection, on IPv4 or IPv6; nor were the names behind an allowed one."""
    assert outcome.site.canary.connections == 0
    assert outcome.site.canary.heads == []


def test_what_was_asked_was_asked_honestly(outcome: Outcome) -> None:
    """Requests name us, carry nothing that a page put into them, and are one request each."""
    heads = outcome.site.server.heads
    assert len(heads) > 500
    for head in heads:
        line, *fields = head.split(b"\r\n")[:-2]
        assert line.startswith(b"GET /") and line.endswith(b" HTTP/1.1") and line.count(b" ") == 2, line[:200]
        assert all(0x20 < byte < 0x7F for byte in line.replace(b" ", b"")), "escaped"
        assert b"#" not in line
        names = Counter(field.partition(b":")[0].lower() for field in fields)
        assert names[b"host"] == names[b"user-agent"] == 1
        assert b"user-agent: clipmill/" in head.lower()
        refused = {b"cookie", b"authorization", b"proxy-authorization", b"referer", b"range", b"x-evil", b"upgrade"}
        assert not refused & names.keys(), head[:500]
    assert outcome.site.server.hits["evil"] == 0


def test_no_password_is_written_down(outcome: Outcome) -> None:
    """Not even where it came from is told; the list's own URL stays what it is."""
    assert "secret" not in outcome.stderr
    assert [row["url"] for row in outcome.rows if "secret" in (row["error"] or "")] == []


def test_nothing_of_the_list_was_run() -> None:
    assert not Path("/tmp/clipmill-was-here").exists()


def test_slow_ones_wait_together(outcome: Outcome) -> None:
    """60 cases take as long as they may: one after the other that would be more than four minutes."""
    slow = sum(row["status"] == "timeout" for row in outcome.rows)
    assert slow > 20
    assert outcome.seconds < slow * TIMEOUT


def test_bombs_take_no_memory(outcome: Outcome) -> None:
    """Any one of the bombs would take 700 MiB and more; a worker, with all that it imports, takes less than that."""
    assert 0 < outcome.memory < 768 << 20


LIST = b"""url,caption
<server>/ok/1.png,plain
<server>/ok/2.png,"quoted, with ""quotes"" in"
<server>/ok/3.png,"two
lines"
<server>/ok/4.png,"never closed
<server>/ok/5.png,after it
<server>/ok/6.png,"closed" too early
<server>/ok/7.png,too,many,cells
<server>/ok/8.png
<server>/ok/9.png,caf\xe9
<server>/ok/10.png,
,no url
<server>/ok/11.png,a "quote" inside
<server>/ok/12.png,a \0 inside
<server>/c/header-etag-not-ascii,validators
<server>/c/header-etag-odd,validators
<server>/ok/13.png,the last line has no end"""


def test_a_broken_csv_and_a_refresh(engine: Engine, site: Site, tmp_path: Path) -> None:
    """Every line is a row, whatever is wrong with it; and the odd validators that came with two of them do no harm."""
    listed = tmp_path / "list.csv"
    listed.write_bytes(LIST.replace(b"<server>", f"http://{site.server.host}".encode()))
    expected = {"ok": 10, "bad_record": 4, "bad_caption": 1, "bad_url": 1}
    summary, _ = call(site, tmp_path / "ws", "--pairs", str(listed))
    assert summary["statuses"] == expected
    rows = Workspace(tmp_path / "ws").table("images").read().to_pylist()
    assert len(rows) == 16
    found = {row["url"].rpartition("/")[2]: row for row in rows}
    for n in (1, 2, 3, 5, 10, 11, 12, 13):
        row = found[f"{n}.png"]
        assert row["status"] == "ok", row["error"]
        assert number_of(row["image"]) == n
    captions = {n: found[f"{n}.png"]["caption"] for n in (2, 3, 12)}
    assert captions == {2: 'quoted, with "quotes" in', 3: "two\nlines", 12: "a \0 inside"}

    summary, _ = call(site, tmp_path / "ws", "--pairs", str(listed), "--refresh", "always")
    assert (summary["counts"]["in"], summary["counts"]["failed"]) == (10, 0)
    again = Workspace(tmp_path / "ws").table("images").read().to_pylist()
    assert Counter(row["status"] for row in again) == expected
