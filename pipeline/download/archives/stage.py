"""Read images that are there already: webdataset tars, and what img2dataset writes. Nothing is extracted to disk.

img2dataset's metadata, beside a tar or a folder, also tells of the images that it could not get: they become rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from pipeline.download.archives.layouts import IMAGE_SUFFIXES, Archive
from pipeline.download.archives.samples import (
    Grouper,
    Pair,
    RowMaker,
    Sample,
    from_row,
    pair_of,
    split_name,
)
from pipeline.download.archives.tars import Broken, Gunzip, Member, TarReader
from schemas.configs import DownloadConfig
from schemas.errors import ClipmillError, Reason
from schemas.tables import IMAGES, PAIRS

Known = Callable[[NDArray[np.int64]], NDArray[np.bool_]]
"""Which of these keys need no row any more, bool[N]."""

_METADATA = frozenset(("key", "url", "status"))
"""Columns by which img2dataset's metadata is known."""
_WITH_IMAGE = frozenset(("success", None))
_STATS = re.compile(r"\d+_stats\.json")
_AHEAD = 256
_BYTES_AHEAD = 32 << 20
"""Samples, and bytes of them, that are read before it is asked which are known."""
_PARQUET_ROWS = 64


class BrokenArchive(ClipmillError):
    """An archive that is cut off or damaged. What stands before the damage was read."""


@dataclass
class Batch:
    """Rows of the tables pairs and images, with the same keys in the same order, and what became no row.

    ``known``: samples whose key is known; ``doubles``: whose key came before in the archive; ``ignored``: files that
    belong to no sample, and links, devices and names that leave the archive.
    """

    pairs: pa.Table
    images: pa.Table
    known: int = 0
    doubles: int = 0
    ignored: int = 0


class ArchiveStage:
    """An archive -> batches of rows of pairs and images, each of ``config.shard_size`` rows or ``memory`` bytes.

    Every sample ends as one row, ok or with its reason, but for those whose key is known (they are not decoded) or
    came before. ``as_is``: see :class:`RowMaker`. The last batch may be empty; the counts of all add up.
    """

    def __init__(self, config: DownloadConfig, run: str, *, as_is: bool = False) -> None:
        self.config, self.run = config, run
        self._row = RowMaker(config, run, as_is=as_is)

    def __call__(self, archive: Archive, known: Known) -> Iterator[Batch]:
        """Raises BrokenArchive after the last batch that could be read."""
        source = _Source(archive, self.config.max_bytes)
        rows, seen = _Rows(), set[int]()
        for group in _groups(source, known):
            keys = np.array([pair.key for _, pair in group], np.int64)
            for (sample, pair), there in zip(group, known(keys), strict=True):
                if pair.key in seen:
                    rows.doubles += 1
                elif there:
                    rows.known += 1
                else:
                    rows.add(self._pair_row(pair, sample, archive), self._row(sample, pair))
                seen.add(pair.key)
                if len(rows.images) >= self.config.shard_size or rows.bytes >= self.config.memory:
                    yield rows.batch()
                    rows = _Rows()
            group.clear()  # before more is read
        yield rows.batch(source.ignored)
        if source.broken:
            raise BrokenArchive(
                f"{archive.path}: {source.broken}",
                remedy="mend it, or fetch it again, and run the same command again: what was read is kept",
            )

    def _pair_row(self, pair: Pair, sample: Sample, archive: Archive) -> dict[str, Any]:
        return {
            "pair_key": pair.key,
            "url": pair.url,
            "caption": pair.caption,
            "source": archive.path,
            "extra": pair.extra,
            "problem": _unreadable(sample),
            "added_run": self.run,
        }


@dataclass
class _Rows:
    """The batch under way."""

    pairs: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0
    known: int = 0
    doubles: int = 0

    def add(self, pair: dict[str, Any], image: dict[str, Any]) -> None:
        self.pairs.append(pair)
        self.images.append(image)
        self.bytes += len(image["image"] or b"")

    def batch(self, ignored: int = 0) -> Batch:
        pairs = pa.Table.from_pylist(self.pairs, schema=PAIRS.schema)
        images = pa.Table.from_pylist(self.images, schema=IMAGES.schema)
        return Batch(pairs, images, self.known, self.doubles, ignored)


def _groups(source: _Source, known: Known) -> Iterator[list[tuple[Sample, Pair]]]:
    """Samples with their pairs, some at a time. Where all of the metadata is known, the images are not read."""
    rows = [(sample, pair_of(sample, source.uri)) for sample in source.described()]
    if rows and known(np.array([pair.key for _, pair in rows], np.int64)).all():
        yield rows
        return
    group: list[tuple[Sample, Pair]] = []
    held = 0
    for sample in source:
        group.append((sample, pair_of(sample, source.uri)))
        held += len(sample.image or b"")
        if len(group) >= _AHEAD or held >= _BYTES_AHEAD:
            yield group
            group, held = [], 0
    if group:
        yield group


class _Source:
    """The samples of an archive, and then of its metadata's other rows. ``broken`` says why it ended too early."""

    def __init__(self, archive: Archive, max_bytes: int) -> None:
        self._archive, self._max_bytes = archive, max_bytes
        path = UPath(archive.path)
        self.uri = path.as_uri() if path.protocol in ("", "file") else archive.path
        self.ignored, self.broken = 0, ""
        self._metadata = self._read_metadata()

    def __iter__(self) -> Iterator[Sample]:
        read = {"tar": self._tar, "files": self._files, "parquet": self._parquet}[self._archive.layout]
        try:
            yield from read()
        except Broken as exc:
            self.broken = str(exc)
        for row in self._metadata.values():
            # Behind the damage there may be an image yet.
            if not self.broken or row.get("status") not in _WITH_IMAGE:
                yield from_row(row, None, self._max_bytes)

    def described(self) -> Iterator[Sample]:
        """What the metadata beside the archive tells of it, without images."""
        return (from_row(row, None, self._max_bytes) for row in self._metadata.values())

    def _tar(self) -> Iterator[Sample]:
        path = UPath(self._archive.path)
        with path.open("rb") as raw:
            stream = raw if path.name.lower().endswith(".tar") else Gunzip(raw)
            reader, group = TarReader(stream, self._max_bytes), Grouper(self._metadata)
            try:
                yield from group(reader)
            finally:
                self.ignored = reader.strange + group.ignored

    def _files(self) -> Iterator[Sample]:
        group = Grouper(self._metadata)
        yield from group(self._members())
        self.ignored += group.ignored

    def _members(self) -> Iterator[Member]:
        """The folder's files, those of one sample beside each other. Links are not followed."""
        paths = [p for p in UPath(self._archive.path).iterdir() if not _STATS.fullmatch(p.name)]
        for path in sorted(paths, key=lambda p: split_name(p.name) or (p.name, "")):
            if path.is_symlink():
                self.ignored += 1
            elif path.is_file() and not path.name.startswith("."):
                size = path.stat().st_size
                yield Member(path.name, size, path.read_bytes() if size <= self._max_bytes else None)

    def _parquet(self) -> Iterator[Sample]:
        with ExitStack() as stack:
            try:
                file = pq.ParquetFile(stack.enter_context(UPath(self._archive.path).open("rb")))
                names = set(file.schema_arrow.names)
                binary = [f.name for f in file.schema_arrow if pa.types.is_binary(f.type) or _large(f.type)]
                column = next((n for n in binary if n.lower() in IMAGE_SUFFIXES or n == "image"), None)
                if column is None and not names >= _METADATA:
                    raise Broken("neither a column of images (jpg, png, webp) nor img2dataset's metadata")
                rows = (row for batch in file.iter_batches(_PARQUET_ROWS) for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    image = row.pop(column) if column else None
                    row["key"] = row.get("key") or str(number)
                    if image is not None:
                        yield from_row(row, image, self._max_bytes)
                    elif column or row["status"] not in _WITH_IMAGE:
                        self._metadata[row["key"]] = row  # after the images: the same pair may be among them
                    else:
                        raise Broken("its images are missing: there is neither a tar nor a folder of its name")
            except (pa.ArrowException, OSError) as exc:
                raise Broken(f"it cannot be read: {str(exc).partition(chr(10))[0]}") from exc

    def _read_metadata(self) -> dict[str, Mapping[str, Any]]:
        """Rows by img2dataset's key; none where the file beside the archive is another one."""
        if self._archive.metadata is None:
            return {}
        try:
            with UPath(self._archive.metadata).open("rb") as raw:
                file = pq.ParquetFile(raw)
                if not set(file.schema_arrow.names) >= _METADATA:
                    return {}
                return {row["key"]: row for row in file.read().to_pylist()}
        except (pa.ArrowException, OSError) as exc:
            self.broken = f"its metadata {self._archive.metadata} cannot be read: {exc}".partition("\n")[0]
            return {}


def _unreadable(sample: Sample) -> str | None:
    """Why the sample itself is no good, as the column ``problem`` tells it; null where only its image is bad."""
    if sample.problem is None or sample.problem[0] not in (Reason.BAD_RECORD, Reason.BAD_CAPTION):
        return None
    return f"{sample.problem[0]}: {sample.problem[1]}"


def _large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_binary(kind))
