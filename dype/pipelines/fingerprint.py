"""Compute fingerprints of weights, by which a sweep and `--from` notice that they have changed."""

import hashlib
import json
import os
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants

from dype.errors import UnavailableError
from dype.pipelines.checkpoints import WEIGHT_FILE
from dype.pipelines.hub import load_hub_json, repository_info
from dype.pipelines.loras import DEFAULT_FILE
from dype.pipelines.model_paths import INDEX, hub_repository

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt")
CONFIGS = (".json", ".txt", ".model", ".jinja")  # of models, schedulers and tokenizers
WHOLE = 64 * 2**20  # bytes; a file up to this size is hashed completely
BLOCK = 4096  # bytes of a sample of a larger file
PARTS = 1024  # of a large file whose tensors are unknown
COMMIT = re.compile(r"[0-9a-f]{40}")


def fingerprint(
    source: str, revision: str | None = None, variant: str | None = None, replaced: str = ""
) -> str | None:
    """Return a text that differs for other weights: a hash, or the commit of a repository.

    The hash of a pipeline's folder covers the index and the folders of its components, that of
    another folder the weights and configurations in it. Names of files and folders above, dates
    and other files, as a README, have no effect. A large file is sampled in every tensor.

    Args:
        source: file, folder or hub id.
        revision: branch, tag or commit of a hub id; None: the newest.
        variant: of the weight files in a folder; None: those without one.
        replaced: component of a pipeline whose weights are those of another file.

    Returns:
        16 hex digits, or 40 of a commit. None if the source cannot be read.
    """
    if not os.path.exists(source):
        return hub_commit(source, revision)
    try:
        hashes = hash_files(source, variant, replaced)
    except OSError:
        return None
    lines = [f"{name} {value}\n" for name, (_, value) in hashes.items()]
    return hashlib.sha256("".join(lines).encode("utf-8", "replace")).hexdigest()[:16]


def hash_files(
    source: str, variant: str | None = None, replaced: str = ""
) -> dict[str, tuple[Path, str]]:
    """Return path and hash of each file that is loaded from a file or a folder.

    The keys are the names in the folder, or "" for a file. Raises OSError.

    Args:
        source: file or folder.
        variant: of the weight files in a folder; None: those without one.
        replaced: component of a pipeline whose weights are those of another file.
    """
    hashes = {}
    for file in list_files(Path(source), variant, replaced):
        status, name = file.stat(), os.path.relpath(file, source) if os.path.isdir(source) else ""
        key = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
        path = file.resolve()
        hashes[name] = path, hash_file(path, key)
    return hashes


def list_files(path: Path, variant: str | None, replaced: str) -> list[Path]:
    """Return a file itself, or the files of a folder that decide what is loaded from it."""
    if not path.is_dir():
        return [path]
    index, lora = path / INDEX, path / DEFAULT_FILE
    if lora.is_file() and not index.exists():
        return [lora]
    if not index.exists():
        return list_component_files(path, variant)
    entries = load_hub_json(str(path), index.name).items()
    folders = [path / name for name, entry in entries if isinstance(entry, list) and any(entry)]
    folders = [folder for folder in folders if folder.is_dir()]
    files = [file for folder in folders for file in list_component_files(folder, variant)]
    files = [x for x in files if x.parent.name != replaced or x.suffix not in WEIGHTS]
    return [index, *files]


def list_component_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the weights and configurations in a folder.

    Libraries load safetensors where there are some, so the other formats then do not count, nor do
    other variants of the weights. What an index of shards says is in them.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix in WEIGHTS]
    weights = [file for file in weights if file.suffix == WEIGHTS[0]] or weights
    matches = [WEIGHT_FILE.fullmatch(file.name) for file in weights]
    variants = [match and match["variant"] for match in matches]
    for choice in (variant, None):
        if choice in variants:
            weights = [file for file, v in zip(weights, variants, strict=True) if v == choice]
            break
    configs = [file for file in files if file.suffix in CONFIGS and ".index." not in file.name]
    return weights + configs


@lru_cache
def hash_file(path: Path, key: tuple) -> str:
    """Return the SHA-256 of a file's size and content; of a large file that of samples.

    key: the file's size, times and number, so that a change of the file is read again.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        for begin, end in list_blocks(file, size):
            file.seek(begin)
            digest.update(file.read(end - begin))
    return digest.hexdigest()


def list_blocks(file, size: int) -> list[tuple[int, int]]:
    """Return the first and the last byte of each part of a file that `hash_file` reads.

    A training changes every tensor, so three blocks of each tensor notice it.

    Args:
        file: binary file.
        size: bytes of the file.
    """
    if size <= WHOLE:
        return [(begin, begin + 2**20) for begin in range(0, size, 2**20)]
    spans = read_spans(file, size) or [
        (part * size // PARTS, (part + 1) * size // PARTS) for part in range(PARTS)
    ]
    blocks = {(0, BLOCK)}
    for begin, end in spans:
        starts = begin, (begin + end - BLOCK) // 2, end - BLOCK
        blocks |= {(max(begin, start), min(end, max(begin, start) + BLOCK)) for start in starts}
    return sorted(blocks)


def read_spans(file, size: int) -> list[tuple[int, int]]:
    """Return the header and the tensors of a safetensors file as spans of bytes; [] of others.

    Args:
        file: binary file.
        size: bytes of the file.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, 2**27):
        return []
    try:
        header = json.loads(file.read(length))
        offsets = [entry["data_offsets"] for name, entry in header.items() if name[:2] != "__"]
        tensors = [(8 + length + int(begin), 8 + length + int(end)) for begin, end in offsets]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    if any(not 0 <= begin <= end <= size for begin, end in tensors):
        return []
    pieces = range(8, 8 + length, BLOCK)  # the header is read completely
    return [*((begin, min(begin + BLOCK, 8 + length)) for begin in pieces), *tensors]


def hub_commit(repo: str, revision: str | None = None) -> str | None:
    """Return the commit of a repository that a library loads; None if it is not known.

    Args:
        repo: hub id, also with the name of a file in the repository.
        revision: branch, tag or commit; None: the newest.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    name = hub_repository(repo)
    if name is None:
        return None
    with suppress(UnavailableError):
        if info := repository_info(name, revision):
            return info.sha
    folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs")
    try:
        return (folder / (revision or "main")).read_text().strip() or None
    except (OSError, ValueError):
        return None


def find_changed_weights(record: dict, sources: dict[str, tuple]) -> str | None:
    """Return the flag and the source whose weights are not those of a record; None if all are.

    Weights that the record says nothing about, as those of earlier versions, count as equal. So do
    sources that cannot be read.

    Args:
        record: record of an image.
        sources: name of a part in the record -> arguments of `fingerprint`, its source first.
    """
    weights = record.get("weights")
    weights = {"model": record.get("commit")} | (weights if isinstance(weights, dict) else {})
    for part, (source, *rest) in sources.items():
        expected = weights.get(part)
        # a folder in the hub's cache has a commit too, and earlier versions recorded it alone
        is_commit = COMMIT.fullmatch(str(expected))
        if expected is None or (is_commit and os.path.exists(source)):
            continue
        if fingerprint(source, *rest) not in (None, expected):
            return f"--{part.split()[0]} {source}"
    return None


def is_mapped(path: Path) -> bool:
    """Return whether this process may still read a file as mapped memory; a path without links.

    safetensors maps files into memory, where a program that writes into one changes the weights.
    """
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # not Linux
        return True
    return any(line.endswith(f" {path}") for line in lines)
