"""Trained networks to and from their files: safetensors, with the card telling how to build them."""

from __future__ import annotations

from typing import TypeVar

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from pipeline.models.decoder import Decoder
from pipeline.models.encoder import weights_sha256
from pipeline.models.prior import DiffusionPrior
from schemas.cards import ModelCard
from schemas.errors import CardError
from schemas.networks import DecoderConfig, PriorConfig

M = TypeVar("M", bound=nn.Module)


def to_bytes(module: nn.Module) -> bytes:
    """A module's state as safetensors."""
    return save_tensors({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()})


def load_prior(card: ModelCard, data: bytes, device: torch.device) -> DiffusionPrior:
    """Raises CardError unless the weights are those that the card describes."""
    return _load(DiffusionPrior(PriorConfig.model_validate(card.config["network"])), card, data, device)


def load_decoder(card: ModelCard, data: bytes, device: torch.device) -> Decoder:
    """Raises CardError unless the weights are those that the card describes."""
    return _load(Decoder(DecoderConfig.model_validate(card.config["network"])), card, data, device)


def _load(module: M, card: ModelCard, data: bytes, device: torch.device) -> M:
    try:
        module.load_state_dict(load_tensors(data))
    except Exception as exc:  # safetensors raises its own errors, torch RuntimeError: both mean the same
        raise CardError(f"the weights of {card.kind} {card.name} do not load", actual=str(exc)[:300]) from exc
    if weights_sha256(module) != card.weights_sha256:
        raise CardError(
            f"the weights of {card.kind} {card.name} are not those that its card describes",
            remedy=f"train it again, or restore models/{card.kind}/{card.name}",
        )
    return module.to(device).eval().requires_grad_(False)
