"""The Arrow schema of every table: the doors between the stages."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from schemas.errors import SchemaError

_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True)
class TableSpec:
    """A table's name, Arrow schema and key: the columns of which no combination may occur twice."""

    name: str
    schema: pa.Schema
    key: tuple[str, ...]

    def conform(self, table: pa.Table) -> pa.Table:
        """``table`` with exactly this schema, columns in order.

        Raises:
            SchemaError: a column is missing, unknown or cannot be cast.
        """
        missing = [n for n in self.schema.names if n not in table.column_names]
        unknown = [n for n in table.column_names if n not in self.schema.names]
        if missing or unknown:
            raise SchemaError(
                f"rows for table {self.name!r} do not fit its schema",
                expected=", ".join(self.schema.names),
                actual=f"missing {missing}, unknown {unknown}",
            )
        try:
            return table.select(self.schema.names).cast(self.schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as exc:
            raise SchemaError(f"rows for table {self.name!r} do not fit its schema", actual=str(exc)) from exc


def _spec(name: str, key: tuple[str, ...], *fields: tuple[str, pa.DataType]) -> TableSpec:
    return TableSpec(name, pa.schema([pa.field(n, t) for n, t in fields]), key)


PAIRS = _spec(
    "pairs",
    ("pair_key",),
    ("pair_key", pa.int64()),
    ("url", pa.string()),
    ("caption", pa.string()),
    ("source", pa.string()),
    ("extra", pa.string()),
    ("problem", pa.string()),
    ("added_run", pa.string()),
)
"""``extra``: the list's other columns as a JSON object. ``problem``: why the list's row cannot be read, else null;
its url is then what could be read of it, and its caption the row's text."""

IMAGES = _spec(
    "images",
    ("pair_key",),
    ("pair_key", pa.int64()),
    ("url", pa.string()),
    ("caption", pa.string()),
    ("status", pa.string()),
    ("error", pa.string()),
    ("http_status", pa.int32()),
    ("attempts", pa.int32()),
    ("retryable", pa.bool_()),
    ("sha256", pa.string()),
    ("phash", pa.int64()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("original_width", pa.int32()),
    ("original_height", pa.int32()),
    ("image", pa.binary()),
    ("format", pa.string()),
    ("original_format", pa.string()),
    ("original_bytes", pa.int32()),
    ("etag", pa.string()),
    ("last_modified", pa.string()),
    ("fetched_at", _TIME),
    ("not_before", _TIME),
    ("run", pa.string()),
)
"""``sha256``: of the bytes as fetched; ``phash``: 64 bits. ``etag`` and ``last_modified``: for conditional requests.
``not_before``: the host asked not to be tried again sooner (Retry-After). ``fetched_at``: of the last try."""

DUPLICATES = _spec(
    "duplicates",
    ("pair_key",),
    ("pair_key", pa.int64()),
    ("kept_key", pa.int64()),
    ("kind", pa.string()),
    ("distance", pa.int32()),
    ("run", pa.string()),
)
"""An image that is there already, under ``kept_key``: ``exact`` (sha256) or ``near`` (``distance`` bits of phash).
A table of its own: a mark costs some bytes, and not the rewriting of the images beside it."""

EMBEDDINGS = _spec(
    "embeddings",
    ("pair_key", "encoder"),
    ("pair_key", pa.int64()),
    ("encoder", pa.string()),
    ("image_vec", pa.binary()),
    ("text_vec", pa.binary()),
    ("similarity", pa.float32()),
    ("caption", pa.string()),
    ("sha256", pa.string()),
    ("run", pa.string()),
)
"""``sha256``: of the image that was embedded, as in images: another one there means that the image has changed.
Further columns, made when asked for: ``score_NAME`` (a head's, float), ``label`` and ``label_score`` (zero-shot)."""

SEMANTIC_DUPLICATES = _spec(
    "semantic_duplicates",
    ("pair_key", "encoder"),
    ("pair_key", pa.int64()),
    ("encoder", pa.string()),
    ("kept_key", pa.int64()),
    ("cosine", pa.float32()),
    ("run", pa.string()),
)
"""An image that means the same as another, ``kept_key``, to one encoder."""

CANDIDATES = _spec(
    "candidates",
    ("prompt_key", "number", "seed", "prior", "decoder", "encoder", "sampling"),
    ("prompt_key", pa.int64()),
    ("prompt", pa.string()),
    ("number", pa.int32()),
    ("seed", pa.int64()),
    ("clip_score", pa.float32()),
    ("rank", pa.int32()),
    ("kept", pa.bool_()),
    ("image", pa.binary()),
    ("prior", pa.string()),
    ("decoder", pa.string()),
    ("encoder", pa.string()),
    ("sampling", pa.string()),
    ("run", pa.string()),
)

RANKINGS = _spec(
    "rankings",
    ("prompt_key", "number", "seed", "prior", "decoder", "encoder", "sampling"),
    ("prompt_key", pa.int64()),
    ("prompt", pa.string()),
    ("number", pa.int32()),
    ("seed", pa.int64()),
    ("clip_score", pa.float32()),
    ("rank", pa.int32()),
    ("prior", pa.string()),
    ("decoder", pa.string()),
    ("encoder", pa.string()),
    ("sampling", pa.string()),
    ("run", pa.string()),
)

RUNS = _spec(
    "runs",
    ("run",),
    ("run", pa.string()),
    ("job", pa.string()),
    ("config", pa.string()),
    ("code_version", pa.string()),
    ("started", _TIME),
    ("ended", _TIME),
    ("outcome", pa.string()),
    ("error", pa.string()),
    ("counts_in", pa.int64()),
    ("counts_out", pa.int64()),
    ("counts_failed", pa.int64()),
    ("seconds", pa.string()),
    ("encoder", pa.string()),
    ("input_versions", pa.string()),
    ("host", pa.string()),
    ("pid", pa.int64()),
)

TABLES: dict[str, TableSpec] = {
    spec.name: spec for spec in (PAIRS, IMAGES, DUPLICATES, EMBEDDINGS, SEMANTIC_DUPLICATES, CANDIDATES, RANKINGS, RUNS)
}

SHARD = pa.schema(
    [
        ("pair_key", pa.int64()), ("url", pa.string()), ("caption", pa.string()), ("problem", pa.string()),
        ("attempts", pa.int32()), ("etag", pa.string()), ("last_modified", pa.string()),
    ]
)  # fmt: skip
"""No table, but the door of fetching: pairs to fetch, ``attempts`` earlier runs' tries, the validators those of the
stored image or null."""
