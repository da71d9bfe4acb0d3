"""The mathematics of DyPE (arXiv 2510.20766): rotary frequencies as functions of sigma.

One axis of RoPE has D dimensions, n = D / 2 pairs and the frequencies theta_i = theta^(-2i/D),
i = 0..n-1 (radians per token). L is the trained and L' the wanted length in tokens,
s = max(1, L'/L) the scale, t = sigma in [0, 1] (1 is noise).

Every method maps (axis, kappa, u, config) to the frequencies f_i, float64 [A, n], and the attention
scale m, [A, 1], which multiplies cos and sin. `kappa_schedule` gives kappa and u. Nothing branches
on the value of a tensor, so that a device never waits for the host. Tensors that do not depend on
sigma are kept on the axis, so that a denoiser call launches few kernels.
"""

import math
from typing import NamedTuple

import torch

from dype.config import DyPEConfig

# (r_hi, r_lo) of YaRN's two ramps, in turns over the trained length (from the authors' code)
BETA = (1.25, 0.75)  # PI below, NTK above
GAMMA = (16.0, 2.0)  # interpolated below, untouched above
NTK_SCALE = 2.0  # lambda_s of the NTK term where the thresholds have lambda_s = 1 (Table 7)


class RopeAxis(NamedTuple):
    """A batch of axes of equal D and theta, with the tensors that follow from their scales.

    A is the number of axes. All tensors are float64 on one device; `build_axes` makes them.
    """

    dim: int  # D
    theta: float
    trained_tokens: float  # L
    s_max: float | torch.Tensor  # the largest scale over the axes of the image
    inv_freq: torch.Tensor  # theta_i [n]
    pair_index: torch.Tensor  # i = 0..n-1 [n]
    s: torch.Tensor  # [A, 1], >= 1
    ntk_exponent: torch.Tensor  # 2i / (D - 2): 0 at the first pair, 1 at the last or only one [n]
    pi_static: torch.Tensor  # theta_i / s (Eq. 5) [A, n]
    ntk_static: torch.Tensor  # theta_i / s^(2i/(D-2)) (Eq. 6) [A, n]
    ntk_static_max: torch.Tensor  # theta_i / s_max^(2i/(D-2)) [A, n]
    unit_m: torch.Tensor  # m = 1 [A, 1]
    log_s: torch.Tensor  # [A, 1]
    log_s_max: torch.Tensor  # [A, 1]
    cutoff_offset: torch.Tensor  # ln(lambda_i / c L) / delta + 1/2, lambda_i = 2 pi / theta_i [n]
    constants: tuple  # tensors of the method, by CONSTANTS
    tide_exponent: torch.Tensor  # a_i of `tide_scale` [n]
    tide_drop: torch.Tensor  # 1 - tau^-2 [A, 1]
    tau: torch.Tensor  # 0.1 ln s + 1 (Eq. 9) [A, 1]; on cos and sin, so that logits get tau^2
    ramp_turns: torch.Tensor  # (r_hi, r_lo) of YaRN's two bands [2, 2]

    @property
    def ntk_power(self) -> float:
        """D / (D - 2), the exponent of s in NTK's new base."""
        return self.dim / max(self.dim - 2, 1)


def stock_frequencies(dim: int, theta: float, device=None) -> torch.Tensor:
    """Return theta_i = theta^(-2i/D), float64 [n], by diffusers' operations for equal bits."""
    steps = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    return 1.0 / (theta ** (steps / dim))


def kappa_schedule(sigma: torch.Tensor, config: DyPEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return kappa(t) = lambda_s u^lambda_t (Eq. 13) and u = t / t_start in [0, 1].

    A static method has kappa = u = 1. The paper has t_start = 1; it prints kappa(0) = 1, but by its
    own equation kappa(0) is 0. Rounding may put sigma a little outside [0, 1]; u stays inside.
    """
    if not config.dype:
        ones = torch.ones_like(sigma)
        return ones, ones
    start = config.dype_start_sigma
    u = (sigma / start if start < 1 else sigma).clamp(0, 1)
    return config.lambda_s * u**config.dype_exponent, u


def base(axis: RopeAxis, kappa, u, config):
    """Keep the model's own encoding: f = theta_i (Eq. 2), m = 1."""
    return axis.inv_freq.expand(axis.s.shape[0], -1), axis.unit_m


def pi(axis: RopeAxis, kappa, u, config):
    """Interpolate positions: f = theta_i / s (Eq. 5), with DyPE theta_i / s^kappa (Eq. 14)."""
    return axis.inv_freq / axis.s**kappa, axis.unit_m


def ntk(axis: RopeAxis, kappa, u, config):
    """Scale by NTK: f = theta_i / s^(2i/(D-2)) (Eq. 6), with DyPE s^(kappa 2i/(D-2)) (Eq. 15)."""
    return axis.inv_freq / axis.s ** (kappa * axis.ntk_exponent), axis.unit_m


def ntk_mult(axis: RopeAxis, kappa, u, config):
    """Scale by NTK with kappa on s: f = theta_i / (s kappa)^(2i/(D-2)) (Eq. 19, App. D).

    Here s kappa is at least 1. The printed formula compresses below, and divides by 0 at t = 0.
    """
    return axis.inv_freq / (axis.s * kappa).clamp(min=1) ** axis.ntk_exponent, axis.unit_m


def tasr(axis: RopeAxis, kappa, u, config):
    """Scale by TASR: f = max(theta_i s^(-2i/d), theta_i / s), d = (D - 1)(1 - u) + 1.

    Time-aware scaled RoPE, a baseline of the paper (Lumina-Next). It is PI at u = 1 except for the
    first pair, and NTK with the base theta s at u = 0. We repaired a formula that a third party
    reports; Lumina's own code has another one.
    """
    d = (axis.dim - 1) * (1 - u) + 1
    f = axis.inv_freq * torch.maximum(axis.s ** (-2 * axis.pair_index / d), 1 / axis.s)
    return f, axis.unit_m


def yarn(axis: RopeAxis, kappa, u, config):
    """Blend by the authors' YaRN since February 2026: every threshold r becomes r kappa.

    It has the form of Eq. 16, 17. The paper prints one ramp (`yarn_paper`); the code has two, as
    FiT has.
    """
    return blend_two_ramps(axis, lambda r: r * kappa), axis.tau


def yarn_ntk_only(axis: RopeAxis, kappa, u, config):
    """Blend by `yarn` with a dynamic NTK term alone: its exponent times kappa (Table 7)."""
    return blend_two_ramps(axis, lambda r: r, ntk(axis, kappa, u, config)[0]), axis.tau


def yarn_both(axis: RopeAxis, kappa, u, config):
    """Blend by `yarn` with both: thresholds r kappa, NTK exponent times 2 kappa (Table 7).

    The paper has lambda_s = 1 for the thresholds and 2 for the NTK term.
    """
    ntk_term, _ = ntk(axis, NTK_SCALE * kappa if config.dype else kappa, u, config)
    return blend_two_ramps(axis, lambda r: r * kappa, ntk_term), axis.tau


def yarn_power(axis: RopeAxis, kappa, u, config):
    """Blend by the authors' YaRN before February 2026: every threshold r becomes r^kappa."""
    return blend_two_ramps(axis, lambda r: r**kappa), axis.tau


def yarn_paper(axis: RopeAxis, kappa, u, config):
    """Blend by YaRN as printed: one ramp over r_i = L theta_i / 2 pi (Eq. 7, 8), dynamic by Eq. 16.

    gamma = clip((r - alpha kappa) / (beta kappa - alpha kappa), 0, 1), and 1 at kappa = 0.
    L is in tokens. The appendix prints "L = 1024" (pixels), which leaves no ramp.
    """
    r = axis.trained_tokens * axis.inv_freq / (2 * math.pi)
    gamma = ((r - config.alpha * kappa) / ((config.beta - config.alpha) * kappa)).clamp(0, 1)
    f = (1 - gamma) * axis.pi_static + gamma * axis.inv_freq
    return f, axis.tau


def vision_yarn(axis: RopeAxis, kappa, u, config):
    """Blend by `yarn_power` with NTK by s_max, and m = 1 + 0.1 ln(s_max) u^lambda_t.

    It comes from the ComfyUI port, not from the paper. There t_start moves m alone; here kappa too.
    """
    f = blend_two_ramps(axis, lambda r: r**kappa, axis.ntk_static_max)
    return f, 1 + 0.1 * axis.log_s_max * u**config.dype_exponent


def tide(axis: RopeAxis, kappa, u, config):
    """Blend by TIDE's YaRN: PI -> theta_i between alpha^kappa and beta^kappa turns, linear in i.

    TIDE (arXiv 2603.08928) is dynamic with kappa = 2 t^2. Its m is `tide_scale`.
    """
    (turns,) = axis.constants
    f = torch.lerp(axis.inv_freq.expand_as(axis.pi_static), axis.pi_static,
                   ramp_weights(axis, turns**kappa))  # fmt: skip
    return f, tide_scale(axis, u)


def sega(axis: RopeAxis, kappa, u, config):
    """Scale by SEGA's NTK: f = theta_i / k^(kappa 2i/D), k = s^(2D/(D-2)) / (1 + 0.1 ln s).

    s is the largest over the axes. SEGA (arXiv 2605.22668, its code for FLUX) is static; the
    dynamic form is ours. Here m is its reference s^sega_reference; `dype.sega` makes it follow the
    spectrum of the latent.
    """
    ratio, reference = axis.constants
    return axis.inv_freq * ratio**kappa, reference


def imax(axis: RopeAxis, kappa, u, config):
    """Scale by NTK with a constant, bounded by PI: f = theta_i max(k^(-2i/D), 1/s)^kappa.

    I-Max (arXiv 2410.07536) is static, with k = `ntk_factor` = 10 and `proportional` attention. The
    dynamic form is ours.
    """
    (ratio,) = axis.constants
    return axis.inv_freq * ratio**kappa, axis.unit_m


def rdfc(axis: RopeAxis, kappa, u, config):
    """Correct the dominant frequency: f_k = 2 pi / L', others stock.

    k is the pair whose wavelength is nearest to L, or those of `rdfc_pairs`. UltraImage (arXiv
    2512.04504, Eq. 8) is static, with `proportional` attention. Dynamic, ours: f_k / theta_k to the
    power of min(1, kappa).
    """
    (ratio,) = axis.constants
    return axis.inv_freq * ratio ** kappa.clamp(max=1), axis.unit_m


def riflex(axis: RopeAxis, kappa, u, config):
    """Slow the dominant pair to less than a turn: as `rdfc`, with 0.9 * 2 pi / L'.

    RIFLEx (arXiv 2502.15894), made for the time axis of videos.
    """
    return rdfc(axis, kappa, u, config)


def resonance(axis: RopeAxis, kappa, u, config):
    """Round the turns over L to whole numbers, then blend by `yarn`.

    UltraFlux (arXiv 2511.18050) is static, for a model trained so. Dynamic, ours: thresholds
    r kappa, and the rounded theta_i / theta_i to the power of min(1, kappa).
    """
    ratio, ntk_exponent = axis.constants
    f = axis.inv_freq * ratio ** kappa.clamp(max=1)
    rounded = axis._replace(inv_freq=f, pi_static=f / axis.s, ntk_static=f**ntk_exponent)
    return blend_two_ramps(rounded, lambda r: r * kappa), axis.tau


def cutoff(axis: RopeAxis, kappa, u, config):
    """Interpolate wavelengths above a cut Lambda, which rises as sigma falls; keep the others.

    f = theta_i / s^w_i, w_i = clip(ln(lambda_i / Lambda) / delta + 1/2, 0, 1); m as YaRN's.
    Lambda = c L ((1 - u) / u)^(2/omega): 0 at u = 1, infinite at u = 0, proportional to the f*(t)
    of Eq. 11 at which image and noise have equal power. Static: as at u = 1/2. Ours, not the
    paper's; docs/method.md has the derivation.
    """
    u = u if config.dype else torch.full_like(u, 0.5)
    slope = 2 / config.spectrum_exponent / config.cutoff_width
    w = axis.cutoff_offset + slope * torch.logit(u)
    return axis.inv_freq / axis.s ** w.clamp(0, 1), axis.tau


METHODS = {method.__name__: method for method in (
    base, pi, ntk, ntk_mult, tasr, yarn, yarn_ntk_only, yarn_both, yarn_power, yarn_paper,
    vision_yarn, tide, sega, imax, rdfc, riflex, resonance, cutoff,
)}  # fmt: skip


def blend_two_ramps(
    axis: RopeAxis, scale_turns, ntk_term: torch.Tensor | None = None
) -> torch.Tensor:
    """Blend PI -> NTK over the band BETA, then -> theta_i over the band GAMMA.

    f = theta/s (1 - mask_beta) + ntk mask_beta
    f = f (1 - mask_gamma) + theta mask_gamma

    Args:
        axis: the axes.
        scale_turns: maps the thresholds r [2, 2] to those of this sigma.
        ntk_term: the NTK term [A, n]; None: theta/s^(2i/(D-2)).
    """
    beta, gamma = ramp_weights(axis, scale_turns(axis.ramp_turns))  # 1 - mask
    f = torch.lerp(axis.ntk_static if ntk_term is None else ntk_term, axis.pi_static, beta)
    return torch.lerp(axis.inv_freq.expand_as(f), f, gamma)


def ramp_weights(axis: RopeAxis, turns: torch.Tensor) -> torch.Tensor:
    """Return 1 - mask_i = clip((i - low) / (high - low), 0, 1) of every band, float64 [bands, n].

    The edges are floor(c(r_hi)) and ceil(c(r_lo)), both clamped to [0, n]. The authors' code clamps
    each at one end only. At small t their ramps turn round (FLUX: BETA's at t <= 0.0242, GAMMA's
    at 0.0068, below which every pair is PI); ours do not. docs/method.md has the other models.

    turns: thresholds (r_hi, r_lo) of each band, [bands, 2].
    """
    edges = pair_index_of_turns(axis, turns).clamp(0, axis.dim // 2)
    low, high = edges[:, :1].floor(), edges[:, 1:].ceil()
    width = (high - low).clamp(min=0.001)  # takes effect where they are equal
    return ((axis.pair_index - low) / width).clamp(0, 1)


def pair_index_of_turns(axis: RopeAxis, r: torch.Tensor) -> torch.Tensor:
    """Return c(r) = D ln(L / (2 pi r)) / (2 ln theta), the pair that makes r turns over L."""
    pairs_per_e = axis.dim / (2 * math.log(axis.theta))
    return pairs_per_e * torch.log(axis.trained_tokens / (2 * math.pi) / r)


def dominant_pairs(axis: RopeAxis, config: DyPEConfig) -> list[int]:
    """Return the pairs of `rdfc_pairs`, else the one whose wavelength is nearest to L."""
    if config.rdfc_pairs is not None:
        return [int(text) for text in config.rdfc_pairs.split(",")]
    wavelengths = [2 * math.pi * axis.theta ** (2 * i / axis.dim) for i in range(axis.dim // 2)]
    gaps = [abs(wavelength - axis.trained_tokens) for wavelength in wavelengths]
    return sorted(range(len(gaps)), key=gaps.__getitem__)[:1]


def tide_constants(axis: RopeAxis, config: DyPEConfig) -> tuple:
    """Return beta and alpha, [1, 2]."""
    return (tensor_on_device((config.beta, config.alpha), axis.s.device)[None],)


def sega_constants(axis: RopeAxis, config: DyPEConfig) -> tuple:
    """Return k^(-2i/D), [A, n], and m_ref, [A, 1]."""
    log_k = 2 * axis.ntk_power * axis.log_s_max - torch.log1p(0.1 * axis.log_s_max)
    ratio = torch.exp(-log_k * 2 * axis.pair_index / axis.dim)
    return ratio, sega_reference(axis, config)


def imax_constants(axis: RopeAxis, config: DyPEConfig) -> tuple:
    """Return max(k^(-2i/D), 1/s), [A, n]."""
    ratio = config.ntk_factor ** (-2 * axis.pair_index / axis.dim)
    return (torch.maximum(ratio, 1 / axis.s),)


def rdfc_constants(axis: RopeAxis, config: DyPEConfig) -> tuple:
    """Return f_k / theta_k at the dominant pairs of stretched axes, else 1, [A, n].

    A pair that is slower already has 1 too.
    """
    turns = 0.9 if config.method == "riflex" else config.rdfc_turns
    ratio = 2 * math.pi * turns / axis.trained_tokens / axis.inv_freq / axis.s
    is_dominant = torch.zeros_like(axis.inv_freq, dtype=torch.bool)
    for pair in dominant_pairs(axis, config):
        is_dominant |= axis.pair_index == pair
    return (torch.where(is_dominant & (axis.s > 1), ratio.clamp(max=1), 1.0),)


def resonance_constants(axis: RopeAxis, config: DyPEConfig) -> tuple:
    """Return rounded theta_i / theta_i, [n], and the exponent of theta_i in NTK, [A, 1]."""
    r = axis.trained_tokens * axis.inv_freq / (2 * math.pi)
    ratio = torch.where(r >= 1, r.round() / r, torch.ones_like(r))
    return ratio, 1 + axis.ntk_power / math.log(axis.theta) * axis.log_s


CONSTANTS = {"tide": tide_constants, "sega": sega_constants, "imax": imax_constants,
             "rdfc": rdfc_constants, "riflex": rdfc_constants,
             "resonance": resonance_constants}  # fmt: skip


def sega_reference(axis: RopeAxis, config: DyPEConfig) -> torch.Tensor:
    """Return SEGA's m_ref = s^sega_reference, s the largest over the axes, [A, 1]."""
    return torch.exp(config.sega_reference * axis.log_s_max)


def tide_scale(axis: RopeAxis, u: torch.Tensor) -> torch.Tensor:
    """Return m_i = T_i^(-1/2), T_i = 1 - (1 - tau^-2) u^a_i, a_i = 0.6 - 0.4 theta_i; [A, n].

    The temperature of TIDE (arXiv 2603.08928): YaRN's m at u = 1, none at u = 0.
    """
    return torch.rsqrt(1 - axis.tide_drop * u**axis.tide_exponent)


def scale(trained_tokens: float, tokens: float | torch.Tensor) -> float | torch.Tensor:
    """Return s = max(1, L'/L) (Eq. 3)."""
    s = tokens / trained_tokens
    return s.clamp(min=1) if isinstance(s, torch.Tensor) else max(1.0, s)


def max_scale(trained_tokens: float, tokens) -> float | torch.Tensor:
    """Return the largest s over axes of L' `tokens`: numbers, or a tensor [A]."""
    s = [scale(trained_tokens, count) for count in tokens]
    return torch.stack(s).amax() if isinstance(tokens, torch.Tensor) else max(s)


def tensor_on_device(values, device) -> torch.Tensor:
    """Return float64 [len(values)], written on the device; a copy from the host would wait."""
    return torch.cat([torch.full((1,), x, dtype=torch.float64, device=device) for x in values])


def build_axes(
    dim: int, theta: float, trained_tokens: float, tokens, device, config, s_max=None
) -> RopeAxis:
    """Return a batch of axes of equal D and theta, for one image.

    Args:
        dim: D, even.
        theta: base of RoPE.
        trained_tokens: L.
        tokens: L' of each axis [A]: numbers, or a tensor while `torch.export` traces.
        device: of the tensors.
        config: settings of the encoding.
        s_max: largest s over the axes of the image; None: over these.
    """
    s_max = max_scale(trained_tokens, tokens) if s_max is None else s_max
    scales = [scale(trained_tokens, count) if config.anisotropic else s_max for count in tokens]
    is_traced = isinstance(tokens, torch.Tensor)
    s = (torch.stack(scales).to(device) if is_traced else tensor_on_device(scales, device))[:, None]
    inv_freq = stock_frequencies(dim, theta, device)
    pair_index = torch.arange(dim // 2, dtype=torch.float64, device=device)
    ntk_exponent = 2 * pair_index / (dim - 2) if dim != 2 else torch.ones_like(pair_index)
    largest_s = s_max * torch.ones_like(s)
    wavelength = 2 * math.pi / config.cutoff / trained_tokens / inv_freq  # in units of c L
    tau = 0.1 * torch.log(s) + 1
    axis = RopeAxis(
        dim=dim,
        theta=theta,
        trained_tokens=trained_tokens,
        s_max=s_max,
        inv_freq=inv_freq,
        pair_index=pair_index,
        s=s,
        ntk_exponent=ntk_exponent,
        pi_static=inv_freq / s,
        ntk_static=inv_freq / s**ntk_exponent,
        ntk_static_max=inv_freq / largest_s**ntk_exponent,
        unit_m=torch.ones_like(s),
        log_s=torch.log(s),
        log_s_max=torch.log(largest_s),
        cutoff_offset=torch.log(wavelength) / config.cutoff_width + 0.5,
        constants=(),
        tide_exponent=0.6 - 0.4 * inv_freq,
        tide_drop=1 - tau**-2,
        tau=tau,
        ramp_turns=tensor_on_device(BETA + GAMMA, device).view(2, 2),
    )
    make = CONSTANTS.get(config.method)
    return axis._replace(constants=make(axis, config)) if make else axis


def batched_frequencies(
    axis: RopeAxis, sigma: torch.Tensor, config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the config's method: frequencies f of several axes and their attention scale m.

    Args:
        axis: the axes.
        sigma: 0-dim float64 tensor on their device.
        config: settings of the encoding.

    Returns:
        f, float64 [A, dim // 2]; m, [A, 1], or of f's shape where the pairs differ.
    """
    is_traced = isinstance(axis.s_max, torch.Tensor)
    name = config.method if is_traced or axis.s_max > 1 else "base"
    kappa, u = kappa_schedule(sigma, config)
    f, m = METHODS[name](axis, kappa, u, config)
    if name != "base":
        m = attention_scale(axis, m, u, config)
    if is_traced:
        f = torch.where(axis.s_max > 1, f, axis.inv_freq)
        m = torch.where(axis.s_max > 1, m, axis.unit_m)
    return f, m


def attention_scale(axis: RopeAxis, m: torch.Tensor, u: torch.Tensor, config) -> torch.Tensor:
    """Return the attention scale by `attention_path`, [A, 1] or [A, n].

    "proportional" is one number for the whole image (`proportional_scale`) and "sega" needs its
    latent (`dype.sega`). Here they are 1 and SEGA's reference; embedders do the rest.

    Args:
        axis: the axes.
        m: attention scale of the method.
        u: of `kappa_schedule`.
        config: settings of the encoding.
    """
    path, a = config.attention_path, config.attention_scale
    if path == "proportional":
        return axis.unit_m
    if path == "tide":
        return tide_scale(axis, u)
    if path == "sega":
        return sega_reference(axis, config)
    if a is None:
        return m
    if config.dype and path != "constant":
        a = a * (u if path == "falling" else 1 - u)
    return 1 + a * axis.log_s


def proportional_scale(tokens, trained_tokens: float) -> float | torch.Tensor:
    """Return m = (ln N / ln N0)^(1/4) on cos and sin of all axes, so sqrt(ln N / ln N0) on logits.

    Jin et al. 2023 (arXiv 2306.08645), as in I-Max and HRDiT.

    Args:
        tokens: N, of text and image together; a tensor while `torch.export` traces.
        trained_tokens: N0, the same at the trained size; at least 2.
    """
    log = torch.log if isinstance(tokens, torch.Tensor) else math.log
    return (log(tokens) / math.log(max(trained_tokens, 2))) ** 0.25


def axis_frequencies(
    dim: int,
    theta: float,
    trained_tokens: float,
    tokens: float,
    sigma: float | torch.Tensor,
    config: DyPEConfig,
    max_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the frequencies and the attention scale of one axis at one sigma.

    Args:
        dim: D, even.
        theta: base of RoPE.
        trained_tokens: L.
        tokens: L'.
        sigma: t in [0, 1], a float or a 0-dim tensor.
        config: settings of the encoding.
        max_scale: largest s over the axes of the image; None: that of this axis.

    Returns:
        f, float64 [dim // 2] in radians per token; and m, a 0-dim float64 tensor, or [dim // 2]
        where the pairs differ.
    """
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    axis = build_axes(dim, theta, trained_tokens, [tokens], sigma.device, config, max_scale)
    f, m = batched_frequencies(axis, sigma, config)
    return f[0], m[0].squeeze()
