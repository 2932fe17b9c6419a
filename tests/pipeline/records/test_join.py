"""The join: every embedding of the encoder with what images, or else pairs, say of its key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from upath import UPath

import pipeline.records.join
from pipeline.records import Records, record_batches, write_segment
from pipeline.workspace import Workspace
from schemas.errors import SchemaError
from schemas.tables import EMBEDDINGS, PAIRS
from schemas.vectors import pack
from tests.kills import add_images, image_row

D = 8
ENCODER = "e-0"


def embed(workspace: Workspace, keys: list[int], encoder: str = ENCODER, lacks: str = "", **further: float) -> None:
    n = len(keys)
    columns = {
        "pair_key": keys, "encoder": [encoder] * n, "similarity": [0.25] * n, "caption": [f"of {k}" for k in keys],
        "image_vec": vectors(keys, "image"), "text_vec": vectors(keys, "text"), "sha256": [""] * n, "run": ["r"] * n,
    }  # fmt: skip
    table = pa.table(columns, schema=EMBEDDINGS.schema)
    if lacks:
        table = table.set_column(table.column_names.index(lacks), lacks, pa.nulls(n, pa.binary()))
    fields = [pa.field(name, pa.float32()) for name in further]
    for name, value in further.items():
        table = table.append_column(name, pa.array([value] * n, pa.float32()))
    workspace.table("embeddings").widened(fields).append(table, "r")


def vectors(keys: list[int], modality: str) -> pa.Array:
    """Each is made of its key."""
    return pack(np.array([[k % 1000 + i + 100 * (modality == "text") for i in range(D)] for k in keys], np.float16))


def joined(workspace: Workspace, tmp_path: Path, keys: list[int] | None = None) -> Records:
    wanted = None if keys is None else np.array(keys)
    return Records.open(
        UPath(tmp_path), [write_segment(UPath(tmp_path), record_batches(workspace, ENCODER, D, wanted), "s")]
    )


@pytest.mark.parametrize("few", [True, False])
def test_every_row_with_its_own(few: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some at a time, with and without keys named, out of several files, beside another encoder's rows."""
    monkeypatch.setattr(pipeline.records.join, "ROWS", 7)
    workspace = Workspace(tmp_path / "ws").prepare()
    add_images(workspace, range(20))
    add_images(workspace, range(20, 30))
    keys = [image_row(n)["pair_key"] for n in range(30)]
    embed(workspace, keys[:12])
    embed(workspace, keys[5:25], encoder="other-1")
    embed(workspace, keys[12:28], score_x=0.5)
    records = joined(workspace, tmp_path, keys[:3] + keys[20:29] + [99] if few else None)
    expected = {0, 1, 2, *range(20, 28)} if few else set(range(28))
    assert set(records.keys.tolist()) == {keys[n] for n in expected}
    assert records.columns == ["pair_key", "caption", "url", "width", "height", "similarity", "score_x"]
    own = {row["pair_key"]: row for row in records.take(records.keys).to_pylist()}
    for n in expected:
        assert own[keys[n]] == {
            "pair_key": keys[n], "caption": f"of {keys[n]}", "url": f"https://h/{n}.png", "width": 16, "height": 16,
            "similarity": 0.25, "score_x": 0.5 if n >= 12 else None,
        }  # fmt: skip
    for modality in ("image", "text"):
        found = records.vectors(np.array([keys[n] for n in expected]), modality)
        np.testing.assert_array_equal(found[:, 0], [keys[n] % 1000 + 100 * (modality == "text") for n in expected])
    asked = np.array([keys[min(expected)], keys[max(expected)]])
    assert records.images(workspace, np.append(asked, 12345)) == {
        keys[n]: image_row(n)["image"] for n in (min(expected), max(expected))
    }


@pytest.mark.parametrize("few", [True, False])
def test_vectors_without_images(few: bool, tmp_path: Path) -> None:
    """Imported ones: of a pair without an image, of one modality, of nothing known at all."""
    workspace = Workspace(tmp_path / "ws").prepare()
    row = dict.fromkeys(PAIRS.schema.names) | {"pair_key": 7, "url": "u7", "caption": "c7", "added_run": "r"}
    workspace.table("pairs").append(pa.Table.from_pylist([row], schema=PAIRS.schema), "r")
    embed(workspace, [7, 8], lacks="image_vec")
    records = joined(workspace, tmp_path, [7, 8, 9] if few else None)
    assert records.has("image").tolist() == [] and records.has("text").tolist() == [7, 8]
    assert records.take(np.array([8, 7]), ["pair_key", "url", "caption", "width"]).to_pylist() == [
        {"pair_key": 8, "url": None, "caption": "of 8", "width": None},
        {"pair_key": 7, "url": "u7", "caption": "of 7", "width": None},
    ]
    assert records.images(workspace, records.keys) == {}


def test_nothing_and_another_width(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws").prepare()
    assert list(record_batches(workspace, ENCODER, D)) == []
    embed(workspace, [7])
    assert list(record_batches(workspace, "none-0", D)) == []
    with pytest.raises(SchemaError):
        list(record_batches(workspace, ENCODER, D + 1))


def test_images_after_the_table_was_compacted(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws").prepare()
    add_images(workspace, range(5))
    add_images(workspace, range(5, 9))
    keys = [image_row(n)["pair_key"] for n in range(9)]
    embed(workspace, keys)
    records = joined(workspace, tmp_path)
    table = workspace.table("images").open()
    assert table is not None
    table.optimize.compact()
    table.vacuum(0, dry_run=False, enforce_retention_duration=False)
    assert records.images(workspace, records.keys) == {k: image_row(n)["image"] for n, k in enumerate(keys)}
