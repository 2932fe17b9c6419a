"""Export without the job: metadata by hand, rows by key against a plain sort, files that are whole or not there."""

from __future__ import annotations

import datetime as dt
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from pipeline.export.files import remove_parts, whole_file, whole_folder
from pipeline.export.metadata import add_kinds, describe, metadata_table, sample_key, stats
from pipeline.export.rows import File, Rows, SortStage, groups, is_in
from pipeline.export.stage import EXTRA_ROWS, IMAGE_ROWS, ExportStage, Layout, Shard, is_done
from schemas.errors import WorkspaceError

NOON = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
ROW = {
    "pair_key": 1, "url": "http://a/1", "caption": "a", "status": "ok", "error": None, "sha256": "ab", "width": 2,
    "height": 3, "original_width": 4, "original_height": 5, "image": b"1", "format": "jpg", "fetched_at": NOON,
}  # fmt: skip


# -- metadata ------------------------------------------------------------------------------------------


def test_keys_are_numbered_as_img2dataset_numbers_them() -> None:
    """Five digits of the shard, and as many as a shard's last place needs."""
    assert sample_key(0, 0, 10_000) == "000000000"
    assert sample_key(3, 17, 10_000) == "000030017"
    assert sample_key(12, 5, 6) == "000125"
    assert sample_key(7, 0, 1) == "00007"
    assert sample_key(123_456, 9, 10) == "1234569"


@given(st.integers(1, 300), st.integers(0, 2000), st.integers(0, 2000))
def test_keys_are_unique_and_in_order(size: int, one: int, other: int) -> None:
    keys = [sample_key(row // size, row % size, size) for row in (one, other)]
    assert (keys[0] < keys[1]) == (one < other) or one == other or len(keys[0]) != len(keys[1])
    assert (keys[0] == keys[1]) == (one == other)


def test_descriptions() -> None:
    extra = json.dumps({"score": 1.5, "url": "theirs", "exif": '{"Make": "x"}'})
    assert describe({**ROW, "extra": extra}, "00") == {
        "score": 1.5, "caption": "a", "url": "http://a/1", "key": "00", "status": "success", "error_message": None,
        "width": 2, "height": 3, "original_width": 4, "original_height": 5, "exif": '{"Make": "x"}', "sha256": "ab",
    }  # fmt: skip
    assert describe({**ROW, "extra": None}, "00")["exif"] == "{}"
    told = {
        ("http_4xx", "HTTP 404"): ("failed_to_download", "http_4xx: HTTP 404"),
        ("timeout", None): ("failed_to_download", "timeout"),
        ("decode", "broken"): ("failed_to_resize", "decode: broken"),
        ("caption_filtered", ""): ("failed_to_download", "caption_filtered"),
    }
    for (status, error), expected in told.items():
        found = describe({**ROW, "status": status, "error": error, "extra": None}, "00")
        assert (found["status"], found["error_message"]) == expected
        assert found["width"] is found["sha256"] is found["exif"] is None


def test_types_of_extra_columns() -> None:
    kinds: dict[str, str] = {}
    add_kinds(kinds, ['{"i": 1, "f": 1, "b": true, "n": null, "s": "x", "m": 1, "url": 1}', None])
    add_kinds(kinds, ['{"i": null, "f": 0.5, "b": null, "n": null, "m": [1], "late": 3, "big": 99999999999999999999}'])
    assert kinds == {
        "i": "int", "f": "float", "b": "bool", "n": "null", "s": "text", "m": "text", "late": "int", "big": "text",
    }  # fmt: skip
    meta = describe({**ROW, "extra": '{"i": 1, "f": 1, "m": [1], "s": "x", "big": 99999999999999999999}'}, "00")
    table = metadata_table([meta], kinds)
    assert table.schema.names[-11:] == [
        "caption", "url", "key", "status", "error_message", "width", "height", "original_width", "original_height",
        "exif", "sha256",
    ]  # fmt: skip
    (row,) = table.to_pylist()
    assert {name: row[name] for name in kinds} == {
        "i": 1, "f": 1.0, "b": None, "n": None, "s": "x", "m": "[1]", "late": None, "big": "99999999999999999999",
    }  # fmt: skip


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab") | st.just([1])


@given(st.lists(st.dictionaries(st.sampled_from("xyz"), JSON_VALUES), min_size=1, max_size=6))
def test_every_extra_fits_its_column(extras: list[dict[str, Any]]) -> None:
    kinds: dict[str, str] = {}
    for extra in extras:
        add_kinds(kinds, [json.dumps(extra)])
    table = metadata_table([describe({**ROW, "extra": json.dumps(e)}, "0") for e in extras], kinds)
    for extra, row in zip(extras, table.to_pylist(), strict=True):
        for name in kinds:
            given_value, found = extra.get(name), row[name]
            if isinstance(found, str) and not isinstance(given_value, str):
                found = json.loads(found)
            assert found == given_value


def test_statistics_of_a_shard() -> None:
    told = [("success", None), ("failed_to_download", "timeout"), ("success", None), ("failed_to_resize", "decode")]
    rows = [{"status": status, "error_message": message} for status, message in told]
    assert json.loads(stats(rows, 10.0, 12.5)) == {
        "count": 4, "successes": 2, "failed_to_download": 1, "failed_to_resize": 1, "duration": 2.5,
        "start_time": 10.0, "end_time": 12.5, "status_dict": {"decode": 1, "success": 2, "timeout": 1},
    }  # fmt: skip


# -- rows ----------------------------------------------------------------------------------------------

SCHEMA = pa.schema([("pair_key", pa.int64()), ("image", pa.binary()), ("later", pa.string())])


def files_of(folder: Path, groups: list[list[int]]) -> tuple[File, ...]:
    """Parquet files with these keys; the image tells its key, and the column ``later`` is in none of them."""
    found = []
    for n, keys in enumerate(groups):
        table = pa.table({"pair_key": pa.array(keys, pa.int64()), "image": [b"%d" % k for k in keys]})
        pq.write_table(table, folder / f"{n}.parquet", row_group_size=3)
        size = (folder / f"{n}.parquet").stat().st_size
        found.append(File(str(folder / f"{n}.parquet"), size, min(keys, default=None), max(keys, default=None)))
    return tuple(found)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1 << 62), unique=True, max_size=40), st.integers(1, 5), st.data())
def test_rows_come_in_the_order_of_their_keys(
    tmp_path_factory: pytest.TempPathFactory, keys: list[int], count: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = Rows(files_of(folder, [keys[n::count] for n in range(count)]), SCHEMA)
    selected = np.sort(np.array([k for k in keys if data.draw(st.booleans())], np.int64))
    runs = [
        SortStage(SCHEMA, selected, str(folder / "runs"))(group) for group in groups(rows.files, rows.files[0].bytes)
    ]
    for source in (rows, Rows(tuple(map(File, runs)), SCHEMA)):
        for part in (selected, selected[2:9], selected[:0]):
            found = list(source.of(pa.array(part)))
            assert [r["pair_key"] for r in found] == part.tolist()
            assert [r["image"] for r in found] == [b"%d" % k for k in part.tolist()]
            assert all(r["later"] is None for r in found)
    kept = sorted(k for run in runs for k in pq.read_table(run)["pair_key"].to_pylist())
    assert kept == selected.tolist(), "what is not selected is not carried along"


@given(st.lists(st.integers(0, 50), max_size=8), st.lists(st.integers(0, 50), max_size=8))
def test_membership(keys: list[int], these: list[int]) -> None:
    found = is_in(np.sort(np.array(keys, np.int64)), np.array(these, np.int64))
    assert found.tolist() == [k in keys for k in these]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=5),
    st.lists(st.integers(0, 99), unique=True, min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_effort(files: list[tuple[int, int, int]], keys: list[int], size: int) -> None:
    """Against a look at every pair of file and shard."""
    rows = Rows(tuple(File("", b, min(x, y), max(x, y)) for b, x, y in files), SCHEMA)
    ordered = sorted(keys)
    shards = [ordered[n : n + size] for n in range(0, len(ordered), size)]
    met = sum(f.bytes for f in rows.files for s in shards if f.low <= s[-1] and s[0] <= f.high)  # type: ignore[operator]
    assert rows.effort(pa.array(s) for s in shards) == pytest.approx(met / sum(f.bytes for f in rows.files))
    assert Rows((File("", 7),), SCHEMA).effort(pa.array(s) for s in shards) == len(shards)


def test_a_run_that_is_there_is_kept(tmp_path: Path) -> None:
    files = files_of(tmp_path, [[3, 1, 2]])
    stage = SortStage(SCHEMA, np.array([1, 2, 3]), str(tmp_path / "runs"))
    path = Path(stage(("00000", files)))
    before = path.stat().st_mtime_ns
    (tmp_path / "0.parquet").unlink()
    assert stage(("00000", files)) == str(path)
    assert path.stat().st_mtime_ns == before


# -- files ---------------------------------------------------------------------------------------------


def test_nothing_half_written_has_a_name(tmp_path: Path) -> None:
    for path in (UPath(tmp_path / "x.tar"), UPath("memory://export/x.tar")):
        with pytest.raises(RuntimeError), whole_file(path) as file:
            file.write(b"half")
            raise RuntimeError
        assert not path.exists()
        with whole_file(path) as file:
            file.write(b"whole")
        assert path.read_bytes() == b"whole"
    with pytest.raises(RuntimeError), whole_folder(UPath(tmp_path / "folder")) as put:
        put("a", b"half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]
    (tmp_path / ".x.tar.part-1").write_bytes(b"a killed worker's")
    (tmp_path / ".y.part-2").mkdir()
    remove_parts(UPath(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]


def stage_of(folder: Path, rows: list[dict[str, Any]]) -> tuple[Rows, Rows]:
    pq.write_table(pa.Table.from_pylist(rows, schema=IMAGE_ROWS), folder / "images.parquet")
    extras = [{"pair_key": r["pair_key"], "extra": f'{{"n": {r["pair_key"]}}}'} for r in rows]
    pq.write_table(pa.Table.from_pylist(extras, schema=EXTRA_ROWS), folder / "pairs.parquet")
    return (
        Rows((File(str(folder / "images.parquet")),), IMAGE_ROWS),
        Rows((File(str(folder / "pairs.parquet")),), EXTRA_ROWS),
    )


def test_a_shard_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    rows = [{**ROW, "pair_key": k, "image": b"%d" % k, "format": "png" if k == 5 else "jpg"} for k in (9, 5, 7)]
    images, pairs = stage_of(tmp_path, rows)
    for name in ("one", "two"):
        written = ExportStage(str(tmp_path / name), "webdataset", 10, {})(Shard(2, pa.array([5, 7, 9])), images, pairs)
        assert (written.rows, written.bytes, dict(written.formats)) == (3, 3, {"png": 1, "jpg": 2})
    data = (tmp_path / "one" / "00002.tar").read_bytes()
    assert data == (tmp_path / "two" / "00002.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        assert {(m.mtime, m.uid, m.uname) for m in tar.getmembers()} == {(0, 0, "")}
    assert list(found) == [
        "000020.png", "000020.txt", "000020.json", "000021.jpg", "000021.txt", "000021.json", "000022.jpg",
        "000022.txt", "000022.json",
    ]  # fmt: skip
    assert [found[f"00002{n}.{k}"] for n, k in ((0, "png"), (1, "jpg"), (2, "jpg"))] == [b"5", b"7", b"9"]
    assert json.loads(found["000021.json"])["n"] == 7


@pytest.mark.parametrize("layout", ["webdataset", "img2dataset", "files"])
def test_object_stores(tmp_path: Path, layout: Layout) -> None:
    """fsspec's memory file system stands for one: the same files as on a disk."""
    rows = [{**ROW, "pair_key": 1}, {**ROW, "pair_key": 2, "status": "timeout", "image": None}]
    images, pairs = stage_of(tmp_path, rows)
    shard = Shard(0, pa.array([1] if layout == "webdataset" else [1, 2]))
    found = []
    for root in (str(tmp_path / "out"), f"memory://{layout}/out"):
        folder = UPath(root)
        assert not is_done(folder, layout, 0)
        ExportStage(root, layout, 10, {"n": "int"})(shard, images, pairs)
        assert is_done(folder, layout, 0)
        names = [p for p in folder.rglob("*") if p.is_file()]
        found.append({p.path.removeprefix(folder.path): p.read_bytes() for p in names})
    assert found[0] == found[1]
    assert len(found[0]) == {"webdataset": 1, "img2dataset": 3, "files": 5}[layout]


def test_a_row_that_is_gone_is_an_error(tmp_path: Path) -> None:
    images, pairs = stage_of(tmp_path, [ROW])
    stage = ExportStage(str(tmp_path / "out"), "files", 10, {})
    with pytest.raises(WorkspaceError, match="has changed under shard 0"):
        stage(Shard(0, pa.array([1, 2])), images, pairs)
    assert list((tmp_path / "out").iterdir()) == []
