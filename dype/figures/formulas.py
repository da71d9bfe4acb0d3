"""Figures that need no model: spectra of x_t, sinusoids, wavelengths, frequency ratios.

i counts the pairs of one axis of D dimensions, t is the noise level (1 is noise), and S(f, t) the
power of x_t at frequency f; S(f, 0) = C / f^omega is the image's, S(f, 1) = 1 the noise's.
"""

import math

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dype import rope
from dype.config import DyPEConfig
from dype.figures import style

FLUX = (56, 10000.0, 64)  # D, theta, L in tokens
Z_IMAGE = (48, 256.0, 64)
STRETCH = 4  # s
MASK = 1.5  # Eq. 12 is not drawn where signal and noise are within this factor of each other
MU, STEPS = 1.15, 28  # of the authors' runs
HALFWAY = 0.5  # the t of fig7's curves that follow it


def noisy_power(picture, t, noise=1.0):
    """S(f, t) = (1 - t)^2 S(f, 0) + t^2 S(f, 1) (DyPE Eq. 11)."""
    return (1 - t) ** 2 * picture + t**2 * noise


def progress(now, picture, noise):
    """gamma = (ln S(t) - ln S(0)) / (ln S(1) - ln S(0)) (DyPE Eq. 12): 0 is done, 1 is noise.

    NaN where S(0) and S(1) are within the factor MASK: it is singular where they are equal. Around
    that it leaves [0, 1], as Eq. 11 is least at t = A / (1 + A), A = S(0) / S(1), not at an end.
    """
    span = np.log(noise / picture)
    return np.log(now / picture) / np.where(abs(span) < math.log(MASK), np.nan, span)


def spectra_panel(axes, f, levels, rows, guide: tuple[float, float]) -> None:
    """S over f, a line per noise level, with C / f^omega."""
    ends = {0: "image, t = 0", 1: "noise, t = 1"}
    for t, row in zip(levels, rows, strict=True):
        width = 1.8 if t in ends else 0.7
        axes.plot(f, row, color=style.sigma_color(t), linewidth=width, label=ends.get(t))
    c, omega = guide
    label = rf"$1/f^\omega$, $\omega$ = {omega:.2f}"
    axes.plot(f, c / f**omega, ":", color=style.VERMILLION, label=label)
    axes.loglog()
    axes.set(xlim=(f[0], f[-1]), xlabel="frequency (1: Nyquist)")
    style.frequency_axis(axes.xaxis, f[0])


def progress_panel(axes, f, levels, gamma):
    """gamma over t and f, [f, t]: gray where masked, white above 1, black below 0."""
    axes.set_facecolor("silver")
    x, y = style.bin_edges(levels), np.exp(style.bin_edges(np.log(f)))
    colors = colormaps["viridis"].with_extremes(over="white", under="black")
    mesh = axes.pcolormesh(x, y, gamma, cmap=colors, vmin=0, vmax=1, rasterized=True)
    axes.set(yscale="log", ylim=(f[0], f[-1]))
    style.frequency_axis(axes.yaxis, f[0])
    style.noise_axis(axes)
    return mesh


def frequency_ratios(axis: tuple, t: float, config: DyPEConfig, s: float = STRETCH) -> np.ndarray:
    """f_i / theta_i of a method at noise level t, float64 [n]."""
    dim, theta, trained = axis
    f, _ = rope.axis_frequencies(dim, theta, trained, s * trained, t, config)
    return (f / rope.stock_frequencies(dim, theta)).numpy()


def authors_unclamped_yarn(axis: tuple, t: float) -> np.ndarray:
    """f_i / theta_i of `yarn` with the edges of its ramps as in the authors' code, t > 0.

    There low is cut at 0 and high at n, and nowhere else: once low passes n the ramp turns round,
    its mask is 0 at every pair, and the frequencies fall back, in the end all to 1/s.
    """
    dim, _, trained = axis
    known = rope.build_axes(*axis, [STRETCH * trained], None, DyPEConfig())
    edges = rope.pair_index_of_turns(known, known.ramp_turns * t**2)
    low, high = edges[:, :1].floor().clamp(min=0), edges[:, 1:].ceil().clamp(max=dim // 2)
    width = high - low + 0.001 * (high == low)
    past_beta, past_gamma = ((known.pair_index - low) / width).clamp(0, 1)  # 1 - mask
    f = torch.lerp(known.inv_freq, torch.lerp(known.ntk, known.pi, past_beta), past_gamma)
    return (f / known.inv_freq)[0].numpy()


def fig6() -> Figure:
    """What each method does to a fast and a slow wave at twice the trained length.

    The axis has two pairs of periods 512 and 4096: theta = 64, D = 4, in units of 512 / 2 pi.
    """
    panels = [
        ("RoPE", "base", None),
        ("PI", "pi", None),
        ("NTK", "ntk", None),
        ("dynamic NTK, t = 0.2", "ntk", 0.2),
        ("dynamic NTK, t = 0.8", "ntk", 0.8),
    ]
    made, rows = style.subplots(style.DOUBLE, 5.2, len(panels), sharex=True, sharey=True)
    x, marks = np.arange(0, 8193, 8), np.arange(0, 8193, 256)
    for axes, letter, (title, method, t) in zip(rows, "abcde", panels, strict=True):
        ratios = frequency_ratios(
            (4, 64.0, 4096), t or 0, DyPEConfig(method, dype=t is not None), 2
        )
        axes.axvspan(0, 4096, color=style.SKY, alpha=0.15, linewidth=0)
        axes.axvspan(4096, 8192, color=style.GRAY, alpha=0.15, linewidth=0)
        waves = zip((512, 4096), ratios, (style.ORANGE, style.BLUE), strict=True)
        for period, ratio, color in waves:
            label = f"period {period / ratio:,.0f}"
            axes.plot(x, np.cos(2 * np.pi * x / period * ratio), color=color, label=label)
        slow = np.cos(2 * np.pi * marks / 4096 * ratios[1])
        seen = marks <= 4096
        look = {"color": style.BLUE, "markersize": 3.5, "clip_on": False}
        axes.plot(marks[seen], slow[seen], "o", **look)
        axes.plot(marks[~seen], slow[~seen], "s", **look, mfc="white")
        axes.set_title(f"({letter}) {title}", loc="left", pad=3)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2, borderpad=0)
    rows[0].set(xlim=(0, 8192), ylim=(-1.15, 1.15), yticks=(-1, 0, 1), xticks=range(0, 8193, 1024))
    rows[-1].set_xlabel("position (blue: trained on; gray: never seen)")
    made.supylabel("cosine")
    return made


def fig7() -> Figure:
    """Wavelengths of one axis of FLUX at s = 4, and what they are stretched by."""
    curves = [
        ("RoPE", "base", False, style.BLACK, "-"),
        ("PI", "pi", False, style.VERMILLION, "-"),
        ("NTK", "ntk", False, style.BLUE, "-"),
        ("time-aware (TASR)", "tasr", True, style.PURPLE, "--"),
        ("dynamic PI", "pi", True, style.VERMILLION, "--"),
        ("dynamic NTK", "ntk", True, style.BLUE, "--"),
        ("dynamic YaRN", "yarn", True, style.GREEN, "--"),
    ]
    made, (left, right) = style.subplots(style.DOUBLE, 2.9, 1, 2)
    i = np.arange(FLUX[0] // 2)
    theta = rope.stock_frequencies(*FLUX[:2]).numpy()
    for label, method, dynamic, color, line in curves:
        ratios = frequency_ratios(FLUX, HALFWAY, DyPEConfig(method, dype=dynamic))
        label += f", t = {HALFWAY:g}" if dynamic else ""
        left.plot(i, 2 * np.pi / (theta * ratios), line, color=color, label=label)
        right.plot(i, 1 / ratios, line, color=color, label=label)
    for name, tokens in {"trained": FLUX[2], "wanted": STRETCH * FLUX[2]}.items():
        left.axhline(tokens, color=style.GRAY, linewidth=0.6)
        left.text(27, tokens * 1.06, f"{name}: {tokens}", ha="right", va="bottom", fontsize=7)
    left.set(yscale="log", xlabel="pair index i", ylabel="wavelength (tokens)")
    right.set(xlabel="pair index i", ylabel="wavelength / RoPE's")
    made.legend(*right.get_legend_handles_labels(), loc="outside right center")
    return made


def ratios() -> Figure:
    """f_i / theta_i of every method over t and i, FLUX above and Z-Image below, s = 4."""
    names = [*rope.METHODS, "yarn, unclamped"]
    across = 4
    down = -(-len(names) // across)
    made = Figure(figsize=(style.DOUBLE, 2 * (1.02 * down + 0.55)), layout="constrained")
    edges = np.linspace(0, 1, 161)
    models = {"FLUX": FLUX, "Z-Image": Z_IMAGE}
    for part, (title, axis) in zip(made.subfigures(2, 1), models.items(), strict=True):
        dim, theta, trained = axis
        length = f"{trained} tokens to {STRETCH * trained}"
        part.suptitle(f"{title}: D = {dim}, theta = {theta:g}, {length}")
        grid = part.subplots(down, across, sharex=True, sharey=True).ravel()
        for axes, name in zip(grid, names, strict=False):
            mesh = ratio_panel(axes, axis, name, edges)
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        part.supxlabel("t = sigma (root scale)")
        part.supylabel("pair index i")
        bar = part.colorbar(mesh, ax=grid, label="frequency / RoPE's", extend="min", **style.BAR)
        bar.set_ticks([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16], labels=["1", "1/2", "1/4", "1/8", "1/16"])
        bar.minorticks_off()
    return made


def ratio_panel(axes, axis: tuple, name: str, edges: np.ndarray):
    """One method's heat map over root t and i; the marks are the 28 steps of a FLUX image."""
    levels = ((edges[1:] + edges[:-1]) / 2) ** 2
    if name in rope.METHODS:
        columns = [frequency_ratios(axis, t, DyPEConfig(name)) for t in levels]
    else:
        columns = [authors_unclamped_yarn(axis, t) for t in levels]
    n = axis[0] // 2
    rows, shown = np.arange(n + 1) - 0.5, np.transpose(columns)
    colors = {"cmap": "cividis", "norm": LogNorm(1 / 16, 1)}
    mesh = axes.pcolormesh(edges, rows, shown, **colors, rasterized=True)
    if axis == FLUX:
        u = np.linspace(1.0, 1 / STEPS, STEPS)
        steps = np.sqrt(math.exp(MU) / (math.exp(MU) + 1 / u - 1))  # FLUX's, u = 1 .. 1/STEPS
        axes.plot(steps, np.full(STEPS, n - 1.6), "|", color=style.BLACK, markersize=4, mew=0.6)
    ticks = (1, 0.5, 0.1, 0.01)
    axes.set_xticks(np.sqrt(ticks), labels=[f"{t:g}" for t in ticks])
    axes.set(xlim=(1, 0), ylim=(n - 0.5, -0.5), yticks=(0, n // 2, n - 1))
    axes.set_title(name if name == "base" else f"dy_{name}", pad=2)
    return mesh
