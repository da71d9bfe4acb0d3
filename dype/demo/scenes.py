"""Procedural scenes in resolution-free coordinates: the training data and the ground truth.

One large object of one color stands on a ground of another color. Dead leaves cover both:
overlapping disks whose radii follow an r^-3 law, so that the texture has no scale, like natural
images (Lee, Mumford and Huang 2001). A larger rendering of a scene shows the same leaves and finer
ones on top. The smallest radius is `FINEST` pixels at every size, and every octave of radii covers
the same area, so that all sizes have the same statistics per pixel.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (186, 42, 34),
    "yellow": (196, 166, 36),
    "green": (50, 136, 46),
    "teal": (28, 144, 148),
    "blue": (46, 72, 188),
    "purple": (134, 56, 170),
}
SHAPES = ("disk", "square", "triangle", "ring", "cross")
LIGHTS = {"": None, ", lit from above": 1.0, ", lit from below": -1.0}

FINEST = 4.0  # smallest leaf radius, pixels
LARGEST = 1 / 8  # largest leaf radius, in units of the image's side
COVERAGE = 0.7  # summed leaf area per octave of radius, in units of the image's area
CONTRAST = 0.28  # largest difference of a leaf's brightness from its color (log units)
TINT = 12  # largest further difference in each channel (8-bit units)
GRADIENT = 0.2  # relative change of brightness from the middle to the lit edge
SUPERSAMPLING = 2

TRIPLES = tuple(t for t in product(SHAPES, COLORS, COLORS) if t[1] != t[2])
HELD_OUT = tuple(
    TRIPLES[i] for i in np.random.default_rng(2510_20766).choice(len(TRIPLES), 40, replace=False)
)


@dataclass(frozen=True)
class Scene:
    """Content of an image; lengths in units of its side, origin at the top left."""

    shape: str
    color: str
    ground: str
    light: str  # a key of LIGHTS
    strength: float  # of the light: +1 from above, -1 from below
    x: float  # center of the object
    y: float
    radius: float  # half of the object's width
    seed: int  # of the leaves

    @property
    def caption(self) -> str:
        """Return the prompt of the scene."""
        return f"a {self.color} {self.shape} on {self.ground} leaves{self.light}"


def sample_scene(rng: np.random.Generator, triples=TRIPLES) -> Scene:
    """Draw a scene whose (shape, color, ground) is one of `triples`."""
    shape, color, ground = triples[rng.integers(len(triples))]
    light = list(LIGHTS)[rng.integers(len(LIGHTS))]
    strength = LIGHTS[light] if light else rng.uniform(-1, 1)
    x, y = rng.uniform(0.46, 0.54, 2)
    radius, seed = rng.uniform(0.27, 0.33), int(rng.integers(2**31))
    return Scene(shape, color, ground, light, strength, x, y, radius, seed)


def outline(scene: Scene, size: int) -> Image.Image:
    """Return the object's mask, [size, size] in 8-bit gray, not antialiased."""
    mask = Image.new("L", (size, size))
    draw = ImageDraw.Draw(mask)
    x, y, r = scene.x * size, scene.y * size, scene.radius * size

    def box(dx, dy):
        return (x - dx, y - dy, x + dx, y + dy)

    if scene.shape in ("disk", "ring"):
        draw.ellipse(box(r, r), fill=255)
        if scene.shape == "ring":
            draw.ellipse(box(0.5 * r, 0.5 * r), fill=0)
    elif scene.shape == "square":
        draw.rectangle(box(0.88 * r, 0.88 * r), fill=255)
    elif scene.shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=255)
    else:  # a cross
        draw.rectangle(box(r, 0.34 * r), fill=255)
        draw.rectangle(box(0.34 * r, r), fill=255)
    return mask


def leaves(seed: int, finest: float) -> list[tuple[float, float, float, float, np.ndarray]]:
    """Return leaves of radius `finest` and above, deepest first: (depth, x, y, radius, jitter).

    Each octave of radii has a separate random stream and lies on the coarser octaves, so that a
    smaller `finest` only adds leaves. `jitter` is log brightness and three tints, in [-1, 1].
    """
    rows = []
    for octave in range(int(np.ceil(np.log2(LARGEST / finest)))):
        rng = np.random.default_rng([seed, octave])
        largest = LARGEST / 2**octave
        mean_square = largest**2 * np.log(2) / 1.5  # of r under r^-3 on [largest / 2, largest]
        side = 1 + 2 * LARGEST  # leaves may reach in from outside
        count = rng.poisson(COVERAGE * side**2 / (np.pi * mean_square))
        r = largest / np.sqrt(1 + 3 * rng.random(count))
        xy = rng.uniform(-LARGEST, 1 + LARGEST, (count, 2))
        depth, jitter = octave + rng.random(count), rng.uniform(-1, 1, (count, 4))
        keep = r >= finest
        rows += zip(depth[keep], *xy[keep].T, r[keep], jitter[keep], strict=True)
    return sorted(rows, key=lambda leaf: leaf[0])


def texture(color: str, seed: int, size: int, finest: float) -> Image.Image:
    """Draw dead leaves around one color, [size, size] RGB, not antialiased.

    Args:
        color: a key of COLORS.
        seed: seed of the leaves.
        size: side, px.
        finest: smallest radius, in units of the side.
    """
    base = np.array(COLORS[color], float)
    image = Image.new("RGB", (size, size), tuple(COLORS[color]))
    draw = ImageDraw.Draw(image)
    for _, x, y, r, jitter in leaves(seed, finest):
        rgb = base * np.exp(CONTRAST * jitter[0]) + TINT * jitter[1:]
        box = ((x - r) * size, (y - r) * size, (x + r) * size, (y + r) * size)
        draw.ellipse(box, fill=tuple(int(c) for c in rgb.clip(0, 255)))
    return image


def render(scene: Scene, height: int, width: int | None = None) -> np.ndarray:
    """Render a scene, uint8 [height, width, 3].

    An image that is not square shows a stretched object, as encodings with a scale per axis
    generate it. Its leaves are those of a square of the longer side, cropped.

    Args:
        scene: content.
        height: px.
        width: px; None: `height`.
    """
    width = height if width is None else width
    fine, finest = max(height, width) * SUPERSAMPLING, FINEST / max(height, width)
    fine_size = width * SUPERSAMPLING, height * SUPERSAMPLING
    image = texture(scene.ground, 2 * scene.seed, fine, finest).crop((0, 0, *fine_size))
    inside = texture(scene.color, 2 * scene.seed + 1, fine, finest).crop((0, 0, *fine_size))
    image.paste(inside, mask=outline(scene, fine).resize(fine_size, Image.Resampling.NEAREST))
    pixels = np.asarray(image.reduce(SUPERSAMPLING), np.float32)
    depth = (np.arange(height, dtype=np.float32) + 0.5) / height  # 0 at the top
    light = 1 + GRADIENT * scene.strength * (1 - 2 * depth)
    return (pixels * light[:, None, None]).clip(0, 255).astype(np.uint8)
