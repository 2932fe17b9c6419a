"""embed: images that are ok and not yet embedded by this encoder -> rows of embeddings."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from jobs.base import command
from jobs.encoders import load_encoder, save_card
from pipeline.engine import Engine, Quarantined, Resources
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.tables import Part
from pipeline.workspace import Workspace
from schemas.configs import EmbedConfig
from schemas.errors import ClipmillError, NothingToDo, Reason, WorkspaceError


@dataclass(frozen=True)
class Shard:
    """Rows of one Parquet file of images, named by their keys."""

    file: str
    keys: pa.Array


class Worker:
    """Reads a shard's images, embeds them, writes the part. The model is loaded once a worker."""

    def __init__(self, config: EmbedConfig, spec: str, run: str) -> None:
        from pipeline.embed import EmbedStage

        workspace = Workspace(config.workspace)
        self._stage = EmbedStage(load_encoder(workspace, spec, config.precision), config.batch_size, run)
        self._embeddings = workspace.table("embeddings")

    def __call__(self, shard: Shard) -> tuple[Part, list[int]]:
        columns = ["pair_key", "caption", "image"]
        images = ds.dataset(shard.file).to_table(columns=columns, filter=pc.field("pair_key").isin(shard.keys))
        if images.num_rows != len(shard.keys):
            raise WorkspaceError(
                f"{shard.file} has changed",
                expected=f"{len(shard.keys)} rows of the shard",
                actual=f"{images.num_rows}",
                remedy="do not vacuum while a job runs; run it again",
            )
        rows, bad = self._stage(images)
        return self._embeddings.write_part(rows), bad


def run(config: EmbedConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`EmbedConfig`."""
    run.workspace.require()
    with run.stage("encoder"):
        card = load_encoder(run.workspace, config.encoder, config.precision).card
    run.encoder = card.id
    with run.stage("plan"):
        shards = list(plan(config, run, card.id))
    run.counts["in"] = sum(len(s.keys) for s in shards)
    if shards:
        run.begin()
        save_card(run.workspace, card)
    spec = config.encoder or card.model
    quarantined: list[str] = []
    resources = Resources(workers=config.workers, gpus=config.gpus_per_worker)
    with run.stage("embed"), Progress("embed", run.counts["in"], "pairs") as progress:
        for outcome in engine.map(partial(Worker, config, spec, run.id), shards, resources):
            if isinstance(outcome, Quarantined):
                quarantined.append(outcome.reason)
                run.counts["failed"] += len(outcome.shard.keys)
                continue
            part, bad = outcome.result
            run.commit("embeddings", [part])
            _mark_undecodable(run, bad)
            run.counts["out"] += part.rows
            run.counts["failed"] += len(bad)
            progress.advance(len(outcome.shard.keys), failed=run.counts["failed"])
    seconds = max(run.seconds["embed"], 1e-9)
    run.figures |= {
        "encoder": card.id, "dim": card.dim, "pairs_per_second": run.counts["out"] / seconds,
        "quarantined": quarantined,
    }  # fmt: skip
    run.outputs["embeddings"] = run.workspace.table("embeddings").uri
    if quarantined:
        raise ClipmillError(
            f"{len(quarantined)} shards failed on every try; their pairs are not embedded",
            actual=quarantined[-1],
            remedy="run the same command again: only what is missing is embedded",
        )


def plan(config: EmbedConfig, run: Run, encoder: str) -> Iterator[Shard]:
    """Shards of the images that are ok and that this encoder has not embedded, at a fixed version of images.

    Raises:
        NothingToDo: there is no image at all.
    """
    version = run.reads("images")
    images = run.workspace.table("images")
    done = run.workspace.table("embeddings").keys(pc.field("encoder") == encoder)["pair_key"].combine_chunks()
    found = 0
    for file in images.files(version):
        keys = ds.dataset(file).to_table(columns=["pair_key"], filter=pc.field("status") == str(Reason.OK))["pair_key"]
        found += len(keys)
        todo = keys.filter(pc.invert(pc.is_in(keys, done))).combine_chunks()
        for start in range(0, len(todo), config.shard_size):
            yield Shard(file, todo.slice(start, config.shard_size))
    if found == 0:
        raise NothingToDo(
            "there are no images to embed",
            expected="rows with status ok in the table images",
            remedy="clipmill download first",
        )


def _mark_undecodable(run: Run, keys: list[int]) -> None:
    """Images that were fetched but do not decode: their row in images gets the reason, so no run tries again."""
    if keys:
        rows = run.workspace.table("images").read(where=pc.field("pair_key").isin(keys))
        n = rows.num_rows
        for name, value in (("status", str(Reason.DECODE)), ("error", "does not decode when embedding")):
            rows = rows.set_column(rows.column_names.index(name), name, pa.array([value] * n, pa.string()))
        run.upsert("images", rows)


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill embed``."""
    return command("embed", EmbedConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
