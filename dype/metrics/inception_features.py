"""Inception's features of drawn and of real pictures, whole or in patches, kept on the disk."""

import hashlib
import io
import json
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin

from dype.errors import UnavailableError
from dype.metrics.image_metrics import reason_of
from dype.pipelines.loading import LOADING
from dype.sampling import records
from dype.sweep.results import RESULTS, read_rows

CACHE = "features"  # in the sweep's folder: one file per picture, named by all that made it
INPUT = 299  # px, what Inception sees
BATCH = 8  # patches
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")}


def drawn_picture(path: Path, size: tuple[int, int]) -> Image.Image:
    """A picture of a sweep, in RGB, of (height, width). Raises OSError if it cannot be read."""
    try:
        with path.open("rb") as file, PngImagePlugin.PngImageFile(file) as image:
            found = image.convert("RGB")  # not by Image.open, which refuses large pictures
    except (ValueError, SyntaxError) as error:
        raise OSError(str(error)) from error
    if found.size != size[::-1]:
        raise OSError(f"it is {found.height}x{found.width}, its row says {size[0]}x{size[1]}")
    return found


def real_files(folder: Path) -> list[Path]:
    """The pictures of a folder; of a sweep's folder those that it drew. Raises ValueError."""
    if not folder.is_dir():
        raise ValueError(f"--real is {str(folder)!r}, expected a folder of pictures")
    if (folder / RESULTS).exists():
        found = [folder / row["file"] for row in read_rows(folder) if not row["error"]]
    else:
        found = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    if len(found) < 2:
        raise ValueError(f"--real {folder} holds {len(found)} pictures, expected two or more")
    return sorted(found)


def stamp(path: Path) -> list:
    """What tells a file from a later one of its name. Raises OSError."""
    about = path.stat()
    return [path.name, about.st_size, about.st_mtime_ns]


def cut(image: Image.Image, patch: int, patches: int, name: str) -> np.ndarray:
    """Patches at random places that depend on the name alone, uint8 [patches, 3, patch, patch]."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    left = rng.integers(image.width - patch + 1, size=patches)
    top = rng.integers(image.height - patch + 1, size=patches)
    boxes = [(x, y, x + patch, y + patch) for x, y in zip(left, top, strict=True)]
    return np.stack([np.asarray(image.crop(box)).transpose(2, 0, 1) for box in boxes])


def seen(path: Path, how: dict, size: tuple[int, int], real: bool) -> np.ndarray:
    """A picture as Inception is shown it, uint8 [patches, 3, h, w]. Raises OSError."""
    if real:
        image = records.open_picture(path)
        image = ImageOps.fit(image, size[::-1], FILTERS[how["filter"]])
    else:
        image = drawn_picture(path, size)
    if how["patch"]:
        return cut(image, how["patch"], how["patches"], path.name)
    return np.asarray(image).transpose(2, 0, 1)[None].copy()


def features(
    path: Path, folder: Path, how: dict, size: tuple[int, int], real: bool, extract: Callable
) -> dict:
    """ "features" [patches, 2048] and "logits" [patches, 1008] of a picture, computed once.

    how: weights, resize, filter of the real pictures, patch (px; None: the whole picture) and
    patches. A real picture is brought to `size`, (height, width), its middle cut to that shape.
    Raises ValueError for a picture that cannot be read, OSError where nothing can be written.
    """
    shape = [*size, how["filter"]] if real else None
    try:
        key = [stamp(path), shape, *(how[n] for n in ("weights", "resize", "patch", "patches"))]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
        kept = folder / CACHE / f"{name}.npz"
        if kept.exists():
            with np.load(kept) as file:
                return dict(file)
        pictures = seen(path, how, size, real)
    except OSError as error:
        raise ValueError(str(error)) from error
    parts = [extract(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)]
    found = {"features": np.concatenate([ours for ours, _ in parts])}
    found["logits"] = np.concatenate([logits for _, logits in parts])
    file = io.BytesIO()
    np.savez(file, **found)
    kept.parent.mkdir(exist_ok=True)
    records.write({kept: file.getvalue()})
    return found


def forget(folder: Path) -> None:
    """Remove what `features` keeps in a sweep's folder."""
    for kept in (folder / CACHE).glob("*.npz"):
        kept.unlink()


def enlarged(paths: list[Path], size: tuple[int, int]) -> int:
    """How many pictures are smaller than (height, width) on a side."""
    count = 0
    for path in paths:
        with suppress(*UNREADABLE), Image.open(path) as image:
            count += image.height < size[0] or image.width < size[1]
    return count


INCEPTION = (
    "torchmetrics, torch-fidelity and torchvision; "
    "pip install torchmetrics==1.9.0 torch-fidelity==0.4.0 torchvision==0.28.0"
)


@contextmanager
def inception(weights: str | None, device: str, antialias: bool):
    """A function from uint8 [n, 3, h, w] to Inception's features [n, 2048], logits [n, 1008].

    The TensorFlow network of FID as torch-fidelity ported it, logits without bias as for the
    Inception score; resized to 299 px by torchmetrics, antialiased or as TensorFlow 1 did.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        path = {"feature_extractor_weights_path": weights} if weights else {}
        network = FrechetInceptionDistance(2048, antialias=antialias, **path).inception
    except ImportError as error:
        raise UnavailableError(f"FID, KID and Inception score need {INCEPTION}") from error
    except LOADING as error:
        if "torchvision" in str(error):
            raise UnavailableError(
                f"torchvision is not built for this torch ({reason_of(error)}): FID, KID and "
                f"Inception score need {INCEPTION}"
            ) from error
        raise UnavailableError(
            f"the weights of Inception cannot be loaded ({reason_of(error)}); fetch "
            "pt_inception-2015-12-05-6726825d.pth from the releases of toshas/torch-fidelity and "
            "give --weights inception=FILE"
        ) from error
    network = network.to(device)

    @torch.inference_mode()
    def extract(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = network(torch.from_numpy(pictures).to(device))
        logits = features @ network.fc.weight.T
        return features.cpu().numpy(), logits.cpu().numpy()

    yield extract
