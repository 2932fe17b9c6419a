"""A candidate is a function of (prompt, number, seed, models) alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.generate import GenerateStage, Sampling
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder import Encoder
from pipeline.models.prior import DiffusionPrior, PriorConfig
from tests.pipeline.models.test_encoder import folder

__all__ = ["folder"]


@pytest.fixture
def stage(folder: Path) -> GenerateStage:
    encoder = Encoder(f"local-dir:{folder}", name="tiny")
    torch.manual_seed(0)
    prior = DiffusionPrior(
        PriorConfig(embed_dim=16, state_dim=16, context_length=12, width=32, head_width=16, layers=1)
    ).eval()
    decoder = Decoder(
        DecoderConfig(image_size=16, patch_size=8, embed_dim=16, width=32, layers=1, head_width=16, trunk_width=32)
    ).eval()
    return GenerateStage(encoder, prior, decoder, Sampling(steps=3, guidance=2.0, prior_steps=2), batch_size=6)


PROMPTS = ["a red cube", "a blue ball", "a green cone"]


def test_batches_shards_and_order_do_not_matter(stage: GenerateStage) -> None:
    each, numbers = [p for p in PROMPTS for _ in range(5)], list(range(5)) * 3
    together = stage(each, numbers, seed=7)
    assert together.shape == (15, 16, 16, 3)
    assert together.dtype == np.uint8
    backwards = stage(each[::-1], numbers[::-1], seed=7)[::-1]
    np.testing.assert_array_equal(together, backwards)
    for i in (0, 6, 14):
        np.testing.assert_array_equal(stage(each[i : i + 1], numbers[i : i + 1], seed=7)[0], together[i])


def test_number_seed_and_prompt_do(stage: GenerateStage) -> None:
    one = stage(["a red cube"], [0], seed=7)
    for other in (stage(["a red cube"], [1], 7), stage(["a red cube"], [0], 8), stage(["a blue ball"], [0], 7)):
        assert (one != other).any()
