"""The encoder against open_clip used directly; its card from what is loaded."""

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.models.clip import build_clip
from pipeline.models.encoder import Encoder, pick_dtype, read_model_config, weights_sha256
from schemas.errors import UsageError
from tests.pipeline.models.test_clip import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny CLIP in open_clip's layout."""
    (tmp_path / "tiny.json").write_text(
        json.dumps({"model_cfg": TINY, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    )
    config = read_model_config(str(tmp_path / "tiny.json"))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(build_clip(TINY).state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


def png(colour: tuple[int, int, int], size: tuple[int, int] = (20, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def test_vectors_are_open_clips(folder: Path) -> None:
    encoder = Encoder(f"local-dir:{folder}", name="tiny")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pictures, texts = [png((200, 30, 30)), png((0, 90, 255))], ["a red cube", "a blue ball", "a red cube"]
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(p)).convert("RGB")) for p in pictures])
        image = model.eval().encode_image(pixels, normalize=True).numpy()
        text = model.encode_text(tokenizer(texts), normalize=True).numpy()
    np.testing.assert_allclose(encoder.images(pictures, batch_size=1), image, atol=1e-5)
    np.testing.assert_allclose(encoder.texts(texts, batch_size=2), text, atol=1e-5)


def test_card_says_what_was_loaded(folder: Path) -> None:
    card = Encoder(f"local-dir:{folder}", name="tiny").card
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert (card.model, card.dim, card.image_size, card.context_length) == ("tiny", 16, 16, 12)
    assert (card.mean, card.std, card.dtype) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "float32")
    assert card.weights_sha256 == weights_sha256(model)
    assert card.id == f"tiny-{card.weights_sha256[:12]}"


def test_one_changed_weight_is_another_encoder(folder: Path) -> None:
    before = Encoder(f"local-dir:{folder}").card
    model = build_clip(TINY)
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    with torch.no_grad():
        model.logit_scale += 1e-6
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    assert Encoder(f"local-dir:{folder}").card.weights_sha256 != before.weights_sha256


@pytest.mark.parametrize("spec", ["ViT-B-32", "no-such-model:laion", "local-dir:/no/such/folder"])
def test_what_cannot_be_loaded_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError):
        Encoder(spec)


def test_half_precision_is_refused_on_cpu() -> None:
    with pytest.raises(UsageError, match="GPU"):
        pick_dtype("bfloat16", torch.device("cpu"))
