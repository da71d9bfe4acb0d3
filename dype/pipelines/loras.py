"""Check that a LoRA fits the model, before anything is loaded."""

import importlib.util

import torch
from safetensors import SafetensorError

from dype.errors import UnavailableError, UserError
from dype.pipelines.catalog import Model
from dype.pipelines.checkpoints import meta_transformer, without_prefix
from dype.pipelines.headers import describe_kind, read_header
from dype.pipelines.sources import find_lora

# names of tensors of adapters by LyCORIS that diffusers reads for few models
LYCORIS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT"}
# the errors that diffusers raises for a LoRA that it cannot convert
READ_ERRORS = (OSError, ValueError, LookupError, AttributeError, RuntimeError, SafetensorError)


def check_loras(loras: list[tuple[str, float]], model: Model, revision: str | None) -> None:
    """Check that LoRAs can be loaded; those of the hub that are not on this machine by name alone.

    Args:
        loras: (path or hub id, scale) pairs.
        model: of the catalog.
        revision: of the model.

    Raises:
        UserError: a LoRA is missing, ambiguous, or another kind of file.
        UnavailableError: a file or a package cannot be read.
    """
    if not loras:
        return
    import diffusers

    transformer = meta_transformer(model, revision)
    for path, _ in loras:
        file = find_lora(path, download=False)
        if file is None:
            continue
        begin = f"--lora is {path!r}"
        try:
            header = read_header(file)
        except ValueError as error:
            raise UnavailableError(f"cannot read the LoRA {path}: {error}") from error
        if any(dtype.startswith("GGUF") for dtype, _ in header.values()):
            raise UserError(f"{begin}, a GGUF file, expected .safetensors")
        kind, _ = describe_kind(without_prefix(header)) or ("", "")
        if kind != "a LoRA":
            is_large = sum(len(shape) > 1 for _, shape in header.values()) > 20
            expected = "a LoRA, or --transformer FILE" if is_large and not kind else "a LoRA"
            kind = kind or "no LoRA by the names of its tensors"
            raise UserError(f"{begin}, {kind}, expected {expected}")
        try:
            tensors = getattr(diffusers, model.pipeline).lora_state_dict(file)
            if not any("lora" in name for name in tensors):
                raise ValueError(f"diffusers does not know its layout for a {model.pipeline}")
            if transformer is not None:
                check_layers(tensors, transformer)
        except READ_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            kinds = [kind for text, kind in LYCORIS.items() if any(text in name for name in header)]
            if kinds:
                reason = f"it is a {kinds[0]} of LyCORIS, which diffusers does not read here"
            raise UserError(
                f"{begin}, which does not fit {model.repo}: {reason}, expected a LoRA of its family"
            ) from error
    if importlib.util.find_spec("peft") is None:
        raise UnavailableError("--lora needs the peft package; pip install peft")


def check_layers(tensors: dict[str, torch.Tensor], transformer: torch.nn.Module) -> None:
    """Raise ValueError if a LoRA has no layer of a transformer, or a layer of another size.

    Wider inputs pass, because diffusers widens the layers of FLUX.1 for its control LoRAs.
    """
    modules, is_common = dict(transformer.named_modules()), False
    for name, tensor in tensors.items():
        layer, _, end = name.removeprefix("transformer.").partition(".lora")
        weight = getattr(modules.get(layer), "weight", None)
        is_common |= weight is not None
        if weight is None or weight.ndim != 2 or tensor.ndim != 2:
            continue
        high, wide = weight.shape
        if (end == "_A.weight" and tensor.shape[1] < wide) or (
            end == "_B.weight" and tensor.shape[0] != high
        ):
            raise ValueError(f"{layer} is {high}x{wide}, not as in the LoRA")
    if not is_common:
        raise ValueError(f"none of its layers is in the {type(transformer).__name__}")
