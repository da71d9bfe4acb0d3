"""Intervals of means over images."""

import numpy as np

from dype.metrics import intervals


def test_intervals_of_means_cover():
    """0.90 to 0.97 of the intervals hold the true mean of fresh images.

    The interval of a harmonic mean holds that mean.
    """
    rng = np.random.default_rng(3)
    edges = [intervals.mean_interval(rng.exponential(size=60)) for _ in range(400)]
    assert 0.90 < np.mean([low < 1 < high for low, high in edges]) < 0.97
    values = rng.uniform(1, 9, size=200)
    low, high = intervals.mean_interval(values, intervals.harmonic_mean)
    assert low < 1 / np.mean(1 / values) < high < values.mean()
    assert intervals.mean_interval(values[:1]) is None


def test_shares_of_the_same_images():
    """The paired interval covers the true gain, also where few images differ."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(400):
        baseline = rng.random(32) < 0.9
        right = np.where(rng.random(32) < 0.1, True, baseline)  # a tenth of the wrong ones is right
        low, high = intervals.paired_shares(right.astype(float), baseline.astype(float))
        covered += low < 0.1 * 0.1 < high
    assert covered >= 380
