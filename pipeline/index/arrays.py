"""Arrays in files beside an index (.npz), with a digest over all of them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from pipeline.storage import write_atomic
from schemas.errors import CardError

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Kept:
    """A dataclass whose fields are arrays, kept in a file."""

    def save(self, path: UPath) -> None:
        """As .npz, with a digest of itself."""
        save_arrays(path, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: UPath) -> Self:
        """Raises CardError where the file is not there, or not what was written."""
        try:
            return cls(**load_arrays(path))
        except TypeError as exc:
            raise _broken(path, str(exc)) from exc


def save_arrays(path: UPath, arrays: Arrays) -> str:
    """Write named arrays; their digest.

    Raises:
        OSError: they cannot be written.
    """
    out, digest = io.BytesIO(), _digest(arrays)
    np.savez(out, digest=np.frombuffer(digest, np.uint8), **arrays)  # type: ignore[arg-type]
    write_atomic(path, out.getvalue())
    return digest.hex()


def load_arrays(path: UPath, digest: str | None = None) -> dict[str, NDArray[np.generic]]:
    """What :func:`save_arrays` wrote; ``digest``: that was it.

    Raises:
        CardError: the file is not there, or not what was written.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        own = arrays.pop("digest").tobytes()
    except Exception as exc:  # zip, zlib, numpy and the file system each have their own
        raise _broken(path, str(exc)) from exc
    if own != _digest(arrays) or digest not in (None, own.hex()):
        raise _broken(path, "another digest than its own")
    return arrays


def _broken(path: UPath, actual: str) -> CardError:
    return CardError(
        f"{path} is not what was written beside the index (truncated or changed)",
        actual=actual,
        remedy="build it again: clipmill index --rebuild",
    )


def _digest(arrays: Arrays) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.digest()
