"""Number formats and devices."""

import torch

from dype.errors import UnavailableError

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def default_device() -> str:
    """The accelerator, where there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def check_device(device: str, offload: str) -> None:
    """Raise `UnavailableError` if this machine has no such device, or none to offload from."""
    try:
        torch.empty(1, device=device)
        if torch.device(device).type == "meta":
            raise NotImplementedError
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UnavailableError(f"this machine has no device {device}; try cpu") from error
    if torch.device(device).type == "cpu" and offload in ("model", "group", "sequential"):
        raise UnavailableError(f"--offload {offload} needs a GPU to offload from; leave it out")
