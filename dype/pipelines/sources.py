"""Find what --model, --variant, --transformer and --lora name, before torch is imported."""

import os
import re
from contextlib import suppress
from pathlib import Path

import huggingface_hub

from dype.errors import UnavailableError, UserError
from dype.pipelines.catalog import Model
from dype.pipelines.headers import list_weights
from dype.pipelines.hub import (
    explain_hub_error,
    hub_errors,
    is_local,
    load_hub_json,
    repository_info,
)
from dype.pipelines.model_paths import (
    FILE_ENDINGS,
    HUB_FILE,
    INDEX,
    LORA_FILE,
    download_hint,
    is_hub_id,
    split_address,
)


def check_sources(
    name: str,
    model: Model,
    *,
    revision: str | None = None,
    variant: str | None = None,
    transformer: str | None = None,
    loras: list[tuple[str, float]] = (),
) -> None:
    """Check that the files of a model exist; of the hub, only what is cheap to ask.

    Args:
        name: of the model, for errors.
        model: of the catalog.
        revision: as in `loading.load_pipeline`, like the other arguments.
        variant: see there.
        transformer: see there.
        loras: see there.

    Raises:
        UserError: a file is missing.
        UnavailableError: a file cannot be read.
    """
    if model.is_guess and Path(model.repo).is_dir():
        raise UnavailableError(
            f"cannot load the pipeline in {model.repo}: its model_index.json cannot be read"
        )
    if revision is not None and Path(model.repo).is_dir():
        raise UserError(
            f"--revision is {revision!r}, but {name} is a folder on this machine, expected none"
        )
    check_variant(name, model.repo, variant, transformer is None)
    if transformer is not None and not os.path.isfile(transformer):
        raise UserError(f"--transformer is {transformer!r}, {describe_missing(transformer)}")
    for path, _ in loras:
        find_lora(path, download=False)


def check_reached(name: str, model: Model, loras: list[tuple[str, float]] = ()) -> None:
    """Raise UnavailableError for a model or a LoRA of which nothing could be read.

    Args:
        name: of the model, for errors.
        model: of the catalog.
        loras: as in `loading.load_pipeline`.
    """
    if model.is_guess:
        raise UnavailableError(
            f"--model is {name!r}, no folder here, and the hub cannot be reached; check the "
            "network, or give a downloaded folder with --model FOLDER"
        )
    for path, _ in loras:
        is_missing = find_lora(path, download=False) is None
        if is_missing and repository_info(lora_repository(path), None) is None:
            raise UnavailableError(
                f"--lora is {path!r}, no file or folder here, and the hub cannot be reached; "
                "check the network, or give a downloaded file"
            )


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
    elif is_hub_id(path) and not path.lower().endswith(FILE_ENDINGS):
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
    except hub_errors() as error:
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


def lora_repository(path: str) -> str:
    """Return the repository of a LoRA of the hub: OWNER/REPO of OWNER/REPO/FILE too."""
    match = HUB_FILE.fullmatch(path)
    return match[1] if match else path


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
