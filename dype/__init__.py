"""DyPE: Dynamic Position Extrapolation for diffusion transformers (arXiv 2510.20766)."""

from dype.config import DyPEConfig
from dype.patch import apply_dype, remove_dype
from dype.pipelines import load_pipeline

__all__ = ["DyPEConfig", "apply_dype", "load_pipeline", "remove_dype"]
