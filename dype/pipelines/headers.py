"""Read the headers of weight files: names and shapes of tensors, without torch."""

import os
import re
import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dype.pipelines.model_paths import WEIGHT_ENDINGS

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


def list_weights(folder: Path) -> dict[Path, re.Match | None]:
    """Return the weight files in a folder, sorted, each with its match of `WEIGHT_FILE`."""
    files = [file for file in sorted(folder.glob("*")) if file.suffix.lower() in WEIGHT_ENDINGS]
    return {file: WEIGHT_FILE.fullmatch(file.name) for file in files if file.is_file()}
