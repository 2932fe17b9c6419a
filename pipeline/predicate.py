"""SQL predicates over a workspace's rows, in DuckDB without any access to files or network."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.errors import UsageError


def matching_keys(rows: pa.Table, predicate: str) -> NDArray[np.int64]:
    """The pair_keys of ``rows`` for which ``predicate`` is true.

    Raises:
        UsageError: not one SQL predicate over the columns, or one that reaches outside.
    """
    connection = duckdb.connect(":memory:", config={"enable_external_access": "false"})
    connection.register("pairs", rows)
    connection.execute("SET lock_configuration = true")
    try:
        # Parsed as one expression, not pasted into a query: "true) UNION SELECT 1 --" is no way out of it.
        keys = connection.table("pairs").filter(predicate).project("pair_key").fetchnumpy()["pair_key"]
    except duckdb.Error as exc:
        raise UsageError(
            "--where is no valid predicate",
            expected="SQL over the columns " + ", ".join(rows.column_names),
            actual=str(exc).splitlines()[0],
        ) from exc
    finally:
        connection.close()
    return np.asarray(keys, dtype=np.int64)
