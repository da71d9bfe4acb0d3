"""Load the metrics of single images: each model, and each package, when it is asked for.

A loader is a context that yields a function of an RGB image and a prompt; it raises
`UnavailableError` for a package or weights that are missing, with the way to get them.
"""

import io
import re
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
# of weights on the hub that come without their processor
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}

CLIP_SCORES = {  # of CLIP's output
    # max(100 cos, 0) of the two embeddings (arXiv 2104.08718, 100 for their 2.5)
    "clip_score": lambda out: (100 * (out.image_embeds * out.text_embeds).sum()).clamp(min=0),
    # the logit, exp(scale) cos, of the fine-tuned CLIP-H (arXiv 2305.01569)
    "pick_score": lambda out: out.logits_per_image,
}


def read_generated_image(path: Path, size: tuple[int, int]) -> Image.Image:
    """Read an image of a sweep, in RGB, of (height, width). Raises OSError."""
    image = records.read_png(path)
    if image.size != size[::-1]:
        raise OSError(f"it is {image.height}x{image.width}, its row says {size[0]}x{size[1]}")
    return image


def measure_glcm(image: Image.Image, prompt: str = "") -> float:
    """Return the GLCM score of Aesthetic-4K: gray / 4, 64 px patches, mean entropy.

    Entropy as the benchmark's script takes it, of the histogram of the matrix's values, bits, not
    of the matrix as a distribution. Raises ValueError for an image smaller than a patch.
    """
    from skimage.feature import graycomatrix
    from skimage.measure import shannon_entropy

    gray = np.asarray(image.convert("L")) // (256 // LEVELS)
    rows, columns = (size // PATCH for size in gray.shape)
    if not rows or not columns:
        raise ValueError(f"it is smaller than a patch of {PATCH} px")
    cells = gray[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH)
    patches = cells.swapaxes(1, 2).reshape(-1, PATCH, PATCH)
    matrices = (graycomatrix(patch, DISTANCES, ANGLES, LEVELS, normed=True) for patch in patches)
    return float(np.mean([shannon_entropy(matrix) for matrix in matrices]))


@contextmanager
def load_glcm(weights: None, device: str):
    if find_spec("skimage") is None:
        raise UnavailableError("glcm needs scikit-image; pip install scikit-image==0.26.0")
    yield measure_glcm


def measure_compression(image: Image.Image, prompt: str = "") -> float:
    """Return raw bytes over those of a JPEG of quality 95, 4:2:0."""
    file = io.BytesIO()
    # as Aesthetic-4K's own script saves images
    image.save(file, "jpeg", quality=95, subsampling="4:2:0")
    return image.width * image.height * 3 / file.tell()


@contextmanager
def load_demo(name: str, weights: None, device: str):
    """Load the demo model's analytic check: `demo_layout`, or `demo_overlap`."""
    try:
        from dype.demo.layout_check import check
        from dype.demo.scenes import COLORS, SHAPES
    except ImportError as error:
        raise UnavailableError(
            f"{name} needs dype.demo and scipy ({error}); pip install scipy==1.17.1"
        ) from error
    colors = "|".join(COLORS)
    caption = re.compile(f"an? ({colors}) ({'|'.join(SHAPES)}) on ({colors}) leaves")

    def measure(image: Image.Image, prompt: str) -> float:
        """Return 1 for the right layout and shape, else 0; or the overlap with the shape."""
        asked = caption.match(prompt)
        if asked is None:
            raise ValueError(f"{prompt!r} is no caption of the demo model")
        color, shape, ground = asked.groups()
        verdict = check(np.asarray(image), color, ground)
        if name == "demo_overlap":
            return verdict.overlaps[shape]
        return float(verdict.layout and verdict.shape == shape)

    yield measure


def first_sentence(error: Exception) -> str:
    """Return the first sentence of a library's error, which may go on for a page."""
    return " ".join(str(error).split()).split(". ")[0][:160]


@contextmanager
def loading(name: str, weights: str):
    """Within, what libraries raise over weights is an UnavailableError that says what to fetch."""
    try:
        yield
    except LOAD_ERRORS as error:
        reason = first_sentence(error)
        sentence = f"{name} cannot load the weights in {weights}: {reason}"
        if not Path(weights).is_dir():
            sentence = (
                f"{name} needs the weights {weights}, which are not here and cannot be fetched "
                f"({reason}); `hf download {weights}` where there is a network, or "
                f"--weights {name}=FOLDER"
            )
        raise UnavailableError(sentence) from error


def load_clip(name: str, model_class, weights: str, device: str) -> tuple:
    """Load a CLIP and its image processor. Raises UnavailableError."""
    from transformers import CLIPImageProcessorPil
    from transformers.utils import logging

    silence_known_warnings()
    logging.set_verbosity_error()  # because it lists the tower that a model does not use
    with loading(name, weights):
        model, info = model_class.from_pretrained(weights, output_loading_info=True)
        lacking = [*info["missing_keys"], *info["mismatched_keys"]]
        if lacking:  # transformers would fill them with noise
            raise ValueError(f"it has no {lacking[0]}")
        processor = CLIPImageProcessorPil.from_pretrained(PROCESSORS.get(weights, weights))
    return model.to(device).eval(), processor


@contextmanager
def load_clip_metric(name: str, weights: str, device: str):
    """Load a metric from CLIP's output for an image and the first tokens of its prompt."""
    from transformers import AutoTokenizer, CLIPModel

    model, processor = load_clip(name, CLIPModel, weights, device)
    repository = PROCESSORS.get(weights, weights)
    with loading(name, repository):
        tokenizer = AutoTokenizer.from_pretrained(repository)
    limit = model.config.text_config.max_position_embeddings
    long_prompts = set()

    @torch.inference_mode()
    def measure(image: Image.Image, prompt: str) -> float:
        if len(tokenizer(prompt, verbose=False)["input_ids"]) > limit:
            long_prompts.add(prompt)
        text = tokenizer(prompt, truncation=True, max_length=limit, return_tensors="pt")
        pixels = processor(image, return_tensors="pt")
        return float(CLIP_SCORES[name](model(**text.to(device), **pixels.to(device))))

    yield measure
    if long_prompts:
        count = len(long_prompts)
        print(f"{name}: CLIP reads {limit} tokens; longer, and read in part: {count} prompts")


@contextmanager
def load_aesthetic(weights: str, device: str):
    """Load LAION's linear predictor on the unit CLIP embedding (aesthetics-predictor's V1)."""
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
    """Load ImageReward v1.0 (arXiv 2304.05977), whose package needs older libraries than ours."""
    try:
        import ImageReward
    except ImportError as error:
        raise UnavailableError(
            f"{sys.executable} cannot import ImageReward ({first_sentence(error)}); run this "
            "command by the interpreter of an environment for it, see docs/metrics.md"
        ) from error
    files = {"name": "ImageReward-v1.0"}
    if weights:
        files = {"name": f"{weights}/ImageReward.pt", "med_config": f"{weights}/med_config.json"}
    with loading("image_reward", weights or "THUDM/ImageReward"):
        model = ImageReward.load(device=device, **files)
    yield lambda image, prompt: float(model.score(prompt, image))


class ImageMetric(NamedTuple):
    """A metric of single images."""

    load: Callable  # (weights, device) -> a context
    title: str
    weights: str | None = None  # a hub repository
    protocol: str = ""  # of a metric without weights
    prompted: bool = False
    statistic: Callable = np.mean
    interval: Callable = intervals.mean_interval


IMAGE_METRICS = {
    "clip_score": ImageMetric(
        partial(load_clip_metric, "clip_score"), "CLIPScore, ViT-L/14, x 100, higher is better",
        "openai/clip-vit-large-patch14", prompted=True,
    ),
    "image_reward": ImageMetric(
        load_image_reward, "ImageReward v1.0, higher is better",
        protocol="ImageReward-v1.0", prompted=True,
    ),
    "aesthetic": ImageMetric(
        load_aesthetic, "LAION aesthetic predictor V1, ViT-L/14, higher is better",
        "shunk031/aesthetics-predictor-v1-vit-large-patch14",
    ),
    "pick_score": ImageMetric(
        partial(load_clip_metric, "pick_score"), "PickScore v1, higher is better",
        "yuvalkirstain/PickScore_v1", prompted=True,
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
        partial(load_demo, "demo_layout"), "share with the right layout and shape",
        protocol="dype.demo.layout_check", prompted=True, interval=intervals.wilson_interval,
    ),
    "demo_overlap": ImageMetric(
        partial(load_demo, "demo_overlap"), "overlap with the asked shape, higher is better",
        protocol="dype.demo.layout_check", prompted=True,
    ),
}  # fmt: skip
