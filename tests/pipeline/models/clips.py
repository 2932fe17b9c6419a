"""Tiny CLIPs with random weights, as folders in open_clip's layout; pictures to show them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.models.clip import build_clip
from pipeline.models.encoder import read_model_config
from tests.pipeline.models.test_clip import TINY


def clip_folder(folder: Path, config: dict[str, Any] = TINY, **preprocess: Any) -> Path:
    """A CLIP with random weights, always the same, which ``local-dir:`` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3} | preprocess
    (folder / "tiny.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    (folder / "open_clip_config.json").write_text(json.dumps(read_model_config(str(folder / "tiny.json"))))
    torch.manual_seed(0)
    save_file(build_clip(config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def picture(width: int, height: int, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Broad shapes with finer ones in them, as in a photo."""
    rng = np.random.default_rng([seed, width, height])
    levels = np.zeros((height, width, len(mode) if mode in ("RGB", "RGBA", "CMYK") else 1))
    for cells in (3, 9, 27):
        coarse = rng.integers(0, 256, (cells, cells, levels.shape[2]), dtype=np.uint8)
        for c in range(levels.shape[2]):
            layer = Image.fromarray(coarse[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
            levels[:, :, c] += np.asarray(layer, np.float64) * {3: 0.6, 9: 0.3, 27: 0.1}[cells]
    bands = [Image.fromarray(levels[:, :, c].astype(np.uint8)) for c in range(levels.shape[2])]
    return bands[0].convert(mode) if len(bands) == 1 else Image.merge(mode, bands)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()
