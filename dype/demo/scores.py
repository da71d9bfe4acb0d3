"""Scores of drawn images against the scenes that they were asked for, with intervals.

Every score is a function of a set of images, so that the bootstrap draws images, each with its
own scene, and scores the set anew; a paired difference draws the same ones for both settings.

Is the texture the truth's? Two distances of sets need no labels: that of the mean log power
spectrum, and the Frechet distance of patches in a fixed feature space. Both come from sums over
images, so that a bootstrap only adds these up again.
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

DRAWS = 1000  # of the bootstrap
PATCH = 32  # px, two tokens: the leaves' finest sizes, seldom an object's whole edge
FEATURES = 32  # random filters of 5 x 5 px, their mean magnitude over a patch
SEED = 0  # of the filters


def log_spectrum(picture: np.ndarray) -> np.ndarray:
    """ln of the mean power of an image's brightness, per quarter octave of frequency.

    Of the squares that the image divides into, and over them. The bands go from 4 cycles per
    square up to the Nyquist frequency; a Hann window keeps the light's gradient from leaking in.
    """
    size, gray = min(picture.shape[:2]), picture.mean(-1)
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
def filters() -> torch.Tensor:
    """Random filters without a mean, float32 [FEATURES, 1, 5, 5], of norm 1."""
    drawn = torch.randn(FEATURES, 1, 5, 5, generator=torch.Generator().manual_seed(SEED))
    drawn -= drawn.mean((2, 3), keepdim=True)
    return drawn / drawn.norm(dim=(2, 3), keepdim=True)


def patch_features(picture: np.ndarray) -> np.ndarray:
    """Mean magnitude of every filter over every patch of the log brightness, [patches, FEATURES].

    The logarithm makes leaves on dark and light colors alike; a patch of one color is all zeros.
    """
    gray = torch.from_numpy(np.log1p(picture.mean(-1, dtype=np.float32)))
    found = F.conv2d(gray[None, None], filters()).abs()
    found = F.pad(found, (2, 2, 2, 2), mode="replicate")
    return F.avg_pool2d(found, PATCH)[0].flatten(1).T.double().numpy()


class Judged(NamedTuple):
    """What the scores need of n images; the texture of rendered truth has no verdicts."""

    right: np.ndarray  # [n] 1 where one object of the asked color and shape is in its place
    overlap: np.ndarray  # [n] of the object with the asked shape at its best place, IoU
    spectra: np.ndarray  # [n, bands]
    means: np.ndarray  # [n, F] of the features of an image's patches
    outers: np.ndarray  # [n, F, F] mean outer product of the same


def judged(pictures: list[np.ndarray], scenes: list[Scene]) -> Judged:
    """Judge uint8 [H, W, 3] images, each by its own scene."""
    rows = []
    for picture, scene in zip(pictures, scenes, strict=True):
        verdict = check(picture, scene.color, scene.ground)
        right = verdict.layout and verdict.shape == scene.shape
        features = patch_features(picture)
        outer = features.T @ features / len(features)
        texture = log_spectrum(picture), features.mean(0), outer
        rows.append((right, verdict.overlaps[scene.shape], *texture))
    return Judged(*(np.array(column, float) for column in zip(*rows, strict=True)))


def layout(of: Judged, truth: Judged) -> float:
    """Share of images with one object of the asked color and shape in its place."""
    return float(of.right.mean())


def overlap(of: Judged, truth: Judged) -> float:
    """Mean intersection over union of the object with the asked shape."""
    return float(of.overlap.mean())


def spectrum(of: Judged, truth: Judged) -> float:
    """Root mean square over bands of the difference of the mean log power spectra, 0 is best."""
    return float(np.sqrt(np.mean((of.spectra.mean(0) - truth.spectra.mean(0)) ** 2)))


def patches(of: Judged, truth: Judged) -> float:
    """Frechet distance of patches, times 1000, 0 is best."""
    return 1000 * frechet_distance(*patch_law(of), *patch_law(truth))


def patch_law(of: Judged) -> tuple[np.ndarray, np.ndarray]:
    """Mean [F] of the patches' features, and root R [F, F] with R R^T their covariance."""
    mean = of.means.mean(0)
    values, vectors = np.linalg.eigh(of.outers.mean(0) - np.outer(mean, mean))
    return mean, vectors * np.sqrt(values.clip(0))


def joint(of: Judged, truth: Judged) -> float:
    """Layout times exp(-spectrum): the share that is right, times how far the power is."""
    return layout(of, truth) * float(np.exp(-spectrum(of, truth)))


SCORES = {f.__name__: f for f in (layout, overlap, spectrum, patches, joint)}


def taken(of: Judged, index: np.ndarray) -> Judged:
    return Judged(*(part[index] for part in of))


def bootstrap(statistic: Callable[..., float], *sets: Judged, distance: bool = False) -> dict:
    """`statistic` of sets that were judged on the same n scenes, and its interval.

    Resampled DRAWS times, n scenes with replacement. The interval is one of percentiles; that of a
    distance, which is 0 or more, is about the value.
    """
    value, n = statistic(*sets), len(sets[0].right)
    resampled = [
        statistic(*(taken(judged, chosen) for judged in sets))
        for chosen in intervals.bootstrap_indices(n, DRAWS)
    ]
    if not distance:
        return {"mean": value, "interval": intervals.percentile_interval(resampled)}
    low, high = intervals.normal_interval(value, resampled)
    return {"mean": value, "interval": [max(low, 0.0), high]}


def score(of: Judged, truth: Judged) -> dict:
    """Every score of a setting with its interval."""
    share = {"mean": layout(of, truth), "interval": intervals.wilson_interval(of.right)}
    found = {"layout": share, "overlap": bootstrap(overlap, of, truth)}
    for f in (spectrum, patches, joint):
        found[f.__name__] = bootstrap(f, of, truth, distance=True)
    return found


def difference(of: Judged, other: Judged, truth: Judged) -> dict:
    """Every score of a setting minus that of another on the same scenes, paired."""
    found = {
        name: bootstrap(lambda a, b, true, f=f: f(a, true) - f(b, true), of, other, truth)
        for name, f in SCORES.items()
    }
    found["layout"]["interval"] = intervals.paired_shares(of.right, other.right)
    return found


def shown(found: dict, signed: bool = False) -> str:
    """`0.98 [0.92, 1.00]`."""
    sign = "+" if signed else ""
    low, high = found["interval"]
    return f"{found['mean']:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
