"""Lists of pairs in every format, and what is wrong with some of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upath import UPath

from pipeline.download.lists.sources import (
    FORMATS,
    ROWS,
    Columns,
    find,
    read_batches,
    read_table,
)
from schemas.errors import UsageError
from schemas.keys import pair_key
from schemas.tables import PAIRS as PAIRS_TABLE

PAIRS = [
    ("http://a/1.jpg", "a red circle"),
    ("http://a/2.jpg", 'quoted "words", commas\nand a second line'),
    ("http://a/3.jpg", ""),
    ("http://a/4.jpg", "🎈 ballon — 赤い風船 \u200d🏽"),
    ("http://a/5.jpg", "NA"),
    ("http://a/6.jpg", "null"),
    ("http://a/7.jpg", "x" * 100_000),
]


def parquet(rows: list[tuple[str, str]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"n": range(len(rows)), "caption": [c for _, c in rows], "url": [u for u, _ in rows]}), out)
    return out.getvalue()


def separated(delimiter: str) -> Callable[[list[tuple[str, str]]], bytes]:
    def write(rows: list[tuple[str, str]]) -> bytes:
        out = io.StringIO()
        writer = csv.writer(out, delimiter=delimiter)
        writer.writerow(["caption", "extra", "url"])
        writer.writerows([caption, 1, url] for url, caption in rows)
        return out.getvalue().encode()

    return write


def objects(rows: list[tuple[str, str]]) -> list[dict[str, object]]:
    return [{"extra": [1], "caption": caption, "url": url} for url, caption in rows]


WRITERS: dict[str, Callable[[list[tuple[str, str]]], bytes]] = {
    "parquet": parquet,
    "csv": separated(","),
    "tsv": separated("\t"),
    "json": lambda rows: json.dumps(objects(rows)).encode(),
    "jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects(rows)).encode(),
    "txt": lambda rows: "".join(url + "\n" for url, _ in rows).encode(),
}


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstd,
}


def read_rows(file: Path, columns: Columns | None = None) -> list[dict[str, Any]]:
    """The rows of all batches; what every batch must hold is checked on the way."""
    rows: list[dict[str, Any]] = []
    for batch in read_batches(UPath(file), columns or Columns()):
        assert 0 < batch.num_rows <= ROWS
        assert batch.schema == pa.schema([(name, PAIRS_TABLE.schema.field(name).type) for name in batch.column_names])
        rows += batch.to_pylist()
    assert all(row.pop("pair_key") == pair_key(row["url"], row["caption"]) for row in rows)
    assert {row.pop("source") for row in rows} <= {str(file)}
    return rows


def read(file: Path, url_col: str = "url", caption_col: str = "caption") -> list[tuple[str, str]]:
    """(url, caption) of the rows, none of them bad."""
    rows = read_rows(file, Columns(url_col, caption_col))
    assert not any(row["problem"] for row in rows)
    return [(row["url"], row["caption"]) for row in rows]


def problems(file: Path) -> list[tuple[str, str, str]]:
    """(url, caption, problem) of the rows."""
    return [(row["url"], row["caption"], row["problem"] or "") for row in read_rows(file)]


@pytest.mark.parametrize("packed", PACKERS, ids=lambda p: p or "plain")
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind: str, packed: str, tmp_path: Path) -> None:
    file = tmp_path / f"list.{kind}{packed}"
    file.write_bytes(PACKERS[packed](WRITERS[kind](PAIRS)))
    expected = [(url, "") for url, _ in PAIRS] if kind == "txt" else PAIRS
    assert read(file) == expected


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), max_size=20),
            st.text(st.characters(codec="utf-8"), max_size=20),
        ),
        max_size=5,
    ),
    kind=st.sampled_from(["parquet", "csv", "tsv", "json", "jsonl"]),
    packed=st.sampled_from(["", ".gz", ".zst"]),
)
def test_any_text_comes_through(rows: list[tuple[str, str]], kind: str, packed: str, tmp_path: Path) -> None:
    """Also NUL, control characters, quotes and delimiters."""
    file = tmp_path / f"list.{kind}{packed}"
    file.write_bytes(PACKERS[packed](WRITERS[kind](rows)))
    assert read(file) == rows


def test_null_captions_and_urls_are_empty(tmp_path: Path) -> None:
    rows = '{"url": "http://a", "caption": null}\n{"url": "http://b"}\n{"url": null, "caption": "c"}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    expected = [("http://a", ""), ("http://b", ""), ("", "c")]
    assert read(tmp_path / "a.jsonl") == expected
    (tmp_path / "a.json").write_text("[" + ",".join(rows.splitlines()) + "]")
    assert read(tmp_path / "a.json") == expected
    pq.write_table(
        pa.table({"url": ["http://a", "http://b", None], "caption": [None, "", "c"]}), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.parquet") == expected
    pq.write_table(pa.table({"url": ["http://a"], "caption": [None]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [("http://a", "")]
    (tmp_path / "a.csv").write_text('url,caption\nhttp://a,\nhttp://b,""\n,c\n')
    assert read(tmp_path / "a.csv") == expected


def test_numbers_and_dictionaries_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"url": "u", "caption": 7}\n')
    assert read(tmp_path / "a.jsonl") == [("u", "7")]
    (tmp_path / "a.csv").write_text("url,caption\nu,007\n")
    assert read(tmp_path / "a.csv") == [("u", "007")]
    table = pa.table(
        {"url": pa.array(["u", "u"]).dictionary_encode(), "caption": pa.array(["a", "b"], pa.large_string())}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("u", "a"), ("u", "b")]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,caption\nu,c\n", encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("http://a\r\n\r\n  http://b\u2028x \n", encoding="utf-8-sig")
    assert read(tmp_path / "a.csv") == [("u", "c")]
    assert read(tmp_path / "a.txt") == [("http://a", ""), ("http://b\u2028x", "")]


@pytest.mark.parametrize("kind", [k for k in FORMATS if k != "txt"])
def test_a_missing_column_names_those_there_are(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"list.{kind}"
    file.write_bytes(WRITERS[kind](PAIRS[:2]))
    assert read(file, "caption", "url") == [(c, u) for u, c in PAIRS[:2]]
    for url_col, caption_col, missing in [
        ("link", "caption", "'link'"),
        ("url", "text", "'text'"),
        ("link", "text", "'link'"),
    ]:
        with pytest.raises(UsageError) as caught:
            read(file, url_col, caption_col)
        assert missing in caught.value.problem and str(file) in caught.value.problem
        assert "url" in caught.value.actual and "caption" in caught.value.actual
        assert "--url-col" in caught.value.remedy
        assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.parquet", b"PAR1 this is none"),
        ("a.parquet", b""),
        ("a.csv", b""),
        ("a.csv", b"url,url,caption\nu,v,c\n"),
        ("a.json", b'[{"url": "u", "caption": "c"}'),
        ("a.txt", b"\xff\xfe"),
        ("a.csv.gz", b"not gzip"),
        ("a.csv.zst", b"not zstd"),
        ("a.parquet.gz", b"not gzip"),
        ("a.csv.gz", gzip.compress(b"url,caption\nu,c\n")[:10]),
        ("a.csv", "url,caption\nu,c\n".encode("utf-16")),
        ("a.jsonl", '{"url": "u", "caption": "c"}'.encode("utf-16-le")),
        ("a.parquet", parquet(PAIRS)[:-100]),
        ("a.json", b"["),
        ("a.json", b"[" * 100_000),
        ("a.tar", b""),
        ("a.pdf", b"%PDF"),
        ("noextension", b"x"),
    ],
)
def test_an_unreadable_file_is_named(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_an_empty_list_has_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "a.txt").write_text("\n")
    (tmp_path / "a.csv").write_text("url,caption\n")
    (tmp_path / "a.jsonl").write_text("")
    assert read(tmp_path / "a.jsonl") == []
    assert read(tmp_path / "a.json") == read(tmp_path / "a.txt") == read(tmp_path / "a.csv") == []


def test_files_directories_and_globs(tmp_path: Path) -> None:
    for name in ("b.csv", "a.txt", "notes.md", "sub/c.jsonl.gz", "sub/deep/d.PARQUET", "e [1].tsv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*patterns: str) -> list[str]:
        return [str(f.relative_to(tmp_path)) for f in find([str(tmp_path / p) for p in patterns])]

    everything = ["a.txt", "b.csv", "e [1].tsv", "sub/c.jsonl.gz", "sub/deep/d.PARQUET"]
    assert names("") == everything
    assert names("b.csv", "a.txt", "b.csv", "*.csv") == ["a.txt", "b.csv"]
    assert names("**/*.PARQUET", "sub/*.gz") == ["sub/c.jsonl.gz", "sub/deep/d.PARQUET"]
    assert names("e [1].tsv") == ["e [1].tsv"]
    for nothing in ("nowhere.csv", "*.json", "nowhere/**"):
        with pytest.raises(UsageError, match="nothing found") as caught:
            names(nothing)
        assert nothing in caught.value.problem
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="nothing found"):
        names("empty")


def test_a_tar_is_found_and_told_apart(tmp_path: Path) -> None:
    for name in ("a.tar", "b.csv", "c.tar.gz", "d.bin"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in find([str(tmp_path)])] == ["a.tar", "b.csv", "c.tar.gz"]


def test_extra_columns_are_an_object(tmp_path: Path) -> None:
    row = {"url": "u", "caption": "c", "width": 7, "tags": ["a", None], "who": 'x "y"\\\n', "score": 0.1, "none": None}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([row]))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    rest = {name: row[name] for name in row if name not in ("url", "caption")}
    for name in ("a.jsonl", "a.json", "a.parquet"):
        for extra, expected in (
            (("*",), rest),
            ((), None),
            (("who", "none"), {"who": 'x "y"\\\n', "none": None}),
        ):
            (got,) = read_rows(tmp_path / name, Columns(extra=extra))
            assert (json.loads(got["extra"]) if got["extra"] else None) == expected
        with pytest.raises(UsageError, match="no column 'height'") as caught:
            read_rows(tmp_path / name, Columns(extra=("width", "height")))
        assert "who" in caught.value.actual
    (tmp_path / "a.csv").write_text('n,caption,url,who\n007,c,u,"x\n""y"""\n')
    (got,) = read_rows(tmp_path / "a.csv")
    assert json.loads(got["extra"]) == {"n": "007", "who": 'x\n"y"'}
    (tmp_path / "b.csv").write_text("n,caption,url,n\n1,c,u,2\n")
    with pytest.raises(UsageError, match="more than one column 'n'"):
        read_rows(tmp_path / "b.csv")
    assert read_rows(tmp_path / "b.csv", Columns(extra=()))[0]["extra"] is None


def test_a_packed_list_that_is_cut_off_gives_what_comes_before(tmp_path: Path) -> None:
    lines = [f"http://a/{i * i * 7919}.jpg,caption {i}" for i in range(9000)]
    assert len("".join(lines)) > 128 << 10  # a block of zstd, which is read whole or not at all
    for name, pack in (("a.csv.gz", gzip.compress), ("a.csv.zst", zstd)):
        data = pack("\n".join(["url,caption", *lines, ""]).encode())
        for cut in (len(data) // 2, len(data) - 1):
            (tmp_path / name).write_bytes(data[:cut])
            *good, last = problems(tmp_path / name)
            assert [f"{url},{caption}" for url, caption, _ in good] == lines[: len(good)]
            assert not any(problem for _, _, problem in good)
            assert last[2].startswith("bad_record: the stream is damaged or cut off here")
            assert last[0] == "" and last[1].startswith(f"line {len(good) + 2} of {name}: ")
            assert len(good) > (2000 if cut < len(data) - 1 else 5000)


def test_two_packed_parts_are_one_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"http://a\nhttp") + gzip.compress(b"://b\n"))
    assert read(tmp_path / "a.txt.gz") == [("http://a", ""), ("http://b", "")]


def test_a_batch_is_bounded(tmp_path: Path) -> None:
    """In rows and in bytes; and no more than a few batches are in memory, whatever the file."""
    n = 150_000
    pq.write_table(pa.table({"url": [f"u{i}" for i in range(n)], "caption": ["c"] * n}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("".join(f"u{i}\n" for i in range(n)))
    for name in ("a.parquet", "a.txt"):
        batches = list(read_batches(UPath(tmp_path / name), Columns()))
        assert max(batch.num_rows for batch in batches) <= ROWS and len(batches) >= 3
        assert [url for batch in batches for url in batch["url"].to_pylist()] == [f"u{i}" for i in range(n)]
    caption = "x" * 20_000
    table = pa.table({"url": [f"u{i}" for i in range(12_000)], "caption": [caption] * 12_000})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=12_000)
    del table
    rows = 0
    before = pa.total_allocated_bytes()
    for batch in read_batches(UPath(tmp_path / "b.parquet"), Columns()):
        assert batch.nbytes < 70 << 20
        assert pa.total_allocated_bytes() - before < 170 << 20 < 12_000 * 20_000
        rows += batch.num_rows
    assert rows == 12_000


def test_read_table_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,text\n1,a\n2,b\n")
    assert read_table(UPath(tmp_path / "a.csv"), ["text"])["text"].to_pylist() == ["a", "b"]
    assert read_table(UPath(tmp_path / "a.csv"), ["prompt"]).column_names == ["n", "text"]


def test_an_object_store_is_read_like_a_disk(tmp_path: Path) -> None:
    store = UPath("memory://lists")
    for kind, packed in (("parquet", ""), ("csv", ".gz"), ("jsonl", ".zst")):
        (store / f"a.{kind}{packed}").write_bytes(PACKERS[packed](WRITERS[kind](PAIRS)))
    files = find(["memory://lists/*"])
    assert [file.name for file in files] == ["a.csv.gz", "a.jsonl.zst", "a.parquet"]
    for file in files:
        rows = [row for batch in read_batches(file, Columns()) for row in batch.to_pylist()]
        assert [(row["url"], row["caption"]) for row in rows] == PAIRS
        assert {row["source"] for row in rows} == {str(file)} and str(file).startswith("memory://")
