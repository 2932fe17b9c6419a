"""SQL predicates over a workspace's rows, in DuckDB without any access to files, network, settings or Python."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.errors import UsageError

_TABLE = "pairs"
_SETTINGS = {
    "enable_external_access": "false",
    "temp_directory": "",
    "python_enable_replacements": "false",
    "memory_limit": "1GB",
    "lock_configuration": "true",
}
_OUTSIDE = re.compile(
    r"getenv|getvariable|current_setting|set_.*|write_.*|read_.*|pg_.*|duckdb_.*|pragma_.*|sniff_.*|parquet_.*"
    r"|nextval|currval|query|query_table|glob|in_search_path|version|current_(database|catalog|schemas?|user|role)|user"
    r"|session_user|current_query|txid_current|add_parquet_key|which_secret|.*sleep.*",
    re.IGNORECASE,
)
"""Functions that tell of something else than the row, or do something."""
FUNCTIONS = frozenset(
    """
    + - * / // % ** ^ ~~ !~~ ~~* !~~* ~~~ ~ !~ ^@ like_escape ilike_escape not_like_escape not_ilike_escape
    abs round floor ceil ceiling trunc sign mod greatest least sqrt ln log log2 log10 exp pow power isnan isfinite isinf
    lower upper lcase ucase length len strlen contains starts_with ends_with prefix suffix strpos position instr
    substring substr left right trim ltrim rtrim strip_accents split_part regexp_matches regexp_full_match
    regexp_extract ascii unicode hash array_extract array_slice
    count count_star min max avg mean median sum stddev quantile_cont quantile_disc
    """.split()  # noqa: SIM905 (a list of a hundred words)
)
"""What a predicate of a stranger may call: nothing here makes a value much larger than those that it is given.

(``repeat`` and its like take all memory for one row, and are not interrupted while they do.)"""


def matching_keys(rows: pa.Table, predicate: str) -> NDArray[np.int64]:
    """The pair_keys of ``rows`` for which ``predicate`` is true.

    Raises:
        UsageError: not one SQL predicate over the columns, or one that reaches outside.
    """
    return matching_values(rows, predicate, "pair_key")


def matching_values(
    rows: pa.Table,
    predicate: str,
    column: str,
    *,
    known: Sequence[str] | None = None,
    seconds: float | None = None,
    strict: bool = False,
) -> NDArray[np.int64]:
    """An integer column of the ``rows`` for which ``predicate`` is true, in no particular order.

    Args:
        known: the columns to name in an error; by default those of ``rows``.
        seconds: after which it is given up.
        strict: let it call nothing but :data:`FUNCTIONS`: for predicates of strangers.

    Raises:
        UsageError: not one SQL predicate over the columns, one that reaches outside, or one that takes too long.
    """
    if "\0" in predicate or not _is_unicode(predicate):
        raise _no_predicate(known or rows.column_names, "it holds characters that are none")
    with _connection() as connection:
        if reaches := _refused(connection, predicate, strict):
            raise _no_predicate(known or rows.column_names, f"{reaches} is not allowed")
        connection.register(_TABLE, rows)
        timer = Timer(seconds, connection.interrupt) if seconds is not None else None
        try:
            if timer is not None:
                timer.daemon = True
                timer.start()
            # Parsed as one expression, not pasted into a query: "true) UNION SELECT 1 --" is no way out of it.
            found = connection.table(_TABLE).filter(predicate).project(f'"{column}"').fetchnumpy()[column]
        except duckdb.InterruptException as exc:
            raise UsageError(
                f"--where took longer than {seconds:g} s",
                actual=predicate[:200],
                remedy="ask for something simpler",
            ) from exc
        except duckdb.Error as exc:
            raise _no_predicate(known or rows.column_names, str(exc).splitlines()[0]) from exc
        finally:
            if timer is not None:
                timer.cancel()
    return np.asarray(found, dtype=np.int64)


def named_columns(predicate: str, columns: Sequence[str]) -> list[str]:
    """Of the columns those that a predicate may speak of: reading the others is not needed."""
    text = predicate.casefold()
    return list(columns) if "columns" in text else [n for n in columns if n.casefold() in text]


@contextmanager
def _connection() -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB in memory that reaches nothing: no files (temporary ones either), no network, no Python variables."""
    connection = duckdb.connect(":memory:", config=dict(_SETTINGS))
    try:
        yield connection
    finally:
        connection.close()


def _refused(connection: duckdb.DuckDBPyConnection, predicate: str, strict: bool) -> str:
    """The function or table by which an expression would reach outside its rows, "" for none.

    A text that is no SQL has none: that it is none is told by whom it is run by.
    """
    # DuckDB parses an expression as the list of such a SELECT: the same text gives the same tree.
    found = connection.execute("SELECT json_serialize_sql($text)", {"text": f"SELECT {predicate}"}).fetchall()
    return next((name for node in _nodes(json.loads(found[0][0])) if (name := _outside(node, strict))), "")


def _outside(node: dict[str, Any], strict: bool) -> str:
    kind = node.get("type")
    if kind == "BASE_TABLE":
        name = ".".join(n for n in (node.get("catalog_name"), node.get("schema_name"), node.get("table_name")) if n)
        return "" if name.casefold() == _TABLE else f"the table {name}"
    if kind in ("TABLE_FUNCTION", "SHOW_REF"):
        return f"the table function {node.get('function', {}).get('function_name', '')}"
    name = str(node.get("function_name", ""))
    refused = name and (name.casefold() not in FUNCTIONS if strict else _OUTSIDE.fullmatch(name))
    return f"the function {name}" if refused else ""


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """All objects of a JSON tree."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield node
            todo += node.values()
        elif isinstance(node, list):
            todo += node


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_predicate(columns: Sequence[str], actual: str) -> UsageError:
    return UsageError(
        "--where is no valid predicate", expected="SQL over the columns " + ", ".join(columns), actual=actual
    )
