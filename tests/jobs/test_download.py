"""The download job, end to end: through the command line, on real Ray, against the hostile server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs.base import execute
from jobs.cli import main
from jobs.download import run as download_body
from pipeline.engine import Engine
from pipeline.workspace import Workspace
from schemas.configs import DownloadConfig
from schemas.keys import pair_key
from schemas.tables import TABLES
from tests.servers import Server, free_port, number_of

STABLE = ["pair_key", "url", "caption", "status", "error", "http_status", "attempts", "retryable", "sha256", "phash",
          "width", "height", "original_width", "original_height", "image", "format"]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def write_list(file: Path, urls: list[str]) -> str:
    """A parquet list of these URLs; the caption tells the URL."""
    pq.write_table(pa.table({"url": urls, "caption": [f"at {url}" for url in urls]}), file)
    return str(file)


def argv(workspace: Path, server: Server, *more: str) -> list[str]:
    return [
        "download", "--workspace", str(workspace), "--allow-hosts", server.host, "--json", "--timeout", "5",
        "--retries", "0", "--format", "png", "--shard-size", "4", "--retry-delay", "0", "--workers", "1", *more,
    ]  # fmt: skip


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """Exit status, and the last line of stdout as JSON."""
    capsys.readouterr()
    status = main(arguments)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"job", "run", "outcome", "counts", "seconds", "outputs"} <= summary.keys()
    assert summary["job"] == "download"
    assert "error" not in summary or status, summary["error"]
    return status, summary


def versions(workspace: Path) -> dict[str, int]:
    return {name: Workspace(workspace).table(name).version() for name in TABLES}


def images(workspace: Path) -> dict[str, dict[str, Any]]:
    """Rows of images by URL: one for every pair, with the pair's own key and caption."""
    rows = Workspace(workspace).table("images").read().to_pylist()
    pairs = Workspace(workspace).table("pairs").read().to_pylist()
    assert sorted(r["pair_key"] for r in rows) == sorted(p["pair_key"] for p in pairs), "pairs in = rows out"
    runs = set(Workspace(workspace).table("runs").read(["run"])["run"].to_pylist())
    for row in rows:
        assert row["pair_key"] == pair_key(row["url"], row["caption"])
        assert row["caption"] == f"at {row['url']}"
        assert row["run"] in runs
        assert (row["image"] is not None) == (row["status"] == "ok")
    assert {p["added_run"] for p in pairs} <= runs
    return {row["url"]: row for row in rows}


def outcomes(workspace: Path) -> list[str]:
    rows = Workspace(workspace).table("runs").read(["started", "outcome"]).sort_by("started")
    return rows["outcome"].to_pylist()  # type: ignore[no-any-return]


def test_again_and_with_more(
    engine: Engine, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs in are rows out; the second run commits nothing; a third fetches only what is new."""
    ws = tmp_path / "ws"
    good = [server.url(f"ok/{n}.jpg") for n in range(9)]
    bad = {server.url("status/404"): "http_4xx", server.url("html"): "not_an_image", "ftp://x/": "scheme_refused"}
    first = write_list(tmp_path / "first.parquet", [*good, *bad, good[0], good[1]])
    status, summary = call(argv(ws, server, "--pairs", first), capsys)
    assert (status, summary["outcome"]) == (0, "done")
    assert summary["counts"] == {"in": 12, "out": 9, "failed": 3}
    assert summary["doubles"] == 2
    assert summary["statuses"] == {"ok": 9} | Counter(bad.values())
    assert summary["seconds"].keys() >= {"read", "plan", "fetch", "total"}
    assert summary["outputs"].keys() == {"pairs", "images", "duplicates"}
    rows = images(ws)
    assert {url: row["status"] for url, row in rows.items()} == dict.fromkeys(good, "ok") | bad
    assert [number_of(rows[url]["image"]) for url in good] == list(range(9))

    before, hits = versions(ws), server.hits.total()
    status, summary = call(argv(ws, server, "--pairs", first), capsys)
    assert (status, summary["counts"]) == (0, {"in": 0, "out": 0, "failed": 0})
    assert summary["already_known"] == 12
    assert versions(ws) == before, "nothing to do commits nothing"
    assert server.hits.total() == hits

    second = write_list(tmp_path / "second.parquet", [server.url("ok/50.png"), good[3]])
    status, summary = call(argv(ws, server, "--pairs", first, second), capsys)
    assert (status, summary["counts"]) == (0, {"in": 1, "out": 1, "failed": 0})
    assert server.hits.total() == hits + 1
    again = images(ws)
    assert again.keys() == rows.keys() | {server.url("ok/50.png")}
    assert {url: again[url] for url in rows} == rows, "old rows are untouched"

    status, summary = call(argv(ws, server), capsys)
    assert (status, summary["counts"]["in"]) == (0, 0), "without --pairs: what the workspace knows"
    assert outcomes(ws) == ["done", "done"]


def test_failed_rows_that_are_due_are_replaced(
    engine: Engine, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ws = tmp_path / "ws"
    flaky, never, gone = (server.url(p) for p in ("flaky/503/1/ok/3.png", "flaky/503/99/ok/4.png", "status/410"))
    listed = write_list(tmp_path / "list.parquet", [flaky, never, gone, server.url("ok/5.png")])
    _, summary = call(argv(ws, server, "--pairs", listed), capsys)
    assert summary["counts"] == {"in": 4, "out": 1, "failed": 3}
    first = images(ws)
    assert {url: row["status"] for url, row in first.items() if row["status"] != "ok"} == {
        flaky: "http_5xx", never: "http_5xx", gone: "http_4xx",
    }  # fmt: skip

    waiting = argv(ws, server, "--pairs", listed)
    waiting[waiting.index("--retry-delay") + 1] = "1000"
    before = versions(ws)
    _, summary = call(waiting, capsys)
    assert (summary["counts"]["in"], summary["retry_later"], versions(ws)) == (0, 2, before)

    _, summary = call(argv(ws, server, "--pairs", listed), capsys)
    assert summary["counts"] == {"in": 2, "out": 1, "failed": 1}
    second = images(ws)
    assert (second[flaky]["status"], second[flaky]["attempts"]) == ("ok", 2)
    assert number_of(second[flaky]["image"]) == 3
    assert (second[never]["status"], second[never]["attempts"]) == ("http_5xx", 2)
    assert second[gone] == first[gone], "what cannot pass is not tried again"

    _, summary = call(argv(ws, server, "--max-attempts", "3"), capsys)
    assert (summary["counts"]["in"], images(ws)[never]["attempts"]) == (1, 3)
    _, summary = call(argv(ws, server, "--max-attempts", "3"), capsys)
    assert summary["counts"]["in"] == 0, "no more often than --max-attempts"


def test_a_dead_server_gives_rows(
    engine: Engine, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    listed = write_list(tmp_path / "list.parquet", [f"http://127.0.0.1:{port}/{n}.png" for n in range(6)])
    status, summary = call(
        argv(tmp_path / "ws", server, "--allow-hosts", f"127.0.0.1:{port}", "--pairs", listed), capsys
    )
    assert (status, summary["counts"]) == (0, {"in": 6, "out": 0, "failed": 6})
    assert {(r["status"], r["retryable"]) for r in images(tmp_path / "ws").values()} == {("connect", True)}


def test_from_python(engine: Engine, server: Server, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "list.parquet", [server.url("ok/8.png")])
    config = DownloadConfig(workspace=str(tmp_path / "ws"), pairs=(listed,), allow_hosts=(server.host,))
    done = execute("download", config, download_body, engine)
    assert (done.outcome, done.counts) == ("done", {"in": 1, "out": 1, "failed": 0})
    assert images(tmp_path / "ws")[server.url("ok/8.png")]["status"] == "ok"


def test_usage_is_2_and_leaves_nothing(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of these starts Ray."""
    ws = tmp_path / "ws"
    (tmp_path / "list.csv").write_text("link,text\nu,c\n")
    (tmp_path / "bad.yaml").write_text("retrys: 3\n")
    cases = {
        ("--pairs", str(tmp_path / "nowhere.csv")): "nowhere.csv",
        ("--pairs", str(tmp_path / "list.csv")): "link, text",
        ("--retries", "many"): "retries",
        ("--no-such-flag",): "--no-such-flag",
        ("--config", str(tmp_path / "bad.yaml")): "did you mean 'retry'",
    }
    for more, words in cases.items():
        status = main(argv(ws, server, *more))
        out, err = capsys.readouterr()
        assert (status, json.loads(out.splitlines()[-1])["outcome"]) == (2, "failed")
        assert words in err and "Traceback" not in err
        assert versions(ws) == dict.fromkeys(TABLES, -1)
    monkeypatch.setenv("CLIPMILL_RETRYS", "3")
    assert main(argv(ws, server)) == 2
    out, err = capsys.readouterr()
    assert "CLIPMILL_RETRYS, did you mean CLIPMILL_RETRY?" in err
    assert "CLIPMILL_RETRYS" in json.loads(out.splitlines()[-1])["error"]


def test_no_pairs_at_all_and_no_place_to_write_are_1(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty.txt").write_text("\n")
    listed = write_list(tmp_path / "list.parquet", ["http://a/"])
    cases = [
        (argv(tmp_path / "ws", server), "no pairs"),
        (argv(tmp_path / "ws", server, "--pairs", str(tmp_path / "empty.txt")), "no pairs"),
        (argv(tmp_path / "file" / "ws", server, "--pairs", listed), "cannot write"),
    ]
    for arguments, words in cases:
        status = main(arguments)
        out, err = capsys.readouterr()
        summary = json.loads(out.splitlines()[-1])
        assert (status, summary["outcome"]) == (1, "failed")
        assert words in err and words in summary["error"] and "Traceback" not in err


def test_without_json_stdout_is_empty(
    engine: Engine, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = write_list(tmp_path / "list.parquet", [server.url("ok/8.png")])
    assert main([a for a in argv(tmp_path / "ws", server, "--pairs", listed) if a != "--json"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "download: done" in err and "out 1" in err


# -- killed and interrupted --------------------------------------------------------------------------


def begin(arguments: list[str]) -> subprocess.Popen[str]:
    """The command as a process of its own, on this session's Ray."""
    address = ray.get_runtime_context().gcs_address
    return subprocess.Popen(
        # A suite in the background of a script ignores Ctrl-C, and so would its children.
        ["env", "--default-signal=INT", sys.executable, "-m", "jobs.cli", *arguments, "--address", address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_rows(workspace: Path, n: int, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if Workspace(workspace).table("images").count() >= n:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("no rows in a minute")


def slow_list(file: Path, server: Server) -> str:
    urls = [server.url(f"ok/{n}.png?wait=0.3") for n in range(40)]
    return write_list(file, [*urls[:20], server.url("status/404"), *urls[20:], server.url("empty")])


def stable(workspace: Path) -> list[dict[str, Any]]:
    """What does not depend on the run: sorted rows without run and time."""
    images(workspace)
    return sorted(Workspace(workspace).table("images").read(STABLE).to_pylist(), key=lambda r: r["pair_key"])


@pytest.fixture(scope="module")
def undisturbed(engine: Engine, server: Server, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(argv(folder / "ws", server, "--pairs", slow_list(folder / "list.parquet", server))) == 0
    rows = stable(folder / "ws")
    assert Counter(r["status"] for r in rows) == {"ok": 40, "http_4xx": 1, "empty_body": 1}
    return rows


@pytest.mark.slow
def test_killed_and_begun_again(undisturbed: list[dict[str, Any]], server: Server, tmp_path: Path) -> None:
    """kill -9 in the middle, twice; the third time it finishes with the rows of a run that nobody disturbed."""
    ws = tmp_path / "ws"
    arguments = argv(ws, server, "--pairs", slow_list(tmp_path / "list.parquet", server), "--per-host", "1")
    for _ in range(2):
        before = Workspace(ws).table("images").count()
        process = begin(arguments)
        wait_for_rows(ws, before + 1, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    kept = Workspace(ws).table("images").count()
    assert 0 < before < kept < 42
    assert main(arguments[:-2]) == 0
    assert stable(ws) == undisturbed
    assert outcomes(ws) == ["killed", "killed", "done"]
    last = Workspace(ws).table("runs").read().sort_by("started").to_pylist()[-1]
    assert last["counts_in"] == 42 - kept, "what was committed is not fetched again"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted(number: signal.Signals, undisturbed: list[dict[str, Any]], server: Server, tmp_path: Path) -> None:
    ws = tmp_path / "ws"
    arguments = argv(ws, server, "--pairs", slow_list(tmp_path / "list.parquet", server), "--per-host", "1")
    process = begin(arguments)
    wait_for_rows(ws, 4, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(out.splitlines()[-1])["outcome"] == "interrupted"
    assert "run the same command" in err and "Traceback" not in err
    assert outcomes(ws) == ["interrupted"]
    assert main(arguments[:-2]) == 0
    assert stable(ws) == undisturbed
