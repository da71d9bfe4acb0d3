"""Rows of pictures with enlarged crops, from a finished sweep's folder."""

import textwrap
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dype.config import METHOD_SCALES, DyPEConfig
from dype.figures import style
from dype.sampling import records
from dype.sampling.settings import method_name
from dype.sweep.results import COLUMNS, read_rows

MIDDLE = "0.4,0.4,0.2"
PLACES = ("method", "prompt", "file", "seconds", "peak_memory", "error")  # no filters for --where
FRAMES = (style.ORANGE, style.SKY, style.VERMILLION, style.GREEN)
GAP, LINE = 0.04, 0.14  # inches
PIXELS = 1000  # of a whole picture's longer side, at most


class Shown(NamedTuple):
    """What a figure of the paper shows."""

    methods: tuple[str, ...]  # side by side, named as in results.csv
    prompts: int = 1  # one above the other
    crops: tuple[str, ...] = (MIDDLE,)


SHOWN = {
    "fig1": Shown(("base", "yarn", "dy_yarn")),
    "fig3": Shown(("yarn", "dy_yarn"), 2),
    "fig4": Shown(("ntk", "dy_ntk", "yarn", "dy_yarn"), 2),
    "fig8": Shown(("dy_tasr", "dy_ntk"), 2),
    "fig9": Shown(("base", "yarn", "dy_yarn"), 2),
    "fig12": Shown(("yarn", "dy_yarn"), 2),
    "fig16": Shown(("ntk", "dy_ntk", "yarn", "dy_yarn"), 4, ()),
    "fig17": Shown(("yarn", "dy_yarn"), 2, ("0.1,0.1,0.2", MIDDLE, "0.7,0.7,0.2")),
}


class Box(NamedTuple):
    """A square crop: its top left corner and side, in px."""

    x: int
    y: int
    side: int

    @classmethod
    def of(cls, text: str, size: tuple[int, int]) -> "Box":
        """X,Y,SIZE in shares of width, height and shorter side. Raises ValueError."""
        width, height = size
        try:
            x, y, side = map(float, text.split(","))
            box = cls(round(x * width), round(y * height), round(side * min(size)))
        except (ValueError, OverflowError):
            box = cls(-1, -1, 0)
        if (
            min(box[:2]) < 0
            or box.side < 1
            or box.x + box.side > width
            or box.y + box.side > height
        ):
            raise ValueError(
                f"--crops is {text!r}, expected X,Y,SIZE in shares of the side, within the picture"
            )
        return box


def add_flags(parser) -> None:
    parser.add_argument(
        "--crops",
        metavar="X,Y,SIZE",
        nargs="*",
        help=f"shares of width, height and the shorter side (default: {MIDDLE}; fig16 none)",
    )
    parser.add_argument(
        "--methods", metavar="NAME,...", nargs="+", help="side by side (default: the paper's)"
    )
    parser.add_argument(
        "--where",
        metavar="COLUMN=VALUE",
        nargs="+",
        help="of results.csv, as seed=1 (default: the largest size and the first seed)",
    )


def narrowed(rows: list[dict], where: list[str]) -> list[dict]:
    """The rows with these values; an empty one, as lambda_t of a static method, is with any."""
    known = [name for name in COLUMNS if name not in PLACES]
    for text in where:
        name, _, value = text.partition("=")
        if name not in known or not value:
            raise ValueError(f"--where is {text!r}, expected {', '.join(known)}, as seed=1")
        there = list(dict.fromkeys(one[name] for one in rows if one[name]))
        if value not in there:
            raise ValueError(f"--where is {text!r}, expected one of {', '.join(there) or 'none'}")
        rows = [one for one in rows if one[name] in ("", value)]
    largest = max((int(one["height"]) * int(one["width"]) for one in rows), default=0)
    rows = [one for one in rows if int(one["height"]) * int(one["width"]) == largest]
    return [one for one in rows if one["seed"] == rows[0]["seed"]]


def chosen(rows: list[dict], methods: list[str], prompts: int) -> list[list[dict]]:
    """For each of the first prompts, one row per method. Raises ValueError."""
    texts = list(dict.fromkeys(one["prompt"] for one in rows))[:prompts]
    grid = []
    for text in texts:
        line = []
        for method in methods:
            found = [one for one in rows if (one["method"], one["prompt"]) == (method, text)]
            if not found:
                raise ValueError(f"there is no picture of {method} for {text!r}")
            differ = [n for n in COLUMNS if n not in PLACES and len({one[n] for one in found}) > 1]
            if differ:
                several = ", ".join(dict.fromkeys(one[differ[0]] for one in found))
                raise ValueError(
                    f"there are pictures of {method} with {differ[0]} {several}; expected one of "
                    f"them by --where {differ[0]}={found[0][differ[0]]}"
                )
            line.append(found[0])
        grid.append(line)
    return grid


def picture_rows(name: str, folder: Path, crops=None, methods=None, where=()) -> Figure:
    """The pictures of one of the paper's figures, from results.csv. Raises ValueError."""
    shown = SHOWN[name]
    methods = [one for word in methods or shown.methods for one in word.split(",") if one]
    rows = [one for one in read_rows(folder) if not one["error"]]
    if not rows:
        raise ValueError(f"{folder} has no finished sweep, expected pictures and results.csv")
    missing = [m for m in methods if m not in {one["method"] for one in rows}]
    if missing:
        there = ", ".join(dict.fromkeys(one["method"] for one in rows))
        raise ValueError(
            f"{folder} has no picture of {missing[0]}, which {name} shows; it has {there}: draw "
            "the rest, or name others by --methods"
        )
    grid = chosen(narrowed(rows, where), methods, shown.prompts)
    return drawn(grid, folder, shown.crops if crops is None else crops)


def drawn(grid: list[list[dict]], folder: Path, crops) -> Figure:
    """A block per prompt: its words, the pictures, their crops below."""
    width = (style.DOUBLE - GAP * (len(grid[0]) + 1)) / len(grid[0])
    small = (width - GAP * (len(crops) - 1)) / max(1, len(crops))
    sizes = {tuple(int(one[side]) for side in ("height", "width")) for line in grid for one in line}
    aspect = max(high / wide for high, wide in sizes)
    block = LINE + GAP + width * aspect + (GAP + small if crops else 0) + 2 * GAP
    head = LINE + 2 * GAP
    made = Figure(figsize=(style.DOUBLE, head + block * len(grid)))
    for row, line in enumerate(grid):
        top, first = head + row * block, line[0]
        words = f"{first['prompt']}, seed {first['seed']}, {first['width']}x{first['height']}"
        words = textwrap.shorten(words, 110, placeholder=" ...")
        write(made, GAP, top + LINE, words, color="dimgrey")
        for column, one in enumerate(line):
            left, at = GAP + column * (width + GAP), top + LINE + GAP
            image, label = opened(folder / one["file"])
            if row == 0:
                write(made, left, head - GAP, label, weight="bold")
            boxes = [Box.of(text, image.size) for text in crops]
            axes = place(made, image, (left, at, width, width * aspect))
            for k, box in enumerate(boxes):
                corner = left + k * (small + GAP), at + width * aspect + GAP
                part = image.crop((box.x, box.y, box.x + box.side, box.y + box.side))
                frame(place(made, part, (*corner, small, small)), 0, 0, box.side, k, 3)
                frame(axes, *box, k, 1.2)
    return made


def write(made: Figure, left: float, bottom: float, text: str, **look) -> None:
    """Words, with their lower left corner so far from the figure's upper left one, inches."""
    width, height = made.get_size_inches()
    made.text(left / width, 1 - bottom / height, text, va="bottom", **look)


def place(made: Figure, image: Image.Image, where: tuple):
    """A picture in (left, top, width, height) inches; the axes count its own px."""
    left, top, width, height = where
    total = made.get_size_inches()
    spot = (left / total[0], 1 - (top + height) / total[1], width / total[0], height / total[1])
    axes = made.add_axes(spot)
    axes.set_axis_off()
    small = image.copy()
    small.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    axes.imshow(np.asarray(small), extent=(0, image.width, image.height, 0))
    return axes


def frame(axes, x: int, y: int, side: int, k: int, width: float) -> None:
    """The square of the k-th crop, its line `width` points wide, on white to be seen anywhere."""
    for colour, wide in (("white", width + 1.6), (FRAMES[k % len(FRAMES)], width)):
        axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=colour, linewidth=wide))


def opened(path: Path) -> tuple[Image.Image, str]:
    """A picture and its label, from the settings that it carries. Raises ValueError."""
    try:
        config = DyPEConfig.from_dict(records.load(path)["config"])
        image = records.read_png(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be shown: {error}") from error
    label = method_name(config.method, config.dype)
    if config.dype and METHOD_SCALES[config.method] is not None:
        label += rf", $\lambda_s$ {config.lambda_s:g}, $\lambda_t$ {config.dype_exponent:g}"
    return image, label


FIGURES = {name: partial(picture_rows, name) for name in SHOWN}
