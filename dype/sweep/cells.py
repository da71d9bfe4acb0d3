"""The images of a sweep: what sets each apart, and where it goes."""

import json
from dataclasses import dataclass
from pathlib import Path

from dype.config import METHOD_SCALES, DyPEConfig
from dype.sampling import multipass, records
from dype.sampling.run import Settings
from dype.sweep.results import AXES, short

LAMBDAS = ("dype_scale", "dype_exponent", "dype_start_sigma")
ENCODING = (*LAMBDAS, "cutoff", "attention_scale")
# where and in what pieces the work is done, which is no part of what is asked for
PLACES = ("device", "offload", "text_encoder_device", "vae_device", "tiled_vae", "tile_size")
PLACES += ("compile", "ulysses", "ring")
LATER = {"cache": "off", "attention": None}  # flags that older records lack: what they had


@dataclass(frozen=True)
class Cell:
    """One picture of a sweep."""

    settings: Settings
    prompt: str
    path: Path


def plan(settings: list[Settings], folder: Path) -> list[Cell]:
    """The cells, prompt by prompt; those that would draw the same picture once."""
    varied = [name for name in AXES if len({axes(one)[name] for one in settings} - {None}) > 1]
    found = {}
    for number in range(len(settings[0].prompts)):
        for one in settings:
            flags, own = one.flags, axes(one)
            more = [f"_{AXES[name]}_{short(own[name])}" for name in varied if own[name] is not None]
            more += [f"_{flags['multipass']}"] * (flags["multipass"] != "single")
            size = flags["height"], flags["width"]
            method = one.config.method, one.config.dype
            name = records.file_name(flags["seed"], *method, *size, number, "".join(more))
            prompt = one.prompts[number]
            own = key(flags, one.config.to_dict(), prompt)
            found.setdefault(own, Cell(one, prompt, folder / name))
    cells = list(found.values())
    assert len({cell.path for cell in cells}) == len(cells)
    return cells


def axes(settings: Settings) -> dict:
    """What may be swept, None where it has no effect."""
    config = settings.config
    felt = effective(config.method, config.dype)
    passes = len(multipass.PASSES[settings.flags["multipass"]])
    found = {name: settings.flags.get(name) for name in AXES}
    found |= {name: None for count, name in multipass.STRENGTHS.items() if passes < count}
    return found | {name: getattr(config, name) if name in felt else None for name in ENCODING}


def effective(method: str, dype: bool) -> tuple[str, ...]:
    """The settings of the encoding that have an effect. Without a kappa only its start has one."""
    if method == "base":
        return ()
    found = ("attention_scale", *["cutoff"] * (method == "cutoff"))
    if not dype:
        return found
    return found + (LAMBDAS if METHOD_SCALES[method] else ("dype_start_sigma",))


def identity(flags: dict, config: dict, prompt: str) -> dict:
    """All that decides what is in a picture, from a setting or a record."""
    config = DyPEConfig().to_dict() | config  # older records lack some settings
    felt = effective(config["method"], config["dype"])
    config |= {name: None for name in ENCODING if name not in felt}
    if not (config["attention_scale"] and config["dype"]):
        config["attention_path"] = "constant"
    config["dype"] &= config["method"] != "base"
    if config["dype_scale"] is None and "dype_scale" in felt:
        config["dype_scale"] = DyPEConfig(config["method"]).lambda_s
    flags = LATER | {name: value for name, value in flags.items() if name not in PLACES}
    if flags.get("init_image") is None:
        flags.pop("strength", None)
    passes = len(multipass.PASSES[flags["multipass"]])
    for count, name in multipass.STRENGTHS.items():
        if passes < count:
            flags.pop(name, None)
    return flags | config | {"prompt": prompt}


def key(flags: dict, config: dict, prompt: str) -> str:
    """The same as text: equal where the pictures would be."""
    return json.dumps(identity(flags, config, prompt), sort_keys=True)


def work(settings: Settings) -> int:
    """Steps times pixels, by which the time that is left is estimated."""
    flags = settings.flags
    return flags["steps"] * flags["height"] * flags["width"]
