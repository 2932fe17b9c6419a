"""Folders of vectors without the jobs: which files belong together, whose the rows are, what a shard's files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from pipeline.export.vectors import (
    DETAILS,
    VectorLayout,
    check_counts,
    is_written,
    shard_files,
    write_shard,
)
from pipeline.vectors.folders import find_vector_files, is_vector_folder, stretches
from pipeline.vectors.metadata import METADATA, describe
from schemas.errors import CountsError, UsageError
from schemas.keys import pair_key


def matrix(n: int, dim: int = 4, start: int = 0) -> np.ndarray[Any, Any]:
    return (np.arange(start, start + n)[:, None] + np.arange(dim) / 64).astype(np.float16)


def lay(
    folder: Path, sizes: dict[str, dict[int, int]], names: tuple[str, str, str] = ("img_emb", "text_emb", "metadata")
) -> None:
    """Files of so many rows: what -> number -> rows."""
    for what, name in zip(("image", "text", "metadata"), names, strict=True):
        (folder / name).mkdir(parents=True)
        for number, rows in sizes.get(what, {}).items():
            stem = f"{name.rpartition('-')[2]}_{number:04d}"
            if what == "metadata":
                pq.write_table(pa.table({"url": [f"http://h/{number}/{i}" for i in range(rows)]}),
                               folder / name / f"{stem}.parquet", row_group_size=3)  # fmt: skip
            else:
                np.save(folder / name / f"{stem}.npy", matrix(rows, start=number % 97))


@pytest.mark.parametrize(
    "names",
    [
        ("img_emb", "text_emb", "metadata"),
        ("images", "texts", "metadata"),
        ("img_emb", "text_emb", "laion2B-en-metadata"),
    ],
)
def test_files_of_a_number_belong_together(tmp_path: Path, names: tuple[str, str, str]) -> None:
    """In the order of the numbers, not of the names; a stretch crosses row groups and stays in step."""
    count = {9: 5, 10: 7, 10_000: 2}
    lay(tmp_path, {"image": count, "text": count, "metadata": count}, names)
    assert is_vector_folder(str(tmp_path))
    found = find_vector_files(str(tmp_path))
    assert [f.rows for f in found] == [5, 7, 2]
    assert {f.dim for f in found} == {4}
    for files, number in zip(found, count, strict=True):
        urls, images, firsts = [], [], []
        for stretch in stretches(files, size=4):
            assert stretch.image is not None and stretch.text is not None
            assert len(stretch.image) == len(stretch.text) == stretch.metadata.num_rows <= 4
            urls += stretch.metadata["url"].to_pylist()
            images.append(np.asarray(stretch.image))
            firsts.append(stretch.first)
        assert urls == [f"http://h/{number}/{i}" for i in range(count[number])]
        np.testing.assert_array_equal(np.concatenate(images), matrix(count[number], start=number % 97))
        assert firsts[0] == 0


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"image": {0: 5, 1: 6}, "metadata": {0: 5, 1: 7}},
            ["img_emb_0001.npy", "7 rows", "6 rows", "metadata_0001.parquet"],
        ),
        ({"image": {0: 5}, "text": {0: 4}, "metadata": {0: 5}}, ["text_emb_0000.npy", "5 rows", "4 rows"]),
        ({"image": {0: 5, 1: 5}, "metadata": {0: 5}}, ["metadata files are missing", "numbered 1"]),
        ({"image": {0: 5}, "text": {1: 5}, "metadata": {0: 5, 1: 5}}, ["image files are missing", "numbered 1"]),
        ({"image": {0: 5}}, ["no metadata"]),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, sizes: dict[str, dict[int, int]], words: list[str]
) -> None:
    lay(tmp_path, sizes)
    with pytest.raises(UsageError) as caught:
        find_vector_files(str(tmp_path))
    for word in words:
        assert word in str(caught.value)


def test_files_that_are_no_vectors(tmp_path: Path) -> None:
    assert not is_vector_folder(str(tmp_path / "nowhere"))
    assert not is_vector_folder(str(tmp_path))
    lay(tmp_path, {"image": {0: 5}, "metadata": {0: 5}})
    file = tmp_path / "img_emb" / "img_emb_0000.npy"
    for bad, word in ((matrix(5).ravel(), "no vectors"), (matrix(5).astype(int), "no vectors")):
        np.save(file, bad)
        with pytest.raises(UsageError, match=word):
            find_vector_files(str(tmp_path))
    file.write_bytes(b"not an array")
    with pytest.raises(UsageError, match="no npy file"):
        find_vector_files(str(tmp_path))
    np.save(file, matrix(5))
    np.save(tmp_path / "img_emb" / "extra.npy", matrix(5))
    with pytest.raises(UsageError, match="which of its files"):
        find_vector_files(str(tmp_path))
    (tmp_path / "img_emb" / "extra.npy").unlink()
    (tmp_path / "metadata" / "metadata_0000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="no Parquet file"):
        find_vector_files(str(tmp_path))


# -- metadata ------------------------------------------------------------------------------------------


def test_columns_by_the_names_that_others_give_them() -> None:
    """LAION's capitals; other columns go along; a similarity is not known to be this encoder's."""
    rows = pa.table(
        {"SAMPLE_ID": [1, 2], "URL": ["http://a/1", "http://a/2"], "TEXT": ["one", None], "NSFW": ["UNLIKELY", None],
         "similarity": [0.5, float("nan")], "WIDTH": [10, None]}
    )  # fmt: skip
    found = describe(rows, "/f", "/f/m", 0)
    assert (found.urls, found.captions) == (["http://a/1", "http://a/2"], ["one", ""])
    assert found.keys.tolist() == [pair_key("http://a/1", "one"), pair_key("http://a/2", "")]
    assert json.loads(found.extras[0] or "") == {"SAMPLE_ID": 1, "NSFW": "UNLIKELY", "similarity": 0.5, "WIDTH": 10}
    assert json.loads(found.extras[1] or "") == {"SAMPLE_ID": 2}
    assert found.similarity.null_count == found.sha256.null_count == 2
    assert found.other_keys == 0


def test_rows_without_url() -> None:
    rows = pa.table({"image_path": ["0001", "/data/2.jpg", "s3://b/3.jpg", None], "url": ["", None, None, None]})
    found = describe(rows, "/f", "/f/m.parquet", 40)
    assert found.urls == ["/f#0001", "/data/2.jpg", "s3://b/3.jpg", "/f/m.parquet#43"]
    assert found.captions == [""] * 4
    assert found.extras == [None] * 4
    assert describe(pa.table({"key": ["7"]}), "/f", "m", 0).urls == ["/f#7"]
    with pytest.raises(UsageError, match="whose the vectors are"):
        describe(pa.table({"caption": ["x"]}), "/f", "m", 0)


def test_our_own_columns_come_back() -> None:
    rows = pa.table(
        {"url": ["u1", "u2", "u3"], "caption": ["a", "b", "c"],
         "pair_key": pa.array([pair_key("u1", "a"), 7, None], pa.int64()),
         "similarity": pa.array([0.25, None, 1], pa.float32()),
         "sha256": ["s", None, "t"], "width": [3, 4, 5], "score_x": [0.1, None, 0.3]}
    )  # fmt: skip
    found = describe(rows, "/f", "m", 0)
    assert found.keys.tolist() == [pair_key("u1", "a"), 7, pair_key("u3", "c")]
    assert found.other_keys == 1
    assert found.similarity.to_pylist() == [0.25, None, 1]
    assert found.sha256.to_pylist() == ["s", None, "t"]
    assert found.extras == ['{"score_x": 0.1}', None, '{"score_x": 0.3}']


def test_a_caption_that_is_not_utf8() -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"a\xff\xfe")]
    )
    found = describe(pa.table({"url": ["u", "v"], "caption": bad}), "/f", "m", 0)
    assert found.captions == ["a", None]


# -- shards --------------------------------------------------------------------------------------------


def test_names_of_files() -> None:
    both = ("image", "text")
    assert shard_files("npy", 3, 20, both) == {
        "image": "img_emb/img_emb_00003.npy", "text": "text_emb/text_emb_00003.npy", "keys": "keys/keys_00003.npy",
    }  # fmt: skip
    assert shard_files("clip-retrieval", 3, 9, both) == {
        "image": "img_emb/img_emb_3.npy", "text": "text_emb/text_emb_3.npy", "metadata": "metadata/metadata_3.parquet",
    }  # fmt: skip
    assert shard_files("clip-retrieval", 3, 10, ("image",)) == {
        "image": "img_emb/img_emb_03.npy", "metadata": "metadata/metadata_03.parquet",
    }  # fmt: skip
    assert shard_files("dalle2-pytorch", 0, 1, ("text",)) == {
        "text": "text_emb/text_emb_00000.npy", "metadata": "meta/meta_00000.parquet",
    }  # fmt: skip
    assert shard_files("parquet-list", 11, 12, both) == {"lists": "00011.parquet"}


def details(n: int) -> pa.Table:
    columns = {f.name: pa.nulls(n, f.type) for f in DETAILS} | {
        "pair_key": pa.array(np.arange(n) * 3), "caption": pa.array([f"c{i}" for i in range(n)]),
        "score_x": pa.array(np.arange(n) / 2, pa.float32()),
    }  # fmt: skip
    return pa.table(columns)


@pytest.mark.parametrize("layout", ["npy", "clip-retrieval", "dalle2-pytorch", "parquet-list"])
def test_shards_hold_what_they_are_given(tmp_path: Path, layout: VectorLayout) -> None:
    folder, files = UPath(tmp_path), shard_files(layout, 0, 1, ("image", "text"))
    vectors = {"image": matrix(5), "text": matrix(5, start=50)}
    assert not is_written(folder, files)
    size = write_shard(folder, files, vectors, details(5))
    assert is_written(folder, files)
    there = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert size == sum(map(len, there.values()))
    write_shard(folder, files, vectors, details(5))
    assert {p: p.read_bytes() for p in there} == there, "the same rows give the same files"
    for what, name in files.items():
        if what in vectors:
            loaded = np.load(tmp_path / name)
            assert loaded.dtype == np.float16
            np.testing.assert_array_equal(loaded, vectors[what])
        elif what == "keys":
            np.testing.assert_array_equal(np.load(tmp_path / name), np.arange(5) * 3)
        else:
            table = pq.read_table(tmp_path / name)
            own = [n for n in METADATA if n != "image_path" or what == "metadata"]
            lists = ["image_embedding", "text_embedding"] if what == "lists" else []
            assert table.column_names == [*own, "score_x", *lists]
            assert table["pair_key"].to_pylist() == [0, 3, 6, 9, 12]
            for column, modality in zip(lists, vectors, strict=False):
                assert table.schema.field(column).type == pa.list_(pa.float32())
                assert table[column].to_pylist() == vectors[modality].astype(np.float32).tolist()
    check_counts(folder, files, 5)
    with pytest.raises(CountsError, match="4 rows"):
        check_counts(folder, files, 4)
