"""What is to be embedded, found in DuckDB over the tables' files: it sorts and joins on disk where memory is short.

An image is embedded where it is ok and its key has no row of the encoder, or one of another image (by sha256). A
finished run leaves the version of ``images`` that it looked at in the log of ``embeddings``: the next one looks only at
the files that came since. Where rows may have been taken out of ``embeddings`` meanwhile, it looks at all again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import duckdb
import numpy as np
import pyarrow as pa

from pipeline.tables import Table
from schemas.errors import NothingToDo, Reason, WorkspaceError

_MEMORY = "512MB"
_RESCORED_ROWS = 65_536
"""Rows whose scores are made at once, at least a file of them."""

_IMAGE = """
    SELECT file, pair_key, CASE WHEN sha256 IS NOT NULL THEN hash(sha256) END AS sha
    FROM batches WHERE concat(status, '') = $given"""
_DONE = """
    SELECT pair_key, CASE WHEN sha256 IS NOT NULL THEN hash(sha256) END AS sha
    FROM batches SEMI JOIN image USING (pair_key) WHERE concat(encoder, '') = $given"""

Keys = dict[str, pa.Array]


@dataclass(frozen=True)
class Shard:
    """Keys of images by their file, as the log of the table names it.

    ``changed``: their rows are there, of another image, and are to be replaced. ``number``: from 0, over all shards.
    """

    keys: Keys
    changed: bool
    number: int

    @property
    def rows(self) -> int:
        return sum(len(keys) for keys in self.keys.values())


@dataclass(frozen=True)
class Work:
    """How many images are to be embedded; ``record``: numbers for the log of embeddings, once they are."""

    new: int
    changed: int
    record: dict[str, int]

    @property
    def total(self) -> int:
        return self.new + self.changed


class Planner:
    """A DuckDB on disk for the time of a run of one encoder, as a context manager."""

    def __init__(self, encoder: str, memory: str = _MEMORY) -> None:
        self.encoder = encoder
        self._folder = tempfile.TemporaryDirectory(prefix="clipmill-plan-")
        self._db = duckdb.connect(f"{self._folder.name}/plan.duckdb")
        self._db.execute("SET memory_limit = $memory", {"memory": memory})
        self._db.execute("SET temp_directory = $spill", {"spill": f"{self._folder.name}/spill"})
        self._files: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._db.close()
        self._folder.cleanup()

    def work(self, images: Table, embeddings: Table, version: int) -> Work:
        """Look at ``images`` as of ``version`` and at ``embeddings`` as it is now.

        Raises:
            NothingToDo: there is no image at all.
            WorkspaceError: a file of the tables, or room for temporary ones, is missing.
        """
        names = f"clipmill-images-{self.encoder}", f"clipmill-foreign-{self.encoder}"
        foreign = embeddings.foreign()
        examined = embeddings.recorded(names[0]) if embeddings.recorded(names[1]) == foreign else -1
        record = dict(zip(names, (version, foreign), strict=True))
        self._db.execute("CREATE OR REPLACE TABLE work (file INTEGER, pair_key BIGINT, changed BOOLEAN)")
        if version == examined:
            return Work(0, 0, record)
        self._load(images, embeddings, version, images.paths(version) - images.seen_paths(examined))
        if examined < 0 and self._one("SELECT count(*) FROM image") == 0:
            raise NothingToDo(
                "there are no images to embed",
                expected="rows with status ok in the table images",
                remedy="clipmill download first",
            )
        self._db.execute("""
            INSERT INTO work SELECT file, pair_key, done.pair_key IS NOT NULL
            FROM image LEFT JOIN done USING (pair_key)
            WHERE done.pair_key IS NULL OR done.sha <> image.sha""")
        new, changed = (self._one(f"SELECT count(*) FROM work WHERE {c}") for c in ("NOT changed", "changed"))  # noqa: S608
        return Work(new, changed, record)

    def shards(self, size: int) -> Iterator[Shard]:
        """The images to embed, ``size`` a shard (the last new and the last changed one are smaller)."""
        number = 0
        for changed in (False, True):
            query = "SELECT file, pair_key FROM work WHERE changed = ? ORDER BY file, pair_key"
            rows = self._db.cursor().sql(query, params=[changed]).to_arrow_reader(65_536)
            for table in _cut(rows, size):
                yield Shard(self._by_file(table), changed, number)
                number += 1

    def unscored(self, embeddings: Table, columns: Sequence[str], again: Sequence[str]) -> Iterator[list[str]]:
        """Files of ``embeddings`` with rows of the encoder that lack one of ``columns``, a few at a time.

        ``again``: columns that are to be made again for every row.
        """
        if not columns or embeddings.version() < 0:
            return
        files, rows = embeddings.places((*embeddings.spec.key, *columns))
        lacking = " OR ".join(["true" if again else "false", *(f'"{c}" IS NULL' for c in columns)])
        self._db.register("batches", rows)
        query = f"""
            SELECT file, count(*), bool_or(concat(encoder, '') = $encoder AND ({lacking}))
            FROM batches GROUP BY file ORDER BY file"""  # noqa: S608
        found = self._db.execute(query, {"encoder": self.encoder}).fetchall()
        self._db.unregister("batches")
        group: list[str] = []
        held = 0
        for file, count, lacks in found:
            if lacks:
                group.append(files[file])
                held += count
            if held >= _RESCORED_ROWS:
                yield group
                group, held = [], 0
        if group:
            yield group

    def _load(self, images: Table, embeddings: Table, version: int, paths: set[str]) -> None:
        """``image(file, pair_key, sha)``: what is ok; ``done(pair_key, sha)``: what of it is embedded.

        ``sha``: 64 bits for a sha256, since a hundred million of them are to be joined.

        ``concat``: a comparison of texts must not be pushed into Arrow, which cannot compare the string views that
        delta-rs writes when it rewrites a file.
        """
        self._files, rows = images.places(("pair_key", "sha256", "status"), version, paths)
        for name, batches, query, given in (
            ("image", rows, _IMAGE, Reason.OK),
            ("done", embeddings.batches(("pair_key", "encoder", "sha256")), _DONE, self.encoder),
        ):
            self._db.register("batches", batches)
            try:
                self._db.execute(f"CREATE OR REPLACE TABLE {name} AS {query}", {"given": str(given)})
            except duckdb.Error as exc:
                raise WorkspaceError(
                    "the tables cannot be read",
                    actual=str(exc).splitlines()[0],
                    remedy="free some room for temporary files, and do not vacuum while a job runs; run it again",
                ) from exc
            self._db.unregister("batches")

    def _by_file(self, rows: pa.Table) -> Keys:
        """Keys by file, of rows (file, pair_key) sorted by file."""
        files, starts = np.unique(rows["file"].to_numpy(), return_index=True)
        keys = np.split(rows["pair_key"].to_numpy(), starts[1:])
        return {self._files[file]: pa.array(own, pa.int64()) for file, own in zip(files, keys, strict=True)}

    def _one(self, query: str) -> int:
        return int(self._db.execute(query).fetchall()[0][0])


def _cut(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """Tables of ``size`` rows, the last one smaller; never all at once."""
    kept: list[pa.RecordBatch] = []
    room = size
    for batch in batches:
        rest = batch
        while rest.num_rows:
            kept.append(rest.slice(0, room))
            rest = rest.slice(room)
            room -= kept[-1].num_rows
            if room == 0:
                yield pa.Table.from_batches(kept)
                kept, room = [], size
    if kept:
        yield pa.Table.from_batches(kept)
