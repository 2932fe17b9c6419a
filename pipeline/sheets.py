"""Contact sheets: many small pictures with labels, as one PNG or as HTML with the pictures inside."""

from __future__ import annotations

import base64
import io
import math
import unicodedata
from collections.abc import Sequence
from html import escape

from PIL import Image, ImageDraw, ImageFont

_LABEL = 200
"""Characters of a label in HTML."""
_STYLE = {
    "grid": "display:flex;flex-wrap:wrap;gap:12px;margin:8px 0",
    "figure": "margin:0;width:{side}px",
    "picture": "width:{side}px;height:{side}px;object-fit:contain;background:#8882;border-radius:4px;display:block",
    "label": "font:12px/1.3 system-ui,sans-serif;overflow-wrap:anywhere;max-height:4em;overflow:hidden;margin-top:3px",
}


def contact_sheet(images: Sequence[bytes | None], labels: Sequence[str], columns: int = 8, side: int = 96) -> bytes:
    """Encoded images in reading order, each scaled to ``side`` pixels with its label below; a PNG.

    The place of one that is missing, or cannot be decoded, stays empty.
    """
    gap, text = 6, 26
    columns = min(columns, max(len(images), 1))
    rows = math.ceil(max(len(images), 1) / columns)
    sheet = Image.new("RGB", (gap + columns * (side + gap), gap + rows * (side + text + gap)), (238, 238, 238))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=9)
    for i, (data, full) in enumerate(zip(images, labels, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        if (image := _opened(data)) is not None:
            sheet.paste(_fit(image, side), (x, y))
        label = one_line(full)
        for line, start in enumerate(range(0, min(len(label), 40), 20)):
            draw.text((x, y + side + 1 + 11 * line), label[start : start + 20], fill=(30, 30, 30), font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def html_grid(pictures: Sequence[tuple[bytes | None, str]], side: int = 144) -> str:
    """Encoded images with their labels as an HTML fragment; each picture inside it, as a thumbnail."""
    style = {name: text.format(side=side) for name, text in _STYLE.items()}
    figures = []
    for data, label in pictures:
        text = escape(one_line(label))
        short = escape(one_line(label)[:_LABEL])
        small = thumbnail(data, 2 * side)
        source = f"data:image/jpeg;base64,{base64.b64encode(small).decode()}" if small else ""
        picture = (
            f'<img style="{style["picture"]}" src="{source}" alt="{text}">'
            if small
            else f'<div style="{style["picture"]}"></div>'
        )
        figures.append(
            f'<figure style="{style["figure"]}" title="{text}">{picture}'
            f'<figcaption dir="auto" style="{style["label"]}">{short}</figcaption></figure>'
        )
    return f'<div style="{style["grid"]}">{"".join(figures)}</div>'


def html_page(title: str, body: str) -> str:
    """A whole page around a fragment, light or dark as the reader has it."""
    text = escape(one_line(title))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text}</title></head>"
        f'<body style="font-family:system-ui,sans-serif;margin:16px"><h1 dir="auto" style="font-size:18px">{text}</h1>'
        f"{body}</body></html>\n"
    )


def thumbnail(data: bytes | None, side: int) -> bytes | None:
    """An encoded image as a JPEG of at most ``side`` pixels; None where there is none, or it cannot be decoded."""
    image = _opened(data)
    if image is None:
        return None
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def one_line(text: str) -> str:
    """A text that can be shown anywhere: one line, without control characters, of a terminal or of writing direction.

    (An escape sequence would be obeyed by a terminal, and an override of direction would turn round what follows.)
    """
    shown = (" " if unicodedata.category(c) in ("Zl", "Zp") or c in "\t\n\r\v\f" else c for c in text)
    return " ".join("".join(c for c in shown if not _is_control(c)).split())


def _is_control(character: str) -> bool:
    # Joiners shape letters and emoji: the only invisible ones that stay.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") and character not in "\u200c\u200d"


def _opened(data: bytes | None) -> Image.Image | None:
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Exception:  # damaged files make Pillow's plugins raise nearly everything
        return None


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Scaled to fit a square, on white; small pictures without blurring."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    kind = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image.resize(size, kind), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square
