"""CLIP's losses by hand and against open_clip's; text states against open_clip's own encoding."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models.clip import SpanSwaps, build_clip, contrastive_loss, decorrelation_loss, text_states

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_contrastive_loss_by_hand() -> None:
    eye = torch.eye(2)
    # Logits [[s, 0], [0, s]]: every row's loss is log(1 + exp(-s)).
    loss = contrastive_loss(eye, eye, torch.tensor(3.0))
    assert float(loss) == pytest.approx(np.log(1 + np.exp(-3.0)), rel=1e-5)


def test_contrastive_loss_is_open_clips() -> None:
    image, text, scale = unit(9, 16), unit(9, 16, seed=1), torch.tensor(20.0)
    theirs = open_clip.ClipLoss()(image, text, scale)
    torch.testing.assert_close(contrastive_loss(image, text, scale), theirs)


def test_negatives_are_further_wrong_answers_for_images_only() -> None:
    eye, scale = torch.eye(2), torch.tensor(3.0)
    negatives = torch.tensor([[-1.0, 0.0]])
    by_image = (np.log(1 + np.exp(-3) + np.exp(-6)) + np.log(1 + np.exp(-3) + np.exp(-3))) / 2
    expected = (by_image + np.log(1 + np.exp(-3))) / 2
    assert float(contrastive_loss(eye, eye, scale, negatives=negatives)) == pytest.approx(expected, rel=1e-5)


def test_decorrelation_against_numpy() -> None:
    x = unit(50, 8)
    z = x.numpy() * np.sqrt(8)
    c = np.cov(z.T)
    off = (c**2).sum() - (np.diag(c) ** 2).sum()
    expected = off / 8 + np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)).mean()
    assert float(decorrelation_loss(x)) == pytest.approx(expected, rel=1e-4)


def test_collapsed_embeddings_cost_more() -> None:
    spread = unit(200, 8)
    collapsed = F.normalize(spread * torch.tensor([1.0] + [0.01] * 7), dim=-1)
    assert decorrelation_loss(collapsed) > decorrelation_loss(spread)


def test_text_states_agree_with_encode_text() -> None:
    torch.manual_seed(0)
    clip = build_clip(TINY).eval()
    tokens = open_clip.SimpleTokenizer(context_length=12)(["a red cube", "one blue ball on a table"])
    with torch.no_grad():
        embedding, states, mask = text_states(clip, tokens)
        torch.testing.assert_close(embedding, clip.encode_text(tokens, normalize=True), atol=1e-6, rtol=1e-5)
    assert states.shape == (2, 12, 16)
    assert mask.sum(1).tolist() == [(tokens[0] != 0).sum(), (tokens[1] != 0).sum()]


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="widht"):
        build_clip(TINY | {"widht": 3})


CAPTIONS = [f"a {a} cube on a {b} ball" for a in ("red", "blue", "green") for b in ("red", "blue", "green")]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_swaps_keep_the_words_and_change_their_order(seed: int) -> None:
    tokens = open_clip.SimpleTokenizer(context_length=16)(CAPTIONS)
    false, found = SpanSwaps(tokens)(tokens, torch.Generator().manual_seed(seed))
    assert found.any()
    for true, other, ok in zip(tokens, false, found, strict=True):
        if ok:
            assert not torch.equal(true, other)
            assert sorted(true.tolist()) == sorted(other.tolist())
            assert true.argmax() == other.argmax()  # start and end stay in place
