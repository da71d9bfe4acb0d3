"""Scores of generated images against the scenes of their prompts, with 95 % intervals.

Every score is a function of a set of images. The bootstrap resamples images, each with its own
scene, and scores the set again. A paired difference resamples the same images of both settings.

Two distances of sets compare texture with rendered truth: the distance of the mean log power
spectra, and the Frechet distance of patches in a fixed feature space. Both follow from sums over
images, so that a bootstrap is fast.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dype.demo.layout_check import check
from dype.demo.scenes import Scene
from dype.metrics import intervals
from dype.metrics.set_metrics import frechet_distance
from dype.sampling.latents import mean_power_by_bin

RESAMPLES = 1000  # of the bootstrap
PATCH = 32  # px, two tokens: 4 times the diameter of the finest leaf, below most edges of objects
FEATURES = 32  # random filters of 5 x 5 px; a feature is the mean magnitude over a patch
SEED = 0  # of the filters


def log_spectrum(image: np.ndarray) -> np.ndarray:
    """Return ln of the mean power of the gray image, per quarter octave of frequency, [bands].

    An image that is not square is cut into squares, whose powers are averaged. The bands go from 4
    cycles per square to the Nyquist frequency. A Hann window keeps the gradient of the light from
    leaking into them.
    """
    size, gray = min(image.shape[:2]), image.mean(-1)
    window = np.outer(np.hanning(size), np.hanning(size))
    squares = [
        gray[y : y + size, x : x + size]
        for y in range(0, gray.shape[0] - size + 1, size)
        for x in range(0, gray.shape[1] - size + 1, size)
    ]
    power = np.mean([abs(np.fft.rfft2((s - s.mean()) * window)) ** 2 for s in squares], 0)
    frequency = np.hypot(np.fft.fftfreq(size, 1 / size)[:, None], np.arange(size // 2 + 1))
    bands = np.floor(4 * np.log2(np.maximum(frequency, 1) / 4)).astype(int)
    count = int(4 * np.log2(size / 8))
    return np.log(mean_power_by_bin(*map(torch.from_numpy, (power, bands)), count).numpy())


@lru_cache
def random_filters() -> torch.Tensor:
    """Return random filters of mean 0 and norm 1, float32 [FEATURES, 1, 5, 5]."""
    filters = torch.randn(FEATURES, 1, 5, 5, generator=torch.Generator().manual_seed(SEED))
    filters -= filters.mean((2, 3), keepdim=True)
    return filters / filters.norm(dim=(2, 3), keepdim=True)


def patch_features(image: np.ndarray) -> np.ndarray:
    """Return the mean magnitude of every filter over every patch, [patches, FEATURES].

    The filters see log brightness, so that leaves count alike on dark and light colors. The
    features of a patch of one color are 0.
    """
    gray = torch.from_numpy(np.log1p(image.mean(-1, dtype=np.float32)))
    magnitudes = F.conv2d(gray[None, None], random_filters()).abs()
    magnitudes = F.pad(magnitudes, (2, 2, 2, 2), mode="replicate")
    return F.avg_pool2d(magnitudes, PATCH)[0].flatten(1).T.double().numpy()


class ImageStatistics(NamedTuple):
    """Statistics of n images, from which every score follows."""

    is_right: np.ndarray  # [n] 1: one object of the prompt's color and shape, in its place
    overlap: np.ndarray  # [n] IoU of the object with the prompt's shape at its best place
    spectra: np.ndarray  # [n, bands]
    feature_means: np.ndarray  # [n, F] over the patches of an image
    feature_outers: np.ndarray  # [n, F, F] mean outer product over the patches of an image


def measure(images: list[np.ndarray], scenes: list[Scene]) -> ImageStatistics:
    """Return the statistics of uint8 [H, W, 3] images, each compared with its own scene."""
    rows = []
    for image, scene in zip(images, scenes, strict=True):
        verdict = check(image, scene.color, scene.ground)
        is_right = verdict.layout and verdict.shape == scene.shape
        features = patch_features(image)
        outer = features.T @ features / len(features)
        texture = log_spectrum(image), features.mean(0), outer
        rows.append((is_right, verdict.overlaps[scene.shape], *texture))
    return ImageStatistics(*(np.array(column, float) for column in zip(*rows, strict=True)))


def select(statistics: ImageStatistics, index: np.ndarray) -> ImageStatistics:
    """Return the statistics of the images of an index."""
    return ImageStatistics(*(array[index] for array in statistics))


def layout_share(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return the share of images with one object of the prompt's color and shape in its place."""
    return float(images.is_right.mean())


def mean_overlap(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return the mean intersection over union of the object with the prompt's shape."""
    return float(images.overlap.mean())


def spectrum_distance(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return the RMS over bands of the difference of the mean log power spectra; 0 is best."""
    return float(np.sqrt(np.mean((images.spectra.mean(0) - truth.spectra.mean(0)) ** 2)))


def patch_distance(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return 1000 times the Frechet distance of patches; 0 is best."""
    return 1000 * frechet_distance(*patch_moments(images), *patch_moments(truth))


def patch_moments(images: ImageStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [F] of the patches' features, and R [F, F] with R R^T their covariance."""
    mean = images.feature_means.mean(0)
    values, vectors = np.linalg.eigh(images.feature_outers.mean(0) - np.outer(mean, mean))
    return mean, vectors * np.sqrt(values.clip(0))


def joint_score(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return layout times exp(-spectrum), which a right layout and a right texture make 1."""
    return layout_share(images, truth) * float(np.exp(-spectrum_distance(images, truth)))


SCORES = {
    "layout": layout_share,
    "overlap": mean_overlap,
    "spectrum": spectrum_distance,
    "patches": patch_distance,
    "joint": joint_score,
}
# A set with repeated images has worse values of these; see `intervals.normal_interval`.
SET_SCORES = ("spectrum", "patches", "joint")


def bootstrap(
    statistic: Callable[..., float], *sets: ImageStatistics, is_set_score: bool = False
) -> dict:
    """Return `statistic(*sets)` and its 95 % interval, as "mean" and "interval".

    Args:
        statistic: takes one argument per set.
        sets: statistics of the same n scenes. Each of the RESAMPLES samples has n scenes with
            replacement, the same ones in all sets.
        is_set_score: return an interval about the value, at least 0, instead of percentiles.
    """
    value, n = statistic(*sets), len(sets[0].is_right)
    resampled = [
        statistic(*(select(statistics, index) for statistics in sets))
        for index in intervals.bootstrap_indices(n, RESAMPLES)
    ]
    if not is_set_score:
        return {"mean": value, "interval": intervals.percentile_interval(resampled)}
    low, high = intervals.normal_interval(value, resampled)
    return {"mean": value, "interval": [max(low, 0.0), high]}


def score(images: ImageStatistics, truth: ImageStatistics) -> dict:
    """Return every score of a setting with its interval, by name."""
    share = layout_share(images, truth)
    results = {"layout": {"mean": share, "interval": intervals.wilson_interval(images.is_right)}}
    results["overlap"] = bootstrap(mean_overlap, images, truth)
    for name in SET_SCORES:
        results[name] = bootstrap(SCORES[name], images, truth, is_set_score=True)
    return results


def paired_differences(
    images: ImageStatistics, baseline: ImageStatistics, truth: ImageStatistics
) -> dict:
    """Return every score of a setting minus that of a baseline, with its interval, by name.

    Args:
        images: statistics of the setting.
        baseline: statistics of the same scenes.
        truth: statistics of the same scenes.
    """
    differences = {
        name: bootstrap(lambda a, b, c, f=f: f(a, c) - f(b, c), images, baseline, truth)
        for name, f in SCORES.items()
    }
    interval = intervals.paired_shares(images.is_right, baseline.is_right)
    differences["layout"]["interval"] = interval
    return differences


def format_interval(result: dict, signed: bool = False) -> str:
    """Return a result as text, `0.98 [0.92, 1.00]`; signed: `+0.98 [+0.92, +1.00]`."""
    sign = "+" if signed else ""
    low, high = result["interval"]
    return f"{result['mean']:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
