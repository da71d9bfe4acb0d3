"""What fits on a device, where the parts of a pipeline go, and how its autoencoder decodes.

Bytes throughout. Two constants are not measured here: see ACTIVATIONS and `decode_bytes`.
"""

import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

# per pixel of the image: 16 GiB at 4096 x 4096, what FLUX.1 was reported to take
ACTIVATION_BYTES_PER_PIXEL = 1024
GIB = 2**30
QWEN_TILE = 1024  # px
OFFLOADS = ("none", "model", "group", "sequential")  # from the fastest to the smallest


def tensor_bytes(tensor: torch.Tensor) -> int:
    """What a tensor takes, a quantized one (a wrapper around others) included."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def available_bytes(device: str | torch.device) -> int:
    """What can still be had on a device; on one that is not asked, what the machine has left."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def choose_offload(device: str, free: int, parts: dict[str, int], pixels: int) -> tuple[str, str]:
    """The fastest way that fits, and why: everything resident, one model at a time, or by layer.

    parts: the size of each model. pixels: of the largest image to be drawn.
    """
    if torch.device(device).type != "cuda":
        return "none", ""  # nothing to offload from
    drawing = ACTIVATION_BYTES_PER_PIXEL * pixels
    together, largest = sum(parts.values()), max(parts.values())
    room = free - drawing
    how = "none" if together < room else "model" if largest < room else "group"
    why = (
        f"the models take {format_gib(together)}, the largest {format_gib(largest)}, drawing about "
        f"{format_gib(drawing)} more, and {format_gib(free)} are free"
    )
    return how, why


def decode_bytes(vae, pixels: int, device: str | torch.device) -> int:
    """What an untiled decode takes beside the weights, estimated from the autoencoder's widths.

    The decoder holds about four maps as wide as its last upsampling, Qwen-Image's video decoder 21
    as wide as its first (measured on a CPU, docs/models.md). On accelerators the attention of the
    middle block is counted with its scores in full, twice: its one head is too wide for some of
    the kernels that do without them (not measured).
    """
    config, item = vae.config, next(vae.parameters()).element_size()
    widths = config.get("block_out_channels")
    maps = 4 * widths[min(1, len(widths) - 1)] if widths else 21 * config.base_dim
    factor = 2 ** (len(widths) - 1 if widths else len(config.temperal_downsample))
    scores = 0
    if config.get("mid_block_add_attention", True) and torch.device(device).type != "cpu":
        scores = 2 * (pixels // factor**2) ** 2
    return (maps * pixels + scores) * item


def decode_budget(free: int, parts: dict[str, int], offload: str) -> int:
    """What is left for decoding once the weights are where they belong; `free`: before that."""
    return free - (sum(parts.values()) if offload == "none" else parts.get("vae", 0))


def suggest_cheaper(run, offload: str, tiled: bool, cpu_dtype: str | None) -> str:
    """The next setting that needs less memory, as flags. Layer by layer no weights are left.

    run: a `RunSettings`. cpu_dtype: the `fast_dtype` of the CPU, where that is what computes.
    """
    if not tiled:
        return "--tiled_vae on"
    if cpu_dtype is not None:
        halved = run.dtype == "float32" and cpu_dtype == "bfloat16"
        return "--dtype bfloat16" if halved else "a smaller --size"
    if offload == "none" and run.text_encoder_device is None:
        return "--text_encoder_device cpu"
    if offload in ("none", "model"):
        return f"--offload {OFFLOADS[OFFLOADS.index(offload) + 1]}"
    return "--tile_size 512" if run.tile_size is None else "a smaller --size"


def reset_peak() -> None:
    """Forget the peak so far, where that can be done: on CUDA, and on Linux for the process."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)
    with suppress(OSError):  # not Linux, or not allowed: the peak stays that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """The most that was taken since `reset_peak`: on CUDA what tensors took, else the process."""
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
    """16.0 GiB, 0.07 GiB."""
    return f"{count / GIB:.{1 if count >= GIB else 2}f} GiB"


def place_components(pipe, device: str, offload: str, apart: dict[str, str], pixels: int) -> None:
    """Put the pipeline on its device, whole or in turns; `apart` names parts with a place of
    their own. Prints what "auto" chose, and why."""
    for name, elsewhere in apart.items():
        getattr(pipe, name).to(elsewhere)
    pipe.dype_device_overrides = apart
    with hide_components(pipe):
        parts = {
            n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)
        }
        sizes = {name: sum(map(tensor_bytes, part.parameters())) for name, part in parts.items()}
        kind = torch.device(device).type
        there = [sizes[name] for name, part in parts.items() if part.device.type == kind]
        free = available_bytes(device) + sum(there)  # bitsandbytes' are, say
        if offload == "auto":
            offload, why = choose_offload(device, free, sizes, pixels)
            if why:
                print(f"offload {offload}: {why}")
        pipe.dype_offload = offload
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "group":
            pipe.enable_group_offload(
                torch.device(device), offload_type="leaf_level", use_stream=kind == "cuda"
            )
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            for part in parts.values():
                part.to(device)
        where = apart.get("vae", device)
        on_card = kind == "cuda" and where == device
        pipe.dype_decode_budget = (
            decode_budget(free, sizes, offload) if on_card else available_bytes(where)
        )


@contextmanager
def hide_components(pipe):
    """Parts with a place of their own, out of the pipeline's sight: it takes its device from its
    parts, and moves those that it sees."""
    parts = {name: getattr(pipe, name) for name in getattr(pipe, "dype_device_overrides", {})}
    try:
        for name in parts:
            setattr(pipe, name, None)
        yield
    finally:
        for name, part in parts.items():
            setattr(pipe, name, part)


def execution_device(pipe) -> torch.device:
    """Where the transformer computes, wherever the other parts are and rest in between."""
    with hide_components(pipe):
        return pipe._execution_device


def set_tiling(pipe, mode: str, tile_size: int | None, pixels: int) -> bool:
    """Decode in tiles: always, never, or ("auto") where an untiled decode would not fit.

    pipe: as `place_components` left it. tile_size: px of a tile's side; None: the autoencoder's own. Returns
    whether.
    """
    vae, room = pipe.vae, pipe.dype_decode_budget
    needed = decode_bytes(
        vae, pixels, pipe.dype_device_overrides.get("vae") or execution_device(pipe)
    )
    tiled = needed > room if mode == "auto" else mode == "on"
    if tiled and mode == "auto" and not vae.use_tiling:
        print(f"tiled decoding: untiled it takes {format_gib(needed)}, {format_gib(room)} are free")
    if tiled and hasattr(vae, "tile_sample_min_height"):  # Qwen-Image's: 484 tiles by its own 256
        side = tile_size or QWEN_TILE
        vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
    elif tiled:
        vae.enable_tiling()
        if tile_size:
            vae.tile_sample_min_size, vae.tile_latent_min_size = tile_size, tile_size // 8
    else:
        vae.disable_tiling()
    return tiled
