"""sql: one question to the workspace's tables, in SQL; without a question, what there is to ask."""

from __future__ import annotations

import base64
import csv
import datetime as dt
import decimal
import json
import math
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from jobs.base import command
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.sql import Database
from schemas.configs import SqlConfig
from schemas.errors import ClipmillError, UsageError
from schemas.tables import TABLES

_LARGE, _SMALL = 1_024, 65_536
"""Rows at once: of images, vectors and other long values, and of all others."""
_WIDTH = 80
"""Characters of a table where there is no terminal to ask."""
_LEAST = 8
"""Characters below which a column is not cut: rather a line for each value."""

Row = dict[str, Any]


def run(config: SqlConfig, run: Run, engine: Engine, *, show: bool = True) -> None:
    """The job's body: see :class:`SqlConfig`. Reads only."""
    workspace = run.workspace.require()
    if config.output and Path(config.output).suffix not in _WRITERS:
        raise UsageError(
            f"--output {config.output} has no format that is known", expected=" or ".join(f"*{s}" for s in _WRITERS)
        )
    if config.query is not None and not config.query.strip():
        raise UsageError("--query is empty", remedy="without --query the tables are listed")
    console = Console(file=sys.stdout if show else sys.stderr)
    with run.stage("open"):
        database = Database(workspace, config.memory)
    with database, run.stage("query"):
        if config.query is None:
            run.figures["tables"] = database.run(partial(_tables, run, database))
            _show_tables(console, run.figures["tables"])
            return
        run.figures |= database.run(partial(_answer, config, database))
    if config.output:
        run.outputs["rows"] = config.output
        console.print(f"{run.figures['row_count']:,} rows written", highlight=False)
    else:
        _show_rows(console, run.figures)


# ---- asking ----------------------------------------------------------------------------------------


def _tables(run: Run, database: Database) -> dict[str, Any]:
    """View -> ``rows`` and ``columns`` (name -> SQL type)."""
    found = {}
    for name, columns in database.columns().items():
        if name in TABLES:
            rows = run.workspace.table(name).count()
        else:
            ((rows,),) = database.ask(f"SELECT count(*) FROM {name}").fetchall()  # noqa: S608
        found[name] = {"rows": rows, "columns": columns}
    return found


def _answer(config: SqlConfig, database: Database) -> dict[str, Any]:
    """Ask, and write the rows where they are to go. In the figures are those that ``limit`` allows for."""
    relation = database.ask(config.query or "")
    names, types = _unique(relation.columns), [str(t) for t in relation.types]
    large = any("BLOB" in t or t.endswith("]") for t in types)
    rows: list[Row] = []
    count = 0
    schema, batches = database.read(relation, _LARGE if large else _SMALL)
    named = pa.schema([f.with_name(n) for f, n in zip(schema, names, strict=True)])
    with _writing(config.output, named) as write, closing(batches):
        for unnamed in batches:
            batch = unnamed.rename_columns(names)
            rows += batch.slice(0, max(config.limit - len(rows), 0)).to_pylist()
            count += batch.num_rows
            write(batch)
            if not config.output and count > config.limit:
                break  # the others are only counted, and their images not read
        else:
            return _figures(names, types, rows, count)
    ((count,),) = relation.aggregate("count(*)").fetchall()
    return _figures(names, types, rows, count)


def _figures(names: list[str], types: list[str], rows: list[Row], count: int) -> dict[str, Any]:
    return {"columns": names, "types": types, "rows": [_plain(r) for r in rows], "row_count": count}


def _unique(names: Sequence[str]) -> list[str]:
    """``a, a`` -> ``a, a_1``: a row is a mapping."""
    found: list[str] = []
    for name in names:
        tried, n = name, 0
        while tried in found:
            n += 1
            tried = f"{name}_{n}"
        found.append(tried)
    return found


def _plain(value: Any) -> Any:  # noqa: PLR0911
    """A value as JSON has it: bytes in base64, times in ISO 8601, what is no number as null."""
    match value:
        case bool() | int() | str() | None:
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case decimal.Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case dt.date() | dt.time():  # and a datetime
            return value.isoformat()
        case dict():
            return {str(k): _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
    return str(value)


# ---- writing ---------------------------------------------------------------------------------------


_Write = Callable[[pa.RecordBatch], object]


@contextmanager
def _parquet(file: Path, schema: pa.Schema) -> Iterator[_Write]:
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        yield writer.write_batch


@contextmanager
def _csv(file: Path, schema: pa.Schema) -> Iterator[_Write]:
    """Null is an empty cell. Lists and structures are JSON in a cell."""
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(schema.names)
        yield lambda batch: writer.writerows([_cell(v) for v in row.values()] for row in batch.to_pylist())


def _cell(value: Any) -> Any:
    plain = _plain(value)
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, (dict, list)) else plain


@contextmanager
def _jsonl(file: Path, schema: pa.Schema) -> Iterator[_Write]:
    with file.open("w", encoding="utf-8") as out:
        yield lambda batch: out.writelines(json.dumps(_plain(r), ensure_ascii=False) + "\n" for r in batch.to_pylist())


_WRITERS = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}


@contextmanager
def _writing(output: str | None, schema: pa.Schema) -> Iterator[_Write]:
    """Batches into a file, which is there when all are written, or not at all.

    Raises:
        UsageError: it cannot be written there.
        ClipmillError: a column that the format cannot hold.
    """
    if output is None:
        yield lambda batch: None
        return
    file = Path(output)
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with _WRITERS[file.suffix](aside, schema) as write:
            yield write
        aside.replace(file)
    except OSError as exc:
        raise UsageError(f"--output {output} cannot be written", actual=str(exc)) from exc
    except pa.ArrowNotImplementedError as exc:
        raise ClipmillError(
            f"--output {output} cannot hold a column", actual=str(exc), remedy="cast it, or write .jsonl"
        ) from exc
    finally:
        aside.unlink(missing_ok=True)


# ---- showing ---------------------------------------------------------------------------------------


def _show_tables(console: Console, tables: dict[str, Any]) -> None:
    shown = RichTable("table", "rows", "columns", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.columns[0].overflow = "fold"
    shown.columns[1].justify = "right"
    for name, table in tables.items():
        columns = ", ".join(f"{c} {t}" for c, t in table["columns"].items())
        columns = columns.replace("TIMESTAMP WITH TIME ZONE", "TIMESTAMPTZ")
        shown.add_row(Text(name), f"{table['rows']:,}", Text(columns))
    console.print(shown, width=_width(console))


def _show_rows(console: Console, figures: dict[str, Any]) -> None:
    """A line a row where the columns fit, else a line a value."""
    names, types = figures["columns"], figures["types"]
    if names[-1:] == ["explain_value"]:
        for row in figures["rows"]:
            console.print(Text(row["explain_value"]))
        return
    cells = [[_text(v, t) for v, t in zip(row.values(), types, strict=True)] for row in figures["rows"]]
    width = _width(console)
    least = [min(_LEAST, max(map(len, column))) for column in zip(names, *cells, strict=True)]
    if sum(least) + 2 * len(names) <= width:
        shown = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name, kind in zip(names, types, strict=True):
            number = bool(re.match(r"U?(TINY|SMALL|BIG|HUGE)?INT|FLOAT|DOUBLE|DECIMAL", kind)) and kind[-1] != "]"
            shown.add_column(Text(name), justify="right" if number else "left", no_wrap=True, overflow="ellipsis")
        for row in cells:
            shown.add_row(*map(Text, row))
        console.print(shown, width=width)
    else:
        longest = max(map(len, names))
        for number, row in enumerate(cells, start=1):
            console.print(f"row {number}", highlight=False, style="bold")
            for name, text in zip(names, row, strict=True):
                line = Text(f"  {name:<{longest}}  {text}")
                console.print(line, no_wrap=True, overflow="ellipsis", width=width)
    shown_rows, count = len(figures["rows"]), figures["row_count"]
    if shown_rows != count:
        console.print(f"{shown_rows:,} of {count:,} rows: --limit shows more, --output writes all", highlight=False)


def _width(console: Console) -> int:
    return console.width if console.is_terminal else _WIDTH


def _text(value: Any, kind: str) -> str:
    """A value on one line, without what a terminal would obey: captions come from strangers."""
    if value is None:
        return "null"
    if kind == "BLOB":
        return f"{len(base64.b64decode(value)):,} bytes"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        value = "[" + ", ".join(_text(v, "") for v in value[:3]) + (f", ... {len(value)}]" if len(value) > 3 else "]")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+", " ", str(value))


def main(argv: Sequence[str] | None = None) -> int:
    """``clipmill sql``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return command("sql", SqlConfig, partial(run, show="--json" not in arguments), arguments)


if __name__ == "__main__":
    sys.exit(main())
