"""Figures of saved numbers: measurements of the demo's sampling, and its ground-truth tables.

`python -m dype.demo.trajectories` writes the measurements, `python -m dype.demo.evaluate` the
tables. A row of a table is a setting at one size, such as `dy_pi:1:1`, or rendered truth: `truth`,
`truth_vae`, `vae`.
"""

import json
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dype.config import check_choice
from dype.demo.experiments import (
    ALPHA,
    CHOSEN,
    LARGE_SETTINGS,
    SCALING_SETTINGS,
    is_setting_name,
    without_scale,
)
from dype.figures import formulas, style
from dype.rope import METHODS

COMMAND = "python -m dype.demo.trajectories"
TRAJECTORIES = Path("docs/data/trajectories.json")
UNGUIDED = Path("docs/data/trajectories_unguided.json")  # with guidance 1


def read(path: Path, key: str, command: str):
    """Return the value of a key in a JSON file.

    Args:
        path: file.
        key: "protocol", "pictures" or "rows".
        command: command that writes such files, for the sentence.

    Raises:
        ValueError: there is no such file, or it is of another kind.
    """
    try:
        return json.loads(Path(path).read_text("utf-8"))[key]
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; expected what {command} writes") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what {command} writes: no {key} in it") from error


def base_resolution_of(path: Path, command: str) -> int:
    """Return the side of the images that the measured model was trained at, px.

    Args:
        path: file of measurements or results; files about the first demo do not name it.
        command: command that writes such files, for the sentence.
    """
    return read(path, "protocol", command).get("base_resolution", 256)


def finished_images(path: Path, size: int, setting: str = "base") -> list[dict]:
    """Return the measured images of one setting. Raise ValueError if there are none.

    Args:
        path: file of measurements.
        size: side, px.
        setting: name of the setting.
    """
    rows = read(path, "pictures", COMMAND)
    images = [row for row in rows if (row["size"], row["setting"]) == (size, setting)]
    if not images:
        raise ValueError(f"{path} has no {setting} at {size} px, expected some; run {COMMAND}")
    return images


def mean_spectra(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return f [N] in shares of Nyquist, t [steps + 1] from 1 to 0, and mean S [steps + 1, N]."""
    images = finished_images(path, base_resolution_of(path, COMMAND))
    mean = np.mean([image["spectra"] for image in images], axis=0)
    return np.arange(1, mean.shape[1] + 1) / mean.shape[1], np.array(images[0]["sigmas"]), mean


GENERIC = (0.01, 2.0)  # C and omega of the first panels; their S(f, 0) falls from 100 to 1/100


def make_three_panels(label: str) -> tuple[Figure, np.ndarray]:
    """Return the figure and the empty axes of fig2a and fig2b; `label` is that of the y axis."""
    figure, grid = style.subplots(style.DOUBLE, 2.5, 1, 3)
    grid[2].sharey(grid[1])
    grid[2].tick_params(labelleft=False)
    grid[0].set_ylabel(label)
    grid[0].set_title("Eq. 11 of $0.01/f^2$")
    grid[1].set_title("Eq. 11 of the demo's latents")
    grid[2].set_title("the demo, sampled")
    return figure, grid


def fig2a(trajectories: Path = TRAJECTORIES) -> Figure:
    """Draw the power of x_t over frequency, in three panels.

    They have Eq. 11 of C / f^omega, Eq. 11 of the demo's latents, and the power that was measured
    while the demo sampled. The guide of the last two panels is a straight line fitted to the
    latents' spectrum.
    """
    f, sigmas, power = mean_spectra(trajectories)
    figure, grid = make_three_panels("power (noise: 1)")
    fine, t = np.geomspace(0.01, 1, 100), sigmas[:, None]
    c, omega = GENERIC
    formulas.draw_spectra(grid[0], fine, sigmas, formulas.noisy_power(c / fine**omega, t), GENERIC)
    slope, intercept = np.polyfit(np.log(f), np.log(power[-1]), 1)
    guide = np.exp(intercept), -slope
    formulas.draw_spectra(grid[1], f, sigmas, formulas.noisy_power(power[-1], t), guide)
    formulas.draw_spectra(grid[2], f, sigmas, power, guide)
    grid[0].legend(loc="upper right", borderpad=0)
    grid[1].legend(handles=grid[1].lines[-1:], loc="upper right", borderpad=0)
    colors = ScalarMappable(Normalize(0, 1), "viridis_r")
    figure.colorbar(colors, ax=grid, label="t = sigma", **style.COLOR_BAR).ax.invert_yaxis()
    return figure


def fig2b(trajectories: Path = TRAJECTORIES) -> Figure:
    """Draw gamma (Eq. 12) over t and frequency for the three panels of fig2a."""
    f, sigmas, power = mean_spectra(trajectories)
    figure, grid = make_three_panels("frequency (1: Nyquist)")
    fine, t = np.geomspace(0.01, 1, 161), np.linspace(1, 0, 161)
    c, omega = GENERIC
    image, noise = power[-1][:, None], power[0][:, None]
    for axes, x, start in ((grid[0], fine, c / fine[:, None] ** omega), (grid[1], f, image)):
        gamma = formulas.progress(formulas.noisy_power(start, t), start, 1.0)
        formulas.draw_progress(axes, x, t, gamma)
    gamma = formulas.progress(power.T, image, noise)
    mesh = formulas.draw_progress(grid[2], f, sigmas, gamma)
    label = r"$\gamma$ (1: noise, 0: the image)"
    figure.colorbar(mesh, ax=grid, label=label, extend="both", **style.COLOR_BAR)
    special = {
        "silver": f"undefined: signal and noise within a factor of {formulas.MASK:g}",
        "white": "above 1",
        "black": "below 0",
    }
    keys = [Patch(fc=color, ec="black", lw=0.5, label=text) for color, text in special.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=3)
    return figure


def eq11(trajectories: Path = TRAJECTORIES, unguided: Path = UNGUIDED) -> Figure:
    """Draw measured power over Eq. 11 of its two ends, a line per ring, over t."""
    figure, grid = style.subplots(style.DOUBLE, 2.4, 1, 2, sharey=True)
    for axes, path in zip(grid, (trajectories, unguided), strict=True):
        f, sigmas, power = mean_spectra(path)
        expected = formulas.noisy_power(power[-1], sigmas[:, None], power[0])
        axes.axhline(1, color=style.GRAY, linewidth=0.6)
        for ring in np.arange(len(f))[::-1]:
            has_label = ring in (0, 1, 2, 3, 7, len(f) - 1)
            label = f"{ring + 1}/{len(f)}" if has_label else None
            color = style.sigma_color(1 - np.log(f[ring]) / np.log(f[0]))
            axes.plot(sigmas, power[:, ring] / expected[:, ring], color=color, label=label)
        guidance = read(path, "protocol", COMMAND).get("guidance")
        if guidance is None:
            raise ValueError(f"{path} is of the first demo, expected the present one's numbers")
        axes.set_title(f"guidance {guidance:g}")
        style.set_sigma_axis(axes)
    grid[0].set_ylabel("power / Eq. 11")
    entries = grid[0].get_legend_handles_labels()
    title = "frequency\n(1: Nyquist)"
    figure.legend(*entries, loc="outside right center", title=title, reverse=True)
    return figure


def fig18(trajectories: Path = TRAJECTORIES) -> Figure:
    """Draw the entropy of attention minus that of the prompt at the base resolution, over t."""
    base = base_resolution_of(trajectories, COMMAND)
    rows = [row for row in read(trajectories, "pictures", COMMAND) if row["size"] != base]
    if not rows:
        raise ValueError(f"{trajectories} has {base} px alone, expected larger sizes too")
    sizes = sorted({row["size"] for row in rows})
    settings = dict.fromkeys(row["setting"] for row in rows)
    base_images = finished_images(trajectories, base)
    base_entropy = {(image["prompt"], image["seed"]): image["entropy"] for image in base_images}
    width = style.DOUBLE if len(sizes) > 1 else style.SINGLE
    figure, [grid] = style.subplots(width, 2.6, 1, len(sizes), sharey=True, squeeze=False)
    for axes, size in zip(grid, sizes, strict=True):
        axes.axhline(0, color=style.GRAY, linewidth=0.6)
        for name in settings:
            line = style.method_style(name) | {"marker": ""}
            images = finished_images(trajectories, size, name)
            deviations = [
                np.subtract(image["entropy"], base_entropy[image["prompt"], image["seed"]])
                for image in images
            ]
            t, mean = images[0]["sigmas"][:-1], np.mean(deviations, axis=0)
            axes.plot(t, np.transpose(deviations), linewidth=0.5, alpha=0.4, **line)
            axes.plot(t, mean, label=f"{name}: {abs(mean).mean():.4f}", **line)
        axes.set_title(f"{size} px ({size / base:g}x), {len(images)} prompts")
        style.set_sigma_axis(axes)
        title = "mean absolute deviation\n(thin: single prompts)"
        axes.legend(loc="upper right", title=title, title_fontsize=7)
    low, high = grid[0].get_ylim()
    grid[0].set_ylim(low, high + 0.4 * (high - low))  # room for the legend
    grid[0].set_ylabel(f"entropy minus that at {base} px")
    return figure


RESULTS = Path("docs/data/ground_truth.json")
LARGE = Path("docs/data/ground_truth_large.json")
MAIN = Path("docs/data/ground_truth_main.json")
SCORES = {  # -> label
    "joint": "joint score",
    "layout": "share of right layouts",
    "overlap": "overlap with the requested shape (1: equal)",
    "spectrum": "distance of spectra (0: truth)",
    "directions": "distance of directional spectra (0: truth)",
    "patches": "distance of patches (0: truth)",
    "lite0": "distance of EfficientNet-Lite0 features (0: truth)",
}
TEXTURE = ("spectrum", "directions", "patches", "lite0")
TRUTH = {"truth_vae": "truth through the VAE"}  # the best that the model can reach
FRONTIER_SETTINGS = (*SCALING_SETTINGS, "pi", ALPHA, CHOSEN)
METHOD_STYLES = {
    name: {"color": style.METHOD_COLORS[name], "marker": style.METHOD_MARKERS[name]}
    for name in METHODS
}


def read_square_rows(path: Path, command: str, score: str) -> list[dict]:
    """Return the rows of square images, without controls.

    Args:
        path: JSON file of results.
        command: command that writes such files, for the sentence.
        score: a key of SCORES.

    Raises:
        ValueError: there are no rows, they lack the score, or an earlier version wrote the file.
    """
    rows = read(path, "rows", command)
    if not all(map(has_current_name, rows)):
        raise ValueError(f"{path} was written by an earlier version; run {command} again")
    rows = [row for row in rows if not row["control"] and isinstance(row["size"], int)]
    if not rows:
        raise ValueError(f"{path} has no rows; expected what {command} writes")
    present = [name for name in SCORES if all(name in row for row in rows)]
    check_choice(f"--score, with {path},", score, present)
    return rows


def has_current_name(row: dict) -> bool:
    """Return whether a row has the name that this version gives to its setting.

    Only the beginning of the name counts for a method that is no longer in METHODS.
    """
    method, name = row["method"], row["setting"]
    if method is None:  # rendered truth
        return True
    dynamic = row["dype"] and method != "base"
    is_current = name.split(":")[0] == (f"dy_{method}" if dynamic else method)
    return is_current and (method not in METHODS or is_setting_name(name))


def select_settings(settings, defaults, rows: list[dict]) -> list[str]:
    """Return the names of the settings to show.

    Args:
        settings: names that were asked for, or none.
        defaults: names to show otherwise, if the rows have them.
        rows: rows of the results.

    Raises:
        ValueError: the rows lack a name that was asked for.
    """
    names = dict.fromkeys(row["setting"] for row in rows)
    for name in settings:
        check_choice("--settings", name, list(names))
    return list(settings) or [name for name in defaults if name in names]


def fig5(ground_truth: Path = LARGE, score: str = "joint", settings=()) -> Figure:
    """Draw a score over the size, with intervals, for several settings.

    Args:
        ground_truth: JSON file of results.
        score: a key of SCORES.
        settings: names of settings in the file. Default: those of LARGE_SETTINGS that it has.
    """
    check_choice("--score", score, SCORES)
    command = f"python -m dype.demo.evaluate --paper large --save {RESULTS}"
    rows = read_square_rows(ground_truth, command, score)
    base = base_resolution_of(ground_truth, command)
    settings = select_settings(settings, LARGE_SETTINGS, rows)
    figure, axes = style.subplots(style.SINGLE, 2.6)
    spare_markers = cycle(style.SPARE_MARKERS)
    line_styles = {"truth_vae": {"color": style.GRAY, "linestyle": ":"}}
    for name in settings:
        line_styles[name] = style.method_style(name)
        if ":" in name:  # because it has the color and the line of its method
            line_styles[name]["marker"] = next(spare_markers)
    stock = {row["size"]: row for row in rows if row["size"] == base and row["setting"] == "base"}
    for name, line_style in line_styles.items():
        # At the base resolution every setting is stock.
        by_size = {} if name in TRUTH else dict(stock)
        by_size |= {row["size"]: row for row in rows if row["setting"] == name}
        if by_size:
            x = [size / base for size in sorted(by_size)]
            results = [by_size[size][score] for size in sorted(by_size)]
            means, intervals = ([result[key] for result in results] for key in ("mean", "interval"))
            axes.plot(x, means, label=TRUTH.get(name, name), markersize=4, **line_style)
            axes.vlines(x, *zip(*intervals, strict=True), line_style["color"], lw=0.8)
    sizes = sorted({row["size"] for row in rows})
    axes.set_xticks([s / base for s in sizes], labels=[f"{s / base:g}x\n{s}" for s in sizes])
    axes.set(xlabel="side: multiple of the training size, and px", ylabel=SCORES[score])
    title = "color: method; line: with DyPE (base: stock); dashes: static"
    figure.legend(loc="outside upper center", ncols=2, title=title, title_fontsize=7)
    return figure


def encoding_name(row: dict) -> str:
    """Return the setting of a row without "dy_" and without its attention scale."""
    return without_scale(row["setting"]).removeprefix("dy_")


def frontier(ground_truth: Path = MAIN, score: str = "spectrum", settings=()) -> Figure:
    """Draw overlap against texture, a panel per square size and a point per setting.

    The best of both is bottom right. All panels have the same ranges. A line joins settings that
    differ in their attention scale alone. A dotted line leads from a static method to its forms
    with DyPE. A ring marks the settings that the table "choice" chose.

    Args:
        ground_truth: JSON file of results.
        score: one of TEXTURE.
        settings: names of settings with intervals. Default: those of FRONTIER_SETTINGS that it
            has.
    """
    check_choice("--score", score, TEXTURE)
    command = f"python -m dype.demo.evaluate --paper main --save {RESULTS}"
    rows = read_square_rows(ground_truth, command, score)
    settings = select_settings(settings, FRONTIER_SETTINGS, rows)
    base = base_resolution_of(ground_truth, command)
    sizes = sorted({row["size"] for row in rows} - {base}) or [base]
    marker_styles, spare_markers = dict(METHOD_STYLES), cycle(style.SPARE_MARKERS)
    for row in rows:
        if row["method"] and encoding_name(row) not in marker_styles:
            color = METHOD_STYLES.get(row["method"], {"color": style.GRAY})["color"]
            marker_styles[encoding_name(row)] = {"color": color, "marker": next(spare_markers)}
    columns = len(sizes) if len(sizes) <= 3 else (len(sizes) + 1) // 2
    lines = -(-len(sizes) // columns)
    width = style.DOUBLE if columns > 1 else style.SINGLE
    figure, grid = style.subplots(
        width, 1.2 + 2.3 * lines, lines, columns, sharex=True, sharey=True, squeeze=False
    )
    for axes in grid.flat[len(sizes) :]:
        axes.remove()
    legend = {}
    for axes, size in zip(figure.axes, sizes, strict=True):
        size_rows = [row for row in rows if row["size"] == size]
        draw_frontier(axes, size_rows, marker_styles, score, settings)
        axes.set(title=f"{size} px ({size / base:g}x)")
        legend |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.axes[0].set_ylim(bottom=0)
    for axes in figure.axes[-columns:]:  # the lowest of each column
        axes.set_xlabel(SCORES["overlap"])
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(SCORES[score])
    title = "filled: with DyPE; open: the same method, static (dotted: between the two)\n"
    title += "bars: 95 % intervals"
    if any(without_scale(row["setting"]) != row["setting"] for row in rows):
        title += "; line: another attention scale of the same setting"
    figure.legend(
        legend.values(),
        legend,
        loc="outside lower center",
        ncols=2 * min(columns, 2),
        title=title,
        title_fontsize=7,
    )
    return figure


def draw_frontier(axes, rows: list[dict], marker_styles: dict, score: str, settings) -> None:
    """Draw the points and lines of one size.

    Args:
        axes: axes to draw on.
        rows: rows of the size.
        marker_styles: color and marker by `encoding_name`.
        score: one of TEXTURE.
        settings: names of settings with intervals.
    """

    def point(row):
        return row["overlap"]["mean"], row[score]["mean"]

    families = {}
    for row in rows:
        families.setdefault(without_scale(row["setting"]), []).append(row)
    for family in families.values():
        if len(family) > 1:
            color = marker_styles[encoding_name(family[0])]["color"]
            axes.plot(*zip(*map(point, family), strict=True), color=color, lw=0.6, zorder=1)
    static = {row["setting"]: row for row in rows if row["method"] and not row["dype"]}
    dynamic = {encoding_name(row) for row in rows if row["dype"]}
    for row in rows:
        x, y, method, name = *point(row), row["method"], row["setting"]
        if name in TRUTH:
            axes.plot(x, y, "*", color=style.BLACK, ms=7, label=TRUTH[name])
        if not method:
            continue
        form = encoding_name(row)
        marker, color = marker_styles[form], marker_styles[form]["color"]
        static_form = static.get(form, static.get(method) if "=" not in form else None)
        if row["dype"] and static_form and without_scale(name) == name:
            ends = zip(point(static_form), (x, y), strict=True)
            axes.plot(*ends, ":", color=color, lw=0.8, zorder=1)
        if row["dype"] or method == "base":
            axes.plot(x, y, **marker, ms=4, ls="", label=without_scale(name))
        else:
            label = None if form in dynamic else without_scale(name)
            axes.plot(x, y, **marker, ms=4, ls="", mfc="white", label=label)
        if name in settings:
            axes.hlines(y, *row["overlap"]["interval"], color, lw=0.8)
            axes.vlines(x, *row[score]["interval"], color, lw=0.8)
        if name in (ALPHA, CHOSEN):
            ring = {"color": style.BLACK, "mfc": "none", "ms": 9}
            axes.plot(x, y, "o", label="chosen on other prompts", **ring)
