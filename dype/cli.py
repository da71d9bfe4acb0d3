"""The command line's flags, and how they, presets and models' defaults become settings."""

import argparse
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import torch

from dype import records
from dype.config import METHOD_SCALES, PRESETS, SHIFTS, DyPEConfig, number, preset
from dype.models import MODELS, Model, resolve_model
from dype.patch import shift_of
from dype.pipelines import DTYPES, OFFLOADS

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


class UserError(Exception):
    """A mistake in what the user asked for, as one sentence: exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@dataclass(frozen=True)
class Settings:
    """Everything that one run needs, resolved; what is under `flags` goes into the record."""

    model: Model
    config: DyPEConfig
    flags: dict
    prompts: list[str]
    loras: list[tuple[str, float]]


def parser() -> Parser:
    p = Parser(
        prog="run_dype.py",
        description="Draw a picture beyond the size that a diffusion transformer was trained at, "
        "with DyPE (arXiv 2510.20766).",
        epilog="An explicit flag wins over --preset, that over --from, that over the model's own "
        "default. Hyphens may stand for the underscores.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
        argument_default=None,
        allow_abbrev=False,
    )
    own = "(default: the model's, %s)"

    def defaults(name):
        return own % ", ".join(f"{key} {getattr(m, name)}" for key, m in MODELS.items())

    g = p.add_argument_group("what to draw")
    g.add_argument(
        "--prompt",
        nargs="+",
        metavar="TEXT",
        help="one or several "
        "(default: the authors' dark-fantasy scene; demo: a red ring on teal leaves)",
    )
    g.add_argument("--prompts_file", metavar="FILE", help="prompts, one per line (default: none)")
    g.add_argument("--negative_prompt", metavar="TEXT", help="needs --true_cfg (default: none)")
    g.add_argument("--height", metavar="PX", help=defaults("height"))
    g.add_argument("--width", metavar="PX", help=defaults("width"))
    g.add_argument("--seed", help="(default: 42)")
    g.add_argument("--steps", help=defaults("steps"))
    g.add_argument("--guidance", help="of guidance-distilled models " + defaults("guidance"))
    g.add_argument(
        "--true_cfg",
        metavar="SCALE",
        help="classifier-free guidance with a second denoiser call per step; 1 is off (default: 1)",
    )
    g.add_argument(
        "--max_sequence_length", metavar="N", help="text tokens " + defaults("max_sequence_length")
    )

    g = p.add_argument_group("model")
    g.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or a diffusers folder or "
        "hub id of a FLUX pipeline (default: flux-krea)",
    )
    g.add_argument("--revision", help="branch, tag or commit on the hub (default: the newest)")
    g.add_argument(
        "--lora",
        action="append",
        metavar="PATH[:SCALE]",
        help="adapter file, folder or hub id; repeatable (default: none)",
    )

    g = p.add_argument_group("position encoding")
    g.add_argument(
        "--method",
        "--dype_method",
        choices=METHOD_SCALES,
        metavar="NAME",
        help=f"{', '.join(METHOD_SCALES)} "
        + own % ", ".join(f"{k} {m.dype['method']}" for k, m in MODELS.items()),
    )
    g.add_argument(
        "--dype",
        nargs="?",
        const="on",
        choices=("on", "off"),
        metavar="on|off",
        help="follow the noise level (default: on)",
    )
    g.add_argument(
        "--no_dype", action="store_true", help="the static method, as --dype off (default: off)"
    )
    g.add_argument(
        "--dype_scale",
        metavar="X",
        help="lambda_s, 0 to 8 (default: the "
        "method's, " + ", ".join(f"{k} {v:g}" for k, v in METHOD_SCALES.items() if v) + ")",
    )
    g.add_argument("--dype_exponent", metavar="X", help="lambda_t, 0 to 1000 (default: 2)")
    g.add_argument(
        "--dype_start_sigma",
        metavar="T",
        help="the encoding stays as at t = 1 above this noise level (default: 1)",
    )
    g.add_argument(
        "--base_resolution",
        metavar="PX",
        help="side that the model was trained at " + defaults("base_resolution"),
    )
    g.add_argument(
        "--isotropic",
        action="store_true",
        help="stretch every axis by the largest scale (default: each by its own)",
    )
    g.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help="off; auto: off up to 1.5x "
        "the base resolution, above it vision_yarn with exponent 1, from 3x on 2; 4k: "
        "vision_yarn 2, 2, 1 (default: none)",
    )

    g = p.add_argument_group("noise schedule")
    g.add_argument(
        "--shift",
        choices=SHIFTS,
        metavar="cap|model",
        help="cap: mu = max_shift at "
        "every size, as the authors; model: the scheduler's own rule (default: cap)",
    )
    g.add_argument(
        "--base_shift", metavar="X", help="with --shift model (default: the scheduler's)"
    )
    g.add_argument("--max_shift", metavar="X", help="(default: the scheduler's)")

    g = p.add_argument_group("machine")
    g.add_argument(
        "--dtype", choices=DTYPES, metavar="NAME", help=f"{', '.join(DTYPES)} " + defaults("dtype")
    )
    g.add_argument(
        "--device", help="cpu, cuda, cuda:1, mps, ... (default: the accelerator, if any)"
    )
    g.add_argument("--text_encoder_device", metavar="DEVICE", help="(default: as --device)")
    g.add_argument("--vae_device", metavar="DEVICE", help="(default: as --device)")
    g.add_argument(
        "--offload",
        choices=OFFLOADS,
        metavar="HOW",
        help=f"{', '.join(OFFLOADS)} (default: auto, the fastest that fits)",
    )
    g.add_argument(
        "--tiled_vae",
        choices=("auto", "on", "off"),
        metavar="auto|on|off",
        help="decode in tiles (default: auto, above 2048 x 2048)",
    )
    g.add_argument("--tile_size", metavar="PX", help="(default: the autoencoder's)")

    g = p.add_argument_group("output")
    g.add_argument("--output_dir", metavar="FOLDER", help="(default: outputs)")
    g.add_argument(
        "--output",
        metavar="FILE.png",
        help="(default: seed_S_method_M_res_HxW.png in "
        "the output folder, with _2, _3, ... where that is taken)",
    )
    g.add_argument("--overwrite", action="store_true", help="(default: off)")
    g.add_argument(
        "--from",
        dest="source",
        metavar="FILE.png",
        help="take every setting from a picture of this program (default: none)",
    )
    g.add_argument(
        "--dry_run",
        action="store_true",
        help="print the settings, mu, sigmas and kappas, load no weights (default: off)",
    )
    g.add_argument("--cite", action="store_true", help="print the paper's BibTeX (default: off)")
    return p


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UserError. Flags may be spelled with hyphens."""

    def spelled(word):
        return re.sub(r"^--[a-z0-9_-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)

    return parser().parse_args([spelled(word) for word in argv])


# flag -> (type, smallest, largest, multiple of); the fields of DyPEConfig check themselves.
NUMBERS = {
    "height": (int, 64, 16384, 16),
    "width": (int, 64, 16384, 16),
    "steps": (int, 1, 1000, None),
    "seed": (int, 0, 2**63 - 1, None),
    "guidance": (float, 0, 100, None),
    "true_cfg": (float, 1, 100, None),
    "max_sequence_length": (int, 1, 512, None),
    "tile_size": (int, 128, 4096, 64),
    "dype_scale": (float, -math.inf, math.inf, None),
    "dype_exponent": (float, -math.inf, math.inf, None),
    "dype_start_sigma": (float, -math.inf, math.inf, None),
    "base_resolution": (int, -math.inf, math.inf, None),
    "base_shift": (float, -math.inf, math.inf, None),
    "max_shift": (float, -math.inf, math.inf, None),
}


def given_flags(args: argparse.Namespace) -> dict:
    """The flags that were given, as values. Raises UserError."""
    given = {name: value for name, value in vars(args).items() if value not in (None, False)}
    for name, (kind, low, high, multiple) in NUMBERS.items():
        if name in given:
            try:
                given[name] = kind(given[name])
            except ValueError:
                wanted = "a whole number" if kind is int else "a number"
                raise UserError(f"--{name} is {given[name]!r}, expected {wanted}") from None
            if math.isfinite(high):
                number(f"--{name}", given[name], low, high, multiple=multiple)
    for name in ("device", "text_encoder_device", "vae_device"):
        try:
            torch.device(given.get(name, "cpu"))
        except RuntimeError:
            raise UserError(
                f"--{name} is {given[name]!r}, expected cpu, cuda, cuda:1, mps, ..."
            ) from None
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
    name = given.get("model") or source.get("model") or "flux-krea"
    known_model(name)
    model = resolve_model(name)
    flags = {"model": name, "revision": None, "lora": [], "seed": 42}
    flags |= {"tiled_vae": "auto", "tile_size": None}
    flags |= {name: getattr(model, name) for name in MODEL_FLAGS}
    flags |= {k: v for k, v in (source | given).items() if k in flags}

    config = DyPEConfig(base_resolution=model.base_resolution).to_dict()
    asked = {k: v for k, v in (source | given).items() if k in CONFIG_FLAGS}
    if "preset" in given:
        base = asked.get("base_resolution", model.base_resolution)
        chosen = preset(given["preset"], flags["height"], flags["width"], base)
        print(f"preset {given['preset']}: " + ", ".join(f"{k} {v}" for k, v in chosen.items()))
        asked = {k: v for k, v in source.items() if k in asked} | chosen
        asked |= {k: v for k, v in given.items() if k in CONFIG_FLAGS}
    if asked.get("method", model.dype["method"]) == model.dype["method"]:
        config |= model.dype  # another method brings its own scale and exponent
    config = DyPEConfig.from_dict(config | asked)
    shift_of(config, model.family)

    if flags["true_cfg"] == 1 and "negative_prompt" not in given:
        flags["negative_prompt"] = None  # the model's own belongs to its own true_cfg
    if flags["negative_prompt"] is not None and flags["true_cfg"] == 1:
        raise UserError("--negative_prompt is ignored at --true_cfg 1, expected a larger scale")
    if flags["negative_prompt"] is None and flags["true_cfg"] > 1:
        raise UserError(
            f"--true_cfg {flags['true_cfg']:g} does nothing without --negative_prompt, expected "
            'one, or --negative_prompt ""'
        )
    if model.guidance == 0 and flags["guidance"]:
        raise UserError(f"--guidance is {flags['guidance']:g}, but {name} takes none, expected 0")
    prompts = read_prompts(given) or source.get("prompts") or [model.prompt]
    return Settings(model, config, flags, prompts, [lora(text) for text in flags["lora"]])


def known_model(name: str) -> None:
    """Refuse what can be neither a model of the table, a folder nor a hub id."""
    if name in MODELS or Path(name).is_dir() or "/" in name:
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
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"--prompts_file {path} cannot be read: {reason}") from error
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompts_file {path} is empty, expected one prompt per line")
    for text in prompts:
        if not text.strip():
            raise UserError(f"--prompt is {text!r}, expected some words")
    return prompts


def lora(text: str) -> tuple[str, float]:
    """PATH[:SCALE] -> (path, scale)."""
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def load_source(name: str) -> dict:
    """The settings in a picture's record. Raises UserError."""
    try:
        record = records.load(Path(name))
        return record["flags"] | record["config"] | {"prompts": [record["prompt"]]}
    except OSError as error:
        raise UserError(f"--from {name} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"--from {name} carries no complete settings") from error
