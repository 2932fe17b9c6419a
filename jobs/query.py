"""query: search a published index by text, image, key, vector or a mix of them; one question, or a file of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from jobs.base import command
from jobs.fetching import clean_image, fetch_image, read_image
from pipeline.collection import Collection, Results, term
from pipeline.collection.terms import invalid
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.sheets import one_line
from schemas.configs import QueryConfig
from schemas.errors import UsageError
from schemas.questions import Question, Term

_WEIGHTED = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\*(.+)", re.DOTALL)
_VERIFIED = 8 << 30
"""Bytes of an index that are compared with their digests before one question; of a larger one the sizes alone."""
_SHOWN = 300
"""Characters of a caption; the terminal's width cuts it further."""


def run(config: QueryConfig, run: Run, engine: Engine) -> None:
    """The job's body: see :class:`QueryConfig`. Reads only."""
    with run.stage("load"):
        fetch = partial(fetch_image, allow_hosts=config.allow_hosts)
        collection = Collection(run.workspace, config.encoder, fetch=fetch, clean=clean_image, verify=_VERIFIED)
    run.figures |= {
        "encoder": collection.encoder_id, "version": collection.card.version, "modality": config.modality,
    }  # fmt: skip
    if config.queries is not None:
        from jobs.query_many import run_many

        run_many(config, run, engine, collection)
        return
    question, words = asked(config, collection.dim)
    with run.stage("encode"):
        vector = collection.vector_of(question)
    with run.stage("search"):
        k = collection.over_fetch(question)
        similarity, keys = collection.search_vectors(vector[None], k, question.modality, question.where)
        results = collection.finish(question, vector, similarity[0], keys[0])
    run.counts |= {"in": 1, "out": 1}
    run.figures["results"] = [{"query": words, **row} for row in results.rows()]
    show(results)
    if config.sheet:
        run.outputs["sheet"] = str(Results(results.table, words, collection.images).sheet(config.sheet))


def asked(config: QueryConfig, dim: int) -> tuple[Question, str]:
    """The question of a command line, and it in words.

    Raises:
        UsageError: a file that cannot be read, a key that is no number, a vector that does not fit.
    """
    given = list(_given(config, dim))
    try:
        question = Question(terms=tuple(t for t, _ in given), **settings(config))
    except ValidationError as exc:
        raise invalid(exc) from exc
    return question, " + ".join(words for _, words in given)


def settings(config: QueryConfig) -> dict[str, Any]:
    """What a Question is told beside its terms."""
    names = ("k", "modality", "where", "threshold", "unique", "diversity")
    return {name: getattr(config, name) for name in names}


def negative(config: QueryConfig) -> Iterator[tuple[Term, str]]:
    """The terms of ``--without``, with their words."""
    for item in config.without:
        weight, text = weighted(item)
        yield term("text", text, -weight), f"{-weight:g}*{text}"


def weighted(item: str) -> tuple[float, str]:
    """``0.5*red`` -> 0.5 and ``red``; without a number and a star before it the weight is 1.

    (A text that begins with a number and a star needs a weight before: ``1*2*3 tiles``.)
    """
    found = _WEIGHTED.fullmatch(item)
    return (float(found[1]), found[2]) if found else (1.0, item)


def _given(config: QueryConfig, dim: int) -> Iterator[tuple[Term, str]]:
    make: dict[str, Callable[[str], Any]] = {
        "text": str,
        "image": partial(read_image, allow_hosts=config.allow_hosts),
        "key": _key,
        "vector": partial(_vector, dim=dim),
    }
    for what, of in make.items():
        for item in getattr(config, what):
            weight, value = weighted(item)
            yield term(what, of(value), weight), value if weight == 1 else f"{weight:g}*{value}"
    yield from negative(config)


def _key(value: str) -> int:
    if not re.fullmatch(r"\s*\d{1,19}\s*", value) or int(value) >= 2**63:
        raise UsageError(f"--key {value} is no pair_key", expected="a number from 0 to 2^63 - 1")
    return int(value)


def _vector(file: str, dim: int) -> Any:
    try:
        vector = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise UsageError(f"--vector {file} is no readable .npy file", actual=str(exc)) from exc
    if vector.shape not in ((dim,), (1, dim)) or vector.dtype.kind not in "fiu":
        raise UsageError(
            f"--vector {file} does not fit", expected=f"[{dim}] numbers", actual=f"{vector.dtype} {list(vector.shape)}"
        )
    return vector


def show(results: Results, console: Console | None = None) -> None:
    """A table on the terminal, a line a result: what a caption holds cannot break it."""
    table = RichTable(box=None, expand=True)
    for name in ("rank", "similarity", "pair_key"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("caption", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in results.rows():
        # The caption comes last: one that is written from right to left turns nothing else round.
        caption = Text(one_line(row["caption"] or "")[:_SHOWN], no_wrap=True, overflow="ellipsis")
        table.add_row(str(row["rank"]), f"{row['similarity']:.3f}", str(row["pair_key"]), caption)
    (console or Console(stderr=True)).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill query``."""
    return command("query", QueryConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
