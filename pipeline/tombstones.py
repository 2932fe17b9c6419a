"""Keys that no search finds any more, in any version of an index: a file for each deletion, never changed.

A deletion holds from the moment its file is there. Readers ask before every search, so asking must cost next to
nothing: one stat of the folder while nothing was added.
"""

from __future__ import annotations

import io
import os
import time
import uuid
from threading import Lock

import numpy as np
from numpy.typing import ArrayLike
from upath import UPath

from pipeline.keys import Keys, union
from pipeline.storage import storage_error, write_atomic
from schemas.errors import UsageError, WorkspaceError

_SETTLED_NS = 2_000_000_000
"""A folder's time of change is trusted if it is so much older than the look at it. Clocks tick: of two files made
within one tick the second leaves the time as it was."""
_LIST_SECONDS = 1.0
"""An object store has no such time: there the folder is listed, at most so often."""


class Tombstones:
    """The deleted keys of one encoder's indices. Thread-safe.

    Args:
        folder: ``indices/ENCODER/deleted``; it need not be there.
    """

    def __init__(self, folder: UPath) -> None:
        self.folder = folder
        self._local = os.fspath(folder) if folder.protocol in ("", "file") else None
        self._lock = Lock()
        self._files: set[str] = set()
        self._keys = _sorted([])
        self._trusted = -1
        """The folder's time of change in ns when it was last listed, -1 where that says nothing."""
        self._listed = float("-inf")

    def add(self, keys: ArrayLike) -> None:
        """Delete keys, int64 [N], for good. It holds for every search that begins after this returns.

        Raises:
            UsageError: they are no keys.
            WorkspaceError: the file cannot be written.
        """
        rows = np.atleast_1d(np.asarray(keys))
        if not rows.size:
            return
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() > np.iinfo(np.int64).max:
            raise UsageError("these are no keys", expected="non-negative int64", actual=str(keys)[:100])
        file = io.BytesIO()
        np.save(file, union(rows.astype(np.int64)))
        try:
            write_atomic(self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.npy", file.getvalue())
        except OSError as exc:
            raise storage_error(exc, str(self.folder)) from exc
        with self._lock:
            self._trusted, self._listed = -1, float("-inf")

    def keys(self) -> Keys:
        """All deleted keys, int64, sorted; the very same array as long as nothing was added.

        Raises:
            WorkspaceError: a file cannot be read.
        """
        changed = self._changed()
        if changed is not None and changed == self._trusted:
            return self._keys
        with self._lock:
            # Before listing: what comes in between changes the time, and is seen the next time at the latest.
            changed, now = self._changed(), time.time_ns()
            if changed is None and time.monotonic() - self._listed < _LIST_SECONDS:
                return self._keys
            new = self._names() - self._files
            if new:
                self._keys = _sorted([self._keys, *(self._read(name) for name in sorted(new))])
                self._files |= new
            self._listed = time.monotonic()
            settled = changed is not None and now - changed > _SETTLED_NS
            self._trusted = changed if changed is not None and settled else -1
            return self._keys

    @property
    def count(self) -> int:
        return len(self.keys())

    def _changed(self) -> int | None:
        """The folder's time of change in ns, 0 where there is none; None of an object store."""
        if self._local is None:
            return None
        try:
            return os.stat(self._local).st_mtime_ns  # noqa: PTH116 (at every search: a path object costs more than the call)
        except FileNotFoundError:
            return 0

    def _names(self) -> set[str]:
        if self._local is not None:
            try:
                names = os.listdir(self._local)  # noqa: PTH208 (as above)
            except FileNotFoundError:
                names = []
        else:
            names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        return {name for name in names if name.endswith(".npy") and not name.startswith(".")}

    def _read(self, name: str) -> Keys:
        path = self.folder / name
        try:
            found = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
            if found.ndim != 1 or found.dtype != np.int64:
                raise ValueError(f"{found.dtype} {list(found.shape)}")
        except (OSError, ValueError, EOFError) as exc:
            raise WorkspaceError(
                f"{path} is no readable list of deleted keys",
                expected="a .npy file of int64 [N]",
                actual=str(exc),
                remedy="restore it: without it, what was deleted would be found again",
            ) from exc
        return np.asarray(found, np.int64)


def _sorted(parts: list[Keys]) -> Keys:
    keys = union(*parts)
    keys.flags.writeable = False
    return keys
