"""Index: vectors with their keys -> a FAISS index of measured recall; and searching it.

Vectors are unit-norm, so the inner product is the cosine similarity. FAISS ids are pair_keys.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from schemas.errors import CardError, ClipmillError

EXACT_UP_TO = 50_000
_SCALAR_UP_TO = 2_000_000
_REFINE = 10
"""A refined index scores this many times k candidates again."""

_HASHED = 65_536
"""Vectors hashed at once."""

_PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

Keys = NDArray[np.int64]
Vectors = NDArray[np.floating]


@dataclass(frozen=True)
class Measured:
    """An index with what was measured on it."""

    index: faiss.Index
    factory: str
    search: dict[str, int]
    recall_at_1: float
    recall_at_10: float
    ms_per_query: float


def choose_factory(count: int, dim: int) -> str:
    """Exact while that is quick; then inverted lists with 8-bit scalars; then 4-bit codes, refined with 8 bits.

    200,000 x 512, one thread: SQ8 lists reach recall@10 0.975 at 2.9 ms, refined codes 0.974 at 0.21 ms.
    """
    if count <= EXACT_UP_TO:
        return "IDMap2,Flat"
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    if count <= _SCALAR_UP_TO or dim % 4:
        return f"IVF{lists},SQ8"
    # A refined index numbers its vectors by itself: the keys need a map around it.
    return f"IDMap2,IVF{lists},PQ{dim // 4}x4fsr,Refine(SQ8)"


def build(keys: Keys, vectors: Vectors, factory: str, train_per_list: int = 256) -> faiss.Index:
    """Train on a sample, then add all: keys int64[N], unit-norm vectors [N, D].

    Raises:
        ClipmillError: FAISS knows no such factory, or it needs more vectors to train.
    """
    rows = np.ascontiguousarray(vectors, dtype=np.float32)  # [N, D]
    try:
        index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            lists = getattr(faiss.extract_index_ivf(index), "nlist", 1000) if "IVF" in factory else 1000
            rng = np.random.default_rng(0)
            sample = rng.permutation(len(rows))[: lists * train_per_list]
            index.train(rows[np.sort(sample)])
        index.add_with_ids(rows, np.ascontiguousarray(keys, dtype=np.int64))
    except RuntimeError as exc:
        raise ClipmillError(
            f"FAISS cannot build {factory!r} over {len(rows)} vectors of {rows.shape[1]} dimensions",
            actual=str(exc).strip().splitlines()[-1],
            remedy="use --factory auto, or one that fits so few vectors",
        ) from exc
    return index


def add(index: faiss.Index, keys: Keys, vectors: Vectors) -> None:
    """Add more vectors to a trained index, in place."""
    index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(keys, np.int64))


def search(
    index: faiss.Index,
    queries: Vectors,
    k: int,
    parameters: dict[str, int] | None = None,
    only: Keys | None = None,
) -> tuple[NDArray[np.float32], Keys]:
    """The k best of each query [Q, D]: similarities float32 [Q, k] and keys int64 [Q, k], -1 where there are fewer.

    ``only`` restricts the search to these keys.
    """
    rows = np.ascontiguousarray(queries, dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] != index.d:
        raise ClipmillError(
            "a query has another dimension than the index", expected=f"D={index.d}", actual=str(rows.shape)
        )
    selector = faiss.IDSelectorBatch(np.ascontiguousarray(only, np.int64)) if only is not None else None
    similarity, keys = index.search(rows, k, params=_search_parameters(index, parameters or {}, selector))
    return similarity, keys


def _search_parameters(index: Any, parameters: dict[str, int], selector: Any) -> Any:
    """FAISS's search parameters for an index, through the layers around its lists: keys, rotation, refinement."""
    fs: Any = faiss  # its stubs know no keyword arguments
    options: dict[str, Any] = {"sel": selector} if selector is not None else {}
    index = faiss.downcast_index(index)
    if isinstance(index, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        inner = faiss.downcast_index(index.index)
        if selector is not None and isinstance(inner, (faiss.IndexPreTransform, faiss.IndexRefine)):
            # The map translates keys into positions in the outermost parameters alone.
            selector = fs.IDSelectorTranslated(index.id_map, selector)
        return _search_parameters(inner, parameters, selector)
    if isinstance(index, faiss.IndexPreTransform):
        inner = _search_parameters(index.index, parameters, selector)
        return fs.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = _search_parameters(index.base_index, parameters, selector)
        return fs.IndexRefineSearchParameters(k_factor=_REFINE, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return fs.SearchParametersIVF(nprobe=parameters.get("nprobe", 1), **options)
    return fs.SearchParameters(**options) if options else None


def _lists(index: Any) -> int:
    """Number of inverted lists, 1 for an index without."""
    try:
        return int(faiss.extract_index_ivf(index).nlist)
    except RuntimeError:
        return 1


def measure(
    index: faiss.Index, factory: str, keys: Keys, vectors: Vectors, queries: Vectors, target: float
) -> Measured:
    """Tune the search to ``target`` recall@10, measured on held-out queries [Q, D] against exact search."""
    exact = build(keys, vectors, "IDMap2,Flat") if factory != "IDMap2,Flat" else index
    _, truth = search(exact, queries, 10)  # [Q, 10]
    result = Measured(index, factory, {}, 0.0, 0.0, 0.0)
    nlist = _lists(index)
    for probes in [p for p in _PROBES if p <= nlist] or [1]:
        parameters = {"nprobe": probes} if nlist > 1 else {}
        _, found = search(index, queries, 10, parameters)
        result = replace(
            result,
            search=parameters,
            recall_at_1=float((found[:, 0] == truth[:, 0]).mean()),
            recall_at_10=recall(found, truth),
        )
        if result.recall_at_10 >= target:
            break
    return replace(result, ms_per_query=latency(index, queries[:100], result.search))


def recall(found: Keys, truth: Keys) -> float:
    """Share of the true neighbours [Q, k] that were found [Q, k]."""
    hits = [len(set(f[f >= 0]) & set(t[t >= 0])) for f, t in zip(found, truth, strict=True)]
    return float(sum(hits) / max((truth >= 0).sum(), 1))


def latency(index: faiss.Index, queries: Vectors, parameters: dict[str, int]) -> float:
    """Median milliseconds of one query on one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        seconds = []
        for query in queries:
            start = time.perf_counter()
            search(index, query[None], 10, parameters)
            seconds.append(time.perf_counter() - start)
    finally:
        faiss.omp_set_num_threads(threads)
    return float(np.median(seconds) * 1e3)


def read_keys(index: Any) -> Keys:
    """All keys in an index, int64[N]."""
    if hasattr(index, "id_map"):
        return np.asarray(faiss.vector_to_array(index.id_map), dtype=np.int64)
    lists: Any = faiss.extract_index_ivf(index).invlists
    parts = [faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).copy() for i in range(lists.nlist)]
    return np.concatenate(parts).astype(np.int64)


def to_bytes(index: faiss.Index) -> bytes:
    return bytes(faiss.serialize_index(index).tobytes())


def from_bytes(data: bytes, sha256: str, where: str) -> faiss.Index:
    """Raises CardError unless the bytes are those that the card describes."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CardError(
            f"{where} is not the index that its card describes (truncated or changed)",
            remedy="build it again: clipmill index --rebuild",
        )
    return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))


def keys_sha256(keys: Keys) -> str:
    """Over the sorted keys."""
    return hashlib.sha256(np.sort(np.asarray(keys, dtype="<i8")).tobytes()).hexdigest()


def vectors_sha256(keys: Keys, *vectors: Vectors) -> str:
    """Over vectors [N, D] of each kind, in the order of their keys [N]."""
    order, digest = np.argsort(keys), hashlib.sha256()
    for rows in vectors:
        for start in range(0, len(order), _HASHED):
            digest.update(rows[order[start : start + _HASHED]].tobytes())
    return digest.hexdigest()
