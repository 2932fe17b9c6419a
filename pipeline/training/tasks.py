"""What is trained: CLIP on pairs, the prior on embeddings, the decoder on images and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.clip import (
    SpanSwaps,
    build_clip,
    contrastive_loss,
    decorrelation_loss,
    gather_with_grad,
    no_gather,
)
from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder, pick_device
from pipeline.models.prior import DiffusionPrior
from pipeline.training.data import Pictures, to_input
from pipeline.training.loop import Rows
from schemas.configs import ClipTrainConfig, DecoderTrainConfig, PriorTrainConfig

_CACHE = 1 << 30
_SWAPS = 1


class ClipTask:
    """Contrastive training (CLIP, figure 3), with optional decorrelation and false captions."""

    def __init__(
        self,
        config: ClipTrainConfig,
        open_clip_config: dict[str, Any],
        pictures: Pictures,
        tokens: Tensor,
        world: int,
    ) -> None:
        torch.manual_seed(config.seed)
        self.module: nn.Module = build_clip(open_clip_config["model_cfg"])
        self.config, self.pictures, self.tokens, self.size = config, pictures, tokens, len(tokens)
        self.gather = gather_with_grad if world > 1 else no_gather
        self.swaps = SpanSwaps(tokens) if config.hard_negatives else None
        self.device = pick_device()
        preprocess = open_clip_config["preprocess_cfg"]
        self.mean = torch.tensor(preprocess["mean"], device=self.device).view(3, 1, 1) * 255
        self.std = torch.tensor(preprocess["std"], device=self.device).view(3, 1, 1) * 255

    def loss(self, rows: Rows, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model: Any = self.module
        pixels = (self.pictures[rows].to(self.device).float() - self.mean) / self.std  # [B, 3, S, S]
        tokens, n = self.tokens[torch.from_numpy(rows)], len(rows)
        image = model.encode_image(pixels, normalize=True)  # [B, D]
        if self.swaps is not None:
            false, found = self.swaps(tokens, generator)
            # Where no swap is plausible the vector is zero: a wrong answer that costs next to nothing, and all
            # workers keep B rows.
            both = model.encode_text(torch.cat([tokens, false]).to(self.device), normalize=True)  # [2B, D]
            text, negatives = both[:n], both[n:] * found.to(self.device).unsqueeze(1)
        else:
            text, negatives = model.encode_text(tokens.to(self.device), normalize=True), None
        scale = model.logit_scale.exp().clamp(max=100)
        contrast = contrastive_loss(image, text, scale, negatives=negatives, gather=self.gather)
        figures = {"contrast": contrast.detach(), "scale": scale.detach()}
        if not self.config.decorrelation:
            return contrast, figures
        spread = decorrelation_loss(image, gather=self.gather) + decorrelation_loss(text, gather=self.gather)
        ramp = min((step + 1) / max(self.config.decorrelation_warmup, 1), 1.0)
        return contrast + self.config.decorrelation * ramp * spread, figures | {"spread": spread.detach()}


class PriorTask:
    """Text embedding and states -> image embedding (DALL-E 2, section 2.2)."""

    def __init__(
        self, config: PriorTrainConfig, encoder: Encoder, captions: Sequence[str], image: Tensor, text: Tensor
    ) -> None:
        torch.manual_seed(config.seed)
        self.states = _TextStates(encoder, captions)
        network = config.network.model_copy(
            update={
                "embed_dim": encoder.card.dim,
                "state_dim": self.states.width,
                "context_length": encoder.card.context_length,
            }
        )
        model = DiffusionPrior(network)
        model.fit_whitening(image, text, config.whitening_floor)
        self.module: nn.Module = model
        self.image, self.text, self.size, self.device = image, text, len(image), pick_device()

    def loss(self, rows: Rows, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        states, mask = self.states(rows)
        index = torch.from_numpy(rows)
        model: Any = self.module
        image, text = self.image[index].to(self.device), self.text[index].to(self.device)
        return model.loss(image, text, states, mask, generator), {}


class DecoderTask:
    """Image and text embedding -> picture (DALL-E 2, section 2.1)."""

    def __init__(self, config: DecoderTrainConfig, pictures: Pictures, image: Tensor, text: Tensor) -> None:
        torch.manual_seed(config.seed)
        model = Decoder(config.network)
        model.fit_whitening(image, text, config.whitening_floor)
        self.module: nn.Module = model
        self.pictures, self.image, self.text = pictures, image, text
        self.size, self.device = len(image), pick_device()

    def loss(self, rows: Rows, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.from_numpy(rows)
        model: Any = self.module
        x0 = to_input(self.pictures[rows].to(self.device))  # [B, 3, S, S]
        return model.loss(x0, self.image[index].to(self.device), self.text[index].to(self.device), generator), {}


class _TextStates:
    """States of the captions' frozen text tower: each different caption once where they fit into memory."""

    def __init__(self, encoder: Encoder, captions: Sequence[str]) -> None:
        unique, self._which = np.unique(np.asarray(captions, dtype=object), return_inverse=True)
        self._encoder, self._unique = encoder, unique.tolist()
        _, states, _ = encoder.states(self._unique[:1])
        self.width = int(states.shape[2])
        self._cached: tuple[Tensor, Tensor] | None = None
        if len(unique) * states.shape[1] * self.width * 2 <= _CACHE:
            parts = [self._encode(self._unique[i : i + 512]) for i in range(0, len(unique), 512)]
            self._cached = torch.cat([s.half() for s, _ in parts]), torch.cat([m for _, m in parts])

    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        _, states, mask = self._encoder.states(captions)
        return states, mask

    def __call__(self, rows: Rows) -> tuple[Tensor, Tensor]:
        which = self._which[rows]
        if self._cached is None:
            states, mask = self._encode([self._unique[i] for i in which])
            return states.clone(), mask.clone()  # out of inference mode
        index = torch.from_numpy(which).to(self._cached[0].device)
        return self._cached[0][index].float(), self._cached[1][index]
