"""Tombstones: seen by every reader at once, kept for good, never lost in silence."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from upath import UPath

from pipeline.tombstones import Tombstones
from schemas.errors import UsageError, WorkspaceError


def test_another_reader_sees_it_at_once_and_the_array_stays_the_same_while_nothing_changes(tmp_path: Path) -> None:
    writer, reader = Tombstones(UPath(tmp_path / "d")), Tombstones(UPath(tmp_path / "d"))
    assert reader.keys().tolist() == [] and reader.count == 0 and not (tmp_path / "d").exists()
    writer.add([5, 3])
    assert reader.keys().tolist() == writer.keys().tolist() == [3, 5]
    writer.add(np.array([2**62, 3]))
    assert reader.keys().tolist() == [3, 5, 2**62] and reader.count == 3
    assert reader.keys() is reader.keys()
    with pytest.raises(ValueError, match="read-only"):
        reader.keys()[0] = 1


def test_two_deletions_within_one_tick_of_the_clock(tmp_path: Path) -> None:
    """The folder's time of change is put back to what it was: as where the clock has not moved on."""
    writer, reader = Tombstones(UPath(tmp_path)), Tombstones(UPath(tmp_path))
    writer.add([1])
    tick = tmp_path.stat()
    assert reader.keys().tolist() == [1]
    writer.add([2])
    os.utime(tmp_path, ns=(tick.st_atime_ns, tick.st_mtime_ns))
    assert reader.keys().tolist() == [1, 2]


def test_a_settled_folder_is_not_listed_again(tmp_path: Path) -> None:
    writer, reader = Tombstones(UPath(tmp_path)), Tombstones(UPath(tmp_path))
    writer.add([1])
    long_ago = 10**18
    os.utime(tmp_path, ns=(long_ago, long_ago))
    assert reader.keys().tolist() == [1]
    writer.add([2])
    os.utime(tmp_path, ns=(long_ago, long_ago))  # never so on a real clock: it only shows what is looked at
    assert reader.keys().tolist() == [1]
    os.utime(tmp_path)
    assert reader.keys().tolist() == [1, 2]


def test_many_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: Tombstones(UPath(tmp_path)).add(range(n, n + 3)), range(0, 60, 2)))
    assert Tombstones(UPath(tmp_path)).keys().tolist() == list(range(61))


@pytest.mark.parametrize("keys", [[-1], [1.5], ["a"], [[1, 2]], [2**63]])
def test_no_keys(keys: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no keys"):
        Tombstones(UPath(tmp_path / "d")).add(keys)  # type: ignore[arg-type]
    Tombstones(UPath(tmp_path / "d")).add([])
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_damaged_file_is_an_error_not_nothing(damage: bytes | None, tmp_path: Path) -> None:
    Tombstones(UPath(tmp_path)).add([1])
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3] if damage is None else damage)
    with pytest.raises(WorkspaceError, match=file.name):
        Tombstones(UPath(tmp_path)).keys()


def test_what_is_no_list_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".x.npy").write_bytes(b"half written")
    (tmp_path / "README").write_bytes(b"")
    assert Tombstones(UPath(tmp_path)).keys().tolist() == []


def test_in_an_object_store() -> None:
    folder = UPath("memory://tombstones/deleted")
    writer = Tombstones(folder)
    writer.add([4, 2])
    assert writer.keys().tolist() == Tombstones(folder).keys().tolist() == [2, 4]
