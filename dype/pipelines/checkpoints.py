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
# last parts of the names of a float8 file's tensors that are no weights: scales, marks of ComfyUI
FP8_SCALES = ("scale_weight", "weight_scale")
FP8_MARKS = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
GGUF_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a value
GGUF_TEXT, GGUF_ARRAY = 8, 9  # kinds of values whose length varies
GGUF_ERRORS = (struct.error, KeyError, ValueError, OverflowError)  # of a broken file
BROKEN = {  # first bytes of a file that cannot be read -> what it is
    b"GGUF": "it is an incomplete GGUF file",
    b"PK": "it is a file of torch.save, convert it to .safetensors",
    b"\x80": "it is a file of torch.save, convert it to .safetensors",
    b"version https://git-lfs": "it is a pointer of Git LFS, get the file itself by `git lfs pull`",
    b"": "it is not a readable safetensors file",
}
# STEM.fp16.safetensors, and shards: STEM.fp16-00001-of-00002 or STEM-00001-of-00002.fp16
WEIGHT_FILE = re.compile(
    r"[^.]+?(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


def read_begin(path: str) -> bytes:
    """Return the first bytes of a file, which tell its format; none if it is missing."""
    if not os.path.isfile(path):
        return b""
    with Path(path).open("rb") as file:
        return file.read(64)


def is_gguf(path: str) -> bool:
    """Return whether a file begins as GGUF files do."""
    return read_begin(path).startswith(b"GGUF")


def read_header(path: str) -> Header:
    """Return format and shape of every tensor of a .safetensors or GGUF file.

    Raises ValueError, with what the file is instead, or OSError.
    """
    try:
        return read_gguf_header(path) if is_gguf(path) else read_safetensors_header(path)
    except (*GGUF_ERRORS, OSError, SafetensorError) as error:
        begin = read_begin(path)
        reasons = [reason for start, reason in BROKEN.items() if begin.startswith(start)]
        raise ValueError(reasons[0] if begin else "it is empty") from error


def read_safetensors_header(path: str | Path) -> Header:
    """Return format and shape of every tensor, in the order of the data that follow the header.

    Raises OSError, or SafetensorError for another or an incomplete file.
    """
    with safe_open(path, "pt") as file:
        parts = [(name, file.get_slice(name)) for name in file.offset_keys()]
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts}


def read_gguf_header(path: str) -> Header:
    """Return type and shape of every tensor of a GGUF file, shapes as in PyTorch.

    Raises OSError or `GGUF_ERRORS`.
    """
    with Path(path).open("rb") as file:

        def number(code: str) -> int:
            return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

        def skip_values(kind: int, count: int) -> None:
            if kind == GGUF_TEXT:
                for _ in range(count):
                    file.seek(number("Q"), os.SEEK_CUR)
            elif kind == GGUF_ARRAY:
                for _ in range(count):
                    skip_values(number("I"), number("Q"))
            else:
                file.seek(GGUF_BYTES[kind] * count, os.SEEK_CUR)

        file.seek(8)  # the magic number and the version
        tensors, entries = number("Q"), number("Q")
        for _ in range(entries):
            skip_values(GGUF_TEXT, 1)
            skip_values(number("I"), 1)
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
        inner = {x.removeprefix(prefix): y for x, y in tensors.items() if x.startswith(prefix)}
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
        header = without_prefix(read_header(path))
    except ValueError as error:
        raise UnavailableError(f"cannot read --transformer {path}: {error}") from error
    if kind := describe_kind(header):
        raise UserError(f"{begin}, {kind[0]}, expected {kind[1]}")
    for tensor, (dtype, shape) in header.items():
        stem, _, end = tensor.rpartition(".")
        if end in FP8_MARKS or dtype.startswith("GGUF"):
            continue
        weight = end in FP8_SCALES and header.get(f"{stem}.weight")
        is_block = weight and math.prod(shape) not in (1, weight[1][0])
        if is_block or (dtype not in FLOATS and len(shape) > 1):
            raise UserError(
                f"{begin}, whose {tensor} is {dtype} in blocks or integers, expected 16 bits, "
                "float8 with one scale for each layer or row, or GGUF"
            )
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    class_name = transformer_class(model).__name__
    if class_name not in SINGLE_FILE_LOADABLE_CLASSES:
        raise UserError(
            "--transformer is for classes of which diffusers reads single files, and "
            f"{class_name} is none, expected --model FOLDER with the weights in diffusers' layout"
        )
    if is_gguf(path) and importlib.util.find_spec("gguf") is None:
        raise UnavailableError(f"--transformer {path} needs the gguf package; pip install gguf")
    transformer = meta_transformer(model, revision)
    if transformer and (reason := find_mismatch(header, transformer)):
        raise UserError(
            f"{begin}, which does not fit the {class_name} of {name}: {reason}, "
            "expected a file of this model"
        )


def describe_missing(path: str) -> str:
    """Return why the value of --transformer is no file, and what is expected."""
    if not os.path.isdir(path):
        reason = "no file of weights" if os.path.exists(path) else "but there is no such file"
        return f"{reason}, expected a .safetensors or .gguf file{download_hint(path)}"
    if Path(path, INDEX).is_file():
        return f"a whole pipeline, expected --model {path}"
    files = [file.name for file in list_weights(Path(path))]
    hint = f": {', '.join(files[:5])}" if files else ""
    return f"a folder, expected one file{hint}"


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
    missing = [name for name in expected if name not in tensors]
    extra = [x for x in tensors if x not in expected and x.endswith((".weight", ".bias"))]
    if len(missing) == len(expected):
        return "none of its tensors is a layer of it"
    for name, weight in expected.items():
        if name in tensors and tensors[name].shape != weight.shape:
            sizes = ["x".join(map(str, part.shape)) for part in (tensors[name], weight)]
            return f"{name} is {sizes[0]}, not {sizes[1]}"
    for verb, names in (("it lacks", missing), ("the model has no", extra)):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{verb} {names[0]}{rest}"
    return None


def is_fp8_extra(name: str) -> bool:
    """Return whether a tensor of a float8 file is no weight."""
    return name.rpartition(".")[2] in FP8_SCALES + FP8_MARKS


def load_transformer(
    path: str, model: Model, revision: str | None, dtype: torch.dtype, quantization
):
    """Load the transformer of a model from a single file that `check_transformer` has accepted.

    Float8 weights are multiplied by their scales, if there are any, and become `dtype`. Those of
    linear layers in a GGUF file stay quantized.

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
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        quantization = GGUFQuantizationConfig(compute_dtype=dtype)
        tensors = to_diffusers_layout(without_prefix(load_gguf_checkpoint(path)), transformer)
        # diffusers computes with quantized weights in linear layers alone
        layers = transformer.named_modules()
        linear = {f"{x}.weight" for x, layer in layers if isinstance(layer, torch.nn.Linear)}
        for name in tensors.keys() - linear:
            tensors[name] = dequantize_gguf_tensor(tensors[name]).to(dtype)
    else:
        tensors = without_prefix(load_file(path))
        for name, weight in tensors.items():
            if weight.dtype in FLOAT8 and not is_fp8_extra(name):
                scales = [f"{name.removesuffix('.weight')}.{end}" for end in FP8_SCALES]
                for scale in [tensors[x].float() for x in scales if x in tensors]:
                    weight = weight.float() * scale.reshape(-1, *[1] * (weight.ndim - 1))
                tensors[name] = weight.to(dtype)
        tensors = {name: tensor for name, tensor in tensors.items() if not is_fp8_extra(name)}
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


def list_weights(folder: Path) -> dict[Path, re.Match | None]:
    """Return the weight files in a folder, sorted, each with its match of `WEIGHT_FILE`."""
    files = [file for file in sorted(folder.glob("*")) if file.suffix.lower() in WEIGHT_ENDINGS]
    return {file: WEIGHT_FILE.fullmatch(file.name) for file in files if file.is_file()}


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
        if with_transformer or component != "transformer":
            matches = list_weights(Path(repo, component)).values()
            components[component] = {match["variant"] for match in matches if match}
    everything = sorted({x for variants in components.values() for x in variants if x})
    choices = f"expected one of {', '.join(everything)}" if everything else "expected none"
    if variant is not None and variant not in everything:
        raise UserError(f"--variant is {variant!r}, but {name} has no such files, {choices}")
    for component, variants in components.items():
        if variants and not {None, variant} & variants:
            begin = f"--variant is {variant!r}, but " if variant else ""
            raise UserError(
                f"{begin}{name} has the weights of its {component} as the variant "
                f"{' and '.join(sorted(variants))} alone, expected --variant {min(variants)}"
            )
