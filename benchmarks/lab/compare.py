"""Do two tools store the same pictures for the same URLs?"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

_CLOSE = 6.0
"""Mean difference of pixels (of 255): resizing filters differ, and JPEG is not exact."""


def _ours(workspace: Path) -> dict[str, bytes]:
    rows: dict[str, bytes] = {}
    for file in (workspace / "tables" / "images").rglob("*.parquet"):
        if "_delta_log" not in file.parts:
            table = pq.read_table(file, columns=["url", "image"])
            rows |= dict(zip(table["url"].to_pylist(), table["image"].to_pylist(), strict=True))
    return rows


def _theirs(folder: Path) -> dict[str, bytes]:
    rows: dict[str, bytes] = {}
    for file in folder.glob("*.parquet"):
        table = pq.read_table(file, columns=["url", "jpg"])
        rows |= dict(zip(table["url"].to_pylist(), table["jpg"].to_pylist(), strict=True))
    return rows


def same_images(workspace: Path, folder: Path) -> str:
    """What was compared, in words.

    Raises:
        AssertionError: other URLs, another size, or other pixels.
    """
    ours, theirs = _ours(workspace), _theirs(folder)
    assert ours.keys() == theirs.keys(), f"{len(ours.keys() ^ theirs.keys())} URLs are on one side only"
    worst = 0.0
    for url, image in ours.items():
        a, b = (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in (image, theirs[url]))
        assert a.shape == b.shape, f"{url}: {a.shape} and {b.shape}"
        worst = max(worst, float(np.abs(a.astype(np.int16) - b).mean()))
    assert worst < _CLOSE, f"pixels differ by {worst:.1f} of 255 on average"
    kilobytes = [sum(map(len, side.values())) / len(side) / 1000 for side in (ours, theirs)]
    return (
        f"{len(ours)} of one size, pixels at most {worst:.1f} of 255 apart on average, "
        f"{kilobytes[0]:.1f} KB and {kilobytes[1]:.1f} KB each"
    )
