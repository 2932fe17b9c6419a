"""embed: images that are ok and not embedded by this encoder yet -> rows of embeddings; scores for older rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa

from jobs.base import command
from jobs.embed_workers import Asked, DecodeWorker, EmbedWorker, LabelWorker, Order, Result, ScoreWorker
from pipeline.embed.planning import Planner, Shard, Work
from pipeline.encoders import card_of, check_card, forget_card, named, save_card, stamp_of
from pipeline.engine import Done, Engine, Quarantined, Resources
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.tables import Table
from schemas.configs import EmbedConfig
from schemas.errors import ClipmillError, EncoderMismatch, Reason

_DECODERS = 4
"""Decoding workers for each that has a GPU."""
_HANDED_BYTES = 128 << 20
"""Pixels of a shard that goes from a decoding worker to one with the model."""
_SHARDS_EACH = 4
"""Shards for every worker, at least; each of _SMALL_SHARD pairs, at least."""
_SMALL_SHARD = 64
_MARKED_AT_ONCE = 10_000
"""Undecodable images marked in one commit, which rewrites the files that they are in."""


def run(config: EmbedConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`EmbedConfig`."""
    workspace = run.workspace.require()
    asked = Asked.of(config)
    with run.stage("encoder"):
        spec = named(workspace, config.encoder)
        precision = "int8" if config.precision == "int8" else "auto"  # no other makes another encoder of it
        card = card_of(workspace, spec, precision)
        check_card(workspace, card)
    run.encoder = card.id
    order = Order(config, spec, card, run.id, asked, further=_further(workspace.table("embeddings")))
    run.figures |= {"encoder": card.id, "dim": card.dim, "rescored": 0}
    run.outputs["embeddings"] = workspace.table("embeddings").uri
    try:
        with Planner(card.id) as planner:
            _run(order, run, engine, planner)
    except EncoderMismatch:
        forget_card(workspace, spec, precision)
        raise


def _run(order: Order, run: Run, engine: Engine, planner: Planner) -> None:
    with run.stage("plan"):
        table = order.embeddings()
        base = table.version()
        work = planner.work(run.workspace.table("images"), table, run.reads("images"))
        records = order.asked.records(order.card.id)
        numbers = {name: number for name, (number, _) in records.items()}
        again = [c for name, (number, columns) in records.items() if table.recorded(name) != number for c in columns]
        unscored = list(planner.unscored(table, [f.name for f in order.asked.fields], again))
        order = replace(order, again=bool(again))
    run.counts["in"] = work.total
    if order.asked.labels is not None and (work.total or unscored):
        with run.stage("labels"):
            order = replace(order, classifier=_only_result(engine, partial(LabelWorker, order)))
    scored = _score(order, run, engine, unscored)
    tally = Tally(run, order, table)
    _embed(tally, engine, planner, work)
    complete = not tally.quarantined and table.writers(base) <= {run.id}
    record = (numbers if scored else {}) | (work.record if complete else {})
    if (work.total or run.figures["rescored"]) and record:
        table.record(record, run.id)
    run.figures |= tally.figures | {"new": work.new, "changed": work.changed, "quarantined": tally.quarantined}
    if tally.quarantined:
        raise ClipmillError(
            f"{len(tally.quarantined)} shards failed on every try; their pairs are not embedded",
            actual=tally.quarantined[-1],
            remedy="run the same command again: only what is missing is embedded",
        )


def _further(table: Table) -> tuple[pa.Field, ...]:
    """Columns that the table has beside its own."""
    return tuple(pa.field(name, t) for name, t in table.columns().items() if name not in table.spec.schema.names)


# ---- embedding -------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of the shards so far."""

    run: Run
    order: Order
    table: Table
    quarantined: list[str] = field(default_factory=list)
    bad: list[pa.Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=lambda: {"images_encoded": 0, "texts_encoded": 0})
    begun: bool = False

    def add(self, outcome: Done[Shard, Result] | Quarantined[Shard], record: dict[str, int]) -> None:
        """Commit a shard's rows. ``record``: for the log of embeddings, with rows that replace others."""
        if isinstance(outcome, Quarantined):
            self.quarantined.append(outcome.reason)
            self.run.counts["failed"] += outcome.shard.rows
            return
        result = outcome.result
        self._begin(result)
        if result.part is not None:
            self.table.commit([result.part], self.run.id)
        elif result.changed is not None and result.changed.num_rows:
            self.table.upsert(result.changed, self.run.id, record=record)
        self.bad.append(result.bad)
        if sum(bad.num_rows for bad in self.bad) >= _MARKED_AT_ONCE:
            self.mark()
        self.run.counts["out"] += outcome.shard.rows - result.bad.num_rows
        self.run.counts["failed"] += result.bad.num_rows
        self._count(result.figures)

    def mark(self) -> None:
        """Images that were fetched but do not decode: their row in images gets the reason, so no run tries again.

        But for those that have another image by now.
        """
        rows = pa.concat_tables(self.bad) if self.bad else pa.table({})
        self.bad = []
        if rows.num_rows:
            values = {"status": str(Reason.DECODE), "error": "does not decode when embedding"}
            for name, value in values.items():
                rows = rows.append_column(name, pa.array([value] * rows.num_rows, pa.string()))
            where = "target.sha256 IS NOT DISTINCT FROM source.sha256"
            self.run.workspace.table("images").update(rows, self.run.id, where)

    def _begin(self, result: Result) -> None:
        """Before anything is committed: the run, and the card of what was really loaded."""
        if not self.begun:
            self.run.begin()
            save_card(self.run.workspace, result.card)
            self.table.stamp(stamp_of(result.card), self.run.id)
            self.begun = True

    def _count(self, found: dict[str, Any]) -> None:
        self.figures["images_encoded"] += found["images"]
        self.figures["texts_encoded"] += found["texts"]
        self.figures |= {name: value for name, value in found.items() if name not in ("images", "texts")}


def _embed(tally: Tally, engine: Engine, planner: Planner, work: Work) -> None:
    """Embed what was planned, and commit it shard by shard."""
    run, order = tally.run, tally.order
    config, side = order.config, order.card.image_size
    with run.stage("embed"), Progress("embed", work.total, "images") as progress:
        if work.total:
            resources = Resources(workers=config.workers, gpus=config.gpus_per_worker)
            slots = engine.slots(resources)
            decoders = _decoders(config, slots)
            most = max(_HANDED_BYTES // (3 * side * side), 1) if decoders else config.shard_size
            size = min(most, _shard_size(config.shard_size, work.total, slots))
            prepare = (partial(DecodeWorker, order), Resources(workers=decoders)) if decoders else None
            # Should another run replace a row by an older image: the log tells that nothing newer was looked at.
            before = {name: max(tally.table.recorded(name), 0) for name in work.record}
            for outcome in engine.map(partial(EmbedWorker, order), planner.shards(size), resources, prepare=prepare):
                tally.add(outcome, before)
                progress.advance(outcome.shard.rows, failed=run.counts["failed"])
            tally.mark()
    run.figures["pairs_per_second"] = run.counts["out"] / max(run.seconds["embed"], 1e-9)


def _decoders(config: EmbedConfig, slots: int) -> int:
    if config.decoders is not None:
        return config.decoders
    return _DECODERS * slots if config.gpus_per_worker else 0


def _shard_size(most: int, images: int, slots: int) -> int:
    """Pairs in a shard: fewer than asked where some of the workers would have nothing to do, or wait for the last."""
    return min(most, max(-(-images // (_SHARDS_EACH * slots)), _SMALL_SHARD))


# ---- scores ----------------------------------------------------------------------------------------


def _score(order: Order, run: Run, engine: Engine, unscored: Sequence[list[str]]) -> bool:
    """Score the rows of these files from their stored vectors. Were all of them still there, and is none lost?"""
    table, rows, complete = order.embeddings(), 0, True
    if not unscored:
        return True
    with run.stage("scores"), Progress("score", len(unscored), "files") as progress:
        resources = Resources(workers=order.config.workers)
        for outcome in engine.map(partial(ScoreWorker, order), unscored, resources):
            if isinstance(outcome, Quarantined):
                raise ClipmillError("embedded rows cannot be scored", actual=outcome.reason)
            if (part := outcome.result) is not None:
                run.begin()
                done = table.swap(outcome.shard, part, run.id)
                complete &= done == part.rows
                rows += done
            progress.advance(1)
    run.figures["rescored"] = rows
    return complete


def _only_result(engine: Engine, factory: Any) -> Any:
    """What one worker makes."""
    (outcome,) = engine.map(factory, [0], Resources(workers=1))
    if isinstance(outcome, Quarantined):
        raise ClipmillError("the labels cannot be embedded", actual=outcome.reason)
    return outcome.result


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill embed``."""
    return command("embed", EmbedConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
