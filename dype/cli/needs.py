"""Describe the memory that an image needs, and what is free of it, without loading weights."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

from dype.pipelines import memory
from dype.pipelines.devices import DTYPES, default_device, fast_dtype
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


class MemoryPlan(NamedTuple):
    """Hold what an image needs and what is free, in bytes."""

    device: str
    needed: float  # on the device; 0: unknown
    main: float  # of main memory, beside `needed`
    free: int | None  # on the device; None: this machine has no such device
    free_main: int
    offload: str  # "auto" where the choice cannot be known
    tiled: bool | None  # None: unknown
    lacks_encoders: bool  # whose size is unknown and not in `needed`
    is_measured: bool


def plan_memory(run: RunSettings) -> MemoryPlan:
    """Return what an image needs, by the estimates that place a pipeline, and what is free."""
    device = run.device or default_device()
    free, free_main = free_bytes(device), memory.available_bytes("cpu")
    sizes, pixels, offload = component_bytes(run), run.height * run.width, run.offload
    lacks_encoders = not sizes
    if lacks_encoders and not run.entry.is_guess:
        weights = run.entry.parameters_billion * 1e9 * weight_bytes(run, "transformer")
        sizes = {"transformer": weights}
    if offload == "auto" and free is not None and sizes:
        choice, _ = memory.choose_offload(device, free, sizes, pixels)
        # without the encoders' sizes only the choices that they cannot change are known
        offload = choice if is_main(device) or choice == "group" or not lacks_encoders else "auto"
    decode, tiled = estimate_decode(run, device), {"on": True, "off": False}.get(run.tiled_vae)
    if None not in (decode, free) and tiled is None and offload != "auto":
        tiled = decode > memory.decode_budget(free, sizes, offload)
    total, largest = sum(sizes.values()), max(sizes.values(), default=0)
    weights = {"none": total, "auto": total, "model": largest}.get(offload, 0)
    untiled = decode or 0 if tiled is False else 0
    peak = forecast.estimate_peak(run)
    return MemoryPlan(
        device=device,
        needed=peak or (weights + max(activation_bytes(run), untiled) if sizes else 0),
        main=0 if offload in ("none", "auto") or peak else total,
        free=free,
        free_main=free_main,
        offload=offload,
        tiled=tiled,
        lacks_encoders=lacks_encoders and not peak and run.text_encoder_device is None,
        is_measured=bool(peak),
    )


def is_main(device: str) -> bool:
    """Return whether a device computes in main memory, or in memory that counts as it."""
    return device.partition(":")[0] != "cuda"


def free_bytes(device: str) -> int | None:
    """Return the free bytes of a device; None if this machine does not have it."""
    with suppress(RuntimeError, AssertionError):
        return memory.available_bytes(device)
    return None


def estimate_decode(run: RunSettings, device: str) -> int | None:
    """Return the bytes of an untiled decode on the run's device; None if unknown."""
    folder = local_folder(run)
    if folder is None or run.vae_device is not None:
        return None
    try:
        config = json.loads((folder / "vae" / "config.json").read_text("utf-8"))
        item = DTYPES[run.dtype].itemsize
        return memory.decode_bytes_of(config, item, run.height * run.width, device)
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None


def describe_memory(run: RunSettings, plan: MemoryPlan) -> str:
    """Return a text with the memory that an image needs, where, and what is free."""
    main = f"{memory.format_gib(plan.free_main)} of main memory"
    place = "of main memory" if is_main(plan.device) else f"on {plan.device}"
    if plan.free is None:
        free = f"there is no {plan.device} on this machine to compare with"
    elif is_main(plan.device):
        free = f"{memory.format_gib(plan.free)} are free"
    else:
        free = f"{memory.format_gib(plan.free)} are free {place}, and {main}"
    if not plan.needed:
        return f"unknown, because no file of the model is here; {free}"
    settings = [f"--offload {plan.offload}"] * (plan.offload not in ("none", "auto"))
    settings += ["tiles"] * bool(plan.tiled)
    text = f"needs about {memory.format_gib(plan.needed)} {place}"
    text += f" with {' and '.join(settings)}" if settings else ""
    text += f", and {memory.format_gib(plan.main)} of main memory" if plan.main else ""
    text += ", as before on this machine" if plan.is_measured else ""
    if plan.free is None and plan.offload == "auto":
        text += f" ({memory.format_gib(activation_bytes(run))} with --offload group)"
    text += ", plus its text encoders" if plan.lacks_encoders else ""
    return f"{text}; {free}"


def activation_bytes(run: RunSettings) -> int:
    """Return the bytes that denoising takes beside the weights."""
    return memory.ACTIVATION_BYTES_PER_PIXEL * run.height * run.width


def suggest_setting(run: RunSettings, plan: MemoryPlan) -> str:
    """Return a setting with which an image that does not fit may fit."""
    has_tiles = run.tiled_vae != "off"  # those of "auto" come without a flag
    if is_main(plan.device) or not has_tiles:
        cpu_dtype = fast_dtype("cpu") if is_main(plan.device) else None
        return memory.suggest_cheaper(run, plan.offload, has_tiles, cpu_dtype)
    can_offload = plan.offload in ("none", "model") and activation_bytes(run) <= plan.free
    return "--offload group" if can_offload else "a smaller --size"


def describe_verdict(run: RunSettings, plan: MemoryPlan) -> str:
    """Return whether an image fits the memory, and what to try if not."""
    if plan.free is None or not plan.needed:
        return "unknown"
    # not where "auto" can still choose to offload more
    if plan.needed > plan.free and (is_main(plan.device) or plan.offload != "auto"):
        return f"does not fit; try {suggest_setting(run, plan)}"
    if plan.main > plan.free_main:
        cure = "; try --quantize int8" if run.quantize == "none" else ""
        return f"does not fit in main memory{cure}"
    return "fits, if its text encoders do too" if plan.lacks_encoders else "fits"
