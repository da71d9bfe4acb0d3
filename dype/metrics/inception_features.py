"""Compute Inception's features of generated and real images, whole or in patches."""

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from dype.errors import UnavailableError
from dype.metrics.image_metrics import first_sentence, read_generated_image
from dype.pipelines.loading import LOAD_ERRORS
from dype.sampling import records
from dype.sweep.results import RESULTS, read_rows

INCEPTION_SIZE = 299  # px
WEIGHTS = "pt_inception-2015-12-05"
BATCH = 8  # patches
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")}
PACKAGES = (
    "FID, KID and Inception score need torchmetrics, torch-fidelity and torchvision; "
    "pip install torchmetrics==1.9.0 torch-fidelity==0.4.0 torchvision==0.28.0"
)


def list_real_images(folder: Path) -> dict[Path, tuple[int, int] | None]:
    """Return the paths of a folder's images; of a sweep's folder, those of its results.csv.

    The values are the sizes (height, width) of a sweep's images, which are compared with images of
    this size alone. Photos, whose value is None, are resized to any size.

    Raises ValueError for a missing folder or fewer than two images.
    """
    if not folder.is_dir():
        raise ValueError(f"--real is {str(folder)!r}, expected a folder of images")
    if (folder / RESULTS).exists():
        rows = [row for row in read_rows(folder) if not row["error"]]
        sizes = {folder / row["file"]: (int(row["height"]), int(row["width"])) for row in rows}
    else:
        paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
        sizes = dict.fromkeys(paths)
    if len(sizes) < 2:
        raise ValueError(f"--real {folder} holds {len(sizes)} images, expected two or more")
    return dict(sorted(sizes.items()))


def random_patches(image: Image.Image, patch: int, patches: int, name: str) -> np.ndarray:
    """Cut square patches at random positions that depend only on the image's file name.

    Args:
        image: RGB image.
        patch: side of a patch, px.
        patches: number of patches.
        name: file name; its checksum seeds the positions.

    Returns:
        The patches, uint8 [patches, 3, patch, patch].
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    left = rng.integers(image.width - patch + 1, size=patches)
    top = rng.integers(image.height - patch + 1, size=patches)
    boxes = [(x, y, x + patch, y + patch) for x, y in zip(left, top, strict=True)]
    return np.stack([np.asarray(image.crop(box)).transpose(2, 0, 1) for box in boxes])


def stack_features(
    args, skipped: dict[str, str], paths: list[Path], real_filter: str | None,
    size: tuple[int, int], patch: int | None,
) -> dict:  # fmt: skip
    """Return Inception's features and logits of all readable images.

    Args:
        args: the command line.
        skipped: receives the reason for each unreadable image, by file name.
        paths: files of the images.
        real_filter: a key of FILTERS, to resize the middle of real images to `size`; None for
            generated images.
        size: (height, width), px.
        patch: side of a patch, px; None for whole images.

    Returns:
        "features" [n, patches, 2048] and "logits" [n, patches, 1008], both [0] if no image is
        readable, and "upscaled", the number of upscaled real images.

    Raises:
        UnavailableError: Inception cannot be loaded.
    """
    extract = load_inception(args.weights["inception"], args.device)
    extracted, upscaled = [], 0
    for path in tqdm(paths, "real" if real_filter else "generated", disable=None, leave=False):
        try:
            if real_filter:
                image = records.open_image(path)
                upscaled += image.height < size[0] or image.width < size[1]
                image = ImageOps.fit(image, size[::-1], FILTERS[real_filter])
            else:
                image = read_generated_image(path, size)
        except OSError as error:
            skipped[path.name] = " ".join(str(error).split())
            continue
        images = np.asarray(image).transpose(2, 0, 1)[None].copy()
        if patch:
            images = random_patches(image, patch, args.patches, path.name)
        extracted.append(extract(images))
    features, logits = zip(*extracted, strict=True) if extracted else ([], [])
    stacks = {"features": np.array(features, float), "logits": np.array(logits, float)}
    return stacks | {"upscaled": upscaled}


@cache
def load_inception(weights: str, device: str) -> Callable:
    """Load Inception: uint8 [n, 3, h, w] -> features [n, 2048], logits [n, 1008].

    This is FID's TensorFlow network as ported by torch-fidelity. The logits have no bias, as the
    Inception score needs them. torchmetrics resizes the images to 299 px, antialiased. A cache
    returns the same function for the same arguments.

    Args:
        weights: a file, or WEIGHTS, which torch-fidelity downloads.
        device: device of the network.

    Raises:
        UnavailableError: a package or the weights are missing.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        path = {} if weights == WEIGHTS else {"feature_extractor_weights_path": weights}
        network = FrechetInceptionDistance(2048, antialias=True, **path).inception
    except ImportError as error:
        raise UnavailableError(PACKAGES) from error
    except LOAD_ERRORS as error:
        reason = first_sentence(error)
        sentence = (
            f"the weights of Inception cannot be loaded ({reason}); download "
            f"{WEIGHTS}-6726825d.pth from the releases of toshas/torch-fidelity and use "
            "--weights inception=FILE"
        )
        if "torchvision" in str(error):
            sentence = f"torchvision is not built for this torch ({reason}): {PACKAGES}"
        raise UnavailableError(sentence) from error
    network = network.to(device)

    @torch.inference_mode()
    def extract(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = [network(batch) for batch in torch.from_numpy(images).to(device).split(BATCH)]
        logits = [batch @ network.fc.weight.T for batch in features]
        return torch.cat(features).cpu().numpy(), torch.cat(logits).cpu().numpy()

    return extract
