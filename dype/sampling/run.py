"""Settings -> a pipeline, an image and its record."""

import platform
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version

import torch
from accelerate import PartialState
from PIL import Image

from dype import rope
from dype.errors import UserError
from dype.noise_schedule import noise_schedule
from dype.patch import apply_dype
from dype.pipelines import acceleration, distributed, memory
from dype.pipelines.devices import check_device, default_device, fast_dtype
from dype.pipelines.loading import load_pipeline
from dype.pipelines.memory import execution_device, set_tiling
from dype.sampling import multipass, records, sample
from dype.sampling.settings import RunSettings

LOADING_SETTINGS = ("revision", "dtype", "text_encoder_device", "vae_device", "offload", "quantize")
SAMPLING_SETTINGS = (
    "guidance",
    "seed",
    "max_sequence_length",
    "true_cfg",
    "cache",
)  # of `sample.generate`


def load_for_run(run: RunSettings, pixels: int, state: PartialState):
    """The pipeline of a run, compiled where it asks for that.

    pixels: of the largest image. state: of `distributed.init_processes`; each of several processes has a card
    of its own. Raises UserError, UnavailableError.
    """
    own_card = state.num_processes > 1 and state.device.type != "cpu"
    device = str(state.device) if own_card else run.device
    if run.attention is not None:
        check_device(device or default_device(), "none")
        masked = run.entry.pipeline in acceleration.USES_ATTENTION_MASK
        acceleration.check_attention(run.attention, device or default_device(), run.dtype, masked)
    loras = [text.rpartition(":") for text in run.lora]
    pipe = load_pipeline(
        run.model,
        **{name: getattr(run, name) for name in LOADING_SETTINGS},
        device=device,
        loras=[(path, float(scale)) for path, _, scale in loras],
        pixels=pixels,
        entry=run.entry,
    )
    if run.cache != "off":
        print(acceleration.CACHE_WARNING.format(run.cache))
    if run.ulysses > 1:
        distributed.check_divisible(pipe.transformer, run.ulysses)
    acceleration.compile_transformer(pipe, run.compile)
    return pipe


def prepare_pipeline(pipe, run: RunSettings) -> dict:
    """Set the encoding, the schedule and the tiling of a run; return what its record says of them.

    Raises UserError if this checkpoint cannot have them.
    """
    try:
        apply_dype(pipe, run.config)
    except (TypeError, ValueError) as error:  # what only the loaded checkpoint can tell
        raise UserError(f"{run.model}: {error}") from error
    tiled = set_tiling(pipe, run.tiled_vae, run.tile_size, run.height * run.width)
    memory.reset_peak()
    return schedule_record(pipe.scheduler, run) | {"tiled_vae": tiled}


def generate_with_record(
    pipe, run: RunSettings, prepared: dict, encode: Callable
) -> tuple[Image.Image, dict]:
    """Generate an image; its record's seconds are those after the text encoders.

    prepared: what `prepare_pipeline` returned. encode: a text -> its embeddings, as `sample.encode_prompt`.
    """
    negative = sample.negative_prompt_for(pipe, run)
    call = {name: getattr(run, name) for name in SAMPLING_SETTINGS}
    call["negative_prompt"] = None if negative is None else encode(negative)
    call["image"] = records.open_image(run.init_image) if run.init_image else None
    text = encode(run.prompt)
    start = time.perf_counter()
    split = nullcontext()
    if run.processes > 1:
        evenly = distributed.CONTEXT_PARALLEL_PIPELINES[run.entry.pipeline]
        split = distributed.context_parallel(pipe.transformer, run.ulysses, run.ring, evenly)
    with acceleration.use_attention(run.attention), split:
        image = multipass.run_passes(pipe, text, run.passes, **call)
    seconds = time.perf_counter() - start
    if run.multipass == "progressive":  # which the image itself has settled
        sigmas = prepared["passes"][1]["sigmas"] = pipe.scheduler.sigmas.tolist()
        print(f"full size: {len(sigmas) - 1} of {run.steps} steps, from sigma {sigmas[0]:.2f}")
    return image, run.record | prepared | runtime_info(pipe, seconds)


def schedule_record(scheduler, run: RunSettings) -> dict:
    """mu, the sigmas and kappas of the schedule for the whole size, and what each pass runs of its
    own; the scheduler has the shift set already."""
    family, config, passes = run.entry.family, run.config, []
    for part in run.passes:  # the last of the whole size
        height, width, steps = part["height"], part["width"], part["steps"]
        mu, sigmas = noise_schedule(scheduler, height, width, steps, family)
        first = sample.num_skipped_steps(steps, part["strength"]) if part.get("strength") else 0
        passes.append(part | {"sigmas": sigmas[first:]})
    kappa, _ = rope.kappa_schedule(torch.tensor(sigmas[:-1], dtype=torch.float64), config)
    return {
        "shift": "static" if mu is None else config.shift or family.shift,
        "lambda_s": config.lambda_s,
        "mu": mu,
        "sigmas": sigmas,
        "kappas": kappa.tolist(),
        "passes": passes,
    }


def explain_out_of_memory(pipe, run: RunSettings) -> str:
    """One sentence with the peak and the next cheaper setting."""
    device = execution_device(pipe)
    peak, tiled = memory.peak_bytes(device) or 0, getattr(pipe.vae, "use_tiling", False)
    cpu_dtype = fast_dtype("cpu") if device.type == "cpu" else None
    less = memory.suggest_cheaper(run, pipe.dype_offload, tiled, cpu_dtype)
    return f"out of memory at a peak of {memory.format_gib(peak)}; try {less}"


def runtime_info(pipe, seconds: float) -> dict:
    """What drew the image, how long it took and how much memory that needed, in bytes."""
    device = execution_device(pipe)
    packages = ("torch", "diffusers", "transformers", "accelerate")
    on_cuda = device.type == "cuda"
    path = pipe.transformer.config.get("_name_or_path") or ""
    snapshot = re.search(r"snapshots/([0-9a-f]{40})", path)  # in the hub's cache: its commit
    return {
        "seconds": round(seconds, 3),
        "peak_memory": memory.peak_bytes(device),
        "offload": pipe.dype_offload,
        "commit": snapshot and snapshot[1],
        "device": torch.cuda.get_device_name(device) if on_cuda else str(device),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
