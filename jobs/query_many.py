"""query --queries: a file of questions, searched in shards over Ray, to one Parquet file of results."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from jobs.prompts import read_questions
from jobs.query import negative, settings
from pipeline.collection import Collection
from pipeline.collection.bulk import BLOCK, Answered, BulkSearch, Shard, Values, part
from pipeline.engine import Engine, Quarantined, Resources
from pipeline.ledger import Run
from pipeline.progress import Progress
from pipeline.storage import storage_error
from schemas.configs import QueryConfig
from schemas.errors import ClipmillError, UsageError
from schemas.questions import Question

_MARK = b"clipmill.query"
"""In the metadata of the results: what they are the answers to."""
_HASHED = 1 << 16


def run_many(config: QueryConfig, run: Run, engine: Engine, collection: Collection) -> None:
    """Answer every question of ``--queries``. What is finished stays in ``OUTPUT.parts`` until all of it is.

    Raises:
        UsageError: the file cannot be read, or ``--where`` is no predicate.
        ClipmillError: a shard failed on every try.
    """
    if config.sheet:
        raise UsageError("--sheet is for one question", remedy="leave out --sheet, or --queries")
    with run.stage("read"):
        values = read_questions(config.queries or "", config.query_col, collection.dim)
        terms = tuple(term for term, _ in negative(config))
        asked = Question.model_construct(terms=terms, **settings(config))
        size = -(-config.shard_size // BLOCK) * BLOCK
        digest = _digest(values, asked, collection, size)
    output = UPath(config.output)
    run.outputs["results"] = str(output)
    run.figures |= {"questions": len(values)}
    if _answers(output) == digest:
        run.figures["already_there"] = len(values)
        return
    if config.where is not None:
        run.figures["matches"] = len(collection.matching(config.where, config.modality))
    folder = UPath(f"{output}.parts") / digest
    shards = [Shard(n, first, values[first : first + size]) for n, first in enumerate(range(0, len(values), size))]
    todo = [shard for shard in shards if not part(str(folder), shard.number).exists()]
    run.counts["in"] = sum(map(len, todo))
    run.figures["already_there"] = len(values) - run.counts["in"]
    place = str(run.workspace.root), collection.encoder_id, collection.card.version
    with run.stage("search"):
        _search(config, run, engine, todo, partial(BulkSearch, place, asked, str(folder)))
    with run.stage("write"):
        run.figures["rows"] = _join([part(str(folder), shard.number) for shard in shards], output, digest)
        _remove(UPath(f"{output}.parts"))


def _search(config: QueryConfig, run: Run, engine: Engine, todo: Sequence[Shard], factory: Any) -> None:
    quarantined = []
    with Progress("query", run.counts["in"], "questions") as progress:
        for outcome in engine.map(factory, todo, Resources(workers=config.workers)):
            if isinstance(outcome, Quarantined):
                quarantined.append(outcome.reason)
                run.counts["failed"] += len(outcome.shard)
                continue
            answered: Answered = outcome.result
            run.counts["out"] += answered.questions - answered.failed
            run.counts["failed"] += answered.failed
            progress.advance(answered.questions, failed=run.counts["failed"])
    if quarantined:
        raise ClipmillError(
            f"{len(quarantined)} shards of questions failed on every try",
            actual=quarantined[-1],
            remedy="run the same command again: what is answered is kept",
        )


def _digest(values: Values, asked: Question, collection: Collection, size: int) -> str:
    """Of the questions, their settings, the version of the index, what is deleted in it, and the shards."""
    digest = hashlib.sha256()
    about = asked.model_dump_json(), collection.encoder_id, collection.card.version, size, type(values).__name__
    digest.update("\n".join(map(str, about)).encode())
    digest.update(collection.deleted.tobytes())
    for start in range(0, len(values), _HASHED):
        some = values[start : start + _HASHED]
        if isinstance(some, np.ndarray):
            digest.update(f"{some.dtype} {some.shape}".encode() + some.tobytes())
        else:
            digest.update("".join("-\n" if text is None else f"{len(text)} {text}\n" for text in some).encode())
    return digest.hexdigest()[:32]


def _answers(output: UPath) -> str | None:
    """The digest of what a file of results answers, None where there is no such file."""
    try:
        with output.open("rb") as file:
            found = (pq.read_schema(file).metadata or {}).get(_MARK)
    except (OSError, pa.ArrowInvalid):
        return None
    return found.decode() if found else None


def _join(parts: Sequence[UPath], output: UPath, digest: str) -> int:
    """One file of all parts, in their order; it is there once it is whole. Returns its rows."""
    local = output.protocol in ("", "file")
    aside = output.with_name(f".{output.name}.{uuid.uuid4().hex}") if local else output
    rows = 0
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tables = _tables(parts)
        first = next(tables)
        schema = first.schema.with_metadata({_MARK: digest.encode()})
        with aside.open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for table in chain([first], tables):
                writer.write_table(table.cast(schema))
                rows += table.num_rows
        if local:
            aside.replace(output)
    except OSError as exc:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise storage_error(exc, str(output)) from exc
    return rows


def _tables(parts: Sequence[UPath]) -> Iterator[pa.Table]:
    for path in parts:
        with path.open("rb") as file:
            yield pq.read_table(file)


def _remove(folder: UPath) -> None:
    for path in sorted(folder.rglob("*"), key=lambda p: len(str(p)), reverse=True):
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
    with suppress(OSError):
        folder.rmdir()
