"""Is a picture's texture the truth's? Distances of sets of pictures that need no labels.

Two of them: of the mean log power spectrum, and the Frechet distance of patches in a fixed feature
space. Both come from sums over pictures, so that a bootstrap only adds these up again.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from dype.metrics.set_metrics import frechet_distance
from dype.sampling.latents import mean_power_by_bin

PATCH = 32  # px, two tokens: the leaves' finest sizes, seldom an object's whole edge
FEATURES = 32  # random filters of 5 x 5 px, their mean magnitude over a patch
SEED = 0  # of the filters


def log_spectrum(picture: np.ndarray) -> np.ndarray:
    """ln of the mean power of a picture's brightness, per quarter octave of frequency.

    Of the squares that the picture divides into, and over them. The bands go from 4 cycles per
    square up to the Nyquist frequency; a Hann window keeps the light's gradient from leaking in.
    """
    size, grey = min(picture.shape[:2]), picture.mean(-1)
    window = np.outer(np.hanning(size), np.hanning(size))
    squares = [
        grey[y : y + size, x : x + size]
        for y in range(0, grey.shape[0] - size + 1, size)
        for x in range(0, grey.shape[1] - size + 1, size)
    ]
    power = np.mean([abs(np.fft.rfft2((s - s.mean()) * window)) ** 2 for s in squares], 0)
    frequency = np.hypot(np.fft.fftfreq(size, 1 / size)[:, None], np.arange(size // 2 + 1))
    bands = np.floor(4 * np.log2(np.maximum(frequency, 1) / 4)).astype(int)
    count = int(4 * np.log2(size / 8))
    return np.log(mean_power_by_bin(*map(torch.from_numpy, (power, bands)), count).numpy())


def spectrum_error(spectra: np.ndarray, truth: np.ndarray) -> float:
    """Root mean square over bands of the difference of two sets' mean spectra, each [n, bands]."""
    return float(np.sqrt(np.mean((spectra.mean(0) - truth.mean(0)) ** 2)))


@lru_cache
def filters() -> torch.Tensor:
    """Random filters without a mean, float32 [FEATURES, 1, 5, 5], of norm 1."""
    drawn = torch.randn(FEATURES, 1, 5, 5, generator=torch.Generator().manual_seed(SEED))
    drawn -= drawn.mean((2, 3), keepdim=True)
    return drawn / drawn.norm(dim=(2, 3), keepdim=True)


def patch_features(picture: np.ndarray) -> np.ndarray:
    """Mean magnitude of every filter over every patch of the log brightness, [patches, FEATURES].

    The logarithm makes leaves on dark and light colours alike; a patch of one colour is all zeros.
    """
    grey = torch.from_numpy(np.log1p(picture.mean(-1, dtype=np.float32)))
    found = F.conv2d(grey[None, None], filters()).abs()
    found = F.pad(found, (2, 2, 2, 2), mode="replicate")
    return F.avg_pool2d(found, PATCH)[0].flatten(1).T.double().numpy()


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [F] and mean outer product [F, F] of one picture's patches."""
    return features.mean(0), features.T @ features / len(features)


def frechet(mean: np.ndarray, outer: np.ndarray, true_mean, true_outer) -> float:
    """Return the Frechet distance of two sets of patches, from means and mean outer products."""
    root, true_root = covariance_root(mean, outer), covariance_root(true_mean, true_outer)
    return frechet_distance(mean, root, true_mean, true_root)


def covariance_root(mean: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """Return F [F, F] with F F^T the covariance, outer - mean mean^T."""
    values, vectors = np.linalg.eigh(outer - np.outer(mean, mean))
    return vectors * np.sqrt(values.clip(0))
