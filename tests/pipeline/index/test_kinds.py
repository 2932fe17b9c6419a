"""The choice of a kind, and whether the table's bytes are what FAISS takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.index import EXACT_UP_TO, build, choose, enough_memory, kind_of, read_keys, to_bytes
from pipeline.index.kinds import kinds, number_of_lists
from tests.pipeline.index.data import KEYS, vectors

SIZES = st.integers(1, 2_000_000_000)
DIMS = st.sampled_from([8, 64, 512, 768, 1024, 30, 7])


@given(SIZES, DIMS, st.floats(0.05, 1.0), st.one_of(st.none(), st.integers(1 << 10, 1 << 42)))
def test_from_the_fastest_to_the_most_exact(count: int, dim: int, target: float, memory: int | None) -> None:
    chosen = choose(count, dim, target, memory)
    every = kinds(count, dim)
    assert all(memory is None or kind.bytes(count, dim) <= memory for kind in chosen)
    recalls = [kind.recall for kind in chosen]
    assert recalls == sorted(set(recalls))
    if memory is None:
        assert chosen[-1].recall == 1.0, "in the end exact search reaches any target"
    if chosen and count > EXACT_UP_TO:
        able = [k for k in every if k.recall >= target and (memory is None or k.bytes(count, dim) <= memory)]
        assert not able or chosen[0].ms == min(k.ms for k in able)
    if not chosen:
        assert memory is not None and memory < min(k.bytes(count, dim) for k in every)


@given(SIZES, DIMS, st.floats(0.05, 1.0), st.integers(1 << 10, 1 << 42))
def test_the_memory_that_would_do(count: int, dim: int, target: float, memory: int) -> None:
    enough = enough_memory(count, dim, target, memory)
    if enough is not None:
        assert enough > memory
        assert choose(count, dim, target, enough)[-1].recall >= target


@pytest.mark.parametrize("count", [1, 100, EXACT_UP_TO])
def test_few_vectors_are_searched_exactly(count: int) -> None:
    assert [kind.factory for kind in choose(count, 512, 0.5)] == ["IDMap,SQfp16"]


def test_a_tight_budget_takes_smaller_codes() -> None:
    count, dim = 1_000_000, 512
    sizes = [
        choose(count, dim, 0.9 if memory > 200 << 20 else 0.7, memory)[0].bytes(count, dim)
        for memory in (10 << 30, 400 << 20, 150 << 20)
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert choose(count, dim, 0.5, 10 << 20) == []
    assert len(choose(count, dim, 0.999, 400 << 20)) == 1, "none can: the best that fits is tried"


def test_a_rotation_needs_dimensions_enough() -> None:
    assert [kind.name for kind in ROTATED] == ["PCAR120,IVF,RaBitQ4"]
    assert not any("PCAR" in kind.factory for kind in kinds(2_000, 64))


def test_very_many_lists_are_found_through_a_graph() -> None:
    assert "_HNSW32" in choose(500_000_000, 512, 0.9)[0].factory
    assert "_HNSW32" not in choose(1_000_000, 512, 0.9)[0].factory


ROTATED = [kind for kind in kinds(2_000, 128) if "PCAR" in kind.factory]


@pytest.mark.parametrize(
    ("kind", "dim"), [*((k, 64) for k in kinds(2_000, 64)), *((k, 128) for k in ROTATED)], ids=lambda x: str(x)[9:40]
)
def test_the_formula_gives_the_bytes(kind, dim: int) -> None:
    """What a further vector takes, and the whole: against files of FAISS."""
    rows = np.concatenate([vectors(2000, dim, seed) for seed in range(4)])
    keys = np.arange(len(rows))
    small, large = (len(to_bytes(build(keys[:n], rows[:n], kind.factory))) for n in (4000, 8000))
    assert (large - small) / 4000 == pytest.approx(kind.vector, rel=0.08)
    assert kind.bytes(8000, dim) == pytest.approx(large, rel=0.15)
    assert kind.bytes(8000, dim) >= 0.97 * large, "not much more than the memory that was allowed"


@pytest.mark.parametrize("count", [100_000, 10**9])
def test_every_chosen_factory_holds_keys(count: int) -> None:
    """The kinds for so many vectors, with few lists, over few vectors: each keeps its keys."""
    for kind in kinds(count, 16):
        start, _, end = kind.factory.partition("IVF")
        graph = "_HNSW32" if "_HNSW32" in end else ""
        small = f"{start}IVF4{graph},{end.partition(',')[2]}" if end else kind.factory
        assert sorted(read_keys(build(KEYS, vectors(2000), small)).tolist()) == sorted(KEYS.tolist())


def test_an_index_that_grows_stays_of_its_kind() -> None:
    for small, large in zip(kinds(10_000, 64), kinds(900_000_000, 64), strict=True):
        assert small.name == large.name == kind_of(large.factory)
    assert kind_of("IDMap2,IVF16_HNSW32,PQ8x4fsr,Refine(SQ8)") == kind_of("IDMap,IVF512,PQ8x4fsr,Refine(SQ8)")
    assert len({kind.name for kind in kinds(10_000, 64)}) == len(kinds(10_000, 64))
    assert number_of_lists(1) >= 1 and number_of_lists(10**12) <= 2**20
