"""CLIP's text tower without the work on padding, wherever that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from pipeline.models.attention import block_at
from pipeline.models.devices import Place, Room

_CPU_TOKENS = 1024
"""Tokens in one forward pass on a CPU: more do not stay in its caches."""


class TextTower:
    """Tokens -> unit-norm vectors, for any open_clip model.

    In a causal tower the state at a token depends on no later one, and a text's vector is read at one token, its end.
    So every batch is cut after the last end in it: exact, whatever the tokenizer and its end token. Other towers
    (bidirectional ones, a class embedding behind the padding as in CoCa, pooling at the last token or over all,
    HuggingFace's) see the full length, and ``whole`` says why.
    """

    def __init__(self, model: nn.Module, place: Place) -> None:
        self._model: Any = model
        self._tower: Any = getattr(model, "text", model)  # CLIP keeps its tower's parts itself
        self._place = place
        self.whole = why_whole(model)
        self.room = Room("texts")

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, batch_size: int) -> Tensor:
        """tokens [N, L] -> unit-norm float32 [N, D] on the CPU.

        One forward pass takes as many tokens as ``batch_size`` texts of full length have.
        """
        needed = self.needed(tokens)  # [N]
        budget = batch_size * tokens.shape[1]
        if self._place.device.type == "cpu":
            budget = min(budget, _CPU_TOKENS)
        order, parts = [], []
        for rows in batches(needed, budget):
            length = int(needed[rows[-1]])

            def forward(rows: Tensor, length: int = length) -> Tensor:
                return self._forward(tokens[rows, :length], needed[rows] - 1)

            order.append(rows)
            parts.append(self.room.run(forward, rows, cost=length))
        vectors = torch.cat(parts).cpu()
        return torch.empty_like(vectors).index_copy_(0, torch.cat(order), vectors)

    def needed(self, tokens: Tensor) -> Tensor:
        """How many tokens of each text [N, L] its vector depends on: [N], all up to the one that it is read at."""
        if self.whole is not None:
            return torch.full((len(tokens),), tokens.shape[1])
        pool, end = _pooling(self._tower)
        if pool == "first":
            return torch.ones(len(tokens), dtype=torch.long)
        return (tokens if pool == "argmax" else (tokens == end).int()).argmax(1) + 1  # the first of several, as there

    def _forward(self, tokens: Tensor, read_at: Tensor) -> Tensor:
        """tokens [B, l], read_at [B] -> [B, D]."""
        device = self._place.device
        with self._place.autocast():
            if self.whole is None:
                vectors = self._short(tokens.to(device), read_at.to(device))
            else:
                vectors = self._model.encode_text(tokens.to(device))
        return F.normalize(vectors.float(), dim=-1)

    def _short(self, tokens: Tensor, read_at: Tensor) -> Tensor:
        """open_clip's ``encode_text``, which adds all positions and the whole mask, for a shorter length."""
        tower, length = self._tower, tokens.shape[1]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)  # [B, l, W]
        mask = tower.attn_mask[:length, :length]
        *blocks, last = tower.transformer.resblocks
        for block in blocks:
            x = block(x, attn_mask=mask)  # [B, l, W]
        x = tower.ln_final(block_at(last, x, read_at, mask))  # [B, W]
        projection = tower.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Module) else x @ projection  # [B, D]


def why_whole(model: nn.Module) -> str | None:
    """Why a model's texts must not be cut after their end; None if they may be."""
    tower: Any = getattr(model, "text", model)
    if type(tower) not in (CLIP, TextTransformer):
        return f"{type(tower).__name__} is not open_clip's own text tower"
    if getattr(tower, "cls_emb", None) is not None:
        return "its class embedding comes after the padding"
    if not tower.transformer.batch_first:
        return "its rows are not texts"
    mask = tower.attn_mask
    if mask is None or not bool((mask.triu(1) == torch.full_like(mask, -torch.inf).triu(1)).all()):
        return "its attention is not causal"
    if _pooling(tower)[0] not in ("argmax", "eos", "first"):
        return "it is not read at one token of the text"
    return None


def _pooling(tower: Any) -> tuple[str, int]:
    """Where the vector is read, in open_clip's terms, and the id of the end-of-text token."""
    if isinstance(tower, CLIP):
        return tower.text_pool_type, tower.text_eos_id
    return tower.pool_type, tower.eos_id


def batches(needed: Tensor, budget: int) -> Iterator[Tensor]:
    """Rows from the shortest to the longest, cut so that rows x longest of a batch is at most ``budget``.

    needed [N]: tokens of each row. A row above the budget is a batch of its own.
    """
    order = needed.argsort(stable=True)
    start = 0
    for i, length in enumerate(needed[order].tolist()):
        if i > start and (i - start + 1) * length > budget:
            yield order[start:i]
            start = i
    if start < len(order):
        yield order[start:]
