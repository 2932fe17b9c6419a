"""The job index, run again: new keys are added, and what was embedded again is not left as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.base import execute
from jobs.encoders import save_card
from jobs.index import run as index_body
from pipeline.engine import Engine
from pipeline.index import from_bytes, search
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.configs import IndexConfig
from schemas.tables import EMBEDDINGS
from schemas.vectors import normalise, pack
from tests.schemas.test_cards import encoder

N, D = 60, 16
KEYS = np.arange(100, 100 + N)
IMAGE, TEXT = normalise(np.random.default_rng(0).normal(size=(2 * N, D))).reshape(2, N, D)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "ws")
    put(made, "r1", slice(0, 50), IMAGE)
    save_card(made, card())
    return made


def card() -> EncoderCard:
    return encoder().model_copy(update={"dim": D})


def put(workspace: Workspace, run: str, rows: slice, image: np.ndarray) -> None:
    n = len(KEYS[rows])
    columns = {
        "pair_key": KEYS[rows], "encoder": [card().id] * n, "image_vec": pack(image[rows]),
        "text_vec": pack(TEXT[rows]),
        "similarity": np.einsum("nd,nd->n", image[rows], TEXT[rows]).astype(np.float32), "caption": [""] * n,
        "sha256": [run] * n, "run": [run] * n,
    }  # fmt: skip
    workspace.table("embeddings").upsert(pa.table(columns, schema=EMBEDDINGS.schema), run)


def index(workspace: Workspace, engine: Engine) -> dict[int, int]:
    """Run the job; the key found first for the image vector of each key that the table holds now."""
    config = IndexConfig(workspace=str(workspace.root), audit=0)
    execute("index", config, index_body, engine)
    published = workspace.published_index(card().id)
    assert published is not None
    file = published.file("image")
    path = workspace.index_dir(card().id) / published.version / file.path
    rows = workspace.table("embeddings").read()
    vectors = np.stack([np.frombuffer(v, "<f2") for v in rows["image_vec"].to_pylist()]).astype(np.float32)
    _, keys = search(from_bytes(path.read_bytes(), file.sha256, str(path)), vectors, 1, file.search)
    return dict(zip(rows["pair_key"].to_pylist(), keys[:, 0].tolist(), strict=True))


def test_new_deleted_and_changed(workspace: Workspace, engine: Engine) -> None:
    def version() -> str:
        published = workspace.published_index(card().id)
        assert published is not None
        return published.version

    def found(n: int) -> dict[int, int]:
        return {key: key for key in KEYS[:n].tolist()}

    assert index(workspace, engine) == found(50)
    first = version()
    assert index(workspace, engine) == found(50) and version() == first, "nothing new publishes nothing"
    put(workspace, "r2", slice(50, 55), IMAGE)
    assert index(workspace, engine) == found(55) and version() != first
    second = version()
    put(workspace, "r3", slice(10, 12), -IMAGE)  # the same keys, embedded again as other images
    assert index(workspace, engine) == found(55) and version() != second
    put(workspace, "r4", slice(3, 4), -IMAGE)
    put(workspace, "r4", slice(55, 60), IMAGE)  # another one changed, and some are new
    assert index(workspace, engine)[KEYS[3].item()] == KEYS[3]
