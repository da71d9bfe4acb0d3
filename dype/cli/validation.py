"""Check the settings of an image before anything is loaded."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from dype.cli.flags import PATH_FLAGS
from dype.config import check_choice, check_number, check_text
from dype.errors import UserError
from dype.families import PIXELS_PER_TOKEN
from dype.pipelines import choices
from dype.pipelines.catalog import GUIDANCE_EMBEDS, Model
from dype.pipelines.fingerprint import find_changed_weights
from dype.pipelines.headers import is_gguf
from dype.sampling import records
from dype.sampling.passes import check_autoencoder
from dype.sampling.settings import SIDE_LIMITS, RunSettings, weight_sources


def check_paths(values: dict) -> None:
    """Raise UserError for a path that the file system cannot have; values: of the flags."""
    for name in PATH_FLAGS:
        value = values.get(name)
        for text in value if isinstance(value, list) else [value]:
            path = Path(text or "")
            is_output = name == "output" and path.name
            try:
                records.check_names(*(records.output_files(path) if is_output else [path]))
            except OSError as error:
                raise UserError(
                    f"--{name.rstrip('_')} is {text!r}, expected another name: {error.strerror}"
                ) from error


def check_run(run: RunSettings) -> None:
    """Raise ValueError if the model, or another setting, rules out a setting."""
    check_number("--max_sequence_length", run.max_sequence_length, 1, run.entry.max_text_tokens)
    if run.steps == 1 and run.entry.scheduler_config.get("shift_terminal"):
        raise ValueError(
            f"--steps is 1, expected at least 2 with {run.model}, whose last sigma is fixed"
        )
    for name in ("device", "text_encoder_device", "vae_device"):
        if not choices.DEVICE.fullmatch(getattr(run, name) or "cpu"):
            raise ValueError(
                f"--{name} is {getattr(run, name)!r}, expected cpu, cuda, cuda:1, mps, ..."
            )
    if run.vae_device and run.entry.pipeline != "FluxPipeline":
        raise ValueError("--vae_device is for FLUX.1 pipelines, expected none with this model")
    if run.vae_device and run.offload not in ("auto", "none"):
        raise ValueError(
            f"--offload is {run.offload!r}, but --vae_device already places the autoencoder, "
            "expected --offload none"
        )
    if run.attention is not None:
        check_choice("--attention", run.attention, choices.attention_backends())
    if run.cache != "off" and run.entry.pipeline not in choices.CACHES[run.cache]:
        raise ValueError(
            f"--cache is {run.cache!r}, but {choices.describe_caches(run.entry.pipeline)}"
        )
    if run.compile != "off" and run.cache != "off":
        raise ValueError(
            f"--compile is {run.compile!r}, but --cache decides anew at every step what to run, "
            "expected one of them off"
        )
    choices.check_offload(run.compile, run.offload)
    if run.quantize != "none" and run.transformer and is_gguf(run.transformer):
        raise ValueError(
            f"--quantize is {run.quantize!r}, but the GGUF file of --transformer is quantized "
            "already, expected none"
        )
    # The working folder is part of these now, and its name may be of other bytes than UTF-8.
    for name in ("model", "transformer", "init_image"):
        check_text(f"--{name}", getattr(run, name) or "")
    for text in run.lora:
        check_text("--lora", text)
    if run.entry.autoencoder and run.encodes_images:
        try:
            check_autoencoder(run.entry.pipeline, run.entry.autoencoder)
        except TypeError as error:
            raise ValueError(f"{run.model}: {error}") from error


def hash_init_image(values: dict, expected: str | None) -> str:
    """Return the SHA-256 of the pixels of `--init_image`.

    Args:
        values: the settings of the run.
        expected: the hash in the record of a `--from` image; None if the flag names the file.

    Raises:
        UserError: the file is no image, its aspect ratio is not that of the size, its hash is not
            the expected one, or there are several passes.
    """
    file, height, width = (values[name] for name in ("init_image", "height", "width"))
    if values["multipass"] != "single":
        raise UserError(
            f"--multipass is {values['multipass']}, but --init_image is the first pass already, "
            "expected single"
        )
    try:
        wide, high, sha256 = read_size_and_hash(file, Path(file).stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"--init_image {file} cannot be read: {error.strerror or error}") from error
    if expected not in (None, sha256):
        raise UserError(
            f"--init_image {file} has other pixels than when the --from image was generated, "
            "expected the same, or the flag --init_image for the new ones"
        )
    if not is_same_shape(width, height, wide, high):
        side = round(width * high / wide / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN
        is_size = SIDE_LIMITS["low"] <= side <= SIDE_LIMITS["high"]
        is_example = is_size and is_same_shape(width, side, wide, high)
        raise UserError(
            f"--init_image is {wide}x{high}, but the size is {width}x{height}, expected the same "
            f"aspect ratio{f', for example --size {width}x{side}' * is_example}"
        )
    return sha256


def is_same_shape(width: int, height: int, wide: int, high: int) -> bool:
    """Return whether two sizes have the same aspect ratio, up to 3 %.

    Args:
        width: of the first size.
        height: of the first size.
        wide: width of the second size.
        high: height of the second size.
    """
    return 0.97 < width / height * high / wide < 1.03


@lru_cache
def read_size_and_hash(path: str, mtime_ns: int) -> tuple[int, int, str]:
    """Return width, height and SHA-256 of the pixels of an image. Raises OSError.

    mtime_ns: the file's time of change, part of the cache key: a sweep reads the file only once.
    """
    image = records.open_image(path)
    return *image.size, hashlib.sha256(image.tobytes()).hexdigest()


def check_weights(from_image: dict, explicit: dict, entry: Model) -> None:
    """Raise UserError if the weights of a `--from` image have changed since it was generated.

    Args:
        from_image: the settings in its record, and its weights.
        explicit: the flags; the weights that they name may be new.
        entry: the model, of the catalog.
    """
    sources = weight_sources(entry.repo, from_image)
    sources = {part: source for part, source in sources.items() if part.split()[0] not in explicit}
    if changed := find_changed_weights(from_image, sources):
        raise UserError(
            f"{changed} has other weights than when the --from image was generated, expected the "
            f"same, or the flag {changed.split()[0]} for the new ones"
        )


def effective_guidance(values: dict, model: Model, notes: set[str]) -> float:
    """Return the guidance; 0 if classifier-free guidance is off, so that equal images are one.

    Args:
        values: the settings of the run.
        model: of the catalog.
        notes: receives a sentence if the guidance is another number and off.

    Raises:
        UserError: the model takes no guidance.
    """
    name, guidance = values["model"], values["guidance"]
    if model.guidance == 0 and guidance:
        raise UserError(f"--guidance is {guidance:g}, but {name} takes none, expected 0")
    if model.pipeline in GUIDANCE_EMBEDS or guidance > model.cfg_disabled_at:
        return guidance
    if guidance:
        limit = model.cfg_disabled_at
        notes.add(f"--guidance {guidance:g} is off, as 0: {name} needs more than {limit:g}")
    return 0.0


def effective_negative_prompt(values: dict, explicit: dict, model: Model) -> str | None:
    """Return the negative prompt if guidance uses it, else None.

    Args:
        values: the settings of the run.
        explicit: its flags, without defaults: the model's negative prompt belongs to its own scale.
        model: of the catalog.

    Raises:
        UserError: --true_cfg or a negative prompt that this model ignores.
    """
    name, prompt, true_cfg = (values[key] for key in ("model", "negative_prompt", "true_cfg"))
    scale = values[model.cfg_flag] if model.cfg_flag else model.cfg_disabled_at
    if model.cfg_flag != "true_cfg" and true_cfg != 1:
        raise UserError(
            f"--true_cfg is {true_cfg:g}, but the guidance of {name} is --guidance, expected that "
            "instead"
        )
    if scale <= model.cfg_disabled_at and "negative_prompt" not in explicit:
        return None
    takes_none = not model.cfg_flag or (model.cfg_flag == "guidance" and model.guidance == 0)
    if prompt is not None and takes_none:
        raise UserError(f"--negative_prompt is ignored by {name}, expected none")
    if prompt is not None and scale <= model.cfg_disabled_at:
        raise UserError(
            f"--negative_prompt is ignored at --{model.cfg_flag} {scale:g}, expected a larger scale"
        )
    if model.cfg_flag == "true_cfg" and prompt is None and scale > 1:
        raise UserError(
            f"--true_cfg {scale:g} does nothing without --negative_prompt, expected "
            'one, or --negative_prompt ""'
        )
    return prompt


def normalize_path(text: str) -> str:
    """Return an existing path as an absolute one, another text as it is."""
    return str(Path(text).absolute()) if os.path.exists(text) else text


def normalize_lora(text: str) -> str:
    """Return PATH:SCALE of PATH[:SCALE], an existing path as an absolute one. Raises UserError."""
    path, colon, scale = text.rpartition(":")
    # a text after the colon that has a slash is no scale: C:\styles\a.safetensors
    if not colon or not path or {"/", "\\"} & {*scale} or os.path.exists(text):
        path, scale = text, 1.0
    try:
        check_number("scale", float(scale), -100, 100)
    except ValueError:
        raise UserError(f"--lora is {text!r}, expected PATH or PATH:SCALE") from None
    return f"{normalize_path(path)}:{float(scale)}"
