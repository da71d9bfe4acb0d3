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
STYLE |= {"savefig.dpi": 200}  # STYLE is for matplotlib's rc_context
# Okabe and Ito
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GRAY = "#0072B2", "#D55E00", "#CC79A7", "#888888"
COLOR_BAR = {"aspect": 30, "pad": 0.02}
FORMATS = (".png", ".pdf", ".svg", ".jpg")


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
        palette: reduce a PNG to 256 colors, enough for lines and maps; a third of the bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    if palette and path.suffix.lower() == ".png":
        with Image.open(path) as image:
            quantized = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        quantized.save(path, optimize=True)
