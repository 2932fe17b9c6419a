"""Lists of lines: URLs in txt, JSON objects in jsonl; and JSON arrays, which are read whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

import pyarrow as pa
from upath import UPath

from pipeline.download.lists.records import NONE, Columns, dumps, table
from pipeline.download.lists.streams import (
    LINE,
    Damaged,
    bad,
    decode,
    raw_text,
    readable,
    too_long,
    valid,
    whole_lines,
)
from schemas.errors import Reason, UsageError

ARRAY = 64 << 20
"""Largest JSON array, bytes unpacked: it is read whole."""

# Made once: json.loads with an option makes a decoder for every call. NaN and Infinity are no JSON, but written by
# pandas for what is missing.
_loads = json.JSONDecoder(parse_constant=lambda _: None).decode
_EOL = re.compile(r"\r\n|\r|\n")
_LONG = bad(Reason.BAD_RECORD, f"a line of more than {LINE} bytes")

Row = tuple[str, str, str | None, str | None]
"""(url, caption, extra, problem)"""


class Lines:
    """Parser of txt: a line is a URL, without the spaces around it; there are no captions."""

    def __init__(self) -> None:
        self.line = 1

    def parse(self, data: bytes, last: bool) -> tuple[pa.Table, int]:
        """See :class:`~pipeline.download.lists.streams.Parser`."""
        end = whole_lines(data, last)
        text, clean = decode(data[:end])
        lines = _EOL.split(text) if "\r" in text else text.split("\n")
        rows = self._sound(lines) if clean and end <= LINE else self._careful(lines)
        self.line += len(lines) - 1
        return rows, end

    def _sound(self, lines: list[str]) -> pa.Table:
        urls = [url for line in lines if (url := line.strip())]
        return table(urls, [""] * len(urls), [None] * len(urls), [None] * len(urls))

    def _careful(self, lines: list[str]) -> pa.Table:
        rows = (self._row(self.line + i, line) for i, line in enumerate(lines) if line.strip())
        return _table(rows)

    def _row(self, number: int, line: str) -> Row:
        if too_long(line, LINE):
            return "", raw_text(f"line {number}", line), None, _LONG
        url = line.strip()
        if valid(url):
            return url, "", None, None
        return readable(url), raw_text(f"line {number}", line), None, bad(Reason.BAD_RECORD, "invalid UTF-8")


class JsonLines(Lines):
    """Parser of jsonl: a line is an object. ``names``: the keys seen so far."""

    def __init__(self, columns: Columns) -> None:
        super().__init__()
        self._objects = Objects(columns)
        self.names = self._objects.names

    def _sound(self, lines: list[str]) -> pa.Table:
        self._objects.check = False
        try:
            return self._careful(lines)
        except UnicodeEncodeError:  # lone surrogates, written as escapes
            self._objects.check = True
            return self._careful(lines)
        finally:
            self._objects.check = True

    def _row(self, number: int, line: str) -> Row:
        place = f"line {number}"
        if too_long(line, LINE):
            return "", raw_text(place, line), None, _LONG
        try:
            value = _loads(line)
        except (ValueError, RecursionError) as exc:
            return "", raw_text(place, line), None, bad(Reason.BAD_RECORD, readable(f"invalid JSON: {exc}"[:200]))
        return self._objects.row(value, place, line)


class Objects:
    """Rows of JSON values. ``names``: the keys seen so far, in order; ``check``: whether texts may be invalid."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._all = columns.extra == ("*",)
        self._pair = (columns.url, columns.caption)
        self.names: dict[str, None] = {}
        self.check = True

    def row(self, value: object, place: str, text: str) -> Row:
        """The row of a value; a bad one if it is no object, or url or caption is a list or an object."""
        if not isinstance(value, dict):
            return "", raw_text(place, text), None, bad(Reason.BAD_RECORD, "not a JSON object")
        if not value.keys() <= self.names.keys():
            self.names.update(dict.fromkeys(map(readable, value)))
        url, caption = value.get(self._columns.url), value.get(self._columns.caption)
        if type(url) is not str:
            url = _text(url)
        if type(caption) is not str:
            caption = _text(caption)
        if url is None or caption is None:
            problem = bad(Reason.BAD_RECORD, "a list or an object in the place of a text")
            return readable(url or ""), raw_text(place, text), None, problem
        try:
            extra = self._extra(value)
        except RecursionError:
            return readable(url), raw_text(place, text), None, bad(Reason.BAD_RECORD, "nested too deep")
        rest = url if extra is None else url + extra
        if not self.check or valid(rest + caption):
            return url, caption, extra, None
        reason = Reason.BAD_CAPTION if valid(rest) else Reason.BAD_RECORD
        return readable(url), raw_text(place, text), None, bad(reason, "invalid UTF-8 or a lone surrogate")

    def _extra(self, value: dict[str, object]) -> str | None:
        if self._all:
            other = {name: item for name, item in value.items() if name not in self._pair}
        else:
            other = {name: value[name] for name in self._columns.extra if name in value}
        return dumps(other) if other else None


def _text(value: object) -> str | None:
    """Text of a number, truth value or null; None of a list or an object."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return None if isinstance(value, (dict, list)) else str(value)


def _table(rows: Iterable[Row]) -> pa.Table:
    columns = list(zip(*rows, strict=True))
    return table(*columns) if columns else NONE


def array(file: UPath, blocks: Iterator[bytes], columns: Columns) -> Iterator[pa.Table]:
    """Rows of a JSON array of objects.

    Raises:
        UsageError: larger than :data:`ARRAY`, not valid JSON, or without the named columns.
    """
    data = bytearray()
    try:
        for block in blocks:
            data += block
            if len(data) > ARRAY:
                raise UsageError(
                    f"{file} is a JSON array of more than {ARRAY >> 20} MiB, and would have to be read whole",
                    remedy="write it as JSON lines (.jsonl), an object a line: jq -c '.[]' IN > OUT",
                )
        values = _loads(decode(bytes(data))[0])
    except (ValueError, RecursionError, Damaged) as exc:
        raise UsageError(f"{file} is not a readable json file", actual=readable(str(exc))) from exc
    objects = Objects(columns)
    rows = [_element(objects, i, value) for i, value in enumerate(values, 1)]
    if objects.names:
        columns.check(file, objects.names)
    yield _table(rows)


def _element(objects: Objects, number: int, value: object) -> Row:
    url, caption, extra, problem = objects.row(value, "", "")
    if problem:
        try:
            text = json.dumps(value, ensure_ascii=False)
        except RecursionError:
            text = ""
        caption = raw_text(f"element {number}", text)
    return url, caption, extra, problem
