"""Rows of a batch that don't depend on one another, to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST = 8


def padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors [B, ...] with at least FEWEST rows, by repeating the last one.

    For a handful of rows CPU libraries choose other kernels, which sum in another order: the
    same row alone would then differ in its last bits from the same row in a batch.
    """
    return tuple(
        x if len(x) >= FEWEST else torch.cat([x, x[-1:].expand(FEWEST - len(x), *x.shape[1:])]) for x in tensors
    )
