"""A CLIP with int8 weights on the CPU: faster, and another encoder, since its vectors are not the same."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from schemas.cards import EncoderCard
from schemas.errors import UsageError


def quantise(model: Any, image_size: int, tokens: torch.Tensor) -> nn.Module:
    """Linear layers to int8 weights with activations quantised as they come (dynamic quantisation), in place.

    MLPs and projections of attention, that is. ``nn.MultiheadAttention`` would keep float32, holding its input
    projection as a bare parameter and marking the output one as not to be quantised: see ``SelfAttention``, which is to
    take its place first. Convolutions, embeddings and the last projections stay.

    Args:
        model: of open_clip.
        tokens: [1, L], any text, to try the model with.

    Raises:
        UsageError: the model has nothing to quantise, or does not run quantised.
    """
    names = {n for n, m in model.named_modules() if type(m) is nn.Linear and not _read_elsewhere(n)}
    if not names:
        raise UsageError("--precision int8: the model has no linear layers to quantise", remedy="use float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the module deprecated, and has no other for linear layers on CPU
        torch.ao.quantization.quantize_dynamic(model, names, dtype=torch.qint8, inplace=True)
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            module.__dict__["int8_original_dtype"] = torch.float32  # open_clip asks for it; `weight` is a method here
    try:
        with torch.inference_mode():
            model.encode_image(torch.zeros(1, 3, image_size, image_size))
            model.encode_text(tokens)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as exc:
        raise UsageError(
            "--precision int8: the model does not run quantised", actual=str(exc)[:300], remedy="use float32"
        ) from exc
    network: nn.Module = model
    return network


def int8_card(card: EncoderCard) -> EncoderCard:
    """The card of the quantised model: another id and digest than ``card``, so that vectors never mix."""
    digest = hashlib.sha256(f"{card.weights_sha256} int8".encode()).hexdigest()
    return card.model_copy(update={"dtype": "int8", "weights_sha256": digest})


def cosines(a: NDArray[np.float32], b: NDArray[np.float32], name: str) -> dict[str, float]:
    """Mean and least cosine of unit-norm vectors [N, D] row by row, as ``NAME_mean`` and ``NAME_min``."""
    each = np.einsum("nd,nd->n", a, b)
    return {f"{name}_mean": float(each.mean()), f"{name}_min": float(each.min())} if len(each) else {}


def _read_elsewhere(name: str) -> bool:
    """Layers whose weights open_clip reads itself: text projections, and attention pooling of its ResNets."""
    return name.endswith("text_projection") or "attnpool" in name.split(".")
