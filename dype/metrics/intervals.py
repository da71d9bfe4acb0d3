"""Bootstrap and other 95 % intervals of means, shares and distances over sets of images."""

import numpy as np

SEED = 0  # of every bootstrap
RESAMPLES = 2000  # of a mean


def bootstrap_indices(count: int, resamples: int) -> np.ndarray:
    """Return indices of images sampled with replacement, [resamples, count]."""
    return np.random.default_rng(SEED).integers(count, size=(resamples, count))


def percentile_interval(resampled) -> list[float]:
    """Return the middle 95 % of resampled values."""
    return [float(edge) for edge in np.percentile(resampled, (2.5, 97.5))]


def normal_interval(value: float, resampled) -> list[float]:
    """Return value -+ 1.96 standard deviations of its resampled values.

    For distances and scores of sets: an image sampled twice makes these worse by itself, so the
    percentiles of the resampled values would lie beside the value.
    """
    half = 1.96 * float(np.std(resampled))
    return [float(value) - half, float(value) + half]


def harmonic_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the harmonic mean: of ratios over equal amounts, the ratio of the sums."""
    return 1 / (1 / values).mean(axis)


def mean_interval(values: np.ndarray, statistic=np.mean) -> list[float] | None:
    """Return the interval of a mean over images, [n]; None for fewer than 2."""
    if len(values) < 2:
        return None
    resamples = values[bootstrap_indices(len(values), RESAMPLES)]
    return percentile_interval(statistic(resamples, axis=-1))


def wilson_interval(right: np.ndarray, statistic=np.mean) -> list[float]:
    """Return Wilson's interval of a share, [n] of 0 or 1; it has a width where all are alike."""
    n, p, z = len(right), float(statistic(right)), 1.96
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(float(center - half), 0.0), min(float(center + half), 1.0)]


def paired_shares(right: np.ndarray, other: np.ndarray) -> list[float]:
    """Return the interval of the difference of two shares of the same images, [n] each.

    Agresti and Min (2005): half an image more in each of the four cells, so that the interval has
    a width where no image differs.
    """
    n, gained, lost = len(right), np.sum(right > other), np.sum(right < other)
    center = float(gained - lost) / (n + 2)
    half = 1.96 * float(np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2))) / (n + 2)
    return [max(center - half, -1.0), min(center + half, 1.0)]
