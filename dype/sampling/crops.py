"""Find the parts of images that are worth a look at full resolution."""

import numpy as np
from PIL import Image

COARSE = 256  # px of the longer side at which detail is measured, so that grain does not count


def measure_detail(image: Image.Image) -> np.ndarray:
    """Return the strength of the edges in an image, [H, W], reduced to at most `COARSE` px."""
    gray = image.convert("L")
    factor = max(1, -(-max(gray.size) // COARSE))
    gray = gray.reduce(factor)
    rows, columns = np.gradient(np.asarray(gray, float)) if min(gray.size) > 1 else (0.0, 0.0)
    return np.hypot(rows, columns) + np.zeros(gray.size[::-1])


def find_detail(images: list[Image.Image], side: int, count: int = 1) -> list[tuple[int, int]]:
    """Return left and top of the squares with the strongest edges, so none shows a bare sky.

    The image that has the weakest edges in a square decides, each compared with its own mean.

    Args:
        images: images of one size, which get the same squares.
        side: px, at most that of the images.
        count: number of squares; they overlap only where the image is too small for them.
    """
    width, height = images[0].size
    details = np.stack([measure_detail(image) for image in images])
    details /= np.maximum(details.mean((1, 2), keepdims=True), 1e-9)
    scale = width / details.shape[2]
    window = min(max(1, round(side / scale)), *details.shape[1:])
    corners = []
    for _ in range(count):
        sums = np.pad(details, ((0, 0), (1, 0), (1, 0))).cumsum(1).cumsum(2)
        totals = sums[:, window:, window:] - sums[:, :-window, window:]
        totals += sums[:, :-window, :-window] - sums[:, window:, :-window]
        weakest = totals.min(0)
        top, left = np.unravel_index(weakest.argmax(), weakest.shape)
        details[:, top : top + window, left : left + window] = 0
        corner = round(left * scale), round(top * scale)
        corners.append((min(corner[0], width - side), min(corner[1], height - side)))
    return corners
