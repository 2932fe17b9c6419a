"""One modality's file of a new index version, built from nothing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from upath import UPath

from jobs.index_changes import Now
from pipeline.engine import Engine, Quarantined
from pipeline.index import (
    EXACT_UP_TO,
    Answers,
    Kind,
    ShardFiller,
    Source,
    Stored,
    Truth,
    choose,
    enough_memory,
    fill,
    hidden,
    merge_shards,
    sample,
    sample_size,
    train,
    tune,
    write_index,
)
from pipeline.keys import both, minus
from pipeline.ledger import Run
from schemas.cards import IndexFile, Point
from schemas.configs import IndexConfig
from schemas.errors import ClipmillError, GateRefused

BESIDE_FROM = EXACT_UP_TO
"""A file of no more vectors is written anew in no time."""


@dataclass(frozen=True)
class Made:
    """An index that reaches its target."""

    index: Any
    truth: Truth
    factory: str
    point: Point
    curve: tuple[Point, ...]
    trained_on: int


class Builder:
    """Makes the files of the version ``run.id`` in ``folder``. ``rebuilt``: why a modality was built from nothing."""

    def __init__(self, config: IndexConfig, run: Run, engine: Engine, now: Now) -> None:
        self.config, self.run, self.engine, self.now = config, run, engine, now
        self.folder: UPath = run.workspace.index_dir(now.encoder.id)
        self.rebuilt: dict[str, str] = {}

    # -- from nothing --------------------------------------------------------------------------------

    def build(self, modality: str, why: str) -> IndexFile:
        """Build the kinds that suit, one after the other, until one reaches the target.

        Raises:
            GateRefused: none does.
        """
        self.rebuilt[modality] = why
        count = len(self.now.present[modality])
        truth, tried = self._held_out(modality), list[tuple[Kind, Point]]()
        known = False
        for kind in self.candidates(modality):
            if tried:
                last, point = tried[-1]
                print(
                    f"index: {modality}: {last.factory} reaches recall@10 {point.recall_at_10:.3f} at best, "
                    f"{self.config.recall} are asked for; now {kind.factory}",
                    file=sys.stderr,
                )
            index, truth = self._filled(kind.factory, modality, truth, known)
            known = True
            with self.run.stage("tune"):
                point, curve = tune(index, truth, self.config.recall)
            if point.recall_at_10 >= self.config.recall:
                return self.write(modality, Made(index, truth, kind.factory, point, curve, count))
            tried.append((kind, point))
        raise self._refused(modality, tried)

    def candidates(self, modality: str) -> list[Kind]:
        """Kinds to build, in the order in which to try them."""
        count, config = len(self.now.present[modality]), self.config
        if config.factory != "auto":
            return [Kind(config.factory, 0.0, 0.0, 0.0)]
        return choose(count, self.now.encoder.dim, config.recall, config.memory)

    def _filled(self, factory: str, modality: str, truth: Truth, known: bool) -> tuple[Any, Truth]:
        """An index of all vectors, and the truth among them, unless it is ``known``."""
        source, present = self.now.sources[modality], self.now.present[modality]
        with self.run.stage("train"):
            places = np.sort(sample(len(present), sample_size(factory, source.dim)))
            index = train(source.take(present[places]), factory)
        with self.run.stage("add"):
            asked = None if known else truth
            if len(present) <= self.config.shard_size:
                found = fill(index, source, asked)
            else:
                found = self._sharded(index, source, asked)
        return index, truth if found is None else found

    def _sharded(self, index: Any, source: Source, truth: Truth | None) -> Truth | None:
        """Fill copies of an empty index in Ray tasks, and merge them into it."""
        world = -(-len(self.now.present[source.modality]) // self.config.shard_size)
        folder = self.folder / self.run.id / "shards"
        trained = Stored.of(index, folder / f"{source.modality}.trained")
        shards = []
        for done in self.engine.map(partial(ShardFiller, trained, source, world, folder, truth), range(world)):
            if isinstance(done, Quarantined):
                raise ClipmillError(
                    f"a shard of the {source.modality} index cannot be built",
                    actual=done.reason,
                    remedy="a smaller --shard-size needs less memory a worker",
                )
            shards.append(done.result)
        found = merge_shards(index, shards, truth)
        UPath(trained.path).unlink()
        folder.rmdir()
        return found

    def _held_out(self, modality: str) -> Truth:
        """Queries: vectors of the other modality, which are never in this index; else own vectors of sampled keys."""
        other = "text" if modality == "image" else "image"
        present, wanted = self.now.present, self.config.queries
        pairs = both(present[modality], present[other])
        across = pairs[np.sort(sample(len(pairs), wanted))]
        alone = minus(present[modality], pairs)
        alone = alone[np.sort(sample(len(alone), wanted - len(across)))] if len(across) < wanted else alone[:0]
        queries = [self.now.sources[other].take(across), self.now.sources[modality].take(alone)]
        own = np.concatenate([np.full(len(across), -1, np.int64), alone])
        return Truth.empty(np.concatenate(queries).astype(np.float32), own)

    def _refused(self, modality: str, tried: list[tuple[Kind, Point]]) -> GateRefused:
        count, dim, config = len(self.now.present[modality]), self.now.encoder.dim, self.config
        expected = f"recall@10 of at least {config.recall}"
        remedy = "ask for less with --recall"
        if config.factory != "auto":
            remedy = "use --factory auto or a finer one, or ask for less with --recall"
        elif config.memory is not None:
            expected += f" in {size_text(config.memory)}"
            least = max([config.recall, *(kind.recall for kind, _ in tried)])
            if enough := enough_memory(count, dim, least, config.memory):
                remedy = f"--memory {size_text(enough)} would do; or ask for less with --recall"
        if not tried:
            return GateRefused(
                f"no kind of index of {count:,} {modality} vectors of {dim} dimensions fits into the memory",
                expected=expected, actual="none fits", remedy=remedy,
            )  # fmt: skip
        kind, best = max(tried, key=lambda t: t[1].recall_at_10)
        size = f", {size_text(kind.bytes(count, dim))}" if kind.vector else ""
        return GateRefused(
            f"the recall@10 of {modality} is too low to publish",
            expected=expected, actual=f"{best.recall_at_10:.3f} at best ({kind.factory}{size})", remedy=remedy,
        )  # fmt: skip

    # -- on disk -------------------------------------------------------------------------------------

    def write(self, modality: str, made: Made) -> IndexFile:
        """Write an index and its truth; the entry in the card."""
        folder, path = self.folder / self.run.id, f"{modality}.faiss"
        with self.run.stage("write"):
            size, sha256 = write_index(made.index, folder / path)
            made.truth.save(folder / truth_path(modality))
            if is_large(int(made.index.ntotal)):
                Answers.of(made.index, made.truth, made.point.search).save(folder / answers_path(modality))
        return IndexFile(
            path=path,
            modality=modality,
            factory=made.factory,
            count=int(made.index.ntotal) - hidden(made.index),
            deleted=hidden(made.index),
            bytes=size,
            sha256=sha256,
            recall_at_1=made.point.recall_at_1,
            recall_at_10=made.point.recall_at_10,
            recall_at_100=made.point.recall_at_100,
            ms_per_query=made.point.ms_per_query,
            search=made.point.search,
            curve=made.curve,
            trained_on=made.trained_on,
        )


def is_large(count: int) -> bool:
    """Is it worth while to leave a file of so many vectors as it is, and to put new ones beside it?"""
    return count > BESIDE_FROM


def truth_path(modality: str) -> str:
    """Where a version has the truth of a modality."""
    return f"{modality}.truth.npz"


def answers_path(modality: str) -> str:
    """Where it has what a search of the large file finds for the truth's queries."""
    return f"{modality}.answers.npz"


def size_text(count: int) -> str:
    """Bytes as --memory takes them, rounded up."""
    for unit, factor in (("GB", 2**30), ("MB", 2**20), ("KB", 2**10)):
        if count >= 10 * factor or unit == "KB":
            return f"{-(-count // factor)}{unit}"
    return str(count)
