"""Crops show a part with edges, the same one in all images."""

import numpy as np
from PIL import Image

from dype.sampling.crops import find_detail


def picture(*boxes, size=(600, 400)) -> Image.Image:
    """Return a gray image with dark boxes: left, top, right, bottom."""
    image = Image.new("RGB", size, "gray")
    for box in boxes:
        image.paste("black", box)
    return image


def test_the_crop_holds_the_edges():
    [(left, top)] = find_detail([picture((500, 300, 540, 340))], 100)
    assert 440 <= left <= 500
    assert 240 <= top <= 300


def test_all_images_show_edges_in_the_crop():
    """The strongest edges of single images are not in the others, but a weaker one is in all."""
    common = (300, 200, 310, 210)
    images = [picture((50, 100, 90, 140), common), picture((500, 300, 540, 340), common)]
    [(left, top)] = find_detail(images, 100)
    assert 205 <= left <= 300
    assert 105 <= top <= 200


def test_several_crops_do_not_overlap():
    images = [picture((50, 100, 90, 140), (500, 300, 540, 340), (300, 20, 330, 50))]
    corners = find_detail(images, 100, 3)
    for index, (x, y) in enumerate(corners):
        for other_x, other_y in corners[:index]:
            assert max(abs(x - other_x), abs(y - other_y)) >= 95


def test_grain_is_no_detail():
    """Noise of single pixels counts less than the edge of a sun."""
    rng = np.random.default_rng(0)
    pixels = np.full((1024, 1024), 128, np.uint8)
    pixels[:, :400] += rng.integers(0, 60, (1024, 400), dtype=np.uint8)
    pixels[700:800, 700:800] = 10
    [(left, top)] = find_detail([Image.fromarray(pixels)], 160)
    assert 600 <= left <= 720
    assert 600 <= top <= 720


def test_a_crop_as_large_as_the_image():
    assert find_detail([picture(size=(64, 64))], 64) == [(0, 0)]
    assert find_detail([picture(size=(70, 1))], 1, 2)[0][1] == 0
