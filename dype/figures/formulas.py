"""Figures of formulas, without a model: spectra of x_t, waves, wavelengths, frequency ratios.

i is the index of a pair of one axis with D dimensions. t is sigma, 1 for noise. S(f, t) is the
power of x_t at frequency f: S(f, 0) = C / f^omega for the image, S(f, 1) = 1 for noise.
"""

import math

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dype import rope
from dype.config import DyPEConfig
from dype.figures import style

FLUX = (56, 10000.0, 64)  # D, theta, trained length in tokens
Z_IMAGE = (48, 256.0, 64)
STRETCH = 4  # s
MASK = 1.5  # no value of Eq. 12 where signal and noise are within this factor
MU, STEPS = 1.15, 28  # of the authors' images
HALFWAY = 0.5  # t of the dynamic curves of fig7


def noisy_power(image, t, noise=1.0):
    """Return S(f, t) = (1 - t)^2 S(f, 0) + t^2 S(f, 1) (DyPE Eq. 11).

    Args:
        image: S(f, 0).
        t: sigma.
        noise: S(f, 1).
    """
    return (1 - t) ** 2 * image + t**2 * noise


def progress(power, image, noise):
    """Return gamma = (ln S(t) - ln S(0)) / (ln S(1) - ln S(0)) (DyPE Eq. 12).

    1 is noise, 0 the finished image. gamma is singular where S(0) = S(1), so it is NaN where the
    two are within the factor MASK. Near that it leaves [0, 1], because Eq. 11 is least at
    t = A / (1 + A) with A = S(0) / S(1), not at an end.

    Args:
        power: S(f, t).
        image: S(f, 0).
        noise: S(f, 1).
    """
    span = np.log(noise / image)
    return np.log(power / image) / np.where(abs(span) < math.log(MASK), np.nan, span)


def draw_spectra(axes, f, sigmas, spectra, guide: tuple[float, float]) -> None:
    """Draw S over f, one line per sigma, and C / f^omega.

    Args:
        axes: axes to draw on.
        f: frequencies [n].
        sigmas: [m].
        spectra: S(f, t), [m, n].
        guide: C and omega.
    """
    ends = {0: "image, t = 0", 1: "noise, t = 1"}
    for t, spectrum in zip(sigmas, spectra, strict=True):
        width = 1.8 if t in ends else 0.7
        axes.plot(f, spectrum, color=style.sigma_color(t), linewidth=width, label=ends.get(t))
    c, omega = guide
    label = rf"$1/f^\omega$, $\omega$ = {omega:.2f}"
    axes.plot(f, c / f**omega, ":", color=style.VERMILLION, label=label)
    axes.loglog()
    axes.set(xlim=(f[0], f[-1]), xlabel="frequency (1: Nyquist)")
    style.set_frequency_axis(axes.xaxis, f[0])


def draw_progress(axes, f, sigmas, gamma):
    """Draw a heat map of gamma over t and f, and return its mesh.

    NaN is gray, a value above 1 white, and a value below 0 black.

    Args:
        axes: axes to draw on.
        f: frequencies [n].
        sigmas: [m].
        gamma: [n, m].
    """
    axes.set_facecolor("silver")
    x, y = style.bin_edges(sigmas), np.exp(style.bin_edges(np.log(f)))
    colors = colormaps["viridis"].with_extremes(over="white", under="black")
    mesh = axes.pcolormesh(x, y, gamma, cmap=colors, vmin=0, vmax=1, rasterized=True)
    axes.set(yscale="log", ylim=(f[0], f[-1]))
    style.set_frequency_axis(axes.yaxis, f[0])
    style.set_sigma_axis(axes)
    return mesh


def frequency_ratios(axis: tuple, t: float, config: DyPEConfig, s: float = STRETCH) -> np.ndarray:
    """Return f_i / theta_i of a method, float64 [D / 2].

    Args:
        axis: D, theta, trained length.
        t: sigma.
        config: method and DyPE.
        s: length over the trained length.
    """
    dim, theta, trained = axis
    f, _ = rope.axis_frequencies(dim, theta, trained, s * trained, t, config)
    return (f / rope.stock_frequencies(dim, theta)).numpy()


def authors_unclamped_yarn(axis: tuple, t: float) -> np.ndarray:
    """Return f_i / theta_i of `yarn` with the ramp edges of the authors' code, for t > 0.

    That code keeps low above 0 and high below D / 2, and nothing else. Once low passes D / 2 the
    ramp is reversed and its mask is 0 at every pair. The ratios fall, in the end all to 1/s.
    """
    dim, _, trained = axis
    rope_axis = rope.build_axes(*axis, [STRETCH * trained], None, DyPEConfig())
    edges = rope.pair_index_of_turns(rope_axis, rope_axis.ramp_turns * t**2)
    low, high = edges[:, :1].floor().clamp(min=0), edges[:, 1:].ceil().clamp(max=dim // 2)
    width = high - low + 0.001 * (high == low)
    past_beta, past_gamma = ((rope_axis.pair_index - low) / width).clamp(0, 1)  # 1 - mask
    ntk_to_pi = torch.lerp(rope_axis.ntk_static, rope_axis.pi_static, past_beta)
    f = torch.lerp(rope_axis.inv_freq, ntk_to_pi, past_gamma)
    return (f / rope_axis.inv_freq)[0].numpy()


def fig6() -> Figure:
    """Draw a fast and a slow wave under five encodings, at twice the trained length.

    The axis has two pairs, of periods 512 and 4096: theta = 64, D = 4, in units of 512 / 2 pi.
    """
    panels = [
        ("RoPE", "base", None),
        ("PI", "pi", None),
        ("NTK", "ntk", None),
        ("dynamic NTK, t = 0.2", "ntk", 0.2),
        ("dynamic NTK, t = 0.8", "ntk", 0.8),
    ]
    figure, rows = style.subplots(style.DOUBLE, 5.2, len(panels), sharex=True, sharey=True)
    x, marks = np.arange(0, 8193, 8), np.arange(0, 8193, 256)
    for axes, letter, (title, method, t) in zip(rows, "abcde", panels, strict=True):
        ratios = frequency_ratios(
            (4, 64.0, 4096), t or 0, DyPEConfig(method, dype=t is not None), 2
        )
        axes.axvspan(0, 4096, color=style.SKY, alpha=0.15, linewidth=0)
        axes.axvspan(4096, 8192, color=style.GRAY, alpha=0.15, linewidth=0)
        slow_color = style.METHOD_COLORS[method]
        waves = zip((512, 4096), ratios, (style.GRAY, slow_color), strict=True)
        for period, ratio, color in waves:
            label = f"period {period / ratio:,.0f}"
            axes.plot(x, np.cos(2 * np.pi * x / period * ratio), color=color, label=label)
        slow = np.cos(2 * np.pi * marks / 4096 * ratios[1])
        is_trained = marks <= 4096
        marker = {"color": slow_color, "markersize": 3.5, "clip_on": False}
        axes.plot(marks[is_trained], slow[is_trained], "o", **marker)
        axes.plot(marks[~is_trained], slow[~is_trained], "s", **marker, mfc="white")
        axes.set_title(f"({letter}) {title}", loc="left", pad=3)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=2, borderpad=0)
    rows[0].set(xlim=(0, 8192), ylim=(-1.15, 1.15), yticks=(-1, 0, 1), xticks=range(0, 8193, 1024))
    rows[-1].set_xlabel(
        "position; blue ground and filled marks: trained, gray ground and open marks: beyond"
    )
    figure.supylabel("cosine")
    return figure


def fig7() -> Figure:
    """Draw the wavelengths of one axis of FLUX at s = 4, and their ratio to RoPE's."""
    curves = [
        ("RoPE", "base", False),
        ("PI", "pi", False),
        ("NTK", "ntk", False),
        ("time-aware (TASR)", "tasr", True),
        ("dynamic PI", "pi", True),
        ("dynamic NTK", "ntk", True),
        ("dynamic YaRN", "yarn", True),
    ]
    figure, (left, right) = style.subplots(style.DOUBLE, 2.9, 1, 2)
    i = np.arange(FLUX[0] // 2)
    theta = rope.stock_frequencies(*FLUX[:2]).numpy()
    for label, method, dynamic in curves:
        ratios = frequency_ratios(FLUX, HALFWAY, DyPEConfig(method, dype=dynamic))
        label += f", t = {HALFWAY:g}" if dynamic else ""
        line = style.method_style(f"dy_{method}" if dynamic else method) | {"marker": ""}
        left.plot(i, 2 * np.pi / (theta * ratios), label=label, **line)
        right.plot(i, 1 / ratios, label=label, **line)
    for name, tokens in {"trained": FLUX[2], "target": STRETCH * FLUX[2]}.items():
        left.axhline(tokens, color=style.GRAY, linewidth=0.6)
        left.text(27, tokens * 1.06, f"{name}: {tokens}", ha="right", va="bottom", fontsize=7)
    left.set(yscale="log", xlabel="pair index i", ylabel="wavelength (tokens)")
    right.set(xlabel="pair index i", ylabel="wavelength / RoPE's")
    title = "color: method\nline: with DyPE (RoPE: stock)\ndashes: static"
    entries = right.get_legend_handles_labels()
    figure.legend(*entries, loc="outside right center", title=title, title_fontsize=7)
    return figure


def ratios() -> Figure:
    """Draw f_i / theta_i of every method over t and i at s = 4, FLUX above, Z-Image below."""
    names = [*rope.METHODS, "yarn, unclamped"]
    columns = 4
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(style.DOUBLE, 2 * (1.02 * rows + 0.55)), layout="constrained")
    edges = np.linspace(0, 1, 161)
    models = {"FLUX": FLUX, "Z-Image": Z_IMAGE}
    for block, (title, axis) in zip(figure.subfigures(2, 1), models.items(), strict=True):
        dim, theta, trained = axis
        length = f"{trained} tokens to {STRETCH * trained}"
        block.suptitle(f"{title}: D = {dim}, theta = {theta:g}, {length}")
        grid = block.subplots(rows, columns, sharex=True, sharey=True).ravel()
        for axes, name in zip(grid, names, strict=False):
            mesh = draw_ratios(axes, axis, name, edges)
        for axes in grid[len(names) :]:
            axes.set_axis_off()
        explain_ratios(grid[len(names)], axis)
        grid[len(names) - columns].tick_params(labelbottom=True)  # the last one of its column
        block.supxlabel("t = sigma (root scale)")
        block.supylabel("pair index i")
        bar = block.colorbar(
            mesh, ax=grid, label="frequency / RoPE's", extend="min", **style.COLOR_BAR
        )
        bar.set_ticks([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16], labels=["1", "1/2", "1/4", "1/8", "1/16"])
        bar.minorticks_off()
    return figure


def explain_ratios(axes, axis: tuple) -> None:
    """Write what the colors and marks mean in the cell that no method needs.

    Args:
        axes: axes of the cell.
        axis: D, theta, trained length.
    """
    colors = colormaps["cividis"]
    keys = {"the model's own": 1.0, "1/4, as in PI": 0.5, "less": 0.1}
    handles = [Patch(color=colors(value), label=label) for label, value in keys.items()]
    if axis == FLUX:
        step = {"color": style.BLACK, "marker": "|", "linestyle": "", "markersize": 6}
        handles.append(Line2D([], [], label=f"{STEPS} steps, mu {MU:g}", **step))
    axes.legend(handles=handles, loc="center", borderpad=0)


def draw_ratios(axes, axis: tuple, name: str, edges: np.ndarray):
    """Draw a method's heat map over root t and i, and return its mesh.

    The marks on FLUX are the 28 steps of an image.

    Args:
        axes: axes to draw on.
        axis: D, theta, trained length.
        name: method with DyPE, or "yarn, unclamped".
        edges: edges of the bins of root t.
    """
    sigmas = ((edges[1:] + edges[:-1]) / 2) ** 2
    if name in rope.METHODS:
        columns = [frequency_ratios(axis, t, DyPEConfig(name)) for t in sigmas]
    else:
        columns = [authors_unclamped_yarn(axis, t) for t in sigmas]
    n = axis[0] // 2
    pair_edges, values = np.arange(n + 1) - 0.5, np.transpose(columns)
    colors = {"cmap": "cividis", "norm": LogNorm(1 / 16, 1)}
    mesh = axes.pcolormesh(edges, pair_edges, values, **colors, rasterized=True)
    if axis == FLUX:
        u = np.linspace(1.0, 1 / STEPS, STEPS)
        steps = np.sqrt(math.exp(MU) / (math.exp(MU) + 1 / u - 1))  # FLUX's, u = 1 .. 1/STEPS
        axes.plot(steps, np.full(STEPS, n - 1.6), "|", color=style.BLACK, markersize=4, mew=0.6)
    ticks = (1, 0.5, 0.1, 0.01)
    axes.set_xticks(np.sqrt(ticks), labels=[f"{t:g}" for t in ticks])
    axes.set(xlim=(1, 0), ylim=(n - 0.5, -0.5), yticks=(0, n // 2, n - 1))
    axes.set_title(name if name == "base" else f"dy_{name}", pad=2)
    return mesh
