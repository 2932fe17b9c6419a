"""Generate: prompts -> candidate pictures, each a function of (prompt, number, seed, models) alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder
from pipeline.models.prior import DiffusionPrior
from schemas.keys import candidate_seed


@dataclass(frozen=True)
class Sampling:
    """How to sample: decoder steps and guidance, prior steps, trust in the prior's embedding."""

    steps: int
    guidance: float
    prior_steps: int
    blur: float = 0.0

    def __str__(self) -> str:
        return f"steps={self.steps} guidance={self.guidance:g} prior_steps={self.prior_steps} blur={self.blur:g}"


class GenerateStage:
    """(prompt, candidate number) pairs -> pictures uint8 [N, S, S, 3].

    Every forward pass has ``batch_size`` rows, padded if need be: kernels choose their order of summation by
    the shape, so a candidate's bits do not depend on how many others there are.
    """

    def __init__(
        self, encoder: Encoder, prior: DiffusionPrior, decoder: Decoder, sampling: Sampling, batch_size: int
    ) -> None:
        self.encoder, self.prior, self.decoder = encoder, prior, decoder
        self.sampling, self.batch_size = sampling, batch_size

    def __call__(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> NDArray[np.uint8]:
        parts = []
        for start in range(0, len(prompts), self.batch_size):
            some = list(prompts[start : start + self.batch_size])
            which = list(numbers[start : start + self.batch_size])
            spare = self.batch_size - len(some)
            pictures = self._batch(some + some[-1:] * spare, which + which[-1:] * spare, seed)
            parts.append(pictures[: len(some)])
        return np.concatenate(parts)

    @torch.inference_mode()
    def _batch(self, prompts: list[str], numbers: list[int], seed: int) -> NDArray[np.uint8]:
        s, device, size = self.sampling, self.encoder.device, self.decoder.config.image_size
        text, states, mask = self.encoder.states(prompts)  # [B, D], [B, L, W], [B, L]
        noise = self._noise(prompts, numbers, seed, "prior", (text.shape[1],)).to(device)  # [B, D]
        image = self.prior.sample(text, states, mask, noise, s.prior_steps)  # [B, D]
        noise = self._noise(prompts, numbers, seed, "decoder", (3, size, size)).to(device)
        x = self.decoder.sample(image, text, noise, steps=s.steps, guidance=s.guidance, blur=s.blur)
        pixels = x.add(1).mul(127.5).round().clamp(0, 255).byte()  # [B, 3, S, S]
        return np.asarray(pixels.permute(0, 2, 3, 1).cpu().numpy())

    @staticmethod
    def _noise(prompts: list[str], numbers: list[int], seed: int, purpose: str, shape: tuple[int, ...]) -> Tensor:
        rows = []
        for prompt, number in zip(prompts, numbers, strict=True):
            generator = torch.Generator().manual_seed(candidate_seed(prompt, number, seed, purpose))
            rows.append(torch.randn(shape, generator=generator))
        return torch.stack(rows)


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture uint8 [S, S, 3] as PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
