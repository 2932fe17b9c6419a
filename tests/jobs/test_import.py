"""The import job: img2dataset's own output, mended archives, rows that were failures, killed in the middle."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from jobs.cli import main
from pipeline.engine import Engine
from pipeline.workspace import Workspace
from schemas.keys import pair_key
from schemas.tables import TABLES
from tests.servers import Server, number_of, picture

IMG2DATASET = """
import sys
import img2dataset.main
main = sys.modules["img2dataset.main"]  # the package's own name "main" is a function

class Quiet:  # no second process, which would import all of torch again
    def __init__(self, *args): pass
    def start(self): pass
    def join(self): pass

def here(processes, downloader, reader, *args):
    for shard in reader:
        assert downloader(shard)[0]

main.LoggerProcess, main.multiprocessing_distributor = Quiet, here
urls, folder = sys.argv[1:3]
for layout in ("webdataset", "parquet", "files"):
    main.download(
        url_list=urls, input_format="parquet", url_col="url", caption_col="caption", save_additional_columns=["score"],
        output_folder=f"{folder}/{layout}", output_format=layout, processes_count=1, thread_count=2,
        number_sample_per_shard=6, resize_mode="no", timeout=2, min_image_size=10,
    )
"""


def call(capsys: pytest.CaptureFixture[str], workspace: Path, *sources: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and the last line of stdout as JSON."""
    capsys.readouterr()
    status = main(["import", *sources, "--workspace", str(workspace), "--json", "--workers", "1"])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def images(workspace: Path) -> dict[str, dict[str, Any]]:
    """Rows of images by URL, one for every pair."""
    rows = Workspace(workspace).table("images").read().to_pylist()
    pairs = Workspace(workspace).table("pairs").read().to_pylist()
    runs = set(Workspace(workspace).table("runs").read(["run"])["run"].to_pylist())
    assert sorted(r["pair_key"] for r in rows) == sorted(p["pair_key"] for p in pairs)
    assert len({r["pair_key"] for r in rows}) == len(rows)
    for row in rows:
        assert row["pair_key"] == pair_key(row["url"], row["caption"])
        assert (row["image"] is not None) == (row["status"] == "ok")
        assert row["run"] in runs
    return {row["url"]: row for row in rows}


def versions(workspace: Path) -> dict[str, int]:
    return {name: Workspace(workspace).table(name).version() for name in TABLES}


def write_tar(path: Path, numbers: range, host: str = "h") -> bytes:
    """A tar of pictures with their URLs."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for n in numbers:
            meta = json.dumps({"url": f"http://{host}/{n}", "caption": f"c{n}"}).encode()
            for name, data in ((f"{n}.jpg", picture(n, "jpg")), (f"{n}.json", meta)):
                header = tarfile.TarInfo(name)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())
    return out.getvalue()


@pytest.mark.slow
def test_what_img2dataset_wrote(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its three layouts give the same rows: those of the list, with the images it stored, byte by byte."""
    with Server() as server:
        failing = {
            server.url("status/404"): "http_4xx", server.url("status/503"): "http_5xx", server.url("html"): "decode",
            server.url("reset"): "reset", "foo": "bad_url", server.url("truncated"): "truncated",
            server.url("robots?tag=noai"): "opted_out", server.url("loop"): "too_many_redirects",
        }  # fmt: skip
        good = [server.url(f"ok/{n}.{'png' if n % 2 else 'jpg'}") for n in range(11)]
        urls = [*good, *failing]
        captions = [None if n == 3 else f"number {n}\n" for n in range(len(urls))]
        pq.write_table(pa.table({"url": urls, "caption": captions, "score": [0.5] * len(urls)}), tmp_path / "l.parquet")
        script = [sys.executable, "-c", IMG2DATASET, str(tmp_path / "l.parquet"), str(tmp_path)]
        done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    found = {}
    for layout in ("webdataset", "parquet", "files"):
        status, summary = call(capsys, tmp_path / f"ws-{layout}", str(tmp_path / layout))
        assert (status, summary["counts"]) == (0, {"in": 19, "out": 11, "failed": 8})
        assert summary["statuses"] == {"ok": 11} | Counter(failing.values())
        rows = images(tmp_path / f"ws-{layout}")
        assert {url: row["status"] for url, row in rows.items()} == dict.fromkeys(good, "ok") | failing
        assert [number_of(rows[url]["image"]) for url in good] == list(range(11))
        assert [rows[url]["caption"] for url in urls] == [c or "" for c in captions]
        assert {(r["width"], r["height"], r["original_width"]) for r in rows.values() if r["image"]} == {(24, 16, 24)}
        extras = Workspace(tmp_path / f"ws-{layout}").table("pairs").read(["extra"])["extra"].to_pylist()
        assert {json.loads(extra)["score"] for extra in extras} == {0.5}
        found[layout] = {url: {k: v for k, v in r.items() if k not in ("run", "fetched_at")} for url, r in rows.items()}
    assert found["webdataset"] == found["parquet"] == found["files"]

    stored = {}
    for shard in sorted((tmp_path / "parquet").glob("*.parquet")):
        stored |= {r["url"]: (r["jpg"], r["sha256"]) for r in pq.read_table(shard).to_pylist() if r["jpg"]}
    assert {u: (r["image"], r["sha256"]) for u, r in found["files"].items() if r["image"]} == stored


def test_again_with_more_and_doubled(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second run commits nothing; pairs in two archives are one row, and counted."""
    ws = tmp_path / "ws"
    write_tar(tmp_path / "in" / "0.tar", range(6))
    write_tar(tmp_path / "in" / "1.tar", range(4, 10))
    status, summary = call(capsys, ws, str(tmp_path / "in"))
    assert (status, summary["counts"], summary["doubles"]) == (0, {"in": 10, "out": 10, "failed": 0}, 2)
    rows = images(ws)
    assert {url: number_of(r["image"]) for url, r in rows.items()} == {f"http://h/{n}": n for n in range(10)}
    before = versions(ws)
    status, summary = call(capsys, ws, "--from", str(tmp_path / "in"))
    assert (status, summary["counts"]["in"], summary["already_known"], versions(ws)) == (0, 0, 12, before)

    write_tar(tmp_path / "in" / "2.tar", range(9, 12))
    status, summary = call(capsys, ws, "--source", str(tmp_path / "in" / "*.tar"))
    assert (status, summary["counts"]["in"], summary["already_known"]) == (0, 2, 13)
    assert {url: row for url, row in images(ws).items() if url in rows} == rows


def test_a_broken_archive_is_told_and_mended(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ws = tmp_path / "ws"
    whole = write_tar(tmp_path / "in" / "cut.tar", range(5))
    write_tar(tmp_path / "in" / "good.tar", range(5, 8))
    (tmp_path / "in" / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "junk.tar").write_bytes(b"this is no tar at all" * 100)
    status, summary = call(capsys, ws, str(tmp_path / "in"))
    assert (status, summary["outcome"]) == (1, "failed")
    assert "2 of 3 archives" in summary["error"] and "run the same command again" in summary["error"]
    assert (
        str(tmp_path / "in" / "cut.tar") in summary["error"] and str(tmp_path / "in" / "junk.tar") in summary["error"]
    )
    kept = images(ws)
    assert {f"http://h/{n}" for n in (0, 5, 6, 7)} <= kept.keys() < {f"http://h/{n}" for n in range(8)}
    assert {row["status"] for row in kept.values()} == {"ok"}

    (tmp_path / "in" / "cut.tar").write_bytes(whole)
    (tmp_path / "in" / "junk.tar").unlink()
    status, summary = call(capsys, ws, str(tmp_path / "in"))
    assert (status, summary["counts"]["in"]) == (0, 8 - len(kept))
    assert images(ws).keys() == {f"http://h/{n}" for n in range(8)}


def test_an_image_takes_the_place_of_a_failure(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a later run, and of two archives of one run, in whatever order they come."""
    ws = tmp_path / "ws"
    failed = {"key": "0", "caption": "c3", "status": "failed_to_download", "error_message": "timed out"}
    pq.write_table(pa.Table.from_pylist([failed | {"url": "http://h/3"}]), tmp_path / "0.parquet")
    status, summary = call(capsys, ws, str(tmp_path / "0.parquet"))
    assert (status, summary["statuses"]) == (0, {"timeout": 1})
    assert images(ws)["http://h/3"]["retryable"]

    write_tar(tmp_path / "1.tar", range(2, 5))
    status, summary = call(capsys, ws, str(tmp_path / "1.tar"), str(tmp_path / "0.parquet"))
    assert (status, summary["counts"]) == (0, {"in": 3, "out": 3, "failed": 0})
    rows = images(ws)
    assert (rows["http://h/3"]["status"], number_of(rows["http://h/3"]["image"])) == ("ok", 3)

    both = tmp_path / "both"
    for order in ("01", "10"):
        write_tar(both / order / f"{order[0]}.tar", range(3, 4))
        pq.write_table(pa.Table.from_pylist([failed | {"url": "http://h/3"}]), both / order / f"{order[1]}.parquet")
        status, _ = call(capsys, tmp_path / order, str(both / order))
        assert (status, images(tmp_path / order)["http://h/3"]["status"]) == (0, "ok")
        assert call(capsys, tmp_path / order, str(both / order))[1]["counts"]["in"] == 0


def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None of these starts Ray, or writes anything."""
    (tmp_path / "x.csv").write_text("url\n")
    for sources, words in (
        ([], "--source is required"),
        (["nowhere"], "nowhere"),
        ([str(tmp_path / "x.csv")], "x.csv"),
    ):
        status, summary = call(capsys, tmp_path / "ws", *sources)
        assert (status, summary["outcome"]) == (2, "failed")
        assert words in summary["error"]
    assert not (tmp_path / "ws").exists()


@pytest.mark.slow
def test_killed_and_begun_again(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 between two archives: the second run has only the others to do, and doubles nothing."""
    ws = tmp_path / "ws"
    for n in range(40):
        write_tar(tmp_path / "in" / f"{n:02}.tar", range(5 * n, 5 * n + 5))
    arguments = ["import", str(tmp_path / "in"), "--workspace", str(ws), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments, "--address", ray.get_runtime_context().gcs_address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while (kept := Workspace(ws).table("images").count()) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = Workspace(ws).table("images").count()
    assert 5 <= kept < 200
    status, summary = call(capsys, ws, str(tmp_path / "in"))
    assert (status, summary["counts"]["in"]) == (0, 200 - kept)
    assert {url: number_of(r["image"]) for url, r in images(ws).items()} == {f"http://h/{n}": n for n in range(200)}
