"""Hashes within some bits of one another, and which of them to keep: each unless an earlier kept one is that near.

Two 64-bit hashes that differ by at most d bits agree in at least k of any d + k groups of bits (pigeonhole). So all
near pairs are found by joining on k groups at a time: C(d + k, k) joins. More groups at a time mean more joins, of
fewer false candidates each. (Manku, Jain, Das Sarma: Detecting Near-Duplicates for Web Crawling, WWW 2007.)
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_BITS = 64
BLOCK = 1 << 22
"""Vertices decided at once."""
_CANDIDATES = 1 << 29
"""Candidate pairs within a block; one with more of them is halved, since the kept of its first half thin it out."""
_JOIN_COST = 50_000
"""What a join costs beside its rows, in rows."""


def masks(distance: int, rows: int) -> list[int]:
    """Masks, signed int64, of which two hashes within ``distance`` agree under at least one; the cheapest choice."""

    def cost(k: int) -> float:
        candidates = rows * rows / 2 ** (_BITS * k / (distance + k))
        return comb(distance + k, k) * (_JOIN_COST + rows + candidates / 4)

    k = min(range(1, 5), key=cost)
    groups = distance + k
    # Every groups-th bit: neighbouring bits are of one part of the picture, which is often plain in many pictures.
    parts = [sum(1 << bit for bit in range(first, _BITS, groups)) for first in range(groups)]
    return [_signed(sum(parts[i] for i in chosen)) for chosen in combinations(range(groups), k)]


def _signed(mask: int) -> int:
    return mask - (1 << _BITS) if mask >> (_BITS - 1) else mask


def settle(db: duckdb.DuckDBPyConnection, distance: int, block: int = BLOCK, candidates: int = _CANDIDATES) -> None:
    """Decide the vertices in the order of ``pos``: each is kept unless a kept one before it is its neighbour.

    In: tables ``kept(pos, h)``, decided before; ``vertex(pos, h)``, later ones, ordered (``h`` null: near to none);
    ``edge(low, high)``: pairs that are neighbours for another reason. Out: ``kept`` with the new ones added, and
    ``fate(pos, kept_pos)``: the first kept vertex before it within ``distance``, for each that has one.
    """
    db.execute("CREATE TABLE fate (pos BIGINT, kept_pos BIGINT)")
    db.execute("SET VARIABLE distance = $distance", {"distance": distance})
    (rows,) = _one(db, "SELECT count(*) FROM vertex")
    (known,) = _one(db, "SELECT count(*) FROM kept")
    chosen = masks(distance, max(rows + known, 1))
    todo = [(start, min(start + block, rows)) for start in range(0, rows, block)][::-1]
    while todo:
        start, end = todo.pop()
        db.execute(
            "CREATE OR REPLACE TEMP TABLE block AS SELECT pos, h FROM vertex WHERE rowid >= $start AND rowid < $end",
            {"start": start, "end": end},
        )
        _drop_neighbours_of_kept(db, chosen)
        if end - start > 1 and _candidates(db, chosen) > candidates:
            middle = (start + end) // 2
            todo += [(middle, end), (start, middle)]
            continue
        _settle_block(db, chosen)


def _drop_neighbours_of_kept(db: duckdb.DuckDBPyConnection, chosen: list[int]) -> None:
    db.execute("CREATE OR REPLACE TEMP TABLE hit (pos BIGINT, kept_pos BIGINT)")
    for mask in chosen:
        db.execute(
            "INSERT INTO hit SELECT b.pos, min(a.pos) FROM kept a JOIN block b ON (a.h & $mask) = (b.h & $mask) "
            "WHERE bit_count(xor(a.h, b.h)) <= getvariable('distance') GROUP BY b.pos",
            {"mask": mask},
        )
    db.execute("CREATE OR REPLACE TEMP TABLE first AS SELECT pos, min(kept_pos) AS kept_pos FROM hit GROUP BY pos")
    db.execute("DELETE FROM fate WHERE pos IN (SELECT pos FROM first)")
    db.execute("INSERT INTO fate SELECT * FROM first")
    db.execute("DELETE FROM block WHERE pos IN (SELECT pos FROM first)")
    db.execute("DELETE FROM block WHERE pos IN (SELECT high FROM edge JOIN kept ON kept.pos = edge.low)")


def _candidates(db: duckdb.DuckDBPyConnection, chosen: list[int]) -> int:
    """Pairs within the block that the joins will look at."""
    total = 0
    for mask in chosen:
        total += int(
            _one(
                db,
                "SELECT coalesce(sum(n * (n - 1) // 2), 0) FROM "
                "(SELECT count(*) AS n FROM block WHERE h IS NOT NULL GROUP BY h & $mask)",
                {"mask": mask},
            )[0]
        )
    return total


def _settle_block(db: duckdb.DuckDBPyConnection, chosen: list[int]) -> None:
    """Decide the block among its own: it has no neighbour in ``kept`` any more."""
    db.execute("CREATE OR REPLACE TEMP TABLE pair (low BIGINT, high BIGINT, near BOOLEAN)")
    for mask in chosen:
        db.execute(
            "INSERT INTO pair SELECT a.pos, b.pos, true FROM block a JOIN block b "
            "ON (a.h & $mask) = (b.h & $mask) AND a.pos < b.pos "
            "WHERE bit_count(xor(a.h, b.h)) <= getvariable('distance')",
            {"mask": mask},
        )
    db.execute(
        "INSERT INTO pair SELECT low, high, false FROM edge "
        "SEMI JOIN block a ON a.pos = low SEMI JOIN block b ON b.pos = high"
    )
    pairs = db.execute("SELECT low, high FROM pair GROUP BY low, high").fetchnumpy()
    dropped = drop(np.asarray(pairs["low"]), np.asarray(pairs["high"]))
    db.register("dropped_rows", pa.table({"pos": dropped}))
    db.execute("CREATE OR REPLACE TEMP TABLE dropped AS SELECT pos FROM dropped_rows")
    db.unregister("dropped_rows")
    db.execute(
        "INSERT INTO fate SELECT high, min(low) FROM pair SEMI JOIN dropped d ON d.pos = high "
        "ANTI JOIN dropped k ON k.pos = low WHERE near GROUP BY high"
    )
    db.execute("INSERT INTO kept SELECT pos, h FROM block ANTI JOIN dropped USING (pos)")


def drop(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of vertices joined by edges (low[i], high[i]), low[i] < high[i]: those with a kept neighbour before them.

    Every other one is kept. Taken one after another; here all at once that have no undecided one before them.
    """
    names, flat = np.unique(np.concatenate([low, high]), return_inverse=True)
    low, high = flat[: len(low)], flat[len(low) :]
    dropped = np.zeros(len(names), bool)
    while len(low):
        waits = np.zeros(len(names), bool)
        waits[high] = True
        now = high[~waits[low]]  # behind a vertex that waits for none: that one is kept
        dropped[now] = True
        live = ~(dropped[low] | dropped[high])
        low, high = low[live], high[live]
    return names[dropped]


def _one(db: duckdb.DuckDBPyConnection, query: str, values: dict[str, int] | None = None) -> tuple[int, ...]:
    row = db.execute(query, values or {}).fetchone()
    assert row is not None
    return tuple(row)
