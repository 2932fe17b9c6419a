"""Judges a picture against the scene it should show, by arithmetic alone: nothing here is learned.

Every pixel is explained as background + alpha x (palette colour - background). Connected components
of one colour are the objects; the shape and size of each come from the best of a bank of drawn
templates (soft Dice).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from jobs.demo.world import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Scene,
    shape_mask,
)

Floats = npt.NDArray[np.float64]

FOREGROUND = 0.5  # alpha from which a pixel belongs to an object
SPECK = 0.012  # connected components below this part of the image are no objects
MIN_DICE = 0.85  # a component that resembles no template better than this has no shape
PLACE_TOLERANCE = 0.1  # distance of an object's centre from its place, in parts of the image's side
BACKGROUND_TOLERANCE = 60.0  # distance in RGB from black or white
WINDOW = 20  # side of the templates, pixels
_SHIFTS = np.arange(-1.5, 1.51, 0.25)  # of a template's centre from its window's, pixels
_SCALES = (-0.01, 0.0, 0.01)  # around each size


@dataclass(frozen=True, kw_only=True)
class Found:
    """An object seen in a picture; `x`, `y` are its centre in parts of the image's side."""

    colour: str
    shape: str | None
    size: str | None
    x: float
    y: float
    dice: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`core`: number, colour, shape and place are right; `ok`: size and background, too."""

    core: bool
    ok: bool
    found: tuple[Found, ...]
    background: str | None


def check(image: npt.NDArray[np.uint8], expectation: Scene) -> Verdict:
    """Judge a picture [32, 32, 3] against a scene (its jitter is ignored)."""
    found, background = look(image)
    matched = _match(found, expectation)
    core = matched is not None
    sizes = matched is not None and all(
        seen.size == thing.size for seen, thing in zip(matched, expectation.objects, strict=True)
    )
    return Verdict(
        core=core,
        ok=sizes and background == expectation.background,
        found=found,
        background=background,
    )


def look(image: npt.NDArray[np.uint8]) -> tuple[tuple[Found, ...], str | None]:
    """The objects in a picture [32, 32, 3], and the name of its background."""
    expected = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if image.shape != expected:
        raise ValueError(f"expected an image of shape {expected}, got {image.shape}")
    picture = image.astype(np.float64)
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    ground = np.median(border, axis=0)  # [3]
    colour, alpha = _explain(picture, ground)
    found = [
        _identify(np.where(part, alpha, 0.0), list(COLOURS)[index])
        for index in range(len(COLOURS))
        for part in _components((colour == index) & (alpha > FOREGROUND))
    ]
    return tuple(found), _name_background(ground)


def _name_background(ground: Floats) -> str | None:
    distance = {name: float(np.linalg.norm(ground - np.array(rgb))) for name, rgb in BACKGROUNDS.items()}
    name = min(distance, key=lambda key: distance[key])
    return name if distance[name] <= BACKGROUND_TOLERANCE else None


def _explain(picture: Floats, ground: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """The palette colour [H, W] that explains each pixel best, and how much of it (alpha) [H, W]."""
    direction = np.array(list(COLOURS.values()), np.float64) - ground  # [C, 3]
    delta = picture - ground  # [H, W, 3]
    alpha = np.clip(delta @ (direction / (direction**2).sum(1, keepdims=True)).T, 0, 1)  # [H, W, C]
    residual = ((delta[:, :, None] - alpha[..., None] * direction) ** 2).sum(-1)  # [H, W, C]
    colour = residual.argmin(-1)  # [H, W]
    return colour, np.take_along_axis(alpha, colour[..., None], -1)[..., 0]


def _components(mask: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
    """The connected parts (4 neighbours) of a mask [H, W], without specks."""
    if mask.sum() < SPECK * mask.size:
        return []
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(label, 1)
        spread = np.maximum.reduce([label, padded[2:, 1:-1], padded[:-2, 1:-1], padded[1:-1, 2:], padded[1:-1, :-2]])
        spread[~mask] = 0
        if (spread == label).all():
            break
        label = spread
    parts = [label == number for number in np.unique(label[mask])]
    parts = [half for part in parts for half in _split(part)]
    return [part for part in parts if part.sum() >= SPECK * mask.size]


def _split(part: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
    """Two large objects of one colour may touch: cut what is far longer than wide, in its middle."""
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    high, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
    if max(high, wide) < 1.6 * min(high, wide):
        return [part]
    first = np.zeros_like(part)
    if high > wide:
        first[: part.shape[0] // 2] = True
    else:
        first[:, : part.shape[1] // 2] = True
    return [half for half in (part & first, part & ~first) if half.any()]


@cache
def _templates() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], list[tuple[str, str, float, float]]]:
    """Drawn templates [T, WINDOW^2], their squared norms [T], and the (shape, size, dx, dy) of each."""
    fine = 4
    axis = (np.arange(WINDOW * fine) + 0.5) / fine - WINDOW / 2
    bank, names = [], []
    for shape in SHAPES:
        for size, side in SIZES.items():
            for scale in _SCALES:
                half = (side + scale) * IMAGE_SIZE / 2
                for dy in _SHIFTS:
                    for dx in _SHIFTS:
                        mask = shape_mask(shape, (axis[None] - dx) / half, (axis[:, None] - dy) / half)
                        bank.append(mask.reshape(WINDOW, fine, WINDOW, fine).mean((1, 3)).ravel())
                        names.append((shape, size, float(dx), float(dy)))
    templates = np.stack(bank).astype(np.float32)
    return templates, (templates**2).sum(1), names


def _identify(alpha: Floats, colour: str) -> Found:
    """Shape, size and centre of one component, given its alpha [H, W] (0 elsewhere)."""
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    top = (rows[0] + rows[-1] + 1) // 2 - WINDOW // 2
    left = (columns[0] + columns[-1] + 1) // 2 - WINDOW // 2
    padded = np.pad(alpha, WINDOW)
    window = padded[top + WINDOW :, left + WINDOW :][:WINDOW, :WINDOW].ravel().astype(np.float32)
    bank, norms, names = _templates()
    dice = 2 * (bank @ window) / (norms + window @ window)  # [T]
    best = int(dice.argmax())
    shape, size, dx, dy = names[best]
    known = bool(dice[best] >= MIN_DICE)
    return Found(
        colour=colour,
        shape=shape if known else None,
        size=size if known else None,
        x=float((left + WINDOW / 2 + dx) / IMAGE_SIZE),
        y=float((top + WINDOW / 2 + dy) / IMAGE_SIZE),
        dice=float(dice[best]),
    )


def _match(found: tuple[Found, ...], expectation: Scene) -> list[Found] | None:
    """The found objects in the expectation's order, if each is what and where it should be."""
    if len(found) != len(expectation.objects):
        return None
    matched = []
    for thing, (x, y) in zip(expectation.objects, expectation.places, strict=True):
        near = [
            seen
            for seen in found
            if np.hypot(seen.x - x, seen.y - y) <= PLACE_TOLERANCE
            and (seen.colour, seen.shape) == (thing.colour, thing.shape)
        ]
        if len(near) != 1:
            return None
        matched.append(near[0])
    return matched
