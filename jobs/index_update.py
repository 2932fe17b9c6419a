"""One modality's file of a new index version, made of the published one's.

A few new vectors go to a small file beside the large one, which stays as it is: that costs what they are, not what
there is. When they have become many, they are added to the large file, which is written anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from upath import UPath

from jobs.index_build import Builder, Made, answers_path, is_large, truth_path
from jobs.index_changes import Changes
from pipeline.index import (
    BLOCK,
    Answers,
    Stored,
    Truth,
    add,
    build,
    copy_file,
    deepened,
    findable,
    hidden,
    kind_beside,
    kind_of,
    measure,
    open_index,
    open_side,
    read_keys,
    remove,
    sample_size,
    save_arrays,
    tune,
)
from pipeline.keys import Keys, minus, union
from pipeline.records import Records
from schemas.cards import IndexCard, IndexFile, SideFile

_MOST_BESIDE = 100_000
"""More of them would make themselves felt in each search: they are scanned one by one."""


def outdated(builder: Builder, modality: str, file: IndexFile) -> str | None:
    """Why a file is to be built anew although its vectors are those of the table; None: it is not."""
    config, count, dim = builder.config, len(builder.now.present[modality]), builder.now.encoder.dim
    kinds = builder.candidates(modality)
    if config.factory != "auto":
        if file.factory != config.factory:
            return "factory"
    elif kind_of(file.factory) not in {kind.name for kind in kinds}:
        return "kind"
    elif config.memory is not None and file.total_bytes > config.memory:
        return "memory"
    trains = sample_size(file.factory, dim) > 0
    moved = config.factory == "auto" and bool(kinds) and kind_of(file.factory) != kinds[0].name
    if (trains or moved) and count > (1 + config.max_growth) * file.trained_on:
        return "growth"
    return None


def unchanged(builder: Builder, modality: str, before: IndexCard) -> bool:
    """Is the published file good as it is, if its vectors are the table's?"""
    if modality not in {f.modality for f in before.files}:
        return False
    file = before.file(modality)
    return outdated(builder, modality, file) is None and file.recall_at_10 >= builder.config.recall


def update(builder: Builder, modality: str, before: IndexCard, changes: Changes, records: Records) -> IndexFile:
    """The published file with what changed since, or one built anew. ``records``: of the version to be.

    Raises:
        CardError: the published file, or its truth, is damaged.
        GateRefused: no kind reaches the target.
    """
    if modality not in {f.modality for f in before.files}:
        return builder.build(modality, "new")
    file = before.file(modality)
    if why := outdated(builder, modality, file):
        return builder.build(modality, why)
    update = _Update(builder, file, builder.folder / before.version, records)
    return update.made(changes)


@dataclass(frozen=True)
class _Change:
    """What is to come beside the large file (or into it), and what is to go from it: sorted keys."""

    beside: Keys
    gone: Keys

    def __len__(self) -> int:
        return len(self.beside) + len(self.gone)


class _Update:
    """``file``: of the version in ``old``."""

    def __init__(self, builder: Builder, file: IndexFile, old: UPath, records: Records) -> None:
        self.builder, self.file, self.old, self.records = builder, file, old, records
        self.modality, self.target = file.modality, builder.config.recall
        self.count = len(builder.now.present[file.modality])
        self._folder = builder.folder / builder.run.id

    def made(self, changes: Changes) -> IndexFile:
        gone = union(changes.gone[self.modality], changes.changed(self.modality))
        new = union(changes.added[self.modality], changes.changed(self.modality))
        if not len(gone) and not len(new) and self.file.recall_at_10 >= self.target:
            self._keep(*self.file.paths, truth_path(self.modality))
            return self.file
        with self.builder.run.stage("open"):
            change = self._change(gone, new)
            truth = Truth.load(self.old / truth_path(self.modality))
        with self.builder.run.stage("truth"):
            truth = self._truth(truth, gone, new)
        made = self._beside(change, truth) if self._few(change) else None
        return made or self._inside(change, truth)

    def _change(self, gone: Keys, new: Keys) -> _Change:
        """Against the large file, of which something may have gone, and beside which something may lie."""
        if self.file.side is None:
            return _Change(new, gone)
        side, before = open_side(self.old, self.file.side)
        held = np.sort(read_keys(side))
        return _Change(union(minus(held, gone), new), union(before, minus(gone, held)))

    def _truth(self, truth: Truth, gone: Keys, new: Keys) -> Truth:
        truth = truth.excluding(gone)
        for start in range(0, len(new), BLOCK):
            some = new[start : start + BLOCK]
            truth = truth.including(some, self.records.vectors(some, self.modality))
        if not truth.deep_enough():
            truth = Truth.of(truth.queries, self.builder.now.sources[self.modality].batches(), truth.own)
        return truth

    def _few(self, change: _Change) -> bool:
        most = min(self.builder.config.max_beside * self.file.count, _MOST_BESIDE)
        return is_large(self.file.count) and len(change) <= most

    # -- beside the file -----------------------------------------------------------------------------

    def _beside(self, change: _Change, truth: Truth) -> IndexFile | None:
        """The file as it is with another one beside it; None where that does not reach the target.

        The large one is not even opened: what a search of it finds for the truth's queries is known.
        """
        file, before = self.file, self.file.side
        alone = file.count - before.count + before.gone if before else file.count
        known = self.old / answers_path(self.modality)
        if alone - len(change.gone) + len(change.beside) != self.count or not known.exists():
            return None
        run, dim = self.builder.run, self.builder.now.encoder.dim
        with run.stage("add"):
            factory = kind_beside(file.factory, len(change.beside), dim)
            side = build(change.beside, self.records.vectors(change.beside, self.modality), factory)
        with run.stage("tune"):
            point = Answers.load(known).beside(side, change.gone, truth).point(truth, file.search)
        if point.recall_at_10 < self.target:
            return None
        with run.stage("write"):
            folder, path, gone_path = self._folder, f"{self.modality}.side.faiss", f"{self.modality}.gone.npz"
            self._keep(file.path)
            stored = Stored.of(side, folder / path)
            gone_sha256 = save_arrays(folder / gone_path, {"keys": change.gone})
            truth.save(folder / truth_path(self.modality))
        lying = SideFile(
            path=path, factory=factory, count=len(change.beside), bytes=stored.bytes, sha256=stored.sha256,
            gone=len(change.gone), gone_path=gone_path, gone_sha256=gone_sha256,
        )  # fmt: skip
        deleted = file.deleted - (before.gone if before else 0) + len(change.gone)
        changed = {"count": self.count, "deleted": deleted, "side": lying} | point.model_dump(exclude={"search"})
        return file.model_copy(update=changed)

    def _keep(self, *names: str) -> None:
        """Files of the published version, with the answers of the large one, if they are known."""
        known = answers_path(self.modality)
        for name in (*names, *([known] if (self.old / known).exists() else ())):
            copy_file(self.old / name, self._folder / name)

    # -- in the file ---------------------------------------------------------------------------------

    def _inside(self, change: _Change, truth: Truth) -> IndexFile:
        """The file with what changed in it, or one built anew."""
        build, run, file = self.builder.build, self.builder.run, self.file
        with run.stage("open"):
            alone = file.model_copy(update={"side": None})
            index: Any = open_index(self.old / file.path, alone, mapped=False)
        with run.stage("add"):
            remove(index, change.gone)
            for start in range(0, len(change.beside), BLOCK):
                some = change.beside[start : start + BLOCK]
                add(index, some, self.records.vectors(some, self.modality))
        if findable(index) != self.count:
            return build(self.modality, "other keys than the table's")
        if hidden(index) and hidden(index) >= self.builder.config.max_deleted * int(index.ntotal):
            return build(self.modality, "tombstones")
        with run.stage("tune"):
            point, curve = measure(index, truth, file.search), file.curve
            if point.recall_at_10 < self.target:
                deeper = deepened(index, truth, self.target, file.search)
                point, curve = (deeper, curve) if deeper else tune(index, truth, self.target)
        if point.recall_at_10 < self.target:
            return build(self.modality, "recall")
        return self.builder.write(self.modality, Made(index, truth, file.factory, point, curve, file.trained_on))
