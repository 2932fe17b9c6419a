"""What a search found: rows, an Arrow table, pictures in a notebook, a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.sheets import contact_sheet, html_grid, html_page
from schemas.errors import UsageError

BASE = ("rank", "similarity", "pair_key", "caption", "url", "width", "height")
"""Keys of every row; what follows them is the pair's own: scores, labels."""
PAIR_SIMILARITY = "pair_similarity"
"""In results, the column ``similarity`` of the records (of a caption and its image): theirs is the question's."""
_SHOWN = 48
"""Pictures in a notebook."""


@dataclass(frozen=True)
class Results:
    """The results of one question, best first.

    Attributes:
        table: a row a result: :data:`BASE`, then the pair's scores and labels.
        query: what was asked, in words.
    """

    table: pa.Table
    query: str = ""
    _images: Callable[[NDArray[np.int64]], dict[int, bytes]] = field(default=lambda _: {}, repr=False)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def keys(self) -> NDArray[np.int64]:
        """The pair_keys, int64 [n]."""
        return np.asarray(self.table["pair_key"].to_numpy())

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary a result, of plain Python values; a number that is none (NaN) as None."""
        return [plain(row) for row in self.table.to_pylist()]

    def to_arrow(self) -> pa.Table:
        return self.table

    def images(self) -> list[bytes | None]:
        """The stored images, encoded, in the order of the results; None where there is none."""
        found = self._images(self.keys)
        return [found.get(key) for key in self.keys.tolist()]

    def sheet(self, path: str | Path) -> Path:
        """Write the pictures with similarities and captions as a contact sheet: a .png, or a page .html.

        Raises:
            UsageError: another kind of file, or it cannot be written.
        """
        path = Path(path)
        kind = path.suffix.lower()
        if kind == ".png":
            data = contact_sheet(self.images(), self._labels())
        elif kind in (".html", ".htm"):
            grid = html_grid(list(zip(self.images(), self._labels(), strict=True)))
            data = html_page(self.query or "results", grid).encode()
        else:
            raise UsageError(f"a contact sheet is no {kind or 'file without suffix'}", expected=".png or .html")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as exc:
            raise UsageError(f"{path} cannot be written", actual=exc.strerror or str(exc)) from exc
        return path

    def _labels(self) -> list[str]:
        rows = self.table.select(["similarity", "caption"]).to_pylist()
        return [f"{row['similarity']:.2f} {row['caption'] or ''}" for row in rows]

    def _repr_html_(self) -> str:
        """In a notebook: the pictures, with similarities and captions."""
        shown = Results(self.table.slice(0, _SHOWN), self.query, self._images)
        more = f"<p>and {len(self) - _SHOWN} more</p>" if len(self) > _SHOWN else ""
        grid: str = html_grid(list(zip(shown.images(), shown._labels(), strict=True)))
        return grid + more

    def __repr__(self) -> str:
        lines = [f"{r['similarity']:.3f}  {r['pair_key']}  {r['caption'] or ''}"[:100] for r in self.rows()[:10]]
        return "\n".join([f"{len(self)} results: {self.query}", *lines])


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON can have it."""
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            row[name] = None
    return row


def as_results(records: pa.Table, ranks: NDArray[Any], similarity: NDArray[np.float32]) -> pa.Table:
    """Records, a row a result, with their ranks and similarities before them: the table of :class:`Results`."""
    names = records.column_names
    # A vector in float16 may be longer than 1 by a ten-thousandth.
    columns = [pa.array(ranks, pa.int32()), pa.array(np.minimum(similarity, 1), pa.float32())]
    columns += [records.column(name) for name in BASE[2:]]
    further = [name for name in names if name not in BASE[2:]]
    columns += [records.column(name) for name in further]
    titles = [PAIR_SIMILARITY if name == "similarity" else name for name in further]
    return pa.Table.from_arrays(columns, names=[*BASE, *titles])
