"""Compute distances between sets of images from Inception's features, with bootstrap intervals.

The libraries compute these once, from images. An interval needs them many times, so they are
computed from features here. The bootstrap resamples generated images, each with all its patches.
Real images stay fixed.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dype.metrics import intervals

SLOW_RESAMPLES = 200  # for FID and Inception score, because they are slow
SHUFFLE_SEED = 2020  # torch-fidelity's seed of the order before the splits
PROGRESS_BAR = {"disable": None, "leave": False}  # tqdm shows a bar only in a terminal


def frechet_distance(
    mean1: np.ndarray, root1: np.ndarray, mean2: np.ndarray, root2: np.ndarray
) -> float:
    """Return |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features.

    The last trace is the sum of the singular values of F1^T F2. This matrix is small for a few
    hundred images.

    Args:
        mean1, mean2: m of each set, [d].
        root1, root2: F of each set with C = F F^T, [d, k] for any k.
    """
    traces = (root1**2).sum() + (root2**2).sum()
    cross = np.linalg.norm(root1.T @ root2, "nuc")
    return float(((mean1 - mean2) ** 2).sum() + traces - 2 * cross)


def mean_and_root(features: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of features [n, d], and F [d, <= n] with F F^T their covariance.

    counts [n] is the number of copies of each row in the set. The covariance divides by the set's
    size minus 1.
    """
    size, features, counts = counts.sum(), features[counts > 0], counts[counts > 0]
    mean = counts @ features / size
    return mean, (features - mean).T * np.sqrt(counts / (size - 1))


def bootstrap_counts(images: int, resamples: int) -> np.ndarray:
    """Return the number of copies of each image, [1 + resamples, n]; row 0 is the set itself."""
    indices = [np.arange(images), *intervals.bootstrap_indices(images, resamples)]
    return np.array([np.bincount(row, minlength=images) for row in indices])


def fid(real: dict, generated: dict, splits: int) -> tuple[float, list[float]]:
    """Return the Frechet distance and its interval.

    Args:
        real: "features" of the real images, [images, patches, d].
        generated: the same for the generated images.
        splits: unused; every set metric takes it.
    """
    images, patches, d = generated["features"].shape
    features, real_features = (s["features"].reshape(-1, d) for s in (generated, real))
    mean, root = mean_and_root(real_features, np.ones(len(real_features)))
    if root.shape[1] > d:
        root = np.linalg.qr(root.T, "r").T  # [d, d], because every resample multiplies by it
    value, *resampled = (
        frechet_distance(mean, root, *mean_and_root(features, counts.repeat(patches)))
        for counts in tqdm(bootstrap_counts(images, SLOW_RESAMPLES), "resamples", **PROGRESS_BAR)
    )
    return value, intervals.normal_interval(value, resampled)


def kernel_distance(real: np.ndarray, generated: np.ndarray, patches: int, weights) -> np.ndarray:
    """Return KID, the unbiased squared MMD with the kernel (a b / d + 1)^3, of each resample.

    The sum has all pairs of images; KID's random subsets estimate the same value. Patches of one
    image and of its copies are not paired, because they are more alike than those of new images.

    Args:
        real: features of the real images, [m * patches, d].
        generated: features of the generated images, [images * patches, d].
        patches: number of patches per image.
        weights: number of copies of each generated image, [resamples, images].

    Returns:
        The distances, [resamples].
    """

    def image_kernel(a, b):
        pairs = (a @ b.T / a.shape[1] + 1) ** 3
        return pairs.reshape(len(a) // patches, patches, -1, patches).sum((1, 3))

    real_kernel, generated_kernel = image_kernel(real, real), image_kernel(generated, generated)
    cross_kernel = image_kernel(generated, real)
    np.fill_diagonal(real_kernel, 0)
    np.fill_diagonal(generated_kernel, 0)
    m, weights = len(real_kernel), np.asarray(weights, float)
    sums, squares = weights.sum(1), (weights**2).sum(1)
    total = ((weights @ generated_kernel) * weights).sum(1) / (sums**2 - squares)
    total += real_kernel.sum() / (m * (m - 1)) - 2 * (weights @ cross_kernel.sum(1)) / (sums * m)
    return total / patches**2


def kid(real: dict, generated: dict, splits: int) -> tuple[float, list[float]]:
    """Return KID and its interval.

    Args:
        real: "features" of the real images, [images, patches, d].
        generated: the same for the generated images.
        splits: unused; every set metric takes it.
    """
    images, patches, d = generated["features"].shape
    features, real_features = (s["features"].reshape(-1, d) for s in (generated, real))
    counts = bootstrap_counts(images, intervals.RESAMPLES)
    counts = counts[(counts > 0).sum(1) > 1]  # because copies of one image have no pairs
    value, *resampled = kernel_distance(real_features, features, patches, counts)
    return float(value), intervals.percentile_interval(resampled)


def inception_score(logits: np.ndarray, splits: int) -> float:
    """Return exp of the mean divergence of p(y|x) from p(y), averaged over splits.

    logits [n, classes].
    """
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores = []
    for i in range(splits):
        log_pyx = log_p[len(log_p) * i // splits : len(log_p) * (i + 1) // splits]
        log_py = np.log(np.exp(log_pyx).mean(0))
        scores.append(np.exp((np.exp(log_pyx) * (log_pyx - log_py)).sum(1).mean()))
    return float(np.mean(scores))


def inception_score_with_interval(
    real: None, generated: dict, splits: int
) -> tuple[float, list[float]]:
    """Return the Inception score and its interval.

    Args:
        real: unused; every set metric takes it.
        generated: "logits" of the generated images, [images, patches, classes].
        splits: number of splits of the score.
    """
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
    uses_real: bool
    uses_patches: bool = False  # if not, the metric sees whole images


SET_METRICS = {
    "fid": SetMetric(fid, "FID, lower is better", uses_real=True),
    "kid": SetMetric(kid, "KID, unbiased, lower is better", uses_real=True),
    "is": SetMetric(
        inception_score_with_interval, "Inception score, higher is better", uses_real=False
    ),
}
SET_METRICS |= {
    f"patch_{name}": metric._replace(title=f"patch {metric.title}", uses_patches=True)
    for name, metric in SET_METRICS.items()
}
