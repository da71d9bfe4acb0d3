"""Figures of the ground-truth table that `python -m dype.demo.evaluate` saved.

Its rows are settings at one size: `base`, METHOD_static, METHOD_LAMBDAS_LAMBDAT, and the floors, of
which `truth_vae` is as near as the model could come. Its pairs are settings and their static forms.
"""

from pathlib import Path

from matplotlib.figure import Figure

from dype import plots
from dype.config import one_of
from dype.measured import BASE, read

GROUND_TRUTH = Path("docs/data/ground_truth.json")
SCORES = ("joint", "layout", "overlap", "spectrum", "patches")
STANDARD = ("base", "yarn_paper_static", "yarn_paper_1_2")
COLOURS = (plots.ORANGE, plots.BLUE, plots.GREEN, plots.VERMILLION, plots.PURPLE, plots.SKY)
MARKERS = "soD^vP"
COMMAND = "python -m dype.demo.evaluate"
FLOOR = "truth_vae"


def bars(axes, x, scores: list[dict], **look) -> None:
    """Means, joined, with their intervals."""
    axes.plot(x, [one["mean"] for one in scores], **look)
    axes.vlines(x, *zip(*(one["interval"] for one in scores), strict=True), look["color"], lw=0.8)


def fig5(ground_truth: Path = GROUND_TRUTH, score: str = "joint", settings=STANDARD) -> Figure:
    """A score over the size with its intervals: `base`, a static method and its dynamic form."""
    one_of("--score", score, SCORES)
    rows = read(ground_truth, "rows", COMMAND)
    for name in settings:
        one_of("--settings", name, list(dict.fromkeys(one["setting"] for one in rows)))
    made = plots.figure(plots.SINGLE, 2.6)
    axes = made.subplots()
    looks = [{"color": c, "marker": m} for c, m in zip(COLOURS, MARKERS, strict=True)]
    drawn = {FLOOR: {"color": plots.GREY, "linestyle": ":"}}
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
    """Layout against the spectrum's distance, a point per setting; lines lead from static forms."""
    rows = [one for one in read(ground_truth, "rows", COMMAND) if not one["control"]]
    moves = [one for one in read(ground_truth, "pairs", COMMAND) if one["against"] != "base"]
    sizes = sorted({one["size"] for one in rows} - {BASE}) or [BASE]
    looks = {}
    methods = dict.fromkeys(one["method"] for one in rows if one["method"] not in (None, "base"))
    for i, method in enumerate(methods):
        looks[method] = {"color": COLOURS[i % 6], "marker": MARKERS[(i + i // 6) % 6]}
    made = plots.figure(plots.DOUBLE, 3)
    for axes, size in zip(made.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        some = {one["setting"]: one for one in rows if one["size"] == size}
        pairs_panel(axes, some, [one for one in moves if one["size"] == size], looks)
        axes.set_title(f"{size} px ({size / BASE:g}x)")
        axes.set_xlabel("layout score")
        axes.invert_yaxis()
    made.axes[0].set_ylabel("spectrum distance (0: truth)")
    found = {}
    for axes in made.axes:
        found |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    made.legend(found.values(), found, loc="outside right center", title="open: static")
    return made


def pairs_panel(axes, rows: dict[str, dict], moves: list[dict], looks: dict[str, dict]) -> None:
    """One size. Lines end at the dynamic form; `base` and truth stand alone."""

    def point(one):
        return one["layout"]["mean"], one["spectrum"]["mean"]

    for move in moves:
        if {move["setting"], move["against"]} <= rows.keys():
            ends = rows[move["against"]], rows[move["setting"]]
            colour = looks[ends[1]["method"]]["color"]
            axes.plot(*zip(*map(point, ends), strict=True), color=colour, lw=0.8)
    labelled = set()
    for one in rows.values():
        if one["method"] in looks:
            own = {"label": f"_{one['method']}"} if one["method"] in labelled else {}
            labelled |= {one["method"]} if one["dype"] else set()
            own = own if one["dype"] else {"mfc": "white", "label": f"_{one['setting']}"}
            look = {"label": one["method"], "markersize": 5, "linestyle": ""}
            axes.plot(*point(one), **look | looks[one["method"]] | own)
    for name, marker in {"base": "X", FLOOR: "*"}.items():
        if name in rows:
            axes.plot(*point(rows[name]), marker, color=plots.BLACK, markersize=6, label=name)
