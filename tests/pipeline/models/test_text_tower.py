"""Texts cut after their end against open_clip's full length; and the towers where a cut would be wrong."""

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from pipeline.models.devices import Place
from pipeline.models.text_tower import TextTower, batches
from tests.pipeline.models.test_clip import TINY

CPU = Place(torch.device("cpu"), torch.float32)
L, EOT = 20, 49407
TOKENIZER = open_clip.SimpleTokenizer(context_length=L)
TEXTS = [
    "a red cube", "one blue ball on a small green table", "", "!", "!!!!!!!! !!!", "0", " \n\t\u200b ", "\x00\x00",
    "a <end_of_text> in the middle", "<start_of_text>", "word " * 60, "été 東京 🙂",
]  # fmt: skip


def tokens(texts: list[str]) -> Tensor:
    found: Tensor = TOKENIZER(texts)
    return found


def model(kind: type[nn.Module] = CLIP, **text: Any) -> nn.Module:
    """Random weights, with positions and attention strong enough that padding would be felt."""
    torch.manual_seed(1)
    config: dict[str, Any] = TINY | {"text_cfg": TINY["text_cfg"] | {"context_length": L} | text}
    if kind is CoCa:
        config["multimodal_cfg"] = {"context_length": L, "width": 16, "heads": 2, "layers": 1}
        config["vision_cfg"] = config["vision_cfg"] | {
            "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True,
        }  # fmt: skip
        config["text_cfg"] |= {"output_tokens": True}
    built = kind(**config).eval()
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "positional" in name or "in_proj_weight" in name or "cls_emb" in name:
                weight.normal_(std=0.5)
    return built


def full(clip: nn.Module, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = F.normalize(clip.encode_text(tokens), dim=-1)
    return found


def lengths_run(tower: TextTower, tokens: Tensor, batch_size: int = 256) -> tuple[Tensor, list[int]]:
    """Vectors, and how many positions each batch had in the transformer."""
    seen = []
    hook = tower._tower.transformer.resblocks[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    vectors = tower(tokens, batch_size)
    hook.remove()
    return vectors, seen


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP, CoCa])
@pytest.mark.parametrize(
    "text",
    [
        {"pool_type": "argmax"},
        {"pool_type": "eos", "eos_id": EOT},
        {"pool_type": "eos", "eos_id": 3},  # in no text: read at the first token, as in open_clip
        {"pool_type": "first"},
        {"proj_bias": True},
        {"qk_norm": True, "ls_init_value": 0.3},
    ],
    ids=str,
)
def test_causal_towers_are_cut_and_agree_with_the_full_length(kind: type[nn.Module], text: dict[str, Any]) -> None:
    clip = model(kind, **text)
    tower = TextTower(clip, CPU)
    assert tower.whole is None
    short = [t for t in TEXTS if not t.startswith("word")]
    vectors, seen = lengths_run(tower, tokens(short))
    assert max(seen) < L
    torch.testing.assert_close(vectors, full(clip, tokens(short)), atol=1e-5, rtol=0)
    vectors, _ = lengths_run(tower, tokens(TEXTS))  # one of them fills the whole context
    torch.testing.assert_close(vectors, full(clip, tokens(TEXTS)), atol=1e-5, rtol=0)


def test_an_over_long_text_is_cut_by_the_tokenizer_and_read_at_its_end() -> None:
    tower, long = TextTower(model(), CPU), tokens(["word " * 60])
    assert tower.needed(long).tolist() == [L]
    assert tower.needed(tokens(["", "red cube"])).tolist() == [2, 4]  # start, (two words,) end
    assert int(long[0, -1]) == EOT


WHOLE = {
    "bidirectional": (CustomTextCLIP, {"no_causal_mask": True}, "causal"),
    "bidirectional, in CLIP": (CLIP, {"no_causal_mask": True}, "causal"),
    "as SigLIP": (CustomTextCLIP, {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, "causal"),
    "last token": (CustomTextCLIP, {"pool_type": "last"}, "one token"),
    "last token, in CLIP": (CLIP, {"pool_type": "last"}, "one token"),
    "class embedding": (CustomTextCLIP, {"embed_cls": True}, "class embedding"),
    "CoCa": (CoCa, {"embed_cls": True}, "class embedding"),
}


def cut_anyway(tower: TextTower, tokens: Tensor) -> Tensor:
    """What a cut after the last end would give."""
    own, length = tower._tower, int(tokens.argmax(1).max()) + 1
    if own.attn_mask is None:  # open_clip cannot do without the mask's length, nor we with none
        own.attn_mask = torch.zeros(L, L)
    with torch.inference_mode():
        if getattr(own, "cls_emb", None) is not None:
            found = own(tokens[:, :length])
            return F.normalize(found[0] if isinstance(found, tuple) else found, dim=-1)
        pool = own.text_pool_type if isinstance(own, CLIP) else own.pool_type
        at = tokens.argmax(1) if pool == "argmax" else torch.full((len(tokens),), length - 1)
        return F.normalize(tower._short(tokens[:, :length], at), dim=-1)


@pytest.mark.parametrize("name", WHOLE)
def test_where_a_cut_would_be_wrong_texts_stay_whole(name: str) -> None:
    kind, text, why = WHOLE[name]
    clip, some = model(kind, **text), tokens(["a red cube", "one blue ball", "", "a red cube on a blue ball"])
    tower = TextTower(clip, CPU)
    assert why in (tower.whole or "")
    expected = full(clip, some)
    vectors, seen = lengths_run(tower, some)
    assert min(seen) >= L
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)
    assert float((cut_anyway(tower, some) - expected).abs().max()) > 1e-3  # a cut would have changed them


class Padded(TextTransformer):
    """Somebody else's tower, whose forward pass we do not know."""


def test_unknown_towers_stay_whole() -> None:
    clip = model(CustomTextCLIP)
    clip.text = Padded(context_length=L, vocab_size=49408, width=16, heads=2, layers=1, output_dim=16)
    assert "Padded" in (TextTower(clip, CPU).whole or "")
    masked = TextTransformer(
        L, 49408, width=16, heads=2, layers=1, output_dim=16, no_causal_mask=True, use_pad_mask=True
    )
    clip.text = masked.eval()
    tower, some = TextTower(clip, CPU), tokens(["a red cube", ""])
    assert "causal" in (tower.whole or "")
    torch.testing.assert_close(tower(some, 8), full(clip, some), atol=1e-5, rtol=0)


def test_argmax_reads_where_the_highest_id_is_not_at_the_end_token() -> None:
    """A tokenizer whose end token is 2 and whose padding is 90: argmax reads at the first padding, past the end."""
    clip = model(vocab_size=91)
    tower = TextTower(clip, CPU)
    some = torch.full((2, L), 90)
    some[0, :4], some[1, :6] = torch.tensor([1, 40, 41, 2]), torch.tensor([1, 50, 51, 52, 53, 2])
    assert tower.needed(some).tolist() == [5, 7]
    expected = full(clip, some)
    torch.testing.assert_close(tower(some, 8), expected, atol=1e-5, rtol=0)
    with torch.inference_mode():
        at_the_end = F.normalize(tower._short(some[:, :6], torch.tensor([3, 5])), dim=-1)
    assert float((at_the_end - expected).abs().max()) > 1e-3


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 90), min_size=L, max_size=L), min_size=1, max_size=9))
def test_any_tokens_give_the_vectors_of_the_full_length(rows: list[list[int]]) -> None:
    clip, some = CLIPS[len(rows) % len(CLIPS)], torch.tensor(rows)
    torch.testing.assert_close(TextTower(clip, CPU)(some, 2), full(clip, some), atol=1e-5, rtol=0)


CLIPS = [model(vocab_size=91, pool_type=pool) for pool in ("argmax", "eos")]  # end of text is 2


@given(st.lists(st.integers(1, 77), max_size=200), st.integers(1, 400))
def test_batches_hold_every_row_once_and_keep_to_the_budget(needed: list[int], budget: int) -> None:
    found = [rows.tolist() for rows in batches(torch.tensor(needed, dtype=torch.long), budget)]
    assert sorted(r for rows in found for r in rows) == list(range(len(needed)))
    for rows in found:
        lengths = [needed[r] for r in rows]
        assert lengths == sorted(lengths)
        assert len(rows) * lengths[-1] <= budget or len(rows) == 1
