"""What is planned, against the same found in plain Python; and over files that delta-rs has rewritten."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.download.planning import KINDS, Planner
from pipeline.workspace import Workspace
from schemas.configs import DownloadConfig
from schemas.tables import IMAGES, PAIRS, SHARD


def pairs(keys: list[int], mark: str = "a") -> pa.Table:
    given = [
        dict.fromkeys(PAIRS.schema.names) | {"pair_key": k, "url": f"http://{mark}/{k}", "caption": ""} for k in keys
    ]
    return pa.Table.from_pylist(given, schema=PAIRS.schema)


def image(key: int, status: str = "ok", age: float = 0.0, **more: Any) -> dict[str, Any]:
    """A row of images, fetched ``age`` seconds ago."""
    row = dict.fromkeys(IMAGES.schema.names) | {
        "pair_key": key, "url": f"http://a/{key}", "caption": "", "status": status, "attempts": 1,
        "retryable": status in ("timeout", "http_429"),
        "fetched_at": dt.datetime.now(dt.UTC) - dt.timedelta(seconds=age),
    }  # fmt: skip
    return row | more


def planned(workspace: Workspace, **config: Any) -> dict[str, list[int]]:
    with Planner() as planner:
        work = planner.work(workspace.table("pairs"), workspace.table("images"), DownloadConfig(**config))
        found = {}
        for kind in KINDS:
            shards = list(planner.shards(kind, 3))
            assert all(s.schema == SHARD and 0 < s.num_rows <= 3 for s in shards)
            keys = [k for s in shards for k in s["pair_key"].to_pylist()]
            assert keys == sorted(keys) and len(keys) == work.counts.get(kind, 0)
            if keys:
                found[kind] = keys
        found |= {"waiting": [work.waiting]} if work.waiting else {}
        return found


def fill(workspace: Workspace, rows: list[dict[str, Any]], new: list[int]) -> None:
    workspace.table("pairs").append(pairs(sorted({r["pair_key"] for r in rows} | set(new))), "run")
    if rows:
        workspace.table("images").append(pa.Table.from_pylist(rows, schema=IMAGES.schema), "run")


@pytest.mark.parametrize("rewritten", [False, True])
def test_new_due_waiting_and_stale(workspace: Workspace, rewritten: bool) -> None:
    rows = [
        image(1, age=100_000), image(2, age=1), image(3, "http_4xx", 100_000), image(4, "timeout", 10),
        image(5, "timeout", 4000), image(6, "timeout", 4000, attempts=2), image(7, "timeout", 7500, attempts=2),
        image(8, "timeout", 100_000, attempts=5),
        image(9, "http_429", 4000, not_before=dt.datetime.now(dt.UTC) + dt.timedelta(seconds=600)),
    ]  # fmt: skip
    fill(workspace, rows, [11, 10])
    if rewritten:  # a merge leaves string views behind
        workspace.table("images").upsert(pa.Table.from_pylist(rows[:1], schema=IMAGES.schema), "run")
    assert planned(workspace) == {"new": [10, 11], "again": [5, 7], "waiting": [3]}
    assert planned(workspace, retry_delay=0.0, max_attempts=9)["again"] == [4, 5, 6, 7, 8]
    assert planned(workspace, refresh="1d")["refresh"] == [1]
    assert planned(workspace, refresh="always")["refresh"] == [1, 2]
    assert planned(workspace, retry=("http_4xx",))["again"] == [3, 5, 7]
    assert planned(workspace, retry=("timeout",))["again"] == [4, 5, 6, 7, 8]


def test_problems_travel_with_new_and_with_retried_pairs(workspace: Workspace) -> None:
    bad = pairs([1, 2]).set_column(5, "problem", pa.array(["bad_record: line 1", "bad_record: line 2"]))
    workspace.table("pairs").append(bad, "run")
    row = image(2, "bad_record")
    workspace.table("images").append(pa.Table.from_pylist([row], schema=IMAGES.schema), "run")
    with Planner() as planner:
        config = DownloadConfig(retry=("bad_record",))
        planner.work(workspace.table("pairs"), workspace.table("images"), config)
        found = {k: [s["problem"].to_pylist() for s in planner.shards(k, 9)] for k in KINDS}
    assert found == {"new": [["bad_record: line 1"]], "again": [["bad_record: line 2"]], "refresh": []}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=5),
    known=st.lists(st.integers(0, 30), unique=True, max_size=20),
    size=st.integers(1, 7),
)
def test_the_first_of_each_new_key(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]], known: list[int], size: int
) -> None:
    table = Workspace(tmp_path_factory.mktemp("ws")).table("pairs")
    if known:
        table.append(pairs(known), "run")
    seen = set(known)
    expected = {}
    for number, batch in enumerate(batches):
        for key in batch:
            if key not in seen:
                seen.add(key)
                expected[key] = f"http://{number}/{key}"
    with Planner() as planner:
        parts = list(planner.fresh((pairs(keys, str(i)) for i, keys in enumerate(batches)), table, size))
        assert (planner.given, planner.keys) == (sum(map(len, batches)), len({k for b in batches for k in b}))
    assert all(p.num_rows == size for p in parts[:-1]) and all(p.num_rows for p in parts)
    found = [(r["pair_key"], r["url"]) for p in parts for r in p.to_pylist()]
    assert found == sorted(expected.items())
