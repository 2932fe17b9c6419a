"""semdedup: image vectors of one encoder -> marks of semantic near-duplicates in the table semantic_duplicates."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.base import command, only_encoder
from pipeline.encoders import embedded_encoders
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.tables import Table
from pipeline.vectors import read_vectors
from schemas.configs import SemdedupConfig
from schemas.errors import NothingToDo, WorkspaceError
from schemas.tables import SEMANTIC_DUPLICATES

_ATTEMPTS = 10


def run(config: SemdedupConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`SemdedupConfig`. Runs in the driver: FAISS and NumPy use all its cores.

    The marks are always those of a search over all of the encoder's images, so they do not depend on when what was
    added. Where neither they nor the settings have changed since the last search, nothing is read but their keys.
    """
    encoder = only_encoder(run, config.encoder, embedded_encoders(run.workspace.require()), "embeddings")
    run.encoder = encoder
    marks = run.workspace.table("semantic_duplicates")
    with run.stage("read"):
        version = run.reads("embeddings")
        rows = _rows(run, encoder, version)
    run.figures["encoder"] = encoder
    state = _state(rows, config)
    if marks.recorded(_record(encoder)) == state:
        marked = marks.read(["pair_key"], pc.field("encoder") == encoder).num_rows
        run.figures |= {"marked": marked, "kept": rows.num_rows - marked}
        return
    run.counts["in"] = run.counts["out"] = rows.num_rows
    found = _search(config, run, encoder, rows, version)
    with run.stage("commit"):
        run.begin()
        _replace(run, marks, encoder, found, state)
    run.figures |= {"marked": found.num_rows, "kept": rows.num_rows - found.num_rows}
    run.outputs["semantic_duplicates"] = marks.uri


def _rows(run: Run, encoder: str, version: int) -> pa.Table:
    """(pair_key, run, similarity) of the encoder's embeddings, by key.

    Raises:
        NothingToDo: there are none.
    """
    columns = ["pair_key", "run", "similarity"]
    rows = run.workspace.table("embeddings").read(columns, pc.field("encoder") == encoder, version)
    if rows.num_rows == 0:
        raise NothingToDo(f"no embeddings of {encoder}", remedy="clipmill embed first")
    return rows.sort_by("pair_key")


def _record(encoder: str) -> str:
    return f"clipmill-semdedup-{encoder}"


def _state(rows: pa.Table, config: SemdedupConfig) -> int:
    """A number for what is searched and how: a row that is embedded again has another run."""
    settings = config.model_dump(include={"threshold", "clusters", "keep", "seed"})
    digest = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(rows["pair_key"].to_numpy(), "<i8").tobytes())
    runs = rows["run"].combine_chunks().dictionary_encode()  # numbered as they appear, so by the keys
    digest.update("\n".join(text or "" for text in runs.dictionary.to_pylist()).encode())
    digest.update(runs.indices.fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def _order(rows: pa.Table, keep: str) -> NDArray[np.int64]:
    """Row numbers in the order in which images are taken: by (run, key), or the best caption first."""
    numbered = rows.append_column("row", pa.array(np.arange(rows.num_rows)))
    by = [("run", "ascending"), ("pair_key", "ascending")]
    if keep == "caption":
        by = [("similarity", "descending"), *by]
    return np.asarray(numbered.sort_by(by)["row"].to_numpy(), np.int64)


def _search(config: SemdedupConfig, run: Run, encoder: str, rows: pa.Table, version: int) -> pa.Table:
    """The rows that the table is to have for this encoder."""
    from pipeline.semdedup import find_duplicates

    with run.stage("read"):
        keys, vectors = read_vectors(run.workspace.table("embeddings"), encoder, ordered=True, version=version)
        rows = rows.filter(pc.is_in(rows["pair_key"], pa.array(keys)))  # without those that have no image vector
    with run.stage("search"), Progress("semdedup", len(keys), "images") as progress:
        order = _order(rows, config.keep)
        found = find_duplicates(vectors, order, config.threshold, config.clusters, config.seed, progress.advance)
    run.figures |= {"clusters": found.clusters, "largest_cluster": found.largest}
    n = len(found.rows)
    return pa.table(
        {
            "pair_key": keys[found.rows],
            "encoder": pa.repeat(encoder, n).cast(pa.string()),
            "kept_key": keys[found.kept],
            "cosine": found.cosine,
            "run": pa.repeat(run.id, n).cast(pa.string()),
        },
        schema=SEMANTIC_DUPLICATES.schema,
    )


def _replace(run: Run, marks: Table, encoder: str, found: pa.Table, state: int) -> None:
    """Bring the encoder's marks to ``found`` in one commit; only rows that differ are written.

    Raises:
        WorkspaceError: other writers were always faster.
    """
    for _ in range(_ATTEMPTS):
        base = marks.version()
        old = marks.read(where=pc.field("encoder") == encoder)
        same = _keys_of_equal(found, old)
        fresh = found.filter(pc.invert(pc.is_in(found["pair_key"], same)))
        gone = old.filter(pc.invert(pc.is_in(old["pair_key"], found["pair_key"]))).select(SEMANTIC_DUPLICATES.key)
        if marks.replace(fresh, gone, run.id, base, {_record(encoder): state}) is not None:
            return
    raise WorkspaceError(f"{_ATTEMPTS} writers in a row were faster on {marks.uri}", remedy="run the command again")


def _keys_of_equal(found: pa.Table, old: pa.Table) -> pa.Array:
    """Keys of the marks that are there already, the same but for the run."""
    beside = found.join(old, "pair_key", join_type="inner", right_suffix="_old")
    equal = pc.and_(
        pc.equal(beside["kept_key"], beside["kept_key_old"]), pc.equal(beside["cosine"], beside["cosine_old"])
    )
    return beside.filter(equal)["pair_key"].combine_chunks()


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill semdedup``."""
    return command("semdedup", SemdedupConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
