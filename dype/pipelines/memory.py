"""Memory of a pipeline: estimates in bytes, placement of its components, tiled decoding.

Two estimates were not measured here: ACTIVATION_BYTES_PER_PIXEL, and the attention scores in
`decode_bytes`.
"""

import math
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from dype.pipelines.choices import GIB, OFFLOADS

# per pixel of the image; 16 GiB at 4096 x 4096, which FLUX.1 was reported to take
ACTIVATION_BYTES_PER_PIXEL = 1024
QWEN_TILE = 1024  # px
CGROUPS, PROCESS_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CGROUP_FILES = (  # of version 2 and 1: limit, usage, and the cache that memory.stat counts in it
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; a quantized tensor counts the tensors that it wraps."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def available_bytes(device: str | torch.device) -> int:
    """Return free bytes on a CUDA device (unused allocator cache included), else of main memory.

    The main memory of a container is what its limit leaves.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(psutil.virtual_memory().available, cgroup_available_bytes())


def cgroup_available_bytes() -> float:
    """Return the bytes that the limits of this process's control groups leave; inf without any.

    Every group above limits too. Cached files that are not in use count as free, as in psutil.
    """
    available = math.inf
    for folder in cgroup_folders():
        for limit_name, usage_name, cache_name in CGROUP_FILES:
            with suppress(OSError, ValueError):  # no such file, or "max", which is no limit
                limit = int((folder / limit_name).read_text())
                lines = (folder / "memory.stat").read_text().splitlines()
                cache = int(dict(line.split() for line in lines).get(cache_name, 0))
                usage = int((folder / usage_name).read_text())
                available = min(available, max(0, limit - usage + cache))
    return available


def cgroup_folders() -> list[Path]:
    """Return the folders of this process's memory control groups and of the groups above them."""
    folders = []
    with suppress(OSError):  # not Linux
        for line in PROCESS_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mount = CGROUPS / "memory" if controllers else CGROUPS  # version 1 or 2
            folder = mount / path.strip("/")
            folders += [part for part in (folder, *folder.parents) if part.is_relative_to(mount)]
    return folders


def choose_offload(device: str, free: int, sizes: dict[str, int], pixels: int) -> tuple[str, str]:
    """Choose the fastest --offload mode that fits a device.

    Args:
        device: torch device.
        free: free bytes on it, before any model is there.
        sizes: bytes of each model.
        pixels: pixels of the largest image to generate.

    Returns:
        The mode and the reason. "none" keeps all models on the device, "model" moves one at a time,
        "group" moves layer by layer. The reason is "" on devices without offloading.
    """
    if torch.device(device).type != "cuda":
        return "none", ""
    activations = ACTIVATION_BYTES_PER_PIXEL * pixels
    total, largest = sum(sizes.values()), max(sizes.values())
    budget = free - activations
    mode = "none" if total < budget else "model" if largest < budget else "group"
    reason = (
        f"the models take {format_gib(total)}, the largest {format_gib(largest)}, activations "
        f"about {format_gib(activations)} more, and {format_gib(free)} are free"
    )
    return mode, reason


def decode_bytes(vae, pixels: int, device: str | torch.device) -> int:
    """Estimate the bytes of an untiled decode, without the weights, from the autoencoder's widths.

    The decoder holds about four maps as wide as its last upsampling. Qwen-Image's video decoder
    holds 21 maps as wide as its first (measured on a CPU, docs/models.md). On accelerators the
    attention scores of the middle block count twice, because its one head is too wide for some
    fused kernels (not measured).

    Args:
        vae: autoencoder.
        pixels: pixels of the image.
        device: device of the decode.
    """
    config = {"_class_name": type(vae).__name__} | dict(vae.config)
    return decode_bytes_of(config, next(vae.parameters()).element_size(), pixels, device)


def decode_bytes_of(config: dict, item: int, pixels: int, device: str | torch.device) -> int:
    """Estimate `decode_bytes` from an autoencoder's configuration. Raises KeyError.

    Args:
        config: of the autoencoder, with the name of its class.
        item: bytes of a number.
        pixels: pixels of the image.
        device: device of the decode.
    """
    widths = config.get("block_out_channels")
    maps = 4 * widths[min(1, len(widths) - 1)] if widths else 21 * config["base_dim"]
    factor = 2 ** (len(widths) - 1 if widths else len(config["temperal_downsample"]))
    scores = 0
    is_tiny = config.get("_class_name") == "AutoencoderTiny"
    if config.get("mid_block_add_attention", not is_tiny) and torch.device(device).type != "cpu":
        scores = 2 * (pixels // factor**2) ** 2
    return (maps * pixels + scores) * item


def decode_budget(free: int, sizes: dict[str, int], offload: str) -> int:
    """Return the bytes that are left for decoding after the weights are placed.

    Args:
        free: free bytes before the weights are placed.
        sizes: bytes of each model.
        offload: one of `OFFLOADS`.
    """
    return free - (sum(sizes.values()) if offload == "none" else sizes.get("vae", 0))


def suggest_cheaper(run, offload: str, tiled: bool, cpu_dtype: str | None) -> str:
    """Return the next setting that needs less memory, as a flag.

    Under "group" offloading no weights stay on the device, so smaller tiles come next.

    Args:
        run: a `RunSettings`.
        offload: one of `OFFLOADS`.
        tiled: the image is decoded in tiles.
        cpu_dtype: `fast_dtype` of the CPU if the CPU computes, else None.
    """
    if not tiled:
        return "--tiled_vae on"
    if cpu_dtype is not None:
        can_halve = run.dtype == "float32" and cpu_dtype == "bfloat16"
        return "--dtype bfloat16" if can_halve else "a smaller --size"
    if offload == "none" and run.text_encoder_device is None:
        return "--text_encoder_device cpu"
    if offload in ("none", "model"):
        return f"--offload {OFFLOADS[OFFLOADS.index(offload) + 1]}"
    return "--tile_size 512" if run.tile_size is None else "a smaller --size"


def reset_peak() -> None:
    """Reset the peaks of all CUDA devices and, on Linux, of the process."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)
    with suppress(OSError):  # the peak stays if this is not Linux, or is not allowed
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak bytes since `reset_peak`: of CUDA tensors, or else of the process.

    Returns None on Windows. Without /proc the peak counts from the start of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, KeyError):
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return int(status["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_gib(count: float) -> str:
    """Format bytes as GiB: "16.0 GiB", "0.07 GiB"."""
    return f"{count / GIB:.{1 if count >= GIB else 2}f} GiB"


def place_components(
    pipe, device: str, offload: str, device_overrides: dict[str, str], pixels: int
) -> None:
    """Move a pipeline to its devices, or set up offloading.

    Sets `pipe.dype_device_overrides`, `pipe.dype_offload` and `pipe.dype_decode_budget` (bytes).
    For "auto" it prints the chosen mode and the reason.

    Args:
        pipe: the pipeline.
        device: torch device of the transformer.
        offload: one of `OFFLOADS`, or "auto".
        device_overrides: component -> torch device, for components that belong elsewhere.
        pixels: pixels of the largest image to generate.
    """
    for name, override in device_overrides.items():
        getattr(pipe, name).to(override)
    pipe.dype_device_overrides = device_overrides
    with hide_components(pipe):
        modules = {
            name: module
            for name, module in pipe.components.items()
            if isinstance(module, torch.nn.Module)
        }
        sizes = {
            name: sum(map(tensor_bytes, module.parameters())) for name, module in modules.items()
        }
        device_type = torch.device(device).type
        # because bitsandbytes, for example, has moved its models to the device already
        placed = sum(
            sizes[name] for name, module in modules.items() if module.device.type == device_type
        )
        free = available_bytes(device) + placed
        if offload == "auto":
            offload, reason = choose_offload(device, free, sizes, pixels)
            if reason:
                print(f"offload {offload}: {reason}")
        pipe.dype_offload = offload
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "group":
            pipe.enable_group_offload(
                torch.device(device), offload_type="leaf_level", use_stream=device_type == "cuda"
            )
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            for module in modules.values():
                module.to(device)
        vae_device = device_overrides.get("vae", device)
        shares_gpu = device_type == "cuda" and vae_device == device
        pipe.dype_decode_budget = (
            decode_budget(free, sizes, offload) if shares_gpu else available_bytes(vae_device)
        )


@contextmanager
def hide_components(pipe):
    """Set components with a device override to None within the context.

    Otherwise diffusers would move them, or take the pipeline's device from them.
    """
    components = {name: getattr(pipe, name) for name in getattr(pipe, "dype_device_overrides", {})}
    try:
        for name in components:
            setattr(pipe, name, None)
        yield
    finally:
        for name, component in components.items():
            setattr(pipe, name, component)


def execution_device(pipe) -> torch.device:
    """Return the transformer's device while it computes, wherever offloading keeps its weights."""
    with hide_components(pipe):
        return pipe._execution_device


def set_tiling(pipe, mode: str, tile_size: int | None, pixels: int) -> bool:
    """Enable or disable tiled decoding.

    Args:
        pipe: a pipeline after `place_components`.
        mode: "on", "off", or "auto": on if an untiled decode does not fit.
        tile_size: side of a tile in px; None: the autoencoder's default, or 1024 for Qwen-Image.
        pixels: pixels of the image.

    Returns:
        True if tiling is enabled.
    """
    vae, budget = pipe.vae, pipe.dype_decode_budget
    vae_device = pipe.dype_device_overrides.get("vae") or execution_device(pipe)
    needed = decode_bytes(vae, pixels, vae_device)
    tiled = needed > budget if mode == "auto" else mode == "on"
    if tiled and mode == "auto" and not vae.use_tiling:
        print(
            f"tiled decoding: untiled it takes {format_gib(needed)}, {format_gib(budget)} are free"
        )
    # on Qwen-Image, because the autoencoder's default of 256 px needs 484 tiles at 4096 x 4096
    if tiled and hasattr(vae, "tile_sample_min_height"):
        side = tile_size or QWEN_TILE
        vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
    elif tiled:
        vae.enable_tiling()
        if tile_size:
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile_size, tile_size // 8
    else:
        vae.disable_tiling()
    return tiled
