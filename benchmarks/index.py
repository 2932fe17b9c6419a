"""Indices: ``clipmill index`` against autofaiss at the same memory; every kind; adding against building anew.

    python -m benchmarks index                                     # 500,000 x 512, all parts, an hour on two cores
    python -m benchmarks index -- --parts rival --rounds 3
    python -m benchmarks index -- --count 20000 --rounds 1         # some minutes: does all run?

Vectors with cluster structure are drawn (``lab/space.py``), unit-norm, float16, and lie in a workspace as ``embed``
leaves them, with records; the same image vectors in one .npy file for the rival, which runs from a venv of its own
(made in ``--cache``). Both are whole commands: start-up, reading, building, tuning, writing, and ours also measures,
joins records and publishes. CPU seconds are of every process that a command starts (``lab/meter.py``).

    kinds    each kind of index that is in the job's table, built with --factory, tuned to recall@10 0.95
    rival    the job's own choice against autofaiss, which is given as many bytes as our index takes; where it takes
             fewer, the job's choice in as few (--memory), too
    add      1% of new vectors, added by the job, against its build of all

Recall@10 and @100 are against brute force, for queries that are in no index; milliseconds are of one query at a time on
one thread, k = 10; all of them by the same code (``lab/searches.py``). In ``rival`` each side is searched as it set
itself; ours once more with the fastest parameters that reach the rival's recall. Medians of ``--rounds``, but one build
of the rival, which takes many minutes. The plot is of recall against latency, all kinds and the rival.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.lab import autofaiss
from benchmarks.lab.embedders import last_json
from benchmarks.lab.meter import Cost, measure
from benchmarks.lab.report import Line, Report, machine, run_parts
from benchmarks.lab.searches import Keys, Quality, Search, exact, quality
from benchmarks.lab.space import Space, add_rows, bench_card, make_workspace
from pipeline.index import Truth, choose, frontier, open_index, search, tune
from pipeline.index.kinds import kinds as all_kinds
from pipeline.workspace import Workspace
from schemas.cards import IndexCard, Point

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CORES = os.cpu_count() or 1
QUERIES, TARGET = 1000, 0.95
PACKAGES = ("faiss-cpu", "numpy", "pyarrow")


@dataclass
class Lab:
    """The space, its truth, and what was measured, for the JSON and the plot."""

    folder: Path
    cache: Path
    space: Space
    rounds: int
    raw: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.card = bench_card(self.space.dim)
        self.queries = self.space.queries(QUERIES).astype(np.float32)  # [Q, D]
        self.keys = self.space.keys(0, self.space.count)
        self._truth: dict[int, Keys] = {}

    def workspace(self) -> Workspace:
        """With all vectors and no index."""
        return make_workspace(self.cache / "spaces" / "ws", self.space, self.card)

    def truth(self, count: int) -> Keys:
        """Keys of the neighbours [Q, 100] among the first ``count`` vectors."""
        if count not in self._truth:
            blocks = [(n, min(65_536, count - n)) for n in range(0, count, 65_536)]
            self._truth[count] = exact(self.queries, ((self.space.keys(*b), self.space.draw(*b)) for b in blocks))
        return self._truth[count]

    def run(self, workspace: Workspace, *options: str, note: str, refusal: bool = False) -> tuple[Cost, dict[str, Any]]:
        """``clipmill index`` of the image vectors; what it cost, and what it says. ``refusal``: it may publish none."""
        command = [
            sys.executable, "-m", "jobs.index", "--workspace", str(workspace.root), "--modality", "image",
            "--audit", "0", "--json", *options,
        ]  # fmt: skip
        cost = measure(command, timeout=7200.0)
        said = last_json(cost.output)
        if cost.status not in (0, 3 if refusal else 0):
            raise SystemExit(f"clipmill index {' '.join(options)}: status {cost.status}\n{cost.output[-3000:]}")
        self.note(note, cost, seconds=said["seconds"])
        return cost, said

    def note(self, what: str, cost: Cost, **more: Any) -> None:
        costs = {k: v for k, v in asdict(cost).items() if k not in ("output", "status")}
        self.raw.append({"what": what} | costs | more)
        print(
            f"    {what:<44} wall {cost.wall:7.1f} s  cpu {cost.cpu:7.1f} s  peak {cost.peak / 1e6:6.0f} MB", flush=True
        )

    def opened(self, workspace: Workspace) -> tuple[IndexCard, Any]:
        """The published card, and its index of image vectors."""
        card = workspace.published_index(self.card.id)
        assert card is not None
        file = card.file("image")
        return card, open_index(workspace.index_dir(self.card.id) / card.version / file.path, file)


def ours(index: Any, parameters: dict[str, int]) -> Search:
    """The job's own search."""
    return lambda queries, k: search(index, queries, k, parameters)[1]


def tuned(lab: Lab, index: Any, name: str, target: float, places: bool = False) -> tuple[Point, tuple[Point, ...]]:
    """The fastest parameters that reach recall@10 ``target``, and all that were tried, which go to the plot.
    ``places``: the index's ids are places instead of keys."""
    ids = np.arange(lab.space.count) if places else lab.keys
    blocks = range(0, lab.space.count, 65_536)
    truth = Truth.of(lab.queries, ((ids[n : n + 65_536], lab.space.draw(n, len(ids[n : n + 65_536]))) for n in blocks))
    point, curve = tune(index, truth, target)
    best = [(p.recall_at_10, p.ms_per_query) for p in frontier(curve)]
    lab.raw.append({"curve": name.removeprefix("IDMap,"), "recall_at_10, ms": best})
    return point, curve


# ---- parts -----------------------------------------------------------------------------------------


def kinds(lab: Lab) -> Iterator[Line]:
    """Every kind in the job's table, tuned to recall@10 0.95 or to its best."""
    count, dim = lab.space.count, lab.space.dim
    chosen = choose(count, dim, TARGET)[0].factory
    for kind in all_kinds(count, dim):
        workspace = lab.workspace()
        cost, said = lab.run(
            workspace, "--factory", kind.factory, "--recall", "0.001", "--queries", "50", note=kind.factory
        )
        card, index = lab.opened(workspace)
        point, _ = tuned(lab, index, kind.factory, TARGET)
        found = quality(ours(index, point.search), lab.queries, lab.truth(count))
        size = card.file("image").bytes
        sizes = {"bytes": size, "expected_bytes": kind.bytes(count, dim)}
        lab.raw.append({"what": kind.factory, "search": point.search} | asdict(found) | sizes)
        what = f"{kind.factory}{' (the choice)' if kind.factory == chosen else ''}, {_shown(point.search)}"
        seconds = said["seconds"]["total"]
        yield Line(what, _quality(found), f"{size / 1e6:.0f} MB, build {seconds:.1f} s, {cost.cpu:.1f} CPU s")


def rival(lab: Lab) -> list[Line]:
    """The job's choice against autofaiss in as much memory."""
    venv = autofaiss.make(lab.cache / "autofaiss")
    vectors = lab.cache / "spaces" / f"npy-{lab.space.count}-{lab.space.dim}-{lab.space.seed}"
    if not (vectors / "vectors.npy").exists():
        vectors.mkdir(parents=True, exist_ok=True)
        np.save(vectors / "vectors.npy", lab.space.draw(0, lab.space.count))
    mine: list[Cost] = []
    for _ in range(lab.rounds):
        workspace = lab.workspace()
        mine.append(lab.run(workspace, "--recall", str(TARGET), note="clipmill index")[0])
    card, index = lab.opened(workspace)
    truth, file = lab.truth(lab.space.count), card.file("image")
    other = autofaiss.build(venv, vectors, vectors.with_name(f"{vectors.name}-autofaiss"), file.bytes, CORES)
    lab.note("autofaiss", other.cost, key=other.key, parameters=other.parameters, bytes=other.bytes)
    set_so = quality(ours(index, file.search), lab.queries, truth)
    them = quality(other.search(lab.keys), lab.queries, truth)
    point, _ = tuned(lab, index, file.factory, max(TARGET, them.recall_at_10))
    equal = quality(ours(index, point.search), lab.queries, truth)
    tuned(lab, other.index, f"autofaiss, {other.key}", TARGET, places=True)
    measured = {"ours": set_so, "ours_at_their_recall": equal, "autofaiss": them}
    lab.raw.append({name: asdict(found) for name, found in measured.items()} | {"search": point.search})
    return [
        Line("index", f"{file.factory}, {_shown(file.search)}", f"{other.key}, {other.parameters}"),
        _more(
            "recall@10, ours / theirs", f"{set_so.recall_at_10:.4f}", f"{them.recall_at_10:.4f}",
            set_so.recall_at_10 / them.recall_at_10,
        ),
        Line("recall@100", f"{set_so.recall_at_100:.4f}", f"{them.recall_at_100:.4f}"),
        _more("ms a query, theirs / ours", f"{set_so.ms:.3f}", f"{them.ms:.3f}", them.ms / set_so.ms),
        _more("MB, theirs / ours", f"{file.bytes / 1e6:.1f}", f"{other.bytes / 1e6:.1f}", other.bytes / file.bytes),
        _build("build, s wall, theirs / ours", mine, other.cost, "wall"),
        _build("build, CPU s, theirs / ours", mine, other.cost, "cpu"),
        _more(
            f"ms a query at recall@10 {equal.recall_at_10:.4f} ({_shown(point.search)}), theirs / ours",
            f"{equal.ms:.3f}", f"{them.ms:.3f}", them.ms / equal.ms,
        ),
        *(_squeezed(lab, other, them) if other.bytes < file.bytes else ()),
    ]  # fmt: skip


def _squeezed(lab: Lab, other: autofaiss.Theirs, them: Quality) -> list[Line]:
    """The job's choice in no more bytes than autofaiss took, as the job sets it, and as deep as their recall needs."""
    workspace, where = lab.workspace(), f"in {other.bytes / 1e6:.1f} MB"
    target = ("--memory", str(other.bytes), "--recall", f"{them.recall_at_10:.4f}")
    cost, _ = lab.run(workspace, *target, note=where, refusal=True)
    if cost.status:
        return [Line(f"{where}: no kind reaches their recall", "", "")]
    card, index = lab.opened(workspace)
    file = card.file("image")
    truth = lab.truth(lab.space.count)
    found = quality(ours(index, file.search), lab.queries, truth)
    _, curve = tuned(lab, index, file.factory, them.recall_at_10)
    enough = [point for point in curve if point.recall_at_10 >= them.recall_at_10]
    point = min(enough, key=lambda point: point.ms_per_query)
    equal = quality(ours(index, point.search), lab.queries, truth)
    return [
        Line(f"{where}", f"{file.factory}, {_shown(file.search)}, {file.bytes / 1e6:.1f} MB", other.key),
        _more(
            f"{where}, recall@10, ours / theirs", f"{found.recall_at_10:.4f}", f"{them.recall_at_10:.4f}",
            found.recall_at_10 / them.recall_at_10,
        ),
        _more(f"{where}, ms a query, theirs / ours", f"{found.ms:.3f}", f"{them.ms:.3f}", them.ms / found.ms),
        _more(
            f"{where}, ms a query at recall@10 {equal.recall_at_10:.4f} ({_shown(point.search)}), theirs / ours",
            f"{equal.ms:.3f}", f"{them.ms:.3f}", them.ms / equal.ms,
        ),
        _build(f"{where}, build, CPU s, theirs / ours", [cost], other.cost, "cpu"),
    ]  # fmt: skip


def _build(what: str, mine: Sequence[Cost], theirs: Cost, clock: str) -> Line:
    ours_took, they_took = statistics.median(getattr(cost, clock) for cost in mine), getattr(theirs, clock)
    return _more(what, f"{ours_took:.1f}", f"{they_took:.1f}", they_took / ours_took)


def _more(what: str, mine: str, theirs: str, ratio: float) -> Line:
    """A ratio that says how much better ours is: not behind means 1, ahead 1.2."""
    return Line(what, mine, theirs, ratio, 1.0)


def add(lab: Lab) -> list[Line]:
    """1% of new vectors against a build of all."""
    more = max(1, lab.space.count // 100)
    built, added = [], []
    for _ in range(lab.rounds):
        workspace = lab.workspace()
        first = lab.run(workspace, "--recall", str(TARGET), note="build")
        before, _ = lab.opened(workspace)
        add_rows(workspace, lab.space, lab.card, lab.space.count, more)
        second = lab.run(workspace, "--recall", str(TARGET), note=f"{more:,} added")
        card, index = lab.opened(workspace)
        if card.count != lab.space.count + more or card.version == before.version:
            raise SystemExit(f"the index has {card.count} vectors after {more} were added to {before.count}")
        built.append(first)
        added.append(second)
    found = quality(ours(index, card.file("image").search), lab.queries, lab.truth(lab.space.count + more))
    said = [(b["seconds"]["total"], a["seconds"]["total"]) for (_, b), (_, a) in zip(built, added, strict=True)]
    made = [_share("the job's seconds, added / built", said, 0.05)]
    for name, clock in (("whole command, s wall", "wall"), ("whole command, CPU s", "cpu")):
        pairs = [(getattr(b, clock), getattr(a, clock)) for (b, _), (a, _) in zip(built, added, strict=True)]
        made.append(_share(f"{name} (with start-up), added / built", pairs, None))
    stages = ", ".join(f"{k} {v:.2f}" for k, v in added[-1][1]["seconds"].items())
    return [*made, Line(f"seconds of adding {more:,}", stages, ""), Line("recall after it", _quality(found), "")]


def _share(what: str, pairs: Sequence[tuple[float, float]], goal: float | None) -> Line:
    ratio = statistics.median(new / whole for whole, new in pairs)
    whole, new = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Line(what, f"{new:.2f}", f"{whole:.2f}", ratio, goal, most=True)


def _quality(found: Quality) -> str:
    return f"recall@10 {found.recall_at_10:.4f}, @100 {found.recall_at_100:.4f}, {found.ms:.3f} ms"


def _shown(parameters: dict[str, int]) -> str:
    return " ".join(f"{name} {value}" for name, value in parameters.items()) or "no parameters"


PARTS: dict[str, Callable[[Lab], Iterable[Line]]] = {"kinds": kinds, "rival": rival, "add": add}


def picture(parts: dict[str, Any]) -> bytes:
    """Recall against latency out of a report's parts, a curve an index: those points that no faster one surpasses."""
    figure, area = plt.subplots(figsize=(8.5, 4.6), dpi=120)
    raw = [measured for part in parts.values() for measured in part["raw"]]
    for name, points in {m["curve"]: m["recall_at_10, ms"] for m in raw if "curve" in m}.items():
        style = {"color": "black", "linestyle": "--"} if name.startswith("autofaiss") else {}
        area.plot(*zip(*points, strict=True), label=name, marker="o", ms=3, **style)
    area.set(title="Recall against latency", xlabel="recall@10", ylabel="ms a query, one thread", yscale="log")
    area.grid(alpha=0.3)
    area.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight")
    plt.close(figure)
    return out.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--count", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "clipmill-benchmarks"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is ended, too
    report = Report(given.results, "index", "Indices, compared")
    given.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        lab = Lab(Path(folder), given.cache, Space(given.count, given.dim), given.rounds)
        setting = machine(PACKAGES) | {
            "autofaiss": autofaiss.AUTOFAISS.partition("==")[2], "vectors": f"{given.count:,} x {given.dim}",
            "queries": str(QUERIES), "rounds": str(given.rounds),
        }  # fmt: skip
        try:
            run_parts(report, PARTS, given.parts, lab, setting)
        finally:  # the curves of what was measured, if a later part fails
            (given.results / "index.png").write_bytes(picture(report.parts))
        shutil.rmtree(given.cache / "spaces" / "ws", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
