"""The export job: read back with the webdataset library, imported again, killed in the middle."""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import webdataset
from PIL import Image

from jobs import export
from jobs.cli import main
from pipeline.engine import Engine
from pipeline.workspace import Workspace
from schemas.keys import pair_key
from schemas.tables import DUPLICATES, IMAGES, PAIRS, TABLES
from tests.servers import number_of, picture

CAPTIONS = [
    "",
    "a dot. and another",
    "\u202e\u05d0 \U0001f600",
    "x" * 100_000,
    "two\nlines\n",
    "nul \0",
    '"quoted", \\',
]


def fill(workspace: Path, count: int, failed: int = 0) -> list[dict[str, Any]]:
    """A workspace of ``count`` pictures and some failures, three files of each table. Rows of images by key."""
    rows, pairs = [], []
    for n in range(count + failed):
        url, caption = f"http://h/{n}", CAPTIONS[n % len(CAPTIONS)]
        kind = "png" if n % 3 == 2 else "jpg"
        image = picture(n, kind) if n < count else None
        row: dict[str, Any] = dict.fromkeys(IMAGES.schema.names) | {
            "pair_key": pair_key(url, caption), "url": url, "caption": caption, "attempts": 1, "retryable": not image,
            "fetched_at": dt.datetime(2026, 1, 1, 0, 0, n % 60, tzinfo=dt.UTC), "run": "r",
        }  # fmt: skip
        if image is None:
            row |= {"status": "timeout" if n % 2 else "too_small", "error": "why"}
        else:
            row |= {"status": "ok", "image": image, "format": kind, "sha256": hashlib.sha256(image).hexdigest(),
                    "phash": n, "width": 24, "height": 16, "original_width": 48, "original_height": 32}  # fmt: skip
        rows.append(row)
        pairs.append(dict.fromkeys(PAIRS.schema.names) | {
            "pair_key": row["pair_key"], "url": url, "caption": caption, "added_run": "r",
            "extra": json.dumps({"score": n / 2, "tag": f"t{n}"}) if n % 4 else None,
        })  # fmt: skip
    made = Workspace(workspace).prepare()
    for third in range(3):
        made.table("pairs").append(pa.Table.from_pylist(pairs[third::3], schema=PAIRS.schema), "r")
        made.table("images").append(pa.Table.from_pylist(rows[third::3], schema=IMAGES.schema), "r")
    return sorted(rows, key=lambda r: r["pair_key"])


def call(capsys: pytest.CaptureFixture[str], job: str, workspace: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and the last line of stdout as JSON."""
    capsys.readouterr()
    status = main([job, "--workspace", str(workspace), "--json", "--workers", "1", *more])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def content(folder: Path) -> dict[str, bytes]:
    """All files that are not hidden."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def versions(workspace: Path) -> dict[str, int]:
    return {name: Workspace(workspace).table(name).version() for name in TABLES}


def test_webdataset(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sample as the library reads it: key, caption, pixels, metadata; and the same bytes a second time."""
    rows = [r for r in fill(tmp_path / "ws", 50, 5) if r["status"] == "ok"]
    arguments = ["--output", str(tmp_path / "out"), "--shard-size", "20"]
    status, summary = call(capsys, "export", tmp_path / "ws", *arguments)
    assert (status, summary["counts"]) == (0, {"in": 50, "out": 50, "failed": 0})
    assert summary["left_out"] == {"failed": 5, "where": 0, "duplicates": 0}
    assert summary["formats"] == {"jpg": 34, "png": 16}
    tars = [str(tmp_path / "out" / f"0000{n}.tar") for n in range(3)]
    assert sorted(content(tmp_path / "out")) == ["00000.tar", "00001.tar", "00002.tar"]

    samples = [
        list(webdataset.WebDataset(tar, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg;png", "txt", "json"))
        for tar in tars
    ]
    assert [len(s) for s in samples] == [20, 20, 10], "shards of exactly the size"
    flat = [sample for shard in samples for sample in shard]
    assert len({key for key, *_ in flat}) == 50
    for row, (key, image, text, meta) in zip(rows, flat, strict=True):
        assert "." not in key
        assert text == row["caption"]
        expected = Image.open(io.BytesIO(row["image"])).convert("RGB")
        assert np.array_equal(np.asarray(image), np.asarray(expected))
        n = int(row["url"].rpartition("/")[2])
        extra = {"score": n / 2, "tag": f"t{n}"} if n % 4 else {}
        assert meta == extra | {
            "caption": row["caption"], "url": row["url"], "key": key, "status": "success", "error_message": None,
            "width": 24, "height": 16, "original_width": 48, "original_height": 32, "exif": "{}",
            "sha256": row["sha256"],
        }  # fmt: skip

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    seen = versions(tmp_path / "ws")
    status, summary = call(capsys, "export", tmp_path / "ws", *arguments)
    assert (status, summary["counts"]["in"], summary["already_there"]) == (0, 0, 50)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    assert versions(tmp_path / "ws") == seen, "nothing to do commits nothing"

    # Another order of the table's files, and sorted runs instead of the table: the same bytes.
    fill(tmp_path / "again", 50)
    images = Workspace(tmp_path / "again").table("images")
    images.upsert(images.read(), "r")  # one file, with the string views that delta-rs writes
    monkeypatch.setattr(export, "STRAIGHT_BYTES", 0)
    call(capsys, "export", tmp_path / "again", "--output", str(tmp_path / "other"), "--shard-size", "5")
    call(capsys, "export", tmp_path / "ws", "--output", str(tmp_path / "runs"), "--shard-size", "5")
    assert content(tmp_path / "runs") == content(tmp_path / "other")
    assert [p.name for p in (tmp_path / "runs").iterdir() if p.name.startswith(".")] == [export.MARK]


def test_a_folder_of_something_else_is_refused(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "ws", 8)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    out = str(tmp_path / "out")
    status, summary = call(capsys, "export", tmp_path / "ws", "--output", out)
    assert status == 0
    cases = [
        (["--output", str(tmp_path / "full")], 2, "is not empty"),
        (["--output", str(tmp_path / "file")], 1, "cannot write"),
        (["--output", out, "--shard-size", "5"], 2, "shard_size 10000"),
        (["--output", out, "--format", "files"], 2, "format webdataset"),
        (["--output", out, "--where", "width > 1 AND url <> 'http://h/3'"], 2, "another export"),
        (["--output", out, "--where", "widht > 1"], 2, "widht"),
        (["--output", str(tmp_path / "new"), "--where", "width > 100"], 1, "nothing to export"),
        ([], 2, "--output is required"),
    ]
    for arguments, expected, words in cases:
        status, summary = call(capsys, "export", tmp_path / "ws", *arguments)
        assert (status, summary["outcome"]) == (expected, "failed")
        assert words in summary["error"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"
    assert list(content(tmp_path / "out")) == ["00000.tar"]
    assert call(capsys, "export", tmp_path / "nowhere", "--output", out)[0] == 2


def test_where_and_duplicates(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = fill(tmp_path / "ws", 12, 2)
    keys = {r["url"]: r["pair_key"] for r in rows}
    marks = [
        {"pair_key": keys[f"http://h/{n}"], "kept_key": keys["http://h/0"], "kind": "exact", "distance": 0, "run": "r"}
        for n in (3, 4)
    ]
    Workspace(tmp_path / "ws").table("duplicates").append(pa.Table.from_pylist(marks, schema=DUPLICATES.schema), "r")
    status, summary = call(
        capsys, "export", tmp_path / "ws", "--output", str(tmp_path / "out"), "--format", "files", "--drop-duplicates",
        "--where", "status <> 'timeout' AND url NOT LIKE '%/1_'",
    )  # fmt: skip
    assert status == 0
    assert summary["left_out"] == {"failed": 0, "where": 4, "duplicates": 2}
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert sorted(table["url"].to_pylist()) == [f"http://h/{n}" for n in (0, 1, 2, 5, 6, 7, 8, 9)]


@pytest.mark.parametrize("layout", ["webdataset", "img2dataset", "files"])
def test_exported_and_imported_again(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """The same pairs and images: keys, captions, bytes, extras; failures with their reasons, where they go along."""
    rows = fill(tmp_path / "ws", 20, 4)
    status, _ = call(
        capsys, "export", tmp_path / "ws", "--output", str(tmp_path / "out"), "--format", layout, "--shard-size", "9"
    )
    assert status == 0
    names = sorted(content(tmp_path / "out"))
    if layout != "webdataset":
        rows_there = pq.read_table(sorted((tmp_path / "out").glob("*.parquet"))).to_pylist()
        assert [r["url"] for r in rows_there] == [r["url"] for r in rows]
        failed = {r["url"]: (r["status"], r["error_message"]) for r in rows_there if r["status"] != "success"}
        assert failed == {
            "http://h/20": ("failed_to_resize", "too_small: why"),
            "http://h/21": ("failed_to_download", "timeout: why"),
            "http://h/22": ("failed_to_resize", "too_small: why"),
            "http://h/23": ("failed_to_download", "timeout: why"),
        }
        counts = [json.loads((tmp_path / "out" / f"0000{n}_stats.json").read_text()) for n in range(3)]
        assert [c["count"] for c in counts] == [9, 9, 6]
        assert sum(c["successes"] for c in counts) == 20
        assert ("00000/000000.json" in names) == (layout == "files") or rows[0]["status"] != "ok"

    status, summary = call(capsys, "import", tmp_path / "new", "--source", str(tmp_path / "out"))
    expected = 20 if layout == "webdataset" else 24
    assert (status, summary["counts"]) == (0, {"in": expected, "out": 20, "failed": expected - 20})
    columns = ["pair_key", "url", "caption", "status", "sha256", "width", "height", "original_width",
               "original_height", "image", "format", "retryable"]  # fmt: skip
    found = Workspace(tmp_path / "new").table("images").read(columns).sort_by("pair_key").to_pylist()
    wanted = [{c: r[c] for c in columns} for r in rows if layout != "webdataset" or r["status"] == "ok"]
    for row in wanted:
        row["retryable"] = row["status"] == "timeout"
    assert found == wanted
    assert {number_of(r["image"]) for r in found if r["image"]} == set(range(20))
    pairs = ["pair_key", "url", "caption", "extra"]
    there = {r["pair_key"] for r in found}
    old, new = (
        [r for r in Workspace(tmp_path / ws).table("pairs").read(pairs).sort_by("pair_key").to_pylist()
         if r["pair_key"] in there] for ws in ("ws", "new")
    )  # fmt: skip
    for row in [*old, *new]:
        # In Parquet a column is there for every row; null is as good as not there.
        row["extra"] = {k: v for k, v in json.loads(row["extra"] or "{}").items() if v is not None}
    assert old == new


@pytest.mark.slow
def test_killed_and_begun_again(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 while shards are written: every tar that is there is whole, and the second run makes the same folder."""
    fill(tmp_path / "ws", 60)
    out = tmp_path / "out"
    arguments = ["--workspace", str(tmp_path / "ws"), "--shard-size", "1", "--workers", "1"]
    assert main(["export", *arguments, "--output", str(tmp_path / "undisturbed")]) == 0
    undisturbed = content(tmp_path / "undisturbed")
    address = ray.get_runtime_context().gcs_address
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "export", *arguments, "--output", str(out), "--address", address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(content(out) if out.exists() else {}) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(2)  # its workers end, too
    kept = content(out)
    assert kept.items() <= undisturbed.items(), "what has a name is whole"
    assert main(["export", *arguments, "--output", str(out)]) == 0
    assert content(out) == undisturbed
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == [export.MARK]
