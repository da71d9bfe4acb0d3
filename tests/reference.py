"""Independent transcription of every method: Python floats, pair by pair, from the formulas.

This module shares no code with `dype.rope`. At a threshold of 0 it states the limit explicitly.
"""

import math

import numpy as np


def kappa_and_power_of_u(t, lambda_s, lambda_t, t_start, dynamic):
    """Return kappa(t) = lambda_s u^lambda_t and u^lambda_t; a static method has 1 and 1."""
    if not dynamic:
        return 1.0, 1.0
    u = 1.0 if t > t_start else t / t_start
    return lambda_s * u**lambda_t, u**lambda_t


def ntk_exponent(dim, i):
    """Return 2i / (D - 2); 1 for the only pair of D = 2, as for the last pair of any D."""
    return 1.0 if dim == 2 else 2 * i / (dim - 2)


def mask(dim, theta, trained_tokens, r_hi, r_lo):
    """Return the n ramp weights of the authors' code: 1 above r_hi turns, 0 below r_lo."""
    n = dim // 2

    def pair_index_of_turns(r):
        if r == 0:
            return math.inf
        return dim * math.log(trained_tokens / (2 * math.pi * r)) / (2 * math.log(theta))

    def clamp_and_round(value, rounding):
        return n if value > n else 0 if value < 0 else rounding(value)

    low = clamp_and_round(pair_index_of_turns(r_hi), math.floor)
    high = min(clamp_and_round(pair_index_of_turns(r_lo), math.ceil), n)
    if low == high:
        high += 0.001
    return [1 - min(max((i - low) / (high - low), 0), 1) for i in range(n)]


def blend_two_ramps(dim, theta, trained_tokens, s_pi, s_ntk, scale_turns, ntk_kappa=1.0):
    """Return frequencies that go from PI over NTK to stock, as in the authors' YaRN."""
    beta = mask(dim, theta, trained_tokens, scale_turns(1.25), scale_turns(0.75))
    gamma = mask(dim, theta, trained_tokens, scale_turns(16.0), scale_turns(2.0))
    out = []
    for i in range(dim // 2):
        theta_i = theta ** (-2 * i / dim)
        ntk = theta_i / s_ntk ** (ntk_kappa * ntk_exponent(dim, i))
        f = theta_i / s_pi * (1 - beta[i]) + ntk * beta[i]
        out.append(f * (1 - gamma[i]) + theta_i * gamma[i])
    return out


def blend_one_ramp(dim, theta, trained_tokens, s, alpha, beta):
    """Return frequencies that go from PI to stock between alpha and beta turns (Eq. 7, 8)."""
    out = []
    for i in range(dim // 2):
        theta_i = theta ** (-2 * i / dim)
        r = trained_tokens * theta_i / (2 * math.pi)
        gamma = 1.0 if beta == 0 else min(max((r - alpha) / (beta - alpha), 0), 1)
        out.append((1 - gamma) * theta_i / s + gamma * theta_i)
    return out


def cutoff_frequencies(dim, theta, s, wavelength, width):
    """Return theta_i / s far above the cutoff wavelength, theta_i far below, a ramp between."""
    out = []
    for i in range(dim // 2):
        theta_i = theta ** (-2 * i / dim)
        if wavelength == 0:
            w = 1.0
        elif wavelength == math.inf:
            w = 0.0
        else:
            w = min(max(math.log(2 * math.pi / theta_i / wavelength) / width + 0.5, 0), 1)
        out.append(theta_i / s**w)
    return out


def tide_scale(inv_freq, s, u):
    """Return TIDE's m of each pair: T^(-1/2), T = 1 - (1 - T_low) u^a, T_low = tau^-2."""
    low, out = 1 / (1 + 0.1 * math.log(s)) ** 2, []
    for f in inv_freq:
        power = u ** (0.6 + (0.2 - 0.6) * f)
        out.append((1 - (1 - low) * power) ** -0.5)
    return out


def resonance_frequencies(dim, theta, trained_tokens, s, kappa):
    """Return YaRN in two ramps over frequencies with whole numbers of turns."""
    beta = mask(dim, theta, trained_tokens, 1.25 * kappa, 0.75 * kappa)
    gamma = mask(dim, theta, trained_tokens, 16.0 * kappa, 2.0 * kappa)
    new_base, out = theta * s ** (dim / max(dim - 2, 1)), []
    for i in range(dim // 2):
        theta_i = theta ** (-2 * i / dim)
        turns = trained_tokens * theta_i / (2 * math.pi)
        if turns >= 1:
            whole = 2 * math.pi * max(round(turns), 1) / trained_tokens
            theta_i *= (whole / theta_i) ** min(1.0, kappa)
        ntk = new_base ** (math.log(theta_i) / math.log(theta))
        f = theta_i / s * (1 - beta[i]) + ntk * beta[i]
        out.append(f * (1 - gamma[i]) + theta_i * gamma[i])
    return out


def sega_scales(latent, axis, n, s_max):
    """Return SEGA's m of the n pairs of one axis (0: rows, 1: columns) of a latent [H, W], numpy.

    Its steps are those of the authors' code, with their constants.
    """
    latent = np.asarray(latent, dtype=float) - np.mean(latent)
    height, width = latent.shape
    length, bins = latent.shape[axis], max(latent.shape[axis] // 2, 8)
    power = (np.abs(np.fft.fft(latent, axis=axis)) ** 2).mean(1 - axis)[: length // 2 + 1]
    energy = []
    for b in range(bins):
        numbers = [min(k * bins // (length // 2), bins - 1) for k in range(length // 2 + 1)]
        inside = [p for p, number in zip(power, numbers, strict=True) if number == b]
        energy.append(max(sum(inside) / max(len(inside), 1), 1e-8))
    places = [(1 - i / (n - 1)) * (bins - 1) for i in range(n)]
    raw = np.interp(places, range(bins), np.log(energy))
    z = (raw - raw.mean()) / raw.std(ddof=1)
    u = np.tanh(1.5 * z) - np.tanh(1.5 * z).mean()
    spectrum = np.abs(np.fft.fftshift(np.fft.fft2(latent))) ** 2
    rings = [[] for _ in range(max(height, width) // 2)]
    radii = [[math.hypot(y - height // 2, x - width // 2) for x in range(width)]
             for y in range(height)]  # fmt: skip
    largest = max(map(max, radii))
    for y in range(height):
        for x in range(width):
            ring = int(radii[y][x] / (largest + 1e-6) * len(rings))
            rings[ring].append(spectrum[y, x])
    means = [max(np.mean(ring), 1e-8) for ring in rings]
    flatness = min(math.exp(np.log(means).mean()) / np.mean(means), 1.0)
    reference = s_max**0.08
    return np.maximum(reference * (1 - 0.15 * (1 - flatness**1.5) * u), 1.0)


def frequencies(method, dim, theta, trained_tokens, tokens, t, s_max=None, *, attention_scale=None,
                attention_path="constant", t_start=1.0, dynamic=True, **settings):  # fmt: skip
    """Return f and m of one axis; `method_frequencies` below has the branches of the methods.

    This function adds `attention_scale`, which is the same for every method.

    Args:
        method: a name in `dype.rope.METHODS`.
        dim: dimensions of the axis, D = 2 n.
        theta: base of RoPE.
        trained_tokens: L.
        tokens: L'.
        t: sigma, in [0, 1].
        s_max: largest scale over the image's axes. Default: the scale of this axis.
        attention_scale: a of m = 1 + a ln s. Default: the method's own m.
        attention_path: constant, falling or rising.
        t_start: sigma above which u = 1.
        dynamic: False for the static method.
        settings: further arguments of `method_frequencies`.
    """
    result, m = method_frequencies(
        method, dim, theta, trained_tokens, tokens, t, s_max,
        t_start=t_start, dynamic=dynamic, **settings,
    )  # fmt: skip
    is_stretched = method != "base" and max(tokens / trained_tokens, s_max or 1.0) > 1
    if attention_scale is not None and is_stretched:
        u = min(t / t_start, 1.0)
        if dynamic and attention_path != "constant":
            attention_scale *= u if attention_path == "falling" else 1 - u
        m = 1 + attention_scale * math.log(max(1.0, tokens / trained_tokens))
    return result, m


def method_frequencies(method, dim, theta, trained_tokens, tokens, t, s_max=None, *, lambda_s,
                       lambda_t=2.0, t_start=1.0, dynamic=True, c=1.0, width=0.5,
                       omega=2.0):  # fmt: skip
    """Return f and the method's own m; a new method needs its branch here.

    Args:
        lambda_s, lambda_t: `dype_scale` and `dype_exponent` of DyPEConfig.
        c, width, omega: its `cutoff`, `cutoff_width` and `spectrum_exponent`.

    `frequencies` lists the rest.
    """
    s = max(1.0, tokens / trained_tokens)
    s_max = s if s_max is None else s_max
    kappa, power_of_u = kappa_and_power_of_u(t, lambda_s, lambda_t, t_start, dynamic)
    u = min(t / t_start, 1.0) if dynamic else 1.0
    inv_freq = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if method == "base" or s_max == 1:
        return inv_freq, 1.0
    if method == "pi":
        return [f / s**kappa for f in inv_freq], 1.0
    if method == "ntk":
        return [f / s ** (kappa * ntk_exponent(dim, i)) for i, f in enumerate(inv_freq)], 1.0
    if method == "ntk_mult":
        stretch = s * kappa if s * kappa > 1 else 1.0
        return [f / stretch ** ntk_exponent(dim, i) for i, f in enumerate(inv_freq)], 1.0
    if method == "tasr":
        out = []
        for i, f in enumerate(inv_freq):
            ntk = (theta * s ** (dim / ((dim - 1) * (1 - u) + 1))) ** (-2 * i / dim)
            out.append(ntk if ntk > f / s else f / s)
        return out, 1.0
    m = 0.1 * math.log(s) + 1
    if method == "cutoff":
        wavelength = c * trained_tokens
        if dynamic:
            wavelength = wavelength * ((1 - u) / u) ** (2 / omega) if u else math.inf
        return cutoff_frequencies(dim, theta, s, wavelength, width), m
    if method == "yarn_ntk_only":
        return blend_two_ramps(dim, theta, trained_tokens, s, s, lambda r: r, kappa), m
    if method == "yarn_both":
        ntk_kappa = 2 * kappa if dynamic else 1.0
        return blend_two_ramps(dim, theta, trained_tokens, s, s, lambda r: r * kappa, ntk_kappa), m
    if method == "yarn":
        return blend_two_ramps(dim, theta, trained_tokens, s, s, lambda r: r * kappa), m
    if method == "yarn_power":
        return blend_two_ramps(dim, theta, trained_tokens, s, s, lambda r: r**kappa), m
    if method == "yarn_paper":
        return blend_one_ramp(dim, theta, trained_tokens, s, 1.0 * kappa, 32.0 * kappa), m
    if method == "vision_yarn":
        f = blend_two_ramps(dim, theta, trained_tokens, s, s_max, lambda r: r**kappa)
        return f, 1 + 0.1 * math.log(s_max) * power_of_u
    if method == "tide":
        gamma = mask(dim, theta, trained_tokens, 32.0**kappa, 1.0**kappa)
        f = [x / s * (1 - g) + x * g for x, g in zip(inv_freq, gamma, strict=True)]
        return f, tide_scale(inv_freq, s, u)
    if method == "sega":
        k = s_max ** (2 * dim / max(dim - 2, 1)) / (1 + 0.1 * math.log(s_max))
        return [(theta * k**kappa) ** (-2 * i / dim) for i in range(dim // 2)], s_max**0.08
    if method == "imax":
        return [
            f * max((10 * theta) ** (-2 * i / dim) / f, 1 / s) ** kappa
            for i, f in enumerate(inv_freq)
        ], 1.0
    if method in ("rdfc", "riflex"):
        turns = 0.9 if method == "riflex" else 1.0
        gaps = [abs(2 * math.pi / f - trained_tokens) for f in inv_freq]
        k, out = gaps.index(min(gaps, default=0)) if gaps else 0, list(inv_freq)
        target = turns * 2 * math.pi / (s * trained_tokens)
        if s > 1 and out and target < out[k]:
            out[k] *= (target / out[k]) ** min(1.0, kappa)
        return out, 1.0
    if method == "resonance":
        return resonance_frequencies(dim, theta, trained_tokens, s, kappa), m
    raise ValueError(f"tests/reference.py has no branch for {method}")


def by_pair(m, freqs):
    """Return m of every pair, from a number or a list."""
    return m if isinstance(m, list) else [m] * len(freqs)


def flux_table(method, grid, num_text, t, *, trained_tokens=64, **settings):
    """Return the cos and sin rows of FLUX's embedder.

    Args:
        method: a name in `dype.rope.METHODS`.
        grid: rows and columns of the image, in tokens.
        num_text: number of text tokens in front of the image.
        t: sigma, in [0, 1].
        trained_tokens: L of both image axes.
        settings: further arguments of `frequencies`.
    """
    largest = max(1.0, *(tokens / trained_tokens for tokens in grid))
    flux = 56, 10000.0, trained_tokens
    axes = [frequencies(method, *flux, n, t, largest, **settings) for n in grid]
    first = [10000.0 ** (-2 * i / 16) for i in range(8)]
    positions = [(0, 0)] * num_text + [(h, w) for h in range(grid[0]) for w in range(grid[1])]
    cos, sin = [], []
    for position in positions:
        angles = [(0 * f, 1.0) for f in first]
        for coordinate, (freqs, m) in zip(position, axes, strict=True):
            angles += [(coordinate * f, x) for f, x in zip(freqs, by_pair(m, freqs), strict=True)]
        cos.append([math.cos(a) * m for a, m in angles for _ in (0, 1)])
        sin.append([math.sin(a) * m for a, m in angles for _ in (0, 1)])
    return cos, sin


def rotary_table(method, axes_dim, theta, positions, grid, t, *, trained_tokens, is_target=None,
                 **settings):  # fmt: skip
    """Return m exp(i p f) of every token and pair, for any family; axes 1 and 2 are the image's.

    Args:
        method: a name in `dype.rope.METHODS`.
        axes_dim: dimensions per axis.
        theta: base of RoPE.
        positions: coordinates of every token, one per axis.
        grid: rows and columns of the image, in tokens.
        t: sigma, in [0, 1].
        trained_tokens: L of both image axes.
        is_target: per token, False for a token with the stock encoding. Default: True for all.
        settings: further arguments of `frequencies`.
    """
    largest = max(1.0, *(tokens / trained_tokens for tokens in grid))
    stock = [([theta ** (-2 * i / dim) for i in range(dim // 2)], 1.0) for dim in axes_dim]
    extrapolated = list(stock)
    for axis, n in enumerate(grid, 1):
        extrapolated[axis] = frequencies(
            method, axes_dim[axis], theta, trained_tokens, n, t, largest, **settings
        )
    rows = []
    for token, position in enumerate(positions):
        axes = extrapolated if is_target is None or is_target[token] else stock
        rows.append(
            [
                x * complex(math.cos(coordinate * f), math.sin(coordinate * f))
                for coordinate, (freqs, m) in zip(position, axes, strict=True)
                for f, x in zip(freqs, by_pair(m, freqs), strict=True)
            ]
        )
    return rows
