"""Load a pipeline by model name, folder or hub id: quantization, LoRAs, error sentences."""

import importlib.util
import inspect
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dype.config import check_choice
from dype.errors import UnavailableError
from dype.pipelines import memory
from dype.pipelines.catalog import Model, resolve_model
from dype.pipelines.devices import DTYPES, check_device, default_device

# the errors that libraries raise for a broken checkpoint or connection; the hub's are OSErrors
LOAD_ERRORS = (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError)
LOAD_ERRORS += (SafetensorError,)
OFFLOADS = ("auto", *memory.OFFLOADS)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # the larger encoder last
QUANTIZER_PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
QUANTIZE_CHOICES = ("none", *QUANTIZER_PACKAGES)


def load_pipeline(
    name: str = "flux-krea",
    *,
    revision: str | None = None,
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
        dtype: one of `DTYPES`; None: the model's default.
        device: torch device; None: the accelerator, or else the CPU.
        text_encoder_device: torch device of the text encoders; None: as `device`.
        vae_device: torch device of the autoencoder; None: as `device`.
        offload: one of `OFFLOADS`; "auto" takes the fastest that fits the device's memory.
        quantize: one of `QUANTIZE_CHOICES`, for the transformer. It also applies to the larger text
            encoder, unless `text_encoder_device` is set.
        loras: (path or hub id, scale) pairs.
        pixels: pixels of the largest image to generate, for `offload="auto"`.
        entry: the result of `resolve_model` for the name and revision, if it exists already.

    Returns:
        The pipeline.

    Raises:
        UnavailableError: a device, package, file or the network is missing. The message says what
            to try.
        ValueError: a value is not among its choices, or the model is unknown.
    """
    check_choice("offload", offload, OFFLOADS)
    model = entry or resolve_model(name, revision)
    dtype = dtype or model.dtype
    check_choice("dtype", dtype, DTYPES)
    check_choice("quantize", quantize, QUANTIZE_CHOICES)
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
    for override in (text_encoder_device, vae_device):
        check_device(override or device, "none")
    check_files(model.repo, loras)
    quantize_encoder = not text_encoder_device
    pipe = load_checkpoint(name, model.repo, revision, dtype, quantize, quantize_encoder)
    load_loras(pipe, loras)
    encoders = [encoder for encoder in TEXT_ENCODERS if getattr(pipe, encoder, None) is not None]
    overrides = dict.fromkeys(encoders, text_encoder_device) | {"vae": vae_device}
    overrides = {component: override for component, override in overrides.items() if override}
    memory.place_components(pipe, device, offload, overrides, pixels)
    return pipe


def load_checkpoint(
    name: str, repo: str, revision: str | None, dtype: str, quantize: str, quantize_encoder: bool
):
    """Load and quantize a pipeline with diffusers.

    Args:
        name: the value of --model, for errors.
        repo: hub id or folder.
        revision: branch, tag or commit on the hub; None: the newest.
        dtype: a key of `DTYPES`.
        quantize: one of `QUANTIZE_CHOICES`.
        quantize_encoder: quantize the larger text encoder too.

    Raises:
        UnavailableError: the pipeline cannot be loaded, its files lack weights, or its scheduler
            does not accept sigmas and mu.
    """
    silence_known_warnings()
    from diffusers import DiffusionPipeline

    source = {"revision": revision, "local_files_only": Path(repo).is_dir()}
    try:
        index = DiffusionPipeline.load_config(repo, **source)
        encoders = [encoder for encoder in TEXT_ENCODERS if index.get(encoder, [None])[0]]
        quantized_encoders = encoders[-1:] if quantize_encoder else []
        quantization = quantization_arguments(quantize, dtype, quantized_encoders)
        pipe = DiffusionPipeline.from_pretrained(
            repo, dtype=DTYPES[dtype], **source, **quantization
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


def check_files(repo: str, loras: list[tuple[str, float]]) -> None:
    """Raise UnavailableError if the model's folder or a LoRA file is missing or broken."""
    folder = Path(repo).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UnavailableError(f"{repo} is no diffusers pipeline: it has no model_index.json")
    elif repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise UnavailableError(f"there is no folder {repo}; check --model")
    for path, _ in loras:
        if Path(path).is_file():
            try:
                safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise UnavailableError(
                    f"the LoRA {path} is not a readable safetensors file"
                ) from error
        elif not Path(path).is_dir() and (path.count("/") != 1 or path.endswith(".safetensors")):
            raise UnavailableError(f"there is no LoRA {path}; check --lora")


def silence_known_warnings() -> None:
    """Silence library messages about which a user can do nothing."""
    notices = {
        "transformers.utils.import_utils": "requires torchvision",  # FLUX needs no image processor
        "diffusers.pipelines.pipeline_utils": "connect to the Hub",  # our own error follows
        "diffusers.models.modeling_utils": "enable_parallelism` is an experimental",
    }
    for name, text in notices.items():
        logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # because diffusers shows a bar for the whole pipeline


def explain_load_error(name: str, repo: str, error: Exception) -> str:
    """Return a sentence that says why a pipeline cannot be loaded, and what to do.

    Args:
        name: the value of --model.
        repo: hub id or folder.
        error: the error of diffusers or another library.
    """
    classes, cause = set(), error
    while cause is not None:  # because diffusers wraps the hub's error in its own
        classes |= {error_class.__name__ for error_class in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    reason = " ".join(str(error).split())[:200]
    if Path(repo).is_dir():
        return f"cannot load the pipeline in {repo}: {reason}"
    if "GatedRepoError" in classes or "gated" in reason.lower():
        return (
            f"{repo} is gated: accept its license at https://huggingface.co/{repo}, then run "
            "`hf auth login`"
        )
    if "RepositoryNotFoundError" in classes:
        return f"{repo} is not on the hub, nor a folder here, or is private: check --model {name}"
    if "RevisionNotFoundError" in classes:
        return f"{repo} has no such revision: check --revision"
    if classes & {"ConnectError", "ConnectionError", "OfflineModeIsEnabled", "TimeoutException"}:
        reason = "the hub cannot be reached"
    return (
        f"cannot load {repo} ({reason}); check the network, or give a downloaded folder with "
        "--model FOLDER"
    )


def load_loras(pipe, loras: list[tuple[str, float]]) -> None:
    """Load LoRAs into a pipeline and set their scales.

    Raises UnavailableError if a LoRA cannot be loaded, or has no weights for the transformer.
    """
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        try:
            pipe.load_lora_weights(path, adapter_name=name)
            if name not in pipe.get_list_adapters().get("transformer", []):
                raise ValueError("it has nothing for this transformer")
        except LOAD_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            if "PEFT" in reason:
                reason = "it needs the peft package, pip install peft"
            raise UnavailableError(f"cannot load the LoRA {path}: {reason}") from error
    if names:
        pipe.set_adapters(names, [scale for _, scale in loras])
