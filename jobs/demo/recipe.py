"""The demo's recipe: sizes and schedules for two cores and about eight minutes of training.

docs/demo.md tells how each number was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from schemas.networks import DecoderConfig, PriorConfig

CONTEXT_LENGTH = 24
EMBED_DIM = 64

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": EMBED_DIM,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 64,
        "layers": 4,
        "head_width": 16,
        "pool_type": "avg",
    },
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 2,
    },
}

PRIOR_CONFIG = PriorConfig(width=128, head_width=32, layers=4, use_states=False)
DECODER_CONFIG = DecoderConfig()


@dataclass(frozen=True, kw_only=True)
class ClipRecipe:
    steps: int = 1400
    batch: int = 128  # over all workers
    lr: float = 3e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.02
    pairs: float = 5.0  # weight of the ordered-pairs loss
    warmup: int = 100
    decorrelation: float = 0.3
    decorrelation_ramp: int = 200
    negatives: bool = True  # false captions by span swaps


@dataclass(frozen=True, kw_only=True)
class PriorRecipe:
    steps: int = 1500
    batch: int = 256
    lr: float = 2e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.01
    warmup: int = 100
    ema: float = 0.995
    whitening_floor: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe:
    steps: int = 1300
    batch: int = 64
    lr: float = 2e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.01
    warmup: int = 100
    ema: float = 0.995
    whitening_floor: float = 1e-3


PRIOR_STEPS = 5  # sampling
DECODER_STEPS = 8
GUIDANCE = 1.5
