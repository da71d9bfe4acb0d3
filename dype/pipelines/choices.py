"""The values that flags of the machine accept, and the unit of memory; without torch's import."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

from dype.errors import UserError

GIB = 2**30  # bytes
DTYPES = ("float32", "bfloat16", "float16")
DTYPE_SPELLINGS = (("fp32", "float32"), ("float", "float32"), ("bf16", "bfloat16"))
DTYPE_SPELLINGS += (("fp16", "float16"), ("half", "float16"))
DTYPE_SPELLINGS += tuple((f"torch.{name}", name) for name in DTYPES)
OFFLOADS = ("none", "model", "group", "sequential")  # from the fastest to the least memory
QUANTIZER_PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
QUANTIZE_CHOICES = ("none", *QUANTIZER_PACKAGES)
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|npu|mtia|xla|meta|vulkan|privateuseone)(:\d{1,3})?")
COMPILES = ("off", "blocks", "full")
# --cache -> the pipeline classes for which diffusers supports it: diffusers must know the
# transformer's blocks, and the pipeline must name the cache context of each denoiser call.
# On FLUX.2 the first-block cache fails at the second kind of block (diffusers 0.42.1).
# MagCache has ratios for FLUX.1-dev alone.
CACHES = {
    "off": (),
    "first_block": ("FluxPipeline", "QwenImagePipeline"),
    "taylorseer": ("FluxPipeline", "Flux2KleinPipeline", "QwenImagePipeline"),
    "magcache": ("FluxPipeline",),
}


def attention_backends() -> list[str]:
    """Return the names of diffusers' attention backends, both installed and missing.

    They are read from the source of the class AttentionBackendName, whose import takes seconds.
    """
    source = Path(find_spec("diffusers").origin).parent / "models" / "attention_dispatch.py"
    classes = [node for node in ast.parse(source.read_text("utf-8")).body if hasattr(node, "bases")]
    [names] = [node for node in classes if node.name == "AttentionBackendName"]
    return [node.value.value for node in names.body if isinstance(node, ast.Assign)]


def split_backends() -> set[str]:
    """Return the attention backends of diffusers whose tokens can be split between processes."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    return Registry._supports_context_parallel


def check_offload(mode: str, offload: str) -> None:
    """Raise UserError if a --compile mode and an --offload mode exclude each other."""
    conflicts = {"blocks": ("group", "sequential"), "full": ("model", "group", "sequential")}
    if offload in conflicts.get(mode, ()):
        raise UserError(
            f"--compile is {mode!r}, but --offload {offload} moves weights within it, expected one "
            "of them off"
        )


def describe_caches(pipeline_class: str) -> str:
    """Return the end of a sentence that lists the caches of a pipeline class."""
    names = [name for name, classes in CACHES.items() if pipeline_class in classes]
    available = ", ".join(names) or "none in diffusers"
    return f"a {pipeline_class} has {available}, expected {', '.join([*names, 'off'])}"
