"""``python -m benchmarks [NAME ...] [--list] [-- OPTIONS]``: list the benchmarks, or run them.

A benchmark is a module of this package with ``main(argv) -> int``. Each runs in a process of its own, so that
one cannot warm or crowd another. Options after ``--`` go to the benchmarks named.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NOT_BENCHMARKS = {"__init__", "__main__", "demo_quality"}  # the last is an experiment script with a CLI of its own


def found() -> dict[str, str]:
    """name -> first line of its docstring. Nothing is imported."""
    names: dict[str, str] = {}
    for file in sorted(HERE.glob("*.py")):
        if file.stem not in NOT_BENCHMARKS:
            doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            names[file.stem] = doc.partition("\n")[0]
    return names


def run(name: str, options: list[str]) -> int:
    """Run one benchmark from the repository's root; its exit status."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    return subprocess.run(command, cwd=HERE.parent, check=False).returncode


def main() -> int:
    own, _, options = _split(sys.argv[1:])
    known = found()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="List and run the benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run; by default all")
    parser.add_argument("--list", action="store_true", help="only list them")
    given = parser.parse_args(own)
    if unknown := [n for n in given.names if n not in known]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known)}")
    if options and not given.names:
        parser.error("options after -- need the name of their benchmark")
    for name, text in known.items():
        print(f"  {name:<12} {text}", flush=True)
    if given.list:
        return 0
    worst = 0
    for name in given.names or known:
        print(f"\n== {name}", flush=True)
        worst = max(worst, run(name, options))
    return worst


def _split(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    """Arguments before and after ``--``."""
    if "--" not in arguments:
        return arguments, "", []
    at = arguments.index("--")
    return arguments[:at], "--", arguments[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
