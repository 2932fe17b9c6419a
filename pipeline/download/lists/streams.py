"""Text in blocks from a plain or packed file, in bounded memory, up to the byte where it is damaged."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import IO, Any, Protocol

import pyarrow as pa
from upath import UPath

from pipeline.download.lists.records import one_bad
from schemas.errors import Reason, UsageError

BLOCK = 2 << 20
"""Bytes read at once."""
LINE = 16 << 20
"""Longest line, bytes; of a longer one no more than this is kept, and it is a bad record."""
RAW = 1000
"""Characters of a bad record that are kept."""

_PIECE = 64 << 10
_ENDS = (b"\n", b"\r")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Damaged(Exception):
    """The packed stream of ``file`` is cut off or broken here. What came before is good."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(f"the stream is damaged or cut off here, and nothing after it can be read ({why})")
        self.file = file


class Parser(Protocol):
    """Makes records of text, block after block."""

    def parse(self, data: bytes, last: bool) -> tuple[pa.Table, int]:
        """The records that are whole in ``data``, and how many bytes they are. ``last``: nothing follows."""

    @property
    def line(self) -> int:
        """Number of the line that comes next, from 1."""


def parsed(blocks: Iterator[bytes], parser: Parser) -> Iterator[pa.Table]:
    """What ``parser`` makes of a stream, never holding more than a block and one record (or :data:`LINE`)."""
    data = b""
    try:
        for block in filter(None, blocks):
            data += block
            table, used = parser.parse(data, False)
            data = data[used:]
            yield table
    except Damaged as exc:
        end = 1 + max(map(data.rfind, _ENDS))
        yield parser.parse(data[:end], True)[0]
        # With the file's name: shards of equal length may all be cut off, and each has a row of its own.
        raw = raw_text(f"line {parser.line} of {exc.file}", decode(data[end:])[0])
        yield one_bad("", raw, bad(Reason.BAD_RECORD, str(exc)))
    else:
        yield parser.parse(data, True)[0]


def text_blocks(file: UPath, packed: str | None) -> Iterator[bytes]:
    """Unpacked bytes without a byte order mark; lines are cut after :data:`LINE` + 1 bytes.

    Raises:
        UsageError: UTF-16, or nothing can be read at all.
        Damaged: after the last good byte of a packed stream.
    """
    blocks = _blocks(file, packed)
    first = next(blocks, b"")
    if _is_utf16(first):
        raise UsageError(
            f"{file} is UTF-16 text", expected="UTF-8", remedy="convert it: iconv -f UTF-16 -t UTF-8 IN > OUT"
        )
    yield from _cut_lines(first.removeprefix(b"\xef\xbb\xbf"), blocks)


def _is_utf16(start: bytes) -> bool:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    head = start[:256]
    # Latin text without a mark: every second byte is NUL, and no other.
    zeros = sorted((head[::2].count(0), head[1::2].count(0)))
    return len(head) >= 4 and zeros == [0, len(head) // 2]


def _cut_lines(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    run = 0  # bytes of the line under way
    block: bytes | None = first
    while block is not None:
        ends = [end for end in map(block.find, _ENDS) if end >= 0]
        end = min(ends, default=len(block))
        room = max(0, LINE + 1 - run)
        run = run + len(block) if not ends else len(block) - 1 - max(map(block.rfind, _ENDS))
        yield block if end <= room else block[:room] + block[end:]
        block = next(rest, None)


class _Source:
    """Remembers an error of the storage, to tell it from one of the packed data."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.error: Exception | None = None
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        try:
            return self._raw.read(size)
        except Exception as exc:
            self.error = exc
            raise

    def close(self) -> None:
        self.closed = True


def _blocks(file: UPath, packed: str | None) -> Iterator[bytes]:
    try:
        with file.open("rb") as raw:
            if not packed:
                while block := raw.read(BLOCK):
                    yield block
                return
            source = _Source(raw)
            good = 0
            why = ""
            pieces = _pieces(pa.CompressedInputStream(pa.PythonFile(source, mode="r"), packed), _PIECE)
            out = io.BytesIO()
            while True:
                try:
                    piece = next(pieces, b"")
                except (OSError, pa.ArrowException) as exc:
                    if source.error:
                        raise source.error from exc
                    why = str(exc).partition("\n")[0]
                    break
                good += len(piece)
                out.write(piece)
                if out.tell() >= BLOCK or not piece:
                    yield out.getvalue()
                    out = io.BytesIO()
                if not piece:
                    return
        out.write(_last_bytes(file, packed, good))
        if not good and not out.tell():
            raise UsageError(f"{file} is no readable {packed} stream", actual=why)
        yield out.getvalue()
    except OSError as exc:
        raise UsageError(f"{file} cannot be read", actual=str(exc).partition("\n")[0]) from exc
    raise Damaged(file.name, why)


def _pieces(stream: Any, size: int) -> Iterator[bytes]:
    while piece := stream.read(size):
        yield piece


def _last_bytes(file: UPath, packed: str, good: int) -> bytes:
    """What can be unpacked after ``good`` bytes: a read that fails keeps its bytes, so they are read one by one."""
    out = io.BytesIO()
    with file.open("rb") as raw:
        stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), packed)
        while good:
            good -= len(stream.read(min(good, _PIECE)))
        try:
            for byte in _pieces(stream, 1):
                out.write(byte)
        except (OSError, pa.ArrowException):
            pass
    return out.getvalue()


def decode(data: bytes) -> tuple[str, bool]:
    """Text, and whether it is all valid UTF-8. Invalid bytes become surrogates, see :func:`valid`."""
    try:
        return data.decode(), True
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape"), False


def valid(text: str) -> bool:
    """Whether a text has no surrogate in it, so that it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(text: str) -> str:
    """``text`` with U+FFFD for every surrogate."""
    return _SURROGATE.sub("\ufffd", text)


def raw_text(place: str, text: str) -> str:
    """A bad record as a caption: where it is, then its text, cut."""
    return readable(f"{place}: {text[:RAW]}"[:RAW])


def too_long(line: str, limit: int) -> bool:
    """Whether a line of :func:`decode` has more than ``limit`` bytes."""
    return len(line) > limit // 4 and len(line.encode("utf-8", "surrogateescape")) > limit


def line_ends(data: bytes) -> int:
    r"""How many lines end in ``data``: \n, \r\n and a lone \r."""
    ends = data.count(b"\n")
    return ends + data.count(b"\r") - data.count(b"\r\n") if b"\r" in data else ends


def whole_lines(data: bytes, last: bool) -> int:
    r"""Length of the lines of ``data`` that are whole. A final \r may be half of \r\n."""
    return len(data) if last else 1 + max(data.rfind(b"\n"), data.rfind(b"\r", 0, max(0, len(data) - 1)))


def bad(reason: Reason, what: str) -> str:
    """Text of a problem: the reason, then what is wrong."""
    return f"{reason}: {what}"
