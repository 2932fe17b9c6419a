r"""CSV and TSV: quoted cells may span lines, and no broken quote swallows the rows after it.

The rule: a line ends with \n, \r\n or a lone \r. A cell that starts with a quote ends at the next quote that is not
doubled, and the delimiter or the line's end must follow; a quote elsewhere is text. A record over several lines has
at most :data:`SPAN` bytes and :data:`SPAN_LINES` lines. A record that breaks this (an open quote, text after a closing
one, a wrong number of cells) is one bad line: reading goes on at the line after the one where the record began.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray
from upath import UPath

from pipeline.download.lists.records import NONE, Columns, objects, with_nulls
from pipeline.download.lists.streams import (
    LINE,
    bad,
    decode,
    line_ends,
    raw_text,
    readable,
    too_long,
    valid,
    whole_lines,
)
from schemas.errors import Reason, UsageError

SPAN = 1 << 20
"""Longest record over several lines, bytes."""
SPAN_LINES = 256
"""Most lines of one record. It bounds the work, too: a list of nothing but open quotes is read on from every line."""

_EOL = re.compile(r"\r\n|\r|\n")
_BROKEN = "a quote is not closed, or text follows the closing one"
_QUOTE, _LF, _CR = b'"\n\r'


class Record(NamedTuple):
    """Cells, where the next record begins, and what is wrong, if anything."""

    cells: list[str]
    end: int
    problem: str | None


class Delimited:
    """Parser of one file, which starts with the line of names.

    Raises:
        UsageError: no line of names, or not the named columns.
    """

    def __init__(self, file: UPath, columns: Columns, delimiter: str) -> None:
        self._file, self._columns, self._delimiter = file, columns, delimiter
        d = re.escape(delimiter)
        self._cell = re.compile(rf'"((?:[^"]++|"")*+)"(?=[{d}\r\n]|\Z)|(?!")[^{d}\r\n]*+')
        self._open = re.compile(r'"(?:[^"]++|"")*+\Z')
        self._names: list[str] = []
        self._ends: list[int] = []
        self.line = 1

    def parse(self, data: bytes, last: bool) -> tuple[pa.Table, int]:
        """See :class:`~pipeline.download.lists.streams.Parser`."""
        start = 0 if self._names else self._header(data, last)
        if not self._names:
            return NONE, start
        body = data[start:]
        end = _sound(body, self._delimiter, last)
        if end:
            try:
                table = self._fast(body[:end])
                self.line += line_ends(body[:end])
                return table, start + end
            except pa.ArrowInvalid:
                pass  # some row is bad; the careful way says which
        table, used = self._careful(body, last)
        return table, start + used

    def _header(self, data: bytes, last: bool) -> int:
        text, _ = decode(data)
        self._ends = _line_ends(text)
        start = len(text) - len(text.lstrip("\r\n"))
        if start == len(text) and last:
            raise UsageError(f"{self._file} is empty", expected="a first line with the columns' names")
        record = self._record(text, start, last) if start < len(text) else None
        if record is None:
            return 0
        names, end, problem = record
        if problem or not all(map(valid, names)):
            raise UsageError(f"the first line of {self._file} does not name columns", actual=problem or "invalid UTF-8")
        others = self._columns.others(self._file, names)
        self._names, self._others = names, others
        self._url, self._caption = names.index(self._columns.url), names.index(self._columns.caption)
        self._used = list(dict.fromkeys([self._url, self._caption, *map(names.index, others)]))
        used = text[:end].encode("utf-8", "surrogateescape")
        self.line += line_ends(used)
        return len(used)

    def _fast(self, data: bytes) -> pa.Table:
        """Rows of sound lines. Raises ArrowInvalid if one has a wrong number of cells, or is not UTF-8."""
        quotes = b'"' in data
        table = pyarrow.csv.read_csv(
            pa.BufferReader(data),
            pyarrow.csv.ReadOptions(
                use_threads=False, block_size=len(data) + 1, column_names=[str(i) for i in range(len(self._names))]
            ),
            pyarrow.csv.ParseOptions(
                delimiter=self._delimiter, quote_char='"' if quotes else False, newlines_in_values=quotes
            ),
            # Strings are never null: "NA", "null" and "None" are captions like any other.
            pyarrow.csv.ConvertOptions(
                column_types={str(i): pa.string() for i in self._used}, include_columns=[str(i) for i in self._used]
            ),
        ).combine_chunks()
        columns = {i: _chunk(table[str(i)]) for i in self._used}
        return self._table(columns, pa.nulls(table.num_rows, pa.string()))

    def _table(self, columns: dict[int, pa.Array], problems: pa.Array) -> pa.Table:
        arrays = [columns[self._names.index(name)] for name in self._others]
        extra = with_nulls(objects(self._others, arrays, len(problems)), problems)
        return pa.table([columns[self._url], columns[self._caption], extra, problems], schema=NONE.schema)

    def _careful(self, data: bytes, last: bool) -> tuple[pa.Table, int]:
        text, clean = decode(data)
        self._ends = _line_ends(text)
        rows: list[list[str]] = []
        problems: list[str | None] = []
        at = counted = 0
        while at < len(text):
            record = self._record(text, at, last)
            if record is None:
                break
            cells, end, problem = record
            if problem is None and not clean:
                problem = self._invalid(cells)
            if problem:
                self.line += line_ends(text[counted:at].encode("utf-8", "surrogateescape"))
                counted = at
                cells = self._bad_cells(cells, text[at:end])
            if cells:  # else an empty line
                rows.append(cells)
                problems.append(problem)
            at = end
        self.line += line_ends(text[counted:at].encode("utf-8", "surrogateescape"))
        columns = {i: pa.array([row[i] for row in rows], pa.string()) for i in self._used}
        return self._table(columns, pa.array(problems, pa.string())), len(text[:at].encode("utf-8", "surrogateescape"))

    def _record(self, text: str, at: int, last: bool) -> Record | None:
        """The record at ``at``, or None if it needs more text."""
        eol = _EOL.search(text, at)
        stop, after = eol.span() if eol else (len(text), len(text))
        if not last and (eol is None or (after == len(text) and text[-1] == "\r")):
            return None
        if stop - at > LINE // 4 and too_long(text[at:stop], LINE):
            return Record([], after, bad(Reason.BAD_RECORD, f"a line of more than {LINE} bytes"))
        if stop == at:
            return Record([], after, None)
        if text.find('"', at, stop) < 0:
            return self._counted(text[at:stop].split(self._delimiter), after, after)
        return self._quoted(text, at, last, (stop, after))

    def _quoted(self, text: str, at: int, last: bool, line: tuple[int, int]) -> Record | None:
        stop, after = line
        lines = bisect_right(self._ends, at) + SPAN_LINES - 1
        limit = min(len(text), max(stop, at + SPAN), self._ends[lines] if lines < len(self._ends) else len(text))
        cells: list[str] = []
        place = at
        while cell := self._cell.match(text, place, limit):
            quoted = cell[1]
            cells.append(cell[0] if quoted is None else quoted.replace('""', '"'))
            place = cell.end()
            if place < limit and text[place] == self._delimiter:
                place += 1
                continue
            if place == stop:
                return self._counted(cells, after, after)
            eol = _EOL.match(text, place, limit)
            if eol and (last or eol.end() < len(text) or eol[0] != "\r"):
                return self._counted(cells, eol.end(), after)
            if place == len(text) and last:
                return self._counted(cells, place, after)
            break
        # What ends with the text may go on in the next block; what ends before is broken.
        at_end = place == limit or self._open.match(text, place, limit) or text.startswith("\r", place)
        if at_end and limit == len(text) and not last:
            return None
        return Record(cells, after, bad(Reason.BAD_RECORD, _BROKEN))

    def _counted(self, cells: list[str], end: int, after: int) -> Record:
        if self._names and len(cells) != len(self._names):
            return Record(cells, after, bad(Reason.BAD_RECORD, f"{len(cells)} cells, not {len(self._names)}"))
        return Record(cells, end, None)

    def _invalid(self, cells: list[str]) -> str | None:
        wrong = [self._names[i] for i in self._used if cells and not valid(cells[i])]
        if not wrong:
            return None
        reason = Reason.BAD_CAPTION if wrong == [self._columns.caption] else Reason.BAD_RECORD
        return bad(reason, "invalid UTF-8 in " + ", ".join(map(repr, wrong)))

    def _bad_cells(self, cells: list[str], text: str) -> list[str]:
        """A row of a bad record: what there is of the URL, and the text as the caption."""
        row = [""] * len(self._names)
        row[self._url] = readable(cells[self._url]) if len(cells) > self._url else ""
        row[self._caption] = raw_text(f"line {self.line}", text.rstrip("\r\n"))
        return row


def _line_ends(text: str) -> list[int]:
    return [eol.end() for eol in _EOL.finditer(text)]


def _chunk(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


def _sound(data: bytes, delimiter: str, last: bool) -> int:
    """Length of the leading records whose quotes are beyond doubt; 0 if there are none, or to be careful."""
    if len(data) > LINE:
        return 0
    if b'"' not in data:
        return whole_lines(data, last)
    text = np.frombuffer(data, np.uint8)
    quotes = np.flatnonzero(text == _QUOTE)
    ends = np.flatnonzero((text == _LF) | (text == _CR))
    if len(ends) and ends[-1] == len(data) - 1 and data.endswith(b"\r") and not last:
        ends = ends[:-1]
    # Between an odd number of quotes and the next a line's end is text.
    outside = np.flatnonzero(np.searchsorted(quotes, ends) % 2 == 0)
    if np.diff(outside, prepend=-1).max(initial=0) > SPAN_LINES:
        return 0
    ends = ends[outside] + 1
    if last and len(quotes) % 2 == 0:
        ends = np.append(ends, len(data))
    if not len(ends) or np.diff(ends, prepend=0).max() >= SPAN:
        return 0
    end = int(ends[-1])
    quotes = quotes[: np.searchsorted(quotes, end)]
    return end if _all_close(text[:end], quotes, ord(delimiter)) else 0


def _all_close(text: NDArray[np.uint8], quotes: NDArray[np.int64], delimiter: int) -> bool:
    """Whether every other quote opens a cell, and those between close it, or double."""
    opening, closing = quotes[::2], quotes[1::2]
    doubled = closing[:-1] + 1 == opening[1:]
    padded = np.concatenate(([_LF], text, [_LF]))  # the quote at i is at i + 1
    edge = np.isin(padded, (delimiter, _LF, _CR))
    opens, closes = edge[opening], edge[closing + 2]
    return bool(opens[:1].all() and (opens[1:] | doubled).all() and (closes[:-1] | doubled).all() and closes[-1:].all())
