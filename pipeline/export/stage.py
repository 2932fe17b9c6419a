"""The stage: the keys of a shard -> its files, none of which has its final name before it is whole."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from pipeline.export.files import Put, output_error, whole_file, whole_folder
from pipeline.export.metadata import describe, metadata_table, sample_key, shard_name, stats
from pipeline.export.rows import Rows, missing
from pipeline.storage import write_atomic
from schemas.errors import Reason
from schemas.tables import IMAGES, PAIRS

Layout = Literal["webdataset", "img2dataset", "files"]

IMAGE_ROWS = pa.schema(
    [IMAGES.schema.field(name) for name in (
        "pair_key", "url", "caption", "status", "error", "sha256", "width", "height", "original_width",
        "original_height", "image", "format", "fetched_at",
    )]
)  # fmt: skip
"""The door: what is read of images."""
EXTRA_ROWS = pa.schema([PAIRS.schema.field(name) for name in ("pair_key", "extra")])
"""The door: what is read of pairs."""


@dataclass(frozen=True)
class Shard:
    """A shard's number, and its sorted keys."""

    number: int
    keys: pa.Array


@dataclass
class Written:
    """What a shard came to: its rows, bytes of its images, and how many there are of each format."""

    rows: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)


class ExportStage:
    """A shard's keys -> its files in ``folder``, the same bytes every time.

    ``extras``: the extra columns of the whole export and their kinds, for the metadata's schema.
    """

    def __init__(self, folder: str, layout: Layout, shard_size: int, extras: Mapping[str, str]) -> None:
        self.folder, self.layout, self.shard_size = UPath(folder), layout, shard_size
        self.extras = extras

    def __call__(self, shard: Shard, images: Rows, pairs: Rows) -> Written:
        """Raises WorkspaceError if a row is gone, or the folder cannot be written."""
        extra = {row["pair_key"]: row["extra"] for row in pairs.of(shard.keys)}
        written = Written()
        described: list[dict[str, Any]] = []
        times: list[float] = []
        try:
            with self._sink(shard_name(shard.number)) as put:
                for row in images.of(shard.keys):
                    key = sample_key(shard.number, written.rows, self.shard_size)
                    meta = describe({**row, "extra": extra.get(row["pair_key"])}, key)
                    described.append(meta)
                    times.append(row["fetched_at"].timestamp() if row["fetched_at"] else 0.0)
                    if row["status"] == Reason.OK:
                        put(f"{key}.{row['format']}", row["image"])
                        put(f"{key}.txt", row["caption"].encode())
                        put(f"{key}.json", json.dumps(meta, indent=4).encode())
                        written.bytes += len(row["image"])
                        written.formats[row["format"]] += 1
                    written.rows += 1
                if written.rows != len(shard.keys):
                    raise missing(shard.number, len(shard.keys), written.rows)
            if self.layout != "webdataset":
                self._metadata(shard_name(shard.number), described, times)
        except OSError as exc:
            raise output_error(exc, str(self.folder)) from exc
        return written

    def _sink(self, name: str) -> Any:
        return whole_folder(self.folder / name) if self.layout == "files" else whole_tar(self.folder / f"{name}.tar")

    def _metadata(self, name: str, described: list[dict[str, Any]], times: list[float]) -> None:
        out = io.BytesIO()
        pq.write_table(metadata_table(described, self.extras), out)
        write_atomic(self.folder / f"{name}.parquet", out.getvalue())
        # Last of all: by it img2dataset knows that a shard is done, and so do we.
        write_atomic(self.folder / f"{name}_stats.json", stats(described, min(times), max(times)))


def is_done(folder: UPath, layout: Layout, number: int) -> bool:
    """Whether a shard is there already."""
    name = shard_name(number)
    return bool((folder / (f"{name}.tar" if layout == "webdataset" else f"{name}_stats.json")).exists())


@contextmanager
def whole_tar(path: UPath) -> Iterator[Put]:
    """``put(name, data)`` adds a member; time and owner are always the same."""

    def put(name: str, data: bytes) -> None:
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(data), 0o644
        tar.addfile(header, io.BytesIO(data))

    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        yield put
