"""The metrics of single pictures: each model is loaded when it is asked for.

A metric is a context that yields a function from a `Picture` to a number. What is missing, a
package or weights, raises `UnavailableError` with the way to get it.
"""

import io
import json
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dype.errors import UnavailableError
from dype.pipelines.loading import LOADING, mute

PATCH, LEVELS, DISTANCES = 64, 64, (1, 2, 3, 4)  # px, grey levels, px: GLCM of Aesthetic-4K
ANGLES = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
JPEG = {"quality": 95, "subsampling": "4:2:0"}  # as Aesthetic-4K's own script saves pictures
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
REWARD = Path(__file__).with_name("image_reward.py")


class Picture(NamedTuple):
    path: Path
    image: Image.Image  # RGB
    prompt: str


def measure_glcm(picture: Picture) -> float:
    """GLCM score of Aesthetic-4K: grey / 4, 64 px patches, mean entropy; higher is richer.

    Entropy as the benchmark's script takes it, of the histogram of the matrix's values, bits, not
    of the matrix as a distribution. Raises ValueError for a picture smaller than a patch.
    """
    from skimage.feature import graycomatrix
    from skimage.measure import shannon_entropy

    grey = np.asarray(picture.image.convert("L")) // (256 // LEVELS)
    rows, columns = (size // PATCH for size in grey.shape)
    if not rows or not columns:
        raise ValueError(f"it is smaller than a patch of {PATCH} px")
    cells = grey[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH)
    patches = cells.swapaxes(1, 2).reshape(-1, PATCH, PATCH)
    matrices = (graycomatrix(one, DISTANCES, ANGLES, LEVELS, normed=True) for one in patches)
    return float(np.mean([shannon_entropy(matrix) for matrix in matrices]))


@contextmanager
def glcm(weights: None, device: str, python: str):
    try:
        import skimage  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            "glcm needs scikit-image; pip install scikit-image==0.26.0"
        ) from error
    yield measure_glcm


def measure_compression(picture: Picture) -> float:
    """Raw bytes over those of a JPEG of quality 95, 4:2:0; lower is richer."""
    file = io.BytesIO()
    picture.image.save(file, "jpeg", **JPEG)
    return picture.image.width * picture.image.height * 3 / file.tell()


@contextmanager
def compression(weights: None, device: str, python: str):
    yield measure_compression


def missing(name: str, weights: str, error: Exception) -> UnavailableError:
    """What to say of weights that cannot be loaded."""
    if Path(weights).is_dir():
        return UnavailableError(f"{name} cannot load the weights in {weights}: {reason_of(error)}")
    return UnavailableError(
        f"{name} needs the weights {weights}, which are not here and cannot be fetched "
        f"({reason_of(error)}); `hf download {weights}` where there is a network, or "
        f"--weights {name}=FOLDER"
    )


def reason_of(error: Exception) -> str:
    """The first sentence of a library's error, which may go on for a page."""
    return " ".join(str(error).split()).split(". ")[0][:160]


def loaded(name: str, kind, weights: str, processor: str, device: str) -> tuple:
    """A CLIP of class `kind` and its image processor (Pillow's filters). Raises as above."""
    from transformers import CLIPImageProcessorPil
    from transformers.utils import logging

    mute()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table of what one of a model's two towers leaves out
    try:
        model, info = kind.from_pretrained(weights, output_loading_info=True)
        lacking = [*info["missing_keys"], *info["mismatched_keys"]]
        if lacking:  # transformers would fill them with noise
            raise ValueError(f"it has no {lacking[0]}")
        images = CLIPImageProcessorPil.from_pretrained(processor)
    except LOADING as error:
        raise missing(name, weights, error) from error
    finally:
        logging.set_verbosity(verbosity)
    return model.to(device).eval(), images


def pixels(images, picture: Picture, device: str) -> torch.Tensor:
    return images(picture.image, return_tensors="pt")["pixel_values"].to(device)


@contextmanager
def clip(name: str, weights: str, processor: str, device: str, value: Callable):
    """A metric from CLIP's output for a picture and its prompt, at most 77 tokens of it."""
    from transformers import AutoTokenizer, CLIPModel

    model, images = loaded(name, CLIPModel, weights, processor, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(processor)
    except LOADING as error:
        raise missing(name, processor, error) from error
    most = model.config.text_config.max_position_embeddings
    long = set()

    @torch.inference_mode()
    def measure(picture: Picture) -> float:
        if len(tokenizer(picture.prompt, verbose=False)["input_ids"]) > most:
            long.add(picture.prompt)
        text = tokenizer(picture.prompt, truncation=True, max_length=most, return_tensors="pt")
        ids, mask = text["input_ids"].to(device), text["attention_mask"].to(device)
        shown = pixels(images, picture, device)
        return float(value(model(input_ids=ids, attention_mask=mask, pixel_values=shown)))

    yield measure
    if long:
        print(f"{name}: CLIP reads {most} tokens; longer, and read in part: {len(long)} prompts")


def clip_score(weights: str, device: str, python: str):
    """max(100 cos, 0) of CLIP's two embeddings (arXiv 2104.08718, with 100 for their 2.5)."""

    def value(out):
        return (100 * (out.image_embeds * out.text_embeds).sum()).clamp(min=0)

    return clip("clip_score", weights, weights, device, value)


def pick_score(weights: str, device: str, python: str):
    """CLIP's logit, exp(scale) cos, of the fine-tuned CLIP-H (arXiv 2305.01569)."""
    processor = weights if Path(weights).is_dir() else PICKSCORE_PROCESSOR
    return clip("pick_score", weights, processor, device, lambda out: out.logits_per_image)


@contextmanager
def aesthetic(weights: str, device: str, python: str):
    """LAION's linear predictor on the unit CLIP embedding (simple-aesthetics-predictor's V1)."""
    from transformers import CLIPVisionModelWithProjection

    class Predictor(CLIPVisionModelWithProjection):
        def __init__(self, config):
            super().__init__(config)
            self.predictor = torch.nn.Linear(config.projection_dim, 1)
            self.post_init()

    model, images = loaded("aesthetic", Predictor, weights, weights, device)

    @torch.inference_mode()
    def measure(picture: Picture) -> float:
        embedding = model(pixels(images, picture, device)).image_embeds
        return float(model.predictor(torch.nn.functional.normalize(embedding)))

    yield measure


@contextmanager
def image_reward(weights: str | None, device: str, python: str):
    """ImageReward v1.0 (arXiv 2304.05977), in an interpreter of its own, see `dype/reward.py`."""
    command = [python, str(REWARD), device, *([weights] if weights else [])]
    with tempfile.TemporaryFile("w+") as log:
        try:
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        except OSError as error:
            raise UnavailableError(f"--python {python} cannot be run: {error.strerror}") from error

        def ask(line: str) -> str:
            try:
                worker.stdin.write(line)
                worker.stdin.flush()
            except BrokenPipeError:
                pass  # its last words say why
            answer = worker.stdout.readline()
            if not answer:
                log.seek(0)
                last = (log.read().strip().splitlines() or ["it ended without a word"])[-1]
                raise UnavailableError(
                    f"image_reward cannot run in {python}: {last}; it needs an environment of its "
                    "own, see docs/metrics.md, and --python FILE"
                )
            return answer

        with worker:
            ask("")  # it answers once it is loaded
            yield lambda one: float(ask(json.dumps([str(one.path), one.prompt]) + "\n"))
