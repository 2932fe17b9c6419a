"""Index: vectors with their keys -> a FAISS index of measured recall; searching, changing and publishing it.

Vectors are unit-norm, so the inner product is the cosine similarity. FAISS ids are pair_keys.
"""

from pipeline.index.arrays import save_arrays
from pipeline.index.building import (
    BLOCK,
    Vectors,
    add,
    build,
    hidden,
    lists,
    merge,
    read_keys,
    remove,
    sample,
    sample_size,
    train,
)
from pipeline.index.extended import Extended, findable
from pipeline.index.files import (
    copy_file,
    from_bytes,
    keys_sha256,
    open_file,
    open_index,
    open_side,
    to_bytes,
    vectors_sha256,
    write_index,
)
from pipeline.index.kinds import EXACT_UP_TO, Kind, choose, enough_memory, kind_beside, kind_of
from pipeline.index.measuring import Answers, latency, measure, recall
from pipeline.index.searching import search
from pipeline.index.shards import Shard, ShardFiller, Stored, fill, merge_shards
from pipeline.index.source import Source
from pipeline.index.truth import Truth
from pipeline.index.tuning import deepened, frontier, tune

__all__ = [
    "BLOCK",
    "EXACT_UP_TO",
    "Answers",
    "Extended",
    "Kind",
    "Shard",
    "ShardFiller",
    "Source",
    "Stored",
    "Truth",
    "Vectors",
    "add",
    "build",
    "choose",
    "copy_file",
    "deepened",
    "enough_memory",
    "fill",
    "findable",
    "from_bytes",
    "frontier",
    "hidden",
    "keys_sha256",
    "kind_beside",
    "kind_of",
    "latency",
    "lists",
    "measure",
    "merge",
    "merge_shards",
    "open_file",
    "open_index",
    "open_side",
    "read_keys",
    "recall",
    "remove",
    "sample",
    "sample_size",
    "save_arrays",
    "search",
    "to_bytes",
    "train",
    "tune",
    "vectors_sha256",
    "write_index",
]
