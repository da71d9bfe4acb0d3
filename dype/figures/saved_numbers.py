"""Figures of saved numbers: of the demo's sampling and of its ground-truth tables.

`python -m dype.demo.trajectories` wrote the first, `python -m dype.demo.evaluate --save` the
second, whose rows are settings at one size, by the names that it takes (`base`, `yarn`, `dy_yarn`,
`dy_pi:1:1:reversed`), and rendered truth: `truth`, `truth_vae`, `vae`.
"""

import json
import re
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dype.config import check_choice
from dype.demo.experiments import BASE, RIVALS, setting
from dype.figures import formulas, style

COMMAND = "python -m dype.demo.trajectories"
TRAJECTORIES = Path("docs/data/trajectories.json")
UNGUIDED = Path("docs/data/trajectories_cfg1.json")  # the same without guidance
FORMS = {  # setting -> color: of fig18, and the settings of fig5 by default
    "base": style.BLACK,
    "yarn_paper": style.ORANGE,
    "dy_yarn_paper": style.BLUE,
}


def read(path: Path, key: str, command: str):
    """What a run saved, by its key. Raises ValueError if the file is none of its kind."""
    try:
        return json.loads(Path(path).read_text("utf-8"))[key]
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; expected what {command} writes") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what {command} writes: no {key} in it") from error


def finished_images(path: Path, size: int, setting: str = "base") -> list[dict]:
    """The trajectories of one size and setting. Raises ValueError if there are none."""
    rows = read(path, "pictures", COMMAND)
    found = [one for one in rows if (one["size"], one["setting"]) == (size, setting)]
    if not found:
        raise ValueError(f"{path} has no {setting} at {size} px; expected it to be run through")
    return found


def mean_spectra(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f [N] in shares of Nyquist, t [steps + 1] from 1 to 0, mean S over the prompts [t, f]."""
    found = finished_images(path, BASE)
    mean = np.mean([one["spectra"] for one in found], axis=0)
    return np.arange(1, mean.shape[1] + 1) / mean.shape[1], np.array(found[0]["sigmas"]), mean


GENERIC = (0.01, 2.0)  # C and omega of the first panels: from 100 times the noise to 1/100


def three_panels(label: str) -> tuple[Figure, np.ndarray]:
    """The panels of fig2a and fig2b, without lines: the figure and its axes."""
    made, grid = style.subplots(style.DOUBLE, 2.5, 1, 3)
    grid[2].sharey(grid[1])
    grid[2].tick_params(labelleft=False)
    grid[0].set_ylabel(label)
    grid[0].set_title("Eq. 11 of $0.01/f^2$")
    grid[1].set_title("Eq. 11 of the demo's latents")
    grid[2].set_title("the demo, sampled")
    return made, grid


def fig2a(trajectories: Path = TRAJECTORIES) -> Figure:
    """Power of x_t over frequency: Eq. 11 of C / f^omega and of the demo's latents, and measured.

    The guide in the last two is the straight line through the latents' spectrum.
    """
    f, levels, power = mean_spectra(trajectories)
    made, grid = three_panels("power (noise: 1)")
    fine, t = np.geomspace(0.01, 1, 100), levels[:, None]
    c, omega = GENERIC
    formulas.spectra_panel(grid[0], fine, levels, formulas.noisy_power(c / fine**omega, t), GENERIC)
    slope, at = np.polyfit(np.log(f), np.log(power[-1]), 1)
    guide = np.exp(at), -slope
    formulas.spectra_panel(grid[1], f, levels, formulas.noisy_power(power[-1], t), guide)
    formulas.spectra_panel(grid[2], f, levels, power, guide)
    grid[0].legend(loc="upper right", borderpad=0)
    grid[1].legend(handles=grid[1].lines[-1:], loc="upper right", borderpad=0)
    colors = ScalarMappable(Normalize(0, 1), "viridis_r")
    made.colorbar(colors, ax=grid, label="t = sigma", **style.BAR).ax.invert_yaxis()
    return made


def fig2b(trajectories: Path = TRAJECTORIES) -> Figure:
    """gamma over t and frequency (Eq. 12): of Eq. 11 as in fig2a, and measured."""
    f, levels, power = mean_spectra(trajectories)
    made, grid = three_panels("frequency (1: Nyquist)")
    fine, t = np.geomspace(0.01, 1, 161), np.linspace(1, 0, 161)
    c, omega = GENERIC
    picture, noise = power[-1][:, None], power[0][:, None]
    for axes, x, start in ((grid[0], fine, c / fine[:, None] ** omega), (grid[1], f, picture)):
        gamma = formulas.progress(formulas.noisy_power(start, t), start, 1.0)
        formulas.progress_panel(axes, x, t, gamma)
    gamma = formulas.progress(power.T, picture, noise)
    mesh = formulas.progress_panel(grid[2], f, levels, gamma)
    label = r"$\gamma$ (1: noise, 0: the image)"
    made.colorbar(mesh, ax=grid, label=label, extend="both", **style.BAR)
    return made


def eq11(trajectories: Path = TRAJECTORIES, unguided: Path = UNGUIDED) -> Figure:
    """How far sampled spectra are from Eq. 11 of their own ends, ring by ring, over t."""
    made, grid = style.subplots(style.DOUBLE, 2.4, 1, 2, sharey=True)
    for axes, path in zip(grid, (trajectories, unguided), strict=True):
        f, levels, power = mean_spectra(path)
        expected = formulas.noisy_power(power[-1], levels[:, None], power[0])
        axes.axhline(1, color=style.GRAY, linewidth=0.6)
        for ring in np.arange(len(f))[::-1]:
            named = ring in (0, 1, 2, 3, 7, len(f) - 1)
            label = f"{ring + 1}/{len(f)}" if named else None
            color = style.sigma_color(1 - np.log(f[ring]) / np.log(f[0]))
            axes.plot(levels, power[:, ring] / expected[:, ring], color=color, label=label)
        axes.set_title(f"true CFG {read(path, 'protocol', COMMAND)['true_cfg']:g}")
        style.noise_axis(axes)
    grid[0].set_ylabel("power / Eq. 11")
    shown = grid[0].get_legend_handles_labels()
    made.legend(*shown, loc="outside right center", title="frequency", reverse=True)
    return made


def fig18(trajectories: Path = TRAJECTORIES) -> Figure:
    """Attention's normalized entropy less that at the base resolution, prompt by prompt, over t."""
    sizes = sorted({one["size"] for one in read(trajectories, "pictures", COMMAND)} - {BASE})
    if not sizes:
        raise ValueError(f"{trajectories} has {BASE} px alone, expected larger sizes too")
    own = {
        (one["prompt"], one["seed"]): one["entropy"] for one in finished_images(trajectories, BASE)
    }
    width = style.DOUBLE if len(sizes) > 1 else style.SINGLE
    made, [grid] = style.subplots(width, 2.6, 1, len(sizes), sharey=True, squeeze=False)
    for axes, size in zip(grid, sizes, strict=True):
        axes.axhline(0, color=style.GRAY, linewidth=0.6)
        for name, color in FORMS.items():
            found = finished_images(trajectories, size, name)
            each = [np.subtract(x["entropy"], own[x["prompt"], x["seed"]]) for x in found]
            t, mean = found[0]["sigmas"][:-1], np.mean(each, axis=0)
            axes.plot(t, np.transpose(each), color=color, linewidth=0.5, alpha=0.4)
            axes.plot(t, mean, color=color, label=f"{name}: {abs(mean).mean():.4f}")
        axes.set_title(f"{size} px ({size / BASE:g}x), {len(found)} prompts")
        style.noise_axis(axes)
        axes.legend(loc="upper right", title="mean absolute deviation", title_fontsize=7)
    low, high = grid[0].get_ylim()
    grid[0].set_ylim(low, high + 0.4 * (high - low))  # the legend's
    grid[0].set_ylabel(f"entropy less that at {BASE} px")
    return made


GROUND_TRUTH = Path("docs/data/ground_truth.json")
SCORES = {  # -> what it is
    "joint": "joint score",
    "layout": "share with the layout right",
    "overlap": "overlap with the asked shape",
    "spectrum": "distance of spectra (0: truth)",
    "patches": "distance of patches (0: truth)",
}
TRUTH = {"truth_vae": "truth, by the VAE"}  # as near as the model could come
CUTOFF = Path("docs/data/cutoff.json")
WITH_INTERVALS = [setting(one).name for one in RIVALS[:4]]  # with their intervals
SELECTED = WITH_INTERVALS[1]  # on other prompts
ATTENTION_SUFFIX = re.compile(":attention_[a-z]+=[^:]+")
PLAIN = {"color": style.BLACK, "marker": "x"}
COLORS = (style.ORANGE, style.BLUE, style.GREEN, style.VERMILLION, style.PURPLE, style.SKY)
MARKERS = "soD^vP"
LOOKS = [{"color": COLORS[i % 6], "marker": MARKERS[(i + i // 6) % 6]} for i in range(36)]


def read_square_rows(path: Path, command: str) -> list[dict]:
    """The rows of square images but for the controls. Raises ValueError if there are none."""
    rows = read(path, "rows", command)
    rows = [row for row in rows if not row["control"] and isinstance(row["size"], int)]
    if not rows:
        raise ValueError(f"{path} has no rows; expected what {command} writes")
    return rows


def fig5(ground_truth: Path = GROUND_TRUTH, score: str = "joint", settings=tuple(FORMS)) -> Figure:
    """A score over the size with its intervals: `base`, a static method and its dynamic form."""
    check_choice("--score", score, SCORES)
    rows = read_square_rows(
        ground_truth, f"python -m dype.demo.evaluate --drawn --save {GROUND_TRUTH}"
    )
    for name in settings:
        check_choice("--settings", name, list(dict.fromkeys(one["setting"] for one in rows)))
    made, axes = style.subplots(style.SINGLE, 2.6)
    looks = cycle(LOOKS[:6])
    drawn = {"truth_vae": {"color": style.GRAY, "linestyle": ":"}}
    drawn |= {name: PLAIN if name == "base" else next(looks) for name in settings}
    stock = {one["size"]: one for one in rows if one["size"] == BASE and one["setting"] == "base"}
    for name, look in drawn.items():
        found = {} if name in TRUTH else dict(stock)  # where nothing is stretched all are stock
        found |= {one["size"]: one for one in rows if one["setting"] == name}
        if found:
            x = [size / BASE for size in sorted(found)]
            scores = [found[size][score] for size in sorted(found)]
            means, spans = ([one[key] for one in scores] for key in ("mean", "interval"))
            axes.plot(x, means, label=TRUTH.get(name, name), markersize=4, **look)
            axes.vlines(x, *zip(*spans, strict=True), look["color"], lw=0.8)
    sizes = sorted({one["size"] for one in rows})
    axes.set_xticks([s / BASE for s in sizes], labels=[f"{s / BASE:g}x\n{s}" for s in sizes])
    axes.set(xlabel="side, times the trained one and px", ylabel=SCORES[score])
    made.legend(loc="outside upper center", ncols=2)
    return made


def frontier(ground_truth: Path = CUTOFF, score: str = "spectrum") -> Figure:
    """Overlap with the asked shape against texture, a panel per square size; both axes' best is
    top right.

    A point per setting; those that differ by their attention scale alone are joined, and a dotted
    line leads from a static form to its dynamic ones. WITH_INTERVALS ones have their intervals,
    the chosen one a ring.
    """
    check_choice("--score", score, ("spectrum", "patches"))
    rows = read_square_rows(ground_truth, f"python -m dype.demo.evaluate --cutoff --save {CUTOFF}")
    sizes = sorted({one["size"] for one in rows} - {BASE}) or [BASE]
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] not in (None, "base"))
    looks = dict(zip(methods, LOOKS, strict=False))
    looks |= {"base": PLAIN, "cutoff": {"color": style.BLACK, "marker": "D"}}
    made, _ = style.subplots(style.SINGLE, 1.1 + 2.3 * len(sizes), len(sizes))
    found = {}
    for axes, size in zip(made.axes, sizes, strict=True):
        here = [one for one in rows if one["size"] == size]
        frontier_panel(axes, here, looks, score)
        axes.set(title=f"{size} px ({size / BASE:g}x)", ylabel=SCORES[score])
        axes.invert_yaxis()
        found |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    made.axes[-1].set_xlabel(SCORES["overlap"])
    title = "filled: as named; open: without dy_, static"
    made.legend(found.values(), found, loc="outside lower center", ncols=2, title=title)
    return made


def frontier_panel(axes, rows: list[dict], looks: dict, score: str) -> None:
    """One size: its rows, looks by method."""

    def point(row):
        return row["overlap"]["mean"], row[score]["mean"]

    families = {}
    for row in rows:
        families.setdefault(ATTENTION_SUFFIX.sub("", row["setting"]), []).append(row)
    for family in families.values():
        if len(family) > 1:
            color = looks[family[0]["method"]]["color"]
            axes.plot(*zip(*map(point, family), strict=True), color=color, lw=0.6, zorder=1)
    static = {row["method"]: row for row in rows if row["method"] and not row["dype"]}
    for row in rows:
        at, method, name = point(row), row["method"], row["setting"]
        if name in TRUTH:
            axes.plot(*at, "*", color=style.BLACK, ms=7, label=TRUTH[name])
        if not method:
            continue
        look = looks[method]
        if row["dype"] and method in static and not ATTENTION_SUFFIX.search(name):
            ends = zip(point(static[method]), at, strict=True)
            axes.plot(*ends, ":", color=look["color"], lw=0.8, zorder=1)
        if row["dype"] or method == "base":
            axes.plot(*at, **look, ms=4, ls="", label=f"dy_{method}" if row["dype"] else method)
        else:
            axes.plot(*at, **look, ms=4, ls="", mfc="white")
        if name in WITH_INTERVALS:
            axes.hlines(at[1], *row["overlap"]["interval"], look["color"], lw=0.8)
            axes.vlines(at[0], *row[score]["interval"], look["color"], lw=0.8)
        if name == SELECTED:
            axes.plot(*at, "o", color=style.BLACK, mfc="none", ms=9, label="chosen")
