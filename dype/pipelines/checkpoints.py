"""Check and read checkpoints: single files for --transformer, and variants of a folder's files.

A file is compared with the model by the names and shapes in its header, so that nothing is loaded.
"""

import importlib.util
import inspect
import math
import os
import re
import struct
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dype.errors import UnavailableError, UserError
from dype.pipelines.catalog import Model
from dype.pipelines.hub import is_local, load_hub_json
from dype.pipelines.model_paths import INDEX, WEIGHT_ENDINGS, download_hint

Header = dict[str, tuple[str, tuple[int, ...]]]  # name of a tensor -> number format and shape

# kind of file -> (pattern in the names of its tensors, what to do with it); the first match counts
KINDS = {
    "quantized for Nunchaku": (r"\.qweight$|\.wscales$", "16 bits, float8 or GGUF"),
    "quantized by bitsandbytes": (r"\.absmax$|\.quant_state\.", "16 bits, float8 or GGUF"),
    "a LoRA": (r"lora_|\.lora\.|\.lokr_|\.hada_|\.oft_", "--lora FILE"),
    "a textual inversion": (r"^(emb_params|clip_[lg]|t5xxl)$|^string_to_param|^<", "a transformer"),
    "a controlnet": (r"controlnet_|^control_|^input_hint_block", "a transformer"),
    "an IP-Adapter": (r"^ip_adapter|^image_proj|ip_adapter_", "a transformer"),
    "a text encoder": (
        r"^(encoder\.block|enc\.blk|blk|text_model|model\.layers|model\.embed_tokens|token_embd"
        r"|transformer\.text_model|language_model|encoder\.layers|embed_tokens|layers\.\d+\.self_attn)\b",
        "a transformer; the text encoders are those of --model",
    ),
    "an autoencoder": (
        r"^(first_stage_model\.)?(encoder|decoder)\.(conv|down|up|mid)",
        "a transformer; the autoencoder is that of --model",
    ),
    "a UNet": (r"^(input|down|output|up)_blocks\.", "a transformer of the family of --model"),
}
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of a transformer among other models
# tensors of float8 files that are no weights: scales, and marks of ComfyUI
FP8_SCALES = (".scale_weight", ".weight_scale")
FP8_MARKS = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$")
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
GGUF_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value
GGUF_TEXT, GGUF_ARRAY = 8, 9  # kinds of values whose length varies
# STEM.fp16.safetensors, and shards: STEM.fp16-00001-of-00002 or STEM-00001-of-00002.fp16
WEIGHT_FILE = re.compile(
    r"[^.]+?(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def is_gguf(path: str) -> bool:
    """Return whether a file begins as GGUF files do."""
    if not os.path.isfile(path):
        return False
    with Path(path).open("rb") as file:
        return file.read(4) == b"GGUF"


def read_header(path: str) -> Header:
    """Return format and shape of every tensor of a .safetensors or GGUF file.

    Raises ValueError, with what the file is instead, or OSError.
    """
    if is_gguf(path):
        try:
            return read_gguf_header(path)
        except (struct.error, KeyError, ValueError, OverflowError, OSError) as error:
            raise ValueError("it is an incomplete GGUF file") from error
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        with Path(path).open("rb") as file:
            begin = file.read(64)
        if not begin:
            reason = "it is empty"
        elif begin.startswith((b"PK", b"\x80")):
            reason = "it is a file of torch.save, convert it to .safetensors"
        elif begin.startswith(b"version https://git-lfs"):
            reason = "it is a pointer of Git LFS, get the file itself by `git lfs pull`"
        else:
            reason = "it is not a readable safetensors file"
        raise ValueError(reason) from error


def read_gguf_header(path: str) -> Header:
    """Return type and shape of every tensor of a GGUF file, shapes as in PyTorch.

    Raises struct.error, KeyError, ValueError, OverflowError or OSError for a broken file.
    """
    with Path(path).open("rb") as file:

        def number(code: str) -> int:
            return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

        def skip_value(kind: int) -> None:
            if kind == GGUF_TEXT:
                file.seek(number("Q"), os.SEEK_CUR)
            elif kind == GGUF_ARRAY:
                item, count = number("I"), number("Q")
                if item in GGUF_BYTES:
                    file.seek(GGUF_BYTES[item] * count, os.SEEK_CUR)
                else:
                    for _ in range(count):
                        skip_value(item)
            else:
                file.seek(GGUF_BYTES[kind], os.SEEK_CUR)

        file.seek(8)  # the magic number and the version
        tensors, entries = number("Q"), number("Q")
        for _ in range(entries):
            file.seek(number("Q"), os.SEEK_CUR)
            skip_value(number("I"))
        header, last = {}, 0
        for _ in range(tensors):
            name = file.read(min(number("Q"), 1000)).decode()  # because a broken length may be huge
            shape = [number("Q") for _ in range(number("I"))]
            header[name] = (f"GGUF type {number('I')}", tuple(reversed(shape)))
            last = max(last, number("Q"))
        if file.tell() + last >= os.path.getsize(path):
            raise struct.error("the data end before the last tensor")
    return header


def describe_kind(names) -> tuple[str, str] | None:
    """Return the kind of file and what is expected instead, if it is one of `KINDS`."""
    for kind, (pattern, expected) in KINDS.items():
        if any(re.search(pattern, name) for name in names):
            return kind, expected
    return None


def without_prefix(tensors: dict) -> dict:
    """Return the tensors of the transformer in a file, without the prefix of ComfyUI."""
    for prefix in PREFIXES:
        inner = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        if inner:
            return inner
    return tensors


def transformer_class(model: Model) -> type:
    """Return diffusers' class of a model's transformer."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, model.pipeline).__init__).parameters
    return parameters["transformer"].annotation


def meta_transformer(model: Model, revision: str | None):
    """Return the model's transformer without memory for its weights; None if its config is missing.

    revision: branch, tag or commit on the hub; None: the newest. Raises ValueError.
    """
    config = load_hub_json(model.repo, "transformer/config.json", revision)
    if not config:
        return None
    with init_empty_weights():
        return transformer_class(model).from_config(config)


def to_diffusers_layout(tensors: dict, transformer: torch.nn.Module) -> dict:
    """Return the tensors of a file by diffusers' names; from any layout that diffusers converts.

    Args:
        tensors: name -> tensor.
        transformer: of the class and the configuration that the file is for.

    Raises:
        ValueError: diffusers cannot convert the layout.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    expected = transformer.state_dict().keys()
    if expected <= tensors.keys():
        return tensors
    try:
        convert = SINGLE_FILE_LOADABLE_CLASSES[type(transformer).__name__]["checkpoint_mapping_fn"]
        return convert(checkpoint=dict(tensors), config=transformer.config)
    except (KeyError, IndexError, ValueError, RuntimeError, AttributeError) as error:
        if len(expected & tensors.keys()) > len(expected) / 2:
            return tensors  # diffusers' layout, but incomplete
        reason = {KeyError: f"no {error}", IndexError: "no blocks"}.get(type(error), error)
        raise ValueError(f"diffusers cannot convert its layout ({reason})") from error


def check_transformer(path: str, model: Model, name: str, revision: str | None) -> None:
    """Check that a single file can be the transformer of a model, without loading it.

    Args:
        path: the value of --transformer.
        model: of the catalog.
        name: of the model, for errors.
        revision: branch, tag or commit on the hub; None: the newest.

    Raises:
        UserError: the file is missing, or another kind of file, or of another family.
        UnavailableError: the file cannot be read, or a package is missing.
    """
    begin = f"--transformer is {path!r}"
    if not os.path.isfile(path):
        raise UserError(f"{begin}, {describe_missing(path)}")
    try:
        header = read_header(path)
    except ValueError as error:
        raise UnavailableError(f"cannot read --transformer {path}: {error}") from error
    header = without_prefix(header)
    kind = describe_kind(header)
    if kind:
        raise UserError(f"{begin}, {kind[0]}, expected {kind[1]}")
    check_formats(begin, header)
    check_loadable(model)
    if is_gguf(path) and importlib.util.find_spec("gguf") is None:
        raise UnavailableError(f"--transformer {path} needs the gguf package; pip install gguf")
    transformer = meta_transformer(model, revision)
    reason = transformer and find_mismatch(header, transformer)
    if reason:
        raise UserError(
            f"{begin}, which does not fit the {type(transformer).__name__} of {name}: {reason}, "
            "expected a file of this model"
        )


def describe_missing(path: str) -> str:
    """Return why the value of --transformer is no file, and what is expected."""
    if not os.path.exists(path):
        hint = download_hint(path)
        return f"but there is no such file, expected a .safetensors or .gguf file{hint}"
    if not os.path.isdir(path):
        return "no file of weights, expected a .safetensors or .gguf file"
    if Path(path, INDEX).is_file():
        return f"a whole pipeline, expected --model {path}"
    files = sorted(file.name for file in Path(path).glob("*") if file.suffix in WEIGHT_ENDINGS)
    hint = f": {', '.join(files[:5])}" if files else ""
    return f"a folder, expected one file{hint}"


def check_formats(begin: str, header: Header) -> None:
    """Raise UserError if a file is quantized in a way that diffusers cannot read.

    begin: of the sentence.
    """
    for name, (dtype, shape) in header.items():
        scale = next((end for end in FP8_SCALES if name.endswith(end)), None)
        if FP8_MARKS.search(name) or dtype.startswith("GGUF"):
            continue
        weight = scale and header.get(name.removesuffix(scale) + ".weight")
        is_block = weight and math.prod(shape) not in (1, weight[1][0])
        if is_block or (dtype not in FLOATS and len(shape) > 1):
            raise UserError(
                f"{begin}, whose {name} is {dtype} in blocks or integers, expected 16 bits, "
                "float8 with one scale for each layer or row, or GGUF"
            )


def check_loadable(model: Model) -> None:
    """Raise UserError if diffusers has no single files for a model's transformer."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    name = transformer_class(model).__name__
    if name not in SINGLE_FILE_LOADABLE_CLASSES:
        raise UserError(
            f"--transformer is for classes of which diffusers reads single files, and {name} is "
            "none, expected --model FOLDER with the weights in diffusers' layout"
        )


def find_mismatch(header: Header, transformer: torch.nn.Module) -> str | None:
    """Return how a file does not fit a transformer; None if it fits.

    Args:
        header: of the file.
        transformer: as `meta_transformer` returns.
    """
    shapes = {name: shape for name, (_, shape) in header.items() if not is_fp8_extra(name)}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        tensors = to_diffusers_layout(tensors, transformer)
    except ValueError as error:
        return str(error)
    expected = transformer.state_dict()
    common = [name for name in expected if name in tensors]
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    extra = [name for name in extra if name.endswith((".weight", ".bias"))]
    wrong = [name for name in common if tensors[name].shape != expected[name].shape]
    if not common:
        return "none of its tensors is a layer of it"
    if wrong:
        name = wrong[0]
        sizes = ["x".join(map(str, part[name].shape)) for part in (tensors, expected)]
        return f"{name} is {sizes[0]}, not {sizes[1]}"
    if missing or extra:
        names = missing or extra
        rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{'it lacks' if missing else 'the model has no'} {names[0]}{rest}"
    return None


def is_fp8_extra(name: str) -> bool:
    """Return whether a tensor of a float8 file is no weight."""
    return name.endswith(FP8_SCALES) or bool(FP8_MARKS.search(name))


def load_transformer(
    path: str, model: Model, revision: str | None, dtype: torch.dtype, quantization
):
    """Load the transformer of a model from a single file that `check_transformer` has accepted.

    Float8 weights are multiplied by their scales, if there are any, and become `dtype`. The weights
    of a GGUF file stay quantized.

    Args:
        path: .safetensors or GGUF file.
        model: of the catalog.
        revision: branch, tag or commit on the hub; None: the newest.
        dtype: number format of the weights, or, with a GGUF file, of the computation.
        quantization: diffusers' configuration for --quantize; None: none.
    """
    transformer = meta_transformer(model, revision)
    if transformer is None:
        raise ValueError("the transformer/config.json of its model cannot be read")
    if is_gguf(path):
        from diffusers import GGUFQuantizationConfig
        from diffusers.models.model_loading_utils import load_gguf_checkpoint

        quantization = GGUFQuantizationConfig(compute_dtype=dtype)
        tensors = to_diffusers_layout(without_prefix(load_gguf_checkpoint(path)), transformer)
        tensors = dequantize_gguf(tensors, transformer, dtype)
    else:
        tensors = dequantize_float8(without_prefix(load_file(path)), dtype)
        tensors = to_diffusers_layout(tensors, transformer)
    loaded = type(transformer).from_single_file(
        {name: tensors[name] for name in transformer.state_dict()},
        config=model.repo,
        subfolder="transformer",
        config_revision=revision,
        local_files_only=is_local(model.repo, revision),
        torch_dtype=dtype,
        quantization_config=quantization,
    )
    loaded.register_to_config(_name_or_path=f"{model.repo}/transformer")
    return loaded


def dequantize_gguf(tensors: dict, transformer: torch.nn.Module, dtype: torch.dtype) -> dict:
    """Return tensors of a GGUF file, all but the weights of linear layers in `dtype`.

    The reason is that diffusers computes with quantized weights in linear layers alone.

    Args:
        tensors: name -> tensor, by diffusers' names.
        transformer: that the file is for.
        dtype: of the computation.
    """
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    modules = dict(transformer.named_modules())
    result = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        stays = part == "weight" and isinstance(modules.get(layer), torch.nn.Linear)
        result[name] = tensor if stays else dequantize_gguf_tensor(tensor).to(dtype)
    return result


def dequantize_float8(tensors: dict, dtype: torch.dtype) -> dict:
    """Return tensors with those of float8 in `dtype`, multiplied by their scales; without scales.

    tensors: name -> tensor; changed in place.
    """
    for name, weight in list(tensors.items()):
        if weight.dtype not in FLOAT8 or is_fp8_extra(name):
            continue
        stem = name.removesuffix(".weight")
        scales = [tensors[stem + end] for end in FP8_SCALES if stem + end in tensors]
        weight = weight.float() if scales else weight
        for scale in scales:
            weight = weight * scale.float().reshape(-1, *[1] * (weight.ndim - 1))
        tensors[name] = weight.to(dtype)
    return {name: tensor for name, tensor in tensors.items() if not is_fp8_extra(name)}


def check_variant(name: str, repo: str, variant: str | None, with_transformer: bool) -> None:
    """Check that a folder has the weights of the variant; a repository is not asked.

    Args:
        name: of the model, for errors.
        repo: folder or hub id.
        variant: the value of --variant.
        with_transformer: the weights of the folder's transformer are needed too.

    Raises:
        UserError: a component has other variants alone, or none has this one.
    """
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise UserError(f"--variant is {variant!r}, expected a name such as fp16")
    if not Path(repo).is_dir():
        return
    components = {}
    for component in load_hub_json(repo, INDEX):
        folder = Path(repo, component)
        names = [file.name for file in folder.glob("*")] if folder.is_dir() else []
        matches = [match for match in map(WEIGHT_FILE.fullmatch, names) if match]
        if matches and (with_transformer or component != "transformer"):
            components[component] = {match["variant"] for match in matches}
    everything = sorted({x for variants in components.values() for x in variants if x})
    choices = f"expected one of {', '.join(everything)}" if everything else "expected none"
    if variant is not None and variant not in everything:
        raise UserError(f"--variant is {variant!r}, but {name} has no such files, {choices}")
    for component, variants in components.items():
        if not {None, variant} & variants:
            begin = f"--variant is {variant!r}, but " if variant else ""
            raise UserError(
                f"{begin}{name} has the weights of its {component} as the variant "
                f"{' and '.join(sorted(variants))} alone, expected --variant {min(variants)}"
            )
