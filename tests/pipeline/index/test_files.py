"""Index files: mapped, whole, and refused when they are not what their card says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from pipeline.index import build, from_bytes, keys_sha256, open_index, search, to_bytes, vectors_sha256, write_index
from schemas.cards import IndexFile
from schemas.errors import CardError
from tests.pipeline.index.data import ALL, KEYS, vectors

DAMAGES = [
    lambda d: d[:-1],
    lambda d: d[: len(d) // 2],
    lambda d: b"",
    lambda d: d[:50] + bytes([d[50] ^ 1]) + d[51:],
    lambda d: d + b"\0",
]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def written(index, path: UPath) -> IndexFile:
    size, digest = write_index(index, path)
    return IndexFile(
        path=path.name, modality="image", factory="x", count=1, bytes=size, sha256=digest, recall_at_1=0,
        recall_at_10=0, ms_per_query=0,
    )  # fmt: skip


@pytest.mark.parametrize("factory", ALL)
def test_mapped_or_read_the_same_is_found(tmp_path: Path, factory: str) -> None:
    rows, path = vectors(2000), UPath(tmp_path / "v1" / "image.faiss")
    index = build(KEYS, rows, factory)
    file = written(index, path)
    assert file.sha256 == sha256(path.read_bytes()) == sha256(to_bytes(index))
    assert [p.name for p in path.parent.iterdir()] == ["image.faiss"]
    expected = search(index, rows[:20], 5, {"nprobe": 2})
    for mapped in (True, False):
        opened = open_index(str(path), file, mapped=mapped)
        for a, b in zip(search(opened, rows[:20], 5, {"nprobe": 2}), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        path.touch()


def test_a_mapped_file_may_be_removed(tmp_path: Path) -> None:
    """Readers go on with the version that they opened, whatever becomes of its folder."""
    rows, path = vectors(2000), UPath(tmp_path / "image.faiss")
    opened = open_index(path, written(build(KEYS, rows, "IVF4,SQ8"), path))
    path.unlink()
    assert search(opened, rows[:5], 1, {"nprobe": 4})[1][:, 0].tolist() == KEYS[:5].tolist()


@pytest.mark.parametrize("change", DAMAGES)
def test_a_file_that_is_not_that_of_the_card(tmp_path: Path, change) -> None:
    path = UPath(tmp_path / "image.faiss")
    file = written(build(KEYS[:50], vectors(50), "IDMap,Flat"), path)
    path.write_bytes(change(path.read_bytes()))
    for mapped in (True, False):
        with pytest.raises(CardError, match=r"image\.faiss") as caught:
            open_index(path, file, mapped=mapped)
        assert "clipmill index --rebuild" in caught.value.remedy
    if len(path.read_bytes()) != file.bytes:
        with pytest.raises(CardError):
            open_index(path, file, verify=False)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    path = UPath(tmp_path / "image.faiss")
    file = written(build(KEYS[:50], vectors(50), "IDMap,Flat"), path)
    path.unlink()
    with pytest.raises(CardError, match="--rebuild"):
        open_index(path, file)


@pytest.mark.parametrize("change", DAMAGES)
def test_bytes_that_are_not_those_of_the_card(change) -> None:
    data = to_bytes(build(KEYS[:50], vectors(50), "IDMap,Flat"))
    assert from_bytes(data, sha256(data), "x").ntotal == 50
    with pytest.raises(CardError, match=r"image\.faiss"):
        from_bytes(change(data), sha256(data), "v1/image.faiss")


def test_no_index_at_all_though_the_digest_is_right(tmp_path: Path) -> None:
    path = UPath(tmp_path / "image.faiss")
    file = written(build(KEYS[:50], vectors(50), "IDMap,Flat"), path)
    path.write_bytes(b"nonsense" * 9)
    file = file.model_copy(update={"bytes": 72, "sha256": sha256(b"nonsense" * 9)})
    with pytest.raises(CardError, match="--rebuild"):
        open_index(path, file)


def test_the_digest_of_keys_knows_no_order() -> None:
    assert keys_sha256(KEYS) == keys_sha256(KEYS[::-1])
    assert keys_sha256(KEYS) != keys_sha256(KEYS[1:])
    assert keys_sha256(np.array([1])) == sha256(b"\1" + b"\0" * 7)


def test_the_digest_of_vectors_is_by_key() -> None:
    rows = vectors(100).astype(np.float16)
    order = np.random.default_rng(0).permutation(100)
    assert vectors_sha256(KEYS[:100], rows) == vectors_sha256(KEYS[:100][order], rows[order])
    assert vectors_sha256(KEYS[:100], rows) != vectors_sha256(KEYS[:100], rows[order])
