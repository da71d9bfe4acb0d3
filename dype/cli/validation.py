"""What a user may get wrong, and the sentence that says so."""

import hashlib
from functools import lru_cache
from pathlib import Path

import torch

from dype.cli.flags import CHOICES
from dype.config import number, one_of
from dype.errors import UserError
from dype.families import TOKEN
from dype.pipelines import acceleration
from dype.pipelines.catalog import MODELS, Model
from dype.sampling import records
from dype.sampling.multipass import PASSES, STRENGTHS
from dype.sweep.grid import SIDE

# flag -> (type, smallest, largest, multiple of)
NUMBERS = {
    "height": (int, *SIDE),
    "width": (int, *SIDE),
    "steps": (int, 1, 1000, None),
    "seed": (int, 0, 2**63 - 1, None),
    "guidance": (float, 0, 100, None),
    "true_cfg": (float, 1, 100, None),
    "max_sequence_length": (int, 1, 1024, None),
    "tile_size": (int, 128, 4096, 64),
    "ulysses": (int, 1, 64, None),
    "ring": (int, 1, 64, None),
    "strength": (float, 0, 1, None),
    "pass2_strength": (float, 0, 1, None),
    "pass3_strength": (float, 0, 1, None),
}
# of DyPEConfig, which knows their ranges
CONFIG_NUMBERS = {"base_resolution": int} | dict.fromkeys(
    (
        "dype_scale",
        "dype_exponent",
        "dype_start_sigma",
        "cutoff",
        "attention_scale",
        "base_shift",
        "max_shift",
    ),
    float,
)


def check_flags(flags: dict, model: Model) -> None:
    """Raise ValueError for a number out of its range, a word out of its list, no device at all."""
    for name, (kind, low, high, multiple) in NUMBERS.items():
        limits = {"whole": kind is int, "multiple": multiple, "optional": name == "tile_size"}
        limits["above"] = name.endswith("strength")
        number(f"--{name}", flags[name], low, high, **limits)
    number("--max_sequence_length", flags["max_sequence_length"], 1, model.longest_text)
    for name, accepted in CHOICES.items():
        if name in flags:
            one_of(f"--{name}", flags[name], accepted)
    check_speed(flags, model)
    for name in ("device", "text_encoder_device", "vae_device"):
        try:
            torch.device(flags[name] or "cpu")
        except (RuntimeError, TypeError):
            raise ValueError(
                f"--{name} is {flags[name]!r}, expected cpu, cuda, cuda:1, mps, ..."
            ) from None
    if flags["vae_device"] and model.pipeline != "FluxPipeline":
        raise ValueError("--vae_device is for FLUX.1 pipelines, expected none with this model")
    if flags["vae_device"] and flags["offload"] not in ("auto", "none"):
        raise ValueError(
            f"--offload is {flags['offload']!r}, but --vae_device puts a part in a place of its "
            "own, expected --offload none"
        )


def check_speed(flags: dict, model: Model) -> None:
    """Raise ValueError for what makes steps cheaper, but not for this model, or not together."""
    if flags["attention"] is not None:
        one_of("--attention", flags["attention"], acceleration.backends())
    if flags["cache"] != "off" and model.pipeline not in acceleration.CACHES[flags["cache"]]:
        raise ValueError(
            f"--cache is {flags['cache']!r}, but {acceleration.unsupported(model.pipeline)}"
        )
    if flags["compile"] != "off" and flags["cache"] != "off":
        raise ValueError(
            f"--compile is {flags['compile']!r}, but --cache decides anew at every step what to "
            "run, expected one of them off"
        )
    acceleration.check_offload(flags["compile"], flags["offload"])


def check_passes(given: dict, cells: list[dict]) -> None:
    """Raise ValueError for strengths that no pass has; cells: the flags of every one."""
    passes = max(len(PASSES[flags["multipass"]]) for flags in cells)
    for count, flag in STRENGTHS.items():
        if flag in given and passes < count:
            raise ValueError(f"--{flag} is for a --multipass of {count} passes, expected one")
    if "strength" in given and cells[0]["init_image"] is None:
        raise ValueError("--strength is for --init_image FILE, expected that too")


def check_init_image(flags: dict) -> None:
    """Note the hash of a picture to start from. Raises UserError for one that is none, of another
    aspect, or another than the one that `--from` a picture asks for again."""
    if flags["init_image"] is None:
        return
    if flags["multipass"] != "single":
        raise UserError(
            f"--multipass is {flags['multipass']}, but --init_image is the first pass already, "
            "expected single"
        )
    try:
        changed = Path(flags["init_image"]).stat().st_mtime_ns
        width, height, digest = measured(flags["init_image"], changed)
    except OSError as error:
        reason = error.strerror or "it is no picture"
        raise UserError(f"--init_image {flags['init_image']} cannot be read: {reason}") from error
    if flags["init_sha256"] not in (None, digest):
        raise UserError(
            f"--init_image {flags['init_image']} has changed since the picture was drawn, "
            "expected the same, or --init_image once more for this one"
        )
    flags["init_sha256"] = digest
    stretch = flags["width"] / flags["height"] * height / width
    if not 0.97 < stretch < 1.03:
        side = max(TOKEN, round(flags["width"] * height / width / TOKEN) * TOKEN)
        raise UserError(
            f"--init_image is {width}x{height}, but the size {flags['width']}x{flags['height']}, "
            f"expected its aspect, as --size {flags['width']}x{side}"
        )


@lru_cache
def measured(path: str, changed: int) -> tuple[int, int, str]:
    """Width, height and hash of the pixels of a picture that can be read. Raises OSError.

    changed: its time of change, so that every cell of a sweep need not read it again.
    """
    picture = records.open_picture(path)
    return *picture.size, hashlib.sha256(picture.tobytes()).hexdigest()


def check_guidance(name: str, model: Model, flags: dict, given: dict) -> None:
    """Settle the negative prompt. Raises UserError for guidance that would be ignored."""
    scale = flags[model.cfg] if model.cfg else model.cfg_off
    if model.cfg != "true_cfg" and flags["true_cfg"] != 1:
        raise UserError(
            f"--true_cfg is {flags['true_cfg']:g}, but the guidance of {name} is --guidance, "
            "expected that instead"
        )
    if model.guidance == 0 and flags["guidance"]:
        raise UserError(f"--guidance is {flags['guidance']:g}, but {name} takes none, expected 0")
    if scale <= model.cfg_off and "negative_prompt" not in given:
        flags["negative_prompt"] = None  # the model's own belongs to its own scale
    if flags["negative_prompt"] is not None and not model.cfg:
        raise UserError(f"--negative_prompt is ignored by {name}, expected none")
    if flags["negative_prompt"] is not None and scale <= model.cfg_off:
        raise UserError(
            f"--negative_prompt is ignored at --{model.cfg} {scale:g}, expected a larger scale"
        )
    if model.cfg == "true_cfg" and flags["negative_prompt"] is None and scale > 1:
        raise UserError(
            f"--true_cfg {scale:g} does nothing without --negative_prompt, expected "
            'one, or --negative_prompt ""'
        )


def known_model(name: str) -> None:
    """Refuse what can be neither a model of the table, a folder nor a hub id."""
    if name in MODELS or (name and Path(name).is_dir()) or "/" in name:
        return
    raise UserError(
        f"--model is {name!r}, expected one of {', '.join(MODELS)}, a diffusers folder or a hub id"
    )


def lora(text: str) -> tuple[str, float]:
    """PATH[:SCALE] -> (path, scale), the path absolute if it is here. Raises UserError."""
    path, colon, scale = text.rpartition(":")
    if not colon or not path or Path(text).exists():
        path, scale = text, 1.0
    try:
        number("scale", float(scale), -100, 100)
    except ValueError:
        raise UserError(f"--lora is {text!r}, expected PATH or PATH:SCALE") from None
    return str(Path(path).absolute()) if Path(path).exists() else path, float(scale)
