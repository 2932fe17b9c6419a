"""Downloading: ``clipmill download`` against img2dataset and against a bare loop with the same client and codec.

    python -m benchmarks download                                    # all parts, about 25 minutes on two quiet cores
    python -m benchmarks download -- --parts large small --rounds 3
    python -m benchmarks download -- --quick                         # a few minutes: does everything run?

Everything is local: photo-like JPEGs are drawn, and a web server in processes of its own serves each URL with bytes
of its own (a comment in the file) from 16 loopback addresses. All store at 256 px, keep_ratio, JPEG quality 95.
img2dataset runs from a venv of its own (made in ``--cache``).

What is measured are whole commands: CPU seconds (user and system) of every process that a command starts
(``lab/meter.py``), wall seconds, and the peak of the summed PSS of its processes.
*Steady state* is the difference between a long run and a short one of the same round, so that the start-up cancels:
images of the difference / CPU seconds of the difference. Medians of ``--rounds``, tools taken in turn. The figures
of --quick mean nothing: start-up outweighs a few hundred images.

    large    1024 x 768 (about 175 KB) -> 256, http; its long run, 5,000 images, is a "whole command", too
    small    256 x 256 (about 20 KB), http: these fit already; and once more with --no-keep-original, so that both
             sides encode. Its short run, 5,000 images, is "the whole command", start-up included
    https    256 x 256, https
    memory   peak at ten times the images
    slow     the same list with and without 1,000 further hosts that answer after two seconds
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.lab.compare import same_images
from benchmarks.lab.corpus import draw
from benchmarks.lab.meter import Cost, known_load, measure
from benchmarks.lab.report import Line, Report, machine, run_parts
from benchmarks.lab.server import Site, certificate, serving, trusted
from benchmarks.lab.tools import IMG2DATASET, Bare, Img2dataset, Job, Ours, Tool, make_venv, tls_contexts

HOSTS = tuple(f"127.0.1.{i}" for i in range(1, 17))
LARGE, SMALL = "1024x768", "256x256"
PACKAGES = ("ray", "pycurl", "simplejpeg", "opencv-python-headless", "pyarrow")
OURS, RE_ENCODED = Ours("ours"), Ours("ours, re-encoded", ("--no-keep-original",))
BARE, BARE_RE_ENCODED = Bare("bare loop"), Bare("bare loop, re-encoded", ("--no-keep-original",))

Sizes = dict[str, tuple[int, int]]
"""Tool -> images of its short and of its long run."""


@dataclass
class Lab:
    """What all parts share: servers, pictures, the rival's venv, sizes."""

    folder: Path
    rounds: int
    scale: float
    rival: Img2dataset
    ports: dict[str, int]
    ca: Path
    slow: tuple[str, ...]
    raw: list[dict[str, Any]] = field(default_factory=list)

    def n(self, images: int) -> int:
        """So many images, fewer with --quick."""
        return max(20, int(images * self.scale))

    def job(self, name: str, scheme: str, size: str, count: int) -> Job:
        return Job(self.folder / name, scheme, size, count, self.ports[scheme], HOSTS, ca=self.ca)

    def run(self, tool: Tool, job: Job, *, keep: bool = False) -> Cost:
        """One command from an empty folder, checked to have stored every image."""
        job.prepare()
        cost = measure(tool.command(job), job.env)
        wanted = job.count + len(job.slow)
        stored = tool.stored(job, cost.output) if cost.status == 0 else -1
        if stored != wanted:
            raise SystemExit(f"{tool.name}: {stored} of {wanted} images, status {cost.status}\n{cost.output[-3000:]}")
        self.raw.append(
            {"tool": tool.name, "scheme": job.scheme, "size": job.size, "images": wanted, "slow": len(job.slow)}
            | {k: v for k, v in asdict(cost).items() if k not in ("output", "status")}
        )
        print(
            f"    {tool.name:<22} {job.scheme:<5} {job.size:<9} {wanted:>6}  cpu {cost.cpu:6.1f} s  "
            f"wall {cost.wall:6.1f} s  peak {cost.peak / 1e6:5.0f} MB",
            flush=True,
        )
        if not keep:
            shutil.rmtree(job.folder)
        return cost


@dataclass
class Series:
    """The short and the long run of each round of one tool."""

    short: int
    long: int
    costs: list[tuple[Cost, Cost]] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Images per CPU second in steady state, of each round; infinite where start-up hides it (--quick)."""
        seconds = [b.cpu - a.cpu for a, b in self.costs]
        return [(self.long - self.short) / s if s > 0 else math.inf for s in seconds]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def shown(self) -> str:
        return f"{self.rate:,.0f} /CPU s ({min(self.rates):,.0f}-{max(self.rates):,.0f})"


def steady(lab: Lab, scheme: str, size: str, tools: dict[Tool, tuple[int, int]], most: int = 100) -> dict[Tool, Series]:
    """Short and long runs of every tool, in turn, round after round, at most ``most`` rounds."""
    series = {tool: Series(lab.n(short), lab.n(long)) for tool, (short, long) in tools.items()}
    for _ in range(min(lab.rounds, most)):
        for tool, s in series.items():
            short, long = (lab.run(tool, lab.job("run", scheme, size, n)) for n in (s.short, s.long))
            s.costs.append((short, long))
    return series


def ratio_line(what: str, ours: Series, other: Series, goal: float | None) -> Line:
    """Steady-state rates and the ratio of their medians."""
    known = math.isfinite(ours.rate) and math.isfinite(other.rate)
    return Line(what, ours.shown(), other.shown(), ours.rate / other.rate if known else None, goal)


def large(lab: Lab) -> list[Line]:
    """1024 px -> 256 px over http."""
    s = steady(lab, "http", LARGE, {OURS: (2000, 5000), lab.rival: (500, 5000), BARE: (500, 2500)})
    mine, theirs = ([long for _, long in s[tool].costs] for tool in (OURS, lab.rival))
    return [
        ratio_line("1024 px -> 256 px, http, against img2dataset", s[OURS], s[lab.rival], 2.0),
        ratio_line("1024 px -> 256 px, http, against the bare loop", s[OURS], s[BARE], 0.8),
        *whole(f"whole command, {s[OURS].long:,} images of 1024 px", mine, theirs),
    ]


def small(lab: Lab) -> list[Line]:
    """256 px -> 256 px over http, and the whole command for 5,000 images."""
    s = steady(lab, "http", SMALL, {OURS: (5000, 25_000), lab.rival: (5000, 12_000), BARE: (2000, 12_000)})
    s |= steady(lab, "http", SMALL, {RE_ENCODED: (2000, 12_000), BARE_RE_ENCODED: (1000, 6000)}, most=3)
    mine, theirs = ([short for short, _ in s[tool].costs] for tool in (OURS, lab.rival))
    return [
        ratio_line("256 px -> 256 px, http, against img2dataset", s[OURS], s[lab.rival], 1.5),
        ratio_line("the same, both re-encode", s[RE_ENCODED], s[lab.rival], None),
        ratio_line("256 px -> 256 px, http, against the bare loop", s[OURS], s[BARE], 0.8),
        ratio_line("the same, both re-encode", s[RE_ENCODED], s[BARE_RE_ENCODED], None),
        *whole(f"whole command, {s[OURS].short:,} images of 256 px", mine, theirs),
    ]


def whole(what: str, mine: list[Cost], theirs: list[Cost]) -> list[Line]:
    """CPU, wall and memory of whole commands, start-up included: theirs / ours."""
    lines = []
    for name, unit, goal in (("cpu", "CPU s", 3.0), ("wall", "s wall", 3.0), ("peak", "MB", None)):
        scale = 1e6 if name == "peak" else 1.0
        a, b = (statistics.median(getattr(c, name) for c in costs) / scale for costs in (mine, theirs))
        ratio = statistics.median(getattr(y, name) / getattr(x, name) for x, y in zip(mine, theirs, strict=True))
        lines.append(Line(f"{what}, {unit}, img2dataset / ours", f"{a:.1f}", f"{b:.1f}", ratio, goal))
    return lines


def https(lab: Lab) -> list[Line]:
    """256 px -> 256 px over https."""
    job = lab.job("tls", "https", SMALL, 20)
    counted = tls_contexts(lab.rival.venv, job.urls(), job.env)
    made = f"{counted['contexts']} TLS contexts for {counted['requests']} requests"
    print(f"    img2dataset made {made}", flush=True)
    s = steady(lab, "https", SMALL, {OURS: (2000, 17_000), lab.rival: (100, 500), BARE: (2000, 12_000)})
    return [
        ratio_line(f"256 px -> 256 px, https, against img2dataset ({made})", s[OURS], s[lab.rival], 5.0),
        ratio_line("256 px -> 256 px, https, against the bare loop", s[OURS], s[BARE], 0.8),
    ]


def memory(lab: Lab) -> list[Line]:
    """Peak memory at n and at 10 n images."""
    few, many = lab.n(5000), lab.n(50_000)
    a, b = (lab.run(OURS, lab.job("run", "http", SMALL, n)) for n in (few, many))
    shown = [f"{c.peak / 1e6:.0f} MB" for c in (b, a)]
    return [Line(f"peak memory at {many:,} images / at {few:,}", shown[0], shown[1], b.peak / a.peak, 1.15, most=True)]


def slow(lab: Lab) -> list[Line]:
    """The same images with and without slow hosts among them."""
    hosts = lab.slow[: lab.n(1000)]
    runs = []
    for _ in range(min(lab.rounds, 3)):
        plain = lab.job("run", "http", SMALL, lab.n(5000))
        runs.append((lab.run(OURS, replace(plain, slow=hosts)), lab.run(OURS, plain)))
    lines = []
    what = f"{lab.n(5000):,} images and {len(hosts):,} on hosts that take 2 s / without those"
    for name, unit in (("wall", "s wall"), ("cpu", "CPU s")):
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in runs]
        mine, plain = (f"{statistics.median(p):.1f}" for p in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        lines.append(Line(f"{what}, {unit}", mine, plain, ratio, 1.25, most=True))
    return lines


PARTS = {"large": large, "small": small, "https": https, "memory": memory, "slow": slow}


@contextlib.contextmanager
def laboratory(cache: Path, rounds: int, scale: float) -> Iterator[Lab]:
    """Pictures, certificate, venv and servers; the commands' folders go to a temporary one."""
    pictures = {
        LARGE: draw(cache / "pictures", 100 if scale == 1 else 20, 1024, 768),
        SMALL: draw(cache / "pictures", 500 if scale == 1 else 100, 256, 256),
    }
    rival = Img2dataset("img2dataset", venv=make_venv(cache / "img2dataset", [IMG2DATASET]))
    cert = certificate(cache / "tls", HOSTS)
    slow_hosts = tuple(f"127.2.{i // 200}.{1 + i % 200}" for i in range(int(1000 * scale) or 20))
    with (
        tempfile.TemporaryDirectory(prefix="clipmill-bench-") as folder,
        serving(Site(pictures, HOSTS, slow_hosts)) as http_port,
        serving(Site(pictures, HOSTS, tls=cert)) as https_port,
    ):
        ports = {"http": http_port, "https": https_port}
        yield Lab(Path(folder), rounds, scale, rival, ports, trusted(cache / "tls", cert[0]), slow_hosts)


def check(lab: Lab) -> None:
    """The meter counts daemons, and both sides store the same pictures."""
    off = known_load(5.0)
    print(f"meter: a daemon's known load is measured as {off:.2f} of itself", flush=True)
    if not 0.9 < off < 1.1:
        raise SystemExit("the meter does not count right here")
    jobs = [lab.job(name, "http", LARGE, 20) for name in ("ours", "theirs")]
    for tool, job in zip((OURS, lab.rival), jobs, strict=True):
        lab.run(tool, job, keep=True)
    print("both store the same pictures: " + same_images(jobs[0].out, jobs[1].out), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.download", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the images, one round")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "clipmill-benchmarks"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running is ended, too
    rounds, scale = (1, 0.05) if given.quick else (given.rounds, 1.0)
    report = Report(given.results, "download-quick" if given.quick else "download", "Downloading, compared")
    with laboratory(given.cache, rounds, scale) as lab:
        check(lab)
        setting = machine(PACKAGES) | {"img2dataset": IMG2DATASET.partition("==")[2], "rounds": str(rounds)}
        run_parts(report, PARTS, given.parts, lab, setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
