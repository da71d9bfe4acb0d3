"""DyPE: Dynamic Position Extrapolation for diffusion transformers (arXiv 2510.20766)."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dype.config import DyPEConfig
    from dype.patch import apply_dype, remove_dype
    from dype.pipelines.loading import load_pipeline

__all__ = ["DyPEConfig", "apply_dype", "load_pipeline", "remove_dype"]
__version__ = "0.1.0"

# public name -> its module; imported on access, because load_pipeline needs diffusers
EXPORTS = {"DyPEConfig": "config", "apply_dype": "patch", "remove_dype": "patch"}
EXPORTS["load_pipeline"] = "pipelines.loading"
CORE = ("config", "embedders", "embedders_complex", "errors", "families", "image_ids")
CORE += ("noise_schedule", "patch", "rope")

if sys.argv[:1] == ["-m"]:  # a program starts as `python -m dype...` and will import torch
    # Threads that spin while they wait make it many times slower beside other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str):
    """Import a public name, or a module of the core, on first access."""
    if name in CORE:
        return import_module(f"{__name__}.{name}")
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS, *CORE])
