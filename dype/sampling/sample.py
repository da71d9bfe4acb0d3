"""Generate one image in one pass with a loaded pipeline."""

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
from tqdm import tqdm

from dype.config import check_number
from dype.families import family_of, family_of_pipeline
from dype.noise_schedule import noise_schedule
from dype.patch import transformer_and_controlnets
from dype.pipelines import acceleration
from dype.pipelines.memory import execution_device, hide_components
from dype.sampling.latents import (
    check_finite,
    check_finite_decoding,
    encode_latents,
    missing_power,
    noisy_latents,
    switch_sigma,
    unpatchify,
)
from dype.sampling.prompts import describe_cuts, record_cuts

# pipeline -> the argument of its call for each result of its `encode_prompt`; None: not an argument
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
    """Encode a prompt with the pipeline's text encoders, which can be dropped afterwards.

    Args:
        pipe: text-to-image pipeline of `catalog.PIPELINES`.
        text: prompt or negative prompt.
        max_sequence_length: maximum number of text tokens.

    Returns:
        Embeddings and masks on the CPU by argument name, the form that `generate` takes.

    Raises:
        TypeError: the pipeline is not a key of `PROMPT_EMBEDDING_ARGUMENTS`.
    """
    kind = type(pipe).__name__
    if kind not in PROMPT_EMBEDDING_ARGUMENTS:
        raise TypeError(
            f"{kind} is not supported, expected one of {', '.join(PROMPT_EMBEDDING_ARGUMENTS)}"
        )
    device_override = getattr(pipe, "dype_device_overrides", {}).get("text_encoder")
    call = {
        "prompt": text,
        "prompt_2": None,
        "device": torch.device(device_override or execution_device(pipe)),
        "do_classifier_free_guidance": False,
        "max_sequence_length": max_sequence_length,
    }
    parameters = inspect.signature(pipe.encode_prompt).parameters
    results = pipe.encode_prompt(**{name: call[name] for name in parameters if name in call})
    pairs = zip(PROMPT_EMBEDDING_ARGUMENTS[kind], results, strict=False)
    embeddings = send_to_device({name: value for name, value in pairs if name}, "cpu")
    for name, value in embeddings.items():
        if value is None:  # Qwen-Image returns no mask if all tokens count, but its call needs one
            shape = embeddings["prompt_embeds"].shape[:2]
            embeddings[name] = torch.ones(shape, dtype=torch.long)
    return embeddings


def prompt_encoder(pipe, runs: list) -> Callable:
    """Return a cached function from a text to its embeddings.

    Text encoders with a device override encode the prompts of all runs now and are then dropped.

    Args:
        pipe: text-to-image pipeline.
        runs: `RunSettings` of all images to generate.
    """

    overrides = [name for name in pipe.dype_device_overrides if name.startswith("text_encoder")]
    cache = lru_cache(maxsize=None if overrides else 8)
    notes: set[str] = set()  # because a text may be encoded again, but each is printed once

    @cache
    def encode_text(text: str) -> dict:
        """Encode a text, and say what of it is cut off."""
        length = runs[0].max_sequence_length
        with record_cuts(pipe, length) as cuts:
            embeddings = encode_prompt(pipe, text, length)
        for note in describe_cuts(text, cuts, length, runs[0].entry.max_text_tokens):
            if note not in notes:
                tqdm.write(note)  # because a bar may be there
            notes.add(note)
        return embeddings

    if overrides:
        texts = {run.prompt for run in runs} | {negative_prompt_for(pipe, run) for run in runs}
        for text in texts - {None}:
            encode_text(text)
        for name in overrides:
            setattr(pipe, name, None)
        gc.collect()
    return encode_text


def negative_prompt_for(pipe, run) -> str | None:
    """Return a run's negative prompt, or the one that the pipeline's guidance implies, or None."""
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
    on_step: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """Generate one image of `height` x `width` px in one pass.

    The noise is sampled on the CPU, so a seed gives the same initial noise on every device. With
    `image` and strength 1 the initial noise is the same as without an image.

    Args:
        pipe: text-to-image pipeline of `catalog.PIPELINES`.
        prompt: text, or the embeddings that `encode_prompt` returns.
        height: px.
        width: px.
        steps: number of steps of the schedule.
        guidance: the pipeline's guidance_scale; None is the pipeline's default.
        seed: seed of the noise.
        max_sequence_length: maximum number of text tokens.
        negative_prompt: text or embeddings; None is the prompt that the guidance implies.
        true_cfg: scale of classifier-free guidance with two denoiser calls a step; 1 is off.
        image: image to upscale to the size and to refine; None starts from noise.
        strength: fraction of the steps that refine `image`, in (0, 1]. They are the last ones of
            the schedule, as in diffusers' image-to-image pipelines. None chooses the steps in
            which the details that `image` lacks are visible (`latents.switch_sigma`). It also adds
            the power of those details to the initial noise (`latents.missing_power`).
        cache: key of `acceleration.CACHES`.
        on_step: called after each step with its number, from 1, and the number of steps.

    Raises:
        UnavailableError: embeddings, latents or the decoded image have NaN or infinite values.
    """
    parameters, device = inspect.signature(pipe.__call__).parameters, execution_device(pipe)
    if guidance is None:
        guidance = parameters["guidance_scale"].default or 0.0
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
        arguments = text or {}
        if isinstance(text, str):
            arguments = {"prompt": text}
            if f"{prefix}prompt_embeds" in parameters:
                arguments = encode_prompt(pipe, text, max_sequence_length)
        embeddings = arguments.get("prompt_embeds", ())  # Z-Image: a list
        # because a text encoder in float16 overflows with some prompts, and the steps take long
        check_finite("embedding of the prompt", *(torch.isfinite(x).all() for x in embeddings))
        call |= {f"{prefix}{name}": value for name, value in arguments.items()}
    call = {name: value for name, value in call.items() if name in parameters}
    call = send_to_device(call, device)
    if parameters["guidance_scale"].default is None and not pipe.transformer.config.guidance_embeds:
        del call["guidance_scale"]  # because Qwen-Image warns of any number
    if image is not None:
        call |= img2img_arguments(pipe, image, strength, call)
    vae_override = "vae" in getattr(pipe, "dype_device_overrides", {})
    count = len(call.get("sigmas", range(steps)))
    if on_step is not None:

        def finish_step(pipe, index, timestep, tensors) -> dict:
            on_step(index + 1, count)
            return {}  # no tensor is replaced

        call["callback_on_step_end"] = finish_step
    reuse = nullcontext() if cache == "off" else acceleration.use_feature_cache(pipe, cache, count)
    with check_finite_decoding(pipe.vae):
        # "pt", because the conversion of NaN to 8 bits warns
        with hide_components(pipe), reuse:
            images = pipe(**call, output_type="latent" if vae_override else "pt").images
        images = decode_latents(pipe, images, height, width) if vae_override else images
    processor = pipe.image_processor
    return processor.numpy_to_pil(processor.pt_to_numpy(images))[0]


def implied_negative_prompt(pipe, guidance: float) -> str | None:
    """Return "" if the pipeline's guidance_scale is classifier-free guidance and on, else None."""
    parameters = inspect.signature(pipe.__call__).parameters
    uses_cfg = "negative_prompt_embeds" in parameters and "true_cfg_scale" not in parameters
    return "" if uses_cfg and guidance > 0 else None


def img2img_arguments(pipe, image: Image.Image, strength: float | None, call: dict) -> dict:
    """Return the `latents` and `sigmas` with which a text-to-image pipeline refines an image.

    Args:
        pipe: text-to-image pipeline.
        image: image to upscale to the size of `call`.
        strength: fraction of the steps to run, or None, as in `generate`.
        call: further arguments of the pipeline's call.
    """
    check_number("strength", strength, 0, 1, exclusive=True, optional=True)
    device, extra_power = execution_device(pipe), None
    with hide_components(pipe):
        pipe.maybe_free_model_hooks()  # because a text encoder may still be on the GPU
    height, width, steps = (call[name] for name in ("height", "width", "num_inference_steps"))
    family = family_of_pipeline(pipe, family_of(transformer_and_controlnets(pipe)[0]))
    _, sigmas = noise_schedule(pipe.scheduler, height, width, steps, family)
    vae_device = torch.device(getattr(pipe, "dype_device_overrides", {}).get("vae", device))
    upscaled = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    latents = encode_latents(pipe, upscaled, vae_device).to(device)
    if strength is None:
        small = encode_latents(pipe, image, vae_device)
        c, omega, extra_power = missing_power(
            unpatchify(pipe, latents)[0], unpatchify(pipe, small)[0]
        )
        threshold = switch_sigma(c, omega, math.sqrt(latents.numel() / small.numel()))
        first = min(sum(sigma > threshold for sigma in sigmas[:-1]), steps - 1)
    else:
        first = num_skipped_steps(steps, strength)
    dtype = call["prompt_embeds"][0].dtype  # the first of a list or of a batch
    seed = call["generator"].initial_seed()
    return {
        "latents": noisy_latents(pipe, latents, sigmas[first], seed, dtype, extra_power),
        "sigmas": np.linspace(1.0, 1 / steps, steps)[first:],  # the scheduler shifts them
    }


def num_skipped_steps(steps: int, strength: float) -> int:
    """Return the number of first steps to skip, as in diffusers' image-to-image pipelines."""
    return min(int(steps - steps * strength), steps - 1)


def decode_latents(pipe, packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Decode FLUX.1's packed latents on the device of the autoencoder: [1, 3, H, W] in [0, 1].

    Args:
        pipe: FLUX.1 pipeline whose autoencoder has a device override.
        packed: latents as the pipeline returns them, [1, tokens, channels].
        height: px.
        width: px.
    """
    latents = pipe._unpack_latents(packed, height, width, pipe.vae_scale_factor)
    latents = latents.to(pipe.vae.device) / pipe.vae.config.scaling_factor
    latents = latents + pipe.vae.config.shift_factor
    decoded = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
    return pipe.image_processor.postprocess(decoded, output_type="pt")
