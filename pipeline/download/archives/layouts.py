"""Find archives: tars, Parquet files with images and folders of files, with img2dataset's metadata beside them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from upath import UPath

from schemas.errors import UsageError

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "avif", "bmp", "tif", "tiff"))
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PARQUET = ".parquet"


@dataclass(frozen=True)
class Archive:
    """Where samples are. ``path`` is absolute; ``metadata``: img2dataset's Parquet file beside it, or None."""

    path: str
    layout: Literal["tar", "parquet", "files"]
    metadata: str | None = None


def is_tar(name: str) -> bool:
    """Whether a file is a tar, by its name."""
    return name.lower().endswith(TAR_SUFFIXES)


def find_archives(sources: Sequence[str]) -> list[Archive]:
    """The archives that files, folders (searched all through) and globs name, sorted, each once.

    Links to folders are not followed, hidden files and folders not looked at.

    Raises:
        UsageError: a source names none.
    """
    files: set[str] = set()
    for source in sources:
        found = set(_listed(source))
        if not any(_is_ours(name) for name in found):
            raise UsageError(
                f"--source {source}: no archive found",
                expected="tars (" + ", ".join(TAR_SUFFIXES) + "), Parquet files, or folders of images",
                remedy="check the path",
            )
        files |= found
    return sorted(_archives(files), key=lambda a: a.path)


def _archives(files: set[str]) -> Iterator[Archive]:
    tars = {name for name in files if is_tar(name)}
    parquets = {name for name in files if name.endswith(_PARQUET)}
    folders = {_folder(name) for name in files if _suffix(name) in IMAGE_SUFFIXES}
    for path, layout in [*((t, "tar") for t in tars), *((f, "files") for f in folders)]:
        beside = (_stem(path) if layout == "tar" else path) + _PARQUET
        there = beside in parquets or UPath(beside).exists()
        parquets.discard(beside)
        yield Archive(path, "tar" if layout == "tar" else "files", beside if there else None)
    for path in parquets:
        tar = path.removesuffix(_PARQUET) + ".tar"
        if UPath(tar).exists():  # the Parquet file alone was named
            yield Archive(tar, "tar", path)
        else:
            yield Archive(path, "parquet")


def _listed(source: str) -> Iterator[str]:
    path = UPath(source)
    local = path.protocol in ("", "file")
    if local:
        path = path.absolute()
    if path.is_dir():
        yield from _walk(str(path)) if local else _find_remote(path)
    elif path.is_file():
        yield str(path) if local else path.fs.unstrip_protocol(path.path)
    elif local:
        for hit in glob.glob(str(path), recursive=True):  # noqa: PTH207
            yield from _walk(hit) if Path(hit).is_dir() else [hit]
    else:
        for hit in path.fs.glob(path.path):
            yield from _listed(path.fs.unstrip_protocol(hit))


def _walk(folder: str) -> Iterator[str]:
    for base, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not _hidden(f)]
        yield from (os.path.join(base, n) for n in names if not _hidden(n))  # noqa: PTH118


def _find_remote(path: UPath) -> Iterator[str]:
    root = path.path.rstrip("/")
    for name in path.fs.find(path.path):
        if not any(_hidden(part) for part in name.removeprefix(root).split("/")):
            yield path.fs.unstrip_protocol(name)


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _is_ours(name: str) -> bool:
    return is_tar(name) or name.endswith(_PARQUET) or _suffix(name) in IMAGE_SUFFIXES


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _stem(tar: str) -> str:
    suffix = next(s for s in TAR_SUFFIXES[::-1] if tar.lower().endswith(s))
    return tar[: -len(suffix)]
