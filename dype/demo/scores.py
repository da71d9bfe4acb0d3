"""Scores of drawn pictures against the scenes that they were asked for, with intervals.

Every score is a function of a set of pictures, so that the bootstrap draws pictures, each with its
own scene, and scores the set anew; a paired difference draws the same ones for both settings.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dype.demo.check import check
from dype.demo.scenes import Scene
from dype.demo.texture import frechet, log_spectrum, moments, patch_features, spectrum_error

DRAWS, SEED = 1000, 0  # of the bootstrap


class Judged(NamedTuple):
    """What the scores need of n pictures; the texture of rendered truth has no verdicts."""

    right: np.ndarray  # [n] 1 where one object of the asked colour and shape is in its place
    overlap: np.ndarray  # [n] of the object with the asked shape at its best place, IoU
    spectra: np.ndarray  # [n, bands]
    means: np.ndarray  # [n, F] of the patches' features
    outers: np.ndarray  # [n, F, F]


def judged(pictures: list[np.ndarray], scenes: list[Scene]) -> Judged:
    """Judge uint8 [H, W, 3] pictures, each by its own scene."""
    rows = []
    for picture, scene in zip(pictures, scenes, strict=True):
        verdict = check(picture, scene.colour, scene.ground)
        right = verdict.layout and verdict.shape == scene.shape
        mean, outer = moments(patch_features(picture))
        rows.append((right, verdict.overlaps[scene.shape], log_spectrum(picture), mean, outer))
    return Judged(*(np.array(column, float) for column in zip(*rows, strict=True)))


def layout(of: Judged, truth: Judged) -> float:
    """Share of pictures with one object of the asked colour and shape in its place."""
    return float(of.right.mean())


def overlap(of: Judged, truth: Judged) -> float:
    """Mean intersection over union of the object with the asked shape."""
    return float(of.overlap.mean())


def spectrum(of: Judged, truth: Judged) -> float:
    """Distance of the mean log power spectra, 0 is best: `texture.spectrum_error`."""
    return spectrum_error(of.spectra, truth.spectra)


def patches(of: Judged, truth: Judged) -> float:
    """Frechet distance of patches, times 1000, 0 is best: `texture.frechet`."""
    sets = [part.mean(0) for part in (of.means, of.outers, truth.means, truth.outers)]
    return 1000 * frechet(*sets)


def joint(of: Judged, truth: Judged) -> float:
    """Layout times exp(-spectrum): the share that is right, times how far the power is."""
    return layout(of, truth) * float(np.exp(-spectrum(of, truth)))


SCORES = {f.__name__: f for f in (layout, overlap, spectrum, patches, joint)}


def taken(of: Judged, index: np.ndarray) -> Judged:
    return Judged(*(part[index] for part in of))


def resampled(statistic: Callable[[np.ndarray], float], n: int) -> np.ndarray:
    """`statistic` of as many sets as DRAWS, each of n pictures drawn with replacement: indices."""
    rng = np.random.default_rng(SEED)
    return np.array([statistic(rng.integers(n, size=n)) for _ in range(DRAWS)])


def bootstrap(statistic: Callable[[np.ndarray], float], n: int) -> dict:
    """`statistic` of all n pictures and its percentile 95 % interval over sets drawn from them."""
    low, high = np.percentile(resampled(statistic, n), (2.5, 97.5))
    return {"mean": statistic(np.arange(n)), "interval": [float(low), float(high)]}


def around(statistic: Callable[[np.ndarray], float], n: int) -> dict:
    """The same for distances: the value and 1.96 standard deviations of the sets about it.

    A picture drawn twice puts a set farther off by itself: percentiles would lie beside the value.
    """
    value, half = statistic(np.arange(n)), 1.96 * resampled(statistic, n).std()
    return {"mean": value, "interval": [max(float(value - half), 0.0), float(value + half)]}


def wilson(right: np.ndarray) -> dict:
    """A share and its Wilson 95 % interval, which has a width where all are alike."""
    n, p, z = len(right), float(np.mean(right)), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"mean": p, "interval": [max(float(middle - half), 0.0), min(float(middle + half), 1.0)]}


def paired_shares(right: np.ndarray, other: np.ndarray) -> dict:
    """The difference of two shares of the same pictures and its 95 % interval.

    Agresti and Min (2005): half a picture more in each of the four cells, so that it has a width
    where no picture differs.
    """
    n, gained, lost = len(right), np.sum(right > other), np.sum(right < other)
    middle = float(gained - lost) / (n + 2)
    half = 1.96 * float(np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2))) / (n + 2)
    interval = [max(middle - half, -1.0), min(middle + half, 1.0)]
    return {"mean": float(np.mean(right) - np.mean(other)), "interval": interval}


def score(of: Judged, truth: Judged) -> dict:
    """Every score of a setting with its interval."""

    def of_sets(f):
        return lambda i: f(taken(of, i), taken(truth, i))

    n = len(of.right)
    distances = {f.__name__: around(of_sets(f), n) for f in (spectrum, patches, joint)}
    found = {"layout": wilson(of.right), "overlap": bootstrap(of_sets(overlap), n)} | distances
    return {name: found[name] for name in SCORES}


def difference(of: Judged, other: Judged, truth: Judged) -> dict:
    """Every score of a setting minus that of another on the same scenes, paired."""

    def paired(f):
        return lambda i: f(taken(of, i), taken(truth, i)) - f(taken(other, i), taken(truth, i))

    found = {name: bootstrap(paired(f), len(of.right)) for name, f in SCORES.items()}
    return found | {"layout": paired_shares(of.right, other.right)}


def shown(found: dict, signed: bool = False) -> str:
    """`0.98 [0.92, 1.00]`."""
    sign = "+" if signed else ""
    low, high = found["interval"]
    return f"{found['mean']:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
