"""DyPE: Dynamic Position Extrapolation for diffusion transformers (arXiv 2510.20766)."""

from dype.config import DyPEConfig
from dype.patch import apply_dype, remove_dype

__all__ = ["DyPEConfig", "apply_dype", "load_pipeline", "remove_dype"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """`load_pipeline` needs diffusers, which is imported when it is asked for."""
    if name != "load_pipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dype.pipelines.loading import load_pipeline

    return load_pipeline
