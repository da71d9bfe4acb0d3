"""One picture: what it is made of, how it is drawn, what it costs; and the plan of several."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from dype import generate, memory, parallel, records, rope, speed
from dype.config import METHOD_SCALES, DyPEConfig
from dype.patch import apply_dype
from dype.placement import execution_device, set_tiling
from dype.settings import Settings

# what may be swept -> its part of the file name; sheets and tables take them in this order
AXES = {
    "dype_scale": "scale",
    "dype_exponent": "exponent",
    "dype_start_sigma": "start",
    "cutoff": "cutoff",
    "attention_scale": "attention",
    "steps": "steps",
    "guidance": "guidance",
    "true_cfg": "cfg",
    "pass2_strength": "pass2",
    "pass3_strength": "pass3",
}
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


def drawn(pipe, settings: Settings, prompt: str, encode: Callable) -> tuple[Image.Image, dict]:
    """One picture and its record, whose seconds are those after the text encoders.

    encode: a text -> its embeddings, as `generate.encode`.
    """
    flags = settings.flags
    height, width = flags["height"], flags["width"]
    apply_dype(pipe, settings.config)
    tiled = set_tiling(pipe, flags["tiled_vae"], flags["tile_size"], height * width)
    schedule = describe_schedule(pipe.scheduler, settings)
    names = ("guidance", "seed", "max_sequence_length", "true_cfg", "cache")
    call = {name: flags[name] for name in names}
    memory.reset_peak()
    negative = against(pipe, flags)
    call["negative_prompt"] = None if negative is None else encode(negative)
    text = encode(prompt)
    start = time.perf_counter()
    evenly = parallel.SPLIT.get(settings.model.pipeline, True)
    split = parallel.split(pipe.transformer, flags["ulysses"], flags["ring"], evenly)
    with speed.attending(flags["attention"]), split:
        if flags["init_image"]:
            picture = records.open_picture(flags["init_image"])
            call |= {"image": picture, "strength": flags["strength"], "steps": flags["steps"]}
            image = generate.draw(pipe, text, height=height, width=width, **call)
        else:
            image = generate.multipass(pipe, text, height, width, settings.passes, **call)
    seconds = time.perf_counter() - start
    if flags["multipass"] == "progressive":  # which the picture itself has settled
        run = schedule["passes"][1]["sigmas"] = pipe.scheduler.sigmas.tolist()
        print(f"full size: {len(run) - 1} of {flags['steps']} steps, from sigma {run[0]:.2f}")
    record = {"prompt": prompt, "flags": flags, "config": settings.config.to_dict(), **schedule}
    return image, record | {"tiled_vae": tiled, **records.machine(pipe, seconds)}


def against(pipe, flags: dict) -> str | None:
    """The negative prompt, or the one that a pipeline with guidance implies; None: none at all."""
    given = flags["negative_prompt"]
    return generate.implied(pipe, flags["guidance"]) if given is None else given


def describe_schedule(scheduler, settings: Settings) -> dict:
    """mu, the sigmas and kappas of the schedule for the whole size, and what each pass runs of its
    own; the scheduler has the shift set already."""
    flags, family = settings.flags, settings.model.family

    def schedule(height, width, steps):
        return generate.noise_schedule(scheduler, height, width, steps, family)

    mu, sigmas = schedule(flags["height"], flags["width"], flags["steps"])
    called = torch.tensor(sigmas[:-1], dtype=torch.float64)
    kappa, _ = rope.schedule(called, settings.config)
    shift = settings.config.shift or family.shift
    found = {"shift": "static" if mu is None else shift, "lambda_s": settings.config.lambda_s}
    found |= {"mu": mu, "sigmas": sigmas, "kappas": kappa.tolist(), "passes": []}
    run = generate.sized(settings.passes, flags["height"], flags["width"])
    if flags["init_image"]:
        run[0]["strength"] = flags["strength"]
    for one in run:
        strength = one.get("strength", 1.0)
        first = 0 if strength is None else generate.skipped(one["steps"], strength)
        sigmas = schedule(one["height"], one["width"], one["steps"])[1][first:]
        found["passes"].append(one | {"sigmas": sigmas})
    return found


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


def short(value: float) -> str:
    """1.5 -> 1.5, 2.0 -> 2: in full, so that two values never look the same."""
    return str(value).removesuffix(".0")


def axes(settings: Settings) -> dict:
    """What may be swept, None where it has no effect."""
    config = settings.config
    felt = effective(config.method, config.dype)
    passes = len(generate.PASSES[settings.flags["multipass"]])
    found = {name: settings.flags.get(name) for name in AXES}
    found |= {name: None for count, name in generate.STRENGTHS.items() if passes < count}
    return found | {name: getattr(config, name) if name in felt else None for name in ENCODING}


def effective(method: str, dype: bool) -> tuple[str, ...]:
    """The settings of the encoding that have an effect. Without a kappa only its start has one."""
    if method == "base":
        return ()
    found = ("attention_scale", *["cutoff"] * method.startswith("cutoff"))
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
    passes = len(generate.PASSES[flags["multipass"]])
    for count, name in generate.STRENGTHS.items():
        if passes < count:
            flags.pop(name, None)
    return flags | config | {"prompt": prompt}


def key(flags: dict, config: dict, prompt: str) -> str:
    """The same as text: equal where the pictures would be."""
    return json.dumps(identity(flags, config, prompt), sort_keys=True)


def encoder(pipe, cells: list[Cell]) -> Callable:
    """A text -> its embeddings. Encoders with a device of their own encode all, and go."""
    flags = cells[0].settings.flags

    @lru_cache(maxsize=8)
    def encode(text):
        return generate.encode(pipe, text, flags["max_sequence_length"])

    apart = [name for name in pipe.dype_apart if name.startswith("text_encoder")]
    if not apart:
        return encode
    texts = {cell.prompt for cell in cells}
    texts |= {against(pipe, cell.settings.flags) for cell in cells}
    known = {text: encode(text) for text in texts if text is not None}
    for name in apart:
        setattr(pipe, name, None)
    gc.collect()
    return known.__getitem__


def work(settings: Settings) -> float:
    """Floating-point operations of the transformer for one picture, roughly.

    Two per parameter and token, and as many again for attention at 34,000 tokens in FLUX.1 (its 57
    blocks are 3,072 wide); in other models where the cube root of their size puts that.
    """
    flags, model = settings.flags, settings.model
    scale = flags[model.cfg] if model.cfg else model.cfg_off
    even = 34_000 * (model.billions / 12) ** (1 / 3)
    total = 0.0
    for one in generate.sized(settings.passes, flags["height"], flags["width"]):
        strength = flags["strength"] if flags["init_image"] else one.get("strength", 1.0)
        strength = 0.5 if strength is None else strength  # about; the picture settles it
        calls = one["steps"] - generate.skipped(one["steps"], strength)
        tokens = one["height"] * one["width"] / generate.TOKEN**2
        total += calls * 2e9 * model.billions * tokens * (1 + tokens / even)
    return total * (2 if scale > model.cfg_off else 1)


def out_of_memory(pipe, settings: Settings) -> str:
    """One sentence with the peak and the next cheaper setting."""
    device = execution_device(pipe)
    peak, tiled = memory.peak(device) or 0, getattr(pipe.vae, "use_tiling", False)
    less = memory.cheaper(settings.flags, pipe.dype_offload, tiled, device.type == "cpu")
    return f"out of memory at a peak of {memory.gib(peak)}; try {less}"
