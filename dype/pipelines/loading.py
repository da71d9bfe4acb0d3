"""Model name or folder -> a ready diffusers pipeline."""

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

# what libraries raise over a broken checkpoint or connection (the hub's errors are OSErrors)
LOAD_ERRORS = (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError)
LOAD_ERRORS += (SafetensorError,)
OFFLOADS = ("auto", *memory.OFFLOADS)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # the larger one last
QUANTIZER_PACKAGES = {
    "int8": "torchao",
    "fp8": "torchao",
    "nf4": "bitsandbytes",
}  # packages that quantize
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
    """Load a pipeline with stock diffusers and put it where it fits.

    name: of `catalog.MODELS`, a diffusers folder or a hub id. dtype: one of `DTYPES`; None: the
    model's own. offload: one of `OFFLOADS`; "auto" takes the fastest that fits the device's memory.
    quantize: the transformer, and its text encoder unless that has a device of its own, to one of
    `QUANTIZE_CHOICES`. loras: (path or hub id, scale) pairs. pixels: of the largest image to be
    drawn, for "auto". entry: what `resolve_model` says of the name, if that was asked before.
    Raises `UnavailableError` with the reason and what to try, ValueError for an unknown word.
    """
    check_choice("offload", offload, OFFLOADS)
    model = entry or resolve_model(name, revision)
    dtype = dtype or model.dtype
    check_choice("dtype", dtype, DTYPES)
    check_choice("quantize", quantize, QUANTIZE_CHOICES)
    if device is None:
        device = default_device()
        # billions of parameters on a processor: an hour per step at 4096 x 4096, if they fit
        if device == "cpu" and model.parameters_billion >= 1 and not Path(model.repo).is_dir():
            raise UnavailableError(
                f"{name} has {model.parameters_billion:g} billion parameters and no GPU was found; use a "
                "machine with one, try --model demo, or insist with --device cpu"
            )
    package = QUANTIZER_PACKAGES.get(quantize)
    if package and importlib.util.find_spec(package) is None:
        raise UnavailableError(
            f"--quantize {quantize} needs the {package} package; pip install {package}"
        )
    if quantize == "nf4" and torch.device(device).type == "cpu":
        raise UnavailableError("--quantize nf4 needs a GPU to quantize on; try --quantize int8")
    check_device(device, offload)
    for elsewhere in (text_encoder_device, vae_device):
        check_device(elsewhere or device, "none")
    check_files(model.repo, loras)
    pipe = from_pretrained(name, model.repo, revision, dtype, quantize, bool(text_encoder_device))
    load_loras(pipe, loras)
    encoders = [part for part in TEXT_ENCODERS if getattr(pipe, part, None) is not None]
    apart = dict.fromkeys(encoders, text_encoder_device) | {"vae": vae_device}
    memory.place_components(
        pipe, device, offload, {name: d for name, d in apart.items() if d}, pixels
    )
    return pipe


def from_pretrained(
    name: str, repo: str, revision: str | None, dtype: str, quantize: str, apart: bool
):
    """The pipeline as diffusers loads it, quantized on the way; apart: its encoders are not.

    Raises `UnavailableError`, also for weights that were not in the files or another scheduler.
    """
    silence_known_warnings()
    from diffusers import DiffusionPipeline

    place_of = {"revision": revision, "local_files_only": Path(repo).is_dir()}
    try:
        index = DiffusionPipeline.load_config(repo, **place_of)
        large = [part for part in TEXT_ENCODERS if index.get(part, [None])[0]][-1:]
        less = quantization_config(quantize, dtype, [] if apart else large)
        pipe = DiffusionPipeline.from_pretrained(repo, dtype=DTYPES[dtype], **place_of, **less)
        for part, module in pipe.components.items():
            tensors = module.parameters() if isinstance(module, torch.nn.Module) else ()
            if any(tensor.is_meta for tensor in tensors):
                raise ValueError(f"weights of its {part} are missing")
        if not {"sigmas", "mu"} <= set(inspect.signature(pipe.scheduler.set_timesteps).parameters):
            kind = type(pipe.scheduler).__name__
            raise ValueError(f"its scheduler is a {kind}, expected FlowMatchEulerDiscreteScheduler")
    except torch.OutOfMemoryError:
        raise
    except LOAD_ERRORS as error:
        raise UnavailableError(explain_load_error(name, repo, error)) from error
    return pipe


def quantization_config(quantize: str, dtype: str, encoders: list[str]) -> dict:
    """What `from_pretrained` is to be told: diffusers' configuration per part, linear layers only.

    int8 and fp8: weights alone, by torchao; nf4: 4 bits with double quantization, by bitsandbytes.
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

        kind = Int8WeightOnlyConfig if quantize == "int8" else Float8WeightOnlyConfig
        name, settings = "TorchAoConfig", {"quant_type": kind()}
    mapping = {"transformer": getattr(diffusers, name)(**settings)}
    mapping |= {part: getattr(transformers, name)(**settings) for part in encoders}
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)}


def check_files(repo: str, loras: list[tuple[str, float]]) -> None:
    """Raise `UnavailableError` for files plainly missing or broken, before anything loads."""
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
    """Silence, one message at a time, what libraries say that a user of FLUX can't act on."""
    notices = {
        "transformers.utils.import_utils": "requires torchvision",  # FLUX uses no image processor
        "diffusers.pipelines.pipeline_utils": "connect to the Hub",  # our own error follows
        "diffusers.models.modeling_utils": "enable_parallelism` is an experimental",
    }
    for name, text in notices.items():
        logging.getLogger(name).addFilter(lambda record, text=text: text not in record.getMessage())
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # diffusers shows one for the whole pipeline


def explain_load_error(name: str, repo: str, error: Exception) -> str:
    """One sentence for a checkpoint that could not be loaded."""
    kinds, cause = set(), error
    while cause is not None:  # diffusers hides the hub's error behind one of its own
        kinds |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    reason = " ".join(str(error).split())[:200]
    if Path(repo).is_dir():
        return f"cannot load the pipeline in {repo}: {reason}"
    if "GatedRepoError" in kinds or "gated" in reason.lower():
        return (
            f"{repo} is gated: accept its license at https://huggingface.co/{repo}, then run "
            "`hf auth login`"
        )
    if "RepositoryNotFoundError" in kinds:
        return f"{repo} is not on the hub, nor a folder here, or is private: check --model {name}"
    if "RevisionNotFoundError" in kinds:
        return f"{repo} has no such revision: check --revision"
    if kinds & {"ConnectError", "ConnectionError", "OfflineModeIsEnabled", "TimeoutException"}:
        reason = "the hub cannot be reached"
    return (
        f"cannot load {repo} ({reason}); check the network, or give a downloaded folder with "
        "--model FOLDER"
    )


def load_loras(pipe, loras: list[tuple[str, float]]) -> None:
    """Load adapters and set their scales. Raises `UnavailableError`."""
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
