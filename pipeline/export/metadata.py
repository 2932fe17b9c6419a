"""img2dataset's metadata of a row: names, order and types of its columns, and its numbering of samples.

Source: img2dataset 1.47, ``downloader.py`` (``compute_key``, ``download_shard``) and ``logger.py`` (``write_stats``).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from schemas.errors import Reason

_BEFORE = (("caption", pa.string()), ("url", pa.string()))
_AFTER = (
    ("key", pa.string()), ("status", pa.string()), ("error_message", pa.string()), ("width", pa.int32()),
    ("height", pa.int32()), ("original_width", pa.int32()), ("original_height", pa.int32()), ("exif", pa.string()),
    ("sha256", pa.string()),
)  # fmt: skip
OWN = frozenset(name for name, _ in (*_BEFORE, *_AFTER))
_TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
_IN_DECODING = frozenset(
    (Reason.NOT_AN_IMAGE, Reason.FORMAT_REFUSED, Reason.TOO_MANY_PIXELS, Reason.TOO_MANY_FRAMES, Reason.TOO_SMALL,
     Reason.ASPECT_RATIO, Reason.DECODE)
)  # fmt: skip
_SHARD_DIGITS = 5


def shard_name(number: int) -> str:
    """``00000``, ``00001``, ..."""
    return f"{number:0{_SHARD_DIGITS}d}"


def sample_key(shard: int, place: int, shard_size: int) -> str:
    """The name of a sample: unique, without dots, in the order of shards and places."""
    digits = math.ceil(math.log10(shard_size))
    return f"{10**digits * shard + place:0{digits + _SHARD_DIGITS}d}"


def describe(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The metadata of a row of images, with the pair's extra columns (``row["extra"]``, JSON) before it.

    An extra column of a name that img2dataset uses itself is left out.
    """
    extra = json.loads(row["extra"]) if row["extra"] else {}
    ok = row["status"] == Reason.OK
    exif = extra.pop("exif", None)
    return {name: value for name, value in extra.items() if name not in OWN} | {
        "caption": row["caption"],
        "url": row["url"],
        "key": key,
        "status": "success" if ok else _failed(row["status"]),
        "error_message": None if ok else ": ".join(filter(None, (row["status"], row["error"]))),
        "width": row["width"] if ok else None,
        "height": row["height"] if ok else None,
        "original_width": row["original_width"] if ok else None,
        "original_height": row["original_height"] if ok else None,
        "exif": (exif if isinstance(exif, str) else "{}") if ok else None,
        "sha256": row["sha256"] if ok else None,
    }


def _failed(status: str) -> str:
    return "failed_to_resize" if status in _IN_DECODING else "failed_to_download"


def stats(rows: Sequence[Mapping[str, Any]], begun: float, ended: float) -> bytes:
    """The shard's ``_stats.json``, from its metadata and the seconds when its first and last image were fetched."""
    statuses = Counter(row["status"] for row in rows)
    causes = Counter("success" if row["status"] == "success" else row["error_message"] for row in rows)
    content = {
        "count": len(rows),
        "successes": statuses["success"],
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        "duration": ended - begun,
        "start_time": begun,
        "end_time": ended,
        "status_dict": dict(sorted(causes.items())),
    }
    return json.dumps(content, indent=4).encode()


def metadata_table(rows: Sequence[Mapping[str, Any]], extras: Mapping[str, str]) -> pa.Table:
    """The metadata of a shard as Arrow; ``extras``: the extra columns of all shards with their kinds."""
    columns = [(name, _TYPES.get(kind, pa.string())) for name, kind in extras.items()]
    schema = pa.schema([*columns, *_BEFORE, *_AFTER])
    ready = [{**row, **{name: _value(row.get(name), kind) for name, kind in extras.items()}} for row in rows]
    return pa.Table.from_pylist(ready, schema=schema)


def add_kinds(kinds: dict[str, str], extras: Iterable[str | None]) -> None:
    """Note in ``kinds`` which columns there are in ``extras`` (JSON objects), and what each holds."""
    for text in extras:
        for name, value in (json.loads(text) if text else {}).items():
            if name not in OWN:
                kinds[name] = _both(kinds.get(name, "null"), _kind(value))


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "bool"
    if isinstance(value, int):
        return "int" if -(1 << 63) <= value < 1 << 63 else "text"
    return "float" if isinstance(value, float) else "text"


def _both(one: str, other: str) -> str:
    if other in (one, "null"):
        return one
    if one == "null":
        return other
    return "float" if {one, other} == {"int", "float"} else "text"


def _value(value: Any, kind: str) -> Any:
    if value is None or kind in _TYPES:
        return float(value) if kind == "float" and value is not None else value
    return value if isinstance(value, str) else json.dumps(value)
