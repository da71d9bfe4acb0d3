"""Set metrics of features equal independent implementations; their intervals."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.special
from scored_sweeps import CLASSES

from dype.metrics import intervals, set_metrics


def frechet(a, b):
    """Return the Frechet distance of two sets of features, [n, d] each."""
    pairs = (set_metrics.mean_and_root(x, np.ones(len(x))) for x in (a, b))
    return set_metrics.frechet_distance(*(array for pair in pairs for array in pair))


@pytest.mark.parametrize(("real", "generated"), [(9, 7), (60, 11), (11, 60), (80, 70)])
def test_frechet_distance(real, generated):
    """Against scipy's `sqrtm`, within 1e-4, with fewer and with more images than features."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(real, 20)), rng.normal(0.5, rng.random(20), size=(generated, 20))
    c, d = np.cov(a.T), np.cov(b.T)
    eps = 1e-9 * np.eye(20)  # because the root of a singular matrix is not exact
    root = scipy.linalg.sqrtm((c + eps) @ (d + eps)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_counts_are_repeated_rows():
    """A count of 2 equals the row and a copy of it; a count of 0 removes the row."""
    features, counts = np.random.default_rng(1).normal(size=(6, 4)), np.array([2, 0, 1, 3, 0, 1])
    mean, root = set_metrics.mean_and_root(features, counts)
    rows = features.repeat(counts, 0)
    np.testing.assert_allclose(mean, rows.mean(0))
    np.testing.assert_allclose(root @ root.T, np.cov(rows.T))


@pytest.mark.parametrize("real_count", [9, 40])
def test_fid_of_features(real_count):
    """The value is the distance of all rows, with fewer and with more rows than features."""
    rng = np.random.default_rng(2)
    real, generated = rng.normal(size=(real_count, 2, 12)), rng.normal(0.3, 1, (8, 2, 12))
    value, (low, high) = set_metrics.fid({"features": real}, {"features": generated}, 0)
    assert value == pytest.approx(frechet(real.reshape(-1, 12), generated.reshape(-1, 12)))
    assert low < value < high


def plain_kid(real: np.ndarray, generated: np.ndarray, patches: int = 1) -> float:
    """Compute KID pair by pair, over pairs of different images."""

    def mean(pairs):
        return np.mean([(np.dot(x, y) / len(x) + 1) ** 3 for x, y in pairs])

    def within(rows):
        pairs = itertools.permutations(enumerate(rows), 2)
        return mean((x, y) for (i, x), (j, y) in pairs if i // patches != j // patches)

    return within(real) + within(generated) - 2 * mean(itertools.product(real, generated))


@pytest.mark.parametrize("patches", [1, 3])
def test_kernel_distance(patches):
    """Against a plain transcription, pair by pair, within 1e-9.

    A resample that repeats nothing is the distance of its images.
    """
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=(8 * patches, 4)), rng.normal(0.3, 1, size=(6 * patches, 4))
    weights = np.array([1, 1, 0, 1, 0, 1.0])
    distances = set_metrics.kernel_distance(real, generated, patches, [np.ones(6), weights])
    sampled = generated.reshape(6, patches, 4)[weights > 0].reshape(-1, 4)
    expected = [plain_kid(real, generated, patches), plain_kid(real, sampled, patches)]
    assert distances == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_a_resample():
    """A repeated image pairs twice with every different image, and never with its copy."""
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=(5 * 2, 4)), rng.normal(0.3, 1, size=(3 * 2, 4))
    copies = [0, 0, 2]
    pairs = [
        (generated[2 * image1 + patch1], generated[2 * image2 + patch2])
        for image1, image2 in itertools.permutations(copies, 2)
        for patch1, patch2 in itertools.product((0, 1), repeat=2)
        if image1 != image2
    ]
    sampled = generated.reshape(3, 2, 4)[copies].reshape(-1, 4)
    value = np.mean([(x @ y / 4 + 1) ** 3 for x, y in pairs])
    real_pairs = itertools.permutations(range(len(real)), 2)
    value += np.mean([(real[i] @ real[j] / 4 + 1) ** 3 for i, j in real_pairs if i // 2 != j // 2])
    cross_pairs = itertools.product(real, sampled)
    value -= 2 * np.mean([(x @ y / 4 + 1) ** 3 for x, y in cross_pairs])
    (distance,) = set_metrics.kernel_distance(real, generated, 2, [[2, 0, 1]])
    assert distance == pytest.approx(value, rel=1e-9)


def test_kernel_distance_is_unbiased():
    """The mean is 0 for images of one distribution, even if patches of an image are alike."""
    rng, distances = np.random.default_rng(5), []

    def sample(count):
        features = rng.normal(size=(count, 1, 8)) + 0.3 * rng.normal(size=(count, 6, 8))
        return features.reshape(-1, 8)

    for _ in range(300):
        distances += [*set_metrics.kernel_distance(sample(10), sample(12), 6, [np.ones(12)])]
    assert abs(np.mean(distances)) < 3 * np.std(distances) / len(distances) ** 0.5


def test_inception_score():
    """Against scipy's `softmax` and `rel_entr`, within 1e-9.

    The splits are unequal, and in torch-fidelity's order.
    """
    logits = np.random.default_rng(2).normal(0, 3, size=(11, 2, CLASSES))
    value, _ = set_metrics.inception_score_with_interval(None, {"logits": logits}, 3)
    shares = scipy.special.softmax(logits.reshape(22, -1), 1)
    shares = shares[np.random.RandomState(2020).permutation(22)]
    splits = [shares[:7], shares[7:14], shares[14:]]
    scores = [np.exp(scipy.special.rel_entr(p, p.mean(0)).sum(1).mean()) for p in splits]
    assert value == pytest.approx(np.mean(scores), rel=1e-9)


@pytest.mark.parametrize("name", ["fid", "kid", "is"])
def test_intervals_of_sets_spread(name):
    """The width matches the metric's spread over fresh images within 35 %; it has the value."""
    rng = np.random.default_rng(4)
    real = {"features": rng.normal(size=(80, 1, 6))}
    values, widths = [], []
    for _ in range(40):
        features = rng.normal(0.4, 1.3, size=(50, 1, 6))
        generated = {"features": features, "logits": features}
        value, (low, high) = set_metrics.SET_METRICS[name].compute(real, generated, 2)
        assert low < value < high
        values.append(value)
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.35)


def test_interval_is_wider_for_correlated_patches():
    """Equal patches of one image count as one image, not as many."""
    rng = np.random.default_rng(6)
    real = {"features": rng.normal(size=(40, 1, 4))}
    correlated = np.repeat(rng.normal(0.5, 1, size=(20, 1, 4)), 8, axis=1)
    independent = rng.normal(0.5, 1, size=(20, 8, 4))
    for compute in (set_metrics.fid, set_metrics.kid):
        wide, narrow = (
            np.diff(compute(real, {"features": features}, 0)[1])
            for features in (correlated, independent)
        )
        assert wide > 1.5 * narrow


def test_resampled_scores_are_of_the_value(monkeypatch):
    """A resample that equals the set has the same input to the Inception score as the value."""
    inputs, logits = [], np.random.default_rng(0).normal(size=(6, 3, CLASSES))
    monkeypatch.setattr(intervals, "bootstrap_indices", lambda count, _: [np.arange(count)] * 2)
    monkeypatch.setattr(
        set_metrics, "inception_score", lambda x, splits: inputs.append(x) or float(len(inputs))
    )
    set_metrics.inception_score_with_interval(None, {"logits": logits}, 2)
    assert len(inputs) == 3
    assert all((rows == inputs[0]).all() for rows in inputs)
