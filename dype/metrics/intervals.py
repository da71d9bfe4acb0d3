"""Bootstrap and other 95 % intervals of means, shares and distances over sets of images."""

import numpy as np

SEED = 0  # of every bootstrap
RESAMPLES = 2000  # of a mean


def draws(count: int, resamples: int) -> np.ndarray:
    """Indices of pictures drawn with replacement, [resamples, count]."""
    return np.random.default_rng(SEED).integers(count, size=(resamples, count))


def middle(resampled) -> list[float]:
    """The middle 95 % of resampled values."""
    return [float(edge) for edge in np.percentile(resampled, (2.5, 97.5))]


def around(value: float, resampled) -> list[float]:
    """value -+ 1.96 standard deviations of its resampled values.

    For distances and scores of sets, which a picture drawn twice makes worse by itself: the
    percentiles of the resampled values would lie beside the value.
    """
    half = 1.96 * float(np.std(resampled))
    return [float(value) - half, float(value) + half]


def mean(values: np.ndarray) -> np.ndarray:
    return values.mean(-1)


def harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Of ratios over equal amounts: the ratio of the sums."""
    return 1 / (1 / values).mean(-1)


def interval(values: np.ndarray, statistic=mean) -> list[float] | None:
    """Of a statistic over pictures, [n]; None for fewer than 2."""
    if len(values) < 2:
        return None
    return middle(statistic(values[draws(len(values), RESAMPLES)]))


def wilson(right: np.ndarray) -> list[float]:
    """Of a share [n]: Wilson's, which has a width where all are alike."""
    n, p, z = len(right), float(np.mean(right)), 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(float(centre - half), 0.0), min(float(centre + half), 1.0)]


def paired_shares(right: np.ndarray, other: np.ndarray) -> list[float]:
    """Of the difference of two shares of the same pictures, [n] each.

    Agresti and Min (2005): half a picture more in each of the four cells, so that it has a width
    where no picture differs.
    """
    n, gained, lost = len(right), np.sum(right > other), np.sum(right < other)
    centre = float(gained - lost) / (n + 2)
    half = 1.96 * float(np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2))) / (n + 2)
    return [max(centre - half, -1.0), min(centre + half, 1.0)]
