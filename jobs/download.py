"""download: read lists of pairs, add the new ones to pairs, fetch what has no image yet."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.base import command
from pipeline.download.sources import drop_doubles, find, read_pairs
from pipeline.engine import Done, Engine, Quarantined, Resources
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.tables import Part
from pipeline.workspace import Workspace
from schemas.configs import DownloadConfig
from schemas.errors import ClipmillError, NothingToDo, Reason


@dataclass(frozen=True)
class Shard:
    """Pairs to fetch, with the number of earlier attempts. ``again``: they have rows already, to be replaced."""

    pairs: pa.Table
    again: bool


class Worker:
    """Fetches a shard and writes its rows as a part; retried rows go back to the driver, which replaces them."""

    def __init__(self, config: DownloadConfig, run: str) -> None:
        from pipeline.download.stage import DownloadStage

        self._stage = DownloadStage(config, run)
        self._images = Workspace(config.workspace).table("images")

    def __call__(self, shard: Shard) -> Part | pa.Table:
        rows = self._stage(shard.pairs)
        return rows if shard.again else self._images.write_part(rows, figures(rows))


def figures(rows: pa.Table) -> dict[str, float]:
    """How many rows of images came out with each status."""
    return {row["values"]: row["counts"] for row in pc.value_counts(rows["status"]).to_pylist()}


def run(config: DownloadConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`DownloadConfig`."""
    run.workspace.prepare()
    with run.stage("read"):
        known, doubled = add_pairs(config, run)
    with run.stage("plan"):
        due, waiting = plan(config, run)
    run.counts["in"] = sum(shard.pairs.num_rows for shard in due)
    statuses: dict[str, float] = {}
    quarantined: list[str] = []
    with run.stage("fetch"), Progress("download", run.counts["in"], "images") as progress:
        outcomes = engine.map(partial(Worker, config, run.id), due, Resources(workers=config.workers))
        for outcome in outcomes:
            if isinstance(outcome, Quarantined):
                quarantined.append(outcome.reason)
                run.counts["failed"] += outcome.shard.pairs.num_rows
                continue
            counted = _commit(run, outcome)
            for status, n in counted.items():
                statuses[status] = statuses.get(status, 0) + n
            run.counts["out"] += int(counted.get(Reason.OK, 0))
            run.counts["failed"] += int(sum(counted.values()) - counted.get(Reason.OK, 0))
            progress.advance(outcome.shard.pairs.num_rows, failed=run.counts["failed"])
    run.figures |= {
        "statuses": statuses, "already_known": known, "doubles": doubled, "retry_later": waiting,
        "quarantined": quarantined,
    }  # fmt: skip
    run.outputs |= {t: run.workspace.table(t).uri for t in ("pairs", "images")}
    if quarantined:
        raise ClipmillError(
            f"{len(quarantined)} shards failed on every try; their pairs have no row yet",
            actual=quarantined[-1],
            remedy="run the same command again: only what has no row is fetched",
        )


def _commit(run: Run, outcome: Done[Shard, Part | pa.Table]) -> dict[str, float]:
    if isinstance(outcome.result, Part):
        run.commit("images", [outcome.result])
        return outcome.result.figures
    run.upsert("images", outcome.result)
    return figures(outcome.result)


def add_pairs(config: DownloadConfig, run: Run) -> tuple[int, int]:
    """Add the pairs of ``config.pairs`` that are new. Returns how many were known, and doubled in the input.

    Raises:
        NothingToDo: neither the input nor the workspace has a pair.
    """
    files = find(config.pairs)
    tables = [read_pairs(file, config.url_col, config.caption_col) for file in files]
    given = pa.concat_tables(tables) if tables else None
    if given is None or given.num_rows == 0:
        if run.workspace.table("pairs").count() == 0:
            raise NothingToDo("no pairs", expected="--pairs with at least one row, or a workspace with pairs")
        return 0, 0
    unique = drop_doubles(given)
    here = run.workspace.table("pairs").keys()["pair_key"]
    new = unique.filter(pc.invert(pc.is_in(unique["pair_key"], here.combine_chunks())))
    run.append("pairs", new.append_column("added_run", pa.array([run.id] * new.num_rows, pa.string())))
    return unique.num_rows - new.num_rows, given.num_rows - unique.num_rows


def plan(config: DownloadConfig, run: Run) -> tuple[list[Shard], int]:
    """Shards of the pairs without a row in images, then of the retries that are due; and how many retries wait."""
    run.reads("pairs")
    pairs = run.workspace.table("pairs").read(["pair_key", "url", "caption"])
    images = run.workspace.table("images")
    seen = images.keys()["pair_key"].combine_chunks()
    new = pairs.filter(pc.invert(pc.is_in(pairs["pair_key"], seen)))
    new = new.append_column("attempts", pa.array(np.zeros(new.num_rows, np.int32)))
    columns = ["pair_key", "url", "caption", "attempts", "fetched_at"]
    failed = images.read(columns, (pc.field("retryable")) & (pc.field("attempts") < config.max_attempts))
    due = failed.filter(pa.array(_due(failed, config.retry_delay), pa.bool_())).drop_columns("fetched_at")
    shards = [Shard(t, False) for t in _slices(new, config.shard_size)]
    shards += [Shard(t, True) for t in _slices(due, config.shard_size)]
    return shards, failed.num_rows - due.num_rows


def _due(failed: pa.Table, delay: float) -> list[bool]:
    now = dt.datetime.now(dt.UTC)
    rows = zip(failed["attempts"].to_pylist(), failed["fetched_at"].to_pylist(), strict=True)
    return [now - at >= dt.timedelta(seconds=delay * 2 ** (attempts - 1)) for attempts, at in rows]


def _slices(table: pa.Table, size: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, size):
        yield table.slice(start, size).combine_chunks()


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill download``."""
    return command("download", DownloadConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
