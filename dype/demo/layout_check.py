"""Check by analysis whether an image shows the scene of its caption; validated on rendered truth.

The image, of any size and aspect, is averaged to a grid of 64 x 64 cells. Each cell gets the
palette color that is nearest in chromaticity, because leaves and light change little but
brightness. The cells of the object's color are compared with outlines of every shape.
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
GROUNDED = 0.85  # least share of the ground's color among cells without the object's color


class Verdict(NamedTuple):
    """Result of the check of one image."""

    layout: bool  # one connected object of its color near the center of the ground
    shape: str  # the shape that overlaps best
    overlaps: dict[str, float]  # intersection over union with every shape, at its best place


def color_cells(image: np.ndarray) -> np.ndarray:
    """Return the index into COLORS of each cell, int [CELLS, CELLS], of uint8 [H, W, 3]."""
    small = Image.fromarray(image).resize((CELLS, CELLS), Image.Resampling.BOX)
    rgb = np.asarray(small, float) + 1e-6
    palette = np.array(list(COLORS.values()), float)
    chroma = rgb / rgb.sum(-1, keepdims=True)
    reference = palette / palette.sum(-1, keepdims=True)
    return np.linalg.norm(chroma[:, :, None] - reference, axis=-1).argmin(-1)


@lru_cache
def templates() -> np.ndarray:
    """Return masks of every shape at many places and sizes, float32 [shape, variant, cells]."""
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
    """Return the largest IoU of a boolean [CELLS, CELLS] mask with each shape."""
    shapes = templates()
    common = shapes @ mask.ravel().astype(np.float32)
    best = (common / (shapes.sum(-1) + mask.sum() - common)).max(-1)
    return dict(zip(SHAPES, best.tolist(), strict=True))


def check(image: np.ndarray, color: str, ground: str) -> Verdict:
    """Check an image against the colors of its caption.

    Args:
        image: uint8 [H, W, 3]; if it is not square, its object should be stretched with it.
        color: key of COLORS, of the object.
        ground: key of COLORS.
    """
    cells = color_cells(image)
    names = list(COLORS)
    object_cells = cells == names.index(color)
    pieces, count = ndimage.label(object_cells)
    if count == 0:
        return Verdict(False, "", dict.fromkeys(SHAPES, 0.0))
    sizes = ndimage.sum_labels(object_cells, pieces, range(1, count + 1))
    mask = pieces == 1 + sizes.argmax()
    centroid = (np.argwhere(mask).mean(0) + 0.5) / CELLS
    layout = (
        AREA[0] <= mask.mean() <= AREA[1]
        and mask.sum() >= CONNECTED * object_cells.sum()
        and abs(centroid - 0.5).max() <= CENTERED
        and (cells[~object_cells] == names.index(ground)).mean() >= GROUNDED
    )
    ious = overlaps(mask)
    return Verdict(bool(layout), max(ious, key=ious.get), ious)
