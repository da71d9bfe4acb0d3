"""Scenes and images of the demo for tests."""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from dype.demo.scenes import Scene, sample_scene


def make_scenes(count: int, seed: int = 7, **fields) -> list[Scene]:
    """Return seeded scenes, with some fields set."""
    rng = np.random.default_rng(seed)
    return [replace(sample_scene(rng), **fields) for _ in range(count)]


def blur(image: np.ndarray, radius: float) -> np.ndarray:
    """Return a blurred image, uint8 [H, W, 3]; the radius is in px."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
