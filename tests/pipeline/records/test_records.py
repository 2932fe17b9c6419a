"""Records: what is written is found by key, the newest row of a key counts, damage is told of."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from upath import UPath

from pipeline.records import Records, compact, gone_batch, write_segment
from schemas.cards import Segment
from schemas.errors import CardError, NothingToDo, UsageError
from schemas.records import records_schema
from schemas.vectors import normalise

D = 4


def vector(key: int, modality: str, generation: int = 0) -> NDArray[np.float16]:
    """Made of what it belongs to: another one's would be noticed."""
    seed = [key, generation, modality == "image"]
    return normalise(np.random.default_rng(seed).normal(size=(1, D)))[0].astype("<f2")


def rows(keys: list[int], generation: int = 0, without: str = "", further: bool = False) -> pa.RecordBatch:
    """Records of keys; those divisible by 3 have no vector of the modality ``without``."""
    schema = records_schema(D, pa.schema([("score_x", pa.float32())]) if further else None)
    columns = {
        "pair_key": keys, "caption": [f"pair {k} of {generation}" for k in keys], "url": [f"u{k}" for k in keys],
        "width": [k % 100 for k in keys], "height": [generation] * len(keys), "similarity": [k / 1000 for k in keys],
        "score_x": [k * 2.0 for k in keys], "file": [None] * len(keys),
    }  # fmt: skip
    for modality in ("image", "text"):
        lacks = [modality == without and k % 3 == 0 for k in keys]
        columns[f"{modality}_vec"] = [
            None if no else vector(k, modality, generation).tobytes() for k, no in zip(keys, lacks, strict=True)
        ]
    return pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def opened(folder: Path, *segments: list[pa.RecordBatch]) -> tuple[Records, list[Segment]]:
    written = [write_segment(UPath(folder), iter(batches), f"s{i}") for i, batches in enumerate(segments)]
    return Records.open(UPath(folder), written), written


def test_by_key_in_the_order_asked_for(tmp_path: Path) -> None:
    records, [segment] = opened(tmp_path, [rows([7, 3, 9]), rows([5, 1])])
    assert (segment.rows, segment.path) == (5, "records/s0.arrow")
    assert records.keys.tolist() == [1, 3, 5, 7, 9] and len(records) == 5 and records.dim == D
    assert records.columns == ["pair_key", "caption", "url", "width", "height", "similarity"]
    asked = np.array([5, 9, 3, 5])
    assert records.take(asked, ["pair_key", "caption"]).to_pylist() == [
        {"pair_key": k, "caption": f"pair {k} of 0"} for k in (5, 9, 3, 5)
    ]
    for modality in ("image", "text"):
        found = records.vectors(asked, modality)
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, [vector(k, modality) for k in (5, 9, 3, 5)])
    assert records.known(np.array([1, 2, 9, -1])).tolist() == [True, False, True, False]
    assert records.take(np.array([], np.int64)).num_rows == 0 and records.vectors(np.array([]), "text").shape == (0, D)


def test_what_is_not_there(tmp_path: Path) -> None:
    records, _ = opened(tmp_path, [rows([1, 2, 3], without="text")])
    with pytest.raises(UsageError, match="there is no pair 4"):
        records.take(np.array([1, 4]))
    with pytest.raises(UsageError, match="the pair 3 has no text vector"):
        records.vectors(np.array([1, 3]), "text")
    with pytest.raises(UsageError, match="no such columns"):
        records.take(np.array([1]), ["nowhere"])
    assert records.has("image").tolist() == [1, 2, 3] and records.has("text").tolist() == [1, 2]
    with pytest.raises(NothingToDo):
        write_segment(UPath(tmp_path), iter([]), "empty")


def test_the_newest_row_of_a_key_counts_and_gone_ones_are_gone(tmp_path: Path) -> None:
    records, segments = opened(
        tmp_path, [rows([1, 2, 3, 4, 6])], [rows([2, 6, 7], generation=1, further=True)], [gone_batch(np.array([4]), D)]
    )
    assert records.keys.tolist() == [1, 2, 3, 6, 7]
    generations = {1: 0, 2: 1, 3: 0, 6: 1, 7: 1}
    assert records.take(records.keys, ["height"])["height"].to_pylist() == list(generations.values())
    np.testing.assert_array_equal(
        records.vectors(records.keys, "image"), [vector(k, "image", g) for k, g in generations.items()]
    )
    assert records.take(np.array([1, 7]), ["score_x"])["score_x"].to_pylist() == [None, 14.0]
    # 2 and 6 matched before they were replaced, 4 before it was gone
    assert records.matching("height = 0").tolist() == [1, 3]
    assert records.matching("true").tolist() == [1, 2, 3, 6, 7]
    assert not records.known(np.array([4]))[0]

    one = compact(UPath(tmp_path), segments, "one", without=np.array([3]))
    after = Records.open(UPath(tmp_path), [one])
    assert one.rows == 4 and after.keys.tolist() == [1, 2, 6, 7] and after.columns == records.columns
    assert after.take(after.keys).equals(records.take(after.keys))
    np.testing.assert_array_equal(after.vectors(after.keys, "text"), records.vectors(after.keys, "text"))


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), min_size=1, max_size=4),
    gone=st.sets(st.integers(0, 30), max_size=5),
)
def test_any_segments(parts: list[list[int]], gone: set[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against a dictionary that is filled in the same order."""
    folder = tmp_path_factory.mktemp("r")
    records, segments = opened(
        folder, *([rows(keys, g)] for g, keys in enumerate(parts)), [gone_batch(np.array(sorted(gone), np.int64), D)]
    )
    expected = {key: g for g, keys in enumerate(parts) for key in keys if key not in gone}
    assert records.keys.tolist() == sorted(expected)
    for some in (
        records,
        Records.open(UPath(folder), [compact(UPath(folder), segments, "c")]) if expected else records,
    ):
        assert dict(zip(some.keys.tolist(), some.take(some.keys)["height"].to_pylist(), strict=True)) == expected
        asked = np.random.default_rng(0).permutation(some.keys)
        found = some.vectors(asked, "image")
        assert all((found[i] == vector(k, "image", expected[k])).all() for i, k in enumerate(asked.tolist()))
        odd = [k for k, g in expected.items() if g % 2 and k % 100 > 5]
        assert some.matching("height % 2 = 1 AND width > 5").tolist() == sorted(odd)


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "longer"])
def test_damage(damage: str, tmp_path: Path) -> None:
    _, segments = opened(tmp_path, [rows([1, 2])], [rows([3])])
    file = tmp_path / segments[1].path
    data = file.read_bytes()
    middle = len(data) // 2
    changed = {"truncated": data[:-9], "longer": data + b"x", "missing": b"",
               "changed": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]}[damage]  # fmt: skip
    file.unlink() if damage == "missing" else file.write_bytes(changed)
    with pytest.raises(CardError, match=r"s1\.arrow"):
        Records.open(UPath(tmp_path), segments)


def test_without_segments(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="no records"):
        Records.open(UPath(tmp_path), [])


def test_the_map_ends_with_the_last_reader(tmp_path: Path) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    records, _ = opened(tmp_path, [rows(list(range(500)))])
    kept = records.vectors(np.array([1]), "image")  # a copy
    assert maps() > 0
    del records
    assert maps() == 0 and (kept[0] == vector(1, "image")).all()


def test_from_an_object_store_by_way_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = UPath("memory://bucket/indices/e")
    segment = write_segment(folder, iter([rows([1, 2])]), "s")
    for _ in range(2):  # the second time from the copy
        assert Records.open(folder, [segment]).take(np.array([2]))["caption"].to_pylist() == ["pair 2 of 0"]
    [copy] = (tmp_path / "clipmill" / "records").iterdir()
    copy.write_bytes(b"x" * segment.bytes)
    with pytest.raises(CardError, match="sha256"):
        Records.open(folder, [segment])


@pytest.mark.parametrize(
    "predicate",
    [
        "length(repeat(caption, 1000000000)) > 1", "caption || caption = ''", "list_value(1) IS NOT NULL",
        "width = (SELECT count(*) FROM range(10))", "EXISTS (SELECT * FROM information_schema.tables)",
        "EXISTS (SELECT * FROM duckdb_settings())", "getvariable('x') IS NULL", "current_setting('threads') > '0'",
        "EXISTS (SELECT * FROM records)", "EXISTS (SELECT * FROM read_text('/etc/hostname'))", "image_vec IS NOT NULL",
        "file IS NULL", "caption = '\x00'", "caption = '\ud800'", "", "width >", "1; DROP TABLE pairs", "true) --",
    ],
)  # fmt: skip
def test_no_predicates(predicate: str, tmp_path: Path) -> None:
    records, _ = opened(tmp_path, [rows([1, 2])])
    with pytest.raises(UsageError, match="--where"):
        records.matching(predicate)


def test_predicates_over_text(tmp_path: Path) -> None:
    """Comparisons, which are pushed down into Arrow, with and without rows that do not count."""
    for segments in ([[rows(list(range(20)))]], [[rows(list(range(20)))], [rows([20])]], [[rows(list(range(21)))]] * 2):
        records, _ = opened(tmp_path, *segments)
        for predicate, expected in (
            ("caption = 'pair 7 of 0'", [7]),
            ("caption >= 'pair 8' AND caption < 'pair 9'", [8]),
            ("caption IN ('pair 3 of 0', 'pair 1 of 0', 'x')", [1, 3]),
            ("caption ILIKE '%PAIR 12%' OR url = 'u4'", [4, 12]),
            ("similarity > 0.0165 AND pair_key < 20", [17, 18, 19]),
            ("width = (SELECT max(width) FROM pairs WHERE pair_key < 20)", [19]),
            ("regexp_matches(caption, '^pair 1[45] ')", [14, 15]),
        ):
            assert records.matching(predicate).tolist() == expected, predicate
            assert records.matching(predicate) is records.matching(predicate), "remembered"


def test_a_predicate_that_takes_too_long(tmp_path: Path) -> None:
    records, _ = opened(tmp_path, [rows(list(range(3000)))])
    slow = "width < (SELECT count(*) FROM pairs a, pairs b, pairs c WHERE a.width + b.width * c.width > 7)"
    with pytest.raises(UsageError, match="longer than"):
        records.matching(slow, seconds=0.3)
    assert len(records.matching("width >= 0")) == 3000, "the next one is not the worse for it"


def test_threads(tmp_path: Path) -> None:
    records, _ = opened(tmp_path, [rows(list(range(0, 400, 2)))], [rows(list(range(1, 400, 2)), generation=1)])
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            keys = rng.integers(0, 400, 10)
            table = records.take(keys)
            if table["pair_key"].to_pylist() != keys.tolist() or table["height"].to_pylist() != (keys % 2).tolist():
                wrong.append(keys)
            least = int(rng.integers(0, 5))
            if len(records.matching(f"pair_key >= {80 * least}")) != 400 - 80 * least:
                wrong.append(least)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
