"""Building a FAISS index: trained on a sample, filled in blocks, merged from shards, and taken from again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.keys import Keys
from schemas.errors import ClipmillError

Vectors = NDArray[np.floating]

BLOCK = 32_768
"""Vectors turned into float32 at once."""
_PER_LIST = 64
_UNLISTED = 65_536
_SAMPLE_BYTES = 4 << 30
_ITERATIONS = 10
_SEED = 1234
_DEVIATIONS = 3.0
"""How far from its mean a number of four bits reaches, in standard deviations."""
_HIDDEN: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""How many vectors of an index are tombstones, where that was counted."""


def build(keys: Keys, vectors: Vectors, factory: str) -> faiss.Index:
    """Train on a sample, then add all: keys int64 [N], unit-norm vectors [N, D], float32 or float16.

    Raises:
        ClipmillError: FAISS knows no such factory, or it needs more vectors to train.
    """
    keys, vectors = np.asarray(keys), np.asarray(vectors)
    chosen = np.sort(sample(len(keys), sample_size(factory, vectors.shape[1])))
    index = train(vectors[chosen], factory)
    add(index, keys, vectors)
    return index


def train(vectors: Vectors, factory: str) -> faiss.Index:
    """An empty index whose lists and codes are made from these vectors [S, D], a sample of those to come.

    k-means runs on the GPUs where FAISS sees one; its centroids are unit-norm, as the metric is the inner product.

    Raises:
        ClipmillError: FAISS knows no such factory, or it needs more vectors to train.
    """
    rows = np.ascontiguousarray(vectors, dtype=np.float32)  # [S, D]
    try:
        index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        _prepare(index)
        _train_transforms(index, rows)
        if not index.is_trained:
            index.train(rows)
    except RuntimeError as exc:
        raise ClipmillError(
            f"FAISS cannot build {factory!r} over {len(rows)} vectors of {rows.shape[1]} dimensions",
            actual=str(exc).strip().splitlines()[-1],
            remedy="use --factory auto, or one that fits so few vectors",
        ) from exc
    return index


def sample_size(factory: str, dim: int) -> int:
    """How many vectors to train on: some for each list, as far as 4 GiB of float32 go; 0: nothing is trained."""
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:  # training will say so
        return 1
    if index.is_trained:
        return 0
    lists = _lists_of(index)
    wanted = max(_PER_LIST * lists, _UNLISTED if lists == 1 else 4096)
    return max(min(wanted, _SAMPLE_BYTES // (4 * dim)), lists)


def sample(count: int, size: int) -> Keys:
    """Places of a seeded sample among ``count``, without repetition, in no order."""
    rng = np.random.default_rng(_SEED)
    return np.asarray(rng.choice(count, min(size, count), replace=False, shuffle=False), np.int64)


def add(index: faiss.Index, keys: Keys, vectors: Vectors) -> None:
    """Add vectors [N, D] with their keys [N] to a trained index, in place, a block at a time."""
    for start in range(0, len(keys), BLOCK):
        some = slice(start, start + BLOCK)
        rows = np.ascontiguousarray(vectors[some], np.float32)
        index.add_with_ids(rows, np.ascontiguousarray(keys[some], np.int64))


def fill(index: faiss.Index, batches: Iterable[tuple[Keys, Vectors]]) -> None:
    """Add what comes in batches of keys and vectors, in place."""
    for keys, vectors in batches:
        add(index, keys, vectors)


def merge(index: Any, other: Any) -> None:
    """Put what ``other`` holds behind what ``index`` holds, in place; ``other`` is empty after it.

    Both are filled copies of one trained index: the result is the one that adding everything to one of them gives.
    """
    # Views, which do not own what is inside: index and other do.
    ours: Any = faiss.downcast_index(index)
    theirs: Any = faiss.downcast_index(other)
    if isinstance(ours, faiss.IndexIDMap):
        ids = np.concatenate([_id_map(ours), _id_map(theirs)])
        _merge_positions(faiss.downcast_index(ours.index), faiss.downcast_index(theirs.index))
        _set_id_map(ours, ids)
        ours.ntotal = ours.index.ntotal
        theirs.ntotal = 0
        _HIDDEN.pop(index, None)
    else:
        ours.merge_from(theirs, 0)


def _merge_positions(index: Any, other: Any) -> None:
    """Merge indices that number their vectors by position."""
    if isinstance(index, faiss.IndexRefine):
        for part in ("base_index", "refine_index"):
            _merge_positions(faiss.downcast_index(getattr(index, part)), faiss.downcast_index(getattr(other, part)))
        index.ntotal = index.refine_index.ntotal
        other.ntotal = 0
    else:
        # Lists hold numbers, which have to be those behind ours; flat codes have them by their places.
        index.merge_from(other, index.ntotal if _has_lists(index) else 0)


def remove(index: Any, keys: Keys) -> int:
    """Take vectors out, in place. Returns how many there were.

    From lists of keys and from flat codes FAISS takes them; in other kinds they become tombstones, -1 in the map of
    keys, which no search returns.
    """
    view = faiss.downcast_index(index)
    wanted = np.ascontiguousarray(keys, np.int64)
    if len(wanted) == 0 or view.ntotal == 0:
        return 0
    if removable(index):
        return int(view.remove_ids(faiss.IDSelectorBatch(wanted)))
    ids = _id_map(view)
    gone = np.isin(ids, wanted) & (ids >= 0)
    before = hidden(index)
    _set_id_map(view, np.where(gone, -1, ids))
    _HIDDEN[index] = before + int(gone.sum())
    return int(gone.sum())


def removable(index: Any) -> bool:
    """Can FAISS take vectors out of it?"""
    view = faiss.downcast_index(index)
    if isinstance(view, faiss.IndexIDMap):
        return isinstance(faiss.downcast_index(view.index), faiss.IndexFlatCodes)
    return _has_lists(view)


def hidden(index: Any) -> int:
    """How many vectors in it are tombstones. Counted once."""
    view = faiss.downcast_index(index)
    if not isinstance(view, faiss.IndexIDMap):
        return 0
    found = _HIDDEN.get(index)
    if found is None:
        found = _HIDDEN[index] = int((_id_map(view) < 0).sum())
    return found


def read_keys(index: Any) -> Keys:
    """The keys that a search can find, int64 [N], in the order of the index."""
    view = faiss.downcast_index(index)
    if isinstance(view, faiss.IndexIDMap):
        ids = _id_map(view)
        return ids[ids >= 0]
    inverted: Any = faiss.extract_index_ivf(index).invlists
    parts = [np.empty(0, np.int64)]
    for number in range(inverted.nlist):
        size = inverted.list_size(number)
        if size:
            ids = inverted.get_ids(number)
            parts.append(faiss.rev_swig_ptr(ids, size).copy())
            inverted.release_ids(number, ids)
    return np.concatenate(parts).astype(np.int64)


def lists(index: Any) -> int:
    """Number of inverted lists, 1 for an index without."""
    return _lists_of(index)


def _id_map(index: Any) -> Keys:
    return np.asarray(faiss.vector_to_array(index.id_map), dtype=np.int64)


def _set_id_map(index: Any, ids: Keys) -> None:
    faiss.copy_array_to_vector(np.ascontiguousarray(ids), index.id_map)
    if isinstance(index, faiss.IndexIDMap2):
        index.construct_rev_map()


def _ivf(index: Any) -> Any | None:
    """The inverted lists inside, through all layers."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVF):
        return index
    for layer, inside in (
        (faiss.IndexIDMap, "index"),
        (faiss.IndexPreTransform, "index"),
        (faiss.IndexRefine, "base_index"),
    ):
        if isinstance(index, layer):
            return _ivf(getattr(index, inside))
    return None


def _has_lists(index: Any) -> bool:
    """Inverted lists whose numbers are the ids of the whole: under no layer but a rotation."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _has_lists(index.index)
    return isinstance(index, faiss.IndexIVF)


def _lists_of(index: Any) -> int:
    found = _ivf(index)
    return 1 if found is None else int(found.nlist)


def _train_transforms(index: Any, rows: NDArray[np.float32]) -> None:
    """PCA without its mean: a vector's distance from that would count in inner products, and change their order."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):
        _train_transforms(index.index, rows)
    elif isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        transform: Any = faiss.downcast_VectorTransform(chain.at(0))
        if isinstance(transform, faiss.PCAMatrix):
            transform.train(rows)
            faiss.copy_array_to_vector(np.zeros(transform.d_out, np.float32), transform.b)


def _prepare(index: Any) -> None:
    """Settings of the training."""
    ivf = _ivf(index)
    if ivf is None:
        return
    if isinstance(ivf, faiss.IndexIVFScalarQuantizer) and ivf.sq.qtype == faiss.ScalarQuantizer.QT_4bit:
        # Sixteen steps from the least to the largest number of all would mostly be of the few that are far out.
        ivf.sq.rangestat, ivf.sq.rangestat_arg = faiss.ScalarQuantizer.RS_meanstd, _DEVIATIONS
    ivf.cp.niter = _ITERATIONS
    ivf.cp.seed = _SEED
    ivf.cp.min_points_per_centroid = 1  # no warnings about few vectors: the recall is measured
    ivf.cp.max_points_per_centroid = 4 * _PER_LIST
    if faiss.get_num_gpus() > 0:
        ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))
