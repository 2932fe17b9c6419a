"""Archives of images, for import and download: samples -> rows of pairs and images, committed as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from pipeline.download.archives.layouts import Archive
from pipeline.engine import Engine, Quarantined, Resources
from pipeline.export.rows import is_in
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.tables import Part
from pipeline.workspace import Workspace
from schemas.configs import DownloadConfig
from schemas.errors import ClipmillError, Reason

_SHOWN = 10
"""Broken archives that are named."""


@dataclass(frozen=True)
class Rows:
    """Parts of pairs and images with the same keys, and the status of each; None: no new ones.

    ``again``: rows of images that take the place of failed ones.
    """

    parts: tuple[Part, Part] | None
    statuses: list[str]
    again: pa.Table


@dataclass
class Imported:
    """What became of an archive. ``broken``: why it could not be read to its end."""

    rows: list[Rows] = field(default_factory=list)
    known: int = 0
    doubles: int = 0
    ignored: int = 0
    broken: str = ""


@dataclass(frozen=True)
class Keys:
    """Sorted keys with a row of images: ok ones, and failed ones."""

    stored: NDArray[np.int64]
    failed: NDArray[np.int64]


class Worker:
    """Reads an archive and writes its rows as parts, a batch at a time.

    An image for a failed row goes back to the driver, which replaces it. ``as_is``: images are stored as they are.
    """

    def __init__(self, config: DownloadConfig, run: str, as_is: bool, keys: Keys) -> None:
        from pipeline.download.archives.stage import ArchiveStage

        self._stage = ArchiveStage(config, run, as_is=as_is)
        workspace = Workspace(config.workspace)
        self._pairs, self._images = workspace.table("pairs"), workspace.table("images")
        self._keys = keys

    def __call__(self, archive: Archive) -> Imported:
        from pipeline.download.archives.stage import BrokenArchive

        done = Imported()
        try:
            for batch in self._stage(archive, partial(is_in, self._keys.stored)):
                done.known += batch.known
                done.doubles += batch.doubles
                done.ignored += batch.ignored
                self._write(batch.pairs, batch.images, done)
        except BrokenArchive as exc:
            done.broken = exc.problem
        return done

    def _write(self, pairs: pa.Table, images: pa.Table, done: Imported) -> None:
        failed = pa.array(is_in(self._keys.failed, images["pair_key"].to_numpy()))
        again = images.filter(pc.and_(failed, pc.equal(images["status"], str(Reason.OK))))
        new = images.filter(pc.invert(failed))
        done.known += images.num_rows - new.num_rows - again.num_rows
        parts = None
        if new.num_rows:
            pairs = pairs.filter(pc.invert(failed))
            parts = self._pairs.write_part(pairs), self._images.write_part(new)
        if parts or again.num_rows:
            done.rows.append(Rows(parts, new["status"].to_pylist(), again))


def take_in(
    config: DownloadConfig, archives: Sequence[Archive], run: Run, engine: Engine, *, as_is: bool
) -> dict[str, Any]:
    """Read archives into pairs and images, and add to the run's counts. Returns figures; ``wrong``: what went wrong."""
    images, ok = run.workspace.table("images"), pc.field("status") == str(Reason.OK)
    keys = Keys(*(np.sort(images.keys(which)["pair_key"].to_numpy()) for which in (ok, ~ok)))
    total, statuses, wrong = Imported(), Counter[str](), list[str]()
    with Progress("import", len(archives), "archives") as progress:
        factory = partial(Worker, config, run.id, as_is, keys)
        for outcome in engine.map(factory, archives, Resources(workers=config.workers)):
            if isinstance(outcome, Quarantined):
                wrong.append(f"{outcome.shard.path}: {outcome.reason}")
                continue
            done = outcome.result
            wrong += [done.broken] if done.broken else []
            total.known += done.known
            total.doubles += done.doubles
            total.ignored += done.ignored
            for rows in done.rows:
                committed = commit(run, rows)
                statuses += committed
                total.doubles += len(rows.statuses) + rows.again.num_rows - committed.total()
                _count(run, committed)
            progress.advance(1, images=statuses[Reason.OK], failed=statuses.total() - statuses[Reason.OK])
    return {
        "archives": len(archives), "statuses": dict(statuses), "already_known": total.known, "doubles": total.doubles,
        "ignored_files": total.ignored, "wrong": wrong,
    }  # fmt: skip


def complain(figures: dict[str, Any]) -> None:
    """Raises ClipmillError if anything went wrong in :func:`take_in`."""
    if wrong := figures["wrong"]:
        raise ClipmillError(
            f"{len(wrong)} of {figures['archives']} archives could not be read to their end",
            actual="; ".join(wrong[:_SHOWN]),
            remedy="what could be read is imported: mend them, and run the same command again for the rest",
        )


def commit(run: Run, rows: Rows) -> Counter[str]:
    """Commit an archive's rows: pairs first, so that a row of images always has its pair. Statuses of what went in."""
    counted = Counter(rows.again["status"].to_pylist())
    if rows.parts is not None:
        pairs, images = rows.parts
        run.commit("pairs", [pairs])
        committed = run.commit("images", [images])
        new = rows.statuses
        if committed.rows < images.rows:
            before = committed.version - 1 if committed.rows else committed.version
            new = _without_doubles(run, rows, before)
        counted += Counter(new)
    run.upsert("images", rows.again)
    return counted


def _without_doubles(run: Run, rows: Rows, version: int) -> list[str]:
    """Statuses of the rows whose key another archive had not brought before, at this version of images.

    An image takes the place of the other archive's failure.
    """
    assert rows.parts is not None
    part, table = rows.parts[1], run.workspace.table("images")
    keys = part.keys["pair_key"]
    there = table.read(["pair_key", "status"], pc.field("pair_key").isin(keys.combine_chunks()), version)
    held = dict(zip(there["pair_key"].to_pylist(), there["status"].to_pylist(), strict=True))
    mine = list(zip(keys.to_pylist(), rows.statuses, strict=True))
    better = [key for key, status in mine if status == Reason.OK and held.get(key, Reason.OK) != Reason.OK]
    if better:
        with (UPath(table.uri) / part.path).open("rb") as file:
            run.upsert("images", pq.read_table(file, filters=pc.field("pair_key").isin(better)))
    return [status for key, status in mine if key not in held]


def _count(run: Run, statuses: Counter[str]) -> None:
    run.counts["in"] += statuses.total()
    run.counts["out"] += statuses[Reason.OK]
    run.counts["failed"] += statuses.total() - statuses[Reason.OK]
