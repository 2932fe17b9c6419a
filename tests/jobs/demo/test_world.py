"""The demo's world as docs/demo.md defines it, and its checker on true and on wrong pictures."""

import zlib
from dataclasses import replace

import numpy as np
import open_clip
import pytest

from jobs.demo import checker, world

KINDS = world.PROMPT_KINDS


def test_nothing_held_out_is_trained_on() -> None:
    for scene, _ in world.training_scenes(3000, 0):
        names = [(o.colour, o.shape) for o in scene.objects]
        assert not {("purple", "cross"), ("orange", "triangle")} & set(names)
        if scene.relation:
            text = f"{names[0][0]} {names[0][1]}|{names[1][0]} {names[1][1]}{scene.relation}"
            assert zlib.crc32(text.encode()) % 10 != 0
            assert names[0] != names[1]


def test_half_of_the_scenes_have_two_objects() -> None:
    two = [scene.relation is not None for scene, _ in world.training_scenes(4000, 1)]
    assert 0.47 < np.mean(two) < 0.53


def test_captions_fit_the_context_and_omit_as_told() -> None:
    captions = [caption for _, caption in world.training_scenes(4000, 2)]
    tokens = open_clip.SimpleTokenizer(context_length=24)(captions)
    assert int((tokens != 0).sum(1).max()) <= 22
    assert 0.27 < np.mean(["background" not in c for c in captions]) < 0.33
    assert 0.12 < np.mean(["small" not in c and "large" not in c for c in captions]) < 0.18


def test_same_seed_same_world() -> None:
    once, again = ([(c, p) for _, c, p in world.training_pairs(50, 5)] for _ in range(2))
    assert once == again
    assert once != [(c, p) for _, c, p in world.training_pairs(50, 6)]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_canonical_and_of_their_kind(kind: world.PromptKind) -> None:
    prompts = world.prompts(kind, 40, 3)
    assert len(set(prompts)) == 40
    for prompt in prompts:
        scene = world.parse_caption(prompt)
        assert world.canonical_caption(scene) == prompt
        assert (scene.relation is None) == (kind == "single") or kind == "held_out_shape"
        assert world.is_held_out(scene) == kind.startswith("held_out")


def test_colours_and_sizes_are_drawn() -> None:
    scene = world.parse_caption("a large red square on a white background")
    pixels = world.pixels(scene)
    assert tuple(pixels[16, 16]) == (220, 40, 40)
    assert tuple(pixels[1, 1]) == (255, 255, 255)
    inked = (pixels != 255).any(-1).sum()
    assert abs(np.sqrt(inked) / 32 - 0.44) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_checker_accepts_every_true_picture(kind: world.PromptKind) -> None:
    rng = np.random.default_rng(0)
    for scene in world.prompt_scenes(kind, 60, 5):
        jittered = replace(
            scene,
            objects=tuple(
                replace(o, dx=rng.uniform(-0.015, 0.015), dy=rng.uniform(-0.015, 0.015), dsize=rng.uniform(-0.01, 0.01))
                for o in scene.objects
            ),
        )
        verdict = checker.check(world.pixels(jittered), scene)
        assert verdict.core, (scene, verdict)
        assert verdict.ok, (scene, verdict)


def test_checker_refuses_wrong_pictures() -> None:
    scenes = world.prompt_scenes("trained", 60, 6)
    for scene in scenes:
        pixels = world.pixels(scene)
        first, second = scene.objects
        if (first.colour, first.shape) != (second.colour, second.shape):
            assert not checker.check(pixels, replace(scene, objects=(second, first))).core  # places swapped
        other = replace(first, colour="red" if first.colour != "red" else "green")
        assert not checker.check(pixels, replace(scene, objects=(other, second))).core
        shape = replace(second, shape="circle" if second.shape != "circle" else "square")
        assert not checker.check(pixels, replace(scene, objects=(first, shape))).core
        size = replace(first, size="small" if first.size == "large" else "large")
        resized = checker.check(pixels, replace(scene, objects=(size, second)))
        assert resized.core and not resized.ok
        single = replace(scene, objects=(first,), relation=None)
        assert not checker.check(pixels, single).core


def test_checker_refuses_noise_and_emptiness() -> None:
    scene = world.parse_caption("a small blue circle on a black background")
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert not checker.check(noise, scene).core
    assert not checker.check(np.zeros((32, 32, 3), np.uint8), scene).core
