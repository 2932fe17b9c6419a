"""What is to be done, found in DuckDB over the tables' files: it sorts and joins on disk where memory is short.

Everything comes in the order of the keys, which are hashes: hosts are well mixed, and a part covers a range of
keys of its own, by which later reads and commits skip it.
"""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import duckdb
import pyarrow as pa

from pipeline.tables import Table
from schemas.configs import DownloadConfig
from schemas.tables import PAIRS, SHARD

_MEMORY = "512MB"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

KINDS = ("new", "again", "refresh")

_WORK = r"""
    SELECT 'new' AS kind, pair_key, url, caption, problem, 0::INT AS attempts,
           NULL::VARCHAR AS etag, NULL::VARCHAR AS last_modified
    FROM pairs ANTI JOIN (SELECT pair_key FROM images) USING (pair_key)
  UNION ALL
    SELECT 'again', f.pair_key, f.url, f.caption, p.problem, attempts, NULL, NULL
    FROM failed f LEFT JOIN pairs p USING (pair_key) WHERE due <= $now
  UNION ALL
    SELECT 'refresh', pair_key, url, caption, NULL, 0, etag, last_modified FROM images
    WHERE upper(status) = 'OK' AND fetched_at < $stale AND NOT regexp_matches(url, '\.(tar|tar\.gz|tgz)#')
"""
"""``upper``: a comparison of texts must not be pushed into Arrow, which cannot compare the string views that
delta-rs writes when it rewrites a file."""
_FAILED = """
    SELECT pair_key, url, caption, attempts,
        CASE WHEN list_contains($retry, upper(status)) THEN $now
        ELSE greatest(fetched_at + to_seconds($delay * power(2, least(attempts, 40) - 1)),
                      coalesce(not_before, fetched_at)) END AS due
    FROM images WHERE (retryable AND attempts < $most) OR list_contains($retry, upper(status))
"""


@dataclass(frozen=True)
class Work:
    """How many pairs of each kind are to be fetched, and how many retries are not due yet."""

    counts: dict[str, int]
    waiting: int

    @property
    def total(self) -> int:
        return sum(self.counts.values())


class Planner:
    """A DuckDB on disk for the time of a run, as a context manager."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="clipmill-plan-")
        self._db = duckdb.connect(f"{self._folder.name}/plan.duckdb")
        self._db.execute(f"SET memory_limit = '{_MEMORY}'; SET temp_directory = '{self._folder.name}/spill'")
        self._db.execute("SET TimeZone = 'UTC'; SET preserve_insertion_order = true")
        self._now = dt.datetime.now(dt.UTC)
        self.given = self.keys = 0
        """Of what :meth:`fresh` was given: the rows, and how many keys they have."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._db.close()
        self._folder.cleanup()

    def fresh(self, batches: Iterator[pa.Table], pairs: Table, rows: int) -> Iterator[pa.Table]:
        """The rows of ``batches`` whose key is not in ``pairs``, each key's first, in tables of at most ``rows``."""
        columns = [name for name in PAIRS.schema.names if name != "added_run"]
        self._db.execute(f"CREATE OR REPLACE TABLE staged ({', '.join(f'{n} {_sql(n)}' for n in columns)})")
        for batch in batches:
            self._db.register("batch", batch.select(columns))
            self._db.execute("INSERT INTO staged SELECT * FROM batch")
            self._db.unregister("batch")
        self._db.register("known", pairs.dataset())
        self._db.execute("""
            CREATE OR REPLACE TABLE firsts AS SELECT min(rowid) AS row FROM staged
            ANTI JOIN (SELECT pair_key FROM known) USING (pair_key) GROUP BY pair_key
        """)  # fmt: skip
        query = "SELECT staged.* FROM staged JOIN firsts ON staged.rowid = firsts.row ORDER BY pair_key"
        self.given, self.keys = _two(self._db.execute("SELECT count(*), count(DISTINCT pair_key) FROM staged"))
        yield from _tables(self._db.cursor().sql(query), rows, pa.schema([PAIRS.schema.field(n) for n in columns]))
        self._db.execute("DROP TABLE staged; DROP TABLE firsts")

    def work(self, pairs: Table, images: Table, config: DownloadConfig) -> Work:
        """Look at both tables as they are now."""
        self._db.register("pairs", pairs.dataset())
        self._db.register("images", images.dataset())
        given = {"now": self._now, "stale": _stale(config.refresh, self._now)}
        again = [str(reason).upper() for reason in config.retry]
        failed = {"delay": config.retry_delay, "most": config.max_attempts, "retry": again, "now": self._now}
        self._db.execute(f"CREATE OR REPLACE TABLE failed AS {_FAILED}", failed)
        self._db.execute(f"CREATE OR REPLACE TABLE work AS {_WORK}", given)
        counts = dict(self._db.execute("SELECT kind, count(*) FROM work GROUP BY kind ORDER BY kind").fetchall())
        waiting, _ = _two(self._db.execute("SELECT count(*), 0 FROM failed WHERE due > $now", {"now": self._now}))
        return Work(counts, waiting)

    def shards(self, kind: str, size: int) -> Iterator[pa.Table]:
        """The pairs of one kind of work, in tables of at most ``size`` rows, in the order of their keys."""
        columns = ", ".join(SHARD.names)
        query = f"SELECT {columns} FROM work WHERE kind = ? ORDER BY pair_key"  # noqa: S608
        yield from _tables(self._db.cursor().sql(query, params=[kind]), size, SHARD)


def _tables(result: Any, rows: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """A result in tables of exactly ``rows`` rows, the last one shorter; never held as a whole."""
    kept: list[pa.RecordBatch] = []
    count = 0
    for batch in result.to_arrow_reader(min(rows, 65_536)):
        start = 0
        while batch.num_rows - start >= rows - count:
            kept.append(batch.slice(start, rows - count))
            start += rows - count
            yield pa.Table.from_batches(kept).cast(schema).combine_chunks()
            kept, count = [], 0
        if start < batch.num_rows:
            kept.append(batch.slice(start))
            count += batch.num_rows - start
    if kept:
        yield pa.Table.from_batches(kept).cast(schema).combine_chunks()


def _two(result: Any) -> tuple[int, int]:
    first, second = result.fetchone()
    return int(first), int(second)


def _sql(column: str) -> str:
    return "BIGINT" if column == "pair_key" else "VARCHAR"


def _stale(refresh: str, now: dt.datetime) -> dt.datetime:
    """Images fetched before this are asked for again."""
    if refresh == "never":
        return dt.datetime(1, 1, 1, tzinfo=dt.UTC)
    if refresh == "always":
        return now
    return now - dt.timedelta(seconds=float(refresh[:-1]) * _UNITS[refresh[-1]])
