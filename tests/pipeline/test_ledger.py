"""Every run has its row, and none that did nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pyarrow.compute as pc
import pytest

from pipeline.ledger import Run
from pipeline.workspace import Workspace
from schemas.configs import DownloadConfig
from schemas.errors import ClipmillError, CountsError
from tests.pipeline.test_tables import content, pairs


def ledger(workspace: Workspace) -> dict[str, dict[str, object]]:
    rows = workspace.table("runs").read().to_pylist()
    assert len({r["run"] for r in rows}) == len(rows)
    return {row["run"]: row for row in rows}


def new_run(workspace: Workspace, job: str = "download") -> Run:
    return Run(workspace, job, DownloadConfig(workspace=str(workspace.root), retries=7))


def test_a_good_run(workspace: Workspace) -> None:
    with new_run(workspace) as run:
        with run.stage("read"):
            assert run.reads("pairs") == -1
        run.append("pairs", pairs([1, 2]))
        run.counts = {"in": 3, "out": 2, "failed": 1}
        with run.stage("fetch"), run.stage("inner"):
            pass
        with run.stage("fetch"):
            pass
    row = ledger(workspace)[run.id]
    assert (row["job"], row["outcome"], row["error"]) == ("download", "done", None)
    assert (row["counts_in"], row["counts_out"], row["counts_failed"]) == (3, 2, 1)
    assert json.loads(str(row["config"]))["retries"] == 7
    assert json.loads(str(row["seconds"])).keys() == {"read", "fetch", "inner", "total"}
    assert json.loads(str(row["input_versions"])) == {"pairs": -1}
    assert row["started"] <= row["ended"]  # type: ignore[operator]
    assert (row["host"], row["pid"]) == (socket.gethostname(), os.getpid())
    assert str(row["code_version"])


def test_the_row_is_there_before_the_first_data(workspace: Workspace) -> None:
    with new_run(workspace) as run:
        assert ledger(workspace) == {}
        part = workspace.table("pairs").write_part(pairs([1]))
        seen = []
        commit = Run.begin

        def begin() -> None:
            commit(run)
            seen.append((ledger(workspace)[run.id]["outcome"], workspace.table("pairs").count()))

        run.begin = begin  # type: ignore[method-assign]
        run.commit("pairs", [part])
        run.counts |= {"in": 1, "out": 1}
    assert seen == [("running", 0)]
    assert ledger(workspace)[run.id]["outcome"] == "done"


def test_a_run_that_commits_nothing_leaves_no_trace(workspace: Workspace) -> None:
    with new_run(workspace) as run:
        run.append("pairs", pairs([]))
        run.upsert("pairs", pairs([]))
        run.commit("pairs", [])
    assert not (workspace.root / "tables").exists()
    with pytest.raises(ZeroDivisionError), new_run(workspace):
        _ = 1 / 0
    assert not (workspace.root / "tables").exists()
    assert run.summary()["outcome"] in ("done", "nothing to do")


@pytest.mark.parametrize("counts", [(3, 1, 1), (1, 1, 1), (0, 0, 1)])
def test_counts_that_do_not_add_up(counts: tuple[int, int, int], workspace: Workspace) -> None:
    run = new_run(workspace)
    with pytest.raises(CountsError) as caught, run:
        run.append("pairs", pairs([1]))
        run.counts = dict(zip(("in", "out", "failed"), counts, strict=True))
    assert f"in = {counts[0]}" in caught.value.expected and caught.value.remedy
    row = ledger(workspace)[run.id]
    assert row["outcome"] == run.outcome == "failed"
    assert "lost or doubled" in str(row["error"])


def test_the_error_of_a_failed_run_is_kept(workspace: Workspace) -> None:
    run = new_run(workspace)
    with pytest.raises(ClipmillError, match="on purpose"), run:
        run.append("pairs", pairs([1]))
        run.counts["in"] = 99  # a failed run's counts need not add up
        raise ClipmillError("on purpose", remedy="none")
    assert (ledger(workspace)[run.id]["outcome"], run.outcome) == ("failed", "failed")
    assert "on purpose" in str(ledger(workspace)[run.id]["error"])
    other = new_run(workspace)
    with pytest.raises(ValueError, match="odd"), other:
        other.append("pairs", pairs([2]))
        raise ValueError("odd")
    assert ledger(workspace)[other.id]["error"] == "ValueError: odd"


def test_control_c(workspace: Workspace) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the suite runs in a script's background
    run = new_run(workspace)
    with pytest.raises(KeyboardInterrupt), run:
        run.append("pairs", pairs([1]))
        signal.raise_signal(signal.SIGINT)
    assert (ledger(workspace)[run.id]["outcome"], run.outcome) == ("interrupted", "interrupted")
    assert content(workspace.table("pairs")) == {1: "a"}


_DIES = """
import os, signal, sys
from pipeline.workspace import Workspace
from tests.pipeline.test_ledger import new_run
from tests.pipeline.test_tables import pairs
run = new_run(Workspace(sys.argv[1]), "dies").__enter__()
run.append("pairs", pairs([1]))
print(run.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_marked_by_the_next_that_writes(workspace: Workspace) -> None:
    died = subprocess.run(
        [sys.executable, "-c", _DIES, str(workspace.root)], stdout=subprocess.PIPE, text=True, check=False
    )
    killed = died.stdout.strip()
    assert died.returncode == -signal.SIGKILL
    assert ledger(workspace)[killed]["outcome"] == "running"
    with new_run(workspace):  # commits nothing, so it writes nothing
        pass
    assert ledger(workspace)[killed]["outcome"] == "running"
    with new_run(workspace) as alive, new_run(workspace) as run:
        alive.append("pairs", pairs([2]))
        run.append("pairs", pairs([3]))
        run.counts |= {"in": 1, "out": 1}
        assert ledger(workspace)[alive.id]["outcome"] == "running", "its process is alive"
        alive.counts |= {"in": 1, "out": 1}
    found = {run_id: row["outcome"] for run_id, row in ledger(workspace).items()}
    assert found == {killed: "killed", alive.id: "done", run.id: "done"}


def test_every_data_row_names_a_run_that_is_there(workspace: Workspace) -> None:
    for key in range(3):
        with new_run(workspace) as run:
            run.append("pairs", pairs([key]).set_column(6, "added_run", [[run.id]]))
            run.counts |= {"in": 1, "out": 1}
    named = set(workspace.table("pairs").read(["added_run"])["added_run"].to_pylist())
    assert named == ledger(workspace).keys()
    commits = [c["run"] for c in workspace.table("pairs").open().history() if "run" in c]  # type: ignore[union-attr]
    assert set(commits) == named


def test_runs_can_be_read_by_their_outcome(workspace: Workspace) -> None:
    """delta-rs writes rewritten rows as string views, which a filter on strings must still find."""
    for _ in range(3):
        with new_run(workspace) as run:
            run.begin()
    for where, n in [
        (pc.field("outcome") == "done", 3),
        (pc.field("outcome") == "failed", 0),
        (pc.field("run") == run.id, 1),
    ]:
        assert workspace.table("runs").read(["run"], where).num_rows == n
