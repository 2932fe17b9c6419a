"""Records of a list before they get a key: (url, caption, extra, problem), and the choice of their columns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from schemas.errors import UsageError

RECORDS = pa.schema([(name, pa.string()) for name in ("url", "caption", "extra", "problem")])
NONE = RECORDS.empty_table()


@dataclass(frozen=True)
class Columns:
    """Which columns of a list to read. ``extra``: those carried along; ("*",): all others, (): none."""

    url: str = "url"
    caption: str = "caption"
    extra: tuple[str, ...] = ("*",)

    def others(self, file: UPath, there: Sequence[str]) -> list[str]:
        """The names of the extra columns among ``there``.

        Raises:
            UsageError: a named column is not there, or one that is wanted is there twice. It names those there are.
        """
        self.check(file, there)
        others = [n for n in there if n not in (self.url, self.caption)] if self.extra == ("*",) else list(self.extra)
        counts = Counter(there)
        twice = [name for name in dict.fromkeys([self.url, self.caption, *others]) if counts[name] > 1]
        if twice:
            raise UsageError(
                f"{file} has more than one column {' and '.join(map(repr, twice))}",
                actual="columns: " + ", ".join(there),
                remedy="rename one of them in the file, or name others with --url-col, --caption-col and --extra-cols",
            )
        return others

    def check(self, file: UPath, there: Iterable[str]) -> None:
        """Raises UsageError if a named column is not there."""
        names = list(there)
        missing = [name for name in self.named if name not in names]
        if missing:
            raise UsageError(
                f"{file} has no column {' and no column '.join(map(repr, missing))}",
                actual="columns: " + ", ".join(names),
                remedy="name them with --url-col, --caption-col and --extra-cols",
            )

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that must be there, each once."""
        extra = () if self.extra == ("*",) else self.extra
        return tuple(dict.fromkeys([self.url, self.caption, *extra]))


def table(
    urls: Sequence[str], captions: Sequence[str], extras: Sequence[str | None], problems: Sequence[str | None]
) -> pa.Table:
    """Records from columns of Python values."""
    columns = (urls, captions, extras, problems)
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=RECORDS)


def one_bad(url: str, raw: str, problem: str) -> pa.Table:
    """A single bad record."""
    return table([url], [raw], [None], [problem])


def with_nulls(array: pa.Array, where: pa.Array) -> pa.Array:
    """``array`` with nulls where ``where`` is not null."""
    return pc.if_else(pc.is_null(where), array, pa.scalar(None, array.type))


def objects(names: Sequence[str], arrays: Sequence[pa.Array], rows: int) -> pa.Array:
    """Columns as one JSON object a row, string[rows]; nulls without columns.

    Dates, times and decimals are their text; NaN and infinities are null. Whole floats are written without ".0".
    """
    if not names:
        return pa.nulls(rows, pa.string())
    parts: list[pa.Array | str] = []
    for name, array in zip(names, arrays, strict=True):
        value, quote = _values(array)
        parts += [("," if parts else "{") + json.dumps(name) + ":"]
        # A null is written without quotes, so they are part of the value.
        parts += [pc.fill_null(pc.binary_join_element_wise('"', value, '"', "") if quote else value, "null")]
    return pc.binary_join_element_wise(*parts, "}", "")


def _values(array: pa.Array) -> tuple[pa.Array, bool]:
    """JSON text of the values, nulls left null, and whether it lacks the quotes yet."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        array, kind = array.dictionary_decode(), kind.value_type
    if pa.types.is_null(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return array.cast(pa.string()), False
    if pa.types.is_floating(kind):
        return pc.if_else(pc.is_finite(array), array, pa.scalar(None, kind)).cast(pa.string()), False
    if is_text(kind):
        return _escaped(array.cast(pa.string()))
    if pa.types.is_decimal(kind) or pa.types.is_temporal(kind):
        return _shown(array)
    return pa.array([_dumped(value) for value in array], pa.string()), False


def _shown(array: pa.Array) -> tuple[pa.Array, bool]:
    try:
        return array.cast(pa.string()), True
    except pa.ArrowException:  # beyond the calendar, or an unknown time zone: the number that is stored
        return array.cast(pa.int64()).cast(pa.string()), False


def _escaped(text: pa.Array) -> tuple[pa.Array, bool]:
    if pc.any(pc.match_substring_regex(text, r"[\x00-\x1f]")).as_py():
        return pa.array([None if t is None else json.dumps(t, ensure_ascii=False) for t in text.to_pylist()]), False
    for special in ("\\", '"'):
        text = pc.replace_substring(text, special, "\\" + special)
    return text, True


def _dumped(value: pa.Scalar) -> str | None:
    try:
        return None if value is None or not value.is_valid else dumps(value.as_py())
    except (UnicodeDecodeError, ValueError, OverflowError):  # a value that Python cannot hold
        return None


def dumps(value: object) -> str:
    """JSON of any Python value: NaN is null, bytes are left out, and what JSON does not know is text."""
    try:
        return _STRICT.encode(value)
    except (ValueError, TypeError):
        return _STRICT.encode(_plain(value))


_STRICT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value if not isinstance(item, bytes)]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def is_text(kind: pa.DataType) -> bool:
    """A type of strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """A type of bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )
