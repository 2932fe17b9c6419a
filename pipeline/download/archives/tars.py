"""Read the members of a tar one after the other, from a stream, and never write one to disk.

The standard library's ``tarfile`` stops in silence at a damaged header and at a file that was cut between two
members, and reads an extended header whole, whatever its size. Here both are told, and capped.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BLOCK = tarfile.BLOCKSIZE
_HEADER_BYTES = 1 << 20
"""Most bytes of one extended header (a long name, PAX records): real ones have some hundred."""
_STEP = 1 << 20
_WITHOUT_DATA = frozenset(
    (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
)


class Broken(Exception):
    """The tar ends too early or is damaged: what came before is good, what follows cannot be read."""


@dataclass(frozen=True)
class Member:
    """A member that holds bytes. ``data`` is None where it has more than allowed, and was passed over."""

    name: str
    size: int
    data: bytes | None


class TarReader:
    """Iterates over the regular files of a tar. Links, devices and names that leave the folder are passed over.

    ``stream`` has ``read(n)``, and ``seek`` if it says ``seekable()``. ``strange`` counts what was passed over.
    """

    def __init__(self, stream: Any, max_bytes: int) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self.strange = 0

    def __iter__(self) -> Iterator[Member]:
        """Raises Broken after the last whole member, where the tar is cut off or damaged."""
        more: dict[str, str] = {}
        for header in self._headers():
            kind = header.type
            if kind == tarfile.GNUTYPE_LONGNAME:
                more["path"] = self._extended(header).rstrip(b"\0").decode("utf-8", "surrogateescape")
                continue
            if kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                more |= _pax(self._extended(header))
                continue
            name, size = more.get("path", header.name), _size(more.get("size"), header.size)
            special = kind in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
            if not special:
                more = {}
            if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) or not _inside(name):
                self._pass_over(header, size)
                self.strange += 0 if special or kind == tarfile.DIRTYPE else 1
            elif not name.endswith("/"):  # old tars mark folders so
                yield Member(name, size, self._payload(size))

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        """Headers until the end of the archive; what stands behind it is read if it is another archive."""
        ended = False
        while block := self._read(_BLOCK):
            if len(block) < _BLOCK:
                if ended:
                    return
                raise Broken("it is cut off inside a header")
            if not block.strip(b"\0"):
                ended = True
                continue
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as exc:
                if ended:
                    return  # other bytes behind the archive's end
                raise Broken(f"a damaged header: {exc}") from exc
            if header.size < 0:
                raise Broken("a header with a negative size")
            ended = False
            yield header
        if not ended:
            raise Broken("it ends without an end mark: it seems to be cut off")

    def _extended(self, header: tarfile.TarInfo) -> bytes:
        if header.size > _HEADER_BYTES:
            raise Broken(f"an extended header of {header.size:,} bytes")
        return self._exactly(header.size)

    def _payload(self, size: int) -> bytes | None:
        if size <= self._max_bytes:
            return self._exactly(size)
        self._skip(_padded(size))
        return None

    def _pass_over(self, header: tarfile.TarInfo, size: int) -> None:
        if header.type == tarfile.GNUTYPE_SPARSE:
            more = bool(header._sparse_structs[1])  # type: ignore[attr-defined]
            while more:
                more = bool(self._exactly(_BLOCK)[504])
        if header.type not in _WITHOUT_DATA:
            self._skip(_padded(size))

    def _exactly(self, size: int) -> bytes:
        data = self._read(_padded(size))
        if len(data) < size:
            raise Broken("it is cut off inside a member")
        return data[:size]

    def _skip(self, size: int) -> None:
        if self._stream.seekable():
            if size:  # the last byte is read: a seek tells nothing of the end
                self._stream.seek(size - 1, 1)
                if not self._read(1):
                    raise Broken("it is cut off inside a member")
            return
        while size > 0:
            got = len(self._read(min(size, _STEP)))
            if not got:
                raise Broken("it is cut off inside a member")
            size -= got

    def _read(self, size: int) -> bytes:
        """Up to ``size`` bytes, fewer only at the end; memory grows with what comes, not with what is promised."""
        parts, left = [], size
        while left and (part := self._stream.read(min(left, _STEP))):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


class Gunzip:
    """A gzip stream, unpacked as it is read, up to the very byte where it is cut off or damaged."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._inner: Any = None
        self._packed = b""

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        """1 to ``size`` bytes; none at the end. Raises Broken where no further byte can be unpacked."""
        while True:
            if not self._packed:
                self._packed = self._stream.read(_STEP)
            if not self._packed and self._inner is None:
                return b""
            if self._inner is None:
                if not self._packed.strip(b"\0"):  # padding between and behind the members
                    self._packed = b""
                    continue
                self._inner = zlib.decompressobj(wbits=31)
            at_end = not self._packed
            try:
                data: bytes = self._inner.decompress(self._packed, size)
            except zlib.error as exc:
                raise Broken(f"its compression is damaged: {exc}") from exc
            self._packed = self._inner.unconsumed_tail
            if self._inner.eof:
                self._packed, self._inner = self._inner.unused_data, None
            if data:
                return data
            if at_end and self._inner is not None:
                raise Broken("its compressed stream is cut off")


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _inside(name: str) -> bool:
    """Neither absolute nor climbing out. (Nothing is extracted: such a name is a sign of a hostile archive.)"""
    return not name.startswith(("/", "\\")) and ".." not in name.replace("\\", "/").split("/")


def _size(text: str | None, size: int) -> int:
    if text is None:
        return size
    if not text.isdigit() or len(text) > 20:
        raise Broken("an extended header with a size that is no number")
    return int(text)


def _pax(data: bytes) -> dict[str, str]:
    """``path`` and ``size`` of PAX records: lines of ``LENGTH KEY=VALUE``.

    Source: IEEE Std 1003.1-2001, pax interchange format.
    """
    found, at = {}, 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 10)
        length = data[at:space] if space > at else b""
        end = at + int(length) if length.isdigit() else at
        key, equals, value = data[space + 1 : end].partition(b"=")
        if not equals or end > len(data):
            raise Broken("a damaged extended header")
        if key in (b"path", b"size"):
            found[key.decode()] = value.removesuffix(b"\n").decode("utf-8", "surrogateescape")
        at = end
    return found
