"""Files and folders that have no name before they are whole, on disks and in object stores."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from upath import UPath

from pipeline.storage import storage_error
from schemas.errors import WorkspaceError

Put = Callable[[str, bytes], None]
_PART = ".part-"


@contextmanager
def whole_file(path: UPath) -> Iterator[IO[bytes]]:
    """A file to write. It gets its name at the end; after an error there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        # An object store would take a half-written object for a whole one when it is closed by an error.
        with tempfile.NamedTemporaryFile() as local:
            yield local
            local.flush()
            path.fs.put_file(local.name, path.path)
        return
    aside = _aside(path)
    try:
        with aside.open("wb") as file:
            yield file
        aside.replace(path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: UPath) -> Iterator[Put]:
    """``put(name, data)`` writes a file of a folder, which gets its name at the end (but in object stores)."""
    if not is_local(path):
        yield lambda name, data: (path / name).write_bytes(data)
        return
    aside = _aside(path)
    aside.mkdir(parents=True)
    try:
        yield lambda name, data: (aside / name).write_bytes(data)
        if not path.exists():  # else a worker was killed after this: the folder is the same
            aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_parts(folder: UPath) -> None:
    """Remove what killed workers left half-written."""
    if not is_local(folder):
        return
    for path in folder.glob(f".*{_PART}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_local(path: UPath) -> bool:
    return path.protocol in ("", "file")


def output_error(exc: OSError, where: str) -> WorkspaceError:
    """What to tell a user of a failed write of the output."""
    told = storage_error(exc, where)
    return WorkspaceError(told.problem, actual=told.actual, remedy=told.remedy.replace("--workspace", "--output"))


def _aside(path: UPath) -> UPath:
    return path.with_name(f".{path.name}{_PART}{uuid.uuid4().hex}")
