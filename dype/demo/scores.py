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
