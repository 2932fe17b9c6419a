"""Damaged vectors are named; sound ones pass. Standing of embeddings beside images, by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.audit import VectorCheck, check_vectors, compare_with_images
from pipeline.workspace import Workspace
from schemas.errors import AuditError
from schemas.tables import EMBEDDINGS, IMAGES
from schemas.vectors import normalise

Pair = dict[str, np.ndarray]


def sound(n: int, dim: int = 512) -> tuple[np.ndarray, Pair]:
    """Keys, and float16 vectors of both modalities."""
    rng = np.random.default_rng(n)
    return np.arange(n) * 7, {m: normalise(rng.normal(size=(n, dim))).astype(np.float16) for m in ("image", "text")}


@given(st.integers(0, 40), st.sampled_from([1, 3, 16, 768]))
@settings(max_examples=30, deadline=None)
def test_sound_vectors_pass(n: int, dim: int) -> None:
    check_vectors(*sound(n, dim))


DAMAGE = {
    "with NaN": np.nan,
    "with an infinite number": np.inf,
    "of zeros": 0.0,
    "not of length 1": 1.01,
}


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what: str, modality: str) -> None:
    keys, vectors = sound(30)
    if what in ("of zeros", "not of length 1"):
        vectors[modality][[4, 9]] *= np.float16(DAMAGE[what])
    else:
        vectors[modality][[4, 9], 100] = DAMAGE[what]
    with pytest.raises(AuditError, match=rf"actual: 2 {modality} vectors {what} \(keys 28, 63\)\n"):
        check_vectors(keys, vectors)


def test_ten_keys_are_named_and_all_are_counted() -> None:
    keys, vectors = sound(30)
    vectors["text"][:] = 0
    with pytest.raises(
        AuditError, match=r"30 text vectors of zeros \(keys 0, 7, 14, 21, 28, 35, 42, 49, 56, 63, \.\.\.\)"
    ):
        check_vectors(keys, vectors)


def test_a_key_twice_in_different_batches() -> None:
    keys, vectors = sound(6)
    keys = np.array([5, 3, 9, 3, 8, 5])
    check = VectorCheck("tiny")
    for i in range(6):
        check.add(keys[i : i + 1], {m: v[i : i + 1] for m, v in vectors.items()})
    assert check.rows == 6
    with pytest.raises(AuditError, match=r"2 keys that are there twice \(keys 3, 5\)"):
        check.finish()


def test_vectors_that_do_not_belong_together_are_found_by_their_similarity() -> None:
    keys, vectors = sound(50)
    similarity = np.einsum("nd,nd->n", *(v.astype(np.float32) for v in vectors.values()))
    similarity[0] = np.nan  # none was stored
    check = VectorCheck("tiny")
    check.add(keys, vectors, similarity)
    check.finish()
    similarity[[20, 21]] += 0.006
    similarity[22] += 0.004  # rounding may do as much, and more than it does
    check = VectorCheck("tiny")
    check.add(keys, vectors, similarity)
    with pytest.raises(AuditError, match=r"2 pairs whose similarity .* \(keys 140, 147\)"):
        check.finish()


def put(workspace: Workspace, table: str, rows: list[dict[str, object]]) -> None:
    spec = {"images": IMAGES, "embeddings": EMBEDDINGS}[table]
    full = [dict.fromkeys(spec.schema.names) | row for row in rows]
    workspace.table(table).upsert(pa.Table.from_pylist(full, schema=spec.schema), "run")


def test_standing_by_hand(workspace: Workspace) -> None:
    states = {
        1: ("ok", "a"),
        2: ("ok", "b"),
        3: ("opted_out", None),
        5: ("ok", "e"),
        6: ("ok", None),
        8: ("timeout", "x"),
    }
    put(workspace, "images", [{"pair_key": k, "status": s, "sha256": h} for k, (s, h) in states.items()])
    stored = {1: "a", 2: "old", 3: "c", 4: "d", 6: "f"}
    put(workspace, "embeddings", [{"pair_key": k, "encoder": "E", "sha256": h} for k, h in stored.items()])
    put(workspace, "embeddings", [{"pair_key": 5, "encoder": "other", "sha256": "e"}])
    tables = workspace.table("embeddings"), workspace.table("images")
    versions = {"embeddings": tables[0].version(), "images": tables[1].version()}
    found = compare_with_images(*tables, "E", versions)
    assert found.same.tolist() == [1, 6]  # 6: nobody knows its bytes
    assert found.changed.tolist() == [2]
    assert found.gone.tolist() == [3, 4]
    assert found.missing == 1  # 5
    seen = {name: workspace.table(name).paths() for name in ("embeddings", "images")}
    put(workspace, "images", [{"pair_key": k, "status": "ok", "sha256": "g"} for k in (10, 11, 12)])
    put(workspace, "embeddings", [{"pair_key": k, "encoder": "E", "sha256": h} for k, h in ((10, "g"), (11, "h"))])
    new = {name: workspace.table(name).paths() - paths for name, paths in seen.items()}
    some = compare_with_images(*tables, "E", {"embeddings": None, "images": None}, new)
    assert [some.same.tolist(), some.changed.tolist(), some.gone.tolist(), some.missing] == [[10], [11], [], 1]
    put(workspace, "images", [{"pair_key": 2, "status": "ok", "sha256": "old"}])
    assert compare_with_images(*tables, "E", versions).changed.tolist() == [2]
    now = versions | {"images": tables[1].version()}
    assert compare_with_images(*tables, "E", now).same.tolist() == [1, 2, 6], "the embeddings as they were"


def test_no_tables_at_all(workspace: Workspace) -> None:
    tables = workspace.table("embeddings"), workspace.table("images")
    found = compare_with_images(*tables, "E", {"embeddings": None, "images": None})
    assert (len(found.same), len(found.changed), len(found.gone), found.missing) == (0, 0, 0, 0)
