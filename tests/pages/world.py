"""A small workspace to be looked at: drawn pictures with captions, hostile ones among them, and generated ones."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from PIL import Image, ImageDraw

from jobs.base import execute
from jobs.index import run as index_body
from pipeline.engine import Engine
from pipeline.workspace import Workspace
from schemas.configs import IndexConfig
from schemas.keys import pair_key, prompt_key
from schemas.tables import CANDIDATES, IMAGES, PAIRS, RANKINGS
from tests.jobs.embedded import embed_directly
from tests.kills import save_clip

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
COLOURS = ("red", "orange", "green", "blue", "purple", "grey")
SHAPES = ("circle", "square", "triangle", "line", "ring")
SIZES = ((96, 72), (72, 96), (80, 80), (160, 60), (300, 40))
HOSTILE = {
    "markup": "<img src=https://elsewhere.invalid/x onerror=alert(1)><script>alert(2)</script><svg onload=alert(3)>",
    "attribute": "\" onmouseover=alert(4) x=\"' autofocus onfocus='alert(5)",
    "direction": "\u202e\u2066\u05e9\u05dc\u05d5\u05dd right to left \u2067",
    "long": "Donaudampfschifffahrt" * 1000,
    "control": "before\0after\x07 \x1b[31mred",
    "template": "{{7*7}} ${alert(6)} </title></textarea>--><base href=//elsewhere.invalid>",
}
PROMPTS = {"a red circle": 8, "<b onclick=alert(7)>a green square</b>": 20}
"""Prompt -> number of candidates."""


def drawing(colour: str, shape: str, size: tuple[int, int]) -> bytes:
    """One shape in the middle of a pale ground, as PNG."""
    picture = Image.new("RGB", size, "#f4efe6")
    draw, (w, h) = ImageDraw.Draw(picture), size
    r = min(w, h) * 0.4
    box = (w / 2 - r, h / 2 - r, w / 2 + r, h / 2 + r)
    left, top, right, bottom = box
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon(((left, bottom), (w / 2, top), (right, bottom)), fill=colour)
    elif shape == "line":
        draw.line(box, fill=colour, width=6)
    else:
        draw.ellipse(box, outline=colour, width=6)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def pairs() -> Iterable[tuple[str, str, bytes]]:
    """(url, caption, image) of all pairs."""
    for i, colour in enumerate(COLOURS):
        for j, shape in enumerate(SHAPES):
            yield f"https://h/{colour}-{shape}.png", f"a {colour} {shape}", drawing(colour, shape, SIZES[(i + j) % 5])
    for i, (name, caption) in enumerate(HOSTILE.items()):
        url = "javascript:alert(8)" if name == "markup" else f"https://h/{name}.png"
        yield url, caption, drawing(COLOURS[i], "ring", (90 + i, 90))


def build(folder: Path) -> Workspace:
    """All of it, embedded by two tiny CLIPs and indexed for both."""
    workspace = Workspace(folder / "ws").prepare()
    rows = [_row(*pair) for pair in pairs()]
    lists = [{name: row.get(name) for name in PAIRS.schema.names} | {"added_run": "download"} for row in rows]
    workspace.table("pairs").append(pa.Table.from_pylist(lists, schema=PAIRS.schema), "download")
    workspace.table("images").append(pa.Table.from_pylist(rows, schema=IMAGES.schema), "download")
    for seed in (0, 1):
        card = embed_directly(workspace, save_clip(folder / f"clip{seed}", TINY, seed), f"embed{seed}")
        config = IndexConfig(workspace=str(workspace.root), encoder=card.id, audit=0)
        execute("index", config, index_body, Engine(cpus=1))
    _generated(workspace)
    return workspace


def _row(url: str, caption: str, image: bytes) -> dict[str, object]:
    width, height = Image.open(io.BytesIO(image)).size
    return dict.fromkeys(IMAGES.schema.names) | {
        "pair_key": pair_key(url, caption), "url": url, "caption": caption, "status": "ok", "attempts": 1,
        "retryable": False, "sha256": hashlib.sha256(image).hexdigest(), "phash": 1 << 62, "width": width,
        "height": height, "image": image, "format": "png", "run": "download",
    }  # fmt: skip


def _generated(workspace: Workspace) -> None:
    """Candidates of two prompts, ranked by a score that falls with the number; the best three are kept."""
    rows = [
        {
            "prompt_key": prompt_key(prompt), "prompt": prompt, "number": number, "seed": 7,
            "clip_score": 0.4 - 0.01 * number, "rank": number + 1, "kept": number < 3,
            "image": drawing(COLOURS[number % 6], SHAPES[number % 5], (32, 32)) if number < 3 else None,
            "prior": "p", "decoder": "d", "encoder": "e", "sampling": "steps=4", "run": "generate-1",
        }
        for prompt, candidates in PROMPTS.items()
        for number in range(candidates)
    ]  # fmt: skip
    ranked = [{name: row[name] for name in RANKINGS.schema.names} for row in rows]
    workspace.table("rankings").append(pa.Table.from_pylist(ranked, schema=RANKINGS.schema), "generate-1")
    workspace.table("candidates").append(pa.Table.from_pylist(rows, schema=CANDIDATES.schema), "generate-1")
