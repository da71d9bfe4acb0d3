"""Generate one image with a pipeline that is loaded and has DyPE applied."""

import gc
import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image

from dype.config import check_number
from dype.families import family_of, family_of_pipeline
from dype.noise_schedule import noise_schedule
from dype.patch import transformer_and_controlnets
from dype.pipelines import acceleration
from dype.pipelines.memory import execution_device, hide_components
from dype.sampling.latents import add_noise, encode_image, missing_power, switch_sigma, unpatchify

# What `encode_prompt` of each pipeline returns, as its call takes it; None: not needed there.
PROMPT_EMBEDDING_ARGUMENTS = {
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds"),
    "Flux2Pipeline": ("prompt_embeds",),
    "Flux2KleinPipeline": ("prompt_embeds",),
    "ChromaPipeline": ("prompt_embeds", None, "prompt_attention_mask"),
    "Krea2Pipeline": ("prompt_embeds", "prompt_embeds_mask"),
    "QwenImagePipeline": ("prompt_embeds", "prompt_embeds_mask"),
    "ZImagePipeline": ("prompt_embeds",),
}


@torch.no_grad()
def encode_prompt(pipe, text: str, max_sequence_length: int = 512) -> dict:
    """A prompt as the pipeline's own text encoders see it, on the CPU: what `generate` takes for it.

    Once it is made the encoders can go. Raises TypeError for a pipeline that is not of
    `catalog.PIPELINES`.
    """
    kind = type(pipe).__name__
    if kind not in PROMPT_EMBEDDING_ARGUMENTS:
        raise TypeError(
            f"{kind} is not supported, expected one of {', '.join(PROMPT_EMBEDDING_ARGUMENTS)}"
        )
    elsewhere = getattr(pipe, "dype_device_overrides", {}).get("text_encoder")
    call = {
        "prompt": text,
        "prompt_2": None,
        "device": torch.device(elsewhere or execution_device(pipe)),
        "do_classifier_free_guidance": False,
        "max_sequence_length": max_sequence_length,
    }
    known = inspect.signature(pipe.encode_prompt).parameters
    found = pipe.encode_prompt(**{name: call[name] for name in known if name in call})
    named = zip(PROMPT_EMBEDDING_ARGUMENTS[kind], found, strict=False)
    embeddings = send_to_device({name: part for name, part in named if name}, "cpu")
    for name, part in embeddings.items():
        if part is None:  # Qwen-Image's, where all tokens count; its call wants to see that
            shape = embeddings["prompt_embeds"].shape[:2]
            embeddings[name] = torch.ones(shape, dtype=torch.long)
    return embeddings


def prompt_encoder(pipe, runs: list) -> Callable:
    """A text -> its embeddings. Encoders with a device of their own encode all, and go.

    runs: `RunSettings`, of the images to be generated.
    """

    apart = [name for name in pipe.dype_device_overrides if name.startswith("text_encoder")]
    kept = lru_cache(maxsize=None if apart else 8)
    encode_text = kept(lambda text: encode_prompt(pipe, text, runs[0].max_sequence_length))
    if apart:
        texts = {run.prompt for run in runs} | {negative_prompt_for(pipe, run) for run in runs}
        for text in texts - {None}:
            encode_text(text)
        for name in apart:
            setattr(pipe, name, None)
        gc.collect()
    return encode_text


def negative_prompt_for(pipe, run) -> str | None:
    """A run's negative prompt, or the one that a pipeline with guidance implies; None: none."""
    return (
        implied_negative_prompt(pipe, run.guidance)
        if run.negative_prompt is None
        else run.negative_prompt
    )


@torch.no_grad()
def generate(
    pipe,
    prompt: str | dict,
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float | None = None,
    seed: int = 42,
    max_sequence_length: int = 512,
    negative_prompt: str | dict | None = None,
    true_cfg: float = 1.0,
    image: Image.Image | None = None,
    strength: float | None = 1.0,
    cache: str = "off",
) -> Image.Image:
    """One image of `height` x `width` px, by a text-to-image pipeline of `catalog.PIPELINES`.

    prompt, negative_prompt: text, or what `encode_prompt` made of it. guidance: None is the pipeline's own
    default. image: start from this image, enlarged to the size and noised, instead of from noise;
    strength in (0, 1] is the share of the steps that are then run, the last ones of the schedule
    for this size, as in diffusers' image-to-image pipelines; None: those in which what the image
    lacks is to be seen, begun with that much of it as noise (`latents.switch_sigma`, `missing_power`). cache:
    a key of `acceleration.CACHES`. The noise is drawn on the CPU: a seed means the same start on
    every device, and at strength 1 the same as without an image.
    """
    known, device = inspect.signature(pipe.__call__).parameters, execution_device(pipe)
    if guidance is None:
        guidance = known["guidance_scale"].default or 0.0
    if negative_prompt is None:
        negative_prompt = implied_negative_prompt(pipe, guidance)
    call = {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "true_cfg_scale": true_cfg,
        "max_sequence_length": max_sequence_length,
        "generator": torch.Generator("cpu").manual_seed(seed),
    }
    for prefix, text in {"": prompt, "negative_": negative_prompt}.items():
        parts = text or {}
        if isinstance(text, str):
            embeds = f"{prefix}prompt_embeds" in known
            parts = encode_prompt(pipe, text, max_sequence_length) if embeds else {"prompt": text}
        call |= {f"{prefix}{name}": part for name, part in parts.items()}
    call = send_to_device({name: value for name, value in call.items() if name in known}, device)
    if guidance == 0 and known["guidance_scale"].default is None:
        del call["guidance_scale"]  # Qwen-Image warns of any number
    if image is not None:
        call |= img2img_arguments(pipe, image, strength, call)
    apart = "vae" in getattr(pipe, "dype_device_overrides", {})
    count = len(call.get("sigmas", range(steps)))
    reuse = nullcontext() if cache == "off" else acceleration.use_feature_cache(pipe, cache, count)
    with hide_components(pipe), reuse:
        drawn = pipe(**call, output_type="latent" if apart else "pil").images
    return decode_latents(pipe, drawn, height, width) if apart else drawn[0]


def implied_negative_prompt(pipe, guidance: float) -> str | None:
    """The negative prompt that a pipeline with guidance of its own takes where none is given."""
    known = inspect.signature(pipe.__call__).parameters
    own = "negative_prompt_embeds" in known and "true_cfg_scale" not in known
    return "" if own and guidance > 0 else None


def img2img_arguments(pipe, image: Image.Image, strength: float | None, call: dict) -> dict:
    """The `latents` and `sigmas` with which a text-to-image pipeline refines an image."""
    check_number("strength", strength, 0, 1, exclusive=True, optional=True)
    device, more = execution_device(pipe), None
    with hide_components(pipe):
        pipe.maybe_free_model_hooks()  # a text encoder may still be on the card
    height, width, steps = (call[name] for name in ("height", "width", "num_inference_steps"))
    family = family_of_pipeline(pipe, family_of(transformer_and_controlnets(pipe)[0]))
    _, sigmas = noise_schedule(pipe.scheduler, height, width, steps, family)
    where = torch.device(getattr(pipe, "dype_device_overrides", {}).get("vae", device))
    larger = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    latents = encode_image(pipe, larger, where).to(device)
    if strength is None:
        small = encode_image(pipe, image, where)
        c, omega, more = missing_power(unpatchify(pipe, latents)[0], unpatchify(pipe, small)[0])
        level = switch_sigma(c, omega, math.sqrt(latents.numel() / small.numel()))
        first = min(sum(sigma > level for sigma in sigmas[:-1]), steps - 1)
    else:
        first = num_skipped_steps(steps, strength)
    dtype = call["prompt_embeds"][0].dtype  # of the first of a list, or of a batch
    seed = call["generator"].initial_seed()
    return {
        "latents": add_noise(pipe, latents, sigmas[first], seed, dtype, more),
        "sigmas": np.linspace(1.0, 1 / steps, steps)[first:],  # the scheduler shifts them
    }


def num_skipped_steps(steps: int, strength: float) -> int:
    """How many of the first steps are left out, as in diffusers' image-to-image pipelines."""
    return min(int(steps - steps * strength), steps - 1)


def decode_latents(pipe, packed: torch.Tensor, height: int, width: int) -> Image.Image:
    """FLUX.1's packed latents to an image, where the autoencoder has a device of its own."""
    latents = pipe._unpack_latents(packed, height, width, pipe.vae_scale_factor)
    latents = latents.to(pipe.vae.device) / pipe.vae.config.scaling_factor
    latents = latents + pipe.vae.config.shift_factor
    decoded = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
    return pipe.image_processor.postprocess(decoded)[0]
