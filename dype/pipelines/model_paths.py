"""Check what --model names, before the hub is asked: files and folders that are no pipeline."""

import json
import os
import re
from pathlib import Path

INDEX = "model_index.json"
WEIGHT_ENDINGS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers takes it before other files
FILE_ENDINGS = (*WEIGHT_ENDINGS, ".json", ".zip", ".onnx", ".png", ".txt", ".toml")
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]*\w", re.ASCII)
HUB_FILE = re.compile(rf"({HUB_ID.pattern})/(.+\.safetensors)", re.ASCII)
# what other programs and the hub's pages take: an address, or a name with a revision
HUB_ADDRESS = re.compile(
    rf"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)?({HUB_ID.pattern})"
    r"(?:[@:]([\w.-]+))?(?:/(?:blob|resolve|tree|raw)/([\w.-]+))?(?:/([^?]+?))?/?(?:\?.*)?",
    re.ASCII,
)


def check_model_path(name: str) -> None:
    """Raise ValueError if a --model that is no name of the table cannot be a pipeline."""
    if os.path.isdir(name):
        if not Path(name, INDEX).is_file():
            raise ValueError(f"--model is {name!r}, {describe_folder(Path(name).absolute())}")
    elif os.path.exists(name) or name.lower().endswith(FILE_ENDINGS):
        raise ValueError(f"--model is {name!r}, {describe_file(name)}")
    elif not is_hub_id(name):
        reason = "an address" if "://" in name else "but there is no such folder"
        repo, _, revision = split_address(name)
        raise ValueError(
            f"--model is {name!r}, {reason}, expected a diffusers folder or a hub id such as "
            f"{repo if is_hub_id(repo) else 'black-forest-labs/FLUX.1-dev'}{revision}"
        )


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form OWNER/NAME that the hub allows."""
    is_refused = "--" in text or ".." in text or text.endswith(".git") or len(text) > 96
    return bool(HUB_ID.fullmatch(text)) and not is_refused


def split_address(text: str) -> tuple[str, str, str]:
    """Return repository, file and " --revision NAME" of an address of the hub, "" for each missing.

    A file is also the rest of a path OWNER/REPO/FILE; the branch main is no revision.
    """
    match = HUB_ADDRESS.fullmatch(text)
    repo, suffix, branch, file = match.groups("") if match else ("", "", "", "")
    revision = branch or suffix
    return repo, file, f" --revision {revision}" if revision not in ("", "main") else ""


def download_hint(text: str) -> str:
    """Return how to download a file of the hub; "" if the text means none."""
    repo, file, revision = split_address(text)
    if not file.lower().endswith(WEIGHT_ENDINGS):
        return ""
    return f"; if it is on the hub, get it by `hf download {repo} {file}{revision}`"


def describe_file(name: str) -> str:
    """Return what a file given as --model is, and what is expected."""
    missing = "" if os.path.exists(name) else " that does not exist"
    if name.lower().endswith(WEIGHT_ENDINGS):
        return (
            f"a single file{missing}, expected the model that it belongs to, for example --model "
            f"flux-dev --transformer {'FILE' if missing else name}{download_hint(name)}"
        )
    if Path(name).name == INDEX and not missing:
        return f"a file of a pipeline, expected its folder: --model {Path(name).parent}"
    return f"a file{missing}, expected a diffusers folder or a hub id"


def describe_folder(folder: Path) -> str:
    """Return what a folder without model_index.json is, and what is expected; an absolute path."""
    for parent in folder.parents[:2]:
        if (parent / INDEX).is_file():
            return f"a part of the pipeline in {parent}, expected --model {parent}"
    children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    if not children:
        return f"an empty folder, expected a diffusers pipeline: a folder with {INDEX}"
    globs = [f"*/{INDEX}", f"snapshots/*/{INDEX}"]
    pipelines = [index.parent for pattern in globs for index in folder.glob(pattern)]
    if len(pipelines) == 1:
        return f"a folder around a pipeline, expected --model {pipelines[0]}"
    if pipelines:
        listing = ", ".join(sorted(str(path.relative_to(folder)) for path in pipelines))
        return f"a folder around {len(pipelines)} pipelines, expected one of them: {listing}"
    if {"adapter_config.json", LORA_FILE} & {child.name for child in children}:
        return f"a LoRA, expected --lora {folder}, and as --model the pipeline that it belongs to"
    config = read_config(folder / "config.json")
    if "_class_name" in config:
        return f"a {config['_class_name']} alone, expected the folder of a whole pipeline"
    if "architectures" in config or "model_type" in config:
        return "a model of transformers, expected a diffusers pipeline: a folder with " + INDEX
    for file in [*children, *sorted(folder.glob("*/*"))]:
        if file.suffix in (".safetensors", ".gguf"):
            return (
                f"a folder of single files without {INDEX}, expected a diffusers folder, or a file "
                f"for its transformer: --model flux-dev --transformer {file}"
            )
    return f"a folder without {INDEX}, expected a diffusers pipeline"


def read_config(path: Path) -> dict:
    """Return the content of a JSON file; {} if it cannot be read."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
