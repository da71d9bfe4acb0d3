"""What fits: pure estimates of memory, and the choices that follow from them.

Bytes throughout. Two constants are not measured here: see ACTIVATIONS and `decoding`.
"""

import sys

import torch

ACTIVATIONS = (
    1024  # per pixel of the picture: 16 GiB at 4096 x 4096, what FLUX.1 was reported to take
)
GIB = 2**30
OFFLOADS = ("none", "model", "group", "sequential")  # from the fastest to the smallest


def size(tensor: torch.Tensor) -> int:
    """What a tensor takes, a quantized one (a wrapper around others) included."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def sizes(parts: dict[str, torch.nn.Module]) -> dict[str, int]:
    """What each module's parameters take."""
    return {name: sum(map(size, part.parameters())) for name, part in parts.items()}


def free(device: str | torch.device) -> int:
    """What can still be had on a device; on one that is not asked, what the machine has left."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    return psutil.virtual_memory().available


def choose_offload(device: str, free: int, parts: dict[str, int], pixels: int) -> tuple[str, str]:
    """The fastest way that fits, and why: everything resident, one model at a time, or by layer.

    parts: the size of each model. pixels: of the largest picture to be drawn.
    """
    if torch.device(device).type != "cuda":
        return "none", ""  # nothing to offload from
    drawing = ACTIVATIONS * pixels
    together, largest = sum(parts.values()), max(parts.values())
    room = free - drawing
    how = "none" if together < room else "model" if largest < room else "group"
    why = (
        f"the models take {gib(together)}, the largest {gib(largest)}, drawing about "
        f"{gib(drawing)} more, and {gib(free)} are free"
    )
    return how, why


def decoding(vae, pixels: int, device: str | torch.device) -> int:
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


def decoding_room(free: int, parts: dict[str, int], offload: str) -> int:
    """What is left for decoding once the weights are where they belong; `free`: before that."""
    return free - (sum(parts.values()) if offload == "none" else parts.get("vae", 0))


def cheaper(flags: dict, offload: str, tiled: bool, on_cpu: bool) -> str:
    """The next setting that needs less memory, as flags. Layer by layer no weights are left."""
    if not tiled:
        return "--tiled_vae on"
    if on_cpu:
        return "--dtype bfloat16" if flags["dtype"] == "float32" else "a smaller --size"
    if offload == "none" and flags["text_encoder_device"] is None:
        return "--text_encoder_device cpu"
    if offload in ("none", "model"):
        return f"--offload {OFFLOADS[OFFLOADS.index(offload) + 1]}"
    return "--tile_size 512" if flags["tile_size"] is None else "a smaller --size"


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory is gone, whichever allocator says it."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(w in str(error) for w in ("out of memory", "allocate memory"))


def reset_peak() -> None:
    """Forget the peak so far, where that can be done: on CUDA, and on Linux for the process."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:  # not Linux, or not allowed: the peak stays that of the process so far
        pass


def peak(device: torch.device) -> int | None:
    """The most that was taken since `reset_peak`: on CUDA what tensors took, else the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
        return int(status["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gib(count: float) -> str:
    """16.0 GiB, 0.07 GiB."""
    return f"{count / GIB:.{1 if count >= GIB else 2}f} GiB"
