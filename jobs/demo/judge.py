"""What only the demo can know: whether a picture shows what its caption says."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from jobs.demo import checker, world
from pipeline.evaluate import best_of, oracle, powers, retrieval
from pipeline.models.encoder import Encoder
from pipeline.models.probe import probe_accuracy

KINDS: dict[world.PromptKind, str] = {
    "single": "one object",
    "trained": "two objects, compositions of trained kinds",
    "held_out_pair": "compositions never trained on: pairs",
    "held_out_shape": "compositions never trained on: colour and shape",
}


def decode(image: bytes) -> NDArray[np.uint8]:
    """A picture uint8 [32, 32, 3]."""
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB"))


def verdict(image: bytes, prompt: str) -> checker.Verdict:
    """The checker's verdict on a candidate of a canonical caption."""
    return checker.check(decode(image), world.parse_caption(prompt))


def generation(rows: Sequence[dict[str, Any]], prompts: dict[str, list[str]], n: int) -> dict[str, Any]:
    """Matches by kind of prompt: @1, best of N by CLIP score, by an oracle, and by chance.

    ``rows``: all candidates (prompt, number, clip_score, core, ok).
    """
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    result = {}
    for kind, texts in prompts.items():
        ordered = [sorted(by_prompt[t], key=lambda r: r["number"]) for t in texts]
        scores = np.array([[r["clip_score"] for r in c] for c in ordered])  # [P, N]
        core = np.array([[r["core"] for r in c] for c in ordered], np.float64)  # [P, N]
        ok = np.array([[r["ok"] for r in c] for c in ordered], np.float64)
        result[kind] = {
            "prompts": len(texts),
            "at_1": float(core[:, 0].mean()),
            "mean": float(core.mean()),
            "best_of": best_of(scores, core, powers(n)),
            "oracle": oracle(core, powers(n)),
            "best_ok": best_of(scores, ok, [n])[n],
        }
    return result


def clip_recall(encoder: Encoder, n: int, seed: int) -> dict[str, float]:
    """R@k over n different scenes that were not trained on, with canonical captions."""
    scenes = world.prompt_scenes("trained", n, seed)
    image = encoder.images([world.png(s) for s in scenes])
    text = encoder.texts([world.canonical_caption(s) for s in scenes])
    there, back = retrieval(text, image), retrieval(image, text)
    return {f"text_to_image_{k}": v for k, v in there.items()} | {f"image_to_text_{k}": v for k, v in back.items()}


def probe(encoder: Encoder, n: int, seed: int) -> dict[str, Any]:
    """How well an MLP reads a scene's attributes out of its image embedding; and one reads the order of two."""
    scenes = [scene for scene, _ in world.training_scenes(n, seed)]
    vectors = torch.from_numpy(encoder.images([world.png(s) for s in scenes]))
    labels = torch.tensor([world.attributes(s) for s in scenes])
    cut = n * 3 // 4
    found = probe_accuracy((vectors[:cut], labels[:cut]), (vectors[cut:], labels[cut:]))
    return {"all_right": found.all_right, **dict(zip(world.ATTRIBUTES, found.per_attribute, strict=True))}
