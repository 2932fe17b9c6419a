"""index: embeddings of one encoder -> a new version of its FAISS indices and records, measured, then published.

What changed since the published version is found from the tables' new files; only that is added and taken away, unless
a limit says that the index is to be built anew.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from jobs.audit import audit
from jobs.base import command, only_encoder
from jobs.index_build import Builder
from jobs.index_changes import MODALITIES, Changes, Now, new_files
from jobs.index_update import unchanged, update
from pipeline.encoders import embedded_encoders, read_card
from pipeline.engine import Engine
from pipeline.index import copy_file, frontier, keys_sha256
from pipeline.index.versions import discard, publish, published, rollback, vacuum
from pipeline.keys import Keys, minus, union
from pipeline.ledger import Run, alive
from pipeline.plots import Axes, lines
from pipeline.records import Records, compact, write_segment
from pipeline.storage import write_atomic
from pipeline.tombstones import Tombstones
from schemas.cards import EncoderCard, IndexCard, IndexFile, Segment
from schemas.configs import IndexConfig
from schemas.errors import CardError, NothingToDo, UsageError, WorkspaceError

_SEGMENTS = 8
"""More segments of records than these are written as one."""
_PLOT = "recall.png"


def run(config: IndexConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`IndexConfig`. Runs in the driver, but for shards of very many vectors."""
    workspace = run.workspace.require()
    if config.rollback or config.delete:
        _by_hand(config, run)
        return
    if unknown := [m for m in config.modality if m not in MODALITIES]:
        raise UsageError(f"no such modality: {', '.join(unknown)}", expected=" or ".join(MODALITIES))
    encoder = only_encoder(run, config.encoder, embedded_encoders(workspace), "embeddings")
    run.encoder = encoder
    card, folder = read_card(workspace, encoder), workspace.index_dir(encoder)
    with run.stage("read"):
        versions = {name: run.reads(name) for name in ("embeddings", "images", "pairs")}
        before = _before(config, folder)
        records = Records.open(folder, before.segments, verify=False) if before else None
        deleted = Tombstones(folder / "deleted").keys()
        now = Now.of(workspace, card, versions, deleted, before, records)
        changes = Changes.since(before, records, now) if before and records else None
    wanted = [m for m in config.modality if len(now.present[m])]
    if not wanted:
        raise NothingToDo(f"no vectors of {encoder} to index", remedy="clipmill embed first")
    builder = Builder(config, run, engine, now)
    if before and changes and not changes.something and all(unchanged(builder, m, before) for m in wanted):
        run.figures |= _figures(before) | {"added": 0, "removed": 0, "changed": 0, "rebuilt": {}}
        vacuum(folder, config.keep, _under_way(run))
        return
    keys = union(*(now.present[m] for m in wanted))
    run.counts["in"] = run.counts["out"] = len(keys)
    run.begin()
    doubled = any((k[1:] == k[:-1]).any() for k in now.present.values())  # only an audit of all rows names them
    audit(run, card, config.audit, new_files(before, now) if before and not doubled else None)
    try:
        new = _version(builder, wanted, before, changes, keys)
    except Exception:
        discard(folder, run.id)
        raise
    publish(folder, new)
    run.outputs["index"] = str(folder / new.version)
    run.figures["rebuilt"] = builder.rebuilt
    run.figures |= _figures(new)
    vacuum(folder, config.keep, _under_way(run))


def _before(config: IndexConfig, folder: UPath) -> IndexCard | None:
    """The published version to go on from; None where all is to be made anew.

    Raises:
        CardError: its card is damaged.
    """
    if config.rebuild:
        return None
    card = published(folder)
    return card if card is not None and card.segments else None


def _version(
    builder: Builder, wanted: Sequence[str], before: IndexCard | None, changes: Changes | None, keys: Keys
) -> IndexCard:
    """Write everything of a new version but its card, which is returned.

    Raises:
        GateRefused: the recall of a modality is too low.
    """
    run, now, folder = builder.run, builder.now, builder.folder
    if before is None or changes is None:
        why = "asked" if builder.config.rebuild else "first"
        files = [_timed(builder, m, lambda m: builder.build(m, why)) for m in wanted]
        with run.stage("records"):
            segments: tuple[Segment, ...] = (write_segment(folder, now.records(now.keys()), run.id),)
        run.figures |= {"added": len(keys), "removed": 0, "changed": 0}
    else:
        with run.stage("records"):
            segments = _grown(builder, before, changes)
            records = Records.open(folder, segments, verify=False)
        files = [_timed(builder, m, lambda m: update(builder, m, before, changes, records)) for m in wanted]
        changed = union(*(changes.changed(m) for m in MODALITIES))
        run.figures |= {"added": len(changes.new_keys), "removed": len(changes.gone_keys), "changed": len(changed)}
    _draw(folder, before, files, run.id)
    return IndexCard(
        encoder=now.encoder,
        version=run.id,
        count=len(keys),
        deleted=sum(f.deleted for f in files),
        keys_sha256=keys_sha256(keys),
        table_version=now.versions["embeddings"],
        images_version=now.versions["images"],
        files=tuple(files),
        segments=segments,
        previous=_name(folder),
        run=run.id,
    )


def _timed(builder: Builder, modality: str, make: Any) -> IndexFile:
    with builder.run.stage(modality):
        made: IndexFile = make(modality)
        return made


def _grown(builder: Builder, before: IndexCard, changes: Changes) -> tuple[Segment, ...]:
    """The version's segments with one of the rows that changed."""
    folder, name = builder.folder, builder.run.id
    try:
        new = write_segment(folder, changes.rows, name)
    except NothingToDo:
        return before.segments
    segments = (*before.segments, new)
    return (compact(folder, segments, f"{name}-compact"),) if len(segments) > _SEGMENTS else segments


def _name(folder: UPath) -> str | None:
    """The version that CURRENT names, readable or not."""
    current = folder / "CURRENT"
    return current.read_text().strip() or None if current.exists() else None


def _draw(folder: UPath, before: IndexCard | None, files: Sequence[IndexFile], version: str) -> None:
    """The plot of recall against latency; where nothing was tuned, that of the version before."""
    if before is not None and [f.curve for f in before.files] == [f.curve for f in files]:
        with suppress(WorkspaceError):
            copy_file(folder / before.version / _PLOT, folder / version / _PLOT)
            return
    write_atomic(folder / version / _PLOT, _plot(files))


def _plot(files: Sequence[IndexFile]) -> bytes:
    curves = {}
    for file in files:
        points = frontier(file.curve)
        curves[file.modality] = [p.ms_per_query for p in points], [p.recall_at_10 for p in points]
    axes = Axes("recall against latency", "ms a query, one thread", "recall@10", log_x=True, marks=True)
    return lines(curves, axes)


# ---- by hand ---------------------------------------------------------------------------------------


def _by_hand(config: IndexConfig, run: Run) -> None:
    """``--rollback``, or ``--delete``."""
    workspace = run.workspace
    if config.rollback and config.delete:
        raise UsageError("--rollback and --delete are two commands", remedy="give them one after the other")
    encoder = only_encoder(run, config.encoder, workspace.indexed_encoders(), "index")
    run.encoder, folder = encoder, workspace.index_dir(encoder)
    if config.rollback:
        run.begin()
        card = rollback(folder)
        run.figures |= _figures(card) | {"rolled_back": True}
        run.outputs["index"] = str(folder / card.version)
        return
    keys = union(*(_listed(item) for item in config.delete))
    tombstones = Tombstones(folder / "deleted")
    new = minus(keys, tombstones.keys())
    run.counts |= {"in": len(keys), "out": len(keys)}
    run.begin()
    tombstones.add(new)
    run.figures |= {"deleted": len(new), "already_deleted": len(keys) - len(new), "deleted_keys": tombstones.count}
    with suppress(CardError):  # what is deleted is so, whatever became of the index
        _, card = load_published(run, encoder)
        known = Records.open(folder, card.segments, verify=False).known(keys)
        run.figures |= {"version": card.version, "not_indexed": int((~known).sum())}


def _listed(item: str) -> Keys:
    """A key, or those of a file: .npy, .parquet with a column pair_key, or text with a key on each line.

    Raises:
        UsageError: it is neither.
    """
    try:
        if item.isdigit():
            return np.array([int(item)], np.int64)
        path = Path(item)
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        elif path.suffix == ".parquet":
            found = pq.read_table(path, columns=["pair_key"])["pair_key"].to_numpy()
        else:
            lines_ = [line.strip() for line in path.read_text().splitlines()]
            found = np.array([int(line) for line in lines_ if line and line != "pair_key"], np.int64)
        if found.ndim != 1 or found.dtype.kind not in "iu" or (found < 0).any():
            raise ValueError(f"{found.dtype} {list(found.shape)}")
    except (OSError, ValueError, OverflowError, KeyError) as exc:
        raise UsageError(
            f"--delete {item}: no key and no file of keys",
            expected="pair_keys: numbers, or files .npy, .parquet (column pair_key), or text with one a line",
            actual=str(exc),
        ) from exc
    return np.asarray(found, np.int64)


# ---- about the published version -------------------------------------------------------------------


def _under_way(run: Run) -> set[str]:
    """Runs that may be writing a version now: this one, and others that have neither ended nor been killed."""
    columns = ["run", "host", "pid", "outcome", "job"]
    rows = run.workspace.table("runs").read(columns, (pc.field("outcome") == "running") & (pc.field("job") == "index"))
    here = socket.gethostname()
    return {run.id} | {r["run"] for r in rows.to_pylist() if r["host"] != here or alive(r["pid"])}


def _figures(card: IndexCard) -> dict[str, Any]:
    names = ("factory", "count", "deleted", "recall_at_1", "recall_at_10", "recall_at_100", "ms_per_query")
    return {
        "version": card.version,
        "count": card.count,
        "deleted": card.deleted,
        **{f"{f.modality}_{name}": getattr(f, name) for f in card.files for name in names},
        **{f"{f.modality}_bytes": f.total_bytes for f in card.files},
    }


def load_published(run: Run, encoder: str) -> tuple[EncoderCard, IndexCard]:
    """The published index's card, with its encoder's.

    Raises:
        NothingToDo: nothing is published for this encoder.
        CardError: its card is damaged.
    """
    card = run.workspace.published_index(encoder)
    if card is None:
        raise NothingToDo(f"no index of {encoder} is published", remedy="clipmill index first")
    return card.encoder, card


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill index``."""
    return command("index", IndexConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
