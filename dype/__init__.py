"""DyPE: Dynamic Position Extrapolation for diffusion transformers (arXiv 2510.20766)."""

from importlib import import_module

__all__ = ["DyPEConfig", "apply_dype", "load_pipeline", "remove_dype"]
__version__ = "0.1.0"

HOMES = {"DyPEConfig": "config", "apply_dype": "patch", "remove_dype": "patch"}
HOMES["load_pipeline"] = "pipelines.loading"  # which alone needs diffusers


def __getattr__(name: str):
    """Import a public name when it is asked for: the programs have to be before torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
