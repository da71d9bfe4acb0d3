"""Draw pictures with a pipeline that is loaded and has DyPE applied."""

import copy
import inspect
import math
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from dype.models import FLUX, TOKEN, Family


def noise_schedule(
    scheduler, height: int, width: int, steps: int, family: Family = FLUX
) -> tuple[float | None, list]:
    """The mu (None: a static shift) and the sigmas, ending in 0, that a pipeline will use."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config, scheduler = scheduler.config, copy.deepcopy(scheduler)
    mu = None
    if family.mu and hasattr(scheduler, "dype_shift"):
        mu = math.log(config.shift)  # the cap, which stands in the configuration as a static shift
    if config.get("use_dynamic_shifting"):
        tokens = (height // TOKEN) * (width // TOKEN)
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        numbers = [config[name] for name in names]
        mu = family.mu(tokens, steps) if family.mu else calculate_shift(tokens, *numbers)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return mu, scheduler.sigmas.tolist()


@torch.no_grad()
def draw(
    pipe,
    prompt: str,
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float,
    seed: int,
    max_sequence_length: int = 512,
    negative_prompt: str | None = None,
    true_cfg: float = 1.0,
) -> Image.Image:
    """One picture of `height` x `width` px. The noise is drawn on the CPU: a seed means the same
    start on every device."""
    common = {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "true_cfg_scale": true_cfg,
        "max_sequence_length": max_sequence_length,
        "generator": torch.Generator("cpu").manual_seed(seed),
    }
    if not getattr(pipe, "dype_apart", False):  # set by `pipelines.place`
        common |= {"prompt": prompt, "negative_prompt": negative_prompt}
        known = inspect.signature(pipe.__call__).parameters
        common = {name: value for name, value in common.items() if name in known}
        if guidance == 0 and known["guidance_scale"].default is None:
            del common["guidance_scale"]  # Qwen-Image warns of any number
        return pipe(**common).images[0]

    home, vae_device = pipe.transformer.device, pipe.vae.device
    text_device = pipe.text_encoder_2.device
    embeds = {}
    for prefix, text in (("", prompt), ("negative_", negative_prompt)):
        if text is not None:
            sequence, pooled, _ = pipe.encode_prompt(
                text, None, device=text_device, max_sequence_length=max_sequence_length
            )
            embeds[f"{prefix}prompt_embeds"] = sequence.to(home)
            embeds[f"{prefix}pooled_prompt_embeds"] = pooled.to(home)
    with set_aside(pipe, "text_encoder", "text_encoder_2", "vae"):
        packed = pipe(**embeds, **common, output_type="latent").images
    latents = pipe._unpack_latents(packed, height, width, pipe.vae_scale_factor).to(vae_device)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    decoded = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
    return pipe.image_processor.postprocess(decoded)[0]


@contextmanager
def set_aside(pipe, *names: str):
    """Parts on other devices, out of the pipeline's sight: it takes its device from its parts."""
    parts = {name: getattr(pipe, name) for name in names}
    try:
        for name in names:
            setattr(pipe, name, None)
        yield
    finally:
        for name, part in parts.items():
            setattr(pipe, name, part)
