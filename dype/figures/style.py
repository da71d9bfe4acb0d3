"""Style of all figures: column widths, fonts, and colors for color-blind readers."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

SINGLE, DOUBLE = 3.3, 6.9  # inches; column widths of a paper
EIGHT = ("font.size", "axes.titlesize", "figure.titlesize", "figure.labelsize")  # points
SEVEN = ("xtick.labelsize", "ytick.labelsize", "legend.fontsize")
THIN = ("axes.linewidth", "xtick.major.width", "ytick.major.width")
STYLE = dict.fromkeys(EIGHT, 8) | dict.fromkeys(SEVEN, 7) | dict.fromkeys(THIN, 0.6)
STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
STYLE |= {"legend.handlelength": 1.8, "lines.linewidth": 1.3, "pdf.fonttype": 42}
DPI = 200
STYLE |= {"savefig.dpi": DPI}  # STYLE is for matplotlib's rc_context
# Okabe and Ito
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GRAY = "#0072B2", "#D55E00", "#CC79A7", "#888888"
# One color and one marker per method in all figures; `method_style` has the form of the lines.
# fmt: off
METHOD_COLORS = {
    "base": BLACK, "pi": ORANGE, "ntk": BLUE, "ntk_mult": SKY, "tasr": VERMILLION, "yarn": GREEN,
    "yarn_ntk_only": "#999933", "yarn_both": "#44AA99", "yarn_power": "#117733",
    "yarn_paper": PURPLE, "vision_yarn": "#AA4499", "tide": "#332288", "sega": "#882255",
    "imax": "#6699CC", "rdfc": "#8B5A2B", "riflex": "#C9B037", "resonance": "#661100",
    "cutoff": "#EE3377",
}
METHOD_MARKERS = {
    "base": "x", "pi": "s", "ntk": "o", "ntk_mult": "P", "tasr": "D", "yarn": "^",
    "yarn_ntk_only": "<", "yarn_both": ">", "yarn_power": "h", "yarn_paper": "v",
    "vision_yarn": "X", "tide": "*", "sega": "d", "imax": "o", "rdfc": "s", "riflex": "D",
    "resonance": "^", "cutoff": "d",
}
# fmt: on
SPARE_MARKERS = "p8H"  # of methods with another lambda
COLOR_BAR = {"aspect": 30, "pad": 0.02}
FORMATS = (".png", ".pdf", ".svg", ".jpg")


def method_style(setting: str) -> dict:
    """Return color, line and marker of a setting's method: with DyPE a line, static dashes.

    setting: name such as dy_yarn or yarn, which a colon and more may follow.
    """
    name = setting.partition(":")[0]
    method = name.removeprefix("dy_")
    is_dashed = name == method and method != "base"
    return {
        "color": METHOD_COLORS.get(method, GRAY),
        "linestyle": "--" if is_dashed else "-",
        "marker": METHOD_MARKERS.get(method, "p"),
    }


def subplots(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple:
    """Return a figure and its axes.

    The figure is not one of pyplot's, which stay in memory.

    Args:
        width: inches.
        height: inches.
        rows: rows of axes.
        columns: columns of axes.
        options: options of `Figure.subplots`.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def set_sigma_axis(axes) -> None:
    """Let t on the x axis run from noise to image, as in sampling."""
    axes.set(xlim=(1, 0), xlabel="t = sigma (1: noise)")


def set_frequency_axis(axis, lowest: float) -> None:
    """Set ticks of a log axis; a short range has ticks at 1, 2 and 5 of every decade."""
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if lowest > 0.02 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def bin_edges(centers) -> np.ndarray:
    """Return the edges of bins around their centers, [n] -> [n + 1]."""
    between = (centers[1:] + centers[:-1]) / 2
    return np.array([2 * centers[0] - between[0], *between, 2 * centers[-1] - between[-1]])


def sigma_color(t: float):
    """Return the color of a sigma, from dark for noise to yellow for the image."""
    return colormaps["viridis"](0.95 * (1 - t))


def save(figure: Figure, path: Path, palette: bool = True) -> None:
    """Write a figure. Raises OSError.

    Args:
        figure: figure to write.
        path: file; its suffix, one of FORMATS, says the format.
        palette: it shows lines and maps: cut its empty margins, and reduce a PNG to 256 colors,
            a third of the bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A figure of images has its own margins, and one pixel of a crop per pixel.
    box = {"bbox_inches": "tight", "pad_inches": 0.06} if palette else {}
    figure.savefig(path, **box)
    if palette and path.suffix.lower() == ".png":
        with Image.open(path) as image:
            quantized = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        quantized.save(path, optimize=True)
