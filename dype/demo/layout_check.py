"""Does an image show what its caption says? An analytic check, validated on rendered truth.

The image is averaged down to a grid of 64 x 64 cells, whatever its size and its aspect; every
cell is named by the nearest palette color in chromaticity (leaves and light change brightness
alone, nearly), and the cells are compared with the scene's outlines.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from dype.demo.scenes import COLORS, SHAPES, Scene, outline

CELLS = 64
AREA = (0.04, 0.40)  # of the object, share of the image (truth: 0.09 to 0.36)
CONNECTED = 0.9  # share of the object's color that its largest piece must hold
CENTERED = 0.15  # largest distance of the centroid from the middle, per axis
GROUNDED = 0.85  # share of the rest that must have the ground's color


class Verdict(NamedTuple):
    layout: bool  # one connected object of the asked color near the center of the asked ground
    shape: str  # the shape that overlaps best
    overlaps: dict[str, float]  # intersection over union with every shape, at its best place


def color_cells(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> int [CELLS, CELLS], indices into COLORS."""
    small = Image.fromarray(picture).resize((CELLS, CELLS), Image.Resampling.BOX)
    rgb = np.asarray(small, float) + 1e-6
    palette = np.array(list(COLORS.values()), float)
    chroma = rgb / rgb.sum(-1, keepdims=True)
    known = palette / palette.sum(-1, keepdims=True)
    return np.linalg.norm(chroma[:, :, None] - known, axis=-1).argmin(-1)


@lru_cache
def templates() -> np.ndarray:
    """Every shape at plausible places and sizes, float32 [shape, variant, CELLS * CELLS]."""
    places = np.linspace(0.36, 0.64, 10)
    masks = [
        outline(Scene(shape, "", "", "", 0, x, y, radius, 0), CELLS)
        for shape in SHAPES
        for radius in np.linspace(0.2, 0.38, 10)
        for x in places
        for y in places
    ]
    return np.stack(masks).astype(np.float32).reshape(len(SHAPES), -1, CELLS * CELLS) / 255


def overlaps(mask: np.ndarray) -> dict[str, float]:
    """The largest intersection over union of a boolean [CELLS, CELLS] mask with each shape."""
    shapes = templates()
    common = shapes @ mask.ravel().astype(np.float32)
    found = (common / (shapes.sum(-1) + mask.sum() - common)).max(-1)
    return dict(zip(SHAPES, found.tolist(), strict=True))


def check(picture: np.ndarray, color: str, ground: str) -> Verdict:
    """Judge an image against the colors that its caption asked for.

    The object of one that is not square is expected stretched with it.
    """
    cells = color_cells(picture)
    names = list(COLORS)
    wanted = cells == names.index(color)
    pieces, count = ndimage.label(wanted)
    if count == 0:
        return Verdict(False, "", dict.fromkeys(SHAPES, 0.0))
    sizes = ndimage.sum_labels(wanted, pieces, range(1, count + 1))
    mask = pieces == 1 + sizes.argmax()
    centroid = (np.argwhere(mask).mean(0) + 0.5) / CELLS
    layout = (
        AREA[0] <= mask.mean() <= AREA[1]
        and mask.sum() >= CONNECTED * wanted.sum()
        and abs(centroid - 0.5).max() <= CENTERED
        and (cells[~wanted] == names.index(ground)).mean() >= GROUNDED
    )
    found = overlaps(mask)
    return Verdict(bool(layout), max(found, key=found.get), found)
