"""The vectors of an encoder with their metadata -> npy files, clip-retrieval's and other layouts. Without Ray."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from upath import UPath

from jobs.base import only_encoder
from pipeline.encoders import embedded_encoders, read_card
from pipeline.export.files import is_local, output_error, remove_parts
from pipeline.export.rows import is_in
from pipeline.export.vectors import (
    DETAILS,
    FROM_EMBEDDINGS,
    FROM_IMAGES,
    FROM_PAIRS,
    VectorLayout,
    VectorShard,
    check_counts,
    is_written,
    shard_files,
    write_shard,
)
from pipeline.keys import Keys
from pipeline.ledger import Run
from pipeline.predicate import matching_keys
from pipeline.progress import Progress
from pipeline.storage import write_atomic
from pipeline.tables import Table
from pipeline.vectors import Vectors, read_keys, read_vectors
from schemas.cards import EncoderCard
from schemas.configs import ExportConfig
from schemas.errors import CountsError, NothingToDo

IN_MEMORY = 2 << 30
"""Bytes of vectors that are held in memory; more are sorted in a file."""
_AT_ONCE = 1 << 20
"""Rows whose metadata is in memory."""
_WRITERS = 4
SCRATCH = ".clipmill-sorted"


@dataclass(frozen=True)
class Chosen:
    """What is exported: sorted keys; of each modality how many vectors there are in all."""

    keys: Keys
    there: dict[str, int]
    digest: str
    left_out: dict[str, int]

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.there)


class Details:
    """What the tables know of pairs, at the versions that the run reads."""

    def __init__(self, run: Run, encoder: str) -> None:
        self._run, self._encoder = run, encoder
        self._versions = {name: run.reads(name) for name in ("embeddings", "pairs", "images")}
        table = self.table("embeddings")
        known = {*table.spec.schema.names, *DETAILS.names}
        self._further = pa.schema([(n, kind) for n, kind in table.columns().items() if n not in known])

    def table(self, name: str) -> Table:
        return self._run.workspace.table(name)

    @property
    def version(self) -> int:
        """Of embeddings."""
        return self._versions["embeddings"]

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([*DETAILS, *self._further])

    def __call__(self, keys: Keys, names: Sequence[str] | None = None) -> pa.Table:
        """Columns of these sorted keys, row for row; null where a table has no such row."""
        wanted = self.schema.names if names is None else names
        span = (pc.field("pair_key") >= int(keys[0])) & (pc.field("pair_key") <= int(keys[-1]))
        own = (pc.field("encoder") == self._encoder) & span
        found: dict[str, pa.ChunkedArray] = {"pair_key": pa.chunked_array([keys])}
        for table, there, where in (
            ("embeddings", (*FROM_EMBEDDINGS, *self._further.names), own),
            ("pairs", FROM_PAIRS, span),
            ("images", FROM_IMAGES, span),
        ):
            if some := [n for n in there if n in wanted]:
                version = self._versions[table] if self._versions[table] >= 0 else None  # there is no such table
                rows = self.table(table).read(["pair_key", *some], where, version)
                here = aligned(keys, rows)
                found |= {n: here[n] for n in some}
        return pa.table({n: found[n] for n in self.schema.names if n in found})


def aligned(keys: Keys, rows: pa.Table) -> pa.Table:
    """``rows`` in the order of these sorted keys, null where there is none."""
    there = rows["pair_key"].to_numpy()
    order = np.argsort(there, kind="stable")
    known = is_in(there[order], keys)
    at = np.zeros(len(keys), np.int64)
    at[known] = order[np.searchsorted(there[order], keys[known])]
    return rows.take(pa.array(at, mask=~known))


def run(config: ExportConfig, run: Run) -> None:
    """The job's body for vectors: see :class:`ExportConfig`."""
    from jobs.export import claim, clean, open_output

    encoder = only_encoder(run, config.encoder, embedded_encoders(run.workspace), "embeddings")
    run.encoder, card = encoder, read_card(run.workspace, encoder)
    folder = open_output(config.output)
    with run.stage("plan"):
        details = Details(run, encoder)
        chosen = choose(config, run, details, encoder)
        claim(folder, config, chosen.digest, encoder)
        try:
            write_atomic(folder / "card.json", card.to_json().encode())
        except OSError as exc:
            raise output_error(exc, str(folder)) from exc
        shards = cut(len(chosen.keys), config.shard_size)
        files = partial(shard_files, cast(VectorLayout, config.format), count=len(shards), modalities=chosen.modalities)
        todo = [s for s in shards if not is_written(folder, files(s.number))]
    run.counts["in"] = sum(map(len, todo))
    run.outputs["export"] = str(folder)
    run.figures |= {
        "encoder": encoder, "dim": card.dim, "modalities": list(chosen.modalities), "shards": len(todo),
        "already_there": len(chosen.keys) - run.counts["in"], "left_out": chosen.left_out,
    }  # fmt: skip
    if todo:
        run.begin()
        _write(run, folder, files, (chosen, details, todo, card))
    with run.stage("check"):
        for shard in shards:
            check_counts(folder, files(shard.number), len(shard))
    for name in {str(PurePosixPath(path).parent) for path in files(0).values()}:
        remove_parts(folder / name)
    clean(folder)


def choose(config: ExportConfig, run: Run, details: Details, encoder: str) -> Chosen:
    """The keys to export, with a digest of what they stand for.

    Raises:
        UsageError: ``--where`` is no predicate.
        NothingToDo: no vector is left.
    """
    if config.where is not None:
        matching_keys(details.schema.empty_table(), config.where)
    table, there = details.table("embeddings"), dict[str, Keys]()
    for modality in ("image", "text"):
        try:
            there[modality] = np.sort(read_keys(table, encoder, modality, version=details.version))
        except NothingToDo:
            continue  # vectors that were imported may be of images alone
    keys = np.unique(np.concatenate([np.empty(0, np.int64), *there.values()]))
    left_out = Counter({"one_vector": 0, "where": 0, "duplicates": 0})
    for some in there.values():
        keys = _kept(keys, is_in(some, keys), left_out, "one_vector")
    if config.drop_duplicates:
        dropped = np.sort(run.workspace.table("duplicates").keys()["pair_key"].to_numpy())
        keys = _kept(keys, ~is_in(dropped, keys), left_out, "duplicates")
    if config.where is not None:
        used = ["pair_key", *(n for n in details.schema.names if n.casefold() in config.where.casefold())]
        found = [matching_keys(details(some, used), config.where) for some in _spans(keys)]
        wanted = np.sort(np.concatenate([np.empty(0, np.int64), *found]))
        keys = _kept(keys, is_in(wanted, keys), left_out, "where")
    if not len(keys):
        raise NothingToDo(
            "there is nothing to export",
            expected=f"vectors of {encoder}" + (f" with {config.where}" if config.where is not None else ""),
            remedy="clipmill status shows what there is",
        )
    digest = blake2b(f"{encoder} {list(there)}".encode() + keys.tobytes(), digest_size=16)
    for some in _spans(keys):  # another image under the same key has another vector
        digest.update("\n".join(s or "" for s in details(some, ["sha256"])["sha256"].to_pylist()).encode())
    return Chosen(keys, {m: len(k) for m, k in there.items()}, digest.hexdigest(), dict(left_out))


def cut(count: int, size: int) -> list[VectorShard]:
    """``count`` rows in shards of ``size``."""
    return [VectorShard(n, first, min(first + size, count)) for n, first in enumerate(range(0, count, size))]


def _write(run: Run, folder: UPath, files: Any, work: tuple[Chosen, Details, list[VectorShard], EncoderCard]) -> None:
    """Read the vectors of the shards that are missing, in order of their keys, and write those."""
    chosen, details, todo, card = work
    keys = np.concatenate([chosen.keys[s.first : s.last] for s in todo])
    names = ["pair_key"] if "keys" in files(0) else None
    large = len(keys) * card.dim * 2 * len(chosen.modalities) > IN_MEMORY
    size = 0
    with _scratch(folder) as scratch, ThreadPoolExecutor(_WRITERS) as pool:
        with run.stage("read"):
            vectors = {
                m: _sorted(details, card, m, keys if len(keys) < there else None, scratch if large else None)
                for m, there in chosen.there.items()
            }
            if any(not np.array_equal(found, keys) for found, _ in vectors.values()):
                raise CountsError("the table embeddings has lost rows", expected=f"{len(keys)} vectors")
        with run.stage("export"), Progress("export", len(keys), "vectors") as progress:
            at = 0
            for some in _together(todo):
                rows = sum(map(len, some))
                here = details(keys[at : at + rows], names)
                starts = np.cumsum([0, *map(len, some)]).tolist()
                jobs = []
                for shard, start in zip(some, starts, strict=False):
                    own = {m: v[at + start : at + start + len(shard)] for m, (_, v) in vectors.items()}
                    part = here.slice(start, len(shard))
                    jobs.append(pool.submit(write_shard, folder, files(shard.number), own, part))
                for shard, job in zip(some, jobs, strict=True):
                    size += job.result()
                    run.counts["out"] += len(shard)
                    progress.advance(len(shard), MB=size / 1e6)
                at += rows
    run.figures["bytes"] = size


def _sorted(
    details: Details, card: EncoderCard, modality: str, only: Keys | None, scratch: Path | None
) -> tuple[Keys, Vectors]:
    into = None
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
        into = str(scratch / modality)
    return read_vectors(
        details.table("embeddings"), card.id, modality, ordered=True, into=into, among=only,
        version=details.version, dim=card.dim,
    )  # fmt: skip


@contextmanager
def _scratch(folder: UPath) -> Iterator[Path]:
    """A local folder for what does not fit into memory: in the export's own, where that is local."""
    place = Path(str(folder), SCRATCH) if is_local(folder) else Path(tempfile.mkdtemp(prefix="clipmill-export-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _together(shards: Sequence[VectorShard]) -> Iterator[list[VectorShard]]:
    """Shards in lists of about as many rows as may have their metadata in memory."""
    held: list[VectorShard] = []
    for shard in shards:
        if held and sum(map(len, held)) + len(shard) > _AT_ONCE:
            yield held
            held = []
        held.append(shard)
    if held:
        yield held


def _spans(keys: Keys) -> Iterator[Keys]:
    for start in range(0, len(keys), _AT_ONCE):
        yield keys[start : start + _AT_ONCE]


def _kept(keys: Keys, keep: NDArray[np.bool_], left_out: Counter[str], why: str) -> Keys:
    left_out[why] += int((~keep).sum())
    return keys[keep]
