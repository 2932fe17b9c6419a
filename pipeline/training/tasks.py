"""What is trained: CLIP on pairs, the prior on embeddings, the decoder on images and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.clip import (
    OrderedPairs,
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


class ClipWithHeads(nn.Module):
    """A CLIP and what is only trained with it."""

    def __init__(self, clip: nn.Module, pairs: OrderedPairs | None) -> None:
        super().__init__()
        self.clip, self.pairs = clip, pairs


class ClipTask:
    """Contrastive training (CLIP, figure 3), with optional decorrelation, false captions and ordered pairs."""

    def __init__(
        self, config: ClipTrainConfig, open_clip_config: dict[str, Any], pictures: Pictures, tokens: Tensor, world: int
    ) -> None:
        torch.manual_seed(config.seed)
        network = open_clip_config["model_cfg"]
        clip = build_clip(network)
        pairs = OrderedPairs(tokens, network["embed_dim"]) if config.ordered_pairs else None
        self.module: nn.Module = ClipWithHeads(clip, pairs)
        self.config, self.pictures, self.tokens, self.size = config, pictures, tokens, len(tokens)
        self.gather = gather_with_grad if world > 1 else no_gather
        self.swaps = SpanSwaps(tokens) if config.hard_negatives else None
        self.device = pick_device()
        preprocess = open_clip_config["preprocess_cfg"]
        self.mean = torch.tensor(preprocess["mean"], device=self.device).view(3, 1, 1) * 255
        self.std = torch.tensor(preprocess["std"], device=self.device).view(3, 1, 1) * 255

    def loss(self, rows: Rows, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model: Any = self.module
        clip, config = model.clip, self.config
        pixels = (self.pictures[rows].to(self.device).float() - self.mean) / self.std  # [B, 3, S, S]
        tokens = self.tokens[torch.from_numpy(rows)]  # [B, L]
        image = clip.encode_image(pixels, normalize=True)  # [B, D]
        text, negatives = self._texts(clip, tokens, generator)
        scale = clip.logit_scale.exp().clamp(max=100)
        loss = contrastive_loss(image, text, scale, negatives=negatives, gather=self.gather)
        figures = {"contrast": loss.detach(), "scale": scale.detach()}
        if config.decorrelation:
            spread = decorrelation_loss(image, gather=self.gather) + decorrelation_loss(text, gather=self.gather)
            ramp = min((step + 1) / max(config.decorrelation_warmup, 1), 1.0)
            loss = loss + config.decorrelation * ramp * spread
            figures["spread"] = spread.detach()
        if model.pairs is not None:
            targets = model.pairs.targets(tokens.to(self.device))
            told = (model.pairs.loss(image, targets) + model.pairs.loss(text, targets)) / 2
            loss = loss + config.ordered_pairs * told
            figures["pairs"] = told.detach()
        return loss, figures

    def _texts(self, clip: Any, tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the captions [B, D], and of a false one for each [B, D]."""
        if self.swaps is None:
            return clip.encode_text(tokens.to(self.device), normalize=True), None
        false, found = self.swaps(tokens, generator)
        both = clip.encode_text(torch.cat([tokens, false]).to(self.device), normalize=True)  # [2B, D]
        # Where no swap is plausible the vector is zero: a wrong answer that costs next to nothing, and all
        # workers keep B rows.
        return both[: len(tokens)], both[len(tokens) :] * found.to(self.device).unsqueeze(1)


class PriorTask:
    """Text embedding and states -> image embedding (DALL-E 2, section 2.2)."""

    def __init__(
        self, config: PriorTrainConfig, encoder: Encoder, captions: Sequence[str], image: Tensor, text: Tensor
    ) -> None:
        torch.manual_seed(config.seed)
        self.states = _TextStates(encoder, captions) if config.network.use_states else None
        sizes = {"embed_dim": encoder.card.dim, "context_length": encoder.card.context_length}
        if self.states is not None:
            sizes["state_dim"] = self.states.width
        model = DiffusionPrior(config.network.model_copy(update=sizes))
        model.fit_whitening(image, text, config.whitening_floor)
        self.module: nn.Module = model
        self.image, self.text, self.size, self.device = image, text, len(image), pick_device()

    def loss(self, rows: Rows, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.from_numpy(rows)
        model: Any = self.module
        image, text = self.image[index].to(self.device), self.text[index].to(self.device)
        if self.states is not None:
            states, mask = self.states(rows)
        else:  # the network looks at the embedding alone
            states, mask = text[:, None], torch.ones(len(rows), 1, dtype=torch.bool, device=self.device)
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
