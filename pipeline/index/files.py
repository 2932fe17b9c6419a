"""Index files: written aside and renamed, with the digest that the card keeps; opened from the memory map."""

from __future__ import annotations

import hashlib
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from upath import UPath

from pipeline.index.arrays import load_arrays
from pipeline.index.building import Vectors
from pipeline.index.extended import Extended
from pipeline.keys import Keys
from pipeline.storage import storage_error, write_atomic
from schemas.cards import IndexFile, SideFile
from schemas.errors import CardError

_HASHED = 65_536
"""Vectors hashed at once."""


def write_index(index: Any, path: UPath) -> tuple[int, str]:
    """Write an index; its bytes and sha256. A reader sees the whole file or none.

    Raises:
        WorkspaceError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.protocol not in ("", "file"):
            data = to_bytes(index)
            write_atomic(path, data)
            return len(data), hashlib.sha256(data).hexdigest()
        aside = Path(str(path.with_name(f".{path.name}.{uuid.uuid4().hex}")))
        try:
            faiss.write_index(index, str(aside))
            found = aside.stat().st_size, file_sha256(aside)
            aside.replace(str(path))
        finally:
            aside.unlink(missing_ok=True)
    except OSError as exc:
        raise storage_error(exc, str(path)) from exc
    except RuntimeError as exc:  # FAISS's own word for a failed write
        raise storage_error(OSError(str(exc).strip().splitlines()[-1]), str(path)) from exc
    return found


def open_index(path: str | UPath, file: IndexFile, verify: bool = True, mapped: bool = True) -> faiss.Index | Extended:
    """The index that a card describes, with what lies beside it: see :func:`open_file`."""
    main = open_file(UPath(path), file.bytes, file.sha256, verify=verify, mapped=mapped)
    return main if file.side is None else Extended(main, *open_side(UPath(path).parent, file.side, verify))


def open_side(folder: UPath, file: SideFile, verify: bool = True) -> tuple[faiss.Index, Keys]:
    """The small index beside a large one, and the keys of that one which no longer count.

    Raises:
        CardError: a file is gone, or another one.
    """
    index = open_file(folder / file.path, file.bytes, file.sha256, verify=verify)
    return index, load_arrays(folder / file.gone_path, file.gone_sha256)["keys"].astype(np.int64)


def open_file(path: UPath, size: int, sha256: str, *, verify: bool = True, mapped: bool = True) -> faiss.Index:
    """An index of so many bytes with this digest. A local file is mapped into memory, to be searched.

    Args:
        verify: compare the sha256, not the size alone.
        mapped: False for an index that is to be changed: it is read whole.

    Raises:
        CardError: the file is gone, or another one.
    """
    try:
        found = path.stat().st_size
        if found != size:
            raise _broken(path, f"{size} bytes", f"{found} bytes")
        if path.protocol not in ("", "file"):
            return from_bytes(path.read_bytes(), sha256, str(path))
        if verify and (digest := file_sha256(Path(str(path)))) != sha256:
            raise _broken(path, f"sha256 {sha256}", digest)
        return _read(str(path), mapped)
    except OSError as exc:
        raise _broken(path, "a file", str(exc)) from exc
    except RuntimeError as exc:
        raise _broken(path, "an index", str(exc).strip().splitlines()[-1]) from exc


def _read(path: str, mapped: bool) -> faiss.Index:
    if not mapped:
        return faiss.read_index(path)
    return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)


def to_bytes(index: faiss.Index) -> bytes:
    return bytes(faiss.serialize_index(index).tobytes())


def from_bytes(data: bytes, sha256: str, where: str) -> faiss.Index:
    """Raises CardError unless the bytes are those that the card describes."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _broken(where, f"sha256 {sha256}", "another one")
    return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))


def file_sha256(path: Path) -> str:
    """Of a local file, a chunk at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(where: object, expected: str, actual: str) -> CardError:
    return CardError(
        f"{where} is not the index that its card describes (truncated or changed)",
        expected=expected,
        actual=actual,
        remedy="build it again: clipmill index --rebuild",
    )


def keys_sha256(keys: Keys) -> str:
    """Over the sorted keys."""
    return hashlib.sha256(np.sort(np.asarray(keys, dtype="<i8")).tobytes()).hexdigest()


def vectors_sha256(keys: Keys, *vectors: Vectors) -> str:
    """Over vectors [N, D] of each kind, in the order of their keys [N]."""
    order, digest = np.argsort(keys), hashlib.sha256()
    for rows in vectors:
        for start in range(0, len(order), _HASHED):
            digest.update(rows[order[start : start + _HASHED]].tobytes())
    return digest.hexdigest()


def copy_file(source: UPath, target: UPath) -> None:
    """The same file under another name: a hard link where that can be, since neither is ever changed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.protocol in ("", "file"):
            with suppress(OSError):
                Path(str(target)).unlink(missing_ok=True)
                Path(str(target)).hardlink_to(str(source))
                return
        write_atomic(target, source.read_bytes())
    except OSError as exc:
        raise storage_error(exc, str(target)) from exc
