"""Load a pipeline by model name, folder or hub id: quantization, LoRAs, error sentences."""

import importlib.util
import inspect
import logging
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError

from dype.config import check_choice
from dype.errors import UnavailableError
from dype.pipelines import checkpoints, memory
from dype.pipelines.catalog import Model, resolve_model
from dype.pipelines.choices import OFFLOADS, QUANTIZE_CHOICES, QUANTIZER_PACKAGES
from dype.pipelines.devices import DTYPES, check_device, default_device
from dype.pipelines.hub import NOT_REACHED, error_classes, explain_hub_error, is_local
from dype.pipelines.loras import check_loras
from dype.pipelines.sources import check_reached, check_sources, find_lora

# the errors that libraries raise for a broken checkpoint or connection; the hub's are OSErrors
LOAD_ERRORS = (OSError, ValueError, LookupError, AttributeError, ImportError, RuntimeError)
LOAD_ERRORS += (SafetensorError,)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # the larger encoder last


def load_pipeline(
    name: str = "flux-krea",
    *,
    revision: str | None = None,
    variant: str | None = None,
    transformer: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    text_encoder_device: str | None = None,
    vae_device: str | None = None,
    offload: str = "auto",
    quantize: str = "none",
    loras: list[tuple[str, float]] = (),
    pixels: int = 4096 * 4096,
    entry: Model | None = None,
):
    """Load a diffusers pipeline, and place it on its devices.

    Args:
        name: a name of `catalog.MODELS`, a diffusers folder or a hub id.
        revision: branch, tag or commit on the hub; None: the newest.
        variant: of the weight files, such as "fp16"; None: files without a variant in their names.
        transformer: .safetensors or GGUF file of the transformer; None: the model's.
        dtype: one of `DTYPES`; None: the model's default.
        device: torch device; None: the accelerator, or else the CPU.
        text_encoder_device: torch device of the text encoders; None: as `device`.
        vae_device: torch device of the autoencoder; None: as `device`.
        offload: "auto" or one of `OFFLOADS`; "auto" takes the fastest that fits the memory.
        quantize: one of `QUANTIZE_CHOICES`, for the transformer. It also applies to the larger text
            encoder, unless `text_encoder_device` is set.
        loras: pairs of a scale and a path, a hub id or OWNER/REPO/FILE.safetensors, the path first.
        pixels: pixels of the largest image to generate, for `offload="auto"`.
        entry: the result of `resolve_model` for the name and revision, if it exists already.

    Returns:
        The pipeline.

    Raises:
        UnavailableError: a device, package, file or the network is missing. The message says what
            to try.
        ValueError: a value is not among its choices, the model is unknown, or the name of a file
            leads to nothing, or to something else.
    """
    check_choice("offload", offload, ("auto", *OFFLOADS))
    model = entry or resolve_model(name, revision)
    check_reached(name, model)
    dtype = dtype or model.dtype
    check_choice("dtype", dtype, DTYPES)
    check_choice("quantize", quantize, QUANTIZE_CHOICES)
    check_machine(name, model, device, offload, quantize, (text_encoder_device, vae_device))
    device = device or default_device()
    files = {"revision": revision, "variant": variant, "transformer": transformer}
    check_files(name, model, **files, loras=loras)
    lora_files = [(find_lora(path, download=True), scale) for path, scale in loras]
    quantize_encoder = not text_encoder_device
    pipe = load_checkpoint(name, model, dtype, quantize, quantize_encoder, **files)
    load_loras(pipe, lora_files)
    encoders = [encoder for encoder in TEXT_ENCODERS if getattr(pipe, encoder, None) is not None]
    overrides = dict.fromkeys(encoders, text_encoder_device) | {"vae": vae_device}
    overrides = {component: override for component, override in overrides.items() if override}
    memory.place_components(pipe, device, offload, overrides, pixels)
    return pipe


def check_machine(
    name: str,
    model: Model,
    device: str | None,
    offload: str,
    quantize: str,
    overrides: tuple[str | None, ...],
) -> None:
    """Check that this machine has what a run needs, apart from memory and files.

    Args:
        name: of the model, for errors.
        model: of the catalog.
        device: as in `load_pipeline`, like the next two.
        offload: see there.
        quantize: see there.
        overrides: devices of text encoders and autoencoder; None: as `device`.

    Raises:
        UnavailableError: there is no GPU for a large model, no such device, or no package.
    """
    if device is None:
        device = default_device()
        # because a step at 4096 x 4096 takes about an hour on a CPU, if the weights fit at all
        if device == "cpu" and model.parameters_billion >= 1 and not Path(model.repo).is_dir():
            raise UnavailableError(
                f"{name} has {model.parameters_billion:g} billion parameters and no GPU was found; "
                "use a machine with a GPU, try --model demo, or force the CPU with --device cpu"
            )
    package = QUANTIZER_PACKAGES.get(quantize)
    if package and importlib.util.find_spec(package) is None:
        raise UnavailableError(
            f"--quantize {quantize} needs the {package} package; pip install {package}"
        )
    if quantize == "nf4" and torch.device(device).type == "cpu":
        raise UnavailableError("--quantize nf4 needs a GPU to quantize on; try --quantize int8")
    check_device(device, offload)
    for override in overrides:
        check_device(override or device, "none")


def load_checkpoint(
    name: str,
    model: Model,
    dtype: str,
    quantize: str,
    quantize_encoder: bool,
    *,
    revision: str | None,
    variant: str | None,
    transformer: str | None,
):
    """Load and quantize a pipeline with diffusers.

    Args:
        name: the value of --model, for errors.
        model: of the catalog.
        dtype: a key of `DTYPES`.
        quantize: one of `QUANTIZE_CHOICES`.
        quantize_encoder: quantize the larger text encoder too.
        revision: as in `load_pipeline`, like the other arguments.
        variant: see there.
        transformer: see there.

    Raises:
        UnavailableError: the pipeline cannot be loaded, its files lack weights, or its scheduler
            does not accept sigmas and mu.
    """
    silence_known_warnings()
    from diffusers import DiffusionPipeline

    repo = model.repo
    source = {"revision": revision, "local_files_only": is_local(repo, revision)}
    try:
        index = DiffusionPipeline.load_config(repo, **source)
        encoders = [encoder for encoder in TEXT_ENCODERS if index.get(encoder, [None])[0]]
        quantized_encoders = encoders[-1:] if quantize_encoder else []
        quantization = quantization_arguments(quantize, dtype, quantized_encoders)
        parts = {}
        if transformer is not None:
            mapping = quantization and quantization["quantization_config"].quant_mapping
            config = mapping.pop("transformer") if mapping else None
            parts["transformer"] = load_single_file(transformer, model, revision, dtype, config)
        pipe = DiffusionPipeline.from_pretrained(
            repo, dtype=DTYPES[dtype], variant=variant, **source, **quantization, **parts
        )
        for component, module in pipe.components.items():
            tensors = module.parameters() if isinstance(module, torch.nn.Module) else ()
            if any(tensor.is_meta for tensor in tensors):
                raise ValueError(f"weights of its {component} are missing")
        if not {"sigmas", "mu"} <= set(inspect.signature(pipe.scheduler.set_timesteps).parameters):
            scheduler = type(pipe.scheduler).__name__
            raise ValueError(
                f"its scheduler is a {scheduler}, expected FlowMatchEulerDiscreteScheduler"
            )
    except torch.OutOfMemoryError:
        raise
    except LOAD_ERRORS as error:
        raise UnavailableError(explain_load_error(name, repo, error)) from error
    return pipe


def load_single_file(path: str, model: Model, revision: str | None, dtype: str, quantization):
    """Load a transformer by `checkpoints.load_transformer`. Raises UnavailableError.

    Args:
        path: the value of --transformer.
        model: of the catalog.
        revision: branch, tag or commit on the hub; None: the newest.
        dtype: a key of `DTYPES`.
        quantization: diffusers' configuration for --quantize; None: none.
    """
    try:
        return checkpoints.load_transformer(path, model, revision, DTYPES[dtype], quantization)
    except torch.OutOfMemoryError:
        raise
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise UnavailableError(f"cannot load --transformer {path}: {reason}") from error


def quantization_arguments(quantize: str, dtype: str, encoders: list[str]) -> dict:
    """Return the quantization arguments of diffusers' `from_pretrained`; {} for "none".

    Only linear layers are quantized. int8 and fp8 quantize weights alone, by torchao. nf4 stores 4
    bits with double quantization, by bitsandbytes.

    Args:
        quantize: one of `QUANTIZE_CHOICES`.
        dtype: a key of `DTYPES`; nf4 computes in it.
        encoders: names of the text encoders to quantize beside the transformer.
    """
    if quantize == "none":
        return {}
    import diffusers
    import transformers

    if quantize == "nf4":
        name = "BitsAndBytesConfig"
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": DTYPES[dtype],
        }
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        config = Int8WeightOnlyConfig if quantize == "int8" else Float8WeightOnlyConfig
        name, settings = "TorchAoConfig", {"quant_type": config()}
    mapping = {"transformer": getattr(diffusers, name)(**settings)}
    mapping |= {encoder: getattr(transformers, name)(**settings) for encoder in encoders}
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def check_files(
    name: str,
    model: Model,
    *,
    revision: str | None = None,
    variant: str | None = None,
    transformer: str | None = None,
    loras: list[tuple[str, float]] = (),
) -> None:
    """Check the files of a model before anything is loaded; of the hub, only what is cheap to ask.

    Args:
        name: of the model, for errors.
        model: of the catalog.
        revision: as in `load_pipeline`, like the other arguments.
        variant: see there.
        transformer: see there.
        loras: see there.

    Raises:
        UserError: a file is missing or of another kind.
        UnavailableError: a file cannot be read, or a package is missing.
    """
    files = {"revision": revision, "variant": variant, "transformer": transformer}
    check_sources(name, model, **files, loras=loras)
    silence_known_warnings()
    if transformer is not None:
        checkpoints.check_transformer(transformer, model, name, revision)
    check_loras(loras, model, revision)


def silence_known_warnings() -> None:
    """Silence library messages about which a user can do nothing."""
    notices = (
        ("transformers.utils.import_utils", "requires torchvision"),  # FLUX needs no such processor
        ("diffusers.pipelines.pipeline_utils", "connect to the Hub"),  # our own error follows
        ("diffusers.models.modeling_utils", "enable_parallelism` is an experimental"),
        ("diffusers.models.modeling_utils", "should be kept in float32: []"),
        # the text encoder's part, which a LoRA may lack; `load_loras` checks the transformer's
        ("diffusers.loaders.lora_base", "No LoRA keys associated to CLIPText"),
    )
    for name, text in notices:
        logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())
    # autocast leaves the weights of norms as they are
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # because diffusers shows a bar for the whole pipeline
    if not sys.stderr.isatty():  # because its bar is for a terminal
        diffusers_logging.disable_progress_bar()


def explain_load_error(name: str, repo: str, error: Exception) -> str:
    """Return a sentence that says why a pipeline cannot be loaded, and what to do.

    Args:
        name: the value of --model.
        repo: hub id or folder.
        error: the error of diffusers or another library.
    """
    reason = " ".join(str(error).split())[:200]
    if Path(repo).is_dir():
        return f"cannot load the pipeline in {repo}: {reason}"
    answer = explain_hub_error(repo, error)
    if answer:
        return answer
    if "variant" in reason or "no file named" in reason:
        return f"cannot load {repo} ({reason}); try another --variant, fp16 or bf16, or none"
    if error_classes(error) & NOT_REACHED:
        reason = "it is no folder here, and the hub cannot be reached"
    return (
        f"cannot load {repo} ({reason}); check the network, or give a downloaded folder with "
        "--model FOLDER"
    )


def load_loras(pipe, loras: list[tuple[str, float]]) -> None:
    """Load LoRAs into a pipeline and set their scales.

    Args:
        pipe: the pipeline.
        loras: (file, scale) pairs.

    Raises:
        UnavailableError: a LoRA cannot be loaded, or has no weights for the transformer.
    """
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        try:
            pipe.load_lora_weights(path, adapter_name=name)
            if name not in pipe.get_list_adapters().get("transformer", []):
                raise ValueError("it has nothing for this transformer")
        except LOAD_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise UnavailableError(f"cannot load the LoRA {path}: {reason}") from error
    if names:
        pipe.set_adapters(names, [scale for _, scale in loras])
