"""Number formats and devices."""

import timeit
from functools import cache

import torch

from dype.errors import UnavailableError

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def default_device() -> str:
    """The accelerator, where there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


@cache
def fast_dtype(device: str) -> str:
    """bfloat16, or float32 on a CPU that multiplies bfloat16 slower than float32.

    Processors without AVX-512's or AMX's instructions for it are many times slower; asked of a
    product on one thread, since the processor, the libraries and their settings all have a say.
    """
    if torch.device(device).type != "cpu":
        return "bfloat16"
    from torch.utils.benchmark import Timer

    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        names = {"a": torch.ones(192, 192, dtype=dtype)}
        timer = Timer("a @ a", timer=timeit.default_timer, globals=names, num_threads=1)
        seconds[dtype] = min(timer.timeit(1).mean for _ in range(8))
    return "bfloat16" if seconds[torch.bfloat16] < 2 * seconds[torch.float32] else "float32"


def autocast(device, dtype: str):
    """A context in which matrix products are in bfloat16, if that is the `dtype`."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def check_device(device: str, offload: str) -> None:
    """Raise `UnavailableError` if this machine has no such device, or none to offload from."""
    try:
        torch.empty(1, device=device).cpu()  # which "meta" cannot
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UnavailableError(f"this machine has no device {device}; try cpu") from error
    if torch.device(device).type == "cpu" and offload in ("model", "group", "sequential"):
        raise UnavailableError(f"--offload {offload} needs a GPU to offload from; leave it out")
