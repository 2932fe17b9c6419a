"""Contact sheets: many small pictures with labels as one PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def contact_sheet(images: Sequence[bytes | None], labels: Sequence[str], columns: int = 8, side: int = 96) -> bytes:
    """Encoded images in reading order, each scaled to ``side`` pixels with its label below; a PNG."""
    gap, text = 6, 26
    columns = min(columns, max(len(images), 1))
    rows = math.ceil(max(len(images), 1) / columns)
    sheet = Image.new("RGB", (gap + columns * (side + gap), gap + rows * (side + text + gap)), (238, 238, 238))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=9)
    for i, (data, label) in enumerate(zip(images, labels, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        if data is not None:
            with Image.open(io.BytesIO(data)) as image:
                sheet.paste(_fit(image.convert("RGB"), side), (x, y))
        for line, start in enumerate(range(0, min(len(label), 40), 20)):
            draw.text((x, y + side + 1 + 11 * line), label[start : start + 20], fill=(30, 30, 30), font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Scaled to fit a square, on white; small pictures without blurring."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    kind = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image.resize(size, kind), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square
