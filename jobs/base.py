"""What every job's command line shares: config, Ctrl-C, exit status, the last line of ``--json``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar

from pydantic import BaseModel

from pipeline.encoders import only_one
from pipeline.engine import Engine
from pipeline.ledger import Run
from pipeline.workspace import Workspace
from schemas import configs
from schemas.configs import JobConfig
from schemas.errors import ClipmillError
from schemas.settings import check_environment, load, variables

C = TypeVar("C", bound=JobConfig)
Body = Callable[[C, Run, Engine], None]

EXIT_INTERRUPTED = 130


def execute(job: str, config: C, body: Body[C], engine: Engine) -> Run:
    """Run a job's body in a workspace, inside its ledger. For other jobs and for Python users."""
    with Run(Workspace(config.workspace), job, config) as run:
        body(config, run, engine)
    return run


def command(job: str, config_class: type[C], body: Body[C], argv: Sequence[str] | None = None) -> int:
    """A job as a command. Returns the exit status: 0 done, 1 failed, 2 usage, 3 refused, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    run: Run | None = None
    status, error = 0, ""
    with _terminate_like_interrupt():
        try:
            check_environment(os.environ, known_variables())
            config, as_json = load(config_class, arguments, os.environ, f"clipmill {job}")
            run = Run(Workspace(config.workspace), job, config)
            with Engine(config.address) as engine, run:
                body(config, run, engine)
        except ClipmillError as exc:
            status, error = exc.exit_status, str(exc)
            print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        except KeyboardInterrupt:
            status, error = EXIT_INTERRUPTED, "interrupted"
            print("interrupted: what is done is kept, run the same command to go on", file=sys.stderr)
        except BrokenPipeError:
            return 1
        except Exception:  # a bug: its traceback, and still the line that a scheduler waits for
            status = 1
            traceback.print_exc()
        if run is None and as_json:
            print(json.dumps(_failed(job, error), default=str))
        elif run is not None:
            _report(run, as_json)
    return status


def known_variables() -> set[str]:
    """The environment variables of all jobs: one environment may serve several."""
    classes = [c for c in vars(configs).values() if isinstance(c, type) and c.__module__ == configs.__name__]
    return set().union(*(variables(c) for c in classes if issubclass(c, BaseModel)))


def _report(run: Run, as_json: bool) -> None:
    summary = run.summary()
    if as_json:
        print(json.dumps(summary, default=str, ensure_ascii=False), flush=True)
        return
    counts = "  ".join(f"{k} {v:,}" for k, v in run.counts.items())
    print(f"{run.job}: {run.outcome}  {counts}  {run.seconds.get('total', 0):.1f} s", file=sys.stderr)
    for name, path in run.outputs.items():
        print(f"  {name}: {path}", file=sys.stderr)


def _failed(job: str, error: str) -> dict[str, Any]:
    return {
        "job": job, "run": None, "outcome": "failed", "counts": {"in": 0, "out": 0, "failed": 0},
        "seconds": {}, "outputs": {}, "error": error,
    }  # fmt: skip


@contextlib.contextmanager
def _terminate_like_interrupt() -> Any:
    """SIGTERM (a scheduler's stop) ends a run as cleanly as Ctrl-C."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def only_encoder(run: Run, name: str | None, known: Sequence[str], what: str) -> str:
    """The encoder id that ``name`` means among ``known``, or the only one.

    Raises:
        UsageError: none fits, or several do.
    """
    remedy = f"embed with it first: clipmill embed --encoder MODEL --workspace {run.workspace.root}"
    return only_one(name, known, what, remedy)
