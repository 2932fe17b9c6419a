"""The demo's recipe as the configs of the training jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.demo import recipe
from schemas.configs import ClipTrainConfig, DecoderTrainConfig, DemoConfig, PriorTrainConfig

NAME = "demo"
_DECODER_STEP = 1.8
"""A step of the decoder beside the prior, in steps of CLIP (0.26 s beside 0.17 s, and two share the machine)."""
_LEAST = 0.45


def clip(config: DemoConfig, workspace: str, folder: Path) -> ClipTrainConfig:
    """Training of CLIP. Writes the network's config to ``folder``.

    On one worker: two with half a batch each take as long (115 ms a step and their exchange, against 168 ms).
    """
    r = recipe.ClipRecipe()
    network = folder / "clip.json"
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    network.write_text(json.dumps({"model_cfg": recipe.CLIP_CONFIG, "preprocess_cfg": preprocess}, indent=2) + "\n")
    return ClipTrainConfig(
        **_shared(config, workspace, r, 1.0),
        model=str(network),
        decorrelation=r.decorrelation,
        decorrelation_warmup=r.decorrelation_ramp,
        hard_negatives=bool(r.negatives),
        ordered_pairs=r.pairs,
    )


def prior(config: DemoConfig, workspace: str, pace: float) -> PriorTrainConfig:
    """Training of the prior, on one core; ``pace`` is the share of its steps that there is time for."""
    r = recipe.PriorRecipe()
    return PriorTrainConfig(
        **_shared(config, workspace, r, pace),
        network=recipe.PRIOR_CONFIG,
        ema=r.ema,
        whitening_floor=r.whitening_floor,
        sample_steps=recipe.PRIOR_STEPS,
    )


def decoder(config: DemoConfig, workspace: str, pace: float) -> DecoderTrainConfig:
    """Training of the decoder, on one core; ``pace`` is the share of its steps that there is time for."""
    r = recipe.DecoderRecipe()
    return DecoderTrainConfig(
        **_shared(config, workspace, r, pace),
        network=recipe.DECODER_CONFIG,
        ema=r.ema,
        whitening_floor=r.whitening_floor,
        sample_steps=recipe.DECODER_STEPS,
        guidance=recipe.GUIDANCE,
    )


def affordable(config: DemoConfig, clip_step: float, left: float) -> float:
    """Share of the decoder's steps that fit into ``left`` seconds, told by the seconds of one step of CLIP."""
    planned = recipe.DecoderRecipe().steps * config.effort * _DECODER_STEP * clip_step
    return round(min(1.0, max(_LEAST, left / max(planned, 1e-9))), 2)


def _shared(config: DemoConfig, workspace: str, r: Any, pace: float) -> dict[str, Any]:
    """Fields of all three; ``effort`` and ``pace`` scale the steps and nothing else."""
    steps = max(round(r.steps * config.effort * pace), 2)
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
