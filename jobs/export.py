"""export: images with their pairs -> webdataset tars, or img2dataset's layouts; vectors -> see export_vectors."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, cast
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from upath import UPath

from jobs.base import command
from pipeline.engine import Engine, Quarantined, Resources
from pipeline.export.files import is_local, output_error, remove_parts
from pipeline.export.metadata import add_kinds
from pipeline.export.rows import File, Rows, SortStage, groups, is_in
from pipeline.export.stage import EXTRA_ROWS, IMAGE_ROWS, ExportStage, Layout, Shard, Written, is_done
from pipeline.export.vectors import LAYOUTS
from pipeline.ledger import Run
from pipeline.predicate import matching_keys
from pipeline.progress import Progress
from pipeline.storage import write_atomic
from pipeline.tables import Table
from schemas.configs import ExportConfig
from schemas.errors import ClipmillError, NothingToDo, Reason, UsageError
from schemas.tables import IMAGES

MARK = ".clipmill-export"
_RUNS = ".clipmill-sorted"
STRAIGHT_BYTES = 1 << 30
_STRAIGHT = 12.0
"""How many bytes may be read of a table, or how often a byte. Beyond both, to sort it first is cheaper (on a local disk
it costs as much CPU as reading the table 13 times)."""
_COLUMNS = ("pair_key", "caption", "url", "width", "height", "status", "sha256")
_SELECT = pa.schema([IMAGES.schema.field(name) for name in (*_COLUMNS, "fetched_at")])
_STATUSES = {str(reason): code for code, reason in enumerate(Reason)}


@dataclass(frozen=True)
class Sources:
    """Where the shards' rows are read from."""

    images: Rows
    pairs: Rows


@dataclass
class Selection:
    """The keys to export, sorted, with a digest of what they stand for; ``left_out`` counts the others."""

    keys: NDArray[np.int64]
    digest: str
    left_out: dict[str, int] = field(default_factory=dict)


class Worker:
    """Writes shards."""

    def __init__(self, config: ExportConfig, folder: str, extras: dict[str, str], sources: Sources) -> None:
        self._stage = ExportStage(folder, cast(Layout, config.format), config.shard_size, extras)
        self._sources = sources

    def __call__(self, shard: Shard) -> Written:
        return self._stage(shard, self._sources.images, self._sources.pairs)


def run(config: ExportConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`ExportConfig`."""
    run.workspace.require()
    if config.format in LAYOUTS:
        from jobs import export_vectors

        export_vectors.run(config, run)
        return
    folder, layout = open_output(config.output), cast(Layout, config.format)
    with run.stage("plan"):
        selection = select(config, run)
        claim(folder, config, selection.digest)
        shards = [s for s in slices(selection.keys, config.shard_size) if not is_done(folder, layout, s.number)]
        keys = sum(len(s.keys) for s in shards)
    run.counts["in"] = keys
    run.outputs["export"] = str(folder)
    run.figures |= {"shards": len(shards), "already_there": len(selection.keys) - keys, "left_out": selection.left_out}
    quarantined: list[str] = []
    if shards:
        run.begin()
        quarantined = _write(config, run, engine, (folder, selection, shards))
    if quarantined:
        raise ClipmillError(
            f"{len(quarantined)} shards failed on every try",
            actual=quarantined[-1],
            remedy="run the same command again: only what is missing is written",
        )
    clean(folder)


def _write(config: ExportConfig, run: Run, engine: Engine, work: tuple[UPath, Selection, list[Shard]]) -> list[str]:
    folder, selection, shards = work
    pairs = files(run.workspace.table("pairs"), run.input_versions["pairs"])
    with run.stage("plan"):
        extras = {} if config.format == "webdataset" else _extras(pairs, selection)
    with run.stage("sort"):
        sources = _sources(config, run, engine, work)
    quarantined: list[str] = []
    formats: Counter[str] = Counter()
    size = 0
    with run.stage("export"), Progress("export", run.counts["in"], "pairs") as progress:
        factory = partial(Worker, config, str(folder), extras, sources)
        for outcome in engine.map(factory, shards, Resources(workers=config.workers)):
            if isinstance(outcome, Quarantined):
                quarantined.append(outcome.reason)
                run.counts["failed"] += len(outcome.shard.keys)
                continue
            run.counts["out"] += outcome.result.rows
            formats += outcome.result.formats
            size += outcome.result.bytes
            progress.advance(outcome.result.rows, MB=size / 1e6)
    run.figures |= {"formats": dict(formats), "bytes": size, "quarantined": quarantined}
    return quarantined


# -- what to export ------------------------------------------------------------------------------------


def select(config: ExportConfig, run: Run) -> Selection:
    """The keys to export: a file of images at a time, so that captions and URLs are never all in memory.

    Raises:
        UsageError: ``--where`` is no predicate.
        NothingToDo: no image is left.
    """
    version = run.reads("images")
    run.reads("pairs")
    dropped = np.sort(run.workspace.table("duplicates").keys()["pair_key"].to_numpy())
    left_out = Counter({"failed": 0, "where": 0, "duplicates": 0})
    found: list[tuple[Any, ...]] = [_arrays(_SELECT.empty_table())]
    if config.where is not None:
        matching_keys(_SELECT.empty_table().select(_COLUMNS), config.where)
    for file in files(run.workspace.table("images"), version):
        rows = pa.Table.from_batches(Rows((file,), _SELECT).batches(), schema=_SELECT)
        if config.format == "webdataset":
            rows = _kept(rows, pc.equal(rows["status"], str(Reason.OK)), left_out, "failed")
        if config.where is not None:
            wanted = np.sort(matching_keys(rows.select(_COLUMNS), config.where))
            rows = _kept(rows, pa.array(is_in(wanted, rows["pair_key"].to_numpy())), left_out, "where")
        if config.drop_duplicates:
            twice = is_in(dropped, rows["pair_key"].to_numpy())
            rows = _kept(rows, pa.array(~twice), left_out, "duplicates")
        found.append(_arrays(rows))
    keys, times, statuses = (np.concatenate(column) for column in zip(*found, strict=True))
    if not len(keys):
        raise NothingToDo(
            "there is nothing to export",
            expected="images" if config.where is None else f"images with {config.where}",
            remedy="clipmill status shows what there is",
        )
    order = np.argsort(keys)
    digest = blake2b(digest_size=16)
    for column in (keys, times, statuses):
        digest.update(np.ascontiguousarray(column[order]).tobytes())
    return Selection(keys[order], digest.hexdigest(), dict(left_out))


def _kept(rows: pa.Table, keep: Any, left_out: Counter[str], why: str) -> pa.Table:
    kept = rows.filter(keep)
    left_out[why] += rows.num_rows - kept.num_rows
    return kept


def _arrays(rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """Keys, and by what a row is known to be the same: time of the last try, and status."""
    times = pc.fill_null(rows["fetched_at"].cast(pa.int64()), 0).to_numpy()
    statuses = np.array([_STATUSES.get(s, 255) for s in rows["status"].to_pylist()], np.uint8)
    return rows["pair_key"].to_numpy(), times, statuses


def slices(keys: NDArray[np.int64], size: int) -> Iterator[Shard]:
    """The shards of sorted keys."""
    for number, start in enumerate(range(0, len(keys), size)):
        yield Shard(number, pa.array(keys[start : start + size]))


def _extras(pairs: tuple[File, ...], selection: Selection) -> dict[str, str]:
    """The extra columns of all pairs to export, in order of their first coming, and their kinds."""
    kinds: dict[str, str] = {}
    for batch in Rows(pairs, EXTRA_ROWS).batches():
        mine = batch.filter(pa.array(is_in(selection.keys, batch["pair_key"].to_numpy())))
        add_kinds(kinds, mine["extra"].to_pylist())
    return dict(sorted(kinds.items()))


def _sources(config: ExportConfig, run: Run, engine: Engine, work: tuple[UPath, Selection, list[Shard]]) -> Sources:
    """The tables' files, or for many shards files sorted by key, which are made here."""
    folder, selection, shards = work
    found = []
    for name, schema in (("images", IMAGE_ROWS), ("pairs", EXTRA_ROWS)):
        rows = Rows(files(run.workspace.table(name), run.input_versions[name]), schema)
        effort = rows.effort(shard.keys for shard in shards)
        if effort > _STRAIGHT and effort * sum(file.bytes for file in rows.files) > STRAIGHT_BYTES:
            place = str(folder / _RUNS / f"{selection.digest}-{name}-{run.input_versions[name]}")
            factory = partial(SortStage, schema, selection.keys, place)
            outcomes = list(engine.map(factory, groups(rows.files), Resources(workers=config.workers)))
            if failed := [o.reason for o in outcomes if isinstance(o, Quarantined)]:
                raise ClipmillError(f"{len(failed)} groups of files of {name} cannot be read", actual=failed[-1])
            paths = sorted(o.result for o in outcomes if not isinstance(o, Quarantined))
            rows = Rows(tuple(map(File, paths)), schema)
        found.append(rows)
    return Sources(*found)


def files(table: Table, version: int) -> tuple[File, ...]:
    """The files of a version of a table, with the ranges of their keys."""
    opened = table.open(version) if version >= 0 else None
    if opened is None:
        return ()
    actions = pa.table(opened.get_add_actions(flatten=True)).to_pylist()
    ranges = {a["path"]: (a["size_bytes"], a.get("min.pair_key"), a.get("max.pair_key")) for a in actions}
    return tuple(File(f"{opened.table_uri.rstrip('/')}/{unquote(path)}", *known) for path, known in ranges.items())


# -- where to --------------------------------------------------------------------------------------------


def open_output(output: str) -> UPath:
    """The folder of the export, made if it is not there."""
    try:
        folder = UPath(output) if "://" in output else UPath(output).absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, ImportError) as exc:
        raise UsageError(f"--output {output} cannot be opened", actual=str(exc)) from exc
    except OSError as exc:
        raise output_error(exc, output) from exc
    return folder


def claim(folder: UPath, config: ExportConfig, digest: str, encoder: str | None = None) -> None:
    """Mark an empty folder as this export's; ``encoder``: whose vectors.

    Raises:
        UsageError: it holds another export, or something else.
    """
    mine: dict[str, Any] = {"format": config.format, "shard_size": config.shard_size, "selection": digest}
    if encoder is not None:
        mine["encoder"] = encoder
    mark = folder / MARK
    if mark.exists():
        theirs = json.loads(mark.read_text())
        if theirs == mine:
            return
        changed = [name for name in mine if theirs.get(name) != mine[name]]
        raise UsageError(
            f"--output {folder} holds another export",
            expected=", ".join(f"{name} {mine[name]}" for name in changed),
            actual=", ".join(f"{name} {theirs.get(name)}" for name in changed),
            remedy="name an empty folder: other settings, or images that came or changed, are another export",
        )
    if others := sorted(path.name for path in folder.iterdir())[:3]:
        raise UsageError(
            f"--output {folder} is not empty",
            expected="an empty folder, or one with the same export",
            actual="there are: " + ", ".join(others),
            remedy="name another folder",
        )
    try:
        write_atomic(mark, json.dumps(mine, indent=2).encode())
    except OSError as exc:
        raise output_error(exc, str(folder)) from exc


def clean(folder: UPath) -> None:
    """Remove what only the way there needed."""
    remove_parts(folder)
    runs = folder / _RUNS
    if runs.exists():
        runs.fs.rm(runs.path if not is_local(runs) else str(runs), recursive=True)


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill export``."""
    return command("export", ExportConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
