"""Marks of duplicates: by hand, and against plain loops over all pairs."""

from __future__ import annotations

import tempfile
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.download import near
from pipeline.download.duplicates import find_duplicates, mark_duplicates
from pipeline.workspace import Workspace
from schemas.tables import IMAGES

HASH = 0x0F1E2D3C4B5A6978
OTHER = 0x55AA33CC0FF0AA55

Picture = tuple[str | None, int | None]  # sha256, phash
Mark = tuple[int, str, int]  # kept_key, kind, distance
NO_IMAGE: Picture = (None, None)


def flip(phash: int, *bits: int) -> int:
    """With these bits flipped, as a signed int64."""
    for bit in bits:
        phash ^= 1 << bit
    return int(np.uint64(phash & (1 << 64) - 1).astype(np.int64))


def put(workspace: Workspace, run: str, pictures: dict[int, Picture]) -> None:
    """A run's rows of images: ok ones with their picture, failed ones for NO_IMAGE."""
    rows = []
    for key, (sha, phash) in pictures.items():
        status = "ok" if sha is not None else "timeout"
        row = {"pair_key": key, "status": status, "sha256": sha, "phash": phash, "run": run}
        rows.append(dict.fromkeys(IMAGES.schema.names) | row)
    workspace.table("images").upsert(pa.Table.from_pylist(rows, schema=IMAGES.schema), run)


def mark(workspace: Workspace, run: str, distance: int | None = 3) -> dict[str, int]:
    return mark_duplicates(workspace.table("images"), workspace.table("duplicates"), distance, run)


def marks(workspace: Workspace) -> dict[int, Mark]:
    rows = workspace.table("duplicates").read().to_pylist()
    found = {r["pair_key"]: (r["kept_key"], r["kind"], r["distance"]) for r in rows}
    assert len(found) == len(rows), "a key twice"
    return found


def test_by_hand(workspace: Workspace) -> None:
    put(workspace, "r1", {5: ("a", HASH), 3: ("b", OTHER), 9: NO_IMAGE})
    assert mark(workspace, "r1") == {"exact": 0, "near": 0}
    put(
        workspace, "r2",
        {
            1: ("a", HASH),                         # the same bytes; the earlier run's comes first, not the lower key
            2: ("c", flip(HASH, 0, 63)),            # two bits, the sign's among them
            4: ("d", flip(OTHER, 1, 2, 3)),         # three bits
            6: ("e", flip(OTHER, 1, 2, 3, 4)),      # four: kept, though near to 4, which is marked
            7: ("f", flip(OTHER, 1, 2, 3, 4, 5)),   # near to 6 alone
            8: ("g", OTHER),                        # the same hash
            9: ("a", HASH),                         # failed, and came later
        },
    )  # fmt: skip
    assert mark(workspace, "r2") == {"exact": 2, "near": 4}
    expected = {
        1: (5, "exact", 0), 2: (5, "near", 2), 4: (3, "near", 3), 7: (6, "near", 1), 8: (3, "near", 0),
        9: (5, "exact", 0),
    }  # fmt: skip
    assert marks(workspace) == expected
    assert {r["run"] for r in workspace.table("duplicates").read().to_pylist()} == {"r2"}


def test_flat_pictures_are_near_to_none_but_may_be_the_same(workspace: Workspace) -> None:
    few, many = (1 << 7) - 1, flip(-1, *range(7))
    flat: dict[int, Picture] = {1: ("a", 0), 2: ("b", 0), 3: ("c", few), 4: ("d", -1), 5: ("e", many), 6: ("a", 0)}
    put(workspace, "r", flat)
    assert mark(workspace, "r") == {"exact": 1, "near": 0}
    assert marks(workspace) == {6: (1, "exact", 0)}
    eight = (1 << 8) - 1
    put(workspace, "s", {7: ("f", eight), 8: ("g", eight), 9: ("h", flip(-1, *range(8))), 10: ("i", few)})
    assert mark(workspace, "s") == {"exact": 0, "near": 1}
    assert marks(workspace) == {6: (1, "exact", 0), 8: (7, "near", 0)}


def test_the_images_of_a_run_that_was_killed_before_its_marks(workspace: Workspace) -> None:
    put(workspace, "r1", {1: ("a", HASH)})
    mark(workspace, "r1")
    put(workspace, "r2", {2: ("a", HASH)})
    put(workspace, "r3", {3: ("b", OTHER)})
    assert mark(workspace, "r3") == {"exact": 1, "near": 0}
    assert marks(workspace) == {2: (1, "exact", 0)}


def test_nothing_new_commits_nothing(workspace: Workspace) -> None:
    table = workspace.table("duplicates")
    assert mark(workspace, "r0") == {"exact": 0, "near": 0}
    assert table.version() == -1
    put(workspace, "r1", {1: ("a", HASH), 2: ("a", HASH), 3: ("b", OTHER)})
    assert mark(workspace, "r1") == {"exact": 1, "near": 0}
    before = table.version()
    assert find_duplicates(workspace.table("images"), table, 3) is None
    assert mark(workspace, "r2") == {"exact": 0, "near": 0}
    assert table.version() == before


def test_a_refresh_that_brings_other_pictures(workspace: Workspace) -> None:
    first: dict[int, Picture] = {1: ("a", HASH), 2: ("a", HASH), 3: ("a", HASH), 4: ("b", OTHER)}
    put(workspace, "r1", first)
    mark(workspace, "r1")
    assert marks(workspace) == {2: (1, "exact", 0), 3: (1, "exact", 0)}
    put(workspace, "r2", {1: ("c", flip(OTHER, 7))})  # the kept one is another picture now
    assert mark(workspace, "r2") == {"exact": 1, "near": 1}
    assert marks(workspace) == {1: (4, "near", 1), 3: (2, "exact", 0)}, "2 is kept instead; its mark is gone"
    put(workspace, "r3", {3: ("d", OTHER), 2: NO_IMAGE})
    assert mark(workspace, "r3") == {"exact": 0, "near": 1}
    assert marks(workspace) == {1: (4, "near", 1), 3: (4, "near", 0)}


def test_a_refresh_that_brings_the_same_pictures_changes_no_mark(workspace: Workspace) -> None:
    """Though the kept ones are of a later run than their duplicates then, and 4 is near to two kept ones."""
    images: dict[int, Picture] = {
        9: ("a", HASH), 5: ("b", flip(HASH, 0, 1, 2, 3)), 4: ("c", flip(HASH, 0, 1)), 1: ("a", HASH),
    }  # fmt: skip
    for run, key in enumerate(images):
        put(workspace, f"r{run}", {key: images[key]})
    mark(workspace, "r9")
    expected = {4: (9, "near", 2), 1: (9, "exact", 0)}
    assert marks(workspace) == expected
    for run, keys in (("s1", [9]), ("s2", [5, 4]), ("s3", [1, 4, 5, 9])):
        put(workspace, run, {key: images[key] for key in keys})
        assert mark(workspace, run) == {"exact": 0, "near": 0}
        assert marks(workspace) == expected


def test_another_distance(workspace: Workspace) -> None:
    put(workspace, "r1", {1: ("a", HASH), 2: ("b", flip(HASH, 1, 2)), 3: ("a", HASH), 4: ("c", flip(HASH, 1, 2, 3))})
    exact, two = {3: (1, "exact", 0)}, {2: (1, "near", 2), 3: (1, "exact", 0)}
    for run, (distance, expected) in enumerate(
        [(2, two), (None, exact), (2, two), (3, two | {4: (1, "near", 3)}), (1, exact | {4: (2, "near", 1)}), (2, two)]
    ):
        mark(workspace, f"s{run}", distance)
        assert marks(workspace) == expected, (run, distance)


def test_the_same_bytes_stored_under_two_settings(workspace: Workspace) -> None:
    """One sha256, two hashes: exact by bytes whatever the hash, and the first of them may be near to another."""
    put(workspace, "r1", {1: ("x", HASH), 2: ("y", flip(HASH, 1))})
    put(workspace, "r2", {3: ("y", OTHER), 4: ("y", OTHER), 5: ("z", OTHER), 6: ("x", OTHER)})
    mark(workspace, "r2")
    assert marks(workspace) == {
        2: (1, "near", 1), 4: (3, "exact", 0), 5: (3, "near", 0), 6: (1, "exact", 0),
    }  # fmt: skip


def test_racing_searches_do_not_mark_each_others_kept(workspace: Workspace) -> None:
    """A search that another one overtook changes nothing: what it found may be wrong by now."""
    images, table = workspace.table("images"), workspace.table("duplicates")
    put(workspace, "r1", {1: ("a", HASH), 2: ("a", HASH)})
    late = find_duplicates(images, table, 3)
    put(workspace, "r0", {0: ("a", HASH)})
    assert mark(workspace, "r0") == {"exact": 2, "near": 0}
    assert late is not None
    rows = late.rows.append_column("run", pa.array(["r1"]))
    assert table.replace(rows, late.gone, "r1", late.marks_version, late.record) is None
    assert marks(workspace) == {1: (0, "exact", 0), 2: (0, "exact", 0)}


# -- against plain loops -----------------------------------------------------------------------------


def says_something(phash: int) -> bool:
    return 8 <= (phash & (1 << 64) - 1).bit_count() <= 56


def relation(a: Picture, b: Picture, distance: int | None) -> tuple[str, int] | None:
    """Kind and distance of two pictures that are duplicates."""
    if a[0] == b[0]:
        return "exact", 0
    assert a[1] is not None and b[1] is not None
    bits = ((a[1] ^ b[1]) & (1 << 64) - 1).bit_count()
    if distance is None or bits > distance or not (says_something(a[1]) and says_something(b[1])):
        return None
    return "near", bits


def one_by_one(order: list[tuple[int, Picture]], distance: int | None) -> dict[int, Mark]:
    """The definition: pictures in their order, each against all that are kept before it."""
    kept: list[tuple[int, Picture]] = []
    found: dict[int, Mark] = {}
    for key, picture in order:
        related = [(k, r) for k, other in kept if (r := relation(picture, other, distance))]
        best = next((x for x in related if x[1][0] == "exact"), related[0] if related else None)
        if best is None:
            kept.append((key, picture))
        else:
            found[key] = (best[0], *best[1])
    return found


HASHES = [HASH, *(flip(HASH, *range(n)) for n in range(1, 6)), flip(HASH, 0, 2, 4), OTHER, flip(OTHER, 9), 0, 3, -1]
PICTURES: list[Picture] = [(f"{i}", phash) for i, phash in enumerate(HASHES)]
# Other bytes of the same hash; and the same bytes with another hash (stored under other settings).
PICTURES += [("h", HASH), ("o", OTHER), ("0", OTHER), ("2", flip(HASH, 0, 2)), ("7", 0)]
SOME = st.sampled_from(PICTURES)
DISTANCES = st.sampled_from([None, 0, 1, 2, 3])


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(SOME, min_size=1, max_size=24), st.lists(st.integers(0, 23), max_size=2), st.permutations(range(24)),
    st.integers(0, 5), DISTANCES, st.sampled_from([1, 3, 1000]),
)  # fmt: skip
def test_one_run_after_another_gives_what_one_by_one_does(
    pictures: list[Picture], cuts: list[int], keys: list[int], failed: int, distance: int | None, block: int
) -> None:
    """New images and retries that succeed later: the marks after each run, and of all in one run."""
    with tempfile.TemporaryDirectory() as folder:
        several, at_once = Workspace(Path(folder) / "a"), Workspace(Path(folder) / "b")
        order: list[tuple[int, Picture]] = []
        bounds = [0, *sorted(cuts), len(pictures)]
        for number, (start, end) in enumerate(pairwise(bounds)):
            run = dict(zip(keys[start:end], pictures[start:end], strict=False))
            if number == 0:
                put(several, "r", dict.fromkeys(keys[-failed:] if failed else [], NO_IMAGE))
            if run:
                put(several, f"r{number}", run)
                put(at_once, f"r{number}", run)
            order += sorted(run.items())
            mark(several, f"r{number}", distance)
            assert marks(several) == one_by_one(order, distance)
        found = find_duplicates(at_once.table("images"), at_once.table("duplicates"), distance, block=block)
        assert found is not None and found.gone.num_rows == 0
        rows = found.rows.to_pylist()
        assert {r["pair_key"]: (r["kept_key"], r["kind"], r["distance"]) for r in rows} == marks(several)


CHANGES = st.dictionaries(st.integers(0, 9), st.one_of(SOME, SOME, st.just(NO_IMAGE)), min_size=1, max_size=8)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(CHANGES, DISTANCES), min_size=2, max_size=4))
@example([({0: ("o", OTHER), 1: NO_IMAGE, 2: ("7", OTHER)}, 0), ({1: ("7", 0)}, 0)])
def test_whatever_changes_the_marks_are_right(runs: list[tuple[dict[int, Picture], int | None]]) -> None:
    """Refreshed, failed and new images, and other distances: a kept one is never marked, and none is left out."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(folder)
        images: dict[int, Picture] = {}
        for number, (changes, distance) in enumerate(runs):
            put(workspace, f"r{number}", changes)
            images |= changes
            ok = {key: picture for key, picture in images.items() if picture != NO_IMAGE}
            mark(workspace, f"r{number}", distance)
            found = marks(workspace)
            assert found.keys() <= ok.keys()
            for key, (kept, kind, bits) in found.items():
                assert kept not in found, "a kept image is marked"
                assert relation(ok[key], ok[kept], distance) == (kind, bits)
            unmarked = [ok[key] for key in ok.keys() - found.keys()]
            assert not [(a, b) for a, b in combinations(unmarked, 2) if relation(a, b, distance)], "a pair left out"
            put(workspace, f"r{number}b", ok or {99: NO_IMAGE})
            again = find_duplicates(workspace.table("images"), workspace.table("duplicates"), distance)
            assert again is not None and again.rows.num_rows == again.gone.num_rows == 0, "the same images again"


# -- near hashes -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 16), st.sampled_from([1, 10**3, 10**6, 10**9]), st.randoms())
def test_near_hashes_agree_under_a_mask(phash: int, distance: int, rows: int, random: Any) -> None:
    other = phash
    for bit in random.sample(range(64), distance):
        other ^= 1 << bit
    found = near.masks(distance, rows)
    assert any((phash ^ other) & mask == 0 for mask in found)
    assert all(-(2**63) <= mask < 2**63 for mask in found)


def test_more_rows_take_longer_masks() -> None:
    """For 3 bits: one of 4 groups; two of 5 from about a million rows on."""
    assert [len(near.masks(3, rows)) for rows in (1000, 100_000_000)] == [4, 10]
    assert near.masks(0, 10) == [-1]


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda e: e[0] < e[1])))
def test_drop_is_greedy(edges: set[tuple[int, int]]) -> None:
    dropped: set[int] = set()
    for vertex in range(13):
        if any(low not in dropped for low, high in edges if high == vertex):
            dropped.add(vertex)
    low, high = (np.array([e[i] for e in edges], np.int64) for i in (0, 1))
    assert set(near.drop(low, high).tolist()) == dropped


@pytest.mark.parametrize("candidates", [0, 50, 1 << 29])
def test_crowded_blocks_are_halved(candidates: int) -> None:
    """500 hashes of a crowd (every one near to hundreds), with three decided before."""
    rng = np.random.default_rng(0)
    hashes = [flip(HASH, *rng.choice(12, rng.integers(0, 7), replace=False).tolist()) for _ in range(500)]
    hashes = list(dict.fromkeys(hashes))
    expected = one_by_one([(i, (str(i), h)) for i, h in enumerate(hashes)], 2)
    early = [i for i in range(3) if i not in expected]
    db = duckdb.connect()
    db.execute("CREATE TABLE kept (pos BIGINT, h BIGINT)")
    db.execute("CREATE TABLE vertex (pos BIGINT, h BIGINT)")
    db.execute("CREATE TABLE edge (low BIGINT, high BIGINT)")
    db.executemany("INSERT INTO kept VALUES (?, ?)", [(i, hashes[i]) for i in early])
    db.executemany("INSERT INTO vertex VALUES (?, ?)", [(i, h) for i, h in enumerate(hashes) if i not in early])
    near.settle(db, 2, block=100, candidates=candidates)
    fate = db.execute("SELECT pos, kept_pos FROM fate").fetchall()
    assert dict(fate) == {key: kept for key, (kept, _, _) in expected.items()} and len(fate) == len(expected)
    kept = [pos for (pos,) in db.execute("SELECT pos FROM kept ORDER BY pos").fetchall()]
    assert kept == [i for i in range(len(hashes)) if i not in expected]
