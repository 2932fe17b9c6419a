"""The demo's recipe as the configs of the training jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.demo import recipe
from schemas.configs import ClipTrainConfig, DecoderTrainConfig, DemoConfig, PriorTrainConfig

NAME = "demo"


def clip(config: DemoConfig, workspace: str, workers: int, folder: Path) -> ClipTrainConfig:
    """Training of CLIP, over ``workers`` workers. Writes the network's config to ``folder``."""
    r = recipe.ClipRecipe()
    network = folder / "clip.json"
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    network.write_text(json.dumps({"model_cfg": recipe.CLIP_CONFIG, "preprocess_cfg": preprocess}, indent=2) + "\n")
    return ClipTrainConfig(
        **_shared(config, workspace, r),
        workers=workers,
        model=str(network),
        decorrelation=r.decorrelation,
        decorrelation_warmup=r.decorrelation_ramp,
        hard_negatives=bool(r.negatives),
        ordered_pairs=r.pairs,
    )


def prior(config: DemoConfig, workspace: str) -> PriorTrainConfig:
    """Training of the prior, on one core."""
    r = recipe.PriorRecipe()
    return PriorTrainConfig(
        **_shared(config, workspace, r),
        network=recipe.PRIOR_CONFIG,
        ema=r.ema,
        whitening_floor=r.whitening_floor,
        sample_steps=recipe.PRIOR_STEPS,
    )


def decoder(config: DemoConfig, workspace: str) -> DecoderTrainConfig:
    """Training of the decoder, on one core."""
    r = recipe.DecoderRecipe()
    return DecoderTrainConfig(
        **_shared(config, workspace, r),
        network=recipe.DECODER_CONFIG,
        ema=r.ema,
        whitening_floor=r.whitening_floor,
        sample_steps=recipe.DECODER_STEPS,
        guidance=recipe.GUIDANCE,
    )


def _shared(config: DemoConfig, workspace: str, r: Any) -> dict[str, Any]:
    """Fields of all three; ``effort`` scales the steps and nothing else."""
    steps = max(round(r.steps * config.effort), 2)
    return {
        "workspace": workspace,
        "name": NAME,
        "seed": config.seed,
        "steps": steps,
        "batch_size": r.batch,
        "lr": r.lr,
        "muon_lr": r.muon_lr,
        "warmup": min(r.warmup, steps // 4),
        "weight_decay": r.weight_decay,
        "checkpoint_every": 200,
        "log_every": min(25, max(steps // 10, 1)),
        "held_out": 0.03,
    }
