"""txt, jsonl and json: one bad row for each line or element that cannot be read, and none for the others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upath import UPath

from pipeline.download.lists import lines
from pipeline.download.lists.lines import JsonLines, Lines
from pipeline.download.lists.records import Columns
from pipeline.download.lists.sources import read_batches
from pipeline.download.lists.streams import parsed
from schemas.errors import UsageError

SETTINGS = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
Row = tuple[str, str, str | None, str | None]


def rows(data: bytes, parser: Lines, block: int = 1 << 20) -> list[Row]:
    """(url, caption, extra, problem) of every row, read in blocks of so many bytes."""
    blocks = (data[i : i + block] for i in range(0, len(data), block))
    return [tuple(row.values()) for table in parsed(blocks, parser) for row in table.to_pylist()]


def file_rows(name: str, data: bytes, folder: Path) -> list[Row]:
    (folder / name).write_bytes(data)
    columns = ("url", "caption", "extra", "problem")
    batches = read_batches(UPath(folder / name), Columns())
    return [tuple(row[c] for c in columns) for batch in batches for row in batch.to_pylist()]


def test_a_line_of_txt_is_a_url() -> None:
    assert rows(b" http://a\t\r\n\n \r\xffb\rhttp://c", Lines()) == [
        ("http://a", "", None, None),
        ("\ufffdb", "line 4: \ufffdb", None, "bad_record: invalid UTF-8"),
        ("http://c", "", None, None),
    ]


BAD = [
    (b"{bad", "", "bad_record: invalid JSON"),
    (b'{"url": "u"} {"url": "v"}', "", "bad_record: invalid JSON"),
    (b'{"url": "u", "caption": ', "", "bad_record: invalid JSON"),
    (b'{"url": "u", "caption": ' + b"9" * 5000 + b"}", "", "bad_record: invalid JSON"),
    (b"[" * 100_000, "", "bad_record: invalid JSON"),
    (b"[1]", "", "bad_record: not a JSON object"),
    (b'"text"', "", "bad_record: not a JSON object"),
    (b"null", "", "bad_record: not a JSON object"),
    (b'{"url": "u", "caption": {"en": "c"}}', "u", "bad_record: a list or an object in the place of a text"),
    (b'{"url": ["u"], "caption": "c"}', "", "bad_record: a list or an object in the place of a text"),
    (b'{"url": "u", "caption": "\\ud800"}', "u", "bad_caption: invalid UTF-8 or a lone surrogate"),
    (b'{"url": "u", "caption": "\xff"}', "u", "bad_caption: invalid UTF-8 or a lone surrogate"),
    (b'{"url": "u\\udfff", "caption": "c"}', "u\ufffd", "bad_record: invalid UTF-8 or a lone surrogate"),
    (b'{"url": "u", "caption": "c", "x": ["\\ud83d"]}', "u", "bad_record: invalid UTF-8 or a lone surrogate"),
    (b'{"url": "u", "caption": "c", "\xff": 1}', "u", "bad_record: invalid UTF-8 or a lone surrogate"),
]


@pytest.mark.parametrize(("line", "url", "problem"), BAD, ids=range(len(BAD)))
def test_a_bad_line_of_json_is_one_bad_row(line: bytes, url: str, problem: str) -> None:
    before, after = b'{"url": "a", "caption": "b"}\n\n', b'\r\n{"url": "y", "caption": "\\ud83c\\udf88", "n": 1}'
    one, bad, two = rows(before + line + after, JsonLines(Columns()))
    assert one == ("a", "b", None, None)
    assert two == ("y", "🎈", '{"n":1}', None)
    raw = f"line 3: {line.decode(errors='replace')}"[:1000]
    assert bad[:3] == (url, raw, None)
    assert bad[3] is not None and bad[3].startswith(problem)


def test_what_is_no_text_becomes_text(tmp_path: Path) -> None:
    values = [7, 0.5, True, None, float("nan"), math.inf]
    texts = ["7", "0.5", "true", "", "", ""]
    objects = [{"url": value, "caption": value} for value in values]
    expected = [(text, text, None, None) for text in texts]
    assert file_rows("a.jsonl", "\n".join(map(json.dumps, objects)).encode(), tmp_path) == expected
    assert file_rows("a.json", json.dumps(objects).encode(), tmp_path) == expected


def test_what_json_cannot_hold_is_null_in_extra() -> None:
    line = b'{"url": "u", "caption": "c", "a": NaN, "b": [-Infinity, 1e999], "c": {"d": 1e-7}}'
    ((_, _, extra, problem),) = rows(line, JsonLines(Columns()))
    assert problem is None and extra is not None
    assert json.loads(extra, parse_constant=pytest.fail) == {"a": None, "b": [None, None], "c": {"d": 1e-7}}


def test_a_bad_element_of_an_array_is_one_bad_row(tmp_path: Path) -> None:
    data = b'[{"url": "u"}, 7, {"url": {"v": "w"}}, null, {"url": "x", "caption": "\xff"}, {"url": "y"}]'
    assert file_rows("a.json", data, tmp_path) == [
        ("u", "", None, None),
        ("", "element 2: 7", None, "bad_record: not a JSON object"),
        ("", 'element 3: {"url": {"v": "w"}}', None, "bad_record: a list or an object in the place of a text"),
        ("", "element 4: null", None, "bad_record: not a JSON object"),
        (
            "x",
            'element 5: {"url": "x", "caption": "\ufffd"}',
            None,
            "bad_caption: invalid UTF-8 or a lone surrogate",
        ),
        ("y", "", None, None),
    ]


def test_a_large_array_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "ARRAY", 100)
    with pytest.raises(UsageError, match="jsonl"):
        file_rows("a.json", json.dumps([{"url": "u", "caption": "c" * 200}]).encode(), tmp_path)
    assert len(file_rows("b.json", b'{"url": "u", "caption": "c"}\n' * 50, tmp_path)) == 50


def test_a_column_may_turn_up_late_but_must(tmp_path: Path) -> None:
    late = b'{"url": "u"}\n' * 60_000 + b'{"url": "v", "caption": "c"}\n'
    got = file_rows("a.jsonl", late, tmp_path)
    assert len(got) == 60_001 and got[-1] == ("v", "c", None, None)
    for data in (b'{"url": "u"}\n', b'{"url": "u"}\n' * 300_000 + b'{"url": "v", "caption": "c"}\n'):
        with pytest.raises(UsageError, match="no column 'caption'"):
            file_rows("a.jsonl", data, tmp_path)


def test_lines_that_are_no_json_at_all_are_kept(tmp_path: Path) -> None:
    got = file_rows("a.jsonl", b"url,caption\nu,c\n", tmp_path)
    assert [row[1] for row in got] == ["line 1: url,caption", "line 2: u,c"]


BITS = [b'{"url": "a", "caption": "b"}', b"{", b'"', b"}", b"\n", b"\r\n", b"\r", b" ", b"\xff", "é".encode(), b"[1]"]


@SETTINGS
@given(data=st.lists(st.sampled_from(BITS), max_size=30).map(b"".join), block=st.integers(1, 20))
def test_blocks_make_no_difference(data: bytes, block: int) -> None:
    """And every line that is not blank is a row."""
    whole = [line for line in data.splitlines() if line.decode("utf-8", "surrogateescape").strip()]
    for parser in (Lines, lambda: JsonLines(Columns())):
        got = rows(data, parser(), block)
        assert got == rows(data, parser())
        assert len(got) == len(whole)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abé\"\\\n", max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@SETTINGS
@given(
    objects=st.lists(
        st.fixed_dictionaries({"url": st.text(max_size=5), "caption": st.text(max_size=5), "more": json_values}),
        max_size=5,
    ),
    escaped=st.booleans(),
    block=st.integers(1, 100),
)
def test_any_object_comes_back(objects: list[dict[str, object]], escaped: bool, block: int) -> None:
    data = "\n".join(json.dumps(o, ensure_ascii=escaped) for o in objects).encode()
    got = rows(data, JsonLines(Columns()), block)
    assert [(url, caption, json.loads(extra or "")) for url, caption, extra, _ in got] == [
        (o["url"], o["caption"], {"more": o["more"]}) for o in objects
    ]
