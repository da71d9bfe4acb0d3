"""Compute fingerprints of weights, by which a sweep and `--from` notice that they have changed."""

import hashlib
import math
import os
import re
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from dype.errors import UnavailableError
from dype.families import DEMO_WEIGHTS
from dype.pipelines.headers import list_weights, read_safetensors_header
from dype.pipelines.hub import cache_folder, load_hub_json, repository_info
from dype.pipelines.model_paths import HUB_FILE, HUB_ID, INDEX, LORA_FILE, WEIGHT_ENDINGS

CONFIGS = (".json", ".txt", ".model", ".jinja")  # of models, schedulers and tokenizers
WHOLE = 64 * 2**20  # bytes; a file up to this size is hashed completely
BLOCK = 4096  # bytes of a sample of a larger file
PARTS = 1024  # of a large file whose tensors are unknown
COMMIT = re.compile(r"[0-9a-f]{40}")
FIRST_DEMO = "d590f3b54085fa5f"  # of the demo's weights when records had no fingerprints


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
        variant: as in `fingerprint`, like the next argument.
        replaced: see there.
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
    index, lora = path / INDEX, path / LORA_FILE
    if not path.is_dir():
        return [path]
    if not index.exists():
        return [lora] if lora.is_file() else list_component_files(path, variant)
    files = [index]
    for name, entry in load_hub_json(str(path), INDEX).items():
        if isinstance(entry, list) and any(entry) and (path / name).is_dir():
            component = list_component_files(path / name, variant)
            files += [x for x in component if name != replaced or x.suffix not in WEIGHT_ENDINGS]
    return files


def list_component_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the weights and configurations in a folder.

    Libraries load safetensors where there are some, so the other formats then do not count, nor do
    other variants of the weights. What an index of shards says is in them.
    """
    matches = list_weights(folder)
    files = [file for file in matches if file.suffix.lower() == ".safetensors"] or [*matches]
    variants = {file: matches[file] and matches[file]["variant"] for file in files}
    choice = variant if variant in variants.values() else None
    chosen = [file for file in files if variants[file] == choice] or files
    configs = [file for file in sorted(folder.iterdir()) if file.suffix in CONFIGS]
    return chosen + [file for file in configs if ".index." not in file.name and file.is_file()]


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


def list_blocks(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Return the first and the last byte of each part of a file that `hash_file` reads.

    A training changes every tensor, so three blocks of each tensor notice it. The header of a
    safetensors file is read completely.
    """
    if size <= WHOLE:
        return [(begin, begin + 2**20) for begin in range(0, size, 2**20)]
    blocks = {(0, BLOCK)}
    ends = [part * size // PARTS for part in range(PARTS + 1)]
    with suppress(OSError, SafetensorError):
        sizes = [
            math.prod(shape) * int((re.search(r"\d+", dtype) or "8")[0]) // 8  # BOOL: 8 bits
            for dtype, shape in read_safetensors_header(file.name).values()
        ]
        ends = [*accumulate(sizes, initial=8 + int.from_bytes(file.read(8), "little"))]
        blocks |= {(begin, min(begin + BLOCK, ends[0])) for begin in range(8, ends[0], BLOCK)}
    for begin, end in pairwise(ends):
        starts = begin, (begin + end - BLOCK) // 2, end - BLOCK
        blocks |= {(max(begin, start), min(end, max(begin, start) + BLOCK)) for start in starts}
    return sorted(blocks)


def hub_commit(repo: str, revision: str | None = None) -> str | None:
    """Return the commit of a repository that a library loads; None if it is not known.

    Args:
        repo: hub id, also with the name of a file in the repository.
        revision: branch, tag or commit; None: the newest.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    match = HUB_FILE.fullmatch(repo)
    name = match[1] if match else repo
    if not HUB_ID.fullmatch(name):
        return None
    with suppress(UnavailableError):
        if info := repository_info(name, revision):
            return info.sha
    with suppress(OSError, ValueError):
        return (cache_folder(name) / "refs" / (revision or "main")).read_text().strip() or None
    return None


def find_changed_weights(record: dict, sources: dict[str, tuple]) -> str | None:
    """Return the flag and the source whose weights are not those of a record; None if all are.

    Weights that the record says nothing about, as those of earlier versions, count as equal, except
    that they were the first demo's for the demo. So do sources that cannot be read.

    Args:
        record: record of an image.
        sources: name of a part in the record -> arguments of `fingerprint`, its source first.
    """
    weights = record.get("weights")
    weights = {"model": record.get("commit")} | (weights if isinstance(weights, dict) else {})
    for part, (source, *rest) in sources.items():
        is_demo = part == "model" and Path(source).resolve() == DEMO_WEIGHTS.resolve()
        expected = weights.get(part) or (FIRST_DEMO if is_demo else None)
        # a folder in the hub's cache has a commit too, and earlier versions recorded it alone
        is_commit = COMMIT.fullmatch(str(expected))
        if expected is None or (is_commit and os.path.exists(source)):
            continue
        if fingerprint(source, *rest) not in (None, expected):
            return f"--{part.split()[0]} {'demo' if is_demo else source}"
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
