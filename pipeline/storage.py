"""Writing files so that a reader sees the old or the new one, and telling users why a write failed."""

from __future__ import annotations

import errno
import uuid

from upath import UPath

from schemas.errors import WorkspaceError


def write_atomic(path: UPath, data: bytes) -> None:
    """Write aside, then rename: a reader sees the old file or the new one. (An object store's PUT is atomic.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.protocol in ("", "file"):
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            aside.write_bytes(data)
            aside.replace(path)
        finally:
            if aside.exists():
                aside.unlink()
    else:
        path.write_bytes(data)


def storage_error(exc: OSError, where: str) -> WorkspaceError:
    """What to tell a user of a failed write."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some room and run the same command again: it continues where it stopped"
    elif exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "choose a writable --workspace, or change its permissions"
    else:
        remedy = "check the path given as --workspace"
    return WorkspaceError(f"cannot write to {where}", actual=exc.strerror or str(exc), remedy=remedy)
