"""Vectors from the table, and shards of them, without Ray: merged they are what one process builds."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from upath import UPath

from pipeline.index import ShardFiller, Source, Stored, Truth, fill, merge_shards, read_keys, search, train
from pipeline.workspace import Workspace
from schemas.errors import CardError
from schemas.tables import EMBEDDINGS
from schemas.vectors import pack
from tests.pipeline.index.data import KEYS, D, neighbours, vectors

N = 900
ROWS = vectors(N).astype(np.float16)
HAS_TEXT = np.arange(N) % 3 != 0


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Images of all keys, texts of two thirds of them, in three files; and another encoder's vectors."""
    made = Workspace(tmp_path / "ws").prepare()
    table = made.table("embeddings")
    packed = pack(ROWS).to_pylist()
    texts = [v if t else None for v, t in zip(pack(-ROWS).to_pylist(), HAS_TEXT, strict=True)]
    for encoder, start, end in (("e", 0, 400), ("e", 400, 401), ("other", 0, 50), ("e", 401, N)):
        n = end - start
        rows = {
            "pair_key": KEYS[start:end], "encoder": [encoder] * n, "image_vec": packed[start:end],
            "text_vec": texts[start:end], "similarity": np.zeros(n, np.float32), "caption": [""] * n,
            "sha256": [""] * n, "run": ["r"] * n,
        }  # fmt: skip
        table.append(pa.table(rows, schema=EMBEDDINGS.schema), "r")
    return made


def source(workspace: Workspace, modality: str = "image", without: np.ndarray | None = None) -> Source:
    table = workspace.table("embeddings")
    gone = np.empty(0, np.int64) if without is None else np.sort(without)
    return Source(table, "e", modality, table.version(), D, gone)


def test_the_vectors_of_a_modality(workspace: Workspace) -> None:
    for modality, rows, there in (("image", ROWS, np.ones(N, bool)), ("text", -ROWS, HAS_TEXT)):
        gone = KEYS[:N][there][::7]
        one = source(workspace, modality, gone)
        kept = there & ~np.isin(KEYS[:N], gone)
        assert one.keys().tolist() == sorted(KEYS[:N][kept].tolist())
        found = [b for share in range(4) for b in one.batches(share, 4)]
        keys, values = np.concatenate([k for k, _ in found]), np.concatenate([v for _, v in found])
        assert sorted(keys.tolist()) == one.keys().tolist()
        place = {key: i for i, key in enumerate(KEYS[:N].tolist())}
        np.testing.assert_array_equal(values, rows[[place[key] for key in keys.tolist()]])
        some = one.keys()[5::11]
        np.testing.assert_array_equal(one.take(some), rows[[place[key] for key in some.tolist()]])
    assert one.take(np.empty(0, np.int64)).shape == (0, D)
    assert len(Source(one.table, "nobody", "image", one.version, D).keys()) == 0


@pytest.mark.parametrize("factory", ["IDMap,SQfp16", "IVF4,SQ8", "IDMap,IVF4,PQ4x4fsr,Refine(SQ8)"])
def test_merged_shards_are_the_single_build(workspace: Workspace, tmp_path: Path, factory: str) -> None:
    queries = vectors(20, seed=3)
    one = source(workspace, without=KEYS[:10])
    trained = train(one.take(one.keys()[:500]), factory)
    folder = UPath(tmp_path / "shards")
    stored = Stored.of(trained, folder / "image.trained")
    stage = pickle.loads(pickle.dumps(ShardFiller(stored, one, 4, folder, Truth.empty(queries))))
    shards = [pickle.loads(pickle.dumps(stage(rank))) for rank in (2, 0, 3, 1)]  # in any order
    merged, whole = stored.open(), stored.open()
    truth = merge_shards(merged, shards, Truth.empty(queries))
    single = fill(whole, one, Truth.empty(queries))
    assert truth is not None and single is not None
    np.testing.assert_array_equal(truth.keys, single.keys)
    np.testing.assert_array_equal(truth.keys, neighbours(queries, KEYS[10:N], ROWS[10:], 200))
    assert read_keys(merged).tolist() == read_keys(whole).tolist() and merged.ntotal == N - 10
    for a, b in zip(*(search(index, queries, 50, {"nprobe": 2}) for index in (merged, whole)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [p.name for p in folder.iterdir()] == ["image.trained"], "shards are removed once they are merged"
    assert fill(stored.open(), one, None) is None


def test_a_shard_that_was_truncated(workspace: Workspace, tmp_path: Path) -> None:
    one, folder = source(workspace), UPath(tmp_path / "shards")
    trained = Stored.of(train(one.take(one.keys()), "IDMap,SQfp16"), folder / "image.trained")
    shard = ShardFiller(trained, one, 2, folder, None)(0)
    path = Path(shard.file.path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CardError, match="shard"):
        merge_shards(trained.open(), [shard], None)
