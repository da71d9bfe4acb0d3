"""Turn the settings of a run into a pipeline, an image and its record."""

import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version

import torch
from accelerate import PartialState
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from tqdm import tqdm

from dype import rope
from dype.config import name_flags
from dype.errors import UserError
from dype.noise_schedule import noise_schedule
from dype.patch import apply_dype
from dype.pipelines import acceleration, distributed, memory
from dype.pipelines.catalog import takes_guidance
from dype.pipelines.devices import check_device, default_device, fast_dtype
from dype.pipelines.fingerprint import COMMIT, fingerprint, hash_files, is_mapped
from dype.pipelines.loading import check_files, load_pipeline
from dype.pipelines.memory import execution_device, set_tiling
from dype.pipelines.processes import CONTEXT_PARALLEL_PIPELINES
from dype.sampling import forecast, multipass, records, sample
from dype.sampling.latents import check_refining
from dype.sampling.progress import ImageBar, show_word
from dype.sampling.settings import RunSettings, lora_pairs

# settings that `load_pipeline` takes
LOADING_SETTINGS = ("revision", "variant", "transformer", "dtype", "text_encoder_device")
LOADING_SETTINGS += ("vae_device", "offload", "quantize")
# settings that `sample.generate` takes for every pass
SAMPLING_SETTINGS = ("guidance", "seed", "max_sequence_length", "true_cfg", "cache")


def check_checkpoint(run: RunSettings) -> None:
    """Check the files of a run's model, before anything is loaded.

    Raises UserError or UnavailableError.
    """
    check_files(run.model, run.entry, **run.files)


def load_for_run(run: RunSettings, pixels: int, state: PartialState):
    """Load the pipeline of a run, and compile its transformer if the settings say so.

    Args:
        run: settings of the run.
        pixels: number of pixels of the largest image.
        state: from `distributed.init_processes`; with several processes each has its own device.

    Raises:
        UserError: the settings do not fit the checkpoint.
        UnavailableError: the machine lacks a package or a device.
        OSError: the weights changed while they were loaded.
    """
    use_local_device = state.num_processes > 1 and state.device.type != "cpu"
    device = str(state.device) if use_local_device else run.device
    if run.attention is not None:
        check_device(device or default_device(), "none")
        masked = run.entry.pipeline in acceleration.MASKED_PIPELINES
        acceleration.check_attention(run.attention, device or default_device(), run.dtype, masked)
    files = hash_weights(run)
    disable_progress_bar()  # diffusers' bar of loading, in place of which there is a word
    with show_word(f"loading {run.model}", state.is_main_process):
        pipe = load_pipeline(
            run.model,
            **{name: getattr(run, name) for name in LOADING_SETTINGS},
            device=device,
            loras=lora_pairs(run),
            pixels=pixels,
            entry=run.entry,
        )
    pipe.set_progress_bar_config(disable=True)  # because `ImageBar` has all passes
    check_unchanged(run, files, loaded=False)
    pipe.dype_files = files
    pipe.dype_weights = {
        part: fingerprint(*source)
        for part, source in run.weight_sources.items()
        if part in files or part != "model"  # a model of the hub has its commit in the record
    }
    if run.cache != "off":
        print(acceleration.CACHE_WARNING.format(run.cache))
    if run.ulysses > 1:
        distributed.check_heads(pipe.transformer, run.ulysses)
    acceleration.compile_transformer(pipe, run.compile)
    return pipe


def prepare_pipeline(pipe, run: RunSettings) -> dict:
    """Set the position encoding, noise schedule and tiling of a run; return their record entries.

    Raises UserError if the checkpoint does not support the settings.
    """
    if run.guidance and not takes_guidance(run.entry, pipe.transformer.config):
        raise UserError(f"--guidance is {run.guidance:g}, but {run.model} takes none, expected 0")
    try:
        apply_dype(pipe, run.config)
        if run.encodes_images:
            check_refining(pipe)
    except (TypeError, ValueError) as error:  # because some checks need the loaded checkpoint
        raise UserError(f"{run.model}: {name_flags(str(error))}") from error
    tiled = set_tiling(pipe, run.tiled_vae, run.tile_size, run.height * run.width)
    memory.reset_peak()
    return schedule_record(pipe.scheduler, run) | {"tiled_vae": tiled}


def image_bar(run: RunSettings, label: str = "", **options) -> ImageBar:
    """Return the bar of an image.

    Args:
        run: settings of the image.
        label: text before the bar; "": size and seed.
        options: arguments of `ImageBar`.
    """
    label = label or f"{run.width}x{run.height} seed {run.seed}"
    return ImageBar(label, forecast.count_steps(run), **options)


def generate_with_record(
    pipe, run: RunSettings, prepared: dict, encode: Callable, bar: ImageBar
) -> tuple[Image.Image, dict]:
    """Generate an image and its record, whose seconds do not include the text encoders.

    Args:
        pipe: pipeline that `prepare_pipeline` has set up.
        run: settings of the image.
        prepared: record entries that `prepare_pipeline` returned.
        encode: function from a text to its embeddings, as `sample.prompt_encoder` returns.
        bar: bar of the image.

    Raises:
        OSError: a file of the weights changed, and it was still in use.
    """
    bar.say("encoding the prompt")
    negative = sample.negative_prompt_for(pipe, run)
    call = {name: getattr(run, name) for name in SAMPLING_SETTINGS}
    call["negative_prompt"] = None if negative is None else encode(negative)
    call["image"] = records.open_image(run.init_image) if run.init_image else None
    call["on_step"] = bar.finish_step
    prompt = encode(run.prompt)
    bar.say("")
    start = time.perf_counter()
    split = nullcontext()
    if run.processes > 1:
        equal_shards = CONTEXT_PARALLEL_PIPELINES[run.entry.pipeline]
        split = distributed.context_parallel(pipe.transformer, run.ulysses, run.ring, equal_shards)
    watch = nullcontext() if run.compile == "off" else watch_compiler(run, bar)
    with acceleration.use_attention(run.attention), split, watch:
        image = multipass.run_passes(pipe, prompt, run.passes, **call)
    seconds = time.perf_counter() - start
    check_unchanged(run, pipe.dype_files, loaded=True)
    if run.multipass == "progressive":  # because only the first image decides where pass 2 starts
        sigmas = prepared["passes"][1]["sigmas"] = pipe.scheduler.sigmas.tolist()
        # tqdm's, because the bar is still there
        tqdm.write(f"full size: {len(sigmas) - 1} of {run.steps} steps, from sigma {sigmas[0]:.2f}")
    info = runtime_info(pipe, seconds)
    forecast.remember(run, bar.steps, seconds, bar.compile_seconds, info["peak_memory"])
    return image, run.record | prepared | info


def watch_compiler(run: RunSettings, bar: ImageBar):
    """Return a context in which the bar says when torch.compile works."""
    seconds = forecast.estimate_compile_seconds(run)
    expected = f", about {forecast.format_duration(seconds)}" if seconds else ""
    return acceleration.watch_compiler(partial(bar.begin_compiling, expected), bar.end_compiling)


def hash_weights(run: RunSettings) -> dict[str, dict]:
    """Return path and hash of each file of each local source that a run loads weights from."""
    return {
        part: hash_files(path, *rest[1:])
        for part, (path, *rest) in run.weight_sources.items()
        if os.path.exists(path)
    }


def check_unchanged(run: RunSettings, before: dict[str, dict], loaded: bool) -> None:
    """Raise OSError if weights may be a mixture of two versions of a file.

    Args:
        run: settings of the run.
        before: result of `hash_weights` before the weights were loaded.
        loaded: they were complete before a file changed, so only a file matters that is still
            mapped into memory; a file that replaced another is not.
    """
    for part, hashes in hash_weights(run).items():
        earlier = before.get(part, hashes)
        changed = [hashes[name][0] for name in hashes if hashes[name] != earlier.get(name)]
        for path in changed:
            if not loaded or is_mapped(path):
                raise OSError(
                    f"{path} was changed while its weights were in use, so no image is saved; "
                    "wait until it is complete, and run the same command again"
                )


def schedule_record(scheduler, run: RunSettings) -> dict:
    """Return mu, sigmas and kappas at the final size, and the sigmas that each pass runs.

    The shift of `scheduler` must be set already.
    """
    family, config, passes = run.entry.family, run.config, []
    for settings in run.passes:  # the last pass has the final size
        height, width, steps = settings["height"], settings["width"], settings["steps"]
        mu, sigmas = noise_schedule(scheduler, height, width, steps, family)
        strength = settings.get("strength")
        first = sample.num_skipped_steps(steps, strength) if strength else 0
        passes.append(settings | {"sigmas": sigmas[first:]})
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
    """Return a sentence with the peak of the memory and the next cheaper setting."""
    device = execution_device(pipe)
    peak, tiled = memory.peak_bytes(device) or 0, getattr(pipe.vae, "use_tiling", False)
    cpu_dtype = fast_dtype("cpu") if device.type == "cpu" else None
    suggestion = memory.suggest_cheaper(run, pipe.dype_offload, tiled, cpu_dtype)
    return f"out of memory at a peak of {memory.format_gib(peak)}; try {suggestion}"


def runtime_info(pipe, seconds: float) -> dict:
    """Return the record entries on machine, versions, seconds and peak memory in bytes."""
    device = execution_device(pipe)
    packages = ("torch", "diffusers", "transformers", "accelerate")
    on_cuda = device.type == "cuda"
    # not of the transformer, which may be a single file
    path = pipe.vae.config.get("_name_or_path") or ""
    snapshot = re.search(rf"snapshots/({COMMIT.pattern})", path)  # the hub's cache names the commit
    return {
        "seconds": round(seconds, 3),
        "peak_memory": memory.peak_bytes(device),
        "offload": pipe.dype_offload,
        "commit": snapshot and snapshot[1],
        "weights": pipe.dype_weights,
        "device": torch.cuda.get_device_name(device) if on_cuda else str(device),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
