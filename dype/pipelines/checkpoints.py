"""Check and read checkpoints: single files for --transformer, and variants of a folder's files.

A file is compared with the model by the names and shapes in its header, so that nothing is loaded.
"""

import importlib.util
import inspect
import math

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file

from dype.errors import UnavailableError, UserError
from dype.pipelines.catalog import Model
from dype.pipelines.headers import Header, describe_kind, is_gguf, read_header
from dype.pipelines.hub import is_local, load_hub_json

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of a transformer among other models
# last parts of the names of a float8 file's tensors that are no weights: scales, marks of ComfyUI
FP8_SCALES = ("scale_weight", "weight_scale")
FP8_MARKS = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}


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
        path: the value of --transformer, an existing file.
        model: of the catalog.
        name: of the model, for errors.
        revision: branch, tag or commit on the hub; None: the newest.

    Raises:
        UserError: the file is another kind of file, or of another family.
        UnavailableError: the file cannot be read, or a package is missing.
    """
    begin = f"--transformer is {path!r}"
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
