"""Resolved settings -> an image and its record."""

import gc
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

import torch
from PIL import Image

from dype import rope
from dype.config import DyPEConfig
from dype.noise_schedule import noise_schedule
from dype.patch import apply_dype
from dype.pipelines import acceleration, distributed, memory
from dype.pipelines.catalog import Model
from dype.pipelines.devices import fast_dtype
from dype.pipelines.memory import execution_device, set_tiling
from dype.sampling import multipass, records, sample


@dataclass(frozen=True)
class Settings:
    """Everything that one cell needs, resolved; what is under `flags` goes into the record."""

    model: Model
    config: DyPEConfig
    flags: dict
    prompts: list[str]
    loras: list[tuple[str, float]]

    @property
    def passes(self) -> list[dict]:
        """The passes that the flags ask for, for `multipass.multipass`. Raises ValueError."""
        flags = self.flags
        if flags["multipass"] == "progressive":
            sides, base = (flags["height"], flags["width"]), self.config.base_resolution
            return multipass.progressive(*sides, base, flags["steps"])
        strengths = flags["pass2_strength"], flags["pass3_strength"]
        return multipass.passes_of(flags["multipass"], flags["steps"], *strengths)


def drawn(pipe, settings: Settings, prompt: str, encode: Callable) -> tuple[Image.Image, dict]:
    """One picture and its record, whose seconds are those after the text encoders.

    encode: a text -> its embeddings, as `sample.encode`.
    """
    flags = settings.flags
    height, width = flags["height"], flags["width"]
    apply_dype(pipe, settings.config)
    tiled = set_tiling(pipe, flags["tiled_vae"], flags["tile_size"], height * width)
    schedule = describe_schedule(pipe.scheduler, settings)
    names = ("guidance", "seed", "max_sequence_length", "true_cfg", "cache")
    call = {name: flags[name] for name in names}
    memory.reset_peak()
    negative = against(pipe, flags)
    call["negative_prompt"] = None if negative is None else encode(negative)
    text = encode(prompt)
    start = time.perf_counter()
    evenly = distributed.SPLIT.get(settings.model.pipeline, True)
    split = distributed.split(pipe.transformer, flags["ulysses"], flags["ring"], evenly)
    with acceleration.attending(flags["attention"]), split:
        if flags["init_image"]:
            picture = records.open_picture(flags["init_image"])
            call |= {"image": picture, "strength": flags["strength"], "steps": flags["steps"]}
            image = sample.draw(pipe, text, height=height, width=width, **call)
        else:
            image = multipass.multipass(pipe, text, height, width, settings.passes, **call)
    seconds = time.perf_counter() - start
    if flags["multipass"] == "progressive":  # which the picture itself has settled
        run = schedule["passes"][1]["sigmas"] = pipe.scheduler.sigmas.tolist()
        print(f"full size: {len(run) - 1} of {flags['steps']} steps, from sigma {run[0]:.2f}")
    record = {"prompt": prompt, "flags": flags, "config": settings.config.to_dict(), **schedule}
    return image, record | {"tiled_vae": tiled, **machine(pipe, seconds)}


def against(pipe, flags: dict) -> str | None:
    """The negative prompt, or the one that a pipeline with guidance implies; None: none at all."""
    given = flags["negative_prompt"]
    return sample.implied(pipe, flags["guidance"]) if given is None else given


def describe_schedule(scheduler, settings: Settings) -> dict:
    """mu, the sigmas and kappas of the schedule for the whole size, and what each pass runs of its
    own; the scheduler has the shift set already."""
    flags, family = settings.flags, settings.model.family

    def schedule(height, width, steps):
        return noise_schedule(scheduler, height, width, steps, family)

    mu, sigmas = schedule(flags["height"], flags["width"], flags["steps"])
    called = torch.tensor(sigmas[:-1], dtype=torch.float64)
    kappa, _ = rope.schedule(called, settings.config)
    shift = settings.config.shift or family.shift
    found = {"shift": "static" if mu is None else shift, "lambda_s": settings.config.lambda_s}
    found |= {"mu": mu, "sigmas": sigmas, "kappas": kappa.tolist(), "passes": []}
    run = multipass.sized(settings.passes, flags["height"], flags["width"])
    if flags["init_image"]:
        run[0]["strength"] = flags["strength"]
    for one in run:
        strength = one.get("strength", 1.0)
        first = 0 if strength is None else sample.skipped(one["steps"], strength)
        sigmas = schedule(one["height"], one["width"], one["steps"])[1][first:]
        found["passes"].append(one | {"sigmas": sigmas})
    return found


def encoder(pipe, images: list[tuple[Settings, str]]) -> Callable:
    """A text -> its embeddings. Encoders with a device of their own encode all, and go.

    images: the settings and the prompt of each that is to be generated.
    """
    flags = images[0][0].flags

    @lru_cache(maxsize=8)
    def encode(text):
        return sample.encode(pipe, text, flags["max_sequence_length"])

    apart = [name for name in pipe.dype_apart if name.startswith("text_encoder")]
    if not apart:
        return encode
    texts = {prompt for _, prompt in images}
    texts |= {against(pipe, settings.flags) for settings, _ in images}
    known = {text: encode(text) for text in texts if text is not None}
    for name in apart:
        setattr(pipe, name, None)
    gc.collect()
    return known.__getitem__


def out_of_memory(pipe, settings: Settings) -> str:
    """One sentence with the peak and the next cheaper setting."""
    device = execution_device(pipe)
    peak, tiled = memory.peak(device) or 0, getattr(pipe.vae, "use_tiling", False)
    cpu_dtype = fast_dtype("cpu") if device.type == "cpu" else None
    less = memory.cheaper(settings.flags, pipe.dype_offload, tiled, cpu_dtype)
    return f"out of memory at a peak of {memory.gib(peak)}; try {less}"


def machine(pipe, seconds: float) -> dict:
    """What drew the picture, how long it took and how much memory that needed, in bytes."""
    device = execution_device(pipe)
    packages = ("torch", "diffusers", "transformers", "accelerate")
    on_cuda = device.type == "cuda"
    return {
        "seconds": round(seconds, 3),
        "peak_memory": memory.peak(device),
        "offload": pipe.dype_offload,
        "commit": commit(pipe.transformer.config.get("_name_or_path") or ""),
        "device": torch.cuda.get_device_name(device) if on_cuda else str(device),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }


def commit(path: str) -> str | None:
    """The commit of a model in the hub's cache, from its folder there."""
    found = re.search(r"snapshots/([0-9a-f]{40})", path)
    return found and found[1]
