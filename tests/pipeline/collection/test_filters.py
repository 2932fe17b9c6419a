"""Filtered search against brute force: predicates of any selectivity, few and many matches, deleted keys."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import pipeline.collection.opened
from pipeline.collection import Collection
from pipeline.workspace import Workspace
from tests.pipeline.collection.indexed import publish, vectors

N, D = 4000, 16
EXACT, LISTS = "IDMap,SQfp16", "IVF32,SQ8"


class Case:
    """A published index, its columns in NumPy, and random predicates with the answers to them."""

    def __init__(self, folder: Path, factory: str, count: int = N, dim: int = D) -> None:
        rng = np.random.default_rng(1)
        self.workspace, self.factory = Workspace(folder / "ws"), factory
        self.keys = np.sort(rng.choice(2**62, count, replace=False))
        self.image = vectors(count, dim, clusters=40)
        self.score = rng.random(count).astype(np.float32)
        self.width = rng.integers(1, 2000, count).astype(np.int32)
        self.word = rng.choice(["cat", "Dog", "bird", "tree"], count, p=[0.6, 0.3, 0.09, 0.01])
        further = {"similarity": self.score, "width": self.width, "caption": [f"a {w} is here" for w in self.word]}
        both = {"image": self.image, "text": vectors(count, dim, 5)}
        publish(self.workspace, self.keys, both, factory=factory, further=further, search={"nprobe": 8})
        self.collection = Collection(self.workspace)

    def predicate(self, rng: np.random.Generator) -> tuple[str, NDArray[np.bool_]]:
        """A random one, with what it selects: 0.01% to 90% of the rows."""
        share = float(np.exp(rng.uniform(np.log(1e-4), np.log(0.9))))
        score = np.float32(np.quantile(self.score, 1 - share))
        first = int(share * len(self.keys))
        width = int(np.quantile(self.width, min(1.0, share * 3)))
        return [
            (f"similarity > {score:.9g}", self.score > score),
            (f"width <= {width} AND similarity >= 0.25", (self.width <= width) & (self.score >= np.float32(0.25))),
            (f"caption ILIKE '%dog%' AND width < {width}", (self.word == "Dog") & (self.width < width)),
            (f"caption = 'a tree is here' OR similarity > {score:.9g}", (self.word == "tree") | (self.score > score)),
            (f"NOT (similarity <= {score:.9g}) AND url IS NOT NULL", self.score > score),
            (f"pair_key < {self.keys[first]}", np.arange(len(self.keys)) < first),
        ][rng.integers(0, 6)]  # fmt: skip

    def check(self, seed: int) -> float:
        """One predicate, one to four queries; returns its selectivity."""
        rng = np.random.default_rng(seed)
        where, selected = self.predicate(rng)
        k = int(rng.choice([1, 5, 10, 50]))
        queries = self.image[rng.integers(0, len(self.keys), int(rng.integers(1, 5)))].astype(np.float32)
        queries += 0.3 * rng.normal(size=queries.shape).astype(np.float32)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        similarity, found = self.collection.search_vectors(queries, k, "image", where)
        selected = selected & ~np.isin(self.keys, self.collection.deleted)
        truth = queries @ self.image[selected].astype(np.float32).T  # [Q, M]
        expected = min(k, int(selected.sum()))
        assert ((found >= 0).sum(1) == expected).all(), f"{where}: {expected} of them exist"
        assert (found[:, expected:] == -1).all()
        own = np.searchsorted(self.keys, found[:, :expected])
        assert selected[own].all(), f"{where}: a result that it does not select"
        assert all(len(set(row)) == expected for row in found[:, :expected].tolist()), "one twice"
        exact = np.einsum("qd,qkd->qk", queries, self.image[own].astype(np.float32))
        np.testing.assert_allclose(similarity[:, :expected], exact, atol=1e-5)
        best = -np.sort(-truth, axis=1)[:, :expected]
        if self.factory == EXACT or selected.sum() <= pipeline.collection.opened.EXACT_UP_TO:
            np.testing.assert_allclose(similarity[:, :expected], best, atol=1e-5, err_msg=where)
        assert (np.diff(similarity[:, :expected], axis=1) <= 0).all()
        return float(selected.mean())


@pytest.fixture(scope="module", params=[EXACT, LISTS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("filters"), request.param)


@pytest.mark.parametrize("exact_up_to", [0, 300, 50_000])
def test_equals_brute_force(case: Case, exact_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 predicates over both kinds of index: sifted alone, some of both, compared one by one alone."""
    monkeypatch.setattr(pipeline.collection.opened, "EXACT_UP_TO", exact_up_to)
    shares = [case.check(seed) for seed in range(50)]
    assert min(shares) < 0.01 and max(shares) > 0.5


def test_widening_meets_matches_that_are_all_far_away(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60% of the rows none is near the query: fetched again and again, at last all are compared."""
    monkeypatch.setattr(pipeline.collection.opened, "EXACT_UP_TO", 0)
    query = case.image[:1].astype(np.float32)
    order = np.argsort(-(query @ case.image.astype(np.float32).T)[0])
    far = np.sort(case.keys[order[-int(0.6 * N) :]])
    case.collection._opened.records._kept["true"] = far  # no column tells of it
    _, found = case.collection.search_vectors(query, 20, "image", "true")
    case.collection._opened.records._kept.clear()
    case.collection._opened._matches.clear()
    truth = case.keys[order[-int(0.6 * N) :]][:20]
    assert set(found[0].tolist()) >= set(truth[:15].tolist()) and (found >= 0).all() and np.isin(found, far).all()


def test_deleted_keys_do_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.collection.opened, "EXACT_UP_TO", 200)
    case = Case(tmp_path, EXACT)
    rng = np.random.default_rng(3)
    for seed in range(40):
        if seed % 4 == 0:
            case.collection.delete(rng.choice(case.keys, 300))
        case.check(seed)
    assert len(case.collection.deleted) > 2000


def test_fewer_than_k_and_none(case: Case) -> None:
    query = case.image[:2].astype(np.float32)
    _, found = case.collection.search_vectors(query, 10, "image", f"pair_key = {case.keys[7]}")
    assert found[:, 0].tolist() == [case.keys[7]] * 2 and (found[:, 1:] == -1).all()
    _, found = case.collection.search_vectors(query, 10, "image", "width < 0")
    assert (found == -1).all()
    assert case.collection.search(vector=query[0], where="width < 0").rows() == []


def main() -> None:
    """``python -m tests.pipeline.collection.test_filters``: many predicates over more rows."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predicates", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=64)
    given = parser.parse_args()
    for factory in (EXACT, "IVF1024,SQ8"):
        with tempfile.TemporaryDirectory() as name:
            case = Case(Path(name), factory, given.rows, given.dim)
            shares = [case.check(seed) for seed in range(given.predicates)]
            sifted = sum(share * given.rows > pipeline.collection.opened.EXACT_UP_TO for share in shares)
            told = "equal brute force, too" if factory == EXACT else "k true matches each, as near as the lists give"
            print(
                f"{factory}: {len(shares)} predicates of {min(shares):.4%} to {max(shares):.1%} of {given.rows:,}: "
                f"{len(shares) - sifted} compared one by one equal brute force; {sifted} sifted: {told}",
                flush=True,
            )


if __name__ == "__main__":
    main()
