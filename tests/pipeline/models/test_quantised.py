"""int8: near the float vectors, never taken for them, and its distance measured."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models.encoder import Encoder
from schemas.errors import EncoderMismatch
from tests.pipeline.models.clips import clip_folder, encoded, picture
from tests.pipeline.models.test_clip import TINY

FILES = [encoded(picture(30, 30, seed=i)) for i in range(6)]
TEXTS = ["a red cube", "one blue ball", "", "a red cube on a blue ball"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return clip_folder(tmp_path)


def test_int8_is_another_encoder(folder: Path) -> None:
    exact, small = Encoder(f"local-dir:{folder}", name="tiny"), Encoder(f"local-dir:{folder}", precision="int8")
    assert small.card.dtype == "int8"
    assert small.card.id != exact.card.id
    assert small.card.weights_sha256 != exact.card.weights_sha256
    with pytest.raises(EncoderMismatch):
        exact.card.require(small.card, "these vectors")
    exact.card.require(small.float_card, "these weights")
    assert Encoder(f"local-dir:{folder}", precision="int8").card == small.card
    assert exact.float_card == exact.card


def test_int8_vectors_are_near_and_their_distance_is_reported(folder: Path) -> None:
    exact, small = Encoder(f"local-dir:{folder}"), Encoder(f"local-dir:{folder}", precision="int8")
    found = small.int8_cosine(FILES, TEXTS)
    image = (exact.images(FILES) * small.images(FILES)).sum(1)
    text = (exact.texts(TEXTS) * small.texts(TEXTS)).sum(1)
    expected = {
        "image_mean": image.mean(), "image_min": image.min(), "text_mean": text.mean(), "text_min": text.min(),
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.98 < found["image_min"] < 1 - 1e-7  # quantised, and not by much
    assert 0.98 < found["text_min"] < 1 - 1e-7
    assert found["image_min"] <= found["image_mean"]
    assert small.int8_cosine([], TEXTS).keys() == {"text_mean", "text_min"}


def test_mlps_and_attention_are_quantised_and_the_rest_is_not(folder: Path) -> None:
    model = Encoder(f"local-dir:{folder}", precision="int8").model
    kinds = {name: type(m) for name, m in model.named_modules()}
    assert kinds["transformer.resblocks.0.mlp.c_fc"] is torch.ao.nn.quantized.dynamic.Linear
    assert kinds["visual.transformer.resblocks.0.block.mlp.c_proj"] is torch.ao.nn.quantized.dynamic.Linear
    assert kinds["transformer.resblocks.0.attn.in_proj"] is torch.ao.nn.quantized.dynamic.Linear
    assert kinds["visual.transformer.resblocks.0.block.attn.out_proj"] is torch.ao.nn.quantized.dynamic.Linear
    assert kinds["visual.conv1"] is torch.nn.Conv2d
    assert model.text_projection.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"text_cfg": TINY["text_cfg"] | {"proj_bias": True}},  # open_clip reads this layer's type
        {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}},  # a ResNet
        {"text_cfg": TINY["text_cfg"] | {"pool_type": "last"}},  # not cut
    ],
)
def test_other_towers_run_quantised(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = clip_folder(tmp_path / "other", TINY | changes)
    found = Encoder(f"local-dir:{folder}", precision="int8").int8_cosine(FILES, TEXTS)
    assert min(found.values()) > 0.98


def test_states_of_a_prior_come_from_int8_too(folder: Path) -> None:
    small = Encoder(f"local-dir:{folder}", precision="int8")
    embedding, states, mask = small.states(TEXTS)
    assert float((embedding.numpy() * small.texts(TEXTS)).sum(1).min()) > 0.98
    assert states.shape[:2] == mask.shape
