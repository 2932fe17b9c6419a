"""Pictures, the held-out split, and the tables read by key."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.training import data
from pipeline.training.data import Pictures, held_out, read_embeddings, to_input
from pipeline.workspace import Workspace
from schemas.errors import NothingToDo
from schemas.tables import EMBEDDINGS
from schemas.vectors import pack, unpack


def encoded(seed: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_pictures_are_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [encoded(i, (8, 8)) for i in range(4)]
    column = pa.chunked_array([pa.array(files, pa.binary())])
    expected = np.stack([np.asarray(Image.open(io.BytesIO(f))).transpose(2, 0, 1) for f in files])
    rows = np.array([2, 0])
    np.testing.assert_array_equal(Pictures(column, 8)[rows].numpy(), expected[rows])
    monkeypatch.setattr(data, "_IN_MEMORY", 0)  # decoded when asked
    np.testing.assert_array_equal(Pictures(column, 8)[rows].numpy(), expected[rows])


def test_other_sizes_become_the_middle_square() -> None:
    column = pa.chunked_array([pa.array([encoded(1, (16, 8))], pa.binary())])
    whole = np.asarray(Image.open(io.BytesIO(column[0].as_py())))
    np.testing.assert_array_equal(Pictures(column, 8)[np.array([0])][0].numpy(), whole[:, 4:12].transpose(2, 0, 1))


def test_held_out_is_a_function_of_the_key() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63 - 1, 100_000)
    apart = held_out(keys, 0.03)
    assert 0.027 < apart.mean() < 0.033
    np.testing.assert_array_equal(held_out(keys[::-1], 0.03)[::-1], apart)
    assert (held_out(keys, 0.01) <= apart).all()  # a smaller share is a part of a larger one
    assert not held_out(keys, 0.0).any()


def test_input_range() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8)
    assert to_input(pixels).tolist() == [-1.0, 1.0]


def test_embeddings_by_key_where_both_vectors_are_there(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    table = workspace.table("embeddings")

    def add(keys: list[int], encoder: str, text: bool = True) -> None:
        image = np.array(keys)[:, None] + np.arange(4)
        rows = [
            dict.fromkeys(EMBEDDINGS.schema.names)
            | {"pair_key": k, "encoder": encoder, "image_vec": pack([v])[0].as_py(), "caption": f"c{k}"}
            | ({"text_vec": pack([-v])[0].as_py()} if text else {})
            for k, v in zip(keys, image, strict=True)
        ]
        table.append(pa.Table.from_pylist(rows, schema=EMBEDDINGS.schema), "r")

    add([9, 2, 5], "e")
    add([7, 3], "e", text=False)
    add([1, 2], "other")
    version = table.version()
    add([4], "e")
    rows = read_embeddings(workspace, "e", version, ["caption"])
    assert rows["pair_key"].to_pylist() == [2, 5, 9]
    assert rows["caption"].to_pylist() == ["c2", "c5", "c9"]
    expected = np.array([2, 5, 9])[:, None] + np.arange(4)
    np.testing.assert_array_equal(unpack(rows["image_vec"], 4), expected)
    np.testing.assert_array_equal(unpack(rows["text_vec"], 4), -expected)
    assert read_embeddings(workspace, "e", version).column_names == ["pair_key", "image_vec", "text_vec"]
    with pytest.raises(NothingToDo, match="no image vectors of nobody to train on"):
        read_embeddings(workspace, "nobody", version)


def test_a_column_of_vectors_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CHUNK", 20)  # bytes: two rows of 4 float16
    rows = np.arange(28, dtype=np.float16).reshape(7, 4)
    column = data._packed(rows)
    assert [len(chunk) for chunk in column.chunks] == [2, 2, 2, 1]
    np.testing.assert_array_equal(unpack(column, 4), rows)
