"""The mathematics of DyPE (arXiv 2510.20766): rotary frequencies as functions of the noise level.

One axis of RoPE has D dimensions, n = D / 2 pairs and the frequencies theta_i = theta^(-2i/D),
i = 0..n-1 (radians per token). L is the trained and L' the wanted length in tokens,
s = max(1, L'/L) the scale, t = sigma in [0, 1] the noise level (1 is noise). Every method maps
(axis, kappa, u, config) to the frequencies f_i and the attention scale m, which multiplies cos
and sin. All of it is float64, without branches on values, so that a device never waits.
"""

import math
from typing import NamedTuple

import torch

from dype.config import DyPEConfig

# The authors' code, in turns over the trained length: (r_hi, r_lo) of YaRN's two ramps.
BETA = (1.25, 0.75)  # PI below, NTK above
GAMMA = (16.0, 2.0)  # interpolated below, untouched above
NTK_SCALE = 2.0  # lambda_s of the NTK term beside thresholds with lambda_s = 1 (Table 7)


class Axis(NamedTuple):
    """One axis, or several of equal D and theta in a batch [A]."""

    dim: int  # D
    base: float  # theta
    trained: float  # L, tokens
    s: torch.Tensor  # [A, 1], >= 1
    s_max: float  # the largest scale over the picture's axes

    @property
    def theta(self) -> torch.Tensor:
        """theta_i, float64 [n]."""
        return stock_frequencies(self.dim, self.base, self.s.device)

    @property
    def pairs(self) -> torch.Tensor:
        """i = 0..n-1, float64 [n]."""
        return torch.arange(self.dim // 2, dtype=torch.float64, device=self.s.device)


def stock_frequencies(dim: int, theta: float, device=None) -> torch.Tensor:
    """theta_i = theta^(-2i/D), float64 [n]; by diffusers' own operations, for equal bits."""
    steps = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    return 1.0 / (theta ** (steps / dim))


def schedule(sigma: torch.Tensor, config: DyPEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """kappa(t) = lambda_s u^lambda_t (Eq. 13) and u = t / t_start, at most 1; static: 1 and 1.

    The paper has t_start = 1 and prints kappa(0) = 1, a slip: it is 0.
    """
    if not config.dype:
        return torch.ones_like(sigma), torch.ones_like(sigma)
    u = torch.where(sigma > config.dype_start_sigma, 1.0, sigma / config.dype_start_sigma)
    return config.lambda_s * u**config.dype_exponent, u


def base(axis: Axis, kappa, u, config):
    """The model's own encoding: f = theta_i (Eq. 2), m = 1."""
    return axis.theta.expand(axis.s.shape[0], -1), torch.ones_like(axis.s)


def pi(axis: Axis, kappa, u, config):
    """Position interpolation: f = theta_i / s (Eq. 5), dynamic f = theta_i / s^kappa (Eq. 14)."""
    return axis.theta / axis.s**kappa, torch.ones_like(axis.s)


def ntk(axis: Axis, kappa, u, config):
    """NTK-aware: f = theta_i / s^(2i/(D-2)) (Eq. 6), dynamic: the exponent times kappa (Eq. 15)."""
    return axis.theta / axis.s ** (kappa * ntk_exponent(axis)), torch.ones_like(axis.s)


def ntk_mult(axis: Axis, kappa, u, config):
    """The other dynamic NTK of App. D: f = theta_i / (s kappa)^(2i/(D-2)) (Eq. 19).

    s kappa is at least 1 here; as printed it compresses below and divides by zero at t = 0.
    """
    return axis.theta / (axis.s * kappa).clamp(min=1) ** ntk_exponent(axis), torch.ones_like(axis.s)


def tasr(axis: Axis, kappa, u, config):
    """Time-aware scaled RoPE: f = max(theta_i s^(-2i/d), theta_i / s), d = (D - 1)(1 - u) + 1.

    PI at u = 1, but for the first pair, and NTK-aware (base theta s) at u = 0. The paper's baseline
    (Lumina-Next), second-hand: after a note whose formula had to be mended; Lumina ships another.
    """
    d = (axis.dim - 1) * (1 - u) + 1
    f = axis.theta * torch.maximum(axis.s ** (-2 * axis.pairs / d), 1 / axis.s)
    return f, torch.ones_like(axis.s)


def yarn(axis: Axis, kappa, u, config):
    """YaRN as the authors' code has it since February 2026: every threshold r becomes r kappa.

    Eq. 16, 17 in form. The paper prints one ramp (`yarn_paper`); the code has two, after FiT.
    """
    return two_ramps(axis, lambda r: r * kappa), yarn_scale(axis.s)


def yarn_ntk_only(axis: Axis, kappa, u, config):
    """`yarn` whose NTK term alone is dynamic, its exponent times kappa (Table 7)."""
    return two_ramps(axis, lambda r: r, kappa=kappa), yarn_scale(axis.s)


def yarn_both(axis: Axis, kappa, u, config):
    """`yarn` with both: thresholds r become r kappa, the NTK exponent times 2 kappa (Table 7).

    The paper has lambda_s = 1 for the thresholds and 2 for the NTK term.
    """
    ntk_kappa = NTK_SCALE * kappa if config.dype else kappa
    return two_ramps(axis, lambda r: r * kappa, kappa=ntk_kappa), yarn_scale(axis.s)


def yarn_power(axis: Axis, kappa, u, config):
    """YaRN as the authors' code had it before: every threshold r becomes r^kappa."""
    return two_ramps(axis, lambda r: r**kappa), yarn_scale(axis.s)


def yarn_paper(axis: Axis, kappa, u, config):
    """YaRN as printed: one ramp over r_i = L theta_i / 2 pi (Eq. 7, 8), dynamic by Eq. 16.

    gamma = clip((r - alpha kappa) / (beta kappa - alpha kappa), 0, 1), and 1 at kappa = 0.
    L is in tokens; the appendix prints "L = 1024" (pixels), with which no ramp would be left.
    """
    r = axis.trained * axis.theta / (2 * math.pi)
    gamma = ((r - config.alpha * kappa) / ((config.beta - config.alpha) * kappa)).clamp(0, 1)
    f = (1 - gamma) * axis.theta / axis.s + gamma * axis.theta
    return f, yarn_scale(axis.s)


def vision_yarn(axis: Axis, kappa, u, config):
    """`yarn_power` with NTK by the largest scale of all axes, and m that fades with the noise.

    m = 1 + 0.1 ln(s_max) u^lambda_t. From the ComfyUI port; not in the paper.
    """
    s_max = torch.full_like(axis.s, axis.s_max)
    f = two_ramps(axis, lambda r: r**kappa, s_max)
    return f, 1 + 0.1 * torch.log(s_max) * u**config.dype_exponent


METHODS = {
    "base": base,
    "pi": pi,
    "ntk": ntk,
    "ntk_mult": ntk_mult,
    "tasr": tasr,
    "yarn": yarn,
    "yarn_ntk_only": yarn_ntk_only,
    "yarn_both": yarn_both,
    "yarn_power": yarn_power,
    "yarn_paper": yarn_paper,
    "vision_yarn": vision_yarn,
}


def yarn_scale(s: torch.Tensor) -> torch.Tensor:
    """m = tau(s) = 0.1 ln s + 1 (Eq. 9). On cos and sin, as in the code: logits get m^2."""
    return 0.1 * torch.log(s) + 1


def ntk_exponent(axis: Axis) -> torch.Tensor:
    """2i / (D - 2), float64 [n]: 0 at the first pair, 1 at the last."""
    return 2 * axis.pairs / (axis.dim - 2)


def two_ramps(axis: Axis, at, s_ntk: torch.Tensor | None = None, kappa=1.0) -> torch.Tensor:
    """PI -> NTK over the band BETA, then -> theta_i over the band GAMMA; `at(r)` moves thresholds.

    f = theta/s (1 - mask_beta) + theta/s_ntk^(kappa 2i/(D-2)) mask_beta      s_ntk: s by default
    f = f (1 - mask_gamma) + theta mask_gamma
    """
    theta, (mask_beta, mask_gamma) = axis.theta, ramps(axis, at)
    s_ntk = axis.s if s_ntk is None else s_ntk
    f = torch.lerp(theta / axis.s, theta / s_ntk ** (kappa * ntk_exponent(axis)), mask_beta)
    return torch.lerp(f, theta.expand_as(f), mask_gamma)


def ramps(axis: Axis, at) -> torch.Tensor:
    """mask_i = 1 - clip((i - low) / (high - low), 0, 1) of both bands, float64 [2, n].

    The edges are floor(c(r_hi)) and ceil(c(r_lo)), both clamped to [0, n]. The authors' code clamps
    each at one end only, so that at small t its ramp turns round and everything becomes PI.
    """
    n = axis.dim // 2
    edges = pair_at(axis, at(filled(BETA + GAMMA, axis.s.device).view(2, 2)))
    low, high = edges[:, :1].floor().clamp(0, n), edges[:, 1:].ceil().clamp(0, n)
    high = torch.where(low == high, high + 0.001, high)
    return 1 - ((axis.pairs - low) / (high - low)).clamp(0, 1)


def pair_at(axis: Axis, r: torch.Tensor) -> torch.Tensor:
    """c(r) = D ln(L / (2 pi r)) / (2 ln theta): the pair that makes r turns over L tokens."""
    return axis.dim * torch.log(axis.trained / (2 * math.pi * r)) / (2 * math.log(axis.base))


def scale(trained_tokens: float, tokens: float) -> float:
    """s = max(1, L'/L) (Eq. 3)."""
    return max(1.0, tokens / trained_tokens)


def filled(values, device) -> torch.Tensor:
    """float64 [len(values)], written on the device: a copy from the host would wait for it."""
    return torch.cat([torch.full((1,), x, dtype=torch.float64, device=device) for x in values])


def frequencies(dim, theta, trained_tokens, tokens, sigma, config, max_scale=None):
    """`axis_frequencies` of several axes of equal `dim` and `theta` in one batch.

    tokens: [A] ints, sigma: a 0-dim float64 tensor. Returns float64 [A, dim // 2] and [A].
    """
    scales = [scale(trained_tokens, count) for count in tokens]
    s_max = max(scales) if max_scale is None else max_scale
    if not config.anisotropic:
        scales = [s_max] * len(scales)
    axis = Axis(dim, theta, trained_tokens, filled(scales, sigma.device)[:, None], s_max)
    method = METHODS[config.method if s_max > 1 else "base"]
    inv_freq, m = method(axis, *schedule(sigma, config), config)
    return inv_freq, m[:, 0]


def axis_frequencies(
    dim: int,
    theta: float,
    trained_tokens: float,
    tokens: float,
    sigma: float | torch.Tensor,
    config: DyPEConfig,
    max_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies and attention scale of one axis at noise level sigma.

    dim: D, even; theta: the RoPE base; trained_tokens: L; tokens: L'; sigma: t in [0, 1], a float
    or a 0-dim tensor; max_scale: the largest s over the picture's axes (default: this axis's own).
    Returns inv_freq, float64 [dim // 2] in radians per token, and m, a 0-dim float64 tensor.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    inv_freq, m = frequencies(dim, theta, trained_tokens, [tokens], sigma, config, max_scale)
    return inv_freq[0], m[0]
