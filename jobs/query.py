"""query: search a published index by text, image, key or vector; one question, or a file of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable

from jobs.base import command, only_encoder
from jobs.encoders import encoder_of
from jobs.index import load_published
from jobs.prompts import read_texts
from pipeline.engine import Engine
from pipeline.index import Keys, from_bytes, search
from pipeline.ledger import Run
from pipeline.predicate import matching_keys
from pipeline.sheets import contact_sheet
from schemas.cards import EncoderCard
from schemas.configs import QueryConfig
from schemas.errors import UsageError
from schemas.vectors import normalise, unpack

_COLUMNS = ["pair_key", "caption", "url", "width", "height"]


def run(config: QueryConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`QueryConfig`. Reads only."""
    workspace = run.workspace.require()
    encoder = only_encoder(run, config.encoder, workspace.indexed_encoders(), "index")
    encoder_card, card = load_published(run, encoder)
    file = card.file(config.modality)
    with run.stage("load"):
        path = workspace.index_dir(encoder) / card.version / file.path
        index = from_bytes(path.read_bytes(), file.sha256, str(path))
    with run.stage("encode"):
        questions, vectors = _questions(config, run, encoder_card)
    only = _selected(run, config.where, encoder) if config.where else None
    with run.stage("search"):
        k = min(config.k, max(len(only) if only is not None else file.count, 1))
        similarity, keys = search(index, vectors, k, file.search, only)
    run.counts |= {"in": len(questions), "out": len(questions)}
    results = _results(run, questions, similarity, keys)
    if config.queries:
        pq.write_table(pa.Table.from_pylist(results), config.output)
        run.outputs["results"] = config.output
    else:
        run.figures["results"] = results
        _show(results)
    run.figures |= {"encoder": encoder, "version": card.version, "modality": config.modality}
    if config.sheet:
        _sheet(run, config.sheet, results)


def _questions(config: QueryConfig, run: Run, card: EncoderCard) -> tuple[list[str], NDArray[np.float32]]:
    """What is asked, in words, and as unit-norm vectors [Q, D]."""
    if config.vector is not None:
        return [config.vector], _vector(config.vector, card.dim)
    if config.key is not None:
        where = (pc.field("pair_key") == config.key) & (pc.field("encoder") == card.id)
        rows = run.workspace.table("embeddings").read([f"{config.modality}_vec"], where)
        if rows.num_rows == 0:
            raise UsageError(f"no embedding of key {config.key} by {card.id}")
        return [str(config.key)], unpack(rows.column(0), card.dim).astype(np.float32)
    encoder = encoder_of(run.workspace, card)
    if config.image is not None:
        try:
            return [config.image], encoder.images([Path(config.image).read_bytes()])
        except OSError as exc:
            raise UsageError(f"--image {config.image} is no readable image", actual=str(exc)) from exc
    texts = read_texts(config.queries, config.query_col) if config.queries else [config.text or ""]
    return texts, encoder.texts(texts)


def _vector(file: str, dim: int) -> NDArray[np.float32]:
    try:
        vector = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as exc:
        raise UsageError(f"--vector {file} is no readable .npy file", actual=str(exc)) from exc
    if vector.shape not in ((dim,), (1, dim)) or not np.isfinite(vector.astype(np.float32)).all():
        raise UsageError(f"--vector {file} does not fit", expected=f"[{dim}] finite numbers", actual=str(vector.shape))
    return normalise(vector.reshape(1, dim))


def _selected(run: Run, where: str, encoder: str) -> Keys:
    """Keys of this encoder's embeddings for which the predicate is true."""
    table = run.workspace.table("embeddings")
    scores = [name for name in table.columns() if name == "similarity" or name not in table.spec.schema.names]
    own = table.read(["pair_key", *scores], pc.field("encoder") == encoder)
    rows = run.workspace.table("images").read(_COLUMNS).join(own, "pair_key", join_type="inner")
    return matching_keys(rows, where)


def _results(run: Run, questions: list[str], similarity: NDArray[np.float32], keys: Keys) -> list[dict[str, Any]]:
    wanted = pa.array(np.unique(keys[keys >= 0]))
    rows = run.workspace.table("images").read(_COLUMNS, pc.field("pair_key").isin(wanted)).to_pylist()
    known = {row["pair_key"]: row for row in rows}
    return [
        {
            "query": question,
            "rank": rank + 1,
            "similarity": float(s),
            **known.get(int(key), {"pair_key": int(key)}),
        }
        for question, scores, found in zip(questions, similarity, keys, strict=True)
        for rank, (s, key) in enumerate(zip(scores, found, strict=True))
        if key >= 0
    ]


def _show(results: list[dict[str, Any]]) -> None:
    table = RichTable("rank", "similarity", "caption", "pair_key", box=None)
    for row in results:
        table.add_row(str(row["rank"]), f"{row['similarity']:.3f}", row.get("caption", ""), str(row["pair_key"]))
    Console(stderr=True).print(table)


def _sheet(run: Run, path: str, results: list[dict[str, Any]]) -> None:
    keys = [r["pair_key"] for r in results]
    rows = run.workspace.table("images").read(["pair_key", "image"], pc.field("pair_key").isin(keys)).to_pylist()
    images = {row["pair_key"]: row["image"] for row in rows}
    labels = [f"{r['similarity']:.2f} {r.get('caption', '')}" for r in results]
    Path(path).write_bytes(contact_sheet([images.get(k) for k in keys], labels))
    run.outputs["sheet"] = path


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill query``."""
    return command("query", QueryConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
