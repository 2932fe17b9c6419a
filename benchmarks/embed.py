"""Embedding: ``clipmill embed`` against the bare model's forward and against clip-retrieval.

    python -m benchmarks embed                                    # all parts, an hour and a half on two quiet cores
    python -m benchmarks embed -- --parts job text --rounds 3
    python -m benchmarks embed -- --quick                         # some minutes: does everything run?
    python -m benchmarks embed -- --captions FILE                 # a caption a line, in place of drawn ones

Everything is local: photo-like JPEGs of 256 px are drawn, captions too, as long as people's are (``lab/captions.py``:
all different), and the weights are random, made once in ``--cache`` and loaded by all sides. A *pair* is an image and
its caption: the job embeds both, so all sides do. The rival runs from a venv of its own (made in ``--cache``).

    job      the whole job (shards of 100, so that all workers have as much to do) against the limit: the same images
             and captions through open_clip's modules on tensors that are loaded, decoded and tokenized already,
             captions cut at the end of the longest in their batch, in the fastest of several layouts of processes,
             threads and batches that use all cores (tried first)
    text     the job's text path on strings (tokenizing, sorting, cutting) against open_clip's encode_text on tokens at
             full length
    rival    clip-retrieval's inference, images and captions from webdataset tars, same weights, same torch

*Steady state* is the difference between a long run and a short one of the same round, so that the start-up cancels;
the bare forward is timed without its own. CPU seconds are of every process that a command starts (``lab/meter.py``).
Medians of ``--rounds``, tools taken in turn; the ratio is the median of the rounds' ratios. Checked: the smallest
cosine between the job's vectors and those of open_clip used directly (Pillow, its own transform, captions at full
length), and the rival's. The figures of --quick mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.lab.captions import captions
from benchmarks.lab.corpus import draw
from benchmarks.lab.embedders import (
    CLIP_RETRIEVAL,
    RIVAL,
    Bare,
    ClipRetrieval,
    Corpus,
    Found,
    Model,
    Ours,
    Task,
    Tool,
    cosines,
    last_json,
)
from benchmarks.lab.meter import Cost, known_load, measure
from benchmarks.lab.report import Line, Report, machine, run_parts
from benchmarks.lab.series import Series, ratio_line
from benchmarks.lab.tools import make_venv

MODEL = "ViT-B-32"
CORES = os.cpu_count() or 1
LONG, SHORT = 2000, 400
PACKAGES = ("torch", "open-clip-torch", "ray", "pyarrow")


@dataclass
class Lab:
    """What all parts share: pictures, captions, weights, sizes; and the runs as they were, for the JSON."""

    folder: Path
    cache: Path
    pictures: Path
    captions: tuple[str, ...]
    model: Model
    rounds: int
    scale: float
    ours: Ours
    bare: Bare = field(default_factory=lambda: Bare("bare forward", threads=CORES))
    raw: list[dict[str, Any]] = field(default_factory=list)

    def n(self, pairs: int) -> int:
        """So many pairs, fewer with --quick."""
        return max(8, int(pairs * self.scale))

    def task(self, count: int) -> Task:
        corpus = Corpus(self.cache / "corpus", self.pictures, self.captions, count).make()
        return Task(self.folder / "run", corpus, self.model)

    def run(self, tool: Tool, count: int, *, note: str = "") -> tuple[Cost, Found | None]:
        """One command over ``count`` pairs, checked to have embedded them all; and what it made of them."""
        task = self.task(count)
        task.prepare()
        cost = measure(tool.command(task), task.env, timeout=3600.0)
        embedded = tool.embedded(task, cost.output) if cost.status == 0 else -1
        if embedded != count:
            raise SystemExit(f"{tool.name}: {embedded} of {count} pairs, status {cost.status}\n{cost.output[-3000:]}")
        said = last_json(cost.output)
        if isinstance(tool, Bare):
            cost = replace(cost, wall=said["wall"], cpu=said["cpu"])
        whole = not isinstance(tool, Bare) or tool.what in ("pairs", "direct")
        found = tool.vectors(task) if whole else None
        keep = {k: said[k] for k in ("seconds", "batch_size", "images_encoded", "texts_encoded") if k in said}
        costs = {k: v for k, v in asdict(cost).items() if k not in ("output", "status")}
        self.raw.append({"tool": tool.name, "pairs": count, "note": note} | keep | costs)
        print(
            f"    {tool.name:<24} {count:>6}  cpu {cost.cpu:7.1f} s  wall {cost.wall:7.1f} s  "
            f"peak {cost.peak / 1e6:5.0f} MB  {note}",
            flush=True,
        )
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        return cost, found


def steady(
    lab: Lab, tools: dict[Tool, tuple[int, int]], most: int = 100
) -> tuple[dict[Tool, Series], dict[Tool, Found]]:
    """Short (0: none) and long runs of every tool in turn, at most ``most`` rounds; the last long runs' vectors."""
    series = {tool: Series(lab.n(short) if short else 0, lab.n(long)) for tool, (short, long) in tools.items()}
    made: dict[Tool, Found] = {}
    for _ in range(min(lab.rounds, most)):
        for tool, s in series.items():
            short = lab.run(tool, s.short)[0] if s.short else None
            long, found = lab.run(tool, s.long)
            s.costs.append((short, long))
            if found is not None:
                made[tool] = found
    return series, made


def fastest(lab: Lab) -> Bare:
    """The layout of the bare forward with the most pairs a second: a limit that is no straw man."""
    layouts = [(1, CORES), (CORES, 1)] if CORES > 1 else [(1, 1)]
    tried: dict[Bare, float] = {}
    for (processes, threads), batch in itertools.product(layouts, (16, 32, 64) if lab.scale == 1 else (16,)):
        bare = replace(lab.bare, processes=processes, threads=threads, batch=batch)
        cost, _ = lab.run(bare, lab.n(256), note=f"{processes} x {threads} threads, batches of {batch}")
        tried[bare] = cost.wall
    return min(tried, key=tried.__getitem__)


def job(lab: Lab) -> list[Line]:
    """The whole job against the bare forward, ViT-B-32."""
    s, made = steady(lab, {lab.ours: (SHORT, LONG), lab.bare: (0, LONG)})
    ours, bare = s[lab.ours], s[lab.bare]
    long = [raw for raw in lab.raw if raw["tool"] == lab.ours.name and raw["pairs"] == ours.long]
    stages = {k: statistics.median(raw["seconds"][k] for raw in long) for k in long[0]["seconds"]}
    layout = f"{lab.bare.processes} process x {lab.bare.threads} threads, batches of {lab.bare.batch}"
    same = cosines(made[lab.ours], made[lab.bare])
    return [
        ratio_line(f"job / bare forward ({layout}), images and captions", ours, bare, "wall", 0.95),
        ratio_line("the same in CPU seconds", ours, bare, "cpu", 0.95),
        Line("the job's start-up, s wall (Ray, torch, weights, plan)", f"{ours.start_up('wall'):.1f}", ""),
        Line("the same, CPU s", f"{ours.start_up('cpu'):.1f}", ""),
        Line(
            f"the job's own seconds by stage, {ours.long:,} pairs",
            ", ".join(f"{k} {v:.1f}" for k, v in stages.items()),
            f"batches of {long[0].get('batch_size', '?')}",
        ),
        Line(
            f"smallest cosine, job / open_clip directly, {ours.long:,} images",
            f"{same['image']:.6f}",
            "",
            same["image"],
            0.9999,
        ),
        Line("the same, captions cut by the bare forward", f"{same['text']:.6f}", "", same["text"], 0.9999),
    ]


def text(lab: Lab) -> list[Line]:
    """Captions alone: the job's text path against the bare forward at full length."""
    path, full = (replace(lab.bare, name=n, what=w) for n, w in (("text path", "encoder"), ("full length", "texts")))
    s, _ = steady(lab, {path: (0, LONG), full: (0, LONG)}, most=5)
    tokens = "captions of this length are cut from 77 tokens to their own"
    return [
        ratio_line(f"text path / bare forward at full length ({tokens})", s[path], s[full], "wall", 3.0, "texts"),
        ratio_line("the same in CPU seconds", s[path], s[full], "cpu", 3.0, "texts"),
    ]


def rival(lab: Lab) -> list[Line]:
    """The whole job against clip-retrieval's inference, same images, captions and weights."""
    python = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11") or sys.executable
    venv = make_venv(lab.cache / "clip-retrieval", RIVAL, python)
    them = ClipRetrieval(CLIP_RETRIEVAL, venv=venv)
    s, made = steady(lab, {lab.ours: (SHORT, LONG), them: (SHORT // 2, LONG)}, most=3)
    ours, theirs = s[lab.ours], s[them]
    same = cosines(made[lab.ours], made[them])
    whole = [statistics.median(long.wall for _, long in x.costs) for x in (ours, theirs)]
    return [
        ratio_line("job / clip-retrieval, images and captions", ours, theirs, "wall"),
        ratio_line("the same in CPU seconds", ours, theirs, "cpu"),
        Line(
            f"whole command, {ours.long:,} pairs, s wall, theirs / ours",
            f"{whole[0]:.1f}", f"{whole[1]:.1f}", whole[1] / whole[0],
        ),
        Line("start-up, s wall, theirs / ours", *(f"{x.start_up('wall'):.1f}" for x in (ours, theirs))),
        Line("smallest cosine, job / clip-retrieval, images", f"{same['image']:.6f}", "", same["image"], 0.9999),
        Line("the same, captions (theirs at full length)", f"{same['text']:.6f}", "", same["text"], 0.9999),
    ]  # fmt: skip


PARTS = {"job": job, "text": text, "rival": rival}


@contextlib.contextmanager
def laboratory(given: argparse.Namespace) -> Iterator[Lab]:
    """Pictures, captions and weights; the commands' folders go to a temporary one."""
    rounds, scale = (1, 0.02) if given.quick else (given.rounds, 1.0)
    count = max(8, int(LONG * scale))
    if given.captions:
        lines = given.captions.read_text(encoding="utf-8").splitlines()
        texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))[:count]
        if len(texts) < count:
            raise SystemExit(f"{given.captions} has {len(texts)} different captions; {count} are needed")
    else:
        texts = captions(count)
    ours = Ours("clipmill embed", tuple(given.options.split()))
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder:
        yield Lab(
            Path(folder), given.cache, draw(given.cache / "pictures", count, 256, 256), tuple(texts),
            Model.make(given.cache / "weights", MODEL), rounds, scale, ours,
        )  # fmt: skip


def check(lab: Lab) -> None:
    """The meter counts daemons; the job gives what open_clip used directly gives, captions at full length included."""
    off = known_load(5.0)
    print(f"meter: a daemon's known load is measured as {off:.2f} of itself", flush=True)
    if lab.scale == 1 and not 0.9 < off < 1.1:
        raise SystemExit("the meter does not count right here")
    count = lab.n(200)
    _, mine = lab.run(lab.ours, count)
    direct = replace(lab.bare, name="open_clip directly", what="direct")
    _, theirs = lab.run(direct, count)
    same = cosines(mine or {}, theirs or {})
    print("smallest cosine to open_clip directly: images {image:.6f}, captions {text:.6f}".format(**same), flush=True)
    if min(same.values()) < 0.9999:
        raise SystemExit("the job gives other vectors than open_clip")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the pairs, one round")
    parser.add_argument("--captions", type=Path, help="a file with a caption on each line")
    parser.add_argument("--options", default="--shard-size 100", help="of clipmill embed, as one string")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "clipmill-benchmarks"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is ended, too
    report = Report(given.results, "embed-quick" if given.quick else "embed", "Embedding, compared")
    with laboratory(given) as lab:
        check(lab)
        lab.bare = fastest(lab)
        setting = machine(PACKAGES) | {"clip-retrieval": CLIP_RETRIEVAL.partition("==")[2], "rounds": str(lab.rounds)}
        run_parts(report, PARTS, given.parts, lab, setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
