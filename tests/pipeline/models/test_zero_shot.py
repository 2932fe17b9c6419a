"""Zero-shot classification against open_clip's, and by hand."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

from pipeline.models.encoder import Encoder
from pipeline.models.zero_shot import ZeroShot, read_labels, read_templates
from schemas.errors import UsageError
from schemas.vectors import normalise
from tests.kills import save_clip
from tests.pipeline.models.test_clip import TINY

LABELS = ["red panda", "dog", "Golden Gate Bridge", "café", "traffic light"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP, as ``--encoder`` names it."""
    long = TINY | {"text_cfg": TINY["text_cfg"] | {"context_length": 24}}
    return f"local-dir:{save_clip(tmp_path_factory.mktemp('clip'), long)}"


def write(folder: Path, *lines: str) -> str:
    (folder / "lines.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "lines.txt")


def test_the_ensemble_is_open_clips(clip: str, tmp_path: Path) -> None:
    found = ZeroShot.load(Encoder(clip), write(tmp_path, *LABELS))
    model, _, _ = open_clip.create_model_and_transforms(clip)
    theirs = open_clip.build_zero_shot_classifier(
        model.eval(), open_clip.get_tokenizer(clip), LABELS, OPENAI_IMAGENET_TEMPLATES
    ).T.numpy()  # [L, D]
    assert found.labels == tuple(LABELS)
    assert found.scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert np.einsum("ld,ld->l", found.text, theirs).min() > 0.99999
    np.testing.assert_allclose(np.linalg.norm(found.text, axis=1), 1, atol=1e-6)
    images = normalise(np.random.default_rng(0).normal(size=(40, 16)))
    with torch.inference_mode():
        logits = model.logit_scale.exp() * torch.from_numpy(images) @ torch.from_numpy(theirs).T
    score, best = logits.softmax(dim=1).max(dim=1)
    labels, probabilities = found(images)
    assert labels == [LABELS[i] for i in best]
    np.testing.assert_allclose(probabilities, score.numpy(), rtol=1e-4)
    assert probabilities.dtype == np.float32


def test_a_mean_of_unit_vectors_and_not_of_texts(tmp_path: Path) -> None:
    class Fake:
        """Texts to vectors that a hand can add up: the first is three times as long before it is made a unit."""

        model = torch.nn.Module()

        def texts(self, texts: list[str]) -> np.ndarray:
            table = {"a x": [1, 0], "b x": [0, 1], "a y": [0.6, 0.8], "b y": [0.6, 0.8]}
            return np.array([table[t] for t in texts], np.float32)

    Fake.model.logit_scale = torch.nn.Parameter(torch.tensor(2.0).log())
    labels = write(tmp_path, "x", "y")
    (tmp_path / "templates.txt").write_text("a {}\n\nb {}\n")
    found = ZeroShot.load(Fake(), labels, str(tmp_path / "templates.txt"))
    np.testing.assert_allclose(found.text, [[0.5**0.5, 0.5**0.5], [0.6, 0.8]], rtol=1e-6)
    names, chance = found(np.array([[0.0, 1.0]], np.float32))
    # Cosines 0.7071 and 0.8, twice that: 1 / (1 + exp(1.4142 - 1.6)).
    assert names == ["y"]
    assert chance[0] == pytest.approx(1 / (1 + np.exp(2 * 0.5**0.5 - 1.6)), rel=1e-5)
    copy = pickle.loads(pickle.dumps(found))
    assert copy(np.array([[1.0, 0.0]], np.float32))[0] == ["x"]


def test_many_labels_come_in_their_order(clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.zero_shot._LABELS", 3)
    monkeypatch.setattr("pipeline.models.zero_shot._BLOCK", 3)
    encoder = Encoder(clip)
    (tmp_path / "t.txt").write_text("{}")
    names = [f"number {i}" for i in range(8)]
    found = ZeroShot.load(encoder, write(tmp_path, *names), str(tmp_path / "t.txt"))
    labels, _ = found(encoder.texts(names))  # a label's own text is nearest to it
    assert labels == names
    assert found(np.empty((0, 16), np.float32))[0] == []


def test_the_papers_templates() -> None:
    templates = read_templates(None)
    assert len(templates) == len(set(templates)) == 80
    assert templates[0] == "a bad photo of a {}."
    assert all(t.count("{}") == 1 for t in templates)


def test_label_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffdog\r\n\r\n  red   panda \r\ncafé".encode())
    assert read_labels(str(tmp_path / "a.txt")) == ["dog", "red panda", "café"]
    with pytest.raises(UsageError, match="'dog', 'Dog'"):
        read_labels(write(tmp_path, "dog", "cat", "Dog"))
    for content in (b"", b" \n\n", b"\xff\xfe\x00d"):
        (tmp_path / "b.txt").write_bytes(content)
        with pytest.raises(UsageError):
            read_labels(str(tmp_path / "b.txt"))
    with pytest.raises(UsageError, match="cannot read"):
        read_labels(str(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match="'a photo'"):
        read_templates(write(tmp_path, "a {}", "a photo"))
