"""Figures of the ground-truth table that `python -m dype.demo.evaluate --save` wrote.

Its rows are settings at one size: `base`, METHOD_static, METHOD_LAMBDAS_LAMBDAT, with the name of
its control behind where it is one, and rendered truth: `truth`, `truth_vae`, `vae`.
"""

import re
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from dype.config import one_of
from dype.demo.experiments import RIVALS, setting
from dype.figures import style
from dype.figures.trajectories import BASE, read

GROUND_TRUTH = Path("docs/data/ground_truth.json")
SCORES = {  # -> what it is
    "joint": "joint score",
    "layout": "share with the layout right",
    "overlap": "overlap with the asked shape",
    "spectrum": "distance of spectra (0: truth)",
    "patches": "distance of patches (0: truth)",
}
TRUTH = {"truth_vae": "truth, by the VAE"}  # as near as the model could come
COMMAND = f"python -m dype.demo.evaluate --drawn --save {GROUND_TRUTH}"
STANDARD = ("base", "yarn_paper_static", "yarn_paper_1_2")
CUTOFF = Path("docs/data/cutoff.json")
MARKED = [setting(one).name for one in RIVALS[:4]]  # with their intervals
CHOSEN = MARKED[1]  # on other prompts
SCALED = re.compile("_attention_[a-z]+=[^_]+")
PLAIN = {"color": style.BLACK, "marker": "x"}
COLOURS = (style.ORANGE, style.BLUE, style.GREEN, style.VERMILLION, style.PURPLE, style.SKY)
MARKERS = "soD^vP"
LOOKS = [{"color": COLOURS[i % 6], "marker": MARKERS[(i + i // 6) % 6]} for i in range(36)]


def reported(path: Path, command: str) -> list[dict]:
    """The rows of square pictures but for the controls. Raises ValueError if there are none."""
    rows = read(path, "rows", command)
    rows = [row for row in rows if not row["control"] and isinstance(row["size"], int)]
    if not rows:
        raise ValueError(f"{path} has no rows; expected what {command} writes")
    return rows


def fig5(ground_truth: Path = GROUND_TRUTH, score: str = "joint", settings=STANDARD) -> Figure:
    """A score over the size with its intervals: `base`, a static method and its dynamic form."""
    one_of("--score", score, SCORES)
    rows = reported(ground_truth, COMMAND)
    for name in settings:
        one_of("--settings", name, list(dict.fromkeys(one["setting"] for one in rows)))
    made = style.figure(style.SINGLE, 2.6)
    axes = made.subplots()
    looks = cycle(LOOKS[:6])
    drawn = {"truth_vae": {"color": style.GREY, "linestyle": ":"}}
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
    line leads from a static form to its dynamic ones. MARKED ones have their intervals, the chosen
    one a ring.
    """
    one_of("--score", score, ("spectrum", "patches"))
    rows = reported(ground_truth, f"python -m dype.demo.evaluate --cutoff --save {CUTOFF}")
    sizes = sorted({one["size"] for one in rows} - {BASE}) or [BASE]
    methods = dict.fromkeys(row["method"] for row in rows if row["method"] not in (None, "base"))
    looks = dict(zip(methods, LOOKS, strict=False))
    looks |= {"base": PLAIN, "cutoff": {"color": style.BLACK, "marker": "D"}}
    made = style.figure(style.SINGLE, 0.8 + 2.3 * len(sizes))
    found = {}
    for axes, size in zip(made.subplots(len(sizes), 1, squeeze=False)[:, 0], sizes, strict=True):
        here = [one for one in rows if one["size"] == size]
        frontier_panel(axes, here, looks, score)
        axes.set(title=f"{size} px ({size / BASE:g}x)", ylabel=SCORES[score])
        axes.invert_yaxis()
        found |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    made.axes[-1].set_xlabel(SCORES["overlap"])
    made.legend(found.values(), found, loc="outside lower center", ncols=3, title="open: static")
    return made


def frontier_panel(axes, rows: list[dict], looks: dict, score: str) -> None:
    """One size: its rows, looks by method."""

    def point(row):
        return row["overlap"]["mean"], row[score]["mean"]

    families = {}
    for row in rows:
        families.setdefault(SCALED.sub("", row["setting"]), []).append(row)
    for family in families.values():
        if len(family) > 1:
            colour = looks[family[0]["method"]]["color"]
            axes.plot(*zip(*map(point, family), strict=True), color=colour, lw=0.6, zorder=1)
    static = {row["method"]: row for row in rows if row["method"] and not row["dype"]}
    for row in rows:
        at, method, name = point(row), row["method"], row["setting"]
        if name in TRUTH:
            axes.plot(*at, "*", color=style.BLACK, ms=7, label=TRUTH[name])
        if not method:
            continue
        look = looks[method]
        if row["dype"] and method in static and not SCALED.search(name):
            ends = zip(point(static[method]), at, strict=True)
            axes.plot(*ends, ":", color=look["color"], lw=0.8, zorder=1)
        if row["dype"] or method == "base":
            axes.plot(*at, **look, ms=4, ls="", label=method)
        else:
            axes.plot(*at, **look, ms=4, ls="", mfc="white")
        if name in MARKED:
            axes.hlines(at[1], *row["overlap"]["interval"], look["color"], lw=0.8)
            axes.vlines(at[0], *row[score]["interval"], look["color"], lw=0.8)
        if name == CHOSEN:
            axes.plot(*at, "o", color=style.BLACK, mfc="none", ms=9, label="chosen")
