"""Dtypes and devices."""

import platform
import timeit
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from dype.errors import UnavailableError
from dype.pipelines import choices

DTYPES = {name: getattr(torch, name) for name in choices.DTYPES}


def default_device() -> str:
    """Return the type of the accelerator ("cuda", "mps", ...), or "cpu" if there is none."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


@cache
def fast_dtype(device: str) -> str:
    """Return "bfloat16", or "float32" if the device is a CPU with slow bfloat16.

    A CPU without AVX-512's or AMX's bfloat16 instructions multiplies bfloat16 many times slower.
    A product on one thread measures it, since the CPU, the libraries and their settings matter.
    A bfloat16 product that takes at least twice as long as a float32 product counts as slow.
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


@cache
def device_name(device: str) -> str:
    """Return the name of a GPU, or of the processor with the number of threads."""
    if torch.device(device).type != "cpu":
        with suppress(RuntimeError, AssertionError):  # no such device, or no CUDA
            return torch.cuda.get_device_name(device)
        return device
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def autocast(device, dtype: str):
    """Return a context that computes matrix products in bfloat16 if `dtype` is "bfloat16"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def check_device(device: str, offload: str) -> None:
    """Raise UnavailableError if the device does not work, or has nothing to offload from."""
    try:
        torch.empty(1, device=device).cpu()  # .cpu(), because "meta" fails only there
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UnavailableError(f"this machine has no device {device}; try cpu") from error
    if torch.device(device).type == "cpu" and offload in ("model", "group", "sequential"):
        raise UnavailableError(f"--offload {offload} needs a GPU to offload from; leave it out")
