"""Results of a benchmark in parts: one JSON file, added to part by part, and the Markdown table made from it."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar


@dataclass(frozen=True)
class Line:
    """One figure. ``ratio`` is held against ``goal`` (at least; at most where ``most``); both may be missing."""

    what: str
    ours: str
    other: str
    ratio: float | None = None
    goal: float | None = None
    most: bool = False

    @property
    def verdict(self) -> str:
        if self.ratio is None or self.goal is None:
            return ""
        return "met" if (self.ratio <= self.goal if self.most else self.ratio >= self.goal) else "missed"

    def cells(self) -> list[str]:
        sign = "at most" if self.most else "at least"
        return [
            self.what, self.ours, self.other, "" if self.ratio is None else f"{self.ratio:.2f}",
            "" if self.goal is None else f"{sign} {self.goal:g}", self.verdict,
        ]  # fmt: skip


def machine(packages: Sequence[str]) -> dict[str, str]:
    """Date, processor, cores and versions: what a figure is worth nothing without."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpus if "model name" in line), platform.machine())
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(), "processor": model, "cores": str(os.cpu_count()),
        "python": platform.python_version(), **{name: version(name) for name in packages},
    }  # fmt: skip


class Report:
    """``FOLDER/NAME.json`` and ``FOLDER/NAME.md``."""

    def __init__(self, folder: Path, name: str, title: str) -> None:
        self.json, self.markdown, self.title = folder / f"{name}.json", folder / f"{name}.md", title
        folder.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, Any] = json.loads(self.json.read_text()) if self.json.exists() else {}

    def add(self, part: str, setting: dict[str, str], lines: Sequence[Line], raw: object) -> None:
        """Put a part in, in place of an earlier one of that name, and write both files."""
        self.parts[part] = {"setting": setting, "lines": [asdict(line) for line in lines], "raw": raw}
        self.json.write_text(json.dumps(self.parts, indent=1) + "\n")
        self.markdown.write_text(self._text())

    def _text(self) -> str:
        text = [f"# {self.title}", ""]
        settings: dict[str, list[str]] = {}
        for name, part in self.parts.items():
            settings.setdefault(", ".join(f"{k} {v}" for k, v in part["setting"].items()), []).append(name)
        for setting, names in settings.items():
            text += [f"{setting}.", "", *table([Line(**line) for n in names for line in self.parts[n]["lines"]]), ""]
        return "\n".join(text)


class Laboratory(Protocol):
    """What the parts of a benchmark share. ``raw``: what a part wants kept beside its lines."""

    raw: list[Any]


L = TypeVar("L", bound=Laboratory)


def run_parts(
    report: Report,
    parts: Mapping[str, Callable[[L], Iterable[Line]]],
    wanted: Sequence[str],
    lab: L,
    setting: dict[str, str],
) -> None:
    """Run the wanted parts one after another; each line is in the report as soon as it is there."""
    for part in wanted:
        print(f"\n{part}: {(parts[part].__doc__ or '').rstrip('.')}", flush=True)
        lab.raw = []
        lines: list[Line] = []
        for line in parts[part](lab):
            lines.append(line)
            report.add(part, setting, lines, lab.raw)
        print("\n".join(table(lines)), flush=True)
    print(f"\nwritten: {report.markdown}, {report.json}")


def table(lines: Sequence[Line]) -> list[str]:
    """The lines as a Markdown table."""
    head = ["what", "ours", "against", "ratio", "goal", ""]
    rows = [head, ["---"] * len(head), *(line.cells() for line in lines)]
    return ["| " + " | ".join(row) + " |" for row in rows]
