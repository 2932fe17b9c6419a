"""What the tables hold now, and what an index and its records lack of it: found from the files that came since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.audit import New
from pipeline.index import Source
from pipeline.keys import NONE, Keys, both, minus, union
from pipeline.records import Records, record_batches
from pipeline.tables import Table
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard, IndexCard
from schemas.records import VECTORS

MODALITIES = tuple(VECTORS)


@dataclass(frozen=True)
class Now:
    """The tables as a run reads them: their versions, and the keys that have a vector, by modality.

    ``deleted``: keys that nobody is to find any more; they are in none of the others.
    """

    workspace: Workspace
    encoder: EncoderCard
    versions: Mapping[str, int]
    deleted: Keys
    sources: Mapping[str, Source]
    present: Mapping[str, Keys]

    @classmethod
    def of(
        cls,
        workspace: Workspace,
        encoder: EncoderCard,
        versions: Mapping[str, int],
        deleted: Keys,
        before: IndexCard | None = None,
        records: Records | None = None,
    ) -> Now:
        """``before``, and its records: where the table has only grown since, its new files alone are read."""
        table, version = workspace.table("embeddings"), versions["embeddings"]
        sources = {m: Source(table, encoder.id, m, version, encoder.dim, deleted) for m in MODALITIES}
        new = None if before is None else _added_files(table, before.table_version, version)
        present = None if records is None or new is None else _grown(records, sources, new)
        if present is None:
            present = {m: source.keys() for m, source in sources.items()}
        return cls(workspace, encoder, versions, deleted, sources, present)

    def keys(self) -> Keys:
        """Those with a vector of any modality, sorted."""
        return union(*self.present.values())

    def records(self, keys: Keys) -> Iterator[pa.RecordBatch]:
        """The records of these keys as the tables have them now."""
        versions = {name: version for name, version in self.versions.items() if version >= 0}
        return record_batches(self.workspace, self.encoder.id, self.encoder.dim, keys, versions)


@dataclass
class Changes:
    """What came, went and changed since a version of the index.

    ``added``, ``gone`` and ``changed``: sorted keys, by modality; a changed vector is another one than the stored.
    ``rows``: records that are new or differ, and empty ones of keys that went; they are read as they are drawn, and
    ``changed`` is complete after the last one.
    """

    added: dict[str, Keys]
    gone: dict[str, Keys]
    gone_keys: Keys
    rows: Iterator[pa.RecordBatch]
    something: bool = False
    new_keys: Keys = field(default_factory=lambda: NONE)
    _changed: dict[str, list[Keys]] = field(default_factory=lambda: {m: [] for m in MODALITIES})

    @classmethod
    def since(cls, before: IndexCard, records: Records, now: Now) -> Changes:
        """``records``: those of the version ``before``."""
        has = {m: records.has(m) for m in MODALITIES}
        had = union(*has.values())
        keys = now.keys()
        changes = cls(
            added={m: minus(now.present[m], has[m]) for m in MODALITIES},
            gone={m: minus(has[m], now.present[m]) for m in MODALITIES},
            gone_keys=minus(had, keys),
            rows=iter(()),
            new_keys=minus(keys, had),
        )
        looked_at = union(touched(before, now), *changes.added.values())
        wanted = union(looked_at, minus(union(*changes.gone.values()), changes.gone_keys))
        fresh = changes._differing(now.records(wanted), records) if len(wanted) else iter(())
        changes.rows = _peeked(fresh, changes, records.schema)
        return changes

    def changed(self, modality: str) -> Keys:
        """Keys with another vector than the stored one, sorted."""
        return union(*self._changed[modality])

    def _differing(self, batches: Iterator[pa.RecordBatch], records: Records) -> Iterator[pa.RecordBatch]:
        """Rows that the records lack or have otherwise; notes which vectors have changed."""
        for batch in batches:
            keys = batch.column("pair_key").to_numpy()
            other = ~records.known(keys)
            at = np.flatnonzero(~other)
            if len(at):
                mine = batch.take(pa.array(at))
                names = [n for n in batch.schema.names if n in records.schema.names]
                stored = records.take(keys[at], names)
                for name in batch.schema.names:
                    theirs = stored[name] if name in names else pa.nulls(len(at), mine.schema.field(name).type)
                    differ = ~same(mine.column(name), theirs)
                    other[at] |= differ
                    self._note(name, keys[at], differ, mine.column(name), theirs)
            if other.any():
                yield batch.filter(pa.array(other))

    def _note(self, name: str, keys: Keys, differ: NDArray[np.bool_], mine: pa.Array, theirs: pa.Array) -> None:
        for modality, column in VECTORS.items():
            if name == column and differ.any():
                both = np.asarray(mine.is_valid()) & np.asarray(theirs.is_valid())
                self._changed[modality].append(keys[differ & both])


def touched(before: IndexCard, now: Now) -> Keys:
    """Keys in files of embeddings (of this encoder) and of images that came since the version, sorted.

    No file ever changes, so all other rows are as they were.
    """
    found: list[Keys] = []
    for name, since in (("embeddings", before.table_version), ("images", before.images_version)):
        table, version = now.workspace.table(name), now.versions[name]
        if version < 0 or version == since:
            continue
        new = table.paths(version) - table.seen_paths(since)
        own = name == "embeddings"
        for batch in table.batches(["pair_key", "encoder"] if own else ["pair_key"], version, new) if new else ():
            keys = batch.column("pair_key").to_numpy()
            if own:
                keys = keys[np.asarray(pc.fill_null(pc.equal(batch.column("encoder"), now.encoder.id), False))]
            found.append(keys)
    return both(union(*found), now.keys())


def _added_files(table: Table, since: int, version: int) -> set[str] | None:
    """Files that came since a version; None where others went, whose rows are elsewhere or nowhere by now."""
    seen, there = table.seen_paths(since), table.paths(version)
    return there - seen if seen and seen <= there else None


def _grown(records: Records, sources: Mapping[str, Source], files: set[str]) -> dict[str, Keys] | None:
    """The keys that have a vector: those of the records, and of new files. None where a key is in both, or twice."""
    present = {}
    for modality, source in sources.items():
        new = source.keys(files)
        if (new[1:] == new[:-1]).any() or records.known(new).any():
            return None
        present[modality] = union(minus(records.has(modality), source.without), new)
    return present


def new_files(before: IndexCard, now: Now) -> New:
    """What came since the version."""
    embeddings, images = (now.workspace.table(name) for name in ("embeddings", "images"))
    version = now.versions["images"]
    return New(
        embeddings.paths(now.versions["embeddings"]) - embeddings.seen_paths(before.table_version),
        _added_files(images, before.images_version, version) if version >= 0 else None,
    )


def same(mine: pa.Array, theirs: pa.Array | pa.ChunkedArray) -> NDArray[np.bool_]:
    """Which values [n] are equal; a null is equal to a null, NaN to NaN."""
    other = theirs.combine_chunks() if isinstance(theirs, pa.ChunkedArray) else theirs
    if isinstance(other, pa.ChunkedArray):
        other = other.chunk(0) if other.num_chunks else pa.nulls(0, mine.type)
    if pa.types.is_fixed_size_binary(mine.type):
        mine, other = mine.cast(pa.binary()), other.cast(pa.binary())
    equal = np.asarray(pc.fill_null(pc.equal(mine, other), False))
    equal = equal | (np.asarray(mine.is_null()) & np.asarray(other.is_null()))
    if pa.types.is_floating(mine.type):
        nan = (np.asarray(pc.fill_null(pc.is_nan(column), False)) for column in (mine, other))
        equal = equal | np.logical_and(*nan)
    return np.asarray(equal, np.bool_)


def empty_records(keys: Keys, schema: pa.Schema) -> pa.RecordBatch:
    """Records that say no more than that there is none: all but the key is null."""
    columns = [pa.array(keys) if f.name == "pair_key" else pa.nulls(len(keys), f.type) for f in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _peeked(fresh: Iterator[pa.RecordBatch], changes: Changes, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """All rows to write; says in ``changes`` whether there are any."""
    first = next(fresh, None)
    empty: Sequence[pa.RecordBatch] = ()
    if len(changes.gone_keys):
        empty = [empty_records(changes.gone_keys, schema if first is None else first.schema)]
    changes.something = first is not None or bool(empty) or any(len(k) for k in changes.gone.values())
    return chain([] if first is None else [first], fresh, empty)
