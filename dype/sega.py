"""SEGA's attention scale (arXiv 2605.22668): m by axis and pair, from the spectrum of the latent.

The latent is seen as the transformer sees it: the mean over the channels of its embedded tokens. A
pair gets a small m where the axis has much energy, a large one where it has little. The
fast pairs look at high spatial frequencies, the slow ones at low ones, linearly in the index.
Formulas and constants are those of the authors' code for FLUX; tests/reference.py has them again.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

MIN_ENERGY = 1e-8
FLATNESS_POWER = 1.5


def latent_map(tokens: torch.Tensor, embed, grid: tuple[int, int], get_constant) -> torch.Tensor:
    """Return the mean of the embedded tokens over channels and samples, float32 [H, W].

    Up to a constant, which has no effect. The layer is called with unit vectors alone, where its
    weights are: they may be quantized, changed by a LoRA, or not yet on the accelerator.

    Args:
        tokens: [B, S, C], whose first H W are the image in row-major order.
        embed: the transformer's embedder of image tokens, affine: [..., C] -> [..., inner].
        grid: H and W.
        get_constant: as `DyPEEmbedder.get_constant`.
    """
    channels = tokens.shape[-1]
    devices = [weight.device for weight in embed.parameters() if weight.device.type != "meta"]
    like = {"dtype": tokens.dtype, "device": devices[0] if devices else tokens.device}
    make = partial(torch.eye, channels + 1, channels, **like)
    rows = embed(get_constant("units", channels, *like.values(), make=make))
    rows = rows.mean(-1, dtype=torch.float32).to(tokens.device)  # the last one is the bias
    image = tokens[:, : math.prod(grid)].mean(0, dtype=torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        return (image @ (rows[:-1] - rows[-1])).view(grid)


def attention_scales(
    latent: torch.Tensor, pairs: tuple[int, int], s_max: float, config, get_constant
) -> list[torch.Tensor]:
    """Return m by pair of rows and of columns: float64 [2, n], or two [1, n] for unequal n.

    m_i = max(m_ref (1 - sega_alpha spread v_i), sega_floor), m_ref = s_max^sega_reference. v_i is
    tanh(sega_beta z_i) less its mean, z_i the standardized log energy at the pair's place in the
    axis's spectrum, spread 1 - flatness^1.5 of the whole spectrum.

    Args:
        latent: `latent_map`.
        pairs: number of pairs n of both axes.
        s_max: the largest scale over the axes.
        config: settings of the encoding.
        get_constant: as `DyPEEmbedder.get_constant`, keeps what depends on the size alone.
    """
    grid, device = tuple(latent.shape), latent.device
    make = partial(spectrum_constants, grid, pairs, device)
    order, lengths, to_bins, to_pairs = get_constant("spectrum", grid, pairs, device, make=make)
    power = torch.fft.fft2(latent.to(torch.complex128)).abs().square()
    power[0, 0].zero_()  # that of the mean
    # `unsafe` leaves out a check of the lengths, for which the host would wait
    rings = torch.segment_reduce(power.flatten()[order], "mean", lengths=lengths, unsafe=True)
    profiles = torch.cat([power.sum(1)[: grid[0] // 2 + 1], power.sum(0)[: grid[1] // 2 + 1]])
    energy = torch.cat([rings, to_bins @ profiles]).clamp(min=MIN_ENERGY)
    log_energy = energy.log()
    count, reference = len(rings), s_max**config.sega_reference
    flatness = log_energy[:count].mean().exp() / energy[:count].mean()
    strength = reference * config.sega_alpha * (1 - flatness**FLATNESS_POWER)
    by_pair = to_pairs @ log_energy[count:]
    axes = [by_pair.view(2, -1)] if pairs[0] == pairs[1] else by_pair[None].split(pairs, 1)
    scales = []
    for x in axes:
        correction = min(1, x.shape[-1] - 1)  # of one pair the deviation is 0, not NaN
        deviation, mean = torch.std_mean(x, -1, correction=correction, keepdim=True)
        z = (x - mean) / deviation.clamp(min=MIN_ENERGY)
        v = torch.tanh(config.sega_beta * z)
        v = v - v.mean(-1, keepdim=True)
        scales.append((reference - strength * v).clamp(min=config.sega_floor))
    return scales


def spectrum_constants(grid: tuple[int, int], pairs: tuple[int, int], device) -> tuple:
    """Return `ring_order` and `axis_matrices`; the arguments are those of the latter."""
    return *ring_order(grid, device), *axis_matrices(grid, pairs, device)


def ring_order(grid: tuple[int, int], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the order of the entries of a 2-D FFT by ring, [H W], and the length of each ring.

    max(H, W) // 2 rings of equal width reach the farthest frequency.
    """
    height, width = grid
    count = max(max(grid) // 2, 1)
    rows = torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)
    columns = torch.fft.fftfreq(width, 1 / width, dtype=torch.float64)
    radius = torch.hypot(rows[:, None], columns).flatten()
    # on a square the diagonal is at the rings' limits: 1e-6 puts it within the inner one
    ring = (radius / (radius.max() + 1e-6) * count).long()
    lengths = torch.bincount(ring, minlength=count)
    return ring.argsort(stable=True).to(device), lengths.to(device)


def axis_matrices(grid: tuple[int, int], pairs: tuple[int, int], device) -> tuple:
    """Return the matrices from profiles of both axes to bins, and from bins to pairs, float64.

    A profile is the power of a 2-D FFT from frequency 0 to Nyquist, summed over the other axis.
    Bins hold the mean power of the rows' or columns' own FFTs (Parseval), from low to high. Linear
    interpolation gives the first pair the last bin, and the last pair the first bin.

    Args:
        grid: H and W.
        pairs: number of pairs n of both axes.
        device: of the matrices.
    """
    to_bins, to_pairs = [], []
    for length, summed_length, n in zip(grid, grid[::-1], pairs, strict=True):
        count, nyquist = max(length // 2, 8), length // 2
        place = torch.arange(nyquist + 1) * count // max(nyquist, 1)  # exact, so no bin is skipped
        bins = F.one_hot(place.clamp(max=count - 1), count).double().T
        to_bins.append(bins / bins.sum(1, keepdim=True).clamp(min=1) / summed_length**2)
        place = torch.linspace(count - 1, 0, n, dtype=torch.float64)
        gap = place[:, None] - torch.arange(count, dtype=torch.float64)
        to_pairs.append((1 - gap.abs()).clamp(min=0))
    return torch.block_diag(*to_bins).to(device), torch.block_diag(*to_pairs).to(device)
