"""Segment files: written with their sha256, checked against it, mapped into memory."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from upath import UPath

from pipeline.storage import storage_error
from schemas.cards import Segment
from schemas.errors import CardError

_HASHED = 16 << 20
_COPIED = 16 << 20
_REMEDY = "build it again: clipmill index --rebuild"


class Hashed:
    """A file to write to, which keeps the sha256 and the number of the bytes that went through."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha256, self.bytes = file, hashlib.sha256(), 0

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._sha256.update(view)
        self._file.write(view)
        self.bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True

    def tell(self) -> int:
        return self.bytes

    @staticmethod
    def writable() -> bool:
        return True


@contextmanager
def written(path: UPath) -> Iterator[Hashed]:
    """A file to be written from the beginning to the end. It is there once all of it is, or not at all.

    Raises:
        WorkspaceError: it cannot be written, or the disk is full.
    """
    local = path.protocol in ("", "file")
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}") if local else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            yield Hashed(file)
        if local:
            aside.replace(path)
    except BaseException as exc:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise storage_error(exc, str(path)) from exc
        raise


def local_file(path: UPath, segment: Segment) -> str:
    """The path of the file on this machine; one from an object store is copied to the user's cache, once.

    Raises:
        CardError: it is not there, or of another size.
    """
    if path.protocol in ("", "file"):
        _check_size(path, segment, str(path))
        return str(path)
    root = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    copy = Path(root) / "clipmill" / "records" / f"{segment.sha256}.arrow"
    if not copy.exists() or copy.stat().st_size != segment.bytes:
        _copy(path, copy)
    _check_size(path, segment, str(copy))
    return str(copy)


def check(file: str, segment: Segment) -> None:
    """Raises CardError unless the file's bytes are those that its card describes."""
    digest = hashlib.sha256()
    with pa.memory_map(file) as source:
        view = memoryview(source.read_buffer())
        for start in range(0, len(view), _HASHED):
            digest.update(view[start : start + _HASHED])  # without the GIL
    if digest.hexdigest() != segment.sha256:
        raise CardError(
            f"{file} is not the segment of records that its card describes",
            expected=f"sha256 {segment.sha256}",
            actual=digest.hexdigest(),
            remedy=_REMEDY,
        )


def mapped(file: str) -> list[pa.RecordBatch]:
    """The record batches of a file, as views of its memory map: it stays as long as one of them is held.

    Raises:
        CardError: it is no Arrow IPC file.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(file))
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as exc:
        raise CardError(f"{file} is no readable segment of records", actual=str(exc), remedy=_REMEDY) from exc


def _check_size(path: UPath, segment: Segment, file: str) -> None:
    try:
        size = Path(file).stat().st_size
    except OSError as exc:
        raise CardError(f"cannot read the records {path}", actual=exc.strerror or str(exc), remedy=_REMEDY) from exc
    if size != segment.bytes:
        raise CardError(
            f"{path} is not the segment of records that its card describes (truncated or changed)",
            expected=f"{segment.bytes} bytes",
            actual=f"{size}",
            remedy=_REMEDY,
        )


def _copy(path: UPath, copy: Path) -> None:
    aside = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, aside.open("wb") as target:
            while data := source.read(_COPIED):
                target.write(data)
        aside.replace(copy)
    except FileNotFoundError as exc:
        raise CardError(f"the records {path} are not there", remedy=_REMEDY) from exc
    except OSError as exc:
        raise storage_error(exc, str(copy)) from exc
    finally:
        aside.unlink(missing_ok=True)
