"""Plots of reports, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Axes:
    """Title and labels of a plot."""

    title: str
    x: str
    y: str
    log_y: bool = False
    log_x: bool = False
    ticks: tuple[float, ...] = ()
    share: bool = False
    """y is a share: the axis runs from 0 to 1."""
    marks: bool = False
    """Every point is marked, however many there are."""


def lines(curves: Curves, axes: Axes) -> bytes:
    """Named curves, each (x, y), in one picture."""
    figure, area = plt.subplots(figsize=(4.8, 3.0), dpi=120)
    for name, (x, y) in curves.items():
        marker = "o" if len(x) < 20 or axes.marks else ""
        area.plot(x, y, label=name, linewidth=1.6, marker=marker, markersize=3)
    scale = {True: "log", False: "linear"}
    area.set(title=axes.title, xlabel=axes.x, ylabel=axes.y, xscale=scale[axes.log_x], yscale=scale[axes.log_y])
    if axes.log_x:
        area.xaxis.set_major_formatter("{x:g}")
        within = all(max(x) < 10 * min(x) for x, _ in curves.values())  # no power of ten inside: the steps are told
        area.xaxis.set_minor_formatter("{x:g}" if within else NullFormatter())
    if axes.ticks:
        area.set_xticks(axes.ticks, [f"{t:g}" for t in axes.ticks])
    if axes.share:
        area.set_ylim(0, 1.05)
    area.grid(alpha=0.3)
    if len(curves) > 1:
        area.legend(fontsize=8)
    out = io.BytesIO()
    figure.tight_layout()
    figure.savefig(out, format="png")
    plt.close(figure)
    return out.getvalue()


def matrix(values: NDArray[np.floating], names: Sequence[str], axes: Axes) -> bytes:
    """Shares from 0 to 1 [M, M] as colours, rows downwards, each cell with its number of percents."""
    side = 2.2 + 0.32 * len(names)
    figure, area = plt.subplots(figsize=(side, side), dpi=120)
    area.imshow(values, cmap="Blues", vmin=0, vmax=1)
    short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    area.set_xticks(range(len(names)), short, rotation=90, fontsize=7)
    area.set_yticks(range(len(names)), short, fontsize=7)
    area.set(xlabel=axes.x, ylabel=axes.y)
    area.set_title(axes.title, fontsize=9)
    for row, column in zip(*np.nonzero(values >= 0.005), strict=True):
        share = float(values[row, column])
        colour = "white" if share > 0.5 else "black"
        area.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=colour)
    out = io.BytesIO()
    figure.tight_layout()
    figure.savefig(out, format="png")
    plt.close(figure)
    return out.getvalue()
