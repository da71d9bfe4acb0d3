"""Draw pictures with a pipeline that is loaded and has DyPE applied."""

import copy
import inspect
import math

import numpy as np
import torch
from PIL import Image

from dype import speed
from dype.config import number
from dype.latents import encode_picture, missing, noised, settled, unpatched
from dype.models import FLUX, TOKEN, Family, family_of, family_of_pipeline
from dype.patch import denoisers
from dype.placement import execution_device, set_aside, text_device


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
    scheduler.set_timesteps(sigmas=unshifted(steps), mu=mu)
    return mu, scheduler.sigmas.tolist()


# What `encode_prompt` of each pipeline returns, as its call takes it; None: not needed there.
EMBEDDINGS = {
    "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds"),
    "Flux2Pipeline": ("prompt_embeds",),
    "Flux2KleinPipeline": ("prompt_embeds",),
    "ChromaPipeline": ("prompt_embeds", None, "prompt_attention_mask"),
    "Krea2Pipeline": ("prompt_embeds", "prompt_embeds_mask"),
    "QwenImagePipeline": ("prompt_embeds", "prompt_embeds_mask"),
    "ZImagePipeline": ("prompt_embeds",),
}


@torch.no_grad()
def encode(pipe, text: str, max_sequence_length: int = 512) -> dict:
    """A prompt as the pipeline's own text encoders see it, on the CPU: what `draw` takes for it.

    Once it is made the encoders can go. Raises TypeError for a pipeline that is not of
    `models.PIPELINES`.
    """
    kind = type(pipe).__name__
    if kind not in EMBEDDINGS:
        raise TypeError(f"{kind} is not supported, expected one of {', '.join(EMBEDDINGS)}")
    call = {
        "prompt": text,
        "prompt_2": None,
        "device": text_device(pipe),
        "do_classifier_free_guidance": False,
        "max_sequence_length": max_sequence_length,
    }
    known = inspect.signature(pipe.encode_prompt).parameters
    found = pipe.encode_prompt(**{name: call[name] for name in known if name in call})
    named = zip(EMBEDDINGS[kind], found, strict=False)
    embeddings = {name: moved(part, "cpu") for name, part in named if name}
    for name, part in embeddings.items():
        if part is None:  # Qwen-Image's, where all tokens count; its call wants to see that
            shape = embeddings["prompt_embeds"].shape[:2]
            embeddings[name] = torch.ones(shape, dtype=torch.long)
    return embeddings


def moved(part, device):
    """A tensor, or a list of them (Z-Image's embeddings), on another device; the rest as it is."""
    if isinstance(part, list):
        return [one.to(device) for one in part]
    return part.to(device) if isinstance(part, torch.Tensor) else part


@torch.no_grad()
def draw(
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
    """One picture of `height` x `width` px, by a text-to-image pipeline of `models.PIPELINES`.

    prompt, negative_prompt: text, or what `encode` made of it. guidance: None is the pipeline's own
    default. image: start from this picture, enlarged to the size and noised, instead of from noise;
    strength in (0, 1] is the share of the steps that are then run, the last ones of the schedule
    for this size, as in diffusers' image-to-image pipelines; None: those in which what the picture
    lacks is to be seen, begun with that much of it as noise (`latents.settled`, `missing`). cache:
    a key of `speed.CACHES`. The noise is drawn on the CPU: a seed means the same start on every
    device, and at strength 1 the same as without a picture.
    """
    known = inspect.signature(pipe.__call__).parameters
    if guidance is None:
        guidance = known["guidance_scale"].default or 0.0
    if negative_prompt is None:
        negative_prompt = implied(pipe, guidance)
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
        call |= worded(pipe, prefix, text, max_sequence_length)
    call = {name: value for name, value in call.items() if name in known}
    if guidance == 0 and known["guidance_scale"].default is None:
        del call["guidance_scale"]  # Qwen-Image warns of any number
    if image is not None:
        call |= started(pipe, image, strength, call)
    apart = getattr(pipe, "dype_apart", {})
    count = len(call.get("sigmas", range(steps)))
    with set_aside(pipe, *apart), speed.caching(pipe, cache, count):
        found = pipe(**call, output_type="latent" if "vae" in apart else "pil").images
    return decode(pipe, found, height, width) if "vae" in apart else found[0]


def worded(pipe, prefix: str, text: str | dict | None, max_sequence_length: int) -> dict:
    """The arguments that say a prompt, as embeddings where the pipeline takes them."""
    if isinstance(text, str):
        known = inspect.signature(pipe.__call__).parameters
        embeds = f"{prefix}prompt_embeds" in known
        text = encode(pipe, text, max_sequence_length) if embeds else {"prompt": text}
    device = execution_device(pipe)
    return {f"{prefix}{name}": moved(part, device) for name, part in (text or {}).items()}


def implied(pipe, guidance: float) -> str | None:
    """The negative prompt that a pipeline with guidance of its own takes where none is given."""
    known = inspect.signature(pipe.__call__).parameters
    own = "negative_prompt_embeds" in known and "true_cfg_scale" not in known
    return "" if own and guidance > 0 else None


def started(pipe, image: Image.Image, strength: float | None, call: dict) -> dict:
    """The `latents` and `sigmas` with which a text-to-image pipeline refines a picture."""
    number("strength", strength, 0, 1, above=True, optional=True)
    apart, device = getattr(pipe, "dype_apart", {}), execution_device(pipe)
    with set_aside(pipe, *apart):
        pipe.maybe_free_model_hooks()  # a text encoder may still be on the card
    height, width, steps = (call[name] for name in ("height", "width", "num_inference_steps"))
    family = family_of_pipeline(pipe, family_of(denoisers(pipe)[0]))
    _, sigmas = noise_schedule(pipe.scheduler, height, width, steps, family)
    where, more = torch.device(apart.get("vae", device)), None
    larger = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    latents = encode_picture(pipe, larger, where).to(device)
    if strength is None:
        small = encode_picture(pipe, image, where)
        c, omega, more = missing(unpatched(pipe, latents)[0], unpatched(pipe, small)[0])
        level = settled(c, omega, math.sqrt(latents.numel() / small.numel()))
        first = min(sum(sigma > level for sigma in sigmas[:-1]), steps - 1)
    else:
        first = skipped(steps, strength)
    embeds = call["prompt_embeds"]
    dtype = embeds[0].dtype if isinstance(embeds, list) else embeds.dtype
    seed = call["generator"].initial_seed()
    return {
        "latents": noised(pipe, latents, sigmas[first], seed, dtype, more),
        "sigmas": unshifted(steps)[first:],
    }


def skipped(steps: int, strength: float) -> int:
    """How many of the first steps are left out, as in diffusers' image-to-image pipelines."""
    return min(int(steps - steps * strength), steps - 1)


def unshifted(steps: int) -> list[float]:
    """The sigmas that every pipeline hands to its scheduler, which shifts them."""
    return np.linspace(1.0, 1 / steps, steps).tolist()


def decode(pipe, packed: torch.Tensor, height: int, width: int) -> Image.Image:
    """FLUX.1's packed latents to a picture, where the autoencoder has a device of its own."""
    latents = pipe._unpack_latents(packed, height, width, pipe.vae_scale_factor)
    latents = latents.to(pipe.vae.device) / pipe.vae.config.scaling_factor
    latents = latents + pipe.vae.config.shift_factor
    decoded = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
    return pipe.image_processor.postprocess(decoded)[0]


# --multipass -> the scale of each pass
PASSES = {"single": (1.0,), "twopass": (0.5, 1.0), "threepass": (0.25, 0.5, 1.0)}
PASSES["progressive"] = ()  # see `progressive`, which has its own
STRENGTHS = {2: "pass2_strength", 3: "pass3_strength"}  # by the number of passes that have it


def progressive(height: int, width: int, base_resolution: int, steps: int) -> list[dict]:
    """Passes for `multipass`: a picture of the base resolution's area first; then, enlarged, the
    steps alone in which something finer is to be seen. Raises ValueError if the size is no larger.
    """
    scale = base_resolution / math.sqrt(height * width)
    if scale >= 1:
        raise ValueError(
            f"progressive passes begin at {base_resolution}x{base_resolution} px, expected a "
            f"larger picture than {width}x{height}"
        )
    both = [{"scale": scale, "steps": steps}, {"scale": 1.0, "steps": steps}]
    return [both[0], both[1] | {"strength": None}]


def passes_of(name: str, steps: int, *strengths: float) -> list[dict]:
    """The passes of a name of `PASSES`; strengths: of the second, the third."""
    found = [{"scale": scale, "steps": steps} for scale in PASSES[name]]
    for later, strength in zip(found[1:], strengths, strict=False):
        later["strength"] = strength
    return found


def multipass(pipe, prompt, height: int, width: int, passes: list[dict], **settings):
    """A picture of `height` x `width` px in several passes, each refining the one before.

    passes: dicts with `scale` (of both sides; growing, at last 1), `steps`, and from the second on
    `strength` in (0, 1], or None as in `draw`. The picture of each pass is enlarged and noised to
    the level that the next one's schedule has there, which depends on the size where the shift
    does. settings: the others of `draw`. Hand-over is in pixels: no family's autoencoder commutes
    with enlarging (docs/log.md). Raises ValueError for passes that make no sense.
    """
    image = None
    for one in sized(passes, height, width):
        image = draw(pipe, prompt, image=image, **settings | one)
    return image


def sized(passes: list[dict], height: int, width: int) -> list[dict]:
    """The passes with their sizes in px instead of scales. Raises ValueError."""
    found, before = [], 0.0
    if not passes:
        raise ValueError("passes is empty, expected at least one")
    for one in passes:
        if unknown := one.keys() - {"scale", "steps", "strength"}:
            raise ValueError(f"a pass has {min(unknown)!r}, expected scale, steps and strength")
        if not {"scale", "steps"} <= one.keys() or ("strength" in one) != bool(found):
            raise ValueError(
                f"a pass is {one}, expected scale and steps, and strength from the second on"
            )
        number("scale", one["scale"], before, 1, above=True)
        number("steps", one["steps"], 1, 1000, whole=True)
        number("strength", one.get("strength", 1.0), 0, 1, above=True, optional=True)
        before = one["scale"]
        sides = {"height": resized(height, before), "width": resized(width, before)}
        found.append(sides | {name: one[name] for name in ("steps", "strength") if name in one})
    if before != 1:
        raise ValueError(f"the last pass has scale {before}, expected 1")
    return found


def resized(side: int, scale: float) -> int:
    """A side in px at a fraction of its length, to the nearest token."""
    return max(TOKEN, math.floor(side * scale / TOKEN + 0.5) * TOKEN)
