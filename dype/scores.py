"""Figures of the ground-truth table that `python -m dype.demo.evaluate` saved.

Its rows are settings at one size: `base`, METHOD_static, METHOD_LAMBDAS_LAMBDAT, and `truth`.
"""

from pathlib import Path

from matplotlib.figure import Figure

from dype import plots
from dype.config import one_of
from dype.measured import BASE, read

GROUND_TRUTH = Path("docs/data/ground_truth.json")
SCORES = ("joint", "layout", "texture")
STANDARD = ("base", "yarn_paper_static", "yarn_paper_1_2")
COLOURS = (plots.ORANGE, plots.BLUE, plots.GREEN, plots.VERMILLION, plots.PURPLE, plots.SKY)
MARKERS = "soD^vP"


def reported(path: Path) -> list[dict]:
    """The rows of the report. Raises ValueError if there are none."""
    command = "python -m dype.demo.evaluate"
    rows = [one for one in read(path, "rows", command) if one.get("part") == "report"]
    if not rows:
        raise ValueError(f"{path} has no rows of the part report; expected what {command} writes")
    return rows


def bars(axes, x, scores: list[dict], **look) -> None:
    """Means, joined, with their intervals."""
    axes.plot(x, [one["mean"] for one in scores], **look)
    axes.vlines(x, *zip(*(one["interval"] for one in scores), strict=True), look["color"], lw=0.8)


def fig5(ground_truth: Path = GROUND_TRUTH, score: str = "joint", settings=STANDARD) -> Figure:
    """A score over the size with its intervals: `base`, a static method and its dynamic form."""
    one_of("--score", score, SCORES)
    rows = reported(ground_truth)
    for name in settings:
        one_of("--settings", name, list(dict.fromkeys(one["setting"] for one in rows)))
    made = plots.figure(plots.SINGLE, 2.6)
    axes = made.subplots()
    looks = [{"color": c, "marker": m} for c, m in zip(COLOURS, MARKERS, strict=True)]
    drawn = {"truth": {"color": plots.GREY, "linestyle": ":"}}
    colours = iter(looks * len(settings))
    for name in settings:
        plain = {"color": plots.BLACK, "marker": "x"}
        drawn[name] = plain if name == "base" else next(colours)
    for name, look in drawn.items():
        some = [one for one in rows if one["setting"] == name and not one["control"]]
        some.sort(key=lambda one: one["size"])
        if some:
            x = [one["size"] / BASE for one in some]
            bars(axes, x, [one[score] for one in some], label=name, markersize=4, **look)
    sizes = sorted({one["size"] for one in rows})
    axes.set_xticks([s / BASE for s in sizes], labels=[f"{s / BASE:g}x\n{s}" for s in sizes])
    axes.set(xlabel="side, times the trained one and px", ylabel=f"{score} score")
    made.legend(loc="outside upper center", ncols=2)
    return made


def pairs(ground_truth: Path = GROUND_TRUTH) -> Figure:
    """Layout against texture, a point per setting; a line leads from static to each dynamic one."""
    rows = [one for one in reported(ground_truth) if not one["control"]]
    sizes = sorted({one["size"] for one in rows} - {BASE}) or [BASE]
    methods = [
        one["method"] for one in rows if one["setting"] not in ("base", "truth", "truth_vae")
    ]
    looks = {}
    for i, method in enumerate(dict.fromkeys(methods)):
        looks[method] = {"color": COLOURS[i % 6], "marker": MARKERS[(i + i // 6) % 6]}
    made = plots.figure(plots.DOUBLE, 3)
    for axes, size in zip(made.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        pairs_panel(axes, [one for one in rows if one["size"] == size], looks)
        axes.set_title(f"{size} px ({size / BASE:g}x)")
        axes.set_xlabel("layout score")
    made.axes[0].set_ylabel("texture score")
    found = {}
    for axes in made.axes:
        found |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    made.legend(found.values(), found, loc="outside right center", title="open: static")
    return made


def pairs_panel(axes, rows: list[dict], looks: dict[str, dict]) -> None:
    """One size. Lines end at the dynamic form; `base` and truth stand alone."""

    def point(one):
        return one["layout"]["mean"], one["texture"]["mean"]

    for method, look in looks.items():
        own = [one for one in rows if one["method"] == method]
        static = [one for one in own if not one["dype"]]
        dynamic = [one for one in own if one["dype"]]
        for start in static:
            for end in dynamic:
                axes.plot(*zip(point(start), point(end), strict=True), color=look["color"], lw=0.8)
            axes.plot(*point(start), **look, mfc="white", markersize=5, linestyle="")
        for i, end in enumerate(dynamic):
            label = f"_{method}" if i else method
            axes.plot(*point(end), **look, markersize=5, linestyle="", label=label)
    alone = {"base": "X", "truth": "*", "truth_vae": "p"}
    for name, marker in alone.items():
        for one in (one for one in rows if one["setting"] == name):
            label = name.replace("_vae", ", through the VAE")
            axes.plot(*point(one), marker, color=plots.BLACK, markersize=6, label=label)
