"""Audit: stored vectors that are damaged, doubled, or of an image that is another one by now; named by key."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
from numpy.typing import NDArray

from pipeline.keys import Keys
from pipeline.tables import Table
from schemas.errors import AuditError, Reason

NAMED = 10
"""Keys named in an error; the others are counted."""
_LENGTH = 2e-3
"""How far from 1 a length may be: rounding to float16 changes one by 5e-4 at most; half precision may round thrice."""
_SIMILARITY = 5e-3
"""How far the stored similarity may be from the cosine of the stored vectors."""
_BLOCK = 8192
_MEMORY = "2GB"

Vectors = NDArray[np.floating]


class VectorCheck:
    """What is wrong with one encoder's vectors: :meth:`add` them in batches of any size, then :meth:`finish`.

    Memory: eight bytes a row, for its key.
    """

    def __init__(self, encoder: str) -> None:
        self.encoder, self.rows = encoder, 0
        self._keys: list[Keys] = []
        self._wrong: dict[str, list[Keys]] = {}

    def add(self, keys: Keys, vectors: Mapping[str, Vectors], similarity: Vectors | None = None) -> None:
        """``keys`` [N], the vectors [N, D] of each modality, and the similarity stored with them [N], NaN for none."""
        self._keys.append(np.array(keys, np.int64))
        self.rows += len(keys)
        for start in range(0, len(keys), _BLOCK):
            rows = slice(start, start + _BLOCK)
            block = {m: np.asarray(v[rows], np.float32) for m, v in vectors.items()}  # [B, D]
            self._check_lengths(keys[rows], block)
            if similarity is not None and len(block) == 2:
                cosine = np.einsum("nd,nd->n", *block.values())  # [B]
                off = np.abs(cosine - similarity[rows]) > _SIMILARITY
                self._note("pairs whose similarity is not that of their vectors", keys[rows][off])

    def _check_lengths(self, keys: Keys, block: Mapping[str, NDArray[np.float32]]) -> None:
        for modality, x in block.items():
            with np.errstate(over="ignore", invalid="ignore"):
                length = np.sqrt(np.einsum("nd,nd->n", x, x))  # [B]; NaN if one is NaN, else infinite if one is
            self._note(f"{modality} vectors with NaN", keys[np.isnan(length)])
            self._note(f"{modality} vectors with an infinite number", keys[np.isinf(length)])
            self._note(f"{modality} vectors of zeros", keys[length == 0])
            finite = np.isfinite(length) & (length > 0)
            self._note(f"{modality} vectors not of length 1", keys[finite & (np.abs(length - 1) > _LENGTH)])

    def _note(self, what: str, keys: Keys) -> None:
        if len(keys):
            self._wrong.setdefault(what, []).append(np.array(keys))

    def finish(self) -> None:
        """Raises AuditError, naming keys, if anything was wrong with the vectors added."""
        keys = np.sort(np.concatenate(self._keys)) if self._keys else np.empty(0, np.int64)
        self._note("keys that are there twice", np.unique(keys[1:][keys[1:] == keys[:-1]]))
        if self._wrong:
            wrong = [f"{sum(map(len, k))} {what} ({named(np.concatenate(k))})" for what, k in self._wrong.items()]
            raise AuditError(
                f"vectors of {self.encoder} in the table embeddings are damaged",
                expected="each key once, finite vectors of length 1, with the similarity stored beside them",
                actual="; ".join(wrong),
                remedy=again(self.encoder),
            )


def check_vectors(keys: Keys, vectors: Mapping[str, Vectors], encoder: str = "one encoder") -> None:
    """Check keys [N] and the vectors [N, D] of each modality: finite, of length 1, no key twice.

    Raises:
        AuditError: naming what is wrong, how often, and ten keys of each kind.
    """
    check = VectorCheck(encoder)
    check.add(keys, vectors)
    check.finish()


def named(keys: Keys | Sequence[int]) -> str:
    """The first keys, ascending, in words."""
    first = ", ".join(map(str, sorted(np.asarray(keys).tolist())[:NAMED]))
    return f"{'keys' if len(keys) > 1 else 'key'} {first}" + (", ..." if len(keys) > NAMED else "")


def again(encoder: str) -> str:
    """What to do about wrong rows of this encoder."""
    return (
        f"delete these rows, or all of encoder = '{encoder}', from the table embeddings "
        f'(deltalake: DeltaTable("WORKSPACE/tables/embeddings").delete("pair_key IN (...)")), then clipmill embed'
    )


@dataclass(frozen=True)
class Standing:
    """An encoder's rows beside the images as they are: keys, each kind ascending.

    ``same``: the image is there, and the one that was embedded. ``changed``: it is another one by now. ``gone``: there
    is none, or none that is ok. ``missing``: how many images are ok and not embedded.
    """

    same: Keys
    changed: Keys
    gone: Keys
    missing: int


def compare_with_images(
    embeddings: Table,
    images: Table,
    encoder: str,
    versions: Mapping[str, int | None],
    files: Mapping[str, set[str]] | None = None,
) -> Standing:
    """How one encoder's rows stand to the images, at these versions of both tables (None: the newest).

    Only narrow columns are read; DuckDB spills to the disk. ``files``: of each table, to read no others.

    Raises:
        WorkspaceError: a table cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="clipmill-audit-") as folder, duckdb.connect(str(Path(folder, "db"))) as db:
        db.execute("SET memory_limit = $memory", {"memory": _MEMORY})
        for name, table, column, value in (
            ("embeddings", embeddings, "encoder", encoder),
            ("images", images, "status", str(Reason.OK)),
        ):
            some = None if files is None else files[name]
            db.register("batches", table.batches(("pair_key", "sha256", column), versions[name], some))
            # upper(): a plain comparison is pushed down into Arrow, which cannot make it on string views.
            query = f"CREATE TABLE {name} AS SELECT pair_key, sha256 FROM batches WHERE upper({column}) = upper($value)"  # noqa: S608
            db.execute(query, {"value": value})
            db.unregister("batches")
        db.execute("""
            CREATE TABLE beside AS
            SELECT DISTINCT e.pair_key, i.pair_key IS NULL AS gone,
                coalesce(e.sha256 <> i.sha256, false) AS changed
            FROM embeddings e LEFT JOIN images i USING (pair_key)""")
        same = _keys(db, "SELECT pair_key FROM beside WHERE NOT gone AND NOT changed ORDER BY pair_key")
        changed = _keys(db, "SELECT pair_key FROM beside WHERE changed ORDER BY pair_key")
        gone = _keys(db, "SELECT pair_key FROM beside WHERE gone ORDER BY pair_key")
        missing = db.execute("SELECT count(*) FROM images ANTI JOIN embeddings USING (pair_key)").fetchall()[0][0]
    return Standing(same, changed, gone, int(missing))


def _keys(db: duckdb.DuckDBPyConnection, query: str) -> Keys:
    return np.asarray(db.execute(query).fetchnumpy()["pair_key"], np.int64)
