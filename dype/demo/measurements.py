"""A file of measured images, so that tables can be made again without the images."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dype.demo.scenes import Scene
from dype.demo.scores import ImageStatistics, load_lite0, measure, select
from dype.sampling import records

VERSION = 1  # of what `scores.measure` returns; another one cannot be compared
OUTER_FIELDS = ("feature_outers", "lite0_outers")  # symmetric, stored as upper triangles


class Measurements:
    """Statistics of the first images of each cell, kept in an .npz file in float32.

    Args:
        path: file; it may not exist yet.

    Raises:
        ValueError: it is another kind of file, or of another version.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.by_name = read_statistics(path) if path.exists() else {}

    def count(self, name: str) -> int:
        """Return the number of images of a cell in the file."""
        return len(self.by_name[name].is_right) if name in self.by_name else 0

    def measure(
        self, name: str, scenes: list[Scene], read: Callable[[int], np.ndarray]
    ) -> ImageStatistics:
        """Return the statistics of a cell's images, and write those that the file lacks.

        Args:
            name: name of the cell.
            scenes: scene of each image.
            read: takes the number of an image, returns its pixels, uint8 [H, W, 3].

        Raises:
            ValueError: the packages of `lite0` are here, and were not before, or the reverse.
        """
        count = self.count(name)
        if count < len(scenes):
            has_lite0 = load_lite0() is not None
            if count and bool(self.by_name[name].lite0_means.size) != has_lite0:
                raise ValueError(
                    f"{self.path} was measured with{'out' * has_lite0} the packages of lite0, "
                    "expected the same, or another --out"
                )
            parts = [self.by_name[name]] if count else []
            parts += [measure([read(i)], [scenes[i]]) for i in range(count, len(scenes))]
            columns = zip(*parts, strict=True)
            self.by_name[name] = ImageStatistics(*(as_float32(list(c)) for c in columns))
            self.merge_file()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            records.write_atomically({self.path: statistics_to_npz(self.by_name)})
        return select(self.by_name[name], np.arange(len(scenes)))

    def merge_file(self) -> None:
        """Take over what another process has added to the file."""
        for name, statistics in (read_statistics(self.path) if self.path.exists() else {}).items():
            if len(statistics.is_right) > self.count(name):
                self.by_name[name] = statistics


def as_float32(arrays: list[np.ndarray]) -> np.ndarray:
    """Return arrays as one, in the numbers that the file keeps."""
    return np.concatenate(arrays).astype(np.float32).astype(np.float64)


def statistics_to_npz(by_name: dict[str, ImageStatistics]) -> bytes:
    """Return the content of the file."""
    arrays = {"version": np.array(VERSION)}
    for name, statistics in by_name.items():
        for field, array in statistics._asdict().items():
            if field in OUTER_FIELDS:
                rows, columns = np.triu_indices(array.shape[-1])
                array = array[:, rows, columns]
            arrays[f"{name}/{field}"] = array.astype(np.float32)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def read_statistics(path: Path) -> dict[str, ImageStatistics]:
    """Return the statistics of every cell in a file, by name. Raise ValueError and OSError."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
        version, fields = int(arrays.pop("version")), {}
        if version == VERSION:
            for key, array in arrays.items():
                name, field = key.rsplit("/", 1)
                array = array.astype(np.float64)
                if field in OUTER_FIELDS:
                    array = from_triangles(array)
                fields.setdefault(name, {})[field] = array
        by_name = {name: ImageStatistics(**by_field) for name, by_field in fields.items()}
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of this program; move it away") from error
    if version != VERSION:
        raise ValueError(
            f"{path} has measurements of version {version}, expected {VERSION}; move it away "
            "to measure the images again"
        )
    return by_name


def from_triangles(triangles: np.ndarray) -> np.ndarray:
    """Return symmetric matrices [n, F, F] of their upper triangles [n, F (F + 1) / 2]."""
    side = int(np.sqrt(2 * triangles.shape[1]))
    rows, columns = np.triu_indices(side)
    matrices = np.zeros((len(triangles), side, side))
    matrices[:, rows, columns] = matrices[:, columns, rows] = triangles
    return matrices
