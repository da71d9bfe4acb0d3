"""Find the file of a LoRA, on this machine or on the hub, and check it before loading."""

import importlib.util
import os
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError

from dype.errors import UnavailableError, UserError
from dype.pipelines.catalog import Model
from dype.pipelines.checkpoints import describe_kind, meta_transformer, read_header, without_prefix
from dype.pipelines.hub import HUB_ERRORS, explain_hub_error, is_local, repository_info
from dype.pipelines.model_paths import (
    FILE_ENDINGS,
    HUB_FILE,
    HUB_ID,
    INDEX,
    LORA_FILE,
    split_address,
)

# names of tensors of adapters by LyCORIS that diffusers reads for few models
LYCORIS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT"}
# the errors that diffusers raises for a LoRA that it cannot convert
READ_ERRORS = (OSError, ValueError, LookupError, AttributeError, RuntimeError, SafetensorError)


def find_lora(path: str, download: bool) -> str | None:
    """Return the file of a LoRA; None for a file of the hub that is not on this machine.

    Args:
        path: the value of --lora without its scale.
        download: get a file of the hub.

    Raises:
        UserError: there is no such file, folder or form, or there are several files.
        UnavailableError: the file cannot be downloaded.
    """
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        return str(Path(path, choose_file(path, list_folder(path))))
    if match := HUB_FILE.fullmatch(path):
        repo, name = match.groups()
    elif HUB_ID.fullmatch(path) and not path.lower().endswith(FILE_ENDINGS):
        repo, name = path, choose_hub_file(path)
    else:
        address, file, _ = split_address(path)
        name = f"{address}/{file}".strip("/")
        example = f", as --lora {name}" if name not in ("", path) else ""
        raise UserError(
            f"--lora is {path!r}, but there is no such file or folder, expected one, a hub id, or "
            f"OWNER/REPO/FILE.safetensors (its newest revision){example}"
        )
    try:
        local = not download or is_local(repo)
        return huggingface_hub.hf_hub_download(repo, name, local_files_only=local)
    except HUB_ERRORS as error:
        files = list_repository(repo)
        if files is not None and name not in files:
            listing = f"one of {', '.join(files)}" if files else "a repository with such files"
            raise UserError(
                f"--lora is {path!r}, but {repo} has no {name}, expected {listing}"
            ) from error
        if not download:
            return None
        raise UnavailableError(
            explain_hub_error(repo, error)
            or f"cannot load the LoRA {path}: it is no file or folder here, and the hub cannot be "
            "reached; check the network, or give a downloaded file"
        ) from error


def choose_hub_file(repo: str) -> str:
    """Return the LoRA's file in a repository, or in its copy on this machine without a network.

    Raises UserError, or UnavailableError if the hub answers that there is no such repository.
    """
    files = list_repository(repo)
    if files is None:
        files = []
        with suppress(OSError, ValueError):
            folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
            files = sorted(x.relative_to(folder).as_posix() for x in folder.rglob("*.safetensors"))
        files = files or [LORA_FILE]
    files = [file for file in files if "checkpoint" not in file.rpartition("/")[0]]  # of training
    return choose_file(repo, files)


def list_folder(folder: str) -> list[str]:
    """Return the .safetensors files of a LoRA's folder. Raises UserError if it has none."""
    if Path(folder, INDEX).is_file():
        raise UserError(f"--lora is {folder!r}, a whole pipeline, expected --model {folder}")
    paths = [file for file in sorted(Path(folder).glob("*")) if not file.name.startswith(".")]
    weights = [file for file in paths if file.suffix.lower() == ".safetensors"]
    files = [file.name for file in weights if file.is_file()]
    if not files:
        names = [str(file) for file in sorted(Path(folder).glob("*/*.safetensors"))]
        names = names or [file.name for file in paths]
        listing = f"; it has {', '.join(names[:5])}" if names else ""
        raise UserError(
            f"--lora is {folder!r}, a folder without .safetensors files, expected one{listing}"
        )
    return files


def list_repository(repo: str) -> list[str] | None:
    """Return the .safetensors files of a repository, sorted; None if the hub cannot be reached.

    Raises UnavailableError if the hub answers that there is no such repository.
    """
    info = repository_info(repo, None)
    if info is None:
        return None
    names = [file.rfilename for file in info.siblings]
    return sorted(name for name in names if name.endswith(".safetensors"))


def choose_file(source: str, files: list[str]) -> str:
    """Return the only file, or diffusers' default among several. Raises UserError.

    Args:
        source: folder or repository.
        files: paths of its .safetensors files.
    """
    if LORA_FILE in files:
        return LORA_FILE
    if len(files) == 1:
        return files[0]
    if not files:
        raise UserError(f"--lora is {source!r}, which has no .safetensors file, expected one")
    listing = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
    raise UserError(
        f"--lora is {source!r}, which has {len(files)} files: {listing}; expected one of them, as "
        f"--lora {source.rstrip('/')}/{files[-1]}"
    )


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
