"""What is left out of an import is there as soon as somebody needs it. Each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_open_clip_without_timm_and_compiler() -> None:
    run(
        "import sys, pipeline.models.encoder, open_clip\n"
        "assert not {'timm', 'torch._dynamo', 'sympy'} & set(sys.modules)\n"
        "open_clip.create_model('RN50', load_weights=False)\n"
        "assert not {'timm', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not any(type(finder).__name__ == '_Within' for finder in sys.meta_path)\n"
    )


def test_towers_of_timm() -> None:
    run(
        "import sys, torch, pipeline.models.clip, open_clip\n"
        "from open_clip.timm_model import TimmModel as before\n"
        "vision = {'timm_model_name': 'resnet10t', 'timm_pool': 'avg', 'timm_proj': 'linear', 'image_size': 32}\n"
        "text = {'context_length': 8, 'vocab_size': 64, 'width': 8, 'heads': 1, 'layers': 1}\n"
        "for _ in range(2):\n"
        "    model = open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)\n"
        "    assert type(model.visual) is before is open_clip.model.TimmModel is open_clip.timm_model.TimmModel\n"
        "    assert model.encode_image(torch.zeros(2, 3, 32, 32)).shape == (2, 8)\n"
        "assert 'timm' in sys.modules\n"
    )


def test_the_compiler_comes_when_it_is_needed() -> None:
    run(
        "import sys, torch, pipeline.models.encoder\n"
        "from torchvision.ops import roi_align\n"
        "pictures, boxes = torch.arange(16.0).reshape(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 4, 4]])\n"
        "whole = roi_align(pictures, boxes, 1, aligned=True)\n"
        "assert abs(float(whole) - 7.5) < 1e-5, whole\n"
        "torch.use_deterministic_algorithms(True)\n"  # it asks for the compiler now
        "assert abs(float(roi_align(pictures, boxes, 1, aligned=True)) - 7.5) < 1e-5\n"
        "assert sys.modules['torch._dynamo'].__file__ and torch.compiler.is_compiling() is False\n"
        "double = torch.compile(lambda x: 2 * x, backend='eager')\n"
        "assert double(torch.ones(2)).tolist() == [2, 2]\n"
    )


@pytest.mark.parametrize("models", ["", "pipeline.models, "])
def test_what_was_imported_before_stays(models: str) -> None:
    """Before ours, or between ours and open_clip."""
    run(
        f"import {models}torch._dynamo, torch._dynamo.utils, timm, sys\n"
        "before = {name: sys.modules[name] for name in ('timm', 'torch._dynamo', 'torch._dynamo.utils')}\n"
        "import pipeline.models.encoder, open_clip\n"
        "assert all(sys.modules[name] is module for name, module in before.items())\n"
        "assert open_clip.timm_model.timm is timm\n"
    )
