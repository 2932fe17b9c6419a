"""CSV and TSV: sound rows come through, a broken one is one bad line, and no quote swallows the rows after it."""

from __future__ import annotations

import csv
import io
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upath import UPath

from pipeline.download.lists import delimited, streams
from pipeline.download.lists.delimited import Delimited
from pipeline.download.lists.records import Columns
from pipeline.download.lists.streams import parsed
from schemas.errors import UsageError

HEAD = b"url,caption,n\n"
OPEN = "bad_record: a quote is not closed, or text follows the closing one"
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def rows(data: bytes, delimiter: str = ",", block: int = 1 << 20) -> list[tuple[str, str, str | None, str | None]]:
    """(url, caption, extra, problem) of every row, read in blocks of so many bytes."""
    blocks = (data[i : i + block] for i in range(0, len(data), block))
    parser = Delimited(UPath("a.csv"), Columns(), delimiter)
    return [tuple(row.values()) for table in parsed(blocks, parser) for row in table.to_pylist()]


def briefly(data: bytes) -> list[tuple[str, str, str]]:
    """(url, caption, problem) of the rows after :data:`HEAD`."""
    return [(url, caption, problem or "") for url, caption, _, problem in rows(HEAD + data)]


def test_a_broken_row_is_one_bad_line() -> None:
    data = (
        b"u1,c1,1\n"
        b'u2,"two\nlines, ""quoted""",2\n'
        b'u3,"open,3\n'
        b"u4,c4,4\n"
        b'u5,"closed" early,5\n'
        b"u6,c6\n"
        b"u7,c7,7,8\r\n"
        b"\n"
        b'u8,12" vinyl,8\r'
        b'u9,"c9","9"'
    )
    assert briefly(data) == [
        ("u1", "c1", ""),
        ("u2", 'two\nlines, "quoted"', ""),
        ("u3", 'line 5: u3,"open,3', OPEN),
        ("u4", "c4", ""),
        ("u5", 'line 7: u5,"closed" early,5', OPEN),
        ("u6", "line 8: u6,c6", "bad_record: 2 cells, not 3"),
        ("u7", "line 9: u7,c7,7,8", "bad_record: 4 cells, not 3"),
        ("u8", '12" vinyl', ""),
        ("u9", "c9", ""),
    ]


def test_an_open_quote_closes_at_the_next_one_only_where_a_cell_may_end() -> None:
    assert briefly(b'u1,"open,1\nu2,"fine, too",2\n') == [
        ("u1", 'line 2: u1,"open,1', OPEN),
        ("u2", "fine, too", ""),
    ]
    # Nobody can tell this one from a cell of two lines.
    assert briefly(b'u1,"open,1\nu2,end",2\n') == [("u1", "open,1\nu2,end", "")]
    # But with the wrong number of cells it is none, and the second line is read for itself.
    assert briefly(b'u1,"open\nu2,c2,"\nu3,c3,3\n') == [
        ("u1", 'line 2: u1,"open', "bad_record: 2 cells, not 3"),
        ("u2", 'line 3: u2,c2,"', OPEN),
        ("u3", "c3", ""),
    ]


def test_invalid_text_is_bad_in_its_row_alone() -> None:
    data = b"u1,\xff caf\xe9,1\nu2,caf\xc3\xa9,2\nu3\xff,c,3\nu4,c,\xff\nu5,nul\0,5\n"
    assert briefly(data) == [
        ("u1", "line 2: u1,\ufffd caf\ufffd,1", "bad_caption: invalid UTF-8 in 'caption'"),
        ("u2", "café", ""),
        ("u3\ufffd", "line 4: u3\ufffd,c,3", "bad_record: invalid UTF-8 in 'url'"),
        ("u4", "line 5: u4,c,\ufffd", "bad_record: invalid UTF-8 in 'n'"),
        ("u5", "nul\0", ""),
    ]


def test_the_text_of_a_bad_row_is_cut() -> None:
    long = b"x" * 5000
    one, two = briefly(long + b"\n" + long + b"\n")
    assert len(one[1]) == len(two[1]) == streams.RAW
    assert one[1] == "line 2: " + "x" * 992
    assert two[1].startswith("line 3: ")


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "SPAN", 40)
    monkeypatch.setattr(delimited, "LINE", 60)
    monkeypatch.setattr(streams, "LINE", 60)
    across = b'u,"' + b"x" * 20 + b"\n" + b"y" * 10 + b'",1\n'
    assert briefly(across) == [("u", "x" * 20 + "\n" + "y" * 10, "")]
    over = b'u,"' + b"x" * 20 + b"\n" + b"y" * 30 + b'",1\n'
    assert [problem for _, _, problem in briefly(over)] == [OPEN, "bad_record: 2 cells, not 3"]
    assert briefly(b'u,"' + b"x" * 50 + b'",1\n') == [("u", "x" * 50, "")]
    monkeypatch.setattr(delimited, "SPAN_LINES", 3)
    assert briefly(b'u,"1\n2\n3",1\n') == [("u", "1\n2\n3", "")]
    assert briefly(b'u,"1\n2\n3\n4",1\n')[0][2] == OPEN
    long = HEAD + b"u," + "é".encode() * 250 + b",1\nv,c,2\n"
    blocks = list(streams._cut_lines(long[:50], (long[i : i + 50] for i in range(50, len(long), 50))))
    assert max(map(len, b"".join(blocks).split(b"\n"))) == 61
    assert [problem for _, _, problem in briefly(b"".join(blocks)[len(HEAD) :])] == [
        "bad_record: a line of more than 60 bytes",
        "",
    ]


@pytest.mark.parametrize("data", [b"", b"\n\r\n", b'url,"caption\nu,c\n', b"url,caption\xff\nu,c\n", b"a,b\n1,2\n"])
def test_a_file_needs_its_names(data: bytes) -> None:
    with pytest.raises(UsageError, match=r"a\.csv"):
        rows(data)


def test_quoted_names_on_the_second_line() -> None:
    data = b'\n"url","capt\nion"\nu,c\n'
    parser = Delimited(UPath("a.csv"), Columns(caption="capt\nion"), ",")
    (table,) = (t for t in parsed(iter([data]), parser) if t.num_rows)
    assert table.to_pylist() == [{"url": "u", "caption": "c", "extra": None, "problem": None}]


def reference(data: bytes, delimiter: str) -> list[list[str] | None]:
    """The rule by another route: Python's strict reader on one line, on two and so on. None is a bad line."""
    text = data.decode("utf-8", "surrogateescape")
    lines = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", text)
    out: list[list[str] | None] = []
    i = 0
    while i < len(lines):
        record = None
        for j in range(i, len(lines)):
            try:
                (record,) = csv.reader(["".join(lines[i : j + 1])], delimiter=delimiter, strict=True)
                break
            except csv.Error as exc:
                if "unexpected end of data" not in str(exc):
                    break
        if record is not None and len(record) not in (0, 3):
            record = None
        if record != []:
            out.append(record)
        i = j + 1 if record is not None else i + 1
    return out


BITS = [b'"', b'""', b",", b"\t", b"\n", b"\r\n", b"\r", b"u", b"caption", b"\0", b"\xff", "é🎈".encode()]
CELLS = [b"u", b"", b'"q"', b'"a\nb"', b'"a ""b"""', b'"\r\n,"', b'""', "é".encode()]
messy = st.lists(st.sampled_from(BITS), max_size=60).map(b"".join)
neat = st.lists(st.tuples(*[st.sampled_from(CELLS)] * 3).map(b",".join), max_size=12).map(
    lambda lines: b"\n".join(lines) + b"\n"
)


@SETTINGS
@given(body=st.one_of(messy, neat, st.tuples(neat, messy, neat).map(b"".join), st.binary(max_size=60)))
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_any_bytes_by_the_rule(body: bytes, delimiter: str) -> None:
    """Every line is a row, or part of one that is sound; and nothing raises."""
    body = body.replace(b",", delimiter.encode())
    head = HEAD.replace(b",", delimiter.encode())
    got = rows(head + body, delimiter)
    expected = reference(body, delimiter)
    assert len(got) == len(expected)
    for (url, caption, extra, problem), cells in zip(got, expected, strict=True):
        if cells is None or any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
            assert problem and extra is None and caption.startswith("line ")
        else:
            assert problem is None
            assert [url, caption] == cells[:2]


@SETTINGS
@given(body=st.one_of(messy, neat, st.tuples(neat, messy).map(b"".join)), block=st.integers(1, 40))
def test_blocks_make_no_difference(body: bytes, block: int) -> None:
    """Wherever the file is cut into blocks; also with records over the limits."""
    with pytest.MonkeyPatch.context() as patch:
        for span, lines, line in ((1 << 20, 256, 16 << 20), (20, 256, 30), (1 << 20, 2, 30)):
            patch.setattr(delimited, "SPAN", span)
            patch.setattr(delimited, "SPAN_LINES", lines)
            patch.setattr(delimited, "LINE", line)
            assert rows(HEAD + body, block=block) == rows(HEAD + body)


plain = st.text(st.characters(codec="utf-8", exclude_characters='",\r\n'), min_size=1, max_size=8)


@SETTINGS
@given(
    pairs=st.lists(st.tuples(plain, plain, plain), min_size=1, max_size=8),
    where=st.integers(0, 7),
    broken=messy.map(lambda data: data.replace(b"\n", b"").replace(b"\r", b"")),
)
def test_a_broken_line_changes_no_other(pairs: list[tuple[str, str, str]], where: int, broken: bytes) -> None:
    lines = [",".join(pair).encode() for pair in pairs]
    where %= len(lines)
    before = rows(HEAD + b"\n".join(lines))
    assert [row[:2] for row in before] == [pair[:2] for pair in pairs]
    lines[where] = broken
    after = rows(HEAD + b"\n".join(lines))
    assert after[:where] == before[:where]
    assert after[len(after) - len(before) + where + 1 :] == before[where + 1 :]
    assert len(after) == len(before) - (not broken)


@SETTINGS
@given(
    pairs=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8"), max_size=12)] * 3), max_size=8),
    delimiter=st.sampled_from(",\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    block=st.integers(1, 200),
)
def test_what_python_writes_comes_back(
    pairs: list[tuple[str, str, str]], delimiter: str, quoting: int, end: str, block: int
) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerow(["url", "caption", "n"])
    # Python leaves a line end that is not its own unquoted.
    cells = [[c.replace("\r", "").replace("\n", "") if quoting == csv.QUOTE_MINIMAL else c for c in p] for p in pairs]
    writer.writerows(cells)
    got = rows(out.getvalue().encode(), delimiter, block)
    assert [list(row[:2]) for row in got] == [row[:2] for row in cells]
    assert not any(row[3] for row in got)
