"""How words, presets, records, files and models' defaults become the settings of every image."""

import difflib
import math
import tomllib
from dataclasses import fields, replace
from functools import reduce
from itertools import product
from operator import or_
from pathlib import Path

from dype.cli import validation
from dype.cli.flags import ENCODING_FLAGS, NAMES, ON_OFF, SWITCHES, RunOptions, parse, to_values
from dype.config import CONFIG_FLAGS, DyPEConfig, preset_settings
from dype.errors import UserError, raise_user_errors
from dype.noise_schedule import check_shift
from dype.pipelines import distributed
from dype.pipelines.catalog import DEFAULT_MODEL, MODELS, Model, resolve_model
from dype.sampling import multipass, records
from dype.sampling.settings import FLAGS, RUN_FLAGS, RunSettings
from dype.sweep import grid

CONFIG_NAMES = [part.name for part in fields(DyPEConfig)]
OPTION_NAMES = [part.name for part in fields(RunOptions)]
# settings of which each model has a default of its own
MODEL_DEFAULTS = [row.name for row in RUN_FLAGS if hasattr(MODELS[DEFAULT_MODEL], row.name)]
MODEL_DEFAULTS.append("base_resolution")
CONFIG_FILE_FLAGS = NAMES - {"config", "profile", "from", "grid_from", "dry_run", "yes"}
# flags that take a list, in the order in which a sweep goes through them, the last the fastest
LIST_FLAGS = [row.name for row in [*CONFIG_FLAGS, *RUN_FLAGS] if row.label is not None]
LIST_FLAGS.sort(key=lambda name: {"multipass": 0, "seed": 2}.get(name, 1))


@raise_user_errors()
def resolve(words: dict) -> tuple[RunOptions, list[RunSettings]]:
    """What is to be done, and the settings of every image.

    words: as `vars` of what `flags.parse` returns. A flag wins over `--sweep`,
    that over `--preset`, that over `--config` or `--from`, that over the default. Raises UserError,
    OSError.
    """
    words = to_values(words)
    if "profile" in words and "config" not in words:
        raise ValueError("--profile is of a --config FILE.toml, expected that too")
    if {"from_", "config"} <= words.keys():
        raise ValueError("--from has every setting already, expected no --config with it")
    file, record = words.get("config"), words.get("from_")
    profile = load_profile(file, words.get("profile")) if file is not None else {}
    source = load_image_settings(record) if record is not None else {}
    given = profile | words
    options = RunOptions(**{name: given[name] for name in OPTION_NAMES if name in given})
    name, entry, source = choose_model(given, source)
    prompts = find_prompts(given, source, options, name, entry)
    lines = expand_sweep(options, given.get("base_resolution", entry.base_resolution))
    lower = {row.name: row.default for row in RUN_FLAGS} | {"init_sha256": None, "lora": []}
    lower |= {name: getattr(entry, name) for name in MODEL_DEFAULTS} | source | profile
    levels = [(lower | line | words, line | words) for line in lines]
    count = len(prompts) * sum(math.prod(map(len, cell_axes(values))) for values, _ in levels)
    if count > grid.MAX_IMAGES and not options.yes:
        raise ValueError(f"these are {count} images, expected at most {grid.MAX_IMAGES}, or --yes")
    notes: set[str] = set()
    runs = [
        resolve_run(reduce(or_, cell, values) | {"model": name}, upper, entry, options, notes)
        for values, upper in levels
        for cell in product(*cell_axes(values))
    ]
    for note in sorted(notes):
        print(note)
    check_strengths(given, runs)
    if options.sweep is None and count > 1:
        options = replace(options, sweep="sweep")
    images: dict[str, RunSettings] = {}  # those of one name would be the same image
    for run in (replace(run, prompt=prompt) for prompt in prompts for run in runs):
        first = images.setdefault(run.file_name, run)
        assert first is run or first.identity == run.identity
    return options, [*images.values()]


def choose_model(given: dict, source: dict) -> tuple[str, Model, dict]:
    """The name of the model, what is known of it, and what of a record's settings is not bound to
    another model."""
    name = given.get("model", source.get("model", DEFAULT_MODEL))
    if name and name not in MODELS and Path(name).is_dir():
        name = str(Path(name).absolute())  # so that the record holds from anywhere
    revision = given.get("revision", source.get("revision") if "model" not in given else None)
    if source and source["model"] != name:
        bound = {*MODEL_DEFAULTS, "revision"}
        source = {key: value for key, value in source.items() if key not in bound}
    return name, resolve_model(name, revision), source


def find_prompts(
    given: dict, source: dict, options: RunOptions, name: str, entry: Model
) -> list[str]:
    """The prompts that are given, of a record, or the model's own. Raises UserError."""
    prompts = list(given.get("prompt", []))
    if options.prompts_file is not None:
        prompts += grid.read_prompts(Path(options.prompts_file))
    prompts = prompts or source.get("prompt") or [entry.prompt]
    blank = [prompt for prompt in prompts if not prompt.strip()]
    if blank:
        raise UserError(f"--prompt is {blank[0]!r}, expected some words")
    if not options.magic_suffix:
        return prompts
    if not entry.magic_suffix:
        raise UserError(f"--magic_suffix is for qwen-image, expected none with {name}")
    return [prompt + entry.magic_suffix for prompt in prompts]


def expand_sweep(options: RunOptions, base_resolution: int) -> list[dict]:
    """The lines of `--sweep`, printed as the flags that they stand for. Raises ValueError."""
    if options.sweep is None:
        if options.quick or options.multipass_only:
            flag = "quick" if options.quick else "multipass_only"
            raise ValueError(f"--{flag} is of a --sweep NAME")
        return [{}]
    lines = grid.expand_named_sweep(
        options.sweep, base_resolution, options.quick, options.multipass_only
    )
    print(f"--sweep {options.sweep} stands for", *lines, sep="\n  ")
    if grid.SWEEPS[options.sweep].note:
        print(grid.SWEEPS[options.sweep].note)
    return [to_values(vars(parse(line.split()))) for line in lines]


def cell_axes(values: dict) -> list[list[dict]]:
    """The lists among values: of each list, for every entry, what a cell gets from it."""
    heights, widths = (
        side if isinstance(side, list) else [side] for side in (values["height"], values["width"])
    )
    count = max(len(heights), len(widths))
    heights, widths = (side * count if len(side) == 1 else side for side in (heights, widths))
    axes = [[{"height": h, "width": w} for h, w in zip(heights, widths, strict=True)]]
    lists = [name for name in LIST_FLAGS if isinstance(values.get(name), list)]
    return axes + [[{name: value} for value in values[name]] for name in lists]


def resolve_run(
    values: dict, upper: dict, entry: Model, options: RunOptions, notes: set[str]
) -> RunSettings:
    """The settings of one image, but for its prompt. Raises ValueError.

    upper: the flags that win over a preset; what that sets is added to `notes`.
    """
    height, width = values["height"], values["width"]
    if options.preset is not None:
        chosen = preset_settings(options.preset, height, width, values["base_resolution"])
        chosen = {name: value for name, value in chosen.items() if name not in upper}
        applied = ", ".join(f"{name} {value}" for name, value in chosen.items())
        notes.add(f"preset {options.preset}: {applied or 'nothing that no flag says'}")
        values |= chosen
    method = values.setdefault("method", entry.dype_defaults["method"])
    defaults = (
        entry.dype_defaults if method == entry.dype_defaults["method"] else {}
    )  # of this method alone
    given = {name: values[name] for name in CONFIG_NAMES if name in values}
    config = DyPEConfig.from_dict(defaults | given)
    check_shift(entry.scheduler_config, config, entry.family)
    if values["init_image"] is not None:
        values["init_image"] = str(Path(values["init_image"]).absolute())
        known = None if "init_image" in upper else values["init_sha256"]
        values["init_sha256"] = validation.hash_init_image(values, known)
        passes = [{"height": height, "width": width, "steps": values["steps"]}]
        passes[0]["strength"] = values["strength"]
    else:
        strengths = values["pass2_strength"], values["pass3_strength"]
        passes = multipass.resolve_passes(
            values["multipass"], height, width, values["steps"], strengths, config.base_resolution
        )
    values["lora"] = [validation.normalize_lora(text) for text in values["lora"]]
    values["negative_prompt"] = validation.effective_negative_prompt(values, upper, entry)
    settings = {row.name: values[row.name] for row in RUN_FLAGS}
    settings |= {"init_sha256": values["init_sha256"], "prompt": ""}
    settings |= {"passes": passes, "processes": values["ulysses"] * values["ring"]}
    run = RunSettings(**settings, config=config, entry=entry)
    validation.check_run(run)
    distributed.check_processes(run, options.dry_run)
    return run


def check_strengths(given: dict, runs: list[RunSettings]) -> None:
    """Raise ValueError for strengths that are given, but that no pass has."""
    passes = max(len(multipass.PASS_SCALES[run.multipass]) for run in runs)
    for count, flag in multipass.STRENGTHS.items():
        if flag in given and passes < count:
            raise ValueError(f"--{flag} is for a --multipass of {count} passes, expected one")
    if "strength" in given and runs[0].init_image is None:
        raise ValueError("--strength is for --init_image FILE, expected that too")


def load_image_settings(file: str) -> dict:
    """The settings in an image's record, checked. Raises UserError."""
    try:
        record = records.read_record(Path(file))
        flags, prompt = dict(record["flags"]), record["prompt"]
        config = DyPEConfig.from_dict(record["config"]).to_dict()
        if flags["revision"] is None:
            flags["revision"] = record["commit"]  # what was drawn, not what is newest
        for name in ("ulysses", "ring"):  # as many processes as there are now
            flags.pop(name, None)
        if flags["tiled_vae"] == "auto":
            flags["tiled_vae"] = "on" if record["tiled_vae"] else "off"
        values = flags | {"model": flags["model"], "prompt": prompt}
        for row in FLAGS:
            if row.name in values:
                value = values[row.name]
                for part in value if row.name == "lora" else [value]:
                    row.check(part, "--")
    except OSError as error:
        raise UserError(f"--from {file} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--from {file} carries no complete settings") from error
    except ValueError as error:
        raise UserError(f"--from {file}: {error}") from error
    if config["base_resolution"] is None:
        del config["base_resolution"]  # the model's own
    return flags | config | {"prompt": [prompt]}


def load_profile(file: str, name: str | None) -> dict:
    """The flags of a profile, parsed as if they stood before those of the command line.

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
    values: dict = {}
    for table in dict.fromkeys(("default", name)):
        words = []
        for key, value in tables.get(table, {}).items():
            nested = key == "dype" and isinstance(value, dict)
            where = f"[{table}.dype]" if nested else f"[{table}]"
            accepted = CONFIG_FILE_FLAGS & ENCODING_FLAGS if nested else CONFIG_FILE_FLAGS
            for flag, setting in value.items() if nested else [(key, value)]:
                if flag not in accepted:
                    near = difflib.get_close_matches(flag, sorted(accepted), 1, 0)[0]
                    raise ValueError(
                        f"--config {file} {where}: there is no {flag!r}, expected {near!r}"
                    )
                if setting is False and flag in SWITCHES:  # which [default] may have on
                    values.pop(SWITCHES[flag], None)
                words += toml_to_words(file, flag, setting)
        values |= to_values(vars(parse(words)))
    return values


def toml_to_words(file: str, flag: str, value) -> list[str]:
    """A TOML value as words of the command line. Raises ValueError."""
    if flag in SWITCHES and isinstance(value, bool):
        return [f"--{flag}"] * value
    kinds, wanted = (int, float, str), "a number, text or a list of them"
    if flag in SWITCHES:
        kinds, wanted = (), "true or false"
    elif flag in ("prompt", "lora"):
        kinds, wanted = (str,), "text or a list of texts"
    parts = value if isinstance(value, list) else [value]
    if flag in ON_OFF:
        parts = [("off", "on")[part] if isinstance(part, bool) else part for part in parts]
    if not parts or any(isinstance(p, bool) or not isinstance(p, kinds) for p in parts):
        raise ValueError(f"--config {file}: {flag} is {value!r}, expected {wanted}")
    texts = [str(part) for part in parts]
    texts = texts if flag in ("prompt", "lora") else [",".join(texts)]
    return [f"--{flag}={text}" for text in texts]
