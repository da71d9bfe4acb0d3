"""How flags, presets, records and models' defaults become the settings of a run."""

import difflib
import tomllib
from dataclasses import fields
from pathlib import Path

from dype.cli.flags import ENCODING, PROFILED, SWITCHES
from dype.cli.validation import (
    CONFIG_NUMBERS,
    NUMBERS,
    check_flags,
    check_guidance,
    check_init_image,
    check_passes,
    known_model,
    lora,
)
from dype.config import DyPEConfig, one_of, preset
from dype.errors import UserError, user_errors
from dype.noise_schedule import check_shift
from dype.pipelines import distributed
from dype.pipelines.catalog import DEFAULT_MODEL, MODELS, Model, resolve_model
from dype.sampling import multipass, records
from dype.sampling.run import Settings
from dype.sweep import grid
from dype.sweep.grid import check_prompt, read_prompts, sides

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


def typed(raw: dict) -> dict:
    """Flags as they were given, one value each, as values. Raises ValueError."""
    given = dict(raw)
    kinds = {name: kind for name, (kind, *_) in NUMBERS.items()} | CONFIG_NUMBERS
    for name, kind in kinds.items():
        if name in given:
            try:
                given[name] = kind(given[name])
            except ValueError:
                wanted = "a whole number" if kind is int else "a number"
                raise ValueError(f"--{name} is {given[name]!r}, expected {wanted}") from None
    if "size" in given:
        given["height"], given["width"] = sides(given.pop("size"))
    if given.pop("no_dype", False):
        if given.get("dype", "off") == "on":
            raise ValueError("--no_dype and --dype on contradict each other, expected one of them")
        given["dype"] = "off"
    if "dype" in given:
        one_of("--dype", given["dype"], ("on", "off"))
        given["dype"] = given["dype"] == "on"
    progressive = given.pop("progressive", False)
    if progressive and given.setdefault("multipass", "progressive") != "progressive":
        raise ValueError(
            f"--progressive and --multipass {given['multipass']} contradict each other, expected "
            "one of them"
        )
    if given.pop("isotropic", False):
        given["anisotropic"] = False
    if "init_image" in given:
        given["init_image"] = str(Path(given["init_image"]).absolute())
    return given


@user_errors()
def resolve(given: dict) -> tuple[dict, list[Settings]]:
    """The flags that were given, by a profile too, and every setting that they ask for.

    given: words, as `vars` of what `flags.parse` returns. Puts flags, `--sweep`, `--preset`,
    `--config`, `--from` and defaults together. Raises UserError, OSError.
    """
    given = {name: value for name, value in given.items() if value not in (None, False)}
    if "profile" in given and "config" not in given:
        raise ValueError("--profile is of a --config FILE.toml, expected that too")
    profile = load_profile(given["config"], given.get("profile")) if "config" in given else {}
    return over(profile, given), settle(given, profile)


def settle(given: dict, profile: dict) -> list[Settings]:
    """The settings of each cell. Raises ValueError, UserError."""
    for level in (given, profile):
        if "size" in level and {"height", "width"} & level.keys():
            raise ValueError("--size and --height or --width contradict each other, expected one")
    if "source" in given and "config" in given:
        raise ValueError("--from has every setting already, expected no --config with it")
    source = load_source(given["source"]) if "source" in given else {}
    name, model, source = chosen_model(profile | given, source)
    prompts = read_prompts(profile | given) or source.get("prompts") or [model.prompt]
    lines = swept(profile | given, model)
    count = len(prompts) * sum(grid.cells(over(profile, over(line, given)))[0] for line in lines)
    if count > grid.MOST and not given.get("yes"):
        raise ValueError(f"these are {count} pictures, expected at most {grid.MOST}, or --yes")
    found, notes = [], set()
    for line in lines:
        upper = over(line, given)
        for cell in grid.each(over(profile, upper)):
            below = typed({k: v for k, v in cell.items() if k not in upper})
            above = typed({k: v for k, v in cell.items() if k in upper})
            found.append(merge(above, source | below, name, model, prompts, notes))
    for note in sorted(notes):
        print(note)
    check_passes(profile | given, [settings.flags for settings in found])
    return found


def swept(given: dict, model: Model) -> list[dict]:
    """The lines of `--sweep`, printed as the flags that they stand for. Raises ValueError."""
    quick, only = given.get("quick", False), given.get("multipass_only", False)
    if "sweep" not in given:
        if quick or only:
            raise ValueError(f"--{'quick' if quick else 'multipass_only'} is of a --sweep NAME")
        return [{}]
    base = typed({k: v for k, v in given.items() if k == "base_resolution"})
    base = base.get("base_resolution", model.base_resolution)
    lines = grid.named(given["sweep"], base, quick, only)
    print(f"--sweep {given['sweep']} stands for")
    for line in lines:
        print(f"  {grid.spelled(line)}")
    note = grid.SWEEPS[given["sweep"]][2]
    if note:
        print(note)
    return lines


def chosen_model(given: dict, source: dict) -> tuple[str, Model, dict]:
    """The name of the model, what is known of it, and what of `source` holds for it."""
    name = given.get("model", source.get("model", DEFAULT_MODEL))
    known_model(name)
    if name not in MODELS and Path(name).is_dir():
        name = str(Path(name).absolute())  # so that the record holds from anywhere
    revision = given.get("revision", source.get("revision") if "model" not in given else None)
    if source and source["model"] != name:  # what belongs to the other model stays behind
        bound = (*MODEL_FLAGS, "revision", "base_resolution")
        source = {k: v for k, v in source.items() if k not in bound}
    return name, resolve_model(name, revision), source


def merge(given: dict, source: dict, name: str, model: Model, prompts: list, notes: set):
    """The settings of one cell: `given` wins over the preset, that over `source`, that over the
    model's default. Adds what the preset chose to `notes`. Raises ValueError, UserError."""
    flags = {"model": name, "revision": None, "lora": [], "seed": 42}
    flags |= {"tiled_vae": "auto", "tile_size": None, "device": None, "offload": "auto"}
    flags |= {"text_encoder_device": None, "vae_device": None, "quantize": "none"}
    flags |= {"compile": "off", "attention": None, "cache": "off", "ulysses": 1, "ring": 1}
    flags |= {"multipass": "single", "pass2_strength": 0.5, "pass3_strength": 0.4}
    flags |= {"init_image": None, "init_sha256": None, "strength": 0.5}
    flags |= {name: getattr(model, name) for name in MODEL_FLAGS}
    flags |= {k: v for k, v in (source | given).items() if k in flags} | {"model": name}
    if "init_image" in given:
        flags["init_sha256"] = None
    check_flags(flags, model)

    config = merge_config(given, source, flags, model, notes)
    check_shift(model.schedule, config, model.family)

    if flags["steps"] == 1 and model.schedule.get("shift_terminal"):
        raise UserError(f"--steps is 1, expected at least 2 with {name}, whose last sigma is fixed")
    check_guidance(name, model, flags, given)
    check_init_image(flags)
    if given.get("magic_suffix"):
        if not model.suffix:
            raise UserError(f"--magic_suffix is for qwen-image, expected none with {name}")
        prompts = [prompt + model.suffix for prompt in prompts]
    loras = [lora(text) for text in flags["lora"]]
    flags["lora"] = [f"{path}:{scale}" for path, scale in loras]
    made = Settings(model, config, flags, prompts, loras)
    passes = multipass.sized(made.passes, flags["height"], flags["width"])
    distributed.check(flags, model, passes, given.get("dry_run", False))
    return made


def merge_config(given: dict, source: dict, flags: dict, model: Model, notes: set) -> DyPEConfig:
    """The position encoding's part of `merge`."""
    config = DyPEConfig(base_resolution=model.base_resolution).to_dict()
    saved, asked = ({k: v for k, v in d.items() if k in CONFIG_FLAGS} for d in (source, given))
    chosen = {}
    name = given.get("preset", source.get("preset"))
    if name is not None:
        trained = DyPEConfig.from_dict(config | saved | asked).base_resolution
        chosen = preset(name, flags["height"], flags["width"], trained)
        applied = [f"{k} {v}" for k, v in chosen.items() if k not in asked]
        notes.add(f"preset {name}: {', '.join(applied) or 'nothing that no flag says'}")
    asked = saved | chosen | asked
    if asked.get("method", model.dype["method"]) == model.dype["method"]:
        config |= model.dype  # another method brings its own scale and exponent
    return DyPEConfig.from_dict(config | asked)


def load_source(name: str) -> dict:
    """The settings in a picture's record, checked. Raises UserError."""
    try:
        record = records.load(Path(name))
        flags, prompt = dict(record["flags"]), record["prompt"]
        config = DyPEConfig.from_dict(record["config"]).to_dict()
        if flags["revision"] is None:
            flags["revision"] = record["commit"]  # what was drawn, not what is newest
        for name in ("ulysses", "ring"):  # as many processes as there are now
            flags.pop(name, None)
        if flags["tiled_vae"] == "auto":
            flags["tiled_vae"] = "on" if record["tiled_vae"] else "off"
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


def load_profile(file: str, name: str | None) -> dict:
    """The settings of a profile of a file, spelled as on the command line.

    name: of a table, None for `[default]` alone; a `[NAME.dype]` table may hold the position
    encoding's flags. Raises ValueError with the line of a syntax error, the flag nearest to an
    unknown one, or the profiles that there are.
    """
    try:
        tables = tomllib.loads(Path(file).read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"--config {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {file} cannot be read: it is not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {file} is no TOML: {error}, expected KEY = VALUE") from error
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"--config {file}: {key!r} stands in no table, expected [default]")
    if name is not None and name not in tables:
        raise ValueError(f"--profile is {name!r}, expected one of {', '.join(tables) or 'none'}")
    found = {}
    for table in ("default", name):
        level = {}
        for key, value in tables.get(table, {}).items():
            inner = value if key == "dype" and isinstance(value, dict) else {key: value}
            for flag, given in inner.items():
                near = PROFILED if inner is not value else PROFILED & ENCODING
                if flag not in near:
                    meant = difflib.get_close_matches(flag, sorted(near), 1, 0)[0]
                    where = f"[{table}.dype]" if inner is value else f"[{table}]"
                    raise ValueError(
                        f"--config {file} {where}: there is no {flag!r}, expected {meant!r}"
                    )
                level[flag] = spelled(file, flag, given)
        found = over(found, level)
    return {flag: given for flag, given in found.items() if given is not False}


def over(lower: dict, upper: dict) -> dict:
    """Two levels of flags: the upper wins, whichever way it says it."""
    hidden = set()
    for one, other in ({"size"}, {"height", "width"}), ({"dype"}, {"no_dype"}):
        hidden |= one if upper.keys() & other else set()
        hidden |= other if upper.keys() & one else set()
    return {name: value for name, value in lower.items() if name not in hidden} | upper


def spelled(file: str, flag: str, value):
    """A TOML value as the command line's: text, a list of texts, or whether a switch is on."""
    several = flag in ("prompt", "lora")
    if isinstance(value, bool) and flag == "dype":
        return "on" if value else "off"
    if isinstance(value, bool) or flag in SWITCHES:
        if isinstance(value, bool) and flag in SWITCHES:
            return value
    elif isinstance(value, list) and value and not any(isinstance(one, dict) for one in value):
        texts = [spelled(file, flag, one) for one in value]
        return [text for one in texts for text in one] if several else ",".join(texts)
    elif isinstance(value, int | float | str):
        return [value] if several else str(value)
    wanted = "true or false" if flag in SWITCHES else "a number, text or a list of them"
    raise ValueError(f"--config {file}: {flag} is {value!r}, expected {wanted}")
