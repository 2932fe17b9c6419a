"""Parquet columns of every type: text for url and caption, JSON for the others."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from pipeline.download.lists.records import Columns
from pipeline.download.lists.sources import read_batches
from schemas.errors import UsageError

TEXT_TYPES = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.string())]


def rows(table: pa.Table, folder: Path, columns: Columns | None = None) -> list[dict[str, str | None]]:
    pq.write_table(table, folder / "a.parquet", row_group_size=2)
    batches = read_batches(UPath(folder / "a.parquet"), columns or Columns())
    return [row for batch in batches for row in batch.select(["url", "caption", "extra", "problem"]).to_pylist()]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_every_type_of_text(kind: pa.DataType, tmp_path: Path) -> None:
    texts = ["é🎈", None, "", "nul\0", "é🎈"]
    column = pa.array(texts).cast(kind) if not pa.types.is_dictionary(kind) else pa.array(texts).dictionary_encode()
    got = rows(pa.table({"url": column, "caption": column, "x": column}), tmp_path)
    assert [row["url"] for row in got] == [row["caption"] for row in got] == [text or "" for text in texts]
    assert not any(row["problem"] for row in got)
    extras = [row["extra"] and json.loads(row["extra"])["x"] for row in got]
    # Bytes are left out, and nothing else is there.
    assert extras == ([None] * 5 if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else texts)


@pytest.mark.parametrize("said", [pa.binary(), pa.string()], ids=str)
def test_invalid_text_is_bad_in_its_row_alone(said: pa.DataType, tmp_path: Path) -> None:
    """Also in a column that says it is text."""

    def column(*values: bytes | None) -> pa.Array:
        array = pa.array(values, pa.binary())
        return pa.Array.from_buffers(said, len(array), array.buffers())

    urls = column(b"u1", b"u2", b"u\xff", b"u4", b"u5")
    captions = column(b"c1", b"c\xff", b"c3", None, b"c5")
    note = pa.array([b"a", b"b", b"c", b"d", b"\xff"], pa.binary())
    got = rows(pa.table({"url": urls, "caption": captions, "note": note.view(pa.string())}), tmp_path)
    assert [tuple(row.values()) for row in got] == [
        ("u1", "c1", '{"note":"a"}', None),
        ("u2", "row 2: c\ufffd", None, "bad_caption: invalid UTF-8 in 'caption'"),
        ("u\ufffd", "row 3: c3", None, "bad_record: invalid UTF-8 in 'url'"),
        ("u4", "", '{"note":"d"}', None),
        ("u5", "row 5: c5", None, "bad_record: invalid UTF-8 in 'note'"),
    ]


def test_other_types_are_json(tmp_path: Path) -> None:
    columns: dict[str, tuple[pa.Array, object]] = {
        "int": (pa.array([2**62]), 2**62),
        "float": (pa.array([0.1]), 0.1),
        "half": (pa.array([1.5], pa.float16()), 1.5),
        "big": (pa.array([1e300]), 1e300),
        "nan": (pa.array([float("nan")]), None),
        "inf": (pa.array([float("-inf")], pa.float32()), None),
        "null": (pa.array([None], pa.null()), None),
        "bool": (pa.array([True]), True),
        "date": (pa.array([dt.date(2024, 2, 29)]), "2024-02-29"),
        "time": (pa.array([dt.datetime(2024, 2, 29, 1, 2, 3)], pa.timestamp("ms")), "2024-02-29 01:02:03.000"),
        "far": (pa.array([2**62], pa.timestamp("us")), None),
        "money": (pa.array([Decimal("1.50")]), "1.50"),
        "quotes": (pa.array(['"\\']), '"\\'),
        "lines": (pa.array(["\t\n\x01\x7f\u2028"]), "\t\n\x01\x7f\u2028"),
        "list": (pa.array([[1.0, float("nan"), None]]), [1.0, None, None]),
        "struct": (pa.array([{"a": b"\xff", "b": "x", "c": dt.date(2024, 1, 1)}]), {"b": "x", "c": "2024-01-01"}),
        'na"me\n.x': (pa.array(["v"]), "v"),
    }
    table = pa.table({"url": ["u"], "caption": ["c"]} | {name: array for name, (array, _) in columns.items()})
    (row,) = rows(table, tmp_path)
    assert row["problem"] is None and row["extra"] is not None
    got = json.loads(row["extra"], parse_constant=pytest.fail)
    assert got.pop("far") is not None  # beyond the calendar: shown somehow
    assert got == {name: expected for name, (_, expected) in columns.items() if name != "far"}


def test_columns_that_are_no_text(tmp_path: Path) -> None:
    numbers = pa.table({"url": [1, 2], "caption": [0.5, float("nan")]})
    assert [(row["url"], row["caption"]) for row in rows(numbers, tmp_path)] == [("1", "0.5"), ("2", "")]
    with pytest.raises(UsageError, match="'caption' is not a column of text"):
        rows(pa.table({"url": ["u"], "caption": [["c"]]}), tmp_path)
    double = pa.table([["u"], ["v"], ["c"]], names=["url", "url", "caption"])
    with pytest.raises(UsageError, match="more than one column 'url'"):
        rows(double, tmp_path)


def test_one_column_may_be_both(tmp_path: Path) -> None:
    (row,) = rows(pa.table({"url": ["u"], "n": [1]}), tmp_path, Columns("url", "url"))
    assert (row["url"], row["caption"], row["extra"]) == ("u", "u", '{"n":1}')
