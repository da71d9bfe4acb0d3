"""The judge of landscapes: it passes rendered truth, and fails every edit that spoils a part."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from landscapes import blur, make_scenes
from PIL import Image

from dype.demo.drawing import render
from dype.demo.layout_check import check
from dype.demo.scenes import (
    ATTRIBUTES,
    SUNS,
    parse_caption,
)

SIZE = 256  # px, of the edited images


@pytest.fixture(scope="module")
def truth():
    """Scenes and their images."""
    scenes = make_scenes(30, seed=7)
    return [(scene, render(scene, SIZE)) for scene in scenes]


def test_captions():
    """The attributes of every combination of words, also of none, come back from the caption."""
    scene = make_scenes(1, seed=0, time="noon")[0]
    choices = [["", *(word for word in words if word)] for words in ATTRIBUTES.values()]
    for words in product(*choices):
        attributes = dict(zip(ATTRIBUTES, words, strict=True))
        assert parse_caption(replace(scene, **attributes).caption) == attributes
    for left_out in combinations(ATTRIBUTES, 2):
        parsed = parse_caption(scene.caption_without(left_out))
        assert parsed == {name: getattr(scene, name) for name in ATTRIBUTES} | dict.fromkeys(
            left_out, ""
        )
    assert parse_caption("an orange sun over mountains")["color"] == "orange"
    assert parse_caption("a moon over mountains and a lake")["time"] == "night"


@pytest.mark.parametrize(
    "text",
    [
        "a cat",
        "a red sun over mountains and a lake on fire",
        "a red moon over mountains at noon",
        "a sun over mountains at night",
        "a pink sun over mountains",
    ],
)
def test_other_text_is_no_caption(text):
    with pytest.raises(ValueError, match=f"'{text}' is not a caption of the demo model"):
        parse_caption(text)


@pytest.mark.parametrize(
    ("height", "width", "count"), [(512, 512, 40), (256, 256, 60), (256, 512, 8)]
)
def test_truth_passes(height, width, count):
    """At least 0.99, also of a stretched scene; suns overlap with disks by far."""
    scenes = make_scenes(count, seed=1)
    verdicts = [check(render(scene, height, width), scene) for scene in scenes]
    assert np.mean([verdict.layout for verdict in verdicts]) >= 0.99
    assert min(verdict.overlap for verdict in verdicts) > 0.9


def soften(image, scene):
    return blur(image, 1.5 * SIZE / 512)


def add_noise(image, scene):
    return (
        (image + np.random.default_rng(scene.seed).normal(0, 6, image.shape))
        .clip(0, 255)
        .astype(np.uint8)
    )


def shift_colors(image, scene):
    return (
        (image * np.random.default_rng(scene.seed).uniform(0.95, 1.05, 3))
        .clip(0, 255)
        .astype(np.uint8)
    )


@pytest.mark.parametrize("spoil", [soften, add_noise, shift_colors])
def test_soft_truth_passes(spoil, truth):
    assert np.mean([check(spoil(i, s), s).layout for s, i in truth]) >= 0.97


def test_absent_words_are_not_judged(truth):
    no_words = dict.fromkeys(ATTRIBUTES, "")
    assert all(check(image, no_words).layout for _, image in truth)


@pytest.mark.parametrize(
    ("attribute", "part"),
    [
        ("time", "sky"),
        ("color", "sun"),
        ("height", "sun"),
        ("hills", "mountains"),
        ("ground", "ground"),
    ],
)
def test_wrong_words_fail(attribute, part, truth):
    """Every other value of an attribute fails, in the part that it describes."""
    for scene, image in truth:
        for word in ATTRIBUTES[attribute]:
            if word != getattr(scene, attribute):
                verdict = check(image, replace(scene, **{attribute: word}))
                assert not verdict.layout
                assert not getattr(verdict, part)


def place(x, y):
    """Return the distance of every pixel from a point, in units of the side."""
    centers = (np.arange(SIZE) + 0.5) / SIZE
    return np.hypot(centers - x, centers[:, None] - y)


def paste_sun(image, x, y, radius, color):
    away = place(x, y) - radius
    alpha = 0.42 * np.exp(-away.clip(0) / 0.045) + 0.16 * np.exp(-away.clip(0) / 0.2)
    alpha = np.where(away < 0, 1, alpha)[..., None]
    return (image + alpha * (np.array(SUNS[color]) - image)).astype(np.uint8)


def without_sun(scene):
    return render(replace(scene, x=3), SIZE)


def second_sun(image, scene):
    return paste_sun(image, scene.x + 0.35 * np.sign(0.5 - scene.x), 0.2, 0.07, scene.color)


def second_sun_of_another_color(image, scene):
    rng = np.random.default_rng(scene.seed)
    color = rng.choice([color for color in SUNS if color != scene.color])
    return paste_sun(image, 0.15, rng.uniform(0.12, 0.35), 0.06, color)


def second_sun_on_the_ground(image, scene):
    return paste_sun(image, scene.x + 0.3 * np.sign(0.5 - scene.x), 0.82, scene.radius, scene.color)


def no_sun(image, scene):
    return without_sun(scene)


def split_sun(image, scene):
    image = image.copy()
    x, width = round(scene.x * SIZE), round(0.3 * scene.radius * SIZE)
    columns = slice(x - width, x + width), slice(0, round(0.35 * SIZE))
    image[columns[::-1]] = without_sun(scene)[columns[::-1]]
    return image


def half_sun(image, scene):
    image, rows = image.copy(), slice(round(scene.y * SIZE), round(0.36 * SIZE))
    image[rows] = without_sun(scene)[rows]
    return image


def bitten_sun(image, scene):
    bite = place(scene.x + 0.8 * scene.radius, scene.y) < 0.7 * scene.radius
    return np.where(bite[..., None], without_sun(scene), image)


def large_sun(image, scene):
    return render(replace(scene, radius=0.12), SIZE)


def sun_at_the_side(image, scene):
    return render(replace(scene, x=0.15), SIZE)


@pytest.mark.parametrize(
    "spoil",
    [
        second_sun,
        second_sun_of_another_color,
        second_sun_on_the_ground,
        no_sun,
        split_sun,
        half_sun,
        bitten_sun,
        large_sun,
        sun_at_the_side,
    ],
)
def test_wrong_suns_fail(spoil, truth):
    """At most 0.05 pass; 0.1 on the ground, where a yellow sun on a desert has no border."""
    verdicts = [check(spoil(image, scene), scene) for scene, image in truth]
    limit = 0.1 if spoil is second_sun_on_the_ground else 0.05
    assert np.mean([verdict.sun for verdict in verdicts]) <= limit


def resize(image, height, width):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def stack_scenes(image, scene):
    return np.concatenate([resize(image, SIZE // 2, SIZE)] * 2)


def tile_scenes(image, scene):
    return np.tile(resize(image, SIZE // 2, SIZE // 2), (2, 2, 1))


def second_range(image, scene):
    """A range of mountains from another scene, with a straight border below, in the ground."""
    neighbor = render(replace(scene, seed=scene.seed + 1, ground="meadow", extra=""), SIZE)
    rng = np.random.default_rng(scene.seed)
    height, foot, horizon = (
        round(share * SIZE) for share in (0.15, rng.uniform(0.82, 0.93), scene.horizon)
    )
    ridge = 0.5 + 0.35 * np.interp(np.linspace(0, 8, SIZE), np.arange(9), rng.uniform(-1, 1, 9))
    mask = np.arange(height)[:, None] > ridge * height
    image = image.copy()
    image[foot - height : foot][mask] = neighbor[horizon - height : horizon][mask]
    return image


def fade_horizon(image, scene):
    top, bottom = (round((scene.horizon + step) * SIZE) for step in (-0.07, 0.07))
    image, t = image.copy(), np.linspace(0, 1, bottom - top)[:, None, None]
    image[top:bottom] = image[top] * (1 - t) + image[bottom] * t
    return image


def sky_to_the_bottom(image, scene):
    image, row = image.copy(), round((scene.horizon - 0.28) * SIZE)
    image[row:] = image[row]
    return image


def high_horizon(image, scene):
    return render(replace(scene, horizon=0.5), SIZE)


def slant_horizon(image, scene):
    return np.asarray(Image.fromarray(image).rotate(6, Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    "spoil",
    [
        stack_scenes,
        tile_scenes,
        second_range,
        fade_horizon,
        sky_to_the_bottom,
        high_horizon,
        slant_horizon,
    ],
)
def test_wrong_horizons_fail(spoil, truth):
    verdicts = [check(spoil(image, scene), scene) for scene, image in truth]
    assert np.mean([verdict.layout for verdict in verdicts]) <= 0.05
    assert np.mean([verdict.horizon for verdict in verdicts]) <= 0.1


def flat_water(water, image):
    return water.reshape(-1, 3).mean(0)


def ramp_water(water, image):
    """A gradient from its first color to its last."""
    share = np.linspace(0, 1, len(water))[:, None, None]
    return water[:1].mean(1, keepdims=True) * (1 - share) + water[-1:].mean((0, 1)) * share


def upright_water(water, image):
    """What is above the lake, not mirrored."""
    return image[round(0.3 * SIZE) :][: len(water)]


@pytest.mark.parametrize("spoil", [flat_water, ramp_water, upright_water])
def test_a_lake_that_does_not_mirror_fails(spoil):
    for scene in make_scenes(10, seed=3, ground="lake"):
        image = render(scene, SIZE)
        assert check(image, scene).mirror
        water = image[round(scene.horizon * SIZE) :]
        water[:] = spoil(water.copy(), image)
        verdict = check(image, scene)
        assert not verdict.mirror
        assert not verdict.layout
