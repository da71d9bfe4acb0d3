"""Compute 95 % intervals of means, shares and distances over sets of images."""

import numpy as np

SEED = 0  # of every bootstrap
RESAMPLES = 2000  # of a mean


def bootstrap_indices(count: int, resamples: int) -> np.ndarray:
    """Return indices of `count` images sampled with replacement, [resamples, count]."""
    return np.random.default_rng(SEED).integers(count, size=(resamples, count))


def percentile_interval(resampled) -> list[float]:
    """Return the middle 95 % of resampled values."""
    return [float(edge) for edge in np.percentile(resampled, (2.5, 97.5))]


def normal_interval(value: float, resampled) -> list[float]:
    """Return value -+ 1.96 standard deviations of its resampled values.

    Use it for distances and scores of sets. A repeated image makes these worse, so percentiles of
    the resampled values may not contain the value.
    """
    half = 1.96 * float(np.std(resampled))
    return [float(value) - half, float(value) + half]


def harmonic_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the harmonic mean: the ratio of the sums, if all ratios have equal numerators."""
    return 1 / (1 / values).mean(axis)


def mean_interval(values: np.ndarray, statistic=np.mean) -> list[float] | None:
    """Return the interval of a mean of values [n], one per image; None if n < 2."""
    if len(values) < 2:
        return None
    resamples = values[bootstrap_indices(len(values), RESAMPLES)]
    return percentile_interval(statistic(resamples, axis=-1))


def wilson_interval(right: np.ndarray, statistic=np.mean) -> list[float]:
    """Return Wilson's interval of the share of ones in `right`, [n] of 0 or 1.

    Its width is above 0 even if all values are equal.
    """
    n, p, z = len(right), float(statistic(right)), 1.96
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(float(center - half), 0.0), min(float(center + half), 1.0)]


def paired_shares(right: np.ndarray, baseline: np.ndarray) -> list[float]:
    """Return the interval of the difference of two shares over the same images, [n] of 0 or 1.

    This is the interval of Agresti and Min (2005). It adds half an image to each of the four cells,
    so its width is above 0 even if no image differs.
    """
    n, gained, lost = len(right), np.sum(right > baseline), np.sum(right < baseline)
    center = float(gained - lost) / (n + 2)
    half = 1.96 * float(np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2))) / (n + 2)
    return [max(center - half, -1.0), min(center + half, 1.0)]
