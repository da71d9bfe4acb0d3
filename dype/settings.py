"""How flags, presets, records and models' defaults become the settings of a run."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from dype import records
from dype.config import DyPEConfig, number, one_of, preset
from dype.flags import CHOICES, UserError
from dype.models import DEFAULT_MODEL, MODELS, Model, resolve_model
from dype.patch import check_shift

CONFIG_FLAGS = tuple(field.name for field in fields(DyPEConfig))
MODEL_FLAGS = (
    "height",
    "width",
    "steps",
    "guidance",
    "true_cfg",
    "negative_prompt",
    "max_sequence_length",
    "dtype",
)
CITATION = """\
@article{issachar2025dype,
  title   = {{DyPE}: Dynamic Position Extrapolation for Ultra High Resolution Diffusion},
  author  = {Issachar, Noam and Yariv, Guy and Benaim, Sagie and Adi, Yossi
             and Lischinski, Dani and Fattal, Raanan},
  journal = {arXiv preprint arXiv:2510.20766},
  year    = {2025}
}"""


@dataclass(frozen=True)
class Settings:
    """Everything that one run needs, resolved; what is under `flags` goes into the record."""

    model: Model
    config: DyPEConfig
    flags: dict
    prompts: list[str]
    loras: list[tuple[str, float]]


# flag -> (type, smallest, largest, multiple of)
NUMBERS = {
    "height": (int, 64, 16384, 16),
    "width": (int, 64, 16384, 16),
    "steps": (int, 1, 1000, None),
    "seed": (int, 0, 2**63 - 1, None),
    "guidance": (float, 0, 100, None),
    "true_cfg": (float, 1, 100, None),
    "max_sequence_length": (int, 1, 1024, None),
    "tile_size": (int, 128, 4096, 64),
}
# of DyPEConfig, which knows their ranges
CONFIG_NUMBERS = {"base_resolution": int} | dict.fromkeys(
    ("dype_scale", "dype_exponent", "dype_start_sigma", "base_shift", "max_shift"), float
)


def given_flags(args: argparse.Namespace) -> dict:
    """The flags that were given, as values. Raises UserError."""
    given = {name: value for name, value in vars(args).items() if value not in (None, False)}
    kinds = {name: kind for name, (kind, *_) in NUMBERS.items()} | CONFIG_NUMBERS
    for name, kind in kinds.items():
        if name in given:
            try:
                given[name] = kind(given[name])
            except ValueError:
                wanted = "a whole number" if kind is int else "a number"
                raise UserError(f"--{name} is {given[name]!r}, expected {wanted}") from None
    apart = given.keys() & {"text_encoder_device", "vae_device"}
    if apart and given.get("offload", "none") not in ("auto", "none"):
        raise UserError(
            f"--offload is {given['offload']!r}, but --{min(apart)} puts parts in places of their "
            "own, expected --offload none"
        )
    if given.pop("no_dype", False):
        if given.get("dype") == "on":
            raise UserError("--no_dype and --dype on contradict each other, expected one of them")
        given["dype"] = "off"
    if "dype" in given:
        given["dype"] = given["dype"] == "on"
    if given.pop("isotropic", False):
        given["anisotropic"] = False
    return given


def check_flags(flags: dict, model: Model) -> None:
    """Raise ValueError for a number out of its range, a word out of its list, no device at all."""
    for name, (kind, low, high, multiple) in NUMBERS.items():
        limits = {"whole": kind is int, "multiple": multiple, "optional": name == "tile_size"}
        number(f"--{name}", flags[name], low, high, **limits)
    number("--max_sequence_length", flags["max_sequence_length"], 1, model.longest_text)
    for name, accepted in CHOICES.items():
        if name in flags:
            one_of(f"--{name}", flags[name], accepted)
    for name in ("device", "text_encoder_device", "vae_device"):
        try:
            torch.device(flags[name] or "cpu")
        except (RuntimeError, TypeError):
            raise ValueError(
                f"--{name} is {flags[name]!r}, expected cpu, cuda, cuda:1, mps, ..."
            ) from None


def resolve(args: argparse.Namespace) -> Settings:
    """Put flags, preset, `--from` and defaults together. Raises UserError, OSError."""
    try:
        given = given_flags(args)
        source = load_source(given["source"]) if "source" in given else {}
        return merge(given, source)
    except ValueError as error:
        raise UserError(str(error)) from error


def merge(given: dict, source: dict) -> Settings:
    """An explicit flag wins over the preset, that over `source`, that over the model's default."""
    name = given.get("model", source.get("model", DEFAULT_MODEL))
    known_model(name)
    if name not in MODELS and Path(name).is_dir():
        name = str(Path(name).absolute())  # so that the record holds from anywhere
    revision = given.get("revision", source.get("revision") if "model" not in given else None)
    model = resolve_model(name, revision)
    if source and source["model"] != name:  # what belongs to the other model stays behind
        bound = (*MODEL_FLAGS, "revision", "base_resolution")
        source = {k: v for k, v in source.items() if k not in bound}
    flags = {"model": name, "revision": None, "lora": [], "seed": 42}
    flags |= {"tiled_vae": "auto", "tile_size": None, "device": None, "offload": "auto"}
    flags |= {"text_encoder_device": None, "vae_device": None}
    flags |= {name: getattr(model, name) for name in MODEL_FLAGS}
    flags |= {k: v for k, v in (source | given).items() if k in flags}
    check_flags(flags, model)

    config = merge_config(given, source, flags, model)
    check_shift(model.schedule, config, model.family)

    if flags["steps"] == 1 and model.schedule.get("shift_terminal"):
        raise UserError(f"--steps is 1, expected at least 2 with {name}, whose last sigma is fixed")
    check_guidance(name, model, flags, given)
    prompts = read_prompts(given) or source.get("prompts") or [model.prompt]
    if given.get("magic_suffix"):
        if not model.suffix:
            raise UserError(f"--magic_suffix is for qwen-image, expected none with {name}")
        prompts = [prompt + model.suffix for prompt in prompts]
    loras = [lora(text) for text in flags["lora"]]
    flags["lora"] = [f"{path}:{scale}" for path, scale in loras]
    return Settings(model, config, flags, prompts, loras)


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
    apart = [flag for flag in ("text_encoder_device", "vae_device") if flags[flag]]
    if apart and model.pipeline != "FluxPipeline":
        raise UserError(f"--{apart[0]} is for FLUX.1 pipelines, expected none with {name}")


def merge_config(given: dict, source: dict, flags: dict, model: Model) -> DyPEConfig:
    """The position encoding's part of `merge`. A preset is printed with what it chose."""
    config = DyPEConfig(base_resolution=model.base_resolution).to_dict()
    saved, asked = ({k: v for k, v in d.items() if k in CONFIG_FLAGS} for d in (source, given))
    chosen = {}
    if "preset" in given:
        trained = DyPEConfig.from_dict(config | saved | asked).base_resolution
        chosen = preset(given["preset"], flags["height"], flags["width"], trained)
        print(f"preset {given['preset']}: " + ", ".join(f"{k} {v}" for k, v in chosen.items()))
    asked = saved | chosen | asked
    if asked.get("method", model.dype["method"]) == model.dype["method"]:
        config |= model.dype  # another method brings its own scale and exponent
    return DyPEConfig.from_dict(config | asked)


def known_model(name: str) -> None:
    """Refuse what can be neither a model of the table, a folder nor a hub id."""
    if name in MODELS or (name and Path(name).is_dir()) or "/" in name:
        return
    raise UserError(
        f"--model is {name!r}, expected one of {', '.join(MODELS)}, a diffusers folder or a hub id"
    )


def read_prompts(given: dict) -> list[str]:
    """The prompts of --prompt, then those of --prompts_file. Raises UserError."""
    prompts = list(given.get("prompt", []))
    if "prompts_file" in given:
        path = Path(given["prompts_file"])
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"--prompts_file {path} cannot be read: {reason}") from error
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompts_file {path} is empty, expected one prompt per line")
    for text in prompts:
        check_prompt(text)
    return prompts


def check_prompt(text) -> None:
    """Raise UserError for a prompt without words, or with bytes that are no text."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"--prompt is {text!r}, expected some words")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt is {text!r}, expected UTF-8 text") from None


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


def load_source(name: str) -> dict:
    """The settings in a picture's record, checked. Raises UserError."""
    try:
        record = records.load(Path(name))
        flags, prompt = dict(record["flags"]), record["prompt"]
        config = DyPEConfig.from_dict(record["config"]).to_dict()
        if flags["revision"] is None:
            flags["revision"] = record["commit"]  # what was drawn, not what is newest
        texts = [flags["model"], *flags["lora"], flags["negative_prompt"] or "", prompt]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
    except OSError as error:
        raise UserError(f"--from {name} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--from {name} carries no complete settings") from error
    except ValueError as error:
        raise UserError(f"--from {name}: {error}") from error
    check_prompt(prompt)
    return flags | config | {"prompts": [prompt]}
