"""The demo's world: scenes of one or two coloured shapes, their pictures and their captions.

A picture is 32x32 pixels, drawn at four times the size and reduced by a box filter. Everything is
deterministic: a scene holds its own jitter, and every stream of scenes comes from a seed.

Two kinds of compositions are never trained on: any scene with a purple cross or an orange triangle,
and the tenth of the two-object compositions chosen by a CRC of their canonical description.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

IMAGE_SIZE = 32
SUPERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 225),
    "yellow": (245, 220, 40),
    "purple": (140, 45, 180),
    "orange": (245, 135, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.28, "large": 0.44}  # side of the bounding square, as a part of the image's side
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": (255, 255, 255), "black": (0, 0, 0)}
RELATIONS = ("left of", "above")  # canonical: the left or the upper object comes first

CROSS_BAR = 0.34  # thickness of the cross's bars, as a part of its width
POSITION_JITTER = 0.015
SIZE_JITTER = 0.01
FIRST, SECOND, MIDDLE = 0.255, 0.745, 0.5  # places along an axis of the image

NEVER_TRAINED = {("purple", "cross"), ("orange", "triangle")}

PromptKind = Literal["single", "trained", "held_out_pair", "held_out_shape"]
PROMPT_KINDS: tuple[PromptKind, ...] = get_args(PromptKind)


@dataclass(frozen=True, kw_only=True)
class Object:
    """One shape; `dx`, `dy` and `dsize` are its jitter, as parts of the image's side."""

    colour: str
    shape: str
    size: str
    dx: float = 0.0
    dy: float = 0.0
    dsize: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One object, or two in canonical order (left or upper first) with their relation."""

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.objects) - 1 != (self.relation is not None):
            raise ValueError(
                f"expected one object and no relation, or two and a relation; "
                f"got {len(self.objects)} objects and relation {self.relation!r}"
            )

    @property
    def places(self) -> tuple[tuple[float, float], ...]:
        """Centre (x, y) of every object before jitter, as parts of the image's side."""
        if self.relation is None:
            return ((MIDDLE, MIDDLE),)
        if self.relation == "left of":
            return (FIRST, MIDDLE), (SECOND, MIDDLE)
        return (MIDDLE, FIRST), (MIDDLE, SECOND)


# ---- pictures ------------------------------------------------------------------------------------


def shape_mask(shape: str, u: npt.NDArray[np.float64], v: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Where the shape covers the points (u, v), its bounding square being [-1, 1]^2 with v downwards."""
    inside = (np.abs(u) <= 1) & (np.abs(v) <= 1)
    if shape == "square":
        return inside
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "triangle":
        return inside & (np.abs(u) <= (1 + v) / 2)
    if shape == "cross":
        return inside & ((np.abs(u) <= CROSS_BAR) | (np.abs(v) <= CROSS_BAR))
    raise ValueError(f"expected one of {SHAPES}, got shape {shape!r}")


def draw(scene: Scene) -> Image.Image:
    """The 32x32 RGB picture of a scene: drawn at 4x, reduced by a box filter."""
    n = IMAGE_SIZE * SUPERSAMPLING
    canvas = np.empty((n, n, 3), np.uint8)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing, place in zip(scene.objects, scene.places, strict=True):
        x, y = place[0] + thing.dx, place[1] + thing.dy
        half = (SIZES[thing.size] + thing.dsize) / 2
        columns = slice(max(int((x - half) * n) - 1, 0), int((x + half) * n) + 2)
        rows = slice(max(int((y - half) * n) - 1, 0), int((y + half) * n) + 2)
        centres = (np.arange(n) + 0.5) / n
        u = (centres[None, columns] - x) / half
        v = (centres[rows, None] - y) / half
        canvas[rows, columns][shape_mask(thing.shape, u, v)] = COLOURS[thing.colour]
    return Image.fromarray(canvas).reduce(SUPERSAMPLING)


def pixels(scene: Scene) -> npt.NDArray[np.uint8]:
    """The picture as an array [32, 32, 3]."""
    return np.asarray(draw(scene))


def png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    draw(scene).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


# ---- captions ------------------------------------------------------------------------------------

OPENINGS = ("a", "one", "there is a", "a picture of a")
PHRASINGS = {  # relation -> its wordings, and the wordings of its converse
    "left of": (("left of", "to the left of"), ("right of", "to the right of")),
    "above": (("above", "over"), ("below", "under")),
}
OMIT_SIZES, OMIT_BACKGROUND, CANONICAL_SHARE = 0.15, 0.30, 0.5


def _phrase(opening: str, thing: Object, with_size: bool) -> str:
    words = f"{thing.size} {thing.colour}" if with_size else thing.colour
    if opening.endswith("a") and words[0] in "aeiou":
        opening += "n"
    return f"{opening} {words} {thing.shape}"


def canonical_caption(scene: Scene) -> str:
    """«a small red circle left of a large blue square on a black background»"""
    text = f" {scene.relation} ".join(_phrase("a", thing, True) for thing in scene.objects)
    return f"{text} on a {scene.background} background"


def caption(scene: Scene, rng: np.random.Generator, canonical: bool = False) -> str:
    """One of a scene's captions.

    Half have the canonical wording; sizes are omitted in 15% of all and the background in 30%.
    """
    if canonical:
        return canonical_caption(scene)
    with_size, with_background = rng.random() >= OMIT_SIZES, rng.random() >= OMIT_BACKGROUND
    opening, relation, things = OPENINGS[0], scene.relation, scene.objects
    if rng.random() >= CANONICAL_SHARE:
        opening = OPENINGS[rng.integers(len(OPENINGS))]
        if scene.relation is not None:
            converse = int(rng.integers(2))
            wordings = PHRASINGS[scene.relation][converse]
            relation = wordings[rng.integers(len(wordings))]
            things = things[::-1] if converse else things
    text = _phrase(opening, things[0], with_size)
    if relation is not None:
        text = f"{text} {relation} {_phrase('a', things[1], with_size)}"
    return f"{text} on a {scene.background} background" if with_background else text


_CANONICAL = re.compile(
    rf"a (?P<size1>{'|'.join(SIZES)}) (?P<colour1>{'|'.join(COLOURS)}) (?P<shape1>{'|'.join(SHAPES)})"
    rf"(?: (?P<relation>{'|'.join(RELATIONS)})"
    rf" a (?P<size2>{'|'.join(SIZES)}) (?P<colour2>{'|'.join(COLOURS)}) (?P<shape2>{'|'.join(SHAPES)}))?"
    rf" on a (?P<background>{'|'.join(BACKGROUNDS)}) background"
)


def parse_caption(text: str) -> Scene:
    """The scene (without jitter) that a canonical caption describes: what a checker expects to see."""
    match = _CANONICAL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a canonical caption, got {text!r}")
    part = match.groupdict()
    objects = [Object(colour=part["colour1"], shape=part["shape1"], size=part["size1"])]
    if part["relation"] is not None:
        objects.append(Object(colour=part["colour2"], shape=part["shape2"], size=part["size2"]))
    return Scene(objects=tuple(objects), background=part["background"], relation=part["relation"])


# ---- what is trained on, what is not --------------------------------------------------------------


def has_held_out_shape(scene: Scene) -> bool:
    """Whether a purple cross or an orange triangle is in the scene."""
    return any((thing.colour, thing.shape) in NEVER_TRAINED for thing in scene.objects)


def has_held_out_pair(scene: Scene) -> bool:
    """Whether the composition of two objects is in the tenth that is never trained on."""
    if scene.relation is None:
        return False
    first, second = scene.objects
    text = f"{first.colour} {first.shape}|{second.colour} {second.shape}{scene.relation}"
    return zlib.crc32(text.encode()) % 10 == 0


def is_held_out(scene: Scene) -> bool:
    return has_held_out_shape(scene) or has_held_out_pair(scene)


def _sample_object(rng: np.random.Generator) -> Object:
    def pick(names: tuple[str, ...]) -> str:
        return names[rng.integers(len(names))]

    dx, dy = rng.uniform(-POSITION_JITTER, POSITION_JITTER, 2)
    return Object(
        colour=pick(tuple(COLOURS)),
        shape=pick(SHAPES),
        size=pick(tuple(SIZES)),
        dx=float(dx),
        dy=float(dy),
        dsize=float(rng.uniform(-SIZE_JITTER, SIZE_JITTER)),
    )


def sample_scene(
    rng: np.random.Generator,
    *,
    two_objects: float = 0.5,
    accept: Callable[[Scene], bool] = lambda scene: True,
) -> Scene:
    """A scene that `accept` accepts; `two_objects` is the share of scenes with two."""
    two = bool(rng.random() < two_objects)
    while True:
        objects = tuple(_sample_object(rng) for _ in range(1 + two))
        relation = RELATIONS[rng.integers(len(RELATIONS))] if two else None
        background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        if len({(thing.colour, thing.shape) for thing in objects}) < len(objects):
            continue
        scene = Scene(objects=objects, background=background, relation=relation)
        if accept(scene):
            return scene


def training_scenes(n: int, seed: int) -> Iterator[tuple[Scene, str]]:
    """`n` scenes with a caption each, none of them held out."""
    rng = np.random.default_rng([seed, 0])
    for _ in range(n):
        scene = sample_scene(rng, accept=lambda scene: not is_held_out(scene))
        yield scene, caption(scene, rng)


def training_pairs(n: int, seed: int) -> Iterator[tuple[Scene, str, bytes]]:
    """`n` triples of scene, caption and PNG file, none of them held out."""
    for scene, text in training_scenes(n, seed):
        yield scene, text, png(scene)


_ACCEPT: dict[PromptKind, tuple[float, Callable[[Scene], bool]]] = {
    "single": (0.0, lambda scene: not is_held_out(scene)),
    "trained": (1.0, lambda scene: not is_held_out(scene)),
    "held_out_pair": (1.0, lambda s: has_held_out_pair(s) and not has_held_out_shape(s)),
    "held_out_shape": (0.5, has_held_out_shape),
}


def _different(n: int, rng: np.random.Generator, two_objects: float, accept: Callable[[Scene], bool]) -> list[Scene]:
    """`n` scenes no two of which differ by their jitter alone."""
    scenes: dict[Scene, Scene] = {}
    for _ in range(1000 * n):
        scene = sample_scene(rng, two_objects=two_objects, accept=accept)
        scenes.setdefault(without_jitter(scene), scene)
        if len(scenes) == n:
            return list(scenes.values())
    raise ValueError(f"expected to find {n} different scenes, found only {len(scenes)}")


def without_jitter(scene: Scene) -> Scene:
    still = tuple(replace(thing, dx=0.0, dy=0.0, dsize=0.0) for thing in scene.objects)
    return replace(scene, objects=still)


def prompt_scenes(kind: PromptKind, n: int, seed: int) -> list[Scene]:
    """`n` different scenes (without jitter) of a kind."""
    rng = np.random.default_rng([seed, 1 + PROMPT_KINDS.index(kind)])
    return [without_jitter(scene) for scene in _different(n, rng, *_ACCEPT[kind])]


def retrieval_scenes(n: int, seed: int) -> list[Scene]:
    """`n` different scenes of the trained kinds: each has a caption that is true of no other.

    To measure retrieval by: among plain pairs many a caption fits several pictures.
    """
    rng = np.random.default_rng([seed, 100])
    return _different(n, rng, 0.5, lambda scene: not is_held_out(scene))


def prompts(kind: PromptKind, n: int, seed: int) -> list[str]:
    """`n` different canonical captions of a kind."""
    return [canonical_caption(scene) for scene in prompt_scenes(kind, n, seed)]


# ---- attributes, for probing an embedding ---------------------------------------------------------

ATTRIBUTES = ("colour1", "shape1", "size1", "colour2", "shape2", "size2", "relation", "background")


def attributes(scene: Scene) -> tuple[int, ...]:
    """The scene as eight class numbers (ATTRIBUTES); 0 stands for «no second object»."""
    first = scene.objects[0]
    second = scene.objects[1] if scene.relation is not None else None

    def number(name: str | None, names: tuple[str, ...]) -> int:
        return 0 if name is None else 1 + names.index(name)

    return (
        number(first.colour, tuple(COLOURS)),
        number(first.shape, SHAPES),
        number(first.size, tuple(SIZES)),
        number(second.colour if second else None, tuple(COLOURS)),
        number(second.shape if second else None, SHAPES),
        number(second.size if second else None, tuple(SIZES)),
        number(scene.relation, RELATIONS),
        number(scene.background, tuple(BACKGROUNDS)),
    )
