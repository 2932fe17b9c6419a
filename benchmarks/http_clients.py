"""HTTP clients: requests per CPU second of pycurl, aiohttp, httpx, rnet and primp; and HTTP/2 against HTTP/1.1.

    python -m benchmarks http_clients                       # two minutes on two quiet cores
    python -m benchmarks http_clients -- --count 1000 --rounds 1

Bodies of 25 KB over loopback, connections kept alive, 32 requests in flight, warmed up. The clients are installed
into a venv of their own (``--cache``), each runs in a process of its own, and only its CPU seconds count. rnet and
primp do not verify the certificate here, the others do. Medians of ``--rounds``, clients taken in turn.

HTTP/2 is compared from one host, 64 in flight, the handshakes included, at HTTP/1.1's usual limit of 8 connections,
from a server that answers at once and from one that answers after 50 ms (hypercorn, in a process of its own).
Decision 8 was made on these figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.lab.report import Line, Report, machine, table
from benchmarks.lab.server import Site, certificate, serving, trusted
from benchmarks.lab.tools import make_venv

HERE = Path(__file__).parent
BODY = 25_000
REQUIREMENTS = ("pycurl", "aiohttp", "uvloop", "httpx", "rnet", "primp", "hypercorn[h2]")
CLIENTS = ("pycurl", "aiohttp", "aiohttp, uvloop", "httpx", "rnet", "primp")
VERSIONS = ("HTTP/2", "HTTP/1.1, 8 connections")
DELAYS = (0.0, 0.05)

Figures = dict[str, float]


def fetch(python: Path, client: str, url: str, count: int, flying: int, ca: Path) -> Figures | None:
    """One run of one client; None if it crashed.

    Raises:
        AssertionError: not every body came whole.
    """
    done = subprocess.run(
        [str(python), str(HERE / "lab" / "clients.py"), client, url, str(count), str(flying), str(ca)],
        check=False, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        print(f"{client}, {url}: ended with status {done.returncode}", file=sys.stderr, flush=True)
        return None
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["requests"] == count, f"{client}: {figures['requests']} of {count}"
    assert figures["bytes"] == count * BODY, f"{client}: {figures['bytes']} bytes"
    return figures


def compare_clients(python: Path, ports: dict[str, int], ca: Path, count: int, rounds: int) -> dict[str, list[Figures]]:
    """'client, scheme' -> figures of every round."""
    runs: dict[str, list[Figures]] = {f"{c}, {s}": [] for c in CLIENTS for s in ports}
    for _ in range(rounds):
        for client in CLIENTS:
            for scheme, port in ports.items():
                n = max(64, count // 10) if client == "httpx" else count  # ten times as slow
                url = f"{scheme}://127.0.0.1:{port}/body"
                if figures := fetch(python, client, url, n, 32, ca):
                    runs[f"{client}, {scheme}"].append(figures)
    return runs


def compare_versions(
    python: Path, cert: tuple[Path, Path], ca: Path, count: int, rounds: int
) -> dict[str, list[Figures]]:
    """'version, delay' -> figures of every round."""
    runs: dict[str, list[Figures]] = {}
    for delay in DELAYS:
        with serving_both(python, delay, cert) as port:
            for _ in range(rounds):
                for version in VERSIONS:
                    here = runs.setdefault(f"{version}, {delay * 1000:.0f} ms", [])
                    if figures := fetch(python, version, f"https://127.0.0.1:{port}", count, 64, ca):
                        here.append(figures)
    return runs


@contextlib.contextmanager
def serving_both(python: Path, delay: float, cert: tuple[Path, Path]) -> Iterator[int]:
    """The port of a server of HTTP/1.1 and HTTP/2."""
    command = [str(python), str(HERE / "lab" / "h2server.py"), str(BODY), str(delay), *map(str, cert)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.wait()


def per_cpu(runs: list[Figures]) -> float:
    return statistics.median(r["requests"] / r["cpu"] for r in runs)


def per_second(runs: list[Figures]) -> float:
    return statistics.median(r["requests"] / r["wall"] for r in runs)


def client_lines(runs: dict[str, list[Figures]], rounds: int) -> list[Line]:
    lines = []
    for scheme in ("http", "https"):
        ours = per_cpu(runs[f"pycurl, {scheme}"])
        for client in CLIENTS[1:]:
            theirs = runs[f"{client}, {scheme}"]
            what = f"requests per CPU s, {scheme}: pycurl against {client}"
            if crashed := rounds - len(theirs):
                what += f" (crashed in {crashed} of {rounds} runs)"
            if not theirs:
                lines.append(Line(what, f"{ours:,.0f}", "none"))
                continue
            other = per_cpu(theirs)
            lines.append(Line(what, f"{ours:,.0f}", f"{other:,.0f}", ours / other))
    return lines


def version_lines(runs: dict[str, list[Figures]]) -> list[Line]:
    lines = []
    for delay in DELAYS:
        two, one = (runs[f"{version}, {delay * 1000:.0f} ms"] for version in VERSIONS)
        where = f"HTTP/2 against HTTP/1.1 on 8 connections, answers after {delay * 1000:.0f} ms"
        for name, rate in (("per CPU s", per_cpu), ("per second", per_second)):
            a, b = rate(two), rate(one)
            lines.append(Line(f"{where}: requests {name}", f"{a:,.0f}", f"{b:,.0f}", a / b))
        a, b = (statistics.median(r["connections"] for r in side) for side in (two, one))
        lines.append(Line(f"{where}: connections", f"{a:.0f}", f"{b:.0f}"))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http_clients", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--count", type=int, default=10_000, help="requests of one run; a tenth of it for httpx")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "clipmill-benchmarks"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args(argv)
    venv = make_venv(given.cache / "http_clients", REQUIREMENTS)
    python = venv / "bin" / "python"
    cert = certificate(given.cache / "tls-clients", ["127.0.0.1"])
    ca = trusted(given.cache / "tls-clients", cert[0])
    body = given.cache / "body"
    body.mkdir(exist_ok=True)
    (body / "0.jpg").write_bytes(os.urandom(BODY - Site.MARK))
    report = Report(given.results, "http_clients", "HTTP clients, compared")
    setting = machine(()) | versions(python) | {"rounds": str(given.rounds), "body": f"{BODY} bytes"}
    with serving(Site({"body": body})) as http, serving(Site({"body": body}, tls=cert)) as https:
        clients = compare_clients(python, {"http": http, "https": https}, ca, given.count, given.rounds)
    report.add("clients", setting, lines := client_lines(clients, given.rounds), clients)
    print("\n".join(table(lines)), flush=True)
    both = compare_versions(python, cert, ca, max(64, given.count // 5), given.rounds)
    report.add("versions", setting, lines := version_lines(both), both)
    print("\n".join(table(lines)))
    print(f"\nwritten: {report.markdown}, {report.json}")
    return 0


def versions(python: Path) -> dict[str, str]:
    """What the venv holds: package -> version."""
    names = [r.partition("[")[0] for r in REQUIREMENTS]
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([str(python), "-c", code, *names], check=True, capture_output=True, text=True)
    return dict(zip(names, done.stdout.split(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
