"""Searching a FAISS index by key, through the layers around its lists, without what was deleted."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.index.building import Vectors, hidden, lists
from pipeline.index.extended import Extended
from pipeline.keys import Keys, minus
from schemas.errors import ClipmillError

Found = tuple[NDArray[np.float32], Keys]

_FEWEST = 10
"""A refined index is asked for at least so many, of which it then gives the best: k = 1 has a recall, too."""
_ROOM = 4
"""Lists are probed until they hold so many times k vectors, on the average."""
_K_FACTOR = 10
_EF = 64
_NOTHING = np.finfo(np.float32).min


def search(
    index: faiss.Index | Extended,
    queries: Vectors,
    k: int,
    parameters: dict[str, int] | None = None,
    only: Keys | None = None,
    without: Keys | None = None,
) -> Found:
    """The k best of each query [Q, D]: similarities float32 [Q, k] and keys int64 [Q, k], -1 where there are fewer.

    ``only`` restricts the search to these keys, ``without`` leaves out those (both sorted). There are fewer than k only
    if no more are there; with ``only``, also where the lists probed hold no more.

    Raises:
        ClipmillError: queries of another dimension than the index.
    """
    rows = np.ascontiguousarray(queries, dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] != index.d:
        raise ClipmillError(
            "a query has another dimension than the index", expected=f"D={index.d}", actual=str(rows.shape)
        )
    if isinstance(index, Extended):
        return _search_both(index, rows, k, parameters, only, without)
    similarity, keys = np.full((len(rows), k), _NOTHING, np.float32), np.full((len(rows), k), -1, np.int64)
    most = min(k, int(index.ntotal) - hidden(index))
    if len(rows) == 0 or most <= 0:
        return similarity, keys
    chosen = dict(parameters or {})
    if only is not None:
        wanted = only if without is None else minus(only, without)
        some = _search(index, rows, most, chosen, faiss.IDSelectorBatch(np.ascontiguousarray(wanted, np.int64)))
    else:
        some = _search_without(index, rows, most, chosen, np.empty(0, np.int64) if without is None else without)
    width = some[1].shape[1]
    similarity[:, :width], keys[:, :width] = some
    return similarity, keys


def _search_both(
    index: Extended,
    rows: NDArray[np.float32],
    k: int,
    parameters: dict[str, int] | None,
    only: Keys | None,
    without: Keys | None,
) -> Found:
    """The k best of what is found in the large index and in the small one."""
    large = search(index.main, rows, k, parameters, only, index.without(without))
    small = search(index.side, rows, k, None, only, without)
    if not (small[1] >= 0).any():
        return large
    return best_of(large, small, k)


def best_of(some: Found, others: Found, k: int) -> Found:
    """The k best of two searches, which found no key both."""
    similarity = np.concatenate([some[0], others[0]], axis=1)
    keys = np.concatenate([some[1], others[1]], axis=1)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(keys, order, 1)


def _search_without(index: Any, rows: NDArray[np.float32], k: int, chosen: dict[str, int], without: Keys) -> Found:
    """Ask for some more, drop what is deleted; search again, every list, for those who have too few then."""
    deleted = hidden(index) + len(without)
    total = int(index.ntotal)
    more = min(deleted, 8 + 2 * k * deleted // total) if deleted else 0
    similarity, keys = _search(index, rows, min(k + more, total), chosen, None)
    if deleted:
        similarity, keys = dropped(similarity, keys, without)
    similarity, keys = similarity[:, :k], keys[:, :k]
    short = np.flatnonzero((keys < 0).any(axis=1))
    if len(short) and (lists(index) > 1 or deleted):
        everywhere = chosen | {"nprobe": lists(index)}
        selector = None
        if deleted:
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(np.append(np.int64(-1), without)))
        similarity, keys = similarity.copy(), keys.copy()
        similarity[short], keys[short] = _search(index, rows[short], k, everywhere, selector)
    return similarity, keys


def dropped(similarity: NDArray[np.float32], keys: Keys, without: Keys) -> Found:
    """The same less tombstones and the keys ``without``; what is left moves up."""
    bad = keys < 0
    if len(without):
        at = np.minimum(np.searchsorted(without, keys), len(without) - 1)
        bad |= without[at] == keys
    if not bad.any():
        return similarity, keys
    order = np.argsort(bad, axis=1, kind="stable")
    bad = np.take_along_axis(bad, order, 1)
    similarity = np.where(bad, _NOTHING, np.take_along_axis(similarity, order, 1))
    return similarity, np.where(bad, -1, np.take_along_axis(keys, order, 1))


def _search(index: Any, rows: NDArray[np.float32], k: int, chosen: dict[str, int], selector: Any) -> Found:
    """FAISS's search with lists enough for k."""
    asked = min(max(k, _FEWEST), int(index.ntotal))
    number = lists(index)
    if number > 1:
        least = -(-_ROOM * asked * number // int(index.ntotal))
        chosen = chosen | {"nprobe": min(max(chosen.get("nprobe", 1), least), number)}
    similarity, keys = index.search(rows, asked, params=_search_parameters(index, chosen, selector))
    return similarity[:, :k], keys[:, :k]


def _search_parameters(index: Any, parameters: dict[str, int], selector: Any) -> Any:
    """FAISS's search parameters for an index, through the layers around its lists: keys, rotation, refinement."""
    fs: Any = faiss  # its stubs know no keyword arguments
    options: dict[str, Any] = {"sel": selector} if selector is not None else {}
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):
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
        factor = parameters.get("k_factor", _K_FACTOR)
        return fs.IndexRefineSearchParameters(k_factor=factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        quantizer = faiss.downcast_index(index.quantizer)
        if isinstance(quantizer, faiss.IndexHNSW):
            nprobe = parameters.get("nprobe", 1)
            options["quantizer_params"] = fs.SearchParametersHNSW(efSearch=max(2 * nprobe, _EF))
        return fs.SearchParametersIVF(nprobe=parameters.get("nprobe", 1), **options)
    if isinstance(index, faiss.IndexHNSW):
        return fs.SearchParametersHNSW(efSearch=parameters.get("efSearch", _EF), **options)
    return fs.SearchParameters(**options) if options else None
