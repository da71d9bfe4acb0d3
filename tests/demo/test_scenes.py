"""The scenes of the demo model and their drawing."""

from dataclasses import replace

import numpy as np
import pytest
from landscapes import make_scenes
from PIL import Image

from dype.demo.drawing import render
from dype.demo.scenes import COMBINATIONS, GROUNDS, HELD_OUT, SUNS, TRAINED
from dype.demo.scores import log_spectrum, mean_power


def test_scenes_are_free_of_resolution():
    """A larger rendering, averaged down, is the smaller one but for its finest detail."""
    for scene in make_scenes(8):
        small = render(scene, 128).astype(float)
        large = render(scene, 256).reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.98
        assert (render(scene, 128) == small).all()


def test_larger_renderings_have_finer_detail():
    """In the highest octave they have ten times the power of a smaller one, enlarged."""
    for scene in make_scenes(4):
        small = Image.fromarray(render(scene, 128)).resize((512, 512), Image.Resampling.BICUBIC)
        images = render(scene, 512), np.asarray(small)
        large, enlarged = (log_spectrum(mean_power(image))[-4:] for image in images)
        assert large.min() - enlarged.max() > np.log(10)


def test_wide_images_show_the_stretched_scene():
    for scene in make_scenes(4):
        square = render(scene, 128).astype(float)
        wide = render(scene, 128, 256).reshape(128, 128, 2, 3).mean(2)
        assert np.corrcoef(square.ravel(), wide.ravel())[0, 1] > 0.97


def test_held_out_combinations():
    """15 % of the combinations are kept from training, and all are kept or trained."""
    assert len(set(HELD_OUT)) == 29
    assert len(HELD_OUT) / len(COMBINATIONS) == pytest.approx(0.15, abs=0.005)
    assert {*HELD_OUT, *TRAINED} == {*COMBINATIONS}
    assert not {*HELD_OUT} & {*TRAINED}
    values = [{combination[i] for combination in TRAINED} for i in range(4)]
    assert [len(names) for names in values] == [4, 4, 4, 3]  # every word is trained


def test_the_sun_is_where_the_scene_says():
    for scene in make_scenes(6):
        image = render(scene, 256)
        center = image[round(scene.y * 256), round(scene.x * 256)]
        np.testing.assert_allclose(center, SUNS[scene.color], atol=1)


def test_mountains_leave_the_sun_free():
    """No ridge covers a part of any disk."""
    for scene in make_scenes(300):
        if scene.height == "low":
            place = (np.arange(128) + 0.5) / 128
            image = render(scene, 128)
            inside = np.hypot(place[None] - scene.x, place[:, None] - scene.y) < scene.radius - 0.01
            np.testing.assert_allclose(image[inside] - 1.0 * np.array(SUNS[scene.color]), 0, atol=1)


def test_a_lake_mirrors_and_land_does_not():
    correlations = {}
    for ground in GROUNDS:
        scene = replace(make_scenes(1)[0], ground=ground, extra="", horizon=0.65)
        image = render(scene, 256).mean(-1)
        above, below = image[76:160], image[172:256][::-1]
        correlations[ground] = np.corrcoef(above.ravel(), below.ravel())[0, 1]
    assert correlations["lake"] > 0.5 > max(correlations["meadow"], correlations["desert"])
