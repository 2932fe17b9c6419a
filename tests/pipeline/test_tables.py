"""The one way of committing, against a plain dictionary; racing and dying writers; full and closed disks."""

from __future__ import annotations

import multiprocessing as mp
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.tables import Table
from pipeline.workspace import Workspace
from schemas.errors import ClipmillError, SchemaError, WorkspaceError
from schemas.tables import EMBEDDINGS, IMAGES, PAIRS, TableSpec

SPAWN = mp.get_context("spawn")


def pairs(keys: list[int], mark: str = "a", size: int = 0) -> pa.Table:
    """Rows of pairs whose other columns derive from key and mark."""
    return pa.table(
        {
            "pair_key": pa.array(keys, pa.int64()),
            "url": [f"http://{mark}/{k}" + "x" * size for k in keys],
            "caption": [f"{mark} {k}" for k in keys],
            "source": [mark] * len(keys),
            "extra": [None] * len(keys),
            "problem": [None] * len(keys),
            "added_run": ["run"] * len(keys),
        },
        schema=PAIRS.schema,
    )


def content(table: Table) -> dict[int, str]:
    """key -> mark of what is in the table; fails on a key that is there twice."""
    rows = table.read(["pair_key", "source", "url"]).to_pylist()
    found = {row["pair_key"]: row["source"] for row in rows}
    assert len(found) == len(rows) == table.count(), "a key twice"
    assert all(row["url"].startswith(f"http://{row['source']}/{row['pair_key']}") for row in rows)
    return found


def fresh(folder: Path) -> Table:
    """A new handle, as another process would have."""
    return Workspace(folder).table("pairs")


def test_nothing_there_yet(workspace: Workspace) -> None:
    table = workspace.table("pairs")
    assert (table.version(), table.count(), table.files(), table.open()) == (-1, 0, [], None)
    assert table.read().schema == PAIRS.schema
    assert table.keys().num_rows == 0
    assert not (workspace.root / "tables").exists(), "reading creates nothing"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.lists(st.lists(st.integers(0, 12), unique=True, max_size=6), max_size=3)),
        st.tuples(st.just("upsert"), st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=6)),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS, st.lists(st.integers(0, 12), max_size=5))
def test_a_table_is_a_dictionary(steps: list[tuple[str, list]], wanted: list[int]) -> None:
    """commit keeps what is there, upsert replaces it; also for keys twice within one commit."""
    with tempfile.TemporaryDirectory() as folder:
        model: dict[int, str] = {}
        for i, (step, keys) in enumerate(steps):
            table, mark = fresh(Path(folder)), f"m{i}"
            if step == "commit":
                before = table.version()
                new = {k for part in keys for k in part} - model.keys()
                done = table.commit([table.write_part(pairs(part, mark)) for part in keys], "run")
                assert done.rows == len(new)
                if not new:
                    assert done.version == table.version() == max(before, 0), "nothing new commits nothing"
                model |= dict.fromkeys(new, mark)
            else:
                table.upsert(pairs(keys, mark), "run")
                model |= dict.fromkeys(keys, mark)
            assert content(fresh(Path(folder))) == model
        where = pc.field("pair_key").isin(pa.array(wanted, pa.int64()))
        found = fresh(Path(folder)).read(["pair_key"], where)["pair_key"].to_pylist()
        assert sorted(found) == sorted(model.keys() & set(wanted))
        low = fresh(Path(folder)).keys(pc.field("pair_key") > 6)["pair_key"].to_pylist()
        assert sorted(low) == sorted(k for k in model if k > 6)
        marked = fresh(Path(folder)).read(["pair_key"], pc.field("source") == "m0")["pair_key"].to_pylist()
        assert sorted(marked) == sorted(k for k, mark in model.items() if mark == "m0")


def test_a_part_is_seen_only_after_its_commit(workspace: Workspace) -> None:
    table = workspace.table("pairs")
    part = table.write_part(pairs([1, 2]))
    assert content(table) == {}
    assert table.commit([part], "run").rows == 2
    assert content(table) == {1: "a", 2: "a"}
    assert table.commit([part], "run").rows == 0, "the same part again"
    assert content(table) == {1: "a", 2: "a"}


def test_two_parts_of_one_commit_with_a_key_in_common(workspace: Workspace) -> None:
    table = workspace.table("pairs")
    done = table.commit([table.write_part(pairs([1, 2], "a")), table.write_part(pairs([2, 3], "b"))], "run")
    assert done.rows == 3
    assert content(table) == {1: "a", 2: "a", 3: "b"}


def test_a_key_of_several_columns(workspace: Workspace) -> None:
    table = workspace.table("embeddings")

    def rows(keys: list[int], encoder: str) -> pa.Table:
        n = len(keys)
        vectors = pa.array([bytes([k]) * 4 for k in keys], pa.binary())
        return pa.table(
            {
                "pair_key": keys, "encoder": [encoder] * n, "image_vec": vectors, "text_vec": vectors,
                "similarity": pa.array([0.5] * n, pa.float32()), "caption": ["c"] * n, "sha256": ["s"] * n,
                "run": ["r"] * n,
            },
            schema=EMBEDDINGS.schema,
        )  # fmt: skip

    assert table.append(rows([1, 2], "x"), "run").rows == 2
    assert table.append(rows([2, 3], "y"), "run").rows == 2
    assert table.append(rows([1, 3], "x"), "run").rows == 1
    found = sorted((r["pair_key"], r["encoder"], r["image_vec"]) for r in table.read().to_pylist())
    assert found == [(k, e, bytes([k]) * 4) for k, e in [(1, "x"), (2, "x"), (2, "y"), (3, "x"), (3, "y")]]


def test_old_versions_can_be_read(workspace: Workspace) -> None:
    table = workspace.table("pairs")
    first = table.append(pairs([1]), "run").version
    assert first == table.version()
    assert table.append(pairs([2]), "run").version == table.version() == first + 1
    table.upsert(pairs([1], "b"), "run")
    assert table.read(["pair_key"], version=first)["pair_key"].to_pylist() == [1]
    assert content(table) == {1: "b", 2: "a"}


def test_replace_changes_and_deletes_in_one_commit(workspace: Workspace) -> None:
    table = workspace.table("pairs")
    none = pairs([]).select(["pair_key"])
    assert (table.recorded("looked"), table.paths()) == (-1, set())
    first = table.replace(pairs([1, 2, 3]), none, "run", -1, {"looked": 7, "how": 0})
    assert first == table.version() and content(table) == dict.fromkeys([1, 2, 3], "a")
    gone = pa.table({"pair_key": pa.array([2, 9], pa.int64())})
    second = table.replace(pairs([3, 4], "b"), gone, "run", first, {"looked": 5})
    assert second == first + 1 == table.version(), "one commit"
    assert content(fresh(Path(str(workspace.root)))) == {1: "a", 3: "b", 4: "b"}
    assert (table.recorded("looked"), table.recorded("how"), table.recorded("other")) == (5, 0, -1)


def test_replace_without_rows_leaves_its_record(workspace: Workspace) -> None:
    table = workspace.table("pairs")
    none = pairs([]).select(["pair_key"])
    assert table.replace(pairs([]), none, "run", -1, {"looked": 3}) == table.version() == 1
    assert (table.recorded("looked"), content(table)) == (3, {})
    table.append(pairs([1]), "run")
    assert table.recorded("looked") == 3


def test_replace_changes_nothing_where_another_was_first(workspace: Workspace) -> None:
    table = workspace.table("pairs")
    base = table.append(pairs([1]), "run").version
    table.append(pairs([2]), "run")
    late = (pairs([2, 3], "late"), pairs([1]).select(["pair_key"]), "run")
    assert table.replace(*late, base, {"looked": 1}) is None
    # And where the other one comes between the look at the version and the commit.
    stale = table._open_or_create()
    table.append(pairs([4]), "run")
    overtaken = fresh(Path(str(workspace.root)))
    overtaken._open_or_create = lambda: stale  # type: ignore[method-assign]
    assert overtaken.replace(*late, stale.version(), {"looked": 1}) is None
    assert (content(table), table.recorded("looked")) == ({1: "a", 2: "a", 4: "a"}, -1)


def test_rows_as_a_stream_of_some_files(workspace: Workspace) -> None:
    table = workspace.table("pairs")
    assert table.batches(["pair_key"]).read_all().num_rows == 0
    first = table.append(pairs([1, 2]), "run").version
    before = table.paths()
    table.append(pairs([3]), "run")
    new = table.paths() - before
    assert table.paths(first) == before and len(new) == 1
    found = {
        name: sorted(table.batches(["source", "pair_key"], version, paths).read_all()["pair_key"].to_pylist())
        for name, version, paths in (
            ("all", None, None),
            ("old", first, None),
            ("new", None, new),
            ("none", None, set()),
        )
    }
    assert found == {"all": [1, 2, 3], "old": [1, 2], "new": [3], "none": []}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.drop_columns("url"),
        lambda t: t.append_column("more", pa.array([1, 2])),
        lambda t: t.set_column(0, "pair_key", pa.array(["a", "b"])),
    ],
    ids=["missing", "unknown", "another type"],
)
def test_rows_that_do_not_fit_the_door(change, workspace: Workspace) -> None:
    table = workspace.table("pairs")
    with pytest.raises(SchemaError, match="pairs"):
        table.write_part(change(pairs([1, 2])))
    with pytest.raises(SchemaError, match="pairs"):
        table.upsert(change(pairs([1, 2])), "run")
    assert table.version() == -1


def test_a_part_with_a_key_twice_is_refused(workspace: Workspace) -> None:
    with pytest.raises(SchemaError, match="key twice"):
        workspace.table("pairs").write_part(pairs([1, 2, 1]))


def test_a_table_of_an_older_version_of_the_code(workspace: Workspace) -> None:
    """What it lacks is added at the first write, and null in the rows that were there."""
    table = workspace.table("pairs")
    old = TableSpec("pairs", PAIRS.schema.remove(PAIRS.schema.get_field_index("extra")), ("pair_key",))
    Table(table.uri, old).append(pairs([1]).drop_columns("extra"), "run")
    assert table.read(["pair_key", "extra"]).to_pylist() == [{"pair_key": 1, "extra": None}]
    new = pairs([2]).set_column(4, "extra", pa.array(['{"a": 1}']))
    table.append(new, "run")
    table.upsert(pairs([1]), "run")
    found = {row["pair_key"]: row["extra"] for row in table.read().to_pylist()}
    assert found == {1: None, 2: '{"a": 1}'}


def test_an_upsert_with_a_condition(workspace: Workspace) -> None:
    """Rows that do not meet it stay as they are, but for the columns to touch; new ones are added."""
    table = workspace.table("pairs")
    table.append(pairs([1, 2, 3], "old"), "run")
    replace = "source.pair_key <> 2"
    table.upsert(pairs([2, 3, 4], "new"), "run", replace, touch=["caption"])
    rows = {row["pair_key"]: (row["source"], row["caption"]) for row in table.read().to_pylist()}
    assert rows == {1: ("old", "old 1"), 2: ("old", "new 2"), 3: ("new", "new 3"), 4: ("new", "new 4")}


def test_images_of_any_bytes(workspace: Workspace) -> None:
    """Bytes come back as they went in, through a commit and through an upsert."""
    table = workspace.table("images")
    blobs = [b"", b"\0\xff" * 1000, os.urandom(100_000), None]

    def rows(first: int) -> pa.Table:
        made = [dict.fromkeys(IMAGES.schema.names) | {"pair_key": first + i, "image": b} for i, b in enumerate(blobs)]
        return pa.Table.from_pylist(made, schema=IMAGES.schema)

    table.append(rows(0), "run")
    table.upsert(rows(2), "run")
    found = {r["pair_key"]: r["image"] for r in table.read(["pair_key", "image"]).to_pylist()}
    assert found == {0: blobs[0], 1: blobs[1]} | {2 + i: b for i, b in enumerate(blobs)}


# -- many writers ------------------------------------------------------------------------------------


def _race(root: str, mark: str, start: float, parts: list[list[int]]) -> None:
    table = Workspace(root).table("pairs")
    written = [table.write_part(pairs(keys, mark)) for keys in parts]
    time.sleep(max(0.0, start - time.time()))
    for part in written:
        table.commit([part], mark)


def _race_upsert(root: str, mark: str, start: float, keys: list[int], times: int) -> None:
    table = Workspace(root).table("pairs")
    time.sleep(max(0.0, start - time.time()))
    for _ in range(times):
        table.upsert(pairs(keys, mark), mark)


@pytest.mark.slow
def test_racing_processes_commit_every_key_once(workspace: Workspace) -> None:
    """Four processes of which each brings keys that others bring too, and a fifth that replaces some of them."""
    writers, each = 4, 4
    start = time.time() + 8
    wanted: set[int] = set()
    jobs = []
    for w in range(writers):
        # Overlaps within one's own parts and with all the others'.
        parts = [list(range(100 * i + 10 * w, 100 * i + 10 * w + 30)) for i in range(each)]
        wanted |= {k for keys in parts for k in keys}
        jobs.append(SPAWN.Process(target=_race, args=(str(workspace.root), f"w{w}", start, parts)))
    jobs.append(SPAWN.Process(target=_race_upsert, args=(str(workspace.root), "u", start, [0, 15, 130, 999], 2)))
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0] * len(jobs)
    found = content(workspace.table("pairs"))
    assert found.keys() == wanted | {0, 15, 130, 999}
    assert {k for k, mark in found.items() if mark == "u"} == {0, 15, 130, 999}


def test_a_version_already_used_does_not_win_twice(workspace: Workspace) -> None:
    """A fresh handle would accept an (app_id, version) again: the loser must look, and drop what is there."""
    first, second = fresh(Path(str(workspace.root))), fresh(Path(str(workspace.root)))
    a, b = first.write_part(pairs([1, 2], "a")), second.write_part(pairs([2, 3], "b"))
    stale = second._open_or_create()
    first.commit([a], "run")
    # The second writer holds the table as it was: its first try must fail, not double key 2.
    second._open_or_create = lambda opened=[stale]: opened.pop() if opened else Table._open_or_create(second)  # type: ignore[method-assign,misc,assignment]
    assert second.commit([b], "run").rows == 1
    assert content(workspace.table("pairs")) == {1: "a", 2: "a", 3: "b"}
    versions = [h.get("txn") or h for h in workspace.table("pairs").open().history()]  # type: ignore[union-attr]
    assert len(versions) == 3, "created, first, second"


_DIES = """
import os, signal, sys
from pipeline.tables import Table
from pipeline.workspace import Workspace
from tests.pipeline.test_tables import pairs
table = Workspace(sys.argv[1]).table("pairs")
table.append(pairs([1, 2], "before"), "run")
part = table.write_part(pairs([2, 3, 4], "lost"))
if sys.argv[2] == "between":
    os.kill(os.getpid(), signal.SIGKILL)
table.commit([part], "run")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("when", "expected"), [("between", {1, 2}), ("after", {1, 2, 3, 4})])
def test_a_writer_killed(when: str, expected: set[int], workspace: Workspace) -> None:
    died = subprocess.run([sys.executable, "-c", _DIES, str(workspace.root), when], check=False, cwd=Path.cwd())
    assert died.returncode == -signal.SIGKILL
    table = workspace.table("pairs")
    assert content(table).keys() == expected
    parquet = list(Path(table.uri).glob("*.parquet"))
    assert len(parquet) > 1, "the data of the dead writer lies there, seen or not"
    table.append(pairs([1, 2, 3, 4], "again"), "run")
    assert content(table) == {1: "before", 2: "before"} | dict.fromkeys(
        [3, 4], "again" if when == "between" else "lost"
    )


# -- disks -------------------------------------------------------------------------------------------


@contextmanager
def tmpfs(options: str) -> Iterator[Path]:
    """A small file system of its own; the test is skipped where it cannot be mounted."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    folder = tempfile.mkdtemp(prefix="cmt-disk-")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False, capture_output=True)
    if made.returncode:
        Path(folder).rmdir()
        pytest.skip(f"cannot mount a small disk here: {made.stderr.decode().strip()}")
    try:
        yield Path(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        Path(folder).rmdir()


def fill(folder: Path) -> Path:
    """Leave no byte free."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 1024, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def check_full(table: Table, folder: Path) -> None:
    """A table with keys 1 and 2 on a disk which is then filled: all writes are refused, and it stays intact."""
    table.append(pairs([1, 2]), "run")
    part = table.write_part(pairs([3, 4]))
    ballast = fill(folder)
    files = {f.name for f in Path(table.uri).rglob("*")}
    for write in (
        lambda: table.write_part(pairs(list(range(5, 3000)), size=200)),
        lambda: table.commit([part], "run"),
        lambda: table.upsert(pairs([1, 9], "b"), "run"),
    ):
        with pytest.raises(WorkspaceError) as caught:
            write()
        assert caught.value.remedy and caught.value.retryable
        assert content(table) == {1: "a", 2: "a"}
    assert not {f.name for f in Path(table.uri).rglob("part-*")} - files, "no torn part is left behind"
    ballast.unlink()
    assert table.commit([part], "run").rows == 2
    table.upsert(pairs([1], "b"), "run")
    assert content(table) == {1: "b", 2: "a", 3: "a", 4: "a"}


def test_a_full_disk() -> None:
    with tmpfs("size=4m") as folder:
        check_full(Workspace(folder / "ws").prepare().table("pairs"), folder)


def test_a_workspace_on_a_full_disk() -> None:
    with tmpfs("size=64k") as folder:
        fill(folder)
        with pytest.raises(WorkspaceError, match="cannot write") as caught:
            Workspace(folder / "ws").prepare()
        assert "free some room" in caught.value.remedy


def test_a_read_only_disk() -> None:
    with tmpfs("size=4m") as folder:
        table = Workspace(folder / "ws").prepare().table("pairs")
        table.append(pairs([1]), "run")
        part = table.write_part(pairs([2]))
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        for write in (
            lambda: Workspace(folder / "ws").prepare(),
            lambda: table.write_part(pairs([3])),
            lambda: table.commit([part], "run"),
            lambda: Workspace(folder / "other").table("pairs").append(pairs([1]), "run"),
        ):
            with pytest.raises(WorkspaceError) as caught:
                write()
            assert caught.value.remedy
        assert content(table) == {1: "a"}


def test_a_limit_on_the_size_of_files(workspace: Workspace) -> None:
    """Where no disk can be mounted: a process that may write no file beyond 20 kB."""
    code = """
import resource, signal, sys
from pipeline.workspace import Workspace
from schemas.errors import WorkspaceError
from tests.pipeline.test_tables import content, pairs
table = Workspace(sys.argv[1]).table("pairs")
table.append(pairs([1]), "run")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    table.append(pairs(list(range(2, 30_000))), "run")
except WorkspaceError as exc:
    assert exc.remedy
    assert content(table) == {1: "a"}
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(workspace.root)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "refused\n", done.stderr
    assert len(list(Path(workspace.table("pairs").uri).glob("part-*"))) == 1


def test_a_workspace_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(WorkspaceError) as caught:
        Workspace(file / "ws").prepare()
    assert "--workspace" in caught.value.remedy
    with pytest.raises(ClipmillError, match="--workspace"):
        Workspace("nonsense://bucket/ws")


def test_a_damaged_log(workspace: Workspace) -> None:
    table = workspace.table("pairs")
    table.append(pairs([1]), "run")
    for file in Path(table.uri, "_delta_log").glob("*.json"):
        file.write_text("{ this is no log")
    with pytest.raises(ClipmillError, match="cannot read the table"):
        table.read()
