"""Resolve flags, presets, records, files and model defaults to the settings of every image."""

import math
import os
from dataclasses import fields, replace
from functools import reduce
from itertools import product
from operator import or_
from pathlib import Path

from dype.cli import validation
from dype.cli.flags import RunOptions, parse
from dype.cli.notes import find_notes
from dype.cli.profiles import load_profile
from dype.cli.values import to_values
from dype.config import (
    CONFIG_FLAGS,
    DYNAMIC_NAMES,
    STATIC_METHODS,
    DyPEConfig,
    check_text,
    find_choice,
    flags_in_errors,
    preset_settings,
)
from dype.errors import UserError, raise_user_errors
from dype.families import check_pairs, check_text_repeat
from dype.noise_schedule import check_shift
from dype.pipelines import processes
from dype.pipelines.catalog import DEFAULT_MODEL, MODELS, Model, resolve_model
from dype.sampling import passes, records
from dype.sampling.settings import FLAGS, RUN_FLAGS, RunSettings, format_value
from dype.sweep import grid, results

CONFIG_NAMES = [field.name for field in fields(DyPEConfig)]
OPTION_NAMES = [field.name for field in fields(RunOptions)]
# name of a repository in the table, without its owner -> name of the model
REPOSITORY_NAMES = tuple((Path(x.repo).name.lower(), name) for name, x in MODELS.items())
# settings whose default depends on the model
MODEL_DEFAULTS = [row.name for row in RUN_FLAGS if hasattr(MODELS[DEFAULT_MODEL], row.name)]
MODEL_DEFAULTS.append("base_resolution")
# flags that take a list, in the order of a sweep's loops, the innermost last
LIST_FLAGS = [row.name for row in [*CONFIG_FLAGS, *RUN_FLAGS] if row.label is not None]
LIST_FLAGS.sort(key=lambda name: {"multipass": 0, "seed": 2}.get(name, 1))


@raise_user_errors()
def resolve(words: dict) -> tuple[RunOptions, list[RunSettings]]:
    """Return the options of a run and the settings of each of its images.

    Precedence, highest first: the flags in `words`, `--sweep`, `--preset`, `--config` or `--from`,
    the model's defaults.

    Args:
        words: flag name -> text, as `vars` of what `flags.parse` returns.

    Raises:
        UserError: the flags are wrong, or rule each other out.
        OSError: a file cannot be read.
    """
    flags = to_values(words)
    if "profile" in flags and "config" not in flags:
        raise ValueError("--profile needs --config FILE.toml, expected both flags")
    if {"from_", "config"} <= flags.keys():
        raise ValueError("--from has every setting already, expected no --config with it")
    file, image = flags.get("config"), flags.get("from_")
    profile = load_profile(file, flags.get("profile")) if file is not None else {}
    from_image = load_image_settings(image) if image is not None else {}
    typed = profile.keys() | flags.keys()
    profile, flags = split_dynamic_names(profile, flags)
    explicit = profile | flags
    validation.check_paths(from_image | explicit)
    options = RunOptions(**{name: explicit[name] for name in OPTION_NAMES if name in explicit})
    name, entry, from_image = choose_model(explicit, from_image)
    if from_image:
        validation.check_weights(from_image, explicit, entry)
    prompts = find_prompts(explicit, from_image, options, name, entry)
    if options.num_images > 1:
        flags["seed"] = count_seeds(options.num_images, explicit, from_image)
    lines = expand_sweep(options, explicit.get("base_resolution", entry.base_resolution))
    lower = {row.name: row.default for row in RUN_FLAGS} | {"init_sha256": None, "lora": []}
    lower |= {name: getattr(entry, name) for name in MODEL_DEFAULTS} | from_image | profile
    levels = [(lower | line | flags, line | flags) for line in lines]
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
    check_strengths(explicit, runs)
    options = name_sweep(options, count)
    images: dict[str, RunSettings] = {}  # by name, because equal names mean the same image
    for run in (replace(run, prompt=prompt) for prompt in prompts for run in runs):
        first = images.setdefault(run.file_name, run)
        assert first is run or first.identity == run.identity
    # only what the user wrote, because a method such as dy_yarn sets dype too
    written = {name: value for name, value in explicit.items() if name in typed}
    for note in find_notes(written, words, [*images.values()]):
        print(note)
    return options, [*images.values()]


def count_seeds(count: int, explicit: dict, from_image: dict) -> list[int]:
    """Return the seeds of --num_images.

    Args:
        count: number of images of each prompt.
        explicit: the flags of the command line and of the profile.
        from_image: the settings of the `--from` image, {} without one.

    Raises:
        ValueError: --seed has several values, or the seeds become too large.
    """
    [row] = [row for row in RUN_FLAGS if row.name == "seed"]
    first, *further = explicit.get("seed", [from_image.get("seed", row.default)])
    if further:
        raise ValueError(f"--num_images is {count}, but --seed has several values, expected one")
    row.check(first + count - 1, "--")
    return [*range(first, first + count)]


def name_sweep(options: RunOptions, count: int) -> RunOptions:
    """Return the options, with "sweep" as the name of a sweep that has none.

    A single image is a sweep too if it is of a prompts file or in the folder of a sweep, because a
    longer list may have become so short. Raises ValueError for a sweep without metadata.
    """
    may_resume = options.output is None and not options.no_metadata
    resumes = may_resume and (options.prompts_file is not None or has_sweep(options.output_dir))
    if options.sweep is None and (count > 1 or resumes):
        options = replace(options, sweep="sweep")
    if options.sweep and options.no_metadata:
        raise ValueError("--no_metadata is for one image, expected no list: a sweep needs records")
    return options


def has_sweep(folder: str | None) -> bool:
    """Return whether a folder has the table of a sweep that can be continued."""
    try:
        return any(row["settings"] for row in results.read_rows(Path(folder or "outputs")))
    except (OSError, ValueError):  # because another table is not in the way of a single image
        return False


def split_dynamic_names(profile: dict, flags: dict) -> tuple[dict, dict]:
    """Return both with every method `dy_yarn` as `yarn` with DyPE.

    Where a list of methods has a `dy_` name, the other methods are static, as in results.csv,
    unless --dype is on. Method and dype are then one list, whose entries set both.

    Args:
        profile: the values of --config.
        flags: the values of the command line, which win.

    Raises:
        ValueError: --dype is not on beside a `dy_` name.
    """
    levels = []
    if "dype" in flags and "method" not in flags and "method" in profile:
        names = [DYNAMIC_NAMES.get(name, name) for name in profile["method"]]
        profile = profile | {"method": list(dict.fromkeys(names))}
    if "method" in flags:
        profile = {name: value for name, value in profile.items() if name != "method"}
    for prefix, level in ((f"--config {flags.get('config')}: ", profile), ("--", flags)):
        names, dype = level.get("method", []), level.get("dype")
        dynamic = [name for name in names if name in DYNAMIC_NAMES]
        methods = [DYNAMIC_NAMES.get(name, name) for name in names]
        if dynamic and dype is None:
            entries = [
                {"method": method, "dype": name in dynamic}
                for name, method in zip(names, methods, strict=True)
            ]
            level = level | {"method": entries, "dype": True}  # so that no preset sets dype
        elif dynamic and dype == [True]:
            level = level | {"method": methods}
        elif dynamic:
            forms, static = ",".join(map(format_value, dype)), ",".join(dict.fromkeys(methods))
            raise ValueError(
                f"{prefix}method is {dynamic[0]!r}, but dype is {forms}, expected on, or no dy_: "
                f"--method {static} --dype {forms}"
            )
        levels.append(level)
    return tuple(levels)


def choose_model(explicit: dict, from_image: dict) -> tuple[str, Model, dict]:
    """Return the model's name, its catalog entry, and the record's settings that fit this model.

    Args:
        explicit: the flags of the command line and of the profile.
        from_image: the settings of the `--from` image, {} without one. If it was generated by
            another model, the settings whose default depends on the model are left out.

    Raises:
        ValueError: there is no such model.
    """
    name = explicit.get("model", from_image.get("model", DEFAULT_MODEL))
    if not os.path.exists(name):
        name = find_choice(name, MODELS, REPOSITORY_NAMES)
    if name and name not in MODELS and Path(name).is_dir():
        name = str(Path(name).absolute())  # because the record must hold in any working directory
        from_image.pop("revision", None)  # it has no effect on a folder, also of the hub's cache
    revision = from_image.get("revision") if "model" not in explicit else None
    revision = explicit.get("revision", revision)
    if from_image and from_image["model"] != name:
        bound = {*MODEL_DEFAULTS, "revision", "variant", "transformer"}
        from_image = {key: value for key, value in from_image.items() if key not in bound}
    entry = resolve_model(name, revision)
    method = from_image.get("method")
    if "method" in explicit and method and from_image["dype"] == DyPEConfig(method).dype:
        del from_image["dype"]  # a default, so that of the new method applies
    if method and explicit.get("method", method) not in (method, [method]):
        from_image.pop("alpha", None)  # it belongs to the method's ramp
    if not entry.guidance:  # earlier versions recorded a guidance that had no effect
        from_image.pop("guidance", None)
    return name, entry, from_image


def find_prompts(
    explicit: dict, from_image: dict, options: RunOptions, name: str, entry: Model
) -> list[str]:
    """Return the prompts of the flags, else of the `--from` image, else of the model.

    Args:
        explicit: the flags of the command line and of the profile.
        from_image: the settings of the `--from` image, {} without one.
        options: of the run; `prompts_file` and `magic_suffix` are read.
        name: of the model.
        entry: of the catalog.

    Raises:
        UserError: a prompt is blank, a file cannot be read, or the model has no magic suffix.
    """
    prompts = list(explicit.get("prompt", []))
    if options.prompts_file is not None:
        prompts += grid.read_prompts(Path(options.prompts_file))
    prompts = prompts or from_image.get("prompt") or [entry.prompt]
    for prompt in prompts:
        check_text("--prompt", prompt)
    blank = [prompt for prompt in prompts if not any(map(str.isprintable, "".join(prompt.split())))]
    if blank:
        raise UserError(f"--prompt is {blank[0]!r}, expected some words")
    if not options.magic_suffix:
        return prompts
    if not entry.magic_suffix:
        raise UserError(f"--magic_suffix is for qwen-image, expected none with {name}")
    return [prompt + entry.magic_suffix for prompt in prompts]


def expand_sweep(options: RunOptions, base_resolution: int) -> list[dict]:
    """Return the flags of each line of `--sweep`, and print the lines; [{}] without a sweep.

    Raises ValueError.
    """
    if options.sweep is None:
        if options.quick or options.multipass_only:
            flag = "quick" if options.quick else "multipass_only"
            raise ValueError(f"--{flag} needs --sweep NAME, expected both flags")
        return [{}]
    lines = grid.expand_named_sweep(
        options.sweep, base_resolution, options.quick, options.multipass_only
    )
    print(f"--sweep {options.sweep} stands for", *lines, sep="\n  ")
    if grid.SWEEPS[options.sweep].note:
        print(grid.SWEEPS[options.sweep].note)
    return [to_values(vars(parse(line.split()))) for line in lines]


def cell_axes(values: dict) -> list[list[dict]]:
    """Return the axes of a sweep; an axis has for each of its entries the settings of a cell."""
    heights, widths = (
        side if isinstance(side, list) else [side] for side in (values["height"], values["width"])
    )
    count = max(len(heights), len(widths))
    heights, widths = (side * count if len(side) == 1 else side for side in (heights, widths))
    axes = [[{"height": h, "width": w} for h, w in zip(heights, widths, strict=True)]]
    lists = [name for name in LIST_FLAGS if isinstance(values.get(name), list)]
    return axes + [
        [value if isinstance(value, dict) else {name: value} for value in values[name]]
        for name in lists
    ]


def resolve_run(
    values: dict, upper: dict, entry: Model, options: RunOptions, notes: set[str]
) -> RunSettings:
    """Return the settings of one image, without its prompt.

    Args:
        values: setting -> value; changed in place.
        upper: the flags that win over a preset.
        entry: the model, of the catalog.
        options: of the run.
        notes: receives sentences on what the preset sets, and on guidance that is off.

    Raises:
        ValueError: a setting is out of range, or the settings rule each other out.
    """
    height, width = values["height"], values["width"]
    if options.preset is not None:
        preset = preset_settings(options.preset, height, width, values["base_resolution"])
        kept = upper.keys()
        if "method" in upper and values["method"] in STATIC_METHODS:
            kept = {*upper, "dype", "dype_scale"}  # the preset's suit its own method
        preset = {name: value for name, value in preset.items() if name not in kept}
        applied = ", ".join(f"{name} {value}" for name, value in preset.items())
        notes.add(f"preset {options.preset}: {applied or 'nothing, because flags set all of it'}")
        values |= preset
    method = values.setdefault("method", entry.dype_defaults["method"])
    settings = {name: values[name] for name in CONFIG_NAMES if name in values}
    with flags_in_errors():
        config = DyPEConfig.from_dict(entry.config_defaults(method) | settings)
        check_shift(entry.scheduler_config, config, entry.family)
        check_text_repeat(config, entry.family)
        if values["model"] in MODELS:  # because another checkpoint may have other axes
            check_pairs(config, entry.family.num_pairs)
    if values["init_image"] is not None:
        values["init_image"] = str(Path(values["init_image"]).absolute())
        expected = None if "init_image" in upper else values["init_sha256"]
        values["init_sha256"] = validation.hash_init_image(values, expected)
        steps = {"height": height, "width": width, "steps": values["steps"]}
        image_passes = [steps | {"strength": values["strength"]}]
    else:
        strengths = values["pass2_strength"], values["pass3_strength"]
        image_passes = passes.resolve_passes(
            values["multipass"], height, width, values["steps"], strengths, config.base_resolution
        )
    if values["transformer"] is not None:
        values["transformer"] = validation.normalize_path(values["transformer"])
    values["lora"] = [validation.normalize_lora(text) for text in values["lora"]]
    values["guidance"] = validation.effective_guidance(values, entry, notes)
    values["negative_prompt"] = validation.effective_negative_prompt(values, upper, entry)
    settings = {row.name: values[row.name] for row in RUN_FLAGS}
    settings |= {"init_sha256": values["init_sha256"], "prompt": ""}
    settings |= {"passes": image_passes, "processes": values["ulysses"] * values["ring"]}
    run = RunSettings(**settings, config=config, entry=entry)
    validation.check_run(run)
    processes.check_processes(run, options.dry_run)
    return run


def check_strengths(explicit: dict, runs: list[RunSettings]) -> None:
    """Raise ValueError for a strength in the flags if no pass of any image uses it."""
    longest = max(len(passes.PASS_SCALES[run.multipass]) for run in runs)
    for count, flag in passes.STRENGTHS.items():
        if flag in explicit and longest < count:
            raise ValueError(f"--{flag} is for a --multipass of {count} passes, expected one")
    if "strength" in explicit and runs[0].init_image is None:
        raise ValueError("--strength is for --init_image FILE, expected both")


def load_image_settings(file: str) -> dict:
    """Return the settings in an image's record, checked. Raises UserError."""
    try:
        record, source = records.find_record(Path(file))
        flags, prompt = {**record["flags"]}, record["prompt"]
        config = DyPEConfig.from_dict(record["config"]).to_dict()
        if record["commit"]:  # because the newest, or that of a branch, may have changed since
            flags["revision"] = record["commit"]
        for name in ("ulysses", "ring"):  # because this machine may have other GPUs
            flags.pop(name, None)
        if flags["tiled_vae"] == "auto":
            flags["tiled_vae"] = "on" if record["tiled_vae"] else "off"
        values = flags | {"model": flags["model"], "prompt": prompt}
        for row in FLAGS:
            if row.name in values:
                value = values[row.name]
                if row.name == "lora" and not isinstance(value, list):
                    raise TypeError
                for item in value if row.name == "lora" else [value]:
                    row.check(item, "--")
    except OSError as error:
        raise UserError(f"--from {file} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"--from {file} carries no complete settings") from error
    except ValueError as error:
        raise UserError(f"--from {file}: {error}") from error
    if unknown := ", ".join(sorted(flags.keys() - {row.name for row in FLAGS} - {"init_sha256"})):
        print(f"--from {file} has settings of another version, without effect: {unknown}")
    if source != Path(file):
        print(f"--from {file} carries no settings, so those of {source} apply")
    if config["base_resolution"] is None:
        del config["base_resolution"]  # because the model's default is wanted, not None
    return flags | config | {"prompt": [prompt], "weights": record.get("weights")}
