"""Files of texts: a line each, or a column of a table."""

from __future__ import annotations

from pipeline.download.lists.sources import find, read_table
from schemas.errors import NothingToDo, UsageError


def read_texts(file: str, column: str) -> list[str]:
    """The texts of a txt, csv, tsv, json, jsonl or parquet file, in order, without empty ones.

    Raises:
        UsageError: unreadable, or without the column.
        NothingToDo: no text in it.
    """
    texts: list[str] = []
    for path in find([file]):
        table = read_table(path, [column])
        if column not in table.column_names:
            raise UsageError(f"{path} has no column {column!r}", actual="columns: " + ", ".join(table.column_names))
        texts += [text.strip() for text in table[column].to_pylist() if text and text.strip()]
    if not texts:
        raise NothingToDo(f"{file} holds no text")
    return texts
