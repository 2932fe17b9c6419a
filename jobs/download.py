"""download: read lists of pairs, add the new ones to pairs, fetch what has no image yet, mark duplicates."""

from __future__ import annotations

import datetime as dt
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from jobs.archives import complain, take_in
from jobs.base import command
from pipeline.download.archives.layouts import Archive, find_archives, is_tar
from pipeline.download.duplicates import mark_duplicates
from pipeline.download.lists.records import Columns
from pipeline.download.lists.sources import find, read_batches
from pipeline.download.planning import KINDS, Planner, Work
from pipeline.engine import Done, Engine, Quarantined, Resources
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.tables import Part
from pipeline.workspace import Workspace
from schemas.configs import DownloadConfig
from schemas.errors import NothingToDo, Reason
from schemas.tables import IMAGES

_OVERLAP = 3
"""Shards that a worker has under way at once: one's stragglers leave the worker no less busy."""
_PAIRS_A_COMMIT = 250_000
_SMALLER = (32, 1)
"""Sizes into which a shard is cut that went down with its worker again and again, to find the one row at fault."""

_REPLACE = """(source.http_status IS NULL OR source.http_status <> 304)
    AND (source.status IN ('ok', 'opted_out', 'robots_txt') OR target.status <> 'ok')"""
"""A stored image gives way to a newer one and to an opt-out, not to a failure: a refresh, or a racing run's."""


@dataclass(frozen=True)
class Shard:
    """Pairs to fetch. ``again``: they have rows already, to be replaced."""

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

    def close(self) -> None:
        self._stage.close()


def figures(rows: pa.Table) -> dict[str, float]:
    """How many rows of images came out with each status; under ``bytes``, how much was fetched for them."""
    counts = {row["values"]: row["counts"] for row in pc.value_counts(rows["status"]).to_pylist()}
    return counts | {"bytes": pc.sum(rows["original_bytes"], min_count=0).as_py()}


@dataclass
class Tally:
    """What came of the pairs so far."""

    run: Run
    progress: Progress
    statuses: Counter[str] = field(default_factory=Counter)
    bytes: float = 0.0

    def add(self, found: dict[str, float]) -> None:
        """The figures of one shard."""
        self.bytes += found["bytes"]
        counts = {status: int(n) for status, n in found.items() if status != "bytes"}
        self.statuses.update(counts)
        done, good = sum(counts.values()), counts.get(Reason.OK, 0)
        self.run.counts["out"] += good
        self.run.counts["failed"] += done - good
        bad = [(status, n) for status, n in self.statuses.most_common() if status != Reason.OK]
        self.progress.advance(done, **{"MB/s": self.bytes / 1e6 / self.progress.seconds}, **dict(bad[:3]))


def run(config: DownloadConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`DownloadConfig`."""
    run.workspace.prepare()
    pairs, images = run.workspace.table("pairs"), run.workspace.table("images")
    run.outputs |= {"pairs": pairs.uri, "images": images.uri}
    with Planner() as planner:
        with run.stage("read"):
            archives = add_pairs(config, run, planner)
        if archives:
            with run.stage("archives"):
                run.figures["archives"] = take_in(config, archives, run, engine, as_is=False)
        with run.stage("plan"):
            run.reads("pairs")
            work = planner.work(pairs, images, config)
        run.counts["in"] += work.total
        run.figures["retry_later"] = work.waiting
        with run.stage("fetch"):
            fetch(config, run, engine, planner, work)
    with run.stage("duplicates"):
        run.figures["duplicates"] = mark(config, run)
    if archives:
        complain(run.figures["archives"])


def add_pairs(config: DownloadConfig, run: Run, planner: Planner) -> list[Archive]:
    """Add the pairs of lists in ``config.pairs`` that are new, and count the others. Returns the archives among them.

    Raises:
        NothingToDo: neither the input nor the workspace has a pair.
    """
    files = find(config.pairs)
    lists = [file for file in files if not is_tar(file.name)]
    archives = find_archives([str(file) for file in files if is_tar(file.name)])
    columns = Columns(config.url_col, config.caption_col, config.extra_cols)
    batches = (batch for file in lists for batch in read_batches(file, columns))
    added = 0
    for rows in planner.fresh(batches, run.workspace.table("pairs"), _PAIRS_A_COMMIT):
        run.append("pairs", rows.append_column("added_run", pa.array([run.id] * rows.num_rows, pa.string())))
        added += rows.num_rows
    if not archives and planner.given == 0 and run.workspace.table("pairs").count() == 0:
        raise NothingToDo("no pairs", expected="--pairs with at least one row, or a workspace with pairs")
    run.figures |= {
        "read": planner.given, "doubles": planner.given - planner.keys, "already_known": planner.keys - added
    }  # fmt: skip
    return archives


def fetch(config: DownloadConfig, run: Run, engine: Engine, planner: Planner, work: Work) -> None:
    """Work off what was planned; every pair gets its row, whatever it does to its worker."""
    resources = Resources(workers=config.workers, overlap=_OVERLAP)
    todo: Iterable[Shard] = _shards(planner, config.shard_size)
    with Progress("download", work.total, "images") as progress:
        tally = Tally(run, progress)
        for size in (*_SMALLER, 0):
            lost: list[Quarantined[Shard]] = []
            if work.total:
                share = _share(config, engine.slots(resources))
                for outcome in engine.map(partial(Worker, share, run.id), todo, resources):
                    if isinstance(outcome, Quarantined):
                        lost.append(outcome)
                    else:
                        tally.add(_commit(run, outcome))
            if not lost:
                break
            if size:
                todo = [Shard(part, o.shard.again) for o in lost for part in _slices(o.shard.pairs, size)]
            else:
                for outcome in lost:
                    rows = _lost_rows(outcome, run.id)
                    run.upsert("images", rows, _REPLACE)
                    tally.add(figures(rows))
    run.figures |= {"statuses": dict(tally.statuses), "bytes": int(tally.bytes)}


def mark(config: DownloadConfig, run: Run) -> dict[str, int]:
    """Mark images that are there already, exactly or nearly. Returns how many by kind."""
    if config.dedup == "off":
        return {}
    marks = run.workspace.table("duplicates")
    run.outputs["duplicates"] = marks.uri
    distance = None if config.dedup == "exact" else config.near_distance
    return mark_duplicates(run.workspace.table("images"), marks, distance, run.id, begin=run.begin)


def _share(config: DownloadConfig, workers: int) -> DownloadConfig:
    """One worker's part of what hosts are to see of us all."""
    part = {"per_host": max(1, config.per_host // workers), "host_rate": config.host_rate / workers}
    return config.model_copy(update=part)


def _shards(planner: Planner, size: int) -> Iterator[Shard]:
    for kind in KINDS:
        yield from (Shard(pairs, again=kind != "new") for pairs in planner.shards(kind, size))


def _slices(table: pa.Table, size: int) -> Iterator[pa.Table]:
    return (table.slice(start, size).combine_chunks() for start in range(0, table.num_rows, size))


def _commit(run: Run, outcome: Done[Shard, Part | pa.Table]) -> dict[str, float]:
    if isinstance(outcome.result, Part):
        run.commit("images", [outcome.result])
        return outcome.result.figures
    run.upsert("images", outcome.result, _REPLACE, touch=["fetched_at"])
    return figures(outcome.result)


def _lost_rows(outcome: Quarantined[Shard], run: str) -> pa.Table:
    """Rows for pairs that take their worker down with them, each on its own."""
    empty = dict.fromkeys(IMAGES.schema.names)
    now = dt.datetime.now(dt.UTC)
    rows = [
        empty
        | {name: pair[name] for name in ("pair_key", "url", "caption")}
        | {
            "status": str(Reason.WORKER_LOST), "error": outcome.reason[:300], "attempts": pair["attempts"] + 1,
            "retryable": Reason.WORKER_LOST.retryable, "fetched_at": now, "run": run,
        }
        for pair in outcome.shard.pairs.to_pylist()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=IMAGES.schema)


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill download``."""
    return command("download", DownloadConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
