"""What all figures share: column widths, fonts, colors that the color-blind tell apart."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

SINGLE, DOUBLE = 3.3, 6.9  # inches: the columns of a paper
EIGHT = ("font.size", "axes.titlesize", "figure.titlesize", "figure.labelsize")  # points
SEVEN = ("xtick.labelsize", "ytick.labelsize", "legend.fontsize")
THIN = ("axes.linewidth", "xtick.major.width", "ytick.major.width")
STYLE = dict.fromkeys(EIGHT, 8) | dict.fromkeys(SEVEN, 7) | dict.fromkeys(THIN, 0.6)
STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
STYLE |= {"legend.handlelength": 1.8, "lines.linewidth": 1.3, "pdf.fonttype": 42}
STYLE |= {"savefig.dpi": 200}  # all of matplotlib's rc_context
# Okabe and Ito
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GRAY = "#0072B2", "#D55E00", "#CC79A7", "#888888"
BAR = {"aspect": 30, "pad": 0.02}  # of colors
FORMATS = (".png", ".pdf", ".svg", ".jpg")


def subplots(width: float, height: float, rows: int = 1, columns: int = 1, **more) -> tuple:
    """A figure, inches, and its axes; not one of pyplot's, which would stay in memory."""
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, **more)


def noise_axis(axes) -> None:
    """t runs from noise to image, as sampling does."""
    axes.set(xlim=(1, 0), xlabel="t = sigma (1: noise)")


def frequency_axis(axis, lowest: float) -> None:
    """Log scale, with ticks at 1, 2 and 5 where the range is short."""
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if lowest > 0.02 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def bin_edges(middles) -> np.ndarray:
    """The borders of cells around `middles`, [n] -> [n + 1]."""
    between = (middles[1:] + middles[:-1]) / 2
    return np.array([2 * middles[0] - between[0], *between, 2 * middles[-1] - between[-1]])


def sigma_color(t: float):
    """The color of a noise level: dark is noise, yellow the image."""
    return colormaps["viridis"](0.95 * (1 - t))


def save(made: Figure, path: Path, palette: bool = True) -> None:
    """Write PNG, PDF, SVG or JPEG, by the suffix. Raises OSError.

    palette: a PNG has 256 colors, enough for lines and maps and a third of the bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path)
    if palette and path.suffix.lower() == ".png":
        with Image.open(path) as picture:
            small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
