"""Compute distances between sets of images from Inception's features, with bootstrap intervals.

The libraries compute these once, from images; an interval needs them many times, from features.
The bootstrap resamples generated images, each with all its patches; real images stay fixed.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dype.metrics import intervals

SLOW_RESAMPLES = 200  # of FID and Inception score
SHUFFLE_SEED = 2020  # torch-fidelity's, of the order in which features are split
BAR = {"disable": None, "leave": False}  # of tqdm: none where stderr is no terminal


def frechet_distance(
    mean: np.ndarray, root: np.ndarray, other_mean: np.ndarray, other_root: np.ndarray
) -> float:
    """Return |m - m'|^2 + Tr(C + C' - 2 (C C')^(1/2)) of two sets of features.

    mean [d]; root F [d, k], any k, with C = F F^T. The last trace is the sum of the singular
    values of F^T F', which for a few hundred images is a small matrix.
    """
    traces = (root**2).sum() + (other_root**2).sum()
    cross = np.linalg.norm(root.T @ other_root, "nuc")
    return float(((mean - other_mean) ** 2).sum() + traces - 2 * cross)


def mean_and_root(features: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of features [n, d], and F [d, <= n] with F F^T their covariance.

    counts [n] says how often each row is in the set; the covariance is over the set's size - 1.
    """
    size, features, counts = counts.sum(), features[counts > 0], counts[counts > 0]
    mean = counts @ features / size
    return mean, (features - mean).T * np.sqrt(counts / (size - 1))


def bootstrap_counts(images: int, resamples: int) -> np.ndarray:
    """Return how often each image is in the set itself, and in resamples: [1 + resamples, n]."""
    indices = [np.arange(images), *intervals.bootstrap_indices(images, resamples)]
    return np.array([np.bincount(row, minlength=images) for row in indices])


def fid(real: dict, generated: dict, splits: int) -> tuple[float, list[float]]:
    """Return the Frechet distance and its interval; "features" [images, patches, d] of each."""
    images, patches, d = generated["features"].shape
    features, real_features = (s["features"].reshape(-1, d) for s in (generated, real))
    mean, root = mean_and_root(real_features, np.ones(len(real_features)))
    if root.shape[1] > d:
        root = np.linalg.qr(root.T, "r").T  # [d, d], because it meets every resample
    value, *resampled = (
        frechet_distance(mean, root, *mean_and_root(features, counts.repeat(patches)))
        for counts in tqdm(bootstrap_counts(images, SLOW_RESAMPLES), "resamples", **BAR)
    )
    return value, intervals.normal_interval(value, resampled)


def kernel_distance(real: np.ndarray, generated: np.ndarray, patches: int, weights) -> np.ndarray:
    """Return KID, the unbiased squared MMD, for every row of weights, [resamples, images].

    real [m * patches, d], generated [images * patches, d]; the kernel is (a b / d + 1)^3. A weight
    says how often an image was sampled. All pairs of images count, which is what KID's random
    subsets estimate. Patches of one image, or of its copies, are not paired: they are alike, as new
    images would not be.
    """

    def image_kernel(a, b):
        pairs = (a @ b.T / a.shape[1] + 1) ** 3
        return pairs.reshape(len(a) // patches, patches, -1, patches).sum((1, 3))

    among_real, among_generated = image_kernel(real, real), image_kernel(generated, generated)
    across = image_kernel(generated, real)
    np.fill_diagonal(among_real, 0)
    np.fill_diagonal(among_generated, 0)
    m, weights = len(among_real), np.asarray(weights, float)
    sums, squares = weights.sum(1), (weights**2).sum(1)
    total = ((weights @ among_generated) * weights).sum(1) / (sums**2 - squares)
    total += among_real.sum() / (m * (m - 1)) - 2 * (weights @ across.sum(1)) / (sums * m)
    return total / patches**2


def kid(real: dict, generated: dict, splits: int) -> tuple[float, list[float]]:
    """Return KID and its interval, as `fid`; a resample of one image alone has no pairs."""
    images, patches, d = generated["features"].shape
    features, real_features = (s["features"].reshape(-1, d) for s in (generated, real))
    counts = bootstrap_counts(images, intervals.RESAMPLES)
    counts = counts[(counts > 0).sum(1) > 1]
    value, *resampled = kernel_distance(real_features, features, patches, counts)
    return float(value), intervals.percentile_interval(resampled)


def inception_score(logits: np.ndarray, splits: int) -> float:
    """Return exp of the mean divergence of p(y|x) from p(y), mean over splits; [n, classes]."""
    logits = logits - logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores = []
    for i in range(splits):
        part = logs[len(logs) * i // splits : len(logs) * (i + 1) // splits]
        marginal = np.log(np.exp(part).mean(0))
        scores.append(np.exp((np.exp(part) * (part - marginal)).sum(1).mean()))
    return float(np.mean(scores))


def inception_score_with_interval(
    real: None, generated: dict, splits: int
) -> tuple[float, list[float]]:
    """Return the Inception score and its interval; "logits" [images, patches, classes]."""
    logits = generated["logits"]
    images, patches, classes = logits.shape
    order = np.random.RandomState(SHUFFLE_SEED).permutation(images * patches)
    indices = [np.arange(images), *intervals.bootstrap_indices(images, SLOW_RESAMPLES)]
    value, *resampled = (
        inception_score(logits[index].reshape(-1, classes)[order], splits) for index in indices
    )
    return value, intervals.normal_interval(value, resampled)


class SetMetric(NamedTuple):
    """A metric of a set of images, from Inception's features."""

    compute: Callable  # (real or None, generated, splits) -> value, interval
    title: str
    real: bool  # compares with real images
    patched: bool = False  # of patches, not of whole images


SET_METRICS = {
    "fid": SetMetric(fid, "FID, lower is better", real=True),
    "kid": SetMetric(kid, "KID, unbiased, lower is better", real=True),
    "is": SetMetric(inception_score_with_interval, "Inception score, higher is better", real=False),
}
SET_METRICS |= {
    f"patch_{name}": metric._replace(title=f"patch {metric.title}", patched=True)
    for name, metric in SET_METRICS.items()
}
