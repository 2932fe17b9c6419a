"""The job semdedup: marks by key, nothing new commits nothing, and whatever came when gives the same marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.base import execute
from jobs.semdedup import run as semdedup_body
from pipeline.encoders import save_card
from pipeline.engine import Engine
from pipeline.workspace import Workspace
from schemas.cards import EncoderCard
from schemas.configs import SemdedupConfig
from schemas.errors import NothingToDo
from schemas.tables import EMBEDDINGS
from schemas.vectors import normalise, pack

CARD = EncoderCard(
    model="tiny", pretrained="p", weights_sha256="ab" * 32, dim=2, image_size=16, mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5), interpolation="bicubic", resize_mode="shortest", context_length=12, dtype="float32",
)  # fmt: skip
Angles = dict[int, float]


def put(
    workspace: Workspace, run: str, angles: Angles, similarity: Angles | None = None, card: EncoderCard = CARD
) -> None:
    """Rows of embeddings whose image vectors have these angles, in degrees."""
    radians = np.radians(list(angles.values()))
    n = len(angles)
    vectors = pack(normalise(np.stack([np.cos(radians), np.sin(radians)], 1)))
    rows = {
        "pair_key": list(angles), "encoder": [card.id] * n, "image_vec": vectors, "text_vec": vectors,
        "similarity": pa.array([(similarity or {}).get(key, 0.5) for key in angles], pa.float32()),
        "caption": [""] * n, "sha256": [""] * n, "run": [run] * n,
    }  # fmt: skip
    workspace.table("embeddings").upsert(pa.table(rows, schema=EMBEDDINGS.schema), run)
    save_card(workspace, card)


def search(workspace: Workspace, **settings: Any) -> dict[str, Any]:
    config = SemdedupConfig(workspace=str(workspace.root), **settings)
    # No engine is needed: the job works in the driver.
    return execute("semdedup", config, semdedup_body, Engine(cpus=1)).summary()


def marks(workspace: Workspace, encoder: str = CARD.id) -> dict[int, tuple[int, float]]:
    rows = [r for r in workspace.table("semantic_duplicates").read().to_pylist() if r["encoder"] == encoder]
    found = {r["pair_key"]: (r["kept_key"], round(r["cosine"], 3)) for r in rows}
    assert len(found) == len(rows), "a key twice"
    return found


def test_by_hand(workspace: Workspace) -> None:
    put(workspace, "r2", {1: 0, 2: 50})  # the later run, though its key is lower
    put(workspace, "r1", {7: 10, 9: 100, 8: 105})
    found = search(workspace)
    assert marks(workspace) == {1: (7, 0.985), 9: (8, 0.996)}
    assert found["counts"] == {"in": 5, "out": 5, "failed": 0}
    assert (found["marked"], found["kept"], found["clusters"], found["largest_cluster"]) == (2, 3, 1, 5)
    runs = workspace.table("runs").read(["run"])["run"].to_pylist()
    assert {r["run"] for r in workspace.table("semantic_duplicates").read().to_pylist()} == set(runs) == {found["run"]}


def test_the_best_caption_is_kept(workspace: Workspace) -> None:
    put(workspace, "r1", {1: 0, 2: 5, 3: 10}, {1: 0.2, 2: 0.9, 3: 0.3})
    search(workspace, keep="caption")
    assert marks(workspace) == {1: (2, 0.996), 3: (2, 0.996)}
    search(workspace, threshold=0.99)  # other settings: the marks are those of a search with them
    assert marks(workspace) == {2: (1, 0.996)}


def test_nothing_new_commits_nothing(workspace: Workspace) -> None:
    put(workspace, "r1", {1: 0, 2: 5, 3: 90})
    search(workspace)
    versions = {n: workspace.table(n).version() for n in ("semantic_duplicates", "runs")}
    again = search(workspace)
    assert again["counts"] == {"in": 0, "out": 0, "failed": 0}
    assert (again["marked"], again["kept"]) == (1, 2)
    other = CARD.model_copy(update={"weights_sha256": "cd" * 32})
    put(workspace, "r2", {1: 0, 2: 90}, card=other)  # a new version of the table, but nothing of this encoder's
    assert search(workspace, encoder=CARD.id)["counts"]["in"] == 0
    assert {n: workspace.table(n).version() for n in versions} == versions
    assert search(workspace, encoder=other.id)["marked"] == 0
    assert marks(workspace) == {2: (1, 0.996)}


def test_no_duplicates_are_a_result_that_is_remembered(workspace: Workspace) -> None:
    put(workspace, "r1", {1: 0, 2: 90})
    assert search(workspace)["marked"] == 0
    assert search(workspace)["counts"]["in"] == 0


def test_what_is_added_and_changed_gives_the_marks_of_one_search(workspace: Workspace, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nights: list[Angles] = [{int(k): float(rng.integers(0, 360)) for k in rng.integers(0, 60, 25)} for _ in range(3)]
    for number, night in enumerate(nights):
        put(workspace, f"r{number}", night)  # keys that come again are embedded again: images that changed
        search(workspace, threshold=0.99)
        fresh = Workspace(tmp_path / f"fresh{number}").prepare()
        for earlier in range(number + 1):
            put(fresh, f"r{earlier}", nights[earlier])
        search(fresh, threshold=0.99)
        assert marks(workspace) == marks(fresh)
        assert marks(workspace)


def test_untouched_marks_keep_their_run(workspace: Workspace) -> None:
    put(workspace, "r1", {1: 0, 2: 5, 3: 90})
    first = search(workspace)["run"]
    put(workspace, "r2", {4: 91})
    second = search(workspace)["run"]
    rows = workspace.table("semantic_duplicates").read().to_pylist()
    assert {r["pair_key"]: r["run"] for r in rows} == {2: first, 4: second}


def test_no_embeddings(workspace: Workspace) -> None:
    put(workspace, "r1", {1: 0})
    workspace.table("embeddings").open().delete()  # type: ignore[union-attr]
    with pytest.raises(NothingToDo):
        search(workspace)
