"""Check by analysis whether an image shows the landscape of its caption; validated on truth.

The image, of any size and aspect, is averaged to a grid of 128 x 128 cells. The sun is compared
with a disk, each row with the next (the horizon), and a lake with what is above it. Regions are
compared with those of small renderings. Cover, clouds, pines and birds are not judged.
"""

from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from dype.demo.drawing import PINE, render
from dype.demo.scenes import (
    COVERS,
    GROUNDS,
    HEIGHTS,
    HILLS,
    SKIES,
    SUNS,
    TIMES,
    Scene,
    sample_scene,
)

CELLS = 128
SUN_TOLERANCE = 45  # of the sun's color (RGB distance; truth: the sky is 51 away, or more)
LEAST_SUN = 8  # cells; diameter of another sun near the mountains
SUN_ROWS = 46  # cells from the top that no mountain reaches
SUN_X = (0.325, 0.675)  # of the sun's center (truth: 0.34 to 0.66)
SUN_RADIUS = (0.062, 0.088)  # (truth: 0.065 to 0.085)
SUN_SLACK = 0.015  # added to both ends of HEIGHTS
LEAST_OVERLAP = 0.8  # of the sun with a disk (truth: 0.94 or more)
LARGEST_SPECK = 8  # cells of a sun's color in the rest of the sky (truth: 0)
BORDERS = range(50, 110)  # rows of the search for a border that is out of its place
AXES = range(78, 88)  # rows below which the ground may begin (truth: 79.4 to 84.5)
LEAST_EDGE = 2.5  # contrast of the horizon with the rows about it, at noon (truth: 4.6 or more)
LEAST_STEP = 15  # of color at the horizon of land, at noon (truth: 25 or more)
LEAST_SHORE = 6  # the same of a lake (truth: 10 or more)
LARGEST_STEP = 36, 15  # above and below the horizon, at noon (truth: 0.99 below 12, 13)
LARGEST_SHARE = 0.2  # of the step at the horizon, that another below may have in any case
MIRROR_ROWS = 34  # cells from the horizon; mountains reach so far
LEAST_MIRROR = 0.8  # correlation of a lake's rows with those above it (truth: 0.9 or more)
PINE_TOLERANCE = 12
COLOR_TOLERANCE = {"sky": 50, "mountains": 60, "ground": 40}  # RGB; truth: 40, 46, 26
PER_LAND = 6  # renderings for each time, color and cover of the mountains


class Verdict(NamedTuple):
    """Result of the check of one image; an attribute that was not asked for is right."""

    layout: bool  # all below
    overlap: float  # IoU of the sun with a disk where and as large as scenes have it
    sun: bool  # one in the sky, of its color, round, in its place
    horizon: bool  # one straight border, where scenes have it
    sky: bool  # colors of the time
    mountains: bool  # their color
    ground: bool  # colors of the ground
    mirror: bool  # a lake has the colors above it, in mirrored order
    border: float  # height of the strongest straight border, wherever it is; 0: top, 1: bottom


PARTS = ("sun", "horizon", "sky", "mountains", "ground", "mirror")


def average_cells(image: np.ndarray) -> np.ndarray:
    """Return the mean colors of a grid, float32 [CELLS, CELLS, 3], of uint8 [H, W, 3]."""
    small = Image.fromarray(image).resize((CELLS, CELLS), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def color_distance(cells: np.ndarray, color) -> np.ndarray:
    """Return the distance of each cell from a color, [CELLS, CELLS]."""
    return np.linalg.norm(cells - np.asarray(color, np.float32), axis=-1)


def disk(x: float, y: float, radius: float) -> np.ndarray:
    """Return the cells of a disk, bool [CELLS, CELLS]; lengths in units of the side."""
    centers = (np.arange(CELLS) + 0.5) / CELLS
    return np.hypot(centers - x, centers[:, None] - y) < radius


def fit_disk(region: np.ndarray, heights) -> tuple[float, float, float, float]:
    """Return the IoU with a region, and x, y and radius, of the disk of its centroid and area.

    Args:
        region: bool [CELLS, CELLS]; the disk is that of its largest piece.
        heights: (lowest, highest) y of the disk. Its x and radius are limited, too.
    """
    pieces, count = ndimage.label(region)
    sizes = ndimage.sum_labels(region, pieces, range(1, count + 1))
    piece = pieces == 1 + np.argmax(sizes)
    y, x = (np.argwhere(piece).mean(0) + 0.5) / CELLS
    x, y = np.clip(x, *SUN_X), np.clip(y, heights[0] - SUN_SLACK, heights[1] + SUN_SLACK)
    radius = np.clip(np.sqrt(piece.mean() / np.pi), *SUN_RADIUS)
    mask = disk(x, y, radius)
    return float((mask & region).sum() / (mask | region).sum()), x, y, radius


def find_sun(cells: np.ndarray, color: str, height: str) -> tuple[float, float, float, float]:
    """Return the overlap of the sun with a disk, and x, y and radius of the disk; 0s without it.

    Args:
        cells: [CELLS, CELLS, 3].
        color: key of SUNS.
        height: key of HEIGHTS; "": any.
    """
    sky = np.arange(CELLS)[:, None] < SUN_ROWS
    color = SUNS[color]
    for _ in range(2):  # the second time with the image's own color
        region = sky & (color_distance(cells, color) < SUN_TOLERANCE)
        if not region.any():
            return 0.0, 0.0, 0.0, 0.0
        color = np.median(cells[region], 0)
    return max(fit_disk(region, HEIGHTS[h]) for h in ([height] if height else HEIGHTS))


def has_other_sun(cells: np.ndarray, x: float, y: float, radius: float, horizon: int) -> bool:
    """Return whether the image has a sun of any color outside a disk.

    Below SUN_ROWS, where snow, haze and glitter may have a sun's color, only a round piece is one.

    Args:
        cells: [CELLS, CELLS, 3].
        x: center of the disk, in units of the side.
        y: the same.
        radius: of the disk.
        horizon: row that the ground begins at.
    """
    outside = ~disk(x, y, radius + 2 / CELLS)
    outside[horizon - 1 : horizon + 1] = False  # a bright shore joins no pieces
    for color in SUNS.values():
        similar = outside & (color_distance(cells, color) < SUN_TOLERANCE)
        if similar[:SUN_ROWS].sum() > LARGEST_SPECK:
            return True
        pieces, _ = ndimage.label(similar)
        for number, (rows, columns) in enumerate(ndimage.find_objects(pieces), 1):
            piece = pieces[rows, columns] == number
            sides = piece.shape
            if (
                min(sides) > LEAST_SUN
                and max(sides) < 1.2 * min(sides)
                and 0.72 < piece.mean() < 0.9
            ):
                return True
    return False


def find_pines(cells: np.ndarray, time: str) -> np.ndarray:
    """Return the cells of pines and their edges, bool [CELLS, CELLS]."""
    pine = np.array(PINE) * TIMES[time][3] * 1.1
    return ndimage.binary_dilation(color_distance(cells, pine) < PINE_TOLERANCE, np.ones((3, 3)))


def find_mirror(cells: np.ndarray, usable: np.ndarray) -> tuple[float, int]:
    """Return how well a lake mirrors the colors above it, and the row that it begins at.

    The first number is the correlation of the mean colors of rows above and below, at the best of
    AXES. Ridges are not compared one by one.

    Args:
        cells: [CELLS, CELLS, 3].
        usable: cells that count, bool [CELLS, CELLS].
    """
    weights = usable[..., None]
    rows = (cells * weights).sum(1) / np.maximum(weights.sum(1), 1)

    def correlate(axis: int) -> float:
        above = rows[axis - MIRROR_ROWS : axis - 2][::-1]
        below = rows[axis + 2 : axis + MIRROR_ROWS]
        a, b = above - above.mean(0), below - below.mean(0)
        return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-6))

    return max((correlate(axis), axis) for axis in AXES)


def border_strengths(cells: np.ndarray, pines: np.ndarray) -> np.ndarray:
    """Return the color step above each row that three quarters of the columns have, [CELLS]."""
    steps = np.diff(cells, axis=0)
    middle = np.median(steps, 1)
    size = np.linalg.norm(middle, axis=-1, keepdims=True)
    along = np.einsum("yxc,yc->yx", steps, middle / np.maximum(size, 1e-6))
    along = np.where(pines[1:] | pines[:-1], size, along)
    return np.concatenate([[0], np.quantile(along, 0.25, axis=1)])


def has_single_horizon(cells: np.ndarray, borders: np.ndarray, horizon: int) -> bool:
    """Return whether the horizon has an edge, and no other row has a step of color."""
    edges = np.median(cells[1:-1] - (cells[2:] + cells[:-2]) / 2, 1)
    edge = np.linalg.norm(edges, axis=-1)[horizon - 3 : horizon + 2].max()
    above, below = borders[: horizon - 4].max(), borders[horizon + 5 : -2].max()
    limit = max(LARGEST_STEP[1], LARGEST_SHARE * borders[horizon])
    return bool(edge > LEAST_EDGE and above < LARGEST_STEP[0] and below < limit)


def region_colors(cells: np.ndarray, horizon: int, usable: np.ndarray) -> dict[str, np.ndarray]:
    """Return median colors of the sky, the mountains and the ground, each [strips, 3]."""

    def median(top: float, bottom: float, darkest: float = 1) -> np.ndarray:
        rows = slice(round(top), max(round(bottom), round(top) + 1))
        part = cells[rows][usable[rows]] if usable[rows].any() else cells[rows].reshape(-1, 3)
        light = part.sum(-1)
        return np.median(part[light <= np.quantile(light, darkest)], 0)

    h, depth = horizon, CELLS - horizon
    return {
        # the darkest cells, which are neither clouds nor glow
        "sky": np.stack(
            [median(a * h, b * h, 0.3) for a, b in ((0, 0.15), (0.3, 0.45), (0.45, 0.56))]
        ),
        "mountains": median(h - 4, h - 1, 0.25)[None],  # of the nearest ridge
        "ground": np.stack(
            [
                median(h + d * depth, h + (d + 0.15) * depth)
                for d in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
            ]
        ),
    }


@lru_cache
def references() -> tuple[list[Scene], dict[str, np.ndarray]]:
    """Return scenes of all kinds, and the colors of their regions, each [scenes, strips, 3]."""
    rng, scenes, colors = np.random.default_rng(0), [], []
    for time, hills, cover in product(TIMES, HILLS, COVERS):
        for i in range(PER_LAND):
            color, sky, ground = list(SUNS)[i % 4], SKIES[i // 2 % 2], list(GROUNDS)[i % 3]
            kinds = {"color": color, "sky": sky, "ground": ground, "extra": ""}
            scene = replace(sample_scene(rng), time=time, hills=hills, cover=cover, **kinds)
            cells = average_cells(render(scene, CELLS))
            scenes.append(scene)
            horizon = round(scene.horizon * CELLS)
            colors.append(region_colors(cells, horizon, np.ones((CELLS, CELLS), bool)))
    return scenes, {part: np.stack([c[part] for c in colors]) for part in colors[0]}


def nearest(colors: dict, part: str, attribute: str, time: str = "") -> tuple[str, float]:
    """Return an attribute of the rendering with the most similar part, and their distance."""
    scenes, all_colors = references()
    distances = ((all_colors[part] - colors[part]) ** 2).sum(-1).mean(-1) ** 0.5
    if time:
        distances[[scene.time != time for scene in scenes]] = np.inf
    return getattr(scenes[distances.argmin()], attribute), float(distances.min())


def check(image: np.ndarray, attributes: dict[str, str] | Scene) -> Verdict:
    """Check an image against its caption.

    Args:
        image: uint8 [H, W, 3]; if it is not square, it should show a stretched scene.
        attributes: those of `parse_caption`, or a scene.
    """
    words = vars(attributes) if isinstance(attributes, Scene) else attributes
    cells = average_cells(image)
    colors = [words["color"]] if words["color"] else SUNS
    overlap, *sun = max(find_sun(cells, color, words["height"]) for color in colors)
    guess = region_colors(cells, 82, np.ones((CELLS, CELLS), bool))  # with the middle of AXES
    time, sky_distance = nearest(guess, "sky", "time")
    is_lake = (words["ground"] or nearest(guess, "ground", "ground", time)[0]) == "lake"
    pines, light = find_pines(cells, time), np.mean(TIMES[time][3])
    beside_sun = abs((np.arange(CELLS) + 0.5) / CELLS - sun[0]) > 1.4 * sun[2]
    mirror, axis = find_mirror(cells, ~pines & beside_sun)
    borders = border_strengths(cells, pines)
    horizon = axis if is_lake else AXES[0] + int(borders[AXES].argmax())
    is_single = has_single_horizon(cells / light, borders / light, horizon)
    least = (LEAST_SHORE if is_lake else LEAST_STEP) * light
    has_border = borders[horizon - 2 : horizon + 3].max() > least
    colors = region_colors(cells, horizon, ~pines)
    hills, hills_distance = nearest(colors, "mountains", "hills", time)
    ground, ground_distance = nearest(colors, "ground", "ground", time)
    parts = {
        "sun": overlap >= LEAST_OVERLAP and not has_other_sun(cells, *sun, horizon),
        "horizon": bool(is_single and has_border),
        "sky": words["time"] in ("", time) and sky_distance < COLOR_TOLERANCE["sky"],
        "mountains": words["hills"] in ("", hills)
        and hills_distance < COLOR_TOLERANCE["mountains"],
        "ground": words["ground"] in ("", ground) and ground_distance < COLOR_TOLERANCE["ground"],
        "mirror": not is_lake or mirror > LEAST_MIRROR,
    }
    border = BORDERS[0] + int(borders[BORDERS].argmax())
    return Verdict(all(parts.values()), overlap, **parts, border=border / CELLS)
