"""PCA whitening of vectors: every kept direction gets about the same variance.

Contrastive embeddings are dimensionally collapsed (Jing et al., «Understanding Dimensional Collapse
in Contrastive Self-supervised Learning», 2022): what a decoder needs may sit in directions of little
variance, which a loss in the raw space ignores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Whitening(nn.Module):
    """z = (x - mean) R / s, with the principal axes R and s_i = sqrt(max(var_i, floor * max var)).

    The buffers are part of a model's weights, so the constants travel with it.
    """

    mean: Tensor
    rotation: Tensor
    scale: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))  # [D]
        self.register_buffer("rotation", torch.eye(dim))  # [D, D], columns are the axes
        self.register_buffer("scale", torch.ones(dim))  # [D]

    @torch.no_grad()
    def fit(self, vectors: Tensor, floor: float = 1e-3) -> Whitening:
        """Take the constants from vectors [N, D]; `floor` keeps noise from being blown up."""
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean) or len(vectors) < 2:
            raise ValueError(
                f"expected at least two vectors of {len(self.mean)} dimensions, got shape {tuple(vectors.shape)}"
            )
        x = vectors.to(torch.float64)
        mean = x.mean(0)  # [D]
        covariance = (x - mean).T @ (x - mean) / (len(x) - 1)  # [D, D]
        variance, axes = torch.linalg.eigh(covariance)  # ascending
        variance, axes = variance.flip(0), axes.flip(1)
        sign = torch.sign(axes[axes.abs().argmax(0), torch.arange(axes.shape[1])])  # a unique answer
        self.mean.copy_(mean)
        self.rotation.copy_(axes * sign)
        self.scale.copy_(variance.clamp(min=float(variance[0]) * floor).sqrt())
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Vectors [..., D] -> whitened vectors [..., D]."""
        return (x - self.mean) @ self.rotation / self.scale

    def inverse(self, z: Tensor) -> Tensor:
        """Whitened vectors [..., D] -> vectors [..., D]."""
        return (z * self.scale) @ self.rotation.T + self.mean
