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

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(192, 192, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1, repeat=8))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return "bfloat16" if seconds(torch.bfloat16) < 2 * seconds(torch.float32) else "float32"
    finally:
        torch.set_num_threads(threads)


def autocast(device, dtype: str):
    """A context in which matrix products are in bfloat16, if that is the `dtype`."""
    enabled = dtype == "bfloat16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def check_device(device: str, offload: str) -> None:
    """Raise `UnavailableError` if this machine has no such device, or none to offload from."""
    try:
        torch.empty(1, device=device).cpu()  # which "meta" cannot
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UnavailableError(f"this machine has no device {device}; try cpu") from error
    if torch.device(device).type == "cpu" and offload in ("model", "group", "sequential"):
        raise UnavailableError(f"--offload {offload} needs a GPU to offload from; leave it out")
