"""Transformer blocks for inference: the same numbers as open_clip's, with less work on the way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """The weights of an ``nn.MultiheadAttention`` as two linear layers around torch's fused attention.

    Gives the same numbers. On a CPU it is faster than the original with a mask, which texts have, and as fast without;
    and linear layers can be quantised, which the original's cannot.
    """

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, width = whole.num_heads, whole.embed_dim
        self.in_proj = nn.Linear(width, 3 * width, device="meta")
        self.in_proj.weight, self.in_proj.bias = whole.in_proj_weight, whole.in_proj_bias
        self.out_proj = nn.Linear(width, width, device="meta")
        self.out_proj.weight, self.out_proj.bias = whole.out_proj.weight, whole.out_proj.bias

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """x [B, L, W], additive mask [L, L] or [B * heads, L, L] -> [B, L, W]; ``key`` and ``value`` are ``x``."""
        b, length, _ = x.shape
        q, k, v = self._split(x)
        if attn_mask is not None:
            attn_mask = attn_mask.to(q.dtype)
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.view(b, self.heads, length, length)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)  # [B, heads, L, W / heads]
        return self.out_proj(y.transpose(1, 2).reshape(x.shape)), None

    def at(self, x: Tensor, place: Tensor, attn_mask: Tensor | None) -> Tensor:
        """What ``forward`` gives at one place of each row: x [B, L, W], place [B], mask [L, L] -> [B, W]."""
        q, k, v = self._split(x)
        rows = torch.arange(len(x), device=x.device)
        q = q[rows, :, place, None]  # [B, heads, 1, W / heads]
        mask = None if attn_mask is None else attn_mask.to(q.dtype)[place, None, None]  # [B, 1, 1, L]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, heads, 1, W / heads]
        return self.out_proj(y.flatten(1))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, heads, L, W / heads]."""
        q, k, v = self.in_proj(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v


class ClassTokenOnly(nn.Module):
    """A vision transformer's last block, worked out at the class token alone: nothing behind it reads the others."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x [B, L, W] -> [B, 1, W]."""
        return block_at(self.block, x, torch.zeros(len(x), dtype=torch.long, device=x.device), attn_mask)[:, None]


def block_at(block: Any, x: Tensor, place: Tensor, attn_mask: Tensor | None) -> Tensor:
    """A block's output at one place of each row: x [B, L, W], place [B] -> [B, W]. Most of its work is per place."""
    if not isinstance(block.attn, SelfAttention):
        return block(x, attn_mask=attn_mask)[torch.arange(len(x), device=x.device), place]
    y = x[torch.arange(len(x), device=x.device), place] + block.ls_1(block.attn.at(block.ln_1(x), place, attn_mask))
    return y + block.ls_2(block.mlp(block.ln_2(y)))


def use_class_token_only(model: Any) -> bool:
    """Exchange the last block of a vision transformer whose vector is read at its class token. Returns whether."""
    visual = model.visual
    if type(visual) is not VisionTransformer or visual.attn_pool is not None or visual.output_tokens:
        return False
    blocks = visual.transformer.resblocks
    if visual.pool_type != "tok" or not isinstance(getattr(blocks[-1], "attn", None), SelfAttention):
        return False
    blocks[-1] = ClassTokenOnly(blocks[-1])
    return True


def use_self_attention(model: nn.Module) -> int:
    """Exchange the attention of open_clip's own transformer blocks, in place. Returns how many were."""
    exchanged = 0
    for module in model.modules():
        block: Any = module
        if type(block) is ResidualAttentionBlock and not hasattr(block, "ln_1_kv") and _is_plain(block.attn):
            block.attn = SelfAttention(block.attn)
            exchanged += 1
    return exchanged


def _is_plain(attention: Any) -> bool:
    return (
        type(attention) is nn.MultiheadAttention
        and attention.batch_first
        and attention.in_proj_weight is not None
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
    )
