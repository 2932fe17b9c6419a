"""Publishing, going back and clearing up: what is published is whole at every moment."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upath import UPath

from pipeline.index import versions
from pipeline.index.versions import chain, discard, publish, published, rollback, vacuum
from schemas.cards import IndexCard, IndexFile, Segment
from schemas.errors import CardError, UsageError
from tests.schemas.test_cards import encoder


def card(version: str, segments: tuple[str, ...] = (), previous: str | None = None) -> IndexCard:
    file = IndexFile(
        path="image.faiss", modality="image", factory="IDMap,Flat", count=1, bytes=1, sha256="0", recall_at_1=1,
        recall_at_10=1, ms_per_query=1,
    )  # fmt: skip
    return IndexCard(
        encoder=encoder(), version=version, count=1, keys_sha256="0", table_version=1, files=(file,), run=version,
        segments=tuple(Segment(path=f"records/{s}.arrow", rows=1, bytes=1, sha256="0") for s in segments),
        previous=previous,
    )  # fmt: skip


def put(folder: UPath, version: str, *segments: str) -> IndexCard:
    """Publish a version after the present one, with the segments that it names."""
    before = published(folder)
    (folder / version).mkdir(parents=True)
    (folder / version / "image.faiss").write_bytes(b"x")
    (folder / "records").mkdir(exist_ok=True)
    for name in segments:
        (folder / "records" / f"{name}.arrow").touch()
    made = card(version, segments, before.version if before else None)
    publish(folder, made)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> UPath:
    return UPath(tmp_path / "indices" / "e")


def test_published_and_taken_back(folder: UPath) -> None:
    assert published(folder) is None
    with pytest.raises(UsageError, match="go back"):
        rollback(folder)
    first = put(folder, "v1", "a")
    with pytest.raises(UsageError, match="v1 is the first one"):
        rollback(folder)
    second, third = put(folder, "v2", "a", "b"), put(folder, "v3", "c")
    assert published(folder) == third and chain(folder) == [third, second, first]
    assert rollback(folder) == second == published(folder)
    assert rollback(folder) == first == published(folder)
    with pytest.raises(UsageError):
        rollback(folder)
    assert published(folder) == first


@pytest.mark.parametrize("lost", ["v1/card.json", "v1/image.faiss", "records/a.arrow"])
def test_no_way_back_to_what_was_removed(folder: UPath, lost: str) -> None:
    put(folder, "v1", "a")
    second = put(folder, "v2", "b")
    (folder / lost).unlink()
    with pytest.raises(UsageError, match=r"removed|no longer whole"):
        rollback(folder)
    assert published(folder) == second


def test_a_version_that_is_not_there_or_damaged(folder: UPath) -> None:
    put(folder, "v1")
    (folder / "CURRENT").write_text("v9")
    with pytest.raises(CardError, match="not there"):
        published(folder)
    (folder / "CURRENT").write_text("v1")
    (folder / "v1" / "card.json").write_text("{")
    with pytest.raises(CardError, match=r"card\.json"):
        published(folder)
    assert vacuum(folder, 1) == [], "nothing is removed while it is not known what is needed"


def test_what_is_no_longer_needed_is_removed(folder: UPath) -> None:
    for n in range(1, 6):
        put(folder, f"v{n}", f"s{n - 1}", f"s{n}")
    (folder / "deleted").mkdir()
    (folder / "deleted" / "1.npy").touch()
    (folder / "killed").mkdir()
    (folder / "killed" / "image.faiss").touch()
    (folder / "records" / "killed.arrow").touch()
    (folder / "writing").mkdir()
    (folder / "records" / "writing.arrow").touch()
    aside = folder / ".CURRENT.123"
    aside.touch()
    removed = vacuum(folder, 2, busy={"writing"})
    assert removed == [
        "killed", "v1", "v2", "v3", "records/killed.arrow", "records/s0.arrow", "records/s1.arrow", "records/s2.arrow",
    ]  # fmt: skip
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [".CURRENT.123", "CURRENT", "deleted", "records", "v4", "v5", "writing"]
    )
    assert [c.version for c in chain(folder)] == ["v5", "v4"]
    assert (folder / "deleted" / "1.npy").exists()
    os.utime(str(aside), (0, time.time() - 4000))
    assert vacuum(folder, 2) == [".CURRENT.123", "writing", "records/writing.arrow"]
    assert rollback(folder).version == "v4"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["publish", "back", "vacuum"]), max_size=12), st.integers(1, 3))
def test_whatever_is_done_the_published_version_is_whole(tmp_path_factory, steps: list[str], keep: int) -> None:
    folder = UPath(tmp_path_factory.mktemp("indices"))
    put(folder, "v0", "s0")
    for n, step in enumerate(steps, 1):
        if step == "publish":
            put(folder, f"v{n}", f"s{n - 1}", f"s{n}")
        elif step == "vacuum":
            vacuum(folder, keep)
        else:
            try:
                rollback(folder)
            except UsageError:
                continue
        now = published(folder)
        assert now is not None and (folder / now.version / "image.faiss").exists()
        assert all((folder / s.path).exists() for s in now.segments)


def test_a_version_that_is_not_published_is_discarded(folder: UPath) -> None:
    put(folder, "v1", "v1")
    (folder / "v2" / "shards").mkdir(parents=True)
    (folder / "v2" / "shards" / "x").touch()
    (folder / "records" / "v2.arrow").touch()
    discard(folder, "v2")
    discard(folder, "v1")
    discard(folder, "never-there")
    assert sorted(p.name for p in folder.iterdir()) == ["CURRENT", "records", "v1"]
    assert [p.name for p in (folder / "records").iterdir()] == ["v1.arrow"]


def test_killed_between_card_and_current(folder: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    first = put(folder, "v1", "a")
    real = versions.write_atomic

    def dies(path: UPath, data: bytes) -> None:
        if path.name == "CURRENT":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(versions, "write_atomic", dies)
    with pytest.raises(KeyboardInterrupt):
        put(folder, "v2", "b")
    assert published(folder) == first
    assert vacuum(folder, 3) == ["v2", "records/b.arrow"]
