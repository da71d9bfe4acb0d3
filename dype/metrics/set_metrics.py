"""Distances between sets of pictures from their Inception features, with bootstrap intervals.

The libraries compute these from pictures, once; an interval needs them from features, many times.
Pictures are what is drawn anew, each with all of its patches; the real ones stay.
"""

import numpy as np
from tqdm import tqdm

from dype.metrics.intervals import RESAMPLES, around, draws, middle

SLOW_RESAMPLES = 200  # of FID and Inception score
SHUFFLE = 2020  # torch-fidelity's seed of the order in which features are split


def root_of_covariance(features: np.ndarray) -> np.ndarray:
    """F [d, min(n, d)] with F F^T the covariance (over n - 1) of features [n, d]."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    if len(features) <= features.shape[1]:
        return centred.T
    values, vectors = np.linalg.eigh(centred.T @ centred)
    return vectors * np.sqrt(values.clip(0))


def frechet(real: np.ndarray, drawn: np.ndarray, choices) -> list[float]:
    """Frechet distance of features [m, d] to drawn [n, d][choice], for every choice of rows.

    |mu_1 - mu_2|^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). With C = F F^T the last trace is the sum
    of the singular values of F_1^T F_2, which for a few hundred pictures is a small matrix.
    """
    drawn = drawn - real.mean(0)
    root = root_of_covariance(real)
    across, squares = drawn @ root, (drawn**2).sum(1)
    found = []
    for choice in tqdm(choices, "resamples", disable=None, leave=False):
        n, centre = len(choice), drawn[choice].mean(0)
        trace = (squares[choice].sum() - n * (centre**2).sum()) / (n - 1)
        part = across[choice]
        part = (part - part.mean(0)) / np.sqrt(n - 1)
        gram = part @ part.T if n < part.shape[1] else part.T @ part
        product = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
        found.append(float((centre**2).sum() + (root**2).sum() + trace - 2 * product))
    return found


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KID's kernel (a b / d + 1)^3 of features [n, d] and [m, d], [n, m]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_distance(real: np.ndarray, drawn: np.ndarray, patches: int, weights) -> np.ndarray:
    """KID, the unbiased squared MMD, for every row of weights, [resamples, pictures].

    real [m * patches, d] and drawn [pictures * patches, d]. A weight says how often a picture was
    drawn. All pairs of pictures count, which is what KID's random subsets estimate; patches of the
    same picture, or of its copies, are alike and would add what no new picture adds.
    """

    def between(some, others):
        return kernel(some, others).reshape(len(some) // patches, patches, -1, patches).sum((1, 3))

    among, within, across = between(real, real), between(drawn, drawn), between(drawn, real)
    np.fill_diagonal(among, 0)
    np.fill_diagonal(within, 0)
    m, weights = len(among), np.asarray(weights, float)
    sums, squares = weights.sum(1), (weights**2).sum(1)
    total = ((weights @ within) * weights).sum(1) / (sums**2 - squares)
    total += among.sum() / (m * (m - 1)) - 2 * (weights @ across.sum(1)) / (sums * m)
    return total / patches**2


def inception_score(logits: np.ndarray, splits: int) -> float:
    """exp of the mean divergence of p(y|x) from p(y), mean over splits; logits [n, classes]."""
    logits = logits - logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    scores = []
    for i in range(splits):
        part = logs[len(logs) * i // splits : len(logs) * (i + 1) // splits]
        whole = np.log(np.exp(part).mean(0))
        scores.append(np.exp((np.exp(part) * (part - whole)).sum(1).mean()))
    return float(np.mean(scores))


def rows_of(pictures: np.ndarray, patches: int) -> np.ndarray:
    """The rows of features [pictures * patches, d] that belong to pictures [n]."""
    return (pictures[:, None] * patches + np.arange(patches)).ravel()


def fid(real: dict, drawn: dict, splits: int) -> tuple[float, list[float]]:
    """The distance and its interval. real, drawn: "features" [n, patches, d]."""
    pictures, patches, d = drawn["features"].shape
    ours, theirs = drawn["features"].reshape(-1, d), real["features"].reshape(-1, d)
    choices = [rows_of(choice, patches) for choice in draws(pictures, SLOW_RESAMPLES)]
    value, *resampled = frechet(theirs, ours, [np.arange(len(ours)), *choices])
    return value, around(value, resampled)


def kid(real: dict, drawn: dict, splits: int) -> tuple[float, list[float]]:
    """The distance and its interval, as `fid`; a resample of one picture alone has no pairs."""
    pictures, patches, d = drawn["features"].shape
    ours, theirs = drawn["features"].reshape(-1, d), real["features"].reshape(-1, d)
    counts = [np.bincount(one, minlength=pictures) for one in draws(pictures, RESAMPLES)]
    weights = [np.ones(pictures), *(one for one in counts if (one > 0).sum() > 1)]
    value, *resampled = kernel_distance(theirs, ours, patches, weights)
    return float(value), middle(resampled)


def score(real: None, drawn: dict, splits: int) -> tuple[float, list[float]]:
    """The Inception score and its interval. drawn: "logits" [n, patches, classes]."""
    pictures, patches, classes = drawn["logits"].shape
    logits = drawn["logits"].reshape(-1, classes)
    order = np.random.RandomState(SHUFFLE).permutation(len(logits))
    value = inception_score(logits[order], splits)
    choices = [rows_of(choice, patches) for choice in draws(pictures, SLOW_RESAMPLES)]
    return value, around(value, [inception_score(logits[one][order], splits) for one in choices])
