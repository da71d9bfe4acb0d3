"""Load the metrics of single images; a model or package loads only with the metric that needs it.

A loader is a context manager. It yields a function of an RGB image and a prompt. If a package or
weights are missing, it raises UnavailableError and says how to get them.
"""

import io
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dype.errors import UnavailableError
from dype.metrics import intervals
from dype.pipelines.loading import LOAD_ERRORS, silence_known_warnings
from dype.sampling import records

PATCH, LEVELS, DISTANCES = 64, 64, (1, 2, 3, 4)  # px, gray levels, px: GLCM of Aesthetic-4K
ANGLES = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
# weights on the hub that come without a processor -> repository of their processor
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}

CLIP_SCORES = {  # metric -> function of CLIP's output
    # max(100 cos, 0) of the two embeddings (arXiv 2104.08718, with 100 for its 2.5)
    "clip_score": lambda out: (100 * (out.image_embeds * out.text_embeds).sum()).clamp(min=0),
    # the logit exp(scale) cos of a fine-tuned CLIP-H (arXiv 2305.01569)
    "pick_score": lambda out: out.logits_per_image,
}


def read_generated_image(path: Path, size: tuple[int, int]) -> Image.Image:
    """Read an RGB image of a sweep; raises OSError if its (height, width) is not `size`."""
    image = records.open_image(path)
    if image.size != size[::-1]:
        raise OSError(
            f"the image is {image.width}x{image.height}, results.csv says {size[1]}x{size[0]}"
        )
    return image


def measure_glcm(image: Image.Image, prompt: str = "") -> float:
    """Return the GLCM score of Aesthetic-4K: mean entropy over patches of 64 px, gray / 4.

    The entropy, in bits, is that of the histogram of the matrix's values, as in the script of
    Aesthetic-4K. It is not the entropy of the matrix as a distribution. Raises ValueError for an
    image smaller than a patch.
    """
    from skimage.feature import graycomatrix
    from skimage.measure import shannon_entropy

    gray = np.asarray(image.convert("L")) // (256 // LEVELS)
    rows, columns = (size // PATCH for size in gray.shape)
    if not rows or not columns:
        raise ValueError(f"the image is smaller than a patch of {PATCH} px")
    blocks = gray[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH)
    patches = blocks.swapaxes(1, 2).reshape(-1, PATCH, PATCH)
    matrices = (graycomatrix(patch, DISTANCES, ANGLES, LEVELS, normed=True) for patch in patches)
    return float(np.mean([shannon_entropy(matrix) for matrix in matrices]))


@contextmanager
def load_glcm(weights: None, device: str):
    """Load the GLCM score. Raises UnavailableError without scikit-image."""
    if find_spec("skimage") is None:
        raise UnavailableError("glcm needs scikit-image; pip install scikit-image==0.26.0")
    yield measure_glcm


def measure_compression(image: Image.Image, prompt: str = "") -> float:
    """Return the compression ratio: raw bytes / bytes of a JPEG (quality 95, 4:2:0)."""
    file = io.BytesIO()
    # quality 95, because the script of Aesthetic-4K saves images with it
    image.save(file, "jpeg", quality=95, subsampling="4:2:0")
    return image.width * image.height * 3 / file.tell()


@contextmanager
def load_demo(name: str, weights: None, device: str):
    """Load `demo_layout` or `demo_overlap`, the analytic checks of the demo model's images.

    Args:
        name: the metric.
        weights: unused, because the checks have no weights.
        device: unused, because the checks run on the CPU.

    Raises:
        UnavailableError: scipy is missing.
    """
    try:
        from dype.demo.layout_check import check
        from dype.demo.scenes import parse_caption
    except ImportError as error:
        raise UnavailableError(
            f"{name} needs dype.demo and scipy ({error}); pip install scipy==1.17.1"
        ) from error

    def measure(image: Image.Image, prompt: str) -> float:
        """Return demo_overlap, or demo_layout: 1 if everything is as the prompt says, else 0."""
        verdict = check(np.asarray(image), parse_caption(prompt))
        return verdict.overlap if name == "demo_overlap" else float(verdict.layout)

    yield measure


def first_sentence(error: Exception) -> str:
    """Return the first sentence of a library's error, at most 160 characters."""
    return " ".join(str(error).split()).split(". ")[0][:160]


@contextmanager
def raise_unavailable(name: str, weights: str):
    """Turn a library's error while it loads weights into an UnavailableError with a remedy."""
    try:
        yield
    except LOAD_ERRORS as error:
        reason = first_sentence(error)
        sentence = f"{name} cannot load the weights in {weights}: {reason}"
        if not Path(weights).is_dir():
            sentence = (
                f"{name} needs the weights {weights}, which are not on this machine and cannot be "
                f"downloaded ({reason}); use `hf download {weights}` on a machine with a network, "
                f"or --weights {name}=FOLDER"
            )
        raise UnavailableError(sentence) from error


def load_clip(name: str, model_class, weights: str, device: str) -> tuple:
    """Load a CLIP model and its image processor.

    Args:
        name: the metric that the model is for.
        model_class: class of transformers.
        weights: folder or hub repository.
        device: device of the model.

    Raises:
        UnavailableError: the weights cannot be loaded or are incomplete.
    """
    from transformers import CLIPImageProcessorPil
    from transformers.utils import logging

    silence_known_warnings()
    logging.set_verbosity_error()  # because transformers lists the tensors of the unused tower
    with raise_unavailable(name, weights):
        model, info = model_class.from_pretrained(weights, output_loading_info=True)
        missing_keys = [*info["missing_keys"], *info["mismatched_keys"]]
        if missing_keys:  # an error, because transformers fills them with random values
            raise ValueError(f"the weights have no {missing_keys[0]}")
        processor = CLIPImageProcessorPil.from_pretrained(PROCESSORS.get(weights, weights))
    return model.to(device).eval(), processor


@contextmanager
def load_clip_metric(name: str, weights: str, device: str):
    """Load a metric of CLIP_SCORES; CLIP reads the image and the first tokens of its prompt.

    Args:
        name: the metric.
        weights: folder or hub repository.
        device: device of the model.

    Raises:
        UnavailableError: the weights cannot be loaded.
    """
    from transformers import AutoTokenizer, CLIPModel

    model, processor = load_clip(name, CLIPModel, weights, device)
    repository = PROCESSORS.get(weights, weights)
    with raise_unavailable(name, repository):
        tokenizer = AutoTokenizer.from_pretrained(repository)
    limit = model.config.text_config.max_position_embeddings
    long_prompts = set()

    @torch.inference_mode()
    def measure(image: Image.Image, prompt: str) -> float:
        """Return the score of an image and its prompt; remember prompts that are too long."""
        if len(tokenizer(prompt, verbose=False)["input_ids"]) > limit:
            long_prompts.add(prompt)
        text = tokenizer(prompt, truncation=True, max_length=limit, return_tensors="pt")
        pixels = processor(image, return_tensors="pt")
        return float(CLIP_SCORES[name](model(**text.to(device), **pixels.to(device))))

    yield measure
    if long_prompts:
        count = len(long_prompts)
        print(f"{name}: prompts that CLIP cut to {limit} tokens: {count}")


@contextmanager
def load_aesthetic(weights: str, device: str):
    """Load LAION's aesthetic predictor V1, which is linear in the unit CLIP embedding."""
    from transformers import CLIPVisionModelWithProjection

    class Predictor(CLIPVisionModelWithProjection):
        def __init__(self, config):
            super().__init__(config)
            self.predictor = torch.nn.Linear(config.projection_dim, 1)
            self.post_init()

    model, processor = load_clip("aesthetic", Predictor, weights, device)

    @torch.inference_mode()
    def measure(image: Image.Image, prompt: str) -> float:
        embedding = model(**processor(image, return_tensors="pt").to(device)).image_embeds
        return float(model.predictor(torch.nn.functional.normalize(embedding)))

    yield measure


@contextmanager
def load_image_reward(weights: str | None, device: str):
    """Load ImageReward v1.0 (arXiv 2304.05977); its package needs older libraries than dype."""
    try:
        import ImageReward
    except ImportError as error:
        raise UnavailableError(
            f"{sys.executable} cannot import ImageReward ({first_sentence(error)}); run this "
            "command with the python of an environment for ImageReward, see docs/metrics.md"
        ) from error
    files = {"name": "ImageReward-v1.0"}
    if weights:
        files = {"name": f"{weights}/ImageReward.pt", "med_config": f"{weights}/med_config.json"}
    with raise_unavailable("image_reward", weights or "THUDM/ImageReward"):
        model = ImageReward.load(device=device, **files)
    yield lambda image, prompt: float(model.score(prompt, image))


class ImageMetric(NamedTuple):
    """A metric of single images."""

    load: Callable  # (weights, device) -> context manager that yields (image, prompt) -> float
    title: str
    weights: str | None = None  # hub repository
    protocol: str = ""  # used only if the metric has no weights
    uses_prompt: bool = False
    statistic: Callable = np.mean  # of the values of a setting
    interval: Callable = intervals.mean_interval


IMAGE_METRICS = {
    "clip_score": ImageMetric(
        partial(load_clip_metric, "clip_score"), "CLIPScore, ViT-L/14, x 100, higher is better",
        "openai/clip-vit-large-patch14", uses_prompt=True,
    ),
    "image_reward": ImageMetric(
        load_image_reward, "ImageReward v1.0, higher is better",
        protocol="ImageReward-v1.0", uses_prompt=True,
    ),
    "aesthetic": ImageMetric(
        load_aesthetic, "LAION aesthetic predictor V1, ViT-L/14, higher is better",
        "shunk031/aesthetics-predictor-v1-vit-large-patch14",
    ),
    "pick_score": ImageMetric(
        partial(load_clip_metric, "pick_score"), "PickScore v1, higher is better",
        "yuvalkirstain/PickScore_v1", uses_prompt=True,
    ),
    "glcm": ImageMetric(
        load_glcm, "GLCM score of Aesthetic-4K, higher is richer",
        protocol="64 gray levels, patches of 64 px",
    ),
    "compression": ImageMetric(
        lambda weights, device: nullcontext(measure_compression),
        "compression ratio of Aesthetic-4K, harmonic mean, lower is richer",
        protocol="JPEG 95, 4:2:0", statistic=intervals.harmonic_mean,
    ),
    "demo_layout": ImageMetric(
        partial(load_demo, "demo_layout"), "share with the right layout",
        protocol="dype.demo.layout_check", uses_prompt=True, interval=intervals.wilson_interval,
    ),
    "demo_overlap": ImageMetric(
        partial(load_demo, "demo_overlap"), "overlap of the sun with a disk, higher is better",
        protocol="dype.demo.layout_check", uses_prompt=True,
    ),
}  # fmt: skip
