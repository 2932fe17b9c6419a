"""``evaluate --zero-shot``: accuracy against a plain count, with labels from captions and from the list."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs.base import execute
from jobs.evaluate import run as evaluate_body
from pipeline.engine import Engine
from pipeline.models.encoder import Encoder
from pipeline.workspace import Workspace
from schemas.configs import EvaluateConfig
from schemas.errors import UsageError
from schemas.tables import IMAGES, PAIRS
from schemas.vectors import unpack
from tests.jobs.embedded import embed_directly
from tests.kills import image_row, save_clip
from tests.pipeline.models.test_clip import TINY

LABELS = ["dog", "cat", "red panda", "boat", "house", "tree"]
CAPTIONS = ["a dog", "one cat", "a red panda!", "a dog and a cat", "nothing", "the boat", "a house", "Dog"] * 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), TINY, seed=3)


@pytest.fixture
def embedded(tmp_path: Path, clip: Path) -> Workspace:
    """Images with captions, half of which name a label; the list's column «class» says another one."""
    workspace = Workspace(tmp_path / "ws").prepare()
    rows, pairs = [], []
    for i, caption in enumerate(CAPTIONS):
        row = image_row(i) | {"caption": caption}
        extra = None if i == 0 else json.dumps({"class": "TREE" if i % 3 else 7, "width": 3})
        rows.append(row)
        pairs.append({n: row.get(n) for n in PAIRS.schema.names} | {"extra": extra, "added_run": "r"})
    workspace.table("pairs").append(pa.Table.from_pylist(pairs, schema=PAIRS.schema), "r")
    workspace.table("images").append(pa.Table.from_pylist(rows, schema=IMAGES.schema), "r")
    embed_directly(workspace, clip)
    return workspace


def evaluate(workspace: Workspace, **settings: Any) -> dict[str, Any]:
    """metrics.json, and the outputs of the run."""
    config = EvaluateConfig(workspace=str(workspace.root), **settings)
    run = execute("evaluate", config, evaluate_body, Engine(cpus=1))
    report = Path(run.outputs["report"])
    return json.loads((report / "metrics.json").read_text()) | {"report": report}


def labels_file(folder: Path) -> str:
    (folder / "labels.txt").write_text("\n".join(LABELS))
    (folder / "templates.txt").write_text("a photo of a {}\n{}")
    return str(folder / "labels.txt")


def test_labels_in_captions(embedded: Workspace, clip: Path, tmp_path: Path) -> None:
    labels, templates = labels_file(tmp_path), str(tmp_path / "templates.txt")
    found = evaluate(embedded, zero_shot=labels, templates=templates)
    zero_shot = found["zero_shot"]
    assert (zero_shot["labels"], zero_shot["without_label"], zero_shot["several_labels"]) == (6, 4, 4)
    assert zero_shot["rows"] == 24
    # By another way: each label's mean vector, and a count.
    encoder = Encoder(f"local-dir:{clip}")
    text = np.stack([encoder.texts([f"a photo of a {n}", n]).mean(0) for n in LABELS])
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    rows = embedded.table("embeddings").read(["caption", "image_vec"])
    truth = {"a dog": 0, "one cat": 1, "a red panda!": 2, "the boat": 3, "a house": 4, "Dog": 0}
    hits = {1: 0, 5: 0}
    for caption, vector in zip(rows["caption"].to_pylist(), unpack(rows["image_vec"], 16), strict=True):
        if caption in truth:
            ranked = np.argsort(-(text @ vector.astype(np.float32))).tolist()
            for k in hits:
                hits[k] += truth[caption] in ranked[:k]
    assert (zero_shot["top1"], zero_shot["top5"]) == (hits[1] / 24, hits[5] / 24)
    assert {n: c["rows"] for n, c in zero_shot["per_class"].items()} == {
        "dog": 8, "cat": 4, "red panda": 4, "boat": 4, "house": 4,
    }  # fmt: skip
    with Image.open(io.BytesIO((found["report"] / "zero-shot.png").read_bytes())) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200


def test_labels_of_the_list(embedded: Workspace, tmp_path: Path) -> None:
    found = evaluate(embedded, zero_shot=labels_file(tmp_path), label_col="class")["zero_shot"]
    trees = sum(1 for i in range(1, len(CAPTIONS)) if i % 3)
    assert (found["rows"], found["without_label"], found["several_labels"]) == (trees, len(CAPTIONS) - trees, 0)
    assert list(found["per_class"]) == ["tree"]


def test_no_label_is_known(embedded: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no row's label is known(.|\n)*'none'(.|\n)*32 rows with none"):
        evaluate(embedded, zero_shot=labels_file(tmp_path), label_col="none")


def test_options_of_zero_shot_alone(embedded: Workspace) -> None:
    with pytest.raises(UsageError, match="--zero-shot"):
        evaluate(embedded, label_col="class")


def test_without_it_there_is_none_of_it(embedded: Workspace) -> None:
    found = evaluate(embedded)
    assert "zero_shot" not in found
    assert not (found["report"] / "zero-shot.png").exists()
