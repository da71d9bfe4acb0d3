"""Figures of images in rows, with enlarged crops, from the folder of a finished sweep."""

from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dype.config import DyPEConfig, has_kappa
from dype.figures import style
from dype.sampling import records
from dype.sampling.crops import find_detail
from dype.sweep import labels
from dype.sweep.results import COLUMNS, read_rows

NOT_FILTERABLE = ("method", "prompt", "file", "seconds", "peak_memory", "error")
FILTERABLE = [name for name in COLUMNS if name not in NOT_FILTERABLE]  # columns of --where
FRAME_COLORS = (style.ORANGE, style.SKY, style.VERMILLION, style.GREEN)
GAP, LINE = 0.04, 0.14  # inches
MAX_PIXELS = 1000  # of a whole image's longer side
# figure -> methods from left to right, as in results.csv; number of prompts; number of crops
PAPER_FIGURES = {
    "fig1": ("base,yarn,dy_yarn", 1, 1),
    "fig3": ("yarn,dy_yarn", 2, 1),
    "fig4": ("ntk,dy_ntk,yarn,dy_yarn", 2, 1),
    "fig8": ("dy_tasr,dy_ntk", 2, 1),
    "fig9": ("base,yarn,dy_yarn", 2, 1),
    "fig12": ("yarn,dy_yarn", 2, 1),
    "fig16": ("ntk,dy_ntk,yarn,dy_yarn", 4, 0),
    "fig17": ("yarn,dy_yarn", 2, 3),
}


def crop_box(text: str, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return left, top and side of a square crop, px. Raise ValueError if it is not in the image.

    Args:
        text: X,Y,SIZE in shares of the width, the height and the shorter side.
        size: (width, height) of the image, px.
    """
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


def filter_rows(rows: list[dict], filters: list[str]) -> list[dict]:
    """Return the rows of the filters, of the largest size and of the first seed among them.

    An empty value, as the lambda_t of a static method, matches any filter.

    Args:
        rows: rows of results.csv.
        filters: COLUMN=VALUE texts of --where.

    Raises:
        ValueError: a filter has an unknown column or value.
    """
    for text in filters:
        name, _, value = text.partition("=")
        if name not in FILTERABLE or not value:
            raise ValueError(f"--where is {text!r}, expected {', '.join(FILTERABLE)}, as seed=1")
        values = list(dict.fromkeys(row[name] for row in rows if row[name]))
        if value not in values:
            raise ValueError(f"--where is {text!r}, expected one of {', '.join(values) or 'none'}")
        rows = [row for row in rows if row[name] in ("", value)]
    largest = max(int(row["height"]) * int(row["width"]) for row in rows)
    rows = [row for row in rows if int(row["height"]) * int(row["width"]) == largest]
    return [row for row in rows if row["seed"] == rows[0]["seed"]]


def select_grid(rows: list[dict], methods: list[str], prompts: int) -> list[list[dict]]:
    """Return one line per prompt, with one row per method.

    Args:
        rows: rows of results.csv.
        methods: methods from left to right.
        prompts: number of prompts, the first ones of `rows`.

    Raises:
        ValueError: a prompt has no image of a method, or several that differ in a setting.
    """
    grid = []
    for text in list(dict.fromkeys(row["prompt"] for row in rows))[:prompts]:
        line = []
        for method in methods:
            matches = [row for row in rows if (row["method"], row["prompt"]) == (method, text)]
            if not matches:
                raise ValueError(f"there is no image of {method} for {text!r}")
            for name in FILTERABLE:
                values = list(dict.fromkeys(row[name] for row in matches))
                if len(values) > 1:
                    raise ValueError(
                        f"there are images of {method} with {name} {', '.join(values)}; expected "
                        f"one of them by --where {name}={values[0]}"
                    )
            line.append(matches[0])
        grid.append(line)
    return grid


def image_rows_figure(name: str, folder: Path, crops=None, methods=None, filters=()) -> Figure:
    """Draw one of the paper's figures from a sweep.

    Args:
        name: a key of PAPER_FIGURES.
        folder: folder of a finished sweep.
        crops: X,Y,SIZE texts; None: as many as the figure has, pixel for pixel, where the edges
            are strongest.
        methods: lists of methods joined by commas; None: those of the figure.
        filters: COLUMN=VALUE texts.

    Raises:
        ValueError: the folder has no such images.
    """
    default_methods, prompts, default_crops = PAPER_FIGURES[name]
    methods = [word for text in methods or [default_methods] for word in text.split(",") if word]
    rows = [row for row in read_rows(folder) if not row["error"]]
    if not rows:
        raise ValueError(f"{folder} has no finished sweep, expected images and results.csv")
    existing = list(dict.fromkeys(row["method"] for row in rows))
    for method in methods:
        if method not in existing:
            raise ValueError(
                f"{folder} has no image of {method}, which {name} shows; it has "
                f"{', '.join(existing)}: generate the rest, or name others by --methods"
            )
    grid = select_grid(filter_rows(rows, filters), methods, prompts)
    return draw_grid(grid, folder, default_crops if crops is None else crops)


def find_boxes(images: list[Image.Image], count: int, inches: float) -> list[tuple]:
    """Return left, top and side of crops that show one pixel of the image per pixel.

    Args:
        images: images of one prompt.
        count: number of crops.
        inches: width of a crop in the figure.
    """
    side = min(round(inches * style.DPI), *(min(image.size) for image in images))
    if len({image.size for image in images}) > 1:  # which have no place in common
        return [((images[0].width - side) // 2, (images[0].height - side) // 2, side)] * count
    return [(*corner, side) for corner in find_detail(images, side, count)]


def draw_grid(grid: list[list[dict]], folder: Path, crops: list[str] | int) -> Figure:
    """Draw a block per prompt: the prompt, the images, and their crops below.

    Args:
        grid: rows of results.csv, a line per prompt, a column per method.
        folder: folder of the sweep.
        crops: X,Y,SIZE texts, or the number of crops of `find_boxes`.
    """
    width = (style.DOUBLE - GAP * (len(grid[0]) + 1)) / len(grid[0])
    count = crops if isinstance(crops, int) else len(crops)
    crop_width = (width - GAP * (count - 1)) / max(1, count)
    aspect = max(int(row["height"]) / int(row["width"]) for line in grid for row in line)
    block = LINE + GAP + width * aspect + (GAP + crop_width if crops else 0) + 2 * GAP
    head = 2 * LINE + 2 * GAP
    height = head + block * len(grid)
    figure = Figure(figsize=(style.DOUBLE, height))
    inches = {"transform": figure.dpi_scale_trans, "va": "bottom"}  # from the lower left corner
    for line_index, line in enumerate(grid):
        top, first = head + line_index * block, line[0]
        caption = f"{first['prompt']}, seed {first['seed']}, {first['width']}x{first['height']}"
        caption = cut_caption(caption, 110)
        figure.text(GAP, height - top - LINE, caption, **inches, color="dimgray", parse_math=False)
        pairs = [open_with_config(folder / row["file"]) for row in line]
        boxes = []
        if isinstance(crops, int) and crops:
            boxes = find_boxes([image for image, _ in pairs], count, crop_width)
        for column, (image, config) in enumerate(pairs):
            left, image_top = GAP + column * (width + GAP), top + LINE + GAP
            if line_index == 0:
                form, name = column_title(config)
                figure.text(left, height - LINE, form, **inches, weight="bold")
                figure.text(left, height - 2 * LINE, name, **inches)
            axes = place_image(figure, image, left, image_top, width, width * aspect)
            texts = [] if isinstance(crops, int) else crops
            for k, (x, y, side) in enumerate(boxes or [crop_box(t, image.size) for t in texts]):
                crop = image.crop((x, y, x + side, y + side))
                corner = left + k * (crop_width + GAP), image_top + width * aspect + GAP
                crop_axes = place_image(figure, crop, *corner, crop_width, crop_width)
                draw_frame(crop_axes, (0, 0, side), k, 3)
                draw_frame(axes, (x, y, side), k, 1.2)
    return figure


def cut_caption(text: str, letters: int) -> str:
    """Cut a text to a number of letters; letters that the font lacks are escapes."""
    path = font_manager.findfont(font_manager.FontProperties())
    texts = [
        labels.show_letter(letter, labels.has_letter(path, letter))
        for letter in " ".join(text.split())
    ]
    if len("".join(texts)) <= letters:
        return "".join(texts)
    count = sum(end <= letters - 4 for end in accumulate(map(len, texts)))
    return "".join(texts[:count]).rstrip() + " ..."


def place_image(
    figure: Figure, image: Image.Image, left: float, top: float, width: float, height: float
):
    """Add an image to a figure and return its axes, which count the image's px.

    Args:
        figure: figure to draw on.
        image: any size; drawn with at most MAX_PIXELS a side.
        left: inches from the left edge of the figure.
        top: inches from the upper edge.
        width: inches.
        height: inches.
    """
    total_width, total_height = figure.get_size_inches()
    bottom = 1 - (top + height) / total_height
    axes = figure.add_axes((left / total_width, bottom, width / total_width, height / total_height))
    axes.set_axis_off()
    thumbnail = image.copy()
    thumbnail.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.LANCZOS)
    axes.imshow(np.asarray(thumbnail), extent=(0, image.width, image.height, 0))
    return axes


def draw_frame(axes, box: tuple[int, int, int], k: int, line_width: float) -> None:
    """Draw the frame of a crop, on a white line that stands out from any image.

    Args:
        axes: axes of an image.
        box: left, top, side, px.
        k: index of the crop, which says the color.
        line_width: points.
    """
    x, y, side = box
    color = FRAME_COLORS[k % len(FRAME_COLORS)]
    for edge, width in (("white", line_width + 1.6), (color, line_width)):
        axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=edge, linewidth=width))


def open_with_config(path: Path) -> tuple[Image.Image, DyPEConfig]:
    """Return an image and the config in its record. Raise ValueError if it has none."""
    try:
        config = DyPEConfig.from_dict(records.find_record(path)[0]["config"])
        return records.open_image(path), config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be shown: {error}") from error


def column_title(config: DyPEConfig) -> tuple[str, str]:
    """Return "stock", "static" or "with DyPE", and the method with lambdas that are not default."""
    form = "stock" if config.method == "base" else "with DyPE" if config.dype else "static"
    name, default = config.name, DyPEConfig(config.method)
    if form == "with DyPE" and has_kappa(config.to_dict()):
        if config.lambda_s != default.lambda_s:
            name += rf", $\lambda_s$ {config.lambda_s:g}"
        if config.dype_exponent != default.dype_exponent:
            name += rf", $\lambda_t$ {config.dype_exponent:g}"
    return form, name


FIGURES = {name: partial(image_rows_figure, name) for name in PAPER_FIGURES}
