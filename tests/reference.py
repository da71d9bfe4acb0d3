"""Every method again, slowly: plain Python floats, one pair at a time, straight from the formulas.

Shares no code with `dype.rope`. Where a threshold becomes 0 the limit is written out.
"""

import math


def kappa_and_decay(t, lambda_s, lambda_t, t_start, dynamic):
    if not dynamic:
        return 1.0, 1.0
    u = 1.0 if t > t_start else t / t_start
    return lambda_s * u**lambda_t, u**lambda_t


def mask(dim, base, length, r_hi, r_lo):
    n = dim // 2

    def pair_at(r):
        if r == 0:
            return math.inf
        return dim * math.log(length / (2 * math.pi * r)) / (2 * math.log(base))

    def clamped(value, rounding):
        return n if value > n else 0 if value < 0 else rounding(value)

    low = clamped(pair_at(r_hi), math.floor)
    high = min(clamped(pair_at(r_lo), math.ceil), n)
    if low == high:
        high += 0.001
    return [1 - min(max((i - low) / (high - low), 0), 1) for i in range(n)]


def two_ramps(dim, base, length, s_pi, s_ntk, threshold, ntk_kappa=1.0):
    beta = mask(dim, base, length, threshold(1.25), threshold(0.75))
    gamma = mask(dim, base, length, threshold(16.0), threshold(2.0))
    out = []
    for i in range(dim // 2):
        theta = base ** (-2 * i / dim)
        ntk = theta / s_ntk ** (ntk_kappa * 2 * i / (dim - 2))
        f = theta / s_pi * (1 - beta[i]) + ntk * beta[i]
        out.append(f * (1 - gamma[i]) + theta * gamma[i])
    return out


def one_ramp(dim, base, length, s, alpha, beta):
    out = []
    for i in range(dim // 2):
        theta = base ** (-2 * i / dim)
        r = length * theta / (2 * math.pi)
        gamma = 1.0 if beta == 0 else min(max((r - alpha) / (beta - alpha), 0), 1)
        out.append((1 - gamma) * theta / s + gamma * theta)
    return out


def cut(dim, base, s, wavelength, width):
    """Wavelengths far above the cut are stretched by s, those far below are not."""
    out = []
    for i in range(dim // 2):
        theta = base ** (-2 * i / dim)
        if wavelength == 0:
            w = 1.0
        elif wavelength == math.inf:
            w = 0.0
        else:
            w = min(max(math.log(2 * math.pi / theta / wavelength) / width + 0.5, 0), 1)
        out.append(theta / s**w)
    return out


def frequencies(method, dim, base, length, tokens, t, s_max=None, *, attention=None,
                path="constant", t_start=1.0, dynamic=True, **settings):  # fmt: skip
    """(list of n frequencies, attention scale) of one axis; attention: a of m = 1 + a ln s."""
    found, m = own_frequencies(
        method, dim, base, length, tokens, t, s_max, t_start=t_start, dynamic=dynamic, **settings
    )
    stretched = method != "base" and max(tokens / length, s_max or 1.0) > 1
    if attention is not None and stretched:
        u = min(t / t_start, 1.0)
        if dynamic and path != "constant":
            attention *= u if path == "falling" else 1 - u
        m = 1 + attention * math.log(max(1.0, tokens / length))
    return found, m


def own_frequencies(method, dim, base, length, tokens, t, s_max=None, *, lambda_s, lambda_t=2.0,
                    t_start=1.0, dynamic=True, c=1.0, width=0.5, omega=2.0):  # fmt: skip
    """The same with the method's own attention scale."""
    s = max(1.0, tokens / length)
    s_max = s if s_max is None else s_max
    kappa, decay = kappa_and_decay(t, lambda_s, lambda_t, t_start, dynamic)
    u = min(t / t_start, 1.0) if dynamic else 1.0
    theta = [base ** (-2 * i / dim) for i in range(dim // 2)]
    last = dim - 2
    if method == "base" or s_max == 1:
        return theta, 1.0
    if method == "pi":
        return [f / s**kappa for f in theta], 1.0
    if method == "ntk":
        return [f / s ** (kappa * 2 * i / last) for i, f in enumerate(theta)], 1.0
    if method == "ntk_mult":
        stretch = s * kappa if s * kappa > 1 else 1.0
        return [f / stretch ** (2 * i / last) for i, f in enumerate(theta)], 1.0
    if method == "tasr":
        out = []
        for i, f in enumerate(theta):
            longer_base = (base * s ** (dim / ((dim - 1) * (1 - u) + 1))) ** (-2 * i / dim)
            out.append(longer_base if longer_base > f / s else f / s)
        return out, 1.0
    m = 0.1 * math.log(s) + 1
    if method == "cutoff":
        wavelength = c * length
        if dynamic:
            wavelength = wavelength * ((1 - u) / u) ** (2 / omega) if u else math.inf
        return cut(dim, base, s, wavelength, width), m
    if method == "yarn_ntk_only":
        return two_ramps(dim, base, length, s, s, lambda r: r, kappa), m
    if method == "yarn_both":
        ntk_kappa = 2 * kappa if dynamic else 1.0
        return two_ramps(dim, base, length, s, s, lambda r: r * kappa, ntk_kappa), m
    if method == "yarn":
        return two_ramps(dim, base, length, s, s, lambda r: r * kappa), m
    if method == "yarn_power":
        return two_ramps(dim, base, length, s, s, lambda r: r**kappa), m
    if method == "yarn_paper":
        return one_ramp(dim, base, length, s, 1.0 * kappa, 32.0 * kappa), m
    if method == "vision_yarn":
        f = two_ramps(dim, base, length, s, s_max, lambda r: r**kappa)
        return f, 1 + 0.1 * math.log(s_max) * decay
    raise ValueError(method)


def flux_table(method, grid, before, t, *, length=64, **settings):
    """cos and sin rows of `before` text tokens and the image, as FLUX's embedder gives them."""
    largest = max(1.0, *(tokens / length for tokens in grid))
    axes = [frequencies(method, 56, 10000.0, length, n, t, largest, **settings) for n in grid]
    first = [10000.0 ** (-2 * i / 16) for i in range(8)]
    positions = [(0, 0)] * before + [(h, w) for h in range(grid[0]) for w in range(grid[1])]
    cos, sin = [], []
    for position in positions:
        angles = [(0 * f, 1.0) for f in first]
        for at, (freqs, m) in zip(position, axes, strict=True):
            angles += [(at * f, m) for f in freqs]
        cos.append([math.cos(a) * m for a, m in angles for _ in (0, 1)])
        sin.append([math.sin(a) * m for a, m in angles for _ in (0, 1)])
    return cos, sin


def turns(method, axes_dim, base, positions, grid, t, *, length, drawn=None, **settings):
    """m exp(i p f) per token and pair, of any family: axes 1 and 2 are the image's.

    drawn: per token, False for those that keep the stock encoding (default: none does).
    """
    largest = max(1.0, *(tokens / length for tokens in grid))
    stock = [([base ** (-2 * i / dim) for i in range(dim // 2)], 1.0) for dim in axes_dim]
    moved = list(stock)
    for axis, n in enumerate(grid, 1):
        moved[axis] = frequencies(method, axes_dim[axis], base, length, n, t, largest, **settings)
    rows = []
    for token, position in enumerate(positions):
        axes = moved if drawn is None or drawn[token] else stock
        rows.append(
            [
                m * complex(math.cos(at * f), math.sin(at * f))
                for at, (freqs, m) in zip(position, axes, strict=True)
                for f in freqs
            ]
        )
    return rows
