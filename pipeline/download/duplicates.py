"""Images that are there already: which to mark in the table duplicates, and which marks must go.

Images are taken one after another. One whose bytes are those of an earlier kept image is an ``exact`` duplicate of
it; else one whose perceptual hash is near to an earlier kept image's is a ``near`` duplicate of the first such; else it
is kept. A marked image keeps no other. The order: what is kept already; new or changed images that keep others; the
rest; each by (run, pair_key), so by time. So a mark outlives whatever is added later.

All of it is DuckDB over the narrow columns, which spills to the disk: no Python object for a row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.download import near
from pipeline.tables import Table
from schemas.errors import Reason, WorkspaceError

MEMORY = "2GB"
FLAT = 8
"""A hash with fewer bits set, or fewer bits not set, is a flat picture's: it says nothing."""
_ATTEMPTS = 10
_COLUMNS = ("pair_key", "sha256", "phash", "run", "status")
_EXAMINED, _SETTING = "clipmill-images", "clipmill-near"
"""What the table's log says of the last search: the version of ``images``, and the distance + 1 (0: exact only)."""


@dataclass(frozen=True)
class Found:
    """What a search changes: rows (without ``run``) to add or replace, and keys whose mark goes.

    ``marks_version``: of the table that this is a change to. ``record``: for the table's log.
    """

    rows: pa.Table
    gone: pa.Table
    marks_version: int
    record: dict[str, int]

    @property
    def figures(self) -> dict[str, int]:
        """Images marked by kind."""
        return {kind: pc.sum(pc.equal(self.rows["kind"], kind)).as_py() or 0 for kind in ("exact", "near")}


def mark_duplicates(
    images: Table, marks: Table, near_distance: int | None, run: str, begin: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Bring ``marks`` up to date with ``images`` in one commit, in the name of ``run``. Returns images marked by kind.

    ``near_distance``: bits by which near duplicates' hashes may differ; None: exact ones only. ``begin`` is called
    before the commit. If nothing happened to the images since the last search, nothing is read or committed.

    Raises:
        WorkspaceError: a table cannot be read or written.
    """
    for _ in range(_ATTEMPTS):
        found = find_duplicates(images, marks, near_distance)
        if found is None:
            return {"exact": 0, "near": 0}
        begin()
        rows = found.rows.append_column("run", pa.repeat(run, found.rows.num_rows))
        if marks.replace(rows, found.gone, run, found.marks_version, found.record) is not None:
            return found.figures
    raise WorkspaceError(f"{_ATTEMPTS} writers in a row were faster on {marks.uri}", remedy="run the command again")


def find_duplicates(
    images: Table, marks: Table, near_distance: int | None, memory: str = MEMORY, block: int = near.BLOCK
) -> Found | None:
    """What has to change in ``marks``; None where nothing happened to ``images`` since the last search.

    Only images of files that came since then (or whose mark no longer holds) are compared with all others; all, where
    the distance is another one. ``memory``: DuckDB's limit; ``block``: pictures decided at once.
    """
    version, marks_version = images.version(), marks.version()
    setting = 0 if near_distance is None else near_distance + 1
    examined = marks.recorded(_EXAMINED) if marks.recorded(_SETTING) == setting else -1
    if version == examined or version < 0:
        return None
    with _database(memory) as db:
        _load(db, images, marks, version, examined, near_distance)
        _order(db)
        _vertices(db)
        near.settle(db, near_distance or 0, block)
        rows, gone = _changes(db)
    return Found(rows, gone, marks_version, {_EXAMINED: version, _SETTING: setting})


@contextmanager
def _database(memory: str) -> Iterator[duckdb.DuckDBPyConnection]:
    with (
        tempfile.TemporaryDirectory(prefix="clipmill-duplicates-") as folder,
        duckdb.connect(str(Path(folder, "duplicates.db"))) as db,
    ):
        db.execute("SET memory_limit = $memory", {"memory": memory})
        db.execute("SET temp_directory = $spill", {"spill": str(Path(folder, "spill"))})
        yield db


def _load(
    db: duckdb.DuckDBPyConnection, images: Table, marks: Table, version: int, examined: int, distance: int | None
) -> None:
    """``image(pair_key, sha, h, run, new)``: what is ok. ``h``: null where it says nothing. ``old``: the marks."""
    db.execute("CREATE TABLE image (pair_key BIGINT, sha VARCHAR, h BIGINT, run VARCHAR, new BOOLEAN)")
    before = images.seen_paths(examined)
    files = images.paths(version)
    for chosen, new in ((files & before, False), (files - before, True)):
        db.register("batches", images.batches(_COLUMNS, version, chosen))
        db.execute(
            "INSERT INTO image SELECT pair_key, coalesce(sha256, pair_key::VARCHAR), "
            "CASE WHEN $near AND bit_count(phash) BETWEEN $few AND 64 - $few THEN phash END, run, $new "
            "FROM batches WHERE status = $ok",
            {"near": distance is not None, "few": FLAT, "new": new, "ok": str(Reason.OK)},
        )
        db.unregister("batches")
    db.register("batches", marks.batches(("pair_key", "kept_key", "kind", "distance")))
    db.execute("CREATE TABLE old AS SELECT * FROM batches")
    db.unregister("batches")
    db.execute("SET VARIABLE near = $near", {"near": -1 if distance is None else distance})
    # Marks that hold for the images as they are now; settled: nothing of theirs can have changed.
    db.execute("""
        CREATE TABLE sound AS
        SELECT o.*, NOT x.new AND NOT k.new AS settled
        FROM old o JOIN image x ON x.pair_key = o.pair_key JOIN image k ON k.pair_key = o.kept_key
        WHERE o.kept_key NOT IN (SELECT pair_key FROM old)
        AND CASE o.kind WHEN 'exact' THEN x.sha = k.sha AND o.distance = 0
            ELSE x.sha <> k.sha AND o.distance <= getvariable('near') AND bit_count(xor(x.h, k.h)) = o.distance END""")


def _order(db: duckdb.DuckDBPyConnection) -> None:
    """``img(pos, pair_key, bytes, h, decided)``: all but the images whose mark stands; ``pos``: their order.

    ``bytes``: the first position with the same sha256.
    """
    db.execute("""
        CREATE TABLE ordered AS
        SELECT pair_key, sha, h, decided FROM (
            SELECT i.*, NOT new AND o.pair_key IS NULL AS decided, k.kept_key IS NOT NULL AS keeps
            FROM image i LEFT JOIN old o USING (pair_key)
            LEFT JOIN (SELECT DISTINCT kept_key FROM sound) k ON k.kept_key = i.pair_key
            WHERE i.pair_key NOT IN (SELECT pair_key FROM sound WHERE settled))
        ORDER BY NOT decided, NOT keeps AND NOT decided, run, pair_key""")
    db.execute("DROP TABLE image")
    db.execute("""
        CREATE TABLE img AS
        SELECT o.rowid AS pos, pair_key, bytes, h, decided
        FROM ordered o JOIN (SELECT sha, min(rowid) AS bytes FROM ordered GROUP BY sha) f USING (sha)""")
    db.execute("DROP TABLE ordered")


def _vertices(db: duckdb.DuckDBPyConnection) -> None:
    """``node``: pictures (bytes and hash), with the vertex that each is of; ``vertex``, ``kept``, ``edge``.

    Pictures of one hash have the same neighbours and so one fate: a popular hash is one vertex. But not those whose
    bytes have several hashes (stored under several settings, ``multi``): they have each other for neighbours, too.
    """
    db.execute("""
        CREATE TABLE picture AS
        SELECT bytes, h, min(pos) AS pos, bool_or(decided) AS decided FROM img GROUP BY bytes, h""")
    db.execute("CREATE TABLE several AS SELECT bytes FROM picture GROUP BY bytes HAVING count(*) > 1")
    db.execute("""
        CREATE TABLE node AS
        WITH p AS (SELECT p.*, s.bytes IS NOT NULL AS multi FROM picture p LEFT JOIN several s USING (bytes)),
        f AS (SELECT h, min(pos) AS pos FROM p WHERE NOT multi AND h IS NOT NULL GROUP BY h)
        SELECT p.*, coalesce(f.pos, p.pos) AS vertex FROM p LEFT JOIN f ON p.h = f.h AND NOT p.multi""")
    db.execute("CREATE TABLE kept AS SELECT pos, h FROM node WHERE decided AND (h IS NOT NULL OR multi)")
    db.execute("""
        CREATE TABLE vertex AS
        SELECT pos, h FROM node WHERE pos = vertex AND NOT decided AND (h IS NOT NULL OR multi) ORDER BY pos""")
    db.execute("""
        CREATE TABLE edge AS
        SELECT a.pos AS low, b.pos AS high FROM node a JOIN node b USING (bytes)
        WHERE a.multi AND b.multi AND a.pos < b.pos""")


def _changes(db: duckdb.DuckDBPyConnection) -> tuple[pa.Table, pa.Table]:
    """Rows to add or replace, and keys whose mark goes."""
    db.execute("""
        CREATE TABLE keeper AS
        SELECT i.pos, i.pair_key, i.bytes, i.h FROM img i JOIN (
            SELECT pos FROM kept UNION SELECT pos FROM node WHERE h IS NULL AND NOT multi) USING (pos)""")
    # As marked before, while that holds; else by bytes; else by hash: its vertex's fate, or the vertex itself.
    db.execute("""
        CREATE TABLE mark AS
        SELECT i.pair_key, coalesce(o.pair_key, e.pair_key, k.pair_key) AS kept_key,
            CASE WHEN o.pair_key IS NULL AND e.pair_key IS NOT NULL THEN 'exact' ELSE 'near' END AS kind,
            CASE WHEN o.pair_key IS NOT NULL THEN bit_count(xor(i.h, o.h))::INTEGER
                WHEN e.pair_key IS NOT NULL THEN 0 ELSE bit_count(xor(i.h, k.h))::INTEGER END AS distance
        FROM img i JOIN node n ON n.bytes = i.bytes AND n.h IS NOT DISTINCT FROM i.h
        LEFT JOIN keeper e ON e.bytes = i.bytes AND e.pos < i.pos
        LEFT JOIN fate f ON f.pos = n.vertex
        LEFT JOIN keeper k ON k.pos = coalesce(f.kept_pos, n.vertex)
        LEFT JOIN sound s ON s.pair_key = i.pair_key AND s.kind = 'near'
        LEFT JOIN keeper o ON o.pair_key = s.kept_key
        WHERE NOT i.decided AND i.pos NOT IN (SELECT pos FROM keeper)""")
    rows = db.sql("SELECT * FROM mark EXCEPT SELECT pair_key, kept_key, kind, distance FROM old").to_arrow_table()
    gone = db.sql("""
        SELECT pair_key FROM old WHERE pair_key NOT IN (SELECT pair_key FROM mark)
        AND pair_key NOT IN (SELECT pair_key FROM sound WHERE settled)""").to_arrow_table()
    return rows, gone
