"""The flags of the command line: the settings of an image, and the options of a run."""

import argparse
import json
import os
import platform
import re
from dataclasses import dataclass

from dype import __version__
from dype.cli.guesses import describe_unknown
from dype.cli.quotes import check_quotes
from dype.config import CONFIG_FLAGS, PRESETS, Flag, flag, flags_of
from dype.errors import Parser, UserError
from dype.pipelines.catalog import DEFAULT_MODEL, MODELS
from dype.sampling.settings import FLAGS, format_value
from dype.sweep.grid import MAX_IMAGES, SWEEPS

PROMPT_GROUP, ENCODING_GROUP = FLAGS[0].group, CONFIG_FLAGS[0].group
SWEEP_GROUP = "sweeps (a flag with ,... takes a list: base,yarn or 0-3 or first:last:step)"
SIZE = "width x height in px, or one number for a square. Default: --height and --width"
METHOD_HELP = {
    "base": "the model's own encoding",
    "pi": "position interpolation (Eq. 5, 14)",
    "ntk": "NTK-aware scaling (Eq. 6, 15)",
    "ntk_mult": "NTK-aware scaling by s times kappa (Eq. 19)",
    "tasr": "time-aware scaling: nearly pi at sigma 1, ntk at 0",
    "yarn": "two ramps, thresholds times kappa (authors' code since February 2026)",
    "yarn_ntk_only": "yarn with fixed thresholds, dynamic NTK term (Table 7)",
    "yarn_both": "yarn with dynamic thresholds and NTK term (Table 7)",
    "yarn_power": "two ramps, thresholds to the power kappa (authors' earlier code)",
    "yarn_paper": "the one ramp of the paper (Eq. 7, 8, 16)",
    "vision_yarn": "yarn_power with one NTK scale, fading attention scale (ComfyUI port)",
    "tide": "one ramp, fading attention scale by pair (TIDE)",
    "sega": "strong ntk, attention scale from the latent (SEGA)",
    "imax": "NTK-aware scaling by 10, bounded by pi (I-Max)",
    "rdfc": "one turn over the image for one pair (UltraImage)",
    "riflex": "rdfc with 0.9 turns (RIFLEx)",
    "resonance": "yarn of frequencies with whole turns (UltraFlux)",
    "cutoff": "pi above a moving cutoff wavelength, base below (this project's)",
}
EXAMPLES = {  # command -> comment
    'python run_dype.py --model demo --prompt "a red sun over blue mountains"': (
        "one image, with the demo model, which needs no GPU and no download"
    ),
    'python run_dype.py --prompt "a red fox in snow" --size 2048x3072': (
        "a size: 2048 px wide, 3072 px high"
    ),
    'python run_dype.py --prompt "a red fox in snow" --method yarn --no_dype': (
        "the static form of a method, without DyPE"
    ),
    'python run_dype.py --prompt "a red fox in snow" --method dy_yarn,yarn,base --seed 0-3': (
        "a sweep of lists: 3 methods x 4 seeds, with a contact sheet"
    ),
    'python run_dype.py --prompt "a red fox in snow" --multipass twopass': (
        "two passes: half the size first, then upscaled and refined"
    ),
    "python run_dype.py --from image.png --output again.png": (
        "the same image again, from the settings in its file"
    ),
}
EPILOG = "\n".join([
    "methods (docs/method.md has the equations):",
    *(f"  {name:13}  {text}" for name, text in METHOD_HELP.items()),
    "  --method yarn is yarn with DyPE: its stretch falls from step to step. With --no_dype it is",
    "  static: the same stretch at every step. base has no form with DyPE, and sega is static",
    "  unless you write --dype on or dy_sega.",
    "  File names and results.csv write dy_yarn with DyPE, yarn if static. --method also accepts",
    "  dy_yarn; in a list with a dy_ name, the names without dy_ are static.",
    "",
    "precedence:",
    "  Flags win over --sweep, then --preset, then --config or --from, then the model's defaults.",
    "  If a flag is repeated, the last one wins; --prompt and --lora add up.",
    "  Flag names may have hyphens instead of underscores.",
    "  Quote a prompt with double quotes. A value that begins with a hyphen needs FLAG=VALUE.",
    "",
    "examples:",
    *(f"  # {comment}\n  {command}" for command, comment in EXAMPLES.items()),
])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run: sources of further settings, the sweep, the output."""

    # fmt: off
    prompts_file: str | None = flag(
        "text file of further prompts; one per line", None, metavar="FILE", group=PROMPT_GROUP
    )
    num_images: int = flag(
        "number of images of each prompt; their seeds begin at --seed", 1,
        low=1, high=100 * MAX_IMAGES, aliases=("--num_images_per_prompt",),
    )
    magic_suffix: bool = flag(
        "add the authors' suffix to every prompt; qwen-image only", False
    )
    preset: str | None = flag(
        "settings by size; off: base; 4k: vision_yarn with exponent 2; auto: by the longer side, "
        "base up to 1.5x the base resolution, below 3x vision_yarn with exponent 1, else as 4k",
        None, choices=PRESETS, group=ENCODING_GROUP,
    )
    sweep: str | None = flag(
        f"named sweep; {', '.join(SWEEPS)}", None, choices=tuple(SWEEPS), group=SWEEP_GROUP
    )
    quick: bool = flag(
        "fewer images of --sweep; methods: sizes 1x and 2x, params: a 3 x 3 grid", False
    )
    multipass_only: bool = flag("only the two-pass image of --sweep methods", False)
    cols: str | None = flag(
        "columns of a contact sheet; a number: at most so many, a setting such as seed: a column "
        "for each of its values", None,
        metavar="N|NAME",
        default_help="at most 8; one for each seed and prompt, or, if they do not vary, for each "
        "value of the last setting that does",
    )
    grid_from: str | None = flag(
        "finished sweep; writes its contact sheets again and generates nothing", None,
        metavar="FOLDER",
    )
    yes: bool = flag(f"allow a sweep of more than {MAX_IMAGES} images", False)
    config: str | None = flag(
        "TOML file of flags; its table [default] applies", None, metavar="FILE.toml",
        group="settings from elsewhere",
    )
    profile: str | None = flag(
        "further table of --config; it wins over [default]", None
    )
    from_: str | None = flag(
        "image of this program, or its .json; its prompt and settings apply", None, metavar="FILE"
    )
    output_dir: str | None = flag(
        "output folder",
        None, metavar="FOLDER", group="output",
        default_help="outputs; of a --sweep NAME outputs/NAME, of others outputs/sweep",
    )
    output: str | None = flag(
        "output file of one image; .png, .jpg or .webp, all with the settings in them", None,
        metavar="FILE",
        default_help="seed_S_method_M_res_HxW.png in the output folder, plus each setting that "
        "differs from its default, plus _2, _3, ... if that file exists",
    )
    no_metadata: bool = flag(
        "write no prompt and no setting: an image without text, no JSON, the name image.png; one "
        "image only, which --from cannot repeat", False
    )
    overwrite: bool = flag(
        "replace existing files; a sweep replaces only images of other settings", False
    )
    dry_run: str | None = flag(
        "print time, memory and settings, or the plan of a sweep, and load no weights; on, full: "
        "also every setting, sigma and kappa", None, metavar="full", choices=("on", "full"),
        default_help="off",
    )
    # fmt: on


OPTIONS = flags_of(RunOptions)
ALL_FLAGS = [*FLAGS, *OPTIONS]
# name of a flag without a value -> the setting that it sets
SWITCHES = {row.name: row.name for row in OPTIONS if row.type is bool} | {
    switch[0].removeprefix("--"): row.name for row in FLAGS for switch in row.switches
}
# a further name -> the flag's own: the authors', and those of diffusers' arguments
ALIASES = {name.removeprefix("--"): row.option for row in ALL_FLAGS for name in row.aliases}
BOOLEAN_FLAGS = {row.name for row in FLAGS if row.type is bool}
FLAG_NAMES = {row.option for row in ALL_FLAGS} | SWITCHES.keys() | {"size"}
ENCODING_FLAGS = {row.name for row in ALL_FLAGS if row.group == ENCODING_GROUP} | {
    "no_dype",
    "isotropic",
}
# flags that are paths, or may be
PATH_FLAGS = ("model", "transformer", "lora", "init_image", "prompts_file", "config", "from_")
PATH_FLAGS += ("output_dir", "output", "grid_from")
# methods with DyPE as results.csv and file names spell them; `settings.split_dynamic` reads them
GROUPS = dict.fromkeys(row.group for row in ALL_FLAGS)
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212-"  # a text editor may replace hyphens by these
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")  # that --version names
METAVARS = {int: "N", float: "X", str: "NAME", bool: "on|off"}
PER_MODEL_DEFAULTS = {
    "method": lambda model: model.dype_defaults["method"],
    "shift": lambda model: model.family.shift,
    "base_resolution": lambda model: model.base_resolution,
}


class Prompts(argparse.Action):
    """Append the prompts of one --prompt, unless they are the words of an unquoted one."""

    def __call__(self, parser, namespace, texts, option_string=None):
        check_quotes(texts)
        namespace.prompt = [*getattr(namespace, "prompt", []), *texts]


class Size(argparse.Action):
    """Set height and width together: --size replaces every earlier --height and --width."""

    def __call__(self, parser, namespace, text, option_string=None):
        for side in ("height", "width"):
            vars(namespace).pop(side, None)
        namespace.size = text


class Version(argparse.Action):
    """Print the version of this program and those of its libraries, and exit."""

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version  # here, because no other flag needs it

        libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        print(f"DyPE {__version__}, {libraries}, Python {platform.python_version()}")
        parser.exit()


def default_text(row: Flag) -> str:
    """Return the default of a flag in words; a model's default with at most two exceptions."""
    if row.default is not ... and row.name not in PER_MODEL_DEFAULTS:
        return "none" if row.default is None else format_value(row.default)
    of_model = PER_MODEL_DEFAULTS.get(row.name, lambda model: getattr(model, row.name))
    defaults = {name: format_value(of_model(model)) for name, model in MODELS.items()}
    default = defaults[DEFAULT_MODEL]
    exceptions = [f"{name} {value}" for name, value in defaults.items() if value != default]
    if len(exceptions) > 2:
        return "per model (docs/models.md)"
    return f"{default} ({', '.join(exceptions)})" if exceptions else default


def help_text(row: Flag) -> str:
    """Return the help of a flag with its default."""
    end = " " if row.help.endswith(".") else ". "  # because some end with an ellipsis
    return f"{row.help}{end}Default: {row.default_help or default_text(row)}"


def parser() -> Parser:
    """Return the parser of run_dype.py; it returns only the flags that the user wrote."""
    command = Parser(
        prog="run_dype.py",
        usage='run_dype.py [--prompt "..."] [--model NAME] [--size WxH] [flags]',
        description="Generate images beyond the training resolution of a diffusion transformer, "
        "with DyPE\n(Dynamic Position Extrapolation, arXiv 2510.20766).",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    version_help = "show the versions of this program and of its libraries, and exit"
    command.add_argument("--version", action=Version, nargs=0, help=version_help)
    groups = {title: command.add_argument_group(title) for title in GROUPS}
    for row in ALL_FLAGS:
        add, takes_list = groups[row.group].add_argument, row.label is not None
        options = {"metavar": (row.metavar or METAVARS[row.type]) + ",..." * takes_list}
        if row.type is bool or row.name == "dry_run":
            options |= {"nargs": "?", "const": "on"}
        if row.name == "prompt":
            options["action"] = Prompts
        if row.name in PATH_FLAGS:  # because shells leave `--output=~/a.png` as it is
            options["type"] = os.path.expanduser
        if row.name in SWITCHES:
            options = {"action": "store_true"}
        names = [f"--{row.option}", *row.aliases]
        add(*names, dest=row.name, help=help_text(row), **options, **row.parser_options or {})
        for name, value, text in row.switches:
            const = switch_value(row, value)
            add(name, dest=row.name, action="store_const", const=const, help=text)
        if row.name == "width":
            add("--size", metavar="WxH,...", action=Size, help=SIZE)
    return command


def switch_value(row: Flag, value):
    """Return what `parse` returns for a switch that sets a flag to a value."""
    return value if row.label is None else [value]


def spell_flag(name: str, value) -> str:
    """Return a flag as the user wrote it: --no_dype, not --dype, where that switch set the value.

    Args:
        name: of the setting.
        value: what `parse` returned for it.
    """
    for row in FLAGS:
        for switch, constant, _ in row.switches if row.name == name else ():
            if value == switch_value(row, constant):
                return switch
    return f"--{name.rstrip('_')}"


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the flags of a command line, their values as texts. Raises UserError.

    Flag names may have hyphens instead of underscores; values are kept to the letter.
    """
    command, words = parser(), []
    for word in argv:
        match = re.fullmatch(rf"([{DASHES}]+)(\w[\w-]*)(=.*)?", word, re.DOTALL)
        name = match and "--" + match[2].replace("-", "_")
        if name in command._option_string_actions:
            if match[1] != "--":
                raise UserError(f"{word!r} begins with {match[1]!r}, expected {name}")
            if match[3] == "=--":  # which argparse drops
                raise UserError(f"{name} is '--', expected another value")
            word = name + (match[3] or "")
        words.append(word)
    args, extra = command.parse_known_args(words)
    if extra:
        raise UserError(describe_extra(extra, words, hasattr(args, "prompt")))
    return args


def describe_extra(extra: list[str], words: list[str], has_prompt: bool) -> str:
    """Return a sentence on words of a command line that belong to no flag.

    Args:
        extra: these words.
        words: all words.
        has_prompt: one of the flags is --prompt.
    """
    for word in extra:
        if match := re.fullmatch(rf"([{DASHES}]+)([^\W\d][\w-]*)(=.*)?", word, re.DOTALL):
            return describe_unknown(match[2], FLAG_NAMES, match[1])
    text = " ".join(word if word.isprintable() else repr(word) for word in extra)
    is_prompt = not extra[0].startswith("-") and (extra[0] is words[0] or " " in extra[0])
    if is_prompt and not has_prompt:
        return f"{text!r} has no flag, expected --prompt {json.dumps(text, ensure_ascii=False)}"
    hint = ""
    if not (has_prompt or extra[0].startswith("-")):
        hint = f"a prompt needs --prompt {json.dumps(text, ensure_ascii=False)}, "
    return (
        f"unrecognized arguments: {text}; {hint}a value of several words needs quotes, a value "
        "that begins with a hyphen needs FLAG=VALUE"
    )
