"""What is left to embed, against a plain dictionary; in shards; and which files are not even opened for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.embed.planning import Planner, Shard
from pipeline.workspace import Workspace
from schemas.errors import NothingToDo, WorkspaceError
from schemas.tables import EMBEDDINGS, IMAGES


def images(shas: dict[int, str | None], status: str = "ok") -> pa.Table:
    """Rows of images whose bytes name key and sha256."""
    rows = [
        dict.fromkeys(IMAGES.schema.names)
        | {"pair_key": key, "status": status, "sha256": sha, "image": f"{key} {sha}".encode()}
        for key, sha in shas.items()
    ]
    return pa.Table.from_pylist(rows, schema=IMAGES.schema)


def vectors(shas: dict[int, str | None], encoder: str = "A") -> pa.Table:
    rows: list[dict[str, Any]] = [
        {"pair_key": key, "encoder": encoder, "image_vec": b"12", "text_vec": b"34", "sha256": sha, "run": "r"}
        for key, sha in shas.items()
    ]
    return pa.Table.from_pylist(
        [dict.fromkeys(EMBEDDINGS.schema.names) | row for row in rows], schema=EMBEDDINGS.schema
    )


def plan(workspace: Workspace, encoder: str = "A", size: int = 100) -> tuple[list[Shard], dict[str, int]]:
    """The shards, and what to record once they are embedded."""
    table = workspace.table("images")
    with Planner(encoder) as planner:
        work = planner.work(table, workspace.table("embeddings"), table.version())
        shards = list(planner.shards(size))
    assert sum(s.rows for s in shards if not s.changed) == work.new
    assert sum(s.rows for s in shards if s.changed) == work.changed
    return shards, work.record


def keys(shards: Iterable[Shard]) -> list[int]:
    return sorted(key for shard in shards for own in shard.keys.values() for key in own.to_pylist())


def planned(workspace: Workspace, encoder: str = "A") -> tuple[list[int], list[int]]:
    """New keys and changed ones."""
    shards, _ = plan(workspace, encoder)
    return keys(s for s in shards if not s.changed), keys(s for s in shards if s.changed)


def embed(workspace: Workspace, encoder: str = "A") -> None:
    """As a finished run leaves the table: the rows, with what they were made of, and the record."""
    shards, record = plan(workspace, encoder)
    table = workspace.table("images")
    for shard in shards:
        rows = table.take(shard.keys, ["pair_key", "sha256", "image"])
        assert [r["image"] for r in rows.to_pylist()] == [
            f"{r['pair_key']} {r['sha256']}".encode() for r in rows.to_pylist()
        ]
        shas = dict(zip(rows["pair_key"].to_pylist(), rows["sha256"].to_pylist(), strict=True))
        workspace.table("embeddings").upsert(vectors(shas, encoder), "run")
    workspace.table("embeddings").record(record, "run")


def test_new_changed_and_neither(workspace: Workspace) -> None:
    workspace.table("images").append(images(dict.fromkeys(range(8), "a")), "run")
    workspace.table("images").append(images({20: "a"}, "dns"), "run")
    table = workspace.table("embeddings")
    # Keys 3 and 4: from before there was a sha256, and of another image; 5: another encoder's; 6, 9: of no image now.
    table.append(vectors({0: "a", 1: "a", 3: None, 4: "b", 9: "a"}), "run")
    table.append(vectors({5: "a", 0: "z"}, "B"), "run")
    assert planned(workspace) == ([2, 5, 6, 7], [4])
    assert planned(workspace, "B") == ([1, 2, 3, 4, 6, 7], [0])
    assert planned(workspace, "a") == (list(range(8)), []), "another encoder, though it is only written small"


def test_an_image_without_a_digest_never_changes(workspace: Workspace) -> None:
    workspace.table("images").append(images({1: None, 2: None}), "run")
    workspace.table("embeddings").append(vectors({1: "a"}), "run")
    assert planned(workspace) == ([2], [])


def test_no_images(workspace: Workspace) -> None:
    workspace.table("images").append(images({1: "a"}, "dns"), "run")
    with pytest.raises(NothingToDo):
        plan(workspace)


def test_files_and_shards_of_any_size(workspace: Workspace) -> None:
    """Small files fill a shard together, large ones are cut; each key is taken from the file that it is in."""
    table, key, where = workspace.table("images"), 0, {}
    for size in (1, 2, 1, 17, 1, 3, 30, 1):
        before = table.paths()
        table.append(images(dict.fromkeys(range(key, key + size), "a")), "run")
        (path,) = table.paths() - before
        where |= dict.fromkeys(range(key, key + size), path)
        key += size
    shards, _ = plan(workspace, size=10)
    assert [s.rows for s in shards] == [10] * 5 + [6]
    assert [s.number for s in shards] == list(range(6))
    assert keys(shards) == list(range(56))
    assert {k: path for s in shards for path, own in s.keys.items() for k in own.to_pylist()} == where
    assert max(len(s.keys) for s in shards) > 1, "a shard over several files"
    for shard in shards:
        rows = table.take(shard.keys, ["pair_key", "image"]).to_pylist()
        assert {r["pair_key"]: r["image"] for r in rows} == {k: f"{k} a".encode() for k in keys([shard])}


def test_only_files_that_came_since_are_opened(workspace: Workspace) -> None:
    table = workspace.table("images")
    table.append(images({1: "a", 2: "a"}), "run")
    embed(workspace)
    for file in Path(table.uri).glob("*.parquet"):
        file.rename(file.with_suffix(".away"))
    assert planned(workspace) == ([], []), "nothing came: nothing is opened"
    table.append(images({3: "a"}), "run")
    assert planned(workspace) == ([3], [])
    with pytest.raises(WorkspaceError, match="cannot be read"):
        plan(workspace, "B")


def test_rows_taken_out_of_embeddings_are_missed(workspace: Workspace) -> None:
    """By hand, as somebody does whose audit failed; and when the table is compacted, nothing is to be done."""
    workspace.table("images").append(images({1: "a", 2: "a"}), "run")
    embed(workspace)
    workspace.table("images").append(images({3: "a"}), "run")
    embed(workspace)
    assert planned(workspace) == ([], [])
    workspace.table("embeddings").open().optimize.compact()  # type: ignore[union-attr]
    assert planned(workspace) == ([], [])
    workspace.table("embeddings").open().delete("pair_key = 2")  # type: ignore[union-attr]
    assert planned(workspace) == ([2], [])


def test_files_that_are_gone(workspace: Workspace) -> None:
    """Rows that were changed after the plan are still read; what was vacuumed is an error with a remedy."""
    table = workspace.table("images")
    table.append(images({1: "a", 2: "a"}), "run")
    shards, _ = plan(workspace)
    table.upsert(images({2: "b"}), "run")
    table.open().optimize.compact()  # type: ignore[union-attr]
    assert sorted(table.take(shards[0].keys, ["image"])["image"].to_pylist()) == [b"1 a", b"2 a"]
    Path(table.uri, next(iter(shards[0].keys))).unlink()
    with pytest.raises(WorkspaceError, match="has changed") as caught:
        table.take(shards[0].keys, ["image"])
    assert "vacuum" in caught.value.remedy


KEYS = st.dictionaries(st.integers(0, 9), st.sampled_from("abc"), max_size=5)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["ok", "dns"]), KEYS),
        st.tuples(st.just("embed"), st.just({})),
        st.tuples(st.just("compact"), st.just({})),
        st.tuples(st.just("delete"), KEYS),
    ),
    min_size=2,
    max_size=7,
)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_whatever_happens_in_between(steps: list[tuple[str, dict[int, str]]]) -> None:
    """Images come, change, fail; rows of embeddings are made and deleted: what is planned is the difference."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(folder)
        have: dict[int, str] = {99: "z"}
        done: dict[int, str] = {}
        workspace.table("images").append(images(dict(have)), "run")
        for step, shas in steps:
            if step in ("ok", "dns") and shas:
                workspace.table("images").upsert(images(dict(shas), step), "run")
                have = {k: v for k, v in have.items() if k not in shas} | (shas if step == "ok" else {})
            elif step == "embed":
                embed(workspace)
                done |= have
            elif step == "compact":
                workspace.table("images").open().optimize.compact()  # type: ignore[union-attr]
            elif step == "delete" and done:
                named = ", ".join(map(str, [-1, *shas]))
                workspace.table("embeddings").open().delete(f"pair_key IN ({named})")  # type: ignore[union-attr]
                done = {k: v for k, v in done.items() if k not in shas}
            new = sorted(have.keys() - done.keys())
            changed = sorted(k for k in have.keys() & done.keys() if have[k] != done[k])
            assert planned(workspace) == (new, changed)


# -- scores --------------------------------------------------------------------------------------------


def test_files_with_rows_that_lack_a_score(workspace: Workspace) -> None:
    plain = workspace.table("embeddings")
    score = pa.field("score_x", pa.float32())
    wide = plain.widened([score])
    assert _unscored(workspace, wide, []) == []
    plain.append(vectors({1: "a", 2: "a"}), "run")
    plain.append(vectors({3: "a"}, "B"), "run")
    assert _unscored(workspace, wide, []) == [1, 2], "of this encoder, in a table that has no such column"
    wide.append(vectors({4: "a", 5: "a"}).append_column(score, pa.array([1.0, None], pa.float32())), "run")
    wide.append(vectors({6: "a"}).append_column(score, pa.array([1.0], pa.float32())), "run")
    assert _unscored(workspace, wide, []) == [1, 2, 4, 5], "with their neighbours in the file"
    assert _unscored(workspace, wide, ["score_x"]) == [1, 2, 4, 5, 6]


def _unscored(workspace: Workspace, table: Any, again: list[str]) -> list[int]:
    with Planner("A") as planner:
        groups = list(planner.unscored(table, ["score_x"], again))
    return sorted(k for group in groups for k in table.take(dict.fromkeys(group), ["pair_key"])["pair_key"].to_pylist())
