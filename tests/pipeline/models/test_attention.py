"""The exchanged attention against nn.MultiheadAttention's, in every tower that has it."""

import copy
from typing import Any

import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock
from torch import nn

from pipeline.models.attention import SelfAttention, block_at, use_class_token_only, use_self_attention
from pipeline.models.clip import build_clip
from tests.pipeline.models.test_clip import TINY
from tests.pipeline.models.test_text_tower import model, tokens


@pytest.mark.parametrize("masked", ["no", "one", "each"])
def test_same_numbers_as_torchs(masked: str) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    x = torch.randn(5, 7, 24)
    mask = {"no": None, "one": torch.randn(7, 7), "each": torch.randn(5 * 3, 7, 7)}[masked]
    if mask is not None:
        mask[mask > 1] = -torch.inf
        mask[..., 0] = 0.0
    with torch.inference_mode():
        expected, _ = theirs(x, x, x, need_weights=False, attn_mask=mask)
        ours, _ = SelfAttention(theirs)(x, x, x, need_weights=False, attn_mask=mask)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "text", "blocks"),
    [
        (CLIP, {}, 3),
        (CustomTextCLIP, {"no_causal_mask": True}, 3),
        (CoCa, {"embed_cls": True}, 4),
        (CLIP, {"qk_norm": True}, 1),
    ],
)
def test_models_stay_the_same(kind: type[nn.Module], text: dict[str, Any], blocks: int) -> None:
    before = model(kind, **text)
    after = copy.deepcopy(before)
    assert use_self_attention(after) == blocks  # CoCa: and its decoder's one; not its cross-attention
    some, x = tokens(["a red cube", "", "one blue ball on a table"]), torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(after.encode_image(x), before.encode_image(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after.encode_text(some), before.encode_text(some), atol=1e-5, rtol=1e-5)
    assert use_self_attention(after) == 0


@pytest.mark.parametrize("masked", [False, True])
def test_one_place_of_a_block_is_what_the_whole_block_gives_there(masked: bool) -> None:
    torch.manual_seed(0)
    block = ResidualAttentionBlock(24, 3, ls_init_value=0.5).eval()
    x, place = torch.randn(5, 7, 24), torch.tensor([0, 6, 3, 3, 1])
    mask = torch.full((7, 7), -torch.inf).triu(1) if masked else None
    with torch.inference_mode():
        expected = block(x, attn_mask=mask)[torch.arange(5), place]
        torch.testing.assert_close(block_at(block, x, place, mask), expected)  # as it is
        block.attn = SelfAttention(block.attn)
        torch.testing.assert_close(block_at(block, x, place, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("vision", "exchanged"),
    [
        ({}, True),
        ({"layers": 3, "final_ln_after_pool": True}, True),
        ({"pool_type": "avg"}, False),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, False),
        ({"qk_norm": True}, False),
        ({"layers": [1, 1, 1, 1], "image_size": 32}, False),
    ],
    ids=str,
)
def test_only_the_class_token_is_worked_out_where_only_it_is_read(vision: dict[str, Any], exchanged: bool) -> None:
    torch.manual_seed(0)
    before = build_clip(TINY | {"vision_cfg": TINY["vision_cfg"] | vision}).eval()
    after = copy.deepcopy(before)
    use_self_attention(after)
    assert use_class_token_only(after) is exchanged
    x = torch.randn(4, 3, *[vision.get("image_size", 16)] * 2)
    with torch.inference_mode():
        torch.testing.assert_close(after.encode_image(x), before.encode_image(x), atol=1e-5, rtol=1e-5)
