"""Scores of drawn pictures against the scenes that they were asked for, with intervals.

Every score is a function of a set of pictures, so that the bootstrap draws pictures, each with its
own scene, and scores the set anew; a paired difference draws the same ones for both settings.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dype.demo.layout_check import check
from dype.demo.scenes import Scene
from dype.demo.texture import frechet, log_spectrum, moments, patch_features, spectrum_error
from dype.metrics import intervals

DRAWS = 1000  # of the bootstrap


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


def resampled(statistic: Callable[[np.ndarray], float], n: int) -> list[float]:
    """`statistic` of DRAWS sets, each of n pictures drawn with replacement: indices."""
    return [statistic(chosen) for chosen in intervals.bootstrap_indices(n, DRAWS)]


def bootstrap(statistic: Callable[[np.ndarray], float], n: int) -> dict:
    """`statistic` of all n pictures and its percentile interval."""
    value = statistic(np.arange(n))
    return {"mean": value, "interval": intervals.percentile_interval(resampled(statistic, n))}


def distance(statistic: Callable[[np.ndarray], float], n: int) -> dict:
    """The same for distances, which are 0 or more: an interval about the value."""
    value = statistic(np.arange(n))
    low, high = intervals.normal_interval(value, resampled(statistic, n))
    return {"mean": value, "interval": [max(low, 0.0), high]}


def shares(right: np.ndarray) -> dict:
    """The share of pictures that are right, and its interval."""
    return {"mean": float(np.mean(right)), "interval": intervals.wilson_interval(right)}


def score(of: Judged, truth: Judged) -> dict:
    """Every score of a setting with its interval."""

    def of_sets(f):
        return lambda i: f(taken(of, i), taken(truth, i))

    n = len(of.right)
    distances = {f.__name__: distance(of_sets(f), n) for f in (spectrum, patches, joint)}
    found = {"layout": shares(of.right), "overlap": bootstrap(of_sets(overlap), n)} | distances
    return {name: found[name] for name in SCORES}


def difference(of: Judged, other: Judged, truth: Judged) -> dict:
    """Every score of a setting minus that of another on the same scenes, paired."""

    def paired(f):
        return lambda i: f(taken(of, i), taken(truth, i)) - f(taken(other, i), taken(truth, i))

    found = {name: bootstrap(paired(f), len(of.right)) for name, f in SCORES.items()}
    found["layout"]["interval"] = intervals.paired_shares(of.right, other.right)
    return found


def shown(found: dict, signed: bool = False) -> str:
    """`0.98 [0.92, 1.00]`."""
    sign = "+" if signed else ""
    low, high = found["interval"]
    return f"{found['mean']:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
