"""The flags of the command line: the settings of an image, and the options of a run."""

import argparse
import re
from dataclasses import dataclass

from dype.config import DEFAULT_LAMBDA_S, PRESETS, Flag, flag, flags_of
from dype.errors import Parser
from dype.pipelines.catalog import DEFAULT_MODEL, MODELS
from dype.sampling.settings import FLAGS, format_value
from dype.sweep.grid import MAX_IMAGES, SWEEPS, parse_list, parse_size

SIZE = "width x height in px, or one number for both (default: --height and --width)"
SWEEP_GROUP = "sweeps: every flag with ,... takes a list, as base,yarn or 0-3 or 1:3:0.5"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run: sources of further settings, the sweep, the output."""

    # fmt: off
    prompts_file: str | None = flag(
        "one per line, after those of --prompt", None, metavar="FILE", group="what to draw"
    )
    magic_suffix: bool = flag("the authors' addition to prompts for qwen-image", False)
    preset: str | None = flag(
        "off; auto: off up to 1.5x the base resolution, above it vision_yarn with exponent 1, from "
        "3x on 2; 4k: vision_yarn 2, 2, 1", None, choices=PRESETS, group="position encoding",
    )
    sweep: str | None = flag(
        f"a prepared one: {', '.join(SWEEPS)}", None, choices=tuple(SWEEPS), group=SWEEP_GROUP
    )
    quick: bool = flag("with --sweep methods: 1x and 2x alone; params: 3 x 3", False)
    multipass_only: bool = flag("of --sweep methods only the two-pass image", False)
    cols: str | None = flag(
        "contact sheets: columns of one, more go to further sheets; or the setting that goes "
        "across (default: 8; seeds and prompts, else the last setting)", None, metavar="N|NAME",
    )
    grid_from: str | None = flag(
        "draw the contact sheets of a finished sweep again", None, metavar="FOLDER"
    )
    yes: bool = flag(f"more than {MAX_IMAGES} images are meant", False)
    config: str | None = flag(
        "its [default] table", None, metavar="FILE.toml", group="settings from elsewhere"
    )
    profile: str | None = flag("with --config: that table too", None)
    from_: str | None = flag("every setting of an image of this program", None, metavar="FILE.png")
    output_dir: str | None = flag(
        "(default: outputs; sweeps: outputs/sweep, or its name)", None, metavar="FOLDER",
        group="output",
    )
    output: str | None = flag(
        "(default: seed_S_method_M_res_HxW.png in the output folder, with every setting that is "
        "not at its default, and _2, _3, ... where that is taken)", None, metavar="FILE.png",
    )
    overwrite: bool = flag(
        "take a name that is taken; of a sweep, draw again what has other settings", False
    )
    dry_run: bool = flag(
        "print settings, mu, sigmas and kappas, or a sweep's plan; load no weights", False
    )
    # fmt: on


OPTIONS = flags_of(RunOptions)
ALL_FLAGS = [*FLAGS, *OPTIONS]
# name of a flag without a value -> the setting that it sets
SWITCHES = {row.name: row.name for row in OPTIONS if row.type is bool} | {
    switch[0].removeprefix("--"): row.name for row in FLAGS for switch in row.switches
}
BOOLEAN_FLAGS = {row.name for row in FLAGS if row.type is bool}
FLAG_NAMES = {row.option for row in ALL_FLAGS} | SWITCHES.keys() | {"size"}
ENCODING_FLAGS = {row.name for row in ALL_FLAGS if row.group == "position encoding"} | {
    "no_dype",
    "isotropic",
}
# methods with DyPE as results.csv and file names spell them; `settings.split_dynamic` reads them
DYNAMIC_METHODS = {f"dy_{method}": method for method in DEFAULT_LAMBDA_S if method != "base"}
GROUPS = dict.fromkeys(row.group for row in ALL_FLAGS)
METAVARS = {int: "N", float: "X", str: "NAME", bool: "on|off"}
PER_MODEL_DEFAULTS = {
    "method": lambda model: model.dype_defaults["method"],
    "shift": lambda model: model.family.shift,
}


class Size(argparse.Action):
    """Set height and width together: --size replaces every earlier --height and --width."""

    def __call__(self, parser, namespace, text, option_string=None):
        for side in ("height", "width"):
            vars(namespace).pop(side, None)
        namespace.size = text


def help_text(row: Flag) -> str:
    """Return the help of a flag with its default: one value, or the model's with the exceptions."""
    if "(default: " in row.help:
        return row.help
    default = row.default
    if default is ... or row.name in PER_MODEL_DEFAULTS or row.name == "base_resolution":
        of_model = PER_MODEL_DEFAULTS.get(row.name, lambda model: getattr(model, row.name))
        defaults = {name: of_model(model) for name, model in MODELS.items()}
        default = defaults[DEFAULT_MODEL]
        exceptions = [f"{name} {value}" for name, value in defaults.items() if value != default]
        default = "; ".join([f"{default}", *exceptions])
    elif default is None:
        default = "none"
    return f"{row.help} (default: {format_value(default)})".strip()


HELP = {row.name: help_text(row) for row in ALL_FLAGS}


def parser() -> Parser:
    """Return the parser of run_dype.py; it returns only the flags that the user wrote."""
    command = Parser(
        prog="run_dype.py",
        usage='run_dype.py [--prompt "..."] [--model NAME] [--height PX] [--width PX] [flags]',
        description="Draw an image beyond the size that a diffusion transformer was trained at, "
        "with DyPE (arXiv 2510.20766).",
        epilog="The last word wins. An explicit flag wins over --sweep, that over --preset, that "
        "over --config or --from, that over the model's own default. Hyphens may stand for a "
        "flag's underscores.",
        argument_default=argparse.SUPPRESS,
    )
    groups = {title: command.add_argument_group(title) for title in GROUPS}
    for row in ALL_FLAGS:
        add, takes_list = groups[row.group].add_argument, row.label is not None
        options = {"metavar": (row.metavar or METAVARS[row.type]) + ",..." * takes_list}
        if row.type is bool:
            options |= {"nargs": "?", "const": "on"}
        if row.name in SWITCHES:
            options = {"action": "store_true"}
        names = [f"--{row.option}", *row.aliases]
        add(*names, dest=row.name, help=HELP[row.name], **options, **row.parser_options or {})
        for name, value, text in row.switches:
            const, text = [value] if takes_list else value, f"{text} (default: off)"
            add(name, dest=row.name, action="store_const", const=const, help=text)
        if row.name == "width":
            add("--size", metavar="WxH,...", action=Size, help=SIZE)
    return command


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the flags of a command line, their values as texts. Raises UserError.

    Flag names may have hyphens instead of underscores.
    """

    def to_underscores(match):
        return "--" + match[0][2:].replace("-", "_")

    return parser().parse_args([re.sub(r"^--[a-z0-9_-]+", to_underscores, word) for word in argv])


def to_values(words: dict) -> dict:
    """Return the values of flags; of a flag that takes a list, the list of its values.

    words: flag name -> text, as `vars` of what `parse` returns. Raises ValueError, naming the flag.
    """
    values = dict(words)
    if "size" in values:
        sizes = [parse_size(text) for text in parse_list("size", values.pop("size"), False)]
        heights, widths = map(list, zip(*sizes, strict=True))
        values = {"height": heights, "width": widths} | values
    for row in ALL_FLAGS:
        text = values.get(row.name)
        if isinstance(text, str) and row.label is None:
            values[row.name] = row.parse(text)
        elif isinstance(text, str):
            texts = parse_list(row.name, text, row.type in (int, float))
            dynamic = DYNAMIC_METHODS if row.name == "method" else ()
            values[row.name] = [item if item in dynamic else row.parse(item) for item in texts]
        elif row.parser_options and row.name in values:  # a list, because the flag may be repeated
            values[row.name] = [row.parse(item) for item in text]
    return values
