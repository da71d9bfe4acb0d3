"""Rows of images with enlarged crops, from a finished sweep's folder."""

import textwrap
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dype.config import DEFAULT_LAMBDA_S, DyPEConfig
from dype.figures import style
from dype.sampling import records
from dype.sweep.results import COLUMNS, read_rows

MIDDLE = "0.4,0.4,0.2"
CORNERS = ("method", "prompt", "file", "seconds", "peak_memory", "error")  # no filters
FILTERS = [name for name in COLUMNS if name not in CORNERS]  # of --where
FRAMES = (style.ORANGE, style.SKY, style.VERMILLION, style.GREEN)
GAP, LINE = 0.04, 0.14  # inches
PIXELS = 1000  # of a whole image's longer side, at most
PAPER_FIGURES = {  # the methods side by side, as in results.csv; prompts one above the other; crops
    "fig1": ("base,yarn,dy_yarn", 1, [MIDDLE]),
    "fig3": ("yarn,dy_yarn", 2, [MIDDLE]),
    "fig4": ("ntk,dy_ntk,yarn,dy_yarn", 2, [MIDDLE]),
    "fig8": ("dy_tasr,dy_ntk", 2, [MIDDLE]),
    "fig9": ("base,yarn,dy_yarn", 2, [MIDDLE]),
    "fig12": ("yarn,dy_yarn", 2, [MIDDLE]),
    "fig16": ("ntk,dy_ntk,yarn,dy_yarn", 4, []),
    "fig17": ("yarn,dy_yarn", 2, ["0.1,0.1,0.2", MIDDLE, "0.7,0.7,0.2"]),
}


def crop_box(text: str, size: tuple[int, int]) -> tuple[int, int, int]:
    """X,Y,SIZE in shares of width, height and shorter side: the top left corner and the side of a
    square, px. Raises ValueError."""
    width, height = size
    try:
        x, y, side = map(float, text.split(","))
        x, y, side = round(x * width), round(y * height), round(side * min(size))
    except (ValueError, OverflowError):
        x = y = side = 0
    if min(x, y) < 0 or side < 1 or x + side > width or y + side > height:
        raise ValueError(
            f"--crops is {text!r}, expected X,Y,SIZE in shares of the side, within the image"
        )
    return x, y, side


def filter_rows(rows: list[dict], where: list[str]) -> list[dict]:
    """The rows with these values; an empty one, as lambda_t of a static method, is with any."""
    for text in where:
        name, _, value = text.partition("=")
        if name not in FILTERS or not value:
            raise ValueError(f"--where is {text!r}, expected {', '.join(FILTERS)}, as seed=1")
        there = list(dict.fromkeys(one[name] for one in rows if one[name]))
        if value not in there:
            raise ValueError(f"--where is {text!r}, expected one of {', '.join(there) or 'none'}")
        rows = [one for one in rows if one[name] in ("", value)]
    largest = max(int(one["height"]) * int(one["width"]) for one in rows)
    rows = [one for one in rows if int(one["height"]) * int(one["width"]) == largest]
    return [one for one in rows if one["seed"] == rows[0]["seed"]]


def select_grid(rows: list[dict], methods: list[str], prompts: int) -> list[list[dict]]:
    """For each of the first prompts, one row per method. Raises ValueError."""
    grid = []
    for text in list(dict.fromkeys(one["prompt"] for one in rows))[:prompts]:
        line = []
        for method in methods:
            found = [one for one in rows if (one["method"], one["prompt"]) == (method, text)]
            if not found:
                raise ValueError(f"there is no image of {method} for {text!r}")
            for name in FILTERS:
                values = list(dict.fromkeys(one[name] for one in found))
                if len(values) > 1:
                    raise ValueError(
                        f"there are images of {method} with {name} {', '.join(values)}; expected "
                        f"one of them by --where {name}={values[0]}"
                    )
            line.append(found[0])
        grid.append(line)
    return grid


def image_rows_figure(name: str, folder: Path, crops=None, methods=None, where=()) -> Figure:
    """The images of one of the paper's figures, from results.csv. Raises ValueError."""
    usual, prompts, usual_crops = PAPER_FIGURES[name]
    methods = [one for word in methods or [usual] for one in word.split(",") if one]
    rows = [one for one in read_rows(folder) if not one["error"]]
    if not rows:
        raise ValueError(f"{folder} has no finished sweep, expected images and results.csv")
    there = list(dict.fromkeys(one["method"] for one in rows))
    for method in methods:
        if method not in there:
            raise ValueError(
                f"{folder} has no image of {method}, which {name} shows; it has "
                f"{', '.join(there)}: draw the rest, or name others by --methods"
            )
    grid = select_grid(filter_rows(rows, where), methods, prompts)
    return draw_grid(grid, folder, usual_crops if crops is None else crops)


def draw_grid(grid: list[list[dict]], folder: Path, crops: list[str]) -> Figure:
    """A block per prompt: its words, the images, their crops below."""
    width = (style.DOUBLE - GAP * (len(grid[0]) + 1)) / len(grid[0])
    small = (width - GAP * (len(crops) - 1)) / max(1, len(crops))
    aspect = max(int(one["height"]) / int(one["width"]) for line in grid for one in line)
    block = LINE + GAP + width * aspect + (GAP + small if crops else 0) + 2 * GAP
    head = LINE + 2 * GAP
    height = head + block * len(grid)
    made = Figure(figsize=(style.DOUBLE, height))
    inches = {"transform": made.dpi_scale_trans, "va": "bottom"}  # from the lower left corner
    for row, line in enumerate(grid):
        top, first = head + row * block, line[0]
        words = f"{first['prompt']}, seed {first['seed']}, {first['width']}x{first['height']}"
        words = textwrap.shorten(words, 110, placeholder=" ...")
        made.text(GAP, height - top - LINE, words, **inches, color="dimgray")
        for column, one in enumerate(line):
            left, at = GAP + column * (width + GAP), top + LINE + GAP
            image, label = open_with_label(folder / one["file"])
            if row == 0:
                made.text(left, height - head + GAP, label, **inches, weight="bold")
            axes = place_image(made, image, left, at, width, width * aspect)
            for k, text in enumerate(crops):
                x, y, side = crop_box(text, image.size)
                part = image.crop((x, y, x + side, y + side))
                corner = left + k * (small + GAP), at + width * aspect + GAP
                frame(place_image(made, part, *corner, small, small), 0, 0, side, k, 3)
                frame(axes, x, y, side, k, 1.2)
    return made


def place_image(
    made: Figure, image: Image.Image, left: float, top: float, width: float, height: float
):
    """An image, its upper left corner so far from the figure's, inches; the axes count its px."""
    across, down = made.get_size_inches()
    axes = made.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
    axes.set_axis_off()
    small = image.copy()
    small.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    axes.imshow(np.asarray(small), extent=(0, image.width, image.height, 0))
    return axes


def frame(axes, x: int, y: int, side: int, k: int, width: float) -> None:
    """The square of the k-th crop, its line `width` points wide, on white to be seen anywhere."""
    for color, wide in (("white", width + 1.6), (FRAMES[k % len(FRAMES)], width)):
        axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=color, linewidth=wide))


def open_with_label(path: Path) -> tuple[Image.Image, str]:
    """An image and its label, from the settings that it carries. Raises ValueError."""
    try:
        config = DyPEConfig.from_dict(records.read_record(path)["config"])
        image = records.read_png(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be shown: {error}") from error
    label = config.name
    if config.dype and DEFAULT_LAMBDA_S[config.method] is not None:
        label += rf", $\lambda_s$ {config.lambda_s:g}, $\lambda_t$ {config.dype_exponent:g}"
    return image, label


FIGURES = {name: partial(image_rows_figure, name) for name in PAPER_FIGURES}
