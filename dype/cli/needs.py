"""Describe the memory that an image needs, and what is free of it, without loading weights."""

import math
from contextlib import suppress
from pathlib import Path

import huggingface_hub

from dype.pipelines import memory
from dype.pipelines.devices import DTYPES, default_device
from dype.pipelines.headers import list_weights, read_header
from dype.pipelines.model_paths import INDEX
from dype.sampling import forecast
from dype.sampling.settings import RunSettings

# --quantize -> bytes of a weight; nf4 has the scales of its blocks beside 4 bits
QUANTIZED_BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.53}


def local_folder(run: RunSettings) -> Path | None:
    """Return the folder of a model, or of its copy in the hub's cache; None without one."""
    if Path(run.entry.repo).is_dir():
        return Path(run.entry.repo)
    index = None
    with suppress(ValueError):  # no name that the hub could have
        index = huggingface_hub.try_to_load_from_cache(run.entry.repo, INDEX, revision=run.revision)
    return Path(index).parent if isinstance(index, str) else None


def count_weights(file: Path) -> int:
    """Return the number of weights in a file. Raises ValueError or OSError."""
    if file.suffix == ".bin":  # a pickle, without a header of its own
        raise ValueError(f"{file} has no header")
    return sum(math.prod(shape) for _, shape in read_header(str(file)).values())


def component_bytes(run: RunSettings) -> dict[str, float]:
    """Return the bytes of each component once it is loaded; {} if the files cannot be read."""
    folder, sizes = local_folder(run), {}
    if folder is None:
        return {}
    try:
        for part in sorted(path for path in folder.iterdir() if path.is_dir()):
            matches = {file: match for file, match in list_weights(part).items() if match}
            has_variant = any(match["variant"] == run.variant for match in matches.values())
            variant = run.variant if has_variant else None
            files = [file for file, match in matches.items() if match["variant"] == variant]
            if part.name == "transformer" and run.transformer is not None:
                files = [Path(run.transformer)]
            if files:
                sizes[part.name] = sum(map(count_weights, files)) * weight_bytes(run, part.name)
    except (OSError, ValueError):
        return {}
    if run.text_encoder_device is not None:  # which are dropped after the prompts
        sizes = {name: size for name, size in sizes.items() if "text_encoder" not in name}
    return sizes if "transformer" in sizes else {}


def weight_bytes(run: RunSettings, component: str) -> float:
    """Return the bytes of a weight of a component."""
    encoder = "text_encoder_2" if run.entry.pipeline == "FluxPipeline" else "text_encoder"
    item = DTYPES[run.dtype].itemsize
    is_quantized = component in ("transformer", encoder)
    return QUANTIZED_BYTES.get(run.quantize, item) if is_quantized else item


def describe_memory(run: RunSettings) -> str:
    """Return a text with the memory that an image needs, and what is free."""
    device = run.device or default_device()
    try:
        free, free_main = memory.available_bytes(device), memory.available_bytes("cpu")
    except (RuntimeError, AssertionError):  # no such device
        return f"unknown, because this machine has no {device}"
    is_main = device.partition(":")[0] != "cuda"
    place = "of main memory" if is_main else f"on {device}"
    free_text = f"{memory.format_gib(free)} free {place}"
    if not is_main:
        free_text += f", {memory.format_gib(free_main)} of main memory"
    if peak := forecast.estimate_peak(run):
        return f"needs about {memory.format_gib(peak)}, as before on this machine; {free_text}"
    pixels = run.height * run.width
    activations = memory.ACTIVATION_BYTES_PER_PIXEL * pixels
    sizes = component_bytes(run)
    if not sizes:
        weights = run.entry.parameters_billion * 1e9 * weight_bytes(run, "transformer")
        if run.entry.is_guess:
            return f"unknown, because no file of the model is here; {free_text}"
        needed = memory.format_gib(weights + activations)
        return f"needs about {needed}, and its text encoders; {free_text}"
    mode = run.offload
    if mode == "auto":
        mode, _ = memory.choose_offload(device, free, sizes, pixels)
    total, largest = sum(sizes.values()), max(sizes.values())
    on_device = {"none": total, "model": largest}.get(mode, 0.0)
    text = f"needs about {memory.format_gib(on_device + activations)}"
    if mode != "none":
        text += f" with --offload {mode}, and {memory.format_gib(total)} of main memory"
    return f"{text}; {free_text}"
