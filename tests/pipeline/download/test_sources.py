"""Lists of pairs in every format, and what is wrong with some of them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upath import UPath

from pipeline.download.sources import FORMATS, drop_doubles, find, read_pairs
from schemas.errors import UsageError
from schemas.keys import pair_key

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


def read(file: Path, url_col: str = "url", caption_col: str = "caption") -> list[tuple[str, str]]:
    table = read_pairs(UPath(file), url_col, caption_col)
    rows = table.to_pylist()
    assert all(row["pair_key"] == pair_key(row["url"], row["caption"]) for row in rows)
    assert {row["source"] for row in rows} <= {str(file)}
    return [(row["url"], row["caption"]) for row in rows]


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
            st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=20),
            st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20),
        ),
        min_size=1,
        max_size=5,
    ),
    kind=st.sampled_from(["parquet", "csv", "tsv", "json", "jsonl"]),
)
def test_any_text_comes_through(rows: list[tuple[str, str]], kind: str, tmp_path: Path) -> None:
    """Also NUL, control characters, quotes and delimiters."""
    file = tmp_path / f"list.{kind}"
    file.write_bytes(WRITERS[kind](rows))
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
        ("a.csv", b"url,caption\nu,c,more\n"),
        ("a.csv", b"url,caption\nu,\xff\xfe\n"),
        ("a.csv", b"url,url,caption\nu,v,c\n"),
        ("a.jsonl", b'{"url": "u", "caption": \n'),
        ("a.jsonl", b""),
        ("a.jsonl", b'{"url": ["u"], "caption": "c"}\n'),
        ("a.json", b"[1, 2]"),
        ("a.json", b'[{"url": "u", "caption": "c"}'),
        ("a.json", b'[{"url": "u", "caption": {"en": "c"}}]'),
        ("a.json", b'[{"url": "u", "caption": "c"}, {"url": "u", "caption": 7}]'),
        ("a.txt", b"\xff\xfe"),
        ("a.csv.gz", b"not gzip"),
        ("a.csv.gz", gzip.compress(b"url,caption\nu,c\n" * 1000)[:40]),
        ("a.csv.zst", b"not zstd"),
        ("a.parquet.gz", b"not gzip"),
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


def test_doubles_keep_their_first_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,caption\nu,c\nv,c\nu,c\nu,d\nv,c\n")
    (tmp_path / "b.csv").write_text("url,caption\nw,c\nu,c\n")
    tables = [read_pairs(UPath(tmp_path / name), "url", "caption") for name in ("a.csv", "b.csv")]
    kept = drop_doubles(pa.concat_tables(tables)).to_pylist()
    assert [(r["url"], r["caption"], Path(r["source"]).name) for r in kept] == [
        ("u", "c", "a.csv"), ("v", "c", "a.csv"), ("u", "d", "a.csv"), ("w", "c", "b.csv"),
    ]  # fmt: skip
