"""A published index over made vectors, written without a run of the jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.index import build, keys_sha256, write_index
from pipeline.records import write_segment
from pipeline.storage import write_atomic
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard, IndexCard, IndexFile
from schemas.records import records_schema
from schemas.vectors import normalise
from tests.schemas.test_cards import encoder

Vectors = NDArray[np.float16]


def vectors(count: int, dim: int, seed: int = 0, clusters: int = 0) -> Vectors:
    """Unit-norm, in clusters where asked for."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, dim))
    if clusters:
        rows = 0.4 * rows + rng.normal(size=(clusters, dim))[rng.integers(0, clusters, count)]
    return normalise(rows).astype("<f2")


def publish(
    workspace: Workspace,
    keys: NDArray[np.int64],
    both: Mapping[str, Vectors],
    *,
    version: str = "v1",
    factory: str = "IDMap,SQfp16",
    card: EncoderCard | None = None,
    further: Mapping[str, Any] | None = None,
    search: Mapping[str, int] | None = None,
) -> IndexCard:
    """An index of both modalities' vectors [N, D] under keys [N]; ``further`` columns of the records by name."""
    dim = next(iter(both.values())).shape[1]
    card = card or encoder(dim=dim)
    folder = workspace.index_dir(card.id)
    files = []
    for modality, rows in both.items():
        size, sha256 = write_index(build(keys, rows, factory), folder / version / f"{modality}.faiss")
        files.append(
            IndexFile(
                path=f"{modality}.faiss",
                modality=modality,
                factory=factory,
                count=len(keys),
                bytes=size,
                sha256=sha256,
                recall_at_1=1,
                recall_at_10=1,
                ms_per_query=0,
                search=dict(search or {}),
            )
        )
    n = len(keys)
    columns: dict[str, Any] = {
        "pair_key": keys, "caption": [f"pair {k}" for k in keys.tolist()], "url": [f"https://h/{k}" for k in keys],
        "width": pa.nulls(n, pa.int32()), "height": pa.nulls(n, pa.int32()), "similarity": np.zeros(n, np.float32),
        "file": pa.nulls(n, pa.string()),
    } | dict(further or {})  # fmt: skip
    columns |= {f"{m}_vec": fixed(both[m]) if m in both else pa.nulls(n, pa.binary(2 * dim)) for m in ("image", "text")}
    own = records_schema(dim)
    more = pa.schema([(name, pa.array(columns[name]).type) for name in columns if name not in own.names])
    schema = records_schema(dim, more)
    table = pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
    made = IndexCard(
        encoder=card, version=version, count=n, keys_sha256=keys_sha256(keys), table_version=0, files=tuple(files),
        segments=(write_segment(folder, table, f"records-{version}"),), run="r",
    )  # fmt: skip
    write_atomic(folder / version / "card.json", made.to_json().encode())
    write_atomic(folder / "CURRENT", version.encode())
    (workspace.root / "tables").mkdir(parents=True, exist_ok=True)
    return made


def fixed(rows: Vectors) -> pa.Array:
    return pa.array([row.tobytes() for row in rows.astype("<f2")], pa.binary(2 * rows.shape[1]))
