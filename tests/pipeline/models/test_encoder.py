"""The encoder against open_clip used directly; its card from what is loaded."""

import io
import pickle
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.models.clip import build_clip
from pipeline.models.encoder import Encoder, weights_sha256
from pipeline.models.pixels import Undecodable
from schemas.errors import UsageError
from tests.pipeline.models.clips import clip_folder, encoded, picture
from tests.pipeline.models.test_clip import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny CLIP in open_clip's layout."""
    return clip_folder(tmp_path)


def test_vectors_are_open_clips(folder: Path) -> None:
    encoder = Encoder(f"local-dir:{folder}", name="tiny")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pictures = [
        encoded(picture(20, 30)), encoded(picture(31, 23, seed=1), "JPEG"), encoded(picture(50, 40).quantize(30)),
        encoded(picture(19, 40, mode="RGBA")),
    ]  # fmt: skip
    texts = ["a red cube", "a blue ball", "a red cube", "", "word " * 40]
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(p))) for p in pictures])
        image = model.eval().encode_image(pixels, normalize=True).numpy()
        text = model.encode_text(tokenizer(texts), normalize=True).numpy()
    np.testing.assert_allclose(encoder.images(pictures, batch_size=1), image, atol=1e-5)
    np.testing.assert_allclose(encoder.texts(texts, batch_size=2), text, atol=1e-5)
    assert encoder.images([]).shape == encoder.texts([]).shape == (0, 16)


def test_equal_texts_are_encoded_once_and_no_row_is_lost(folder: Path) -> None:
    encoder = Encoder(f"local-dir:{folder}")
    texts = [f"text {'and more ' * (i % 5)}{i % 13}" for i in range(200)]
    with torch.no_grad():
        full_length = encoder.model.encode_text(encoder.tokens(texts), normalize=True).numpy()
    rows = []
    hook = encoder.model.token_embedding.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))
    vectors = encoder.texts(texts, batch_size=4)
    hook.remove()
    assert sum(n for n, _ in rows) == len(set(texts))
    assert len({length for _, length in rows}) > 1  # short ones are cut shorter
    assert max(n * length for n, length in rows) <= 4 * 12
    np.testing.assert_allclose(vectors, full_length, atol=1e-5)


def test_memory_for_fewer_texts_than_thought(folder: Path) -> None:
    encoder = Encoder(f"local-dir:{folder}")
    texts = [f"text {'and more ' * (i % 5)}{i}" for i in range(60)]
    expected = encoder.texts(texts)

    def full(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        if args[0].numel() > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")

    encoder.model.token_embedding.register_forward_pre_hook(full)
    np.testing.assert_allclose(encoder.texts(texts), expected, atol=1e-6)


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


def test_the_decoder_alone_gives_the_encoders_pixels(folder: Path) -> None:
    encoder, data = Encoder(f"local-dir:{folder}"), encoded(picture(37, 53))
    alone = pickle.loads(pickle.dumps(encoder.decoder))
    np.testing.assert_array_equal(alone(data), encoder.decode(data))
    with pytest.raises(Undecodable):
        encoder.images([data, data[:40]])


@pytest.mark.parametrize("spec", ["ViT-B-32", "no-such-model:laion", "local-dir:/no/such/folder"])
def test_what_cannot_be_loaded_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError):
        Encoder(spec)


def test_half_precision_is_refused_on_cpu(folder: Path) -> None:
    with pytest.raises(UsageError, match="GPU"):
        Encoder(f"local-dir:{folder}", precision="bfloat16")
