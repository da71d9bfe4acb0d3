"""What the ground-truth tables draw: settings by name, and what is held against what."""

from itertools import product, takewhile
from pathlib import Path
from typing import NamedTuple

from dype.config import DEFAULT_LAMBDA_S, DyPEConfig
from dype.pipelines.catalog import MODELS
from dype.rope import METHODS

BASE = MODELS["demo"].base_resolution
NAMED = {"cutoff", "cutoff_width", "spectrum_exponent", "attention_scale", "attention_path"}
NAMED |= {"alpha", "beta", "dype_start_sigma", "base_resolution"}
# method -> the first one with the same static frequencies and m
STATIC = {method: method for method in METHODS} | {"ntk_mult": "ntk"}
STATIC |= dict.fromkeys(("yarn_ntk_only", "yarn_both", "yarn_power", "vision_yarn"), "yarn")
CONTROLS = ("reversed", "model", "progressive")
CONTROLLED = ["yarn_paper:reversed", "pi:1:1:reversed"]
UNCAPPED = ["base:model", "yarn_paper:static:model", "yarn_paper:model"]
BEST = ("yarn_paper", "pi:1:1", "yarn")  # by the joint score on prompts of seed 1 (docs/log.md)
SHARP = ":attention_scale=1.2:attention_path=rising"  # chosen likewise, in docs/cutoff.md
RIVALS = ["cutoff", f"cutoff{SHARP}", "yarn_paper:static", "yarn_paper", f"yarn_paper:1:2{SHARP}"]
SCALING = ["base", "yarn_paper:static", "yarn_paper"]  # of fig5, with 1x, 2x and 4x; of fig18
OURS = [f"{one}:model" for one in RIVALS[:2]]  # uncapped


class Setting(NamedTuple):
    """What is judged: an encoding, and what a control changes about it."""

    name: str
    config: DyPEConfig
    control: str = ""
    text: str = ""  # as it was asked for
    more: tuple[str, ...] = ()  # NAME=VALUE of what is not by default


class Cell(NamedTuple):
    """Images of one setting at one size: the first `count` prompts of a seed."""

    size: tuple[int, int]  # height, width, px
    setting: Setting
    count: int


def shown_size(size: tuple[int, int]) -> int | str:
    """The side in px, or WIDTHxHEIGHT where they differ."""
    height, width = size
    return height if height == width else f"{width}x{height}"


def paths_of(cell: Cell, folder: Path) -> list[Path]:
    """Where a cell's images are, in the folder of a seed."""
    place = folder / str(shown_size(cell.size)) / cell.setting.name
    return [place / f"{i:03}.png" for i in range(cell.count)]


def setting(text: str) -> Setting:
    """METHOD[:static | :SCALE[:EXPONENT]][:NAME=VALUE...][:CONTROL]. Raises ValueError.

    NAME is of NAMED, CONTROL of CONTROLS. The setting's own name has the numbers that have an
    effect: METHOD_SCALE_EXPONENT, METHOD_static, `base`, then those with a name.
    """
    method, *words = text.split(":")
    control = words.pop() if words and words[-1] in CONTROLS else ""
    plain = list(takewhile(lambda word: "=" not in word, words))
    config = {"method": method, "base_resolution": BASE, "dype": plain != ["static"]}
    config |= {"shift": "model"} if control == "model" else {}
    wrong = False
    try:
        numbers = [float(word) for word in plain] if config["dype"] else []
        named = dict(word.split("=", 1) for word in words[len(plain) :])
        named = {n: v if n == "attention_path" else float(v) for n, v in named.items()}
    except ValueError:
        wrong, numbers, named = True, [], {}
    config |= dict(zip(("dype_scale", "dype_exponent"), numbers, strict=False))
    made = DyPEConfig.from_dict(config | named)
    still = method == "base" or not made.dype
    wrong |= len(numbers) > 2 * (DEFAULT_LAMBDA_S[method] is not None)
    wrong |= not named.keys() <= (NAMED if method != "base" else set())
    if wrong or (still and control == "reversed"):
        raise ValueError(
            f"setting {text!r}, expected METHOD[:static|:SCALE[:EXPONENT]][:NAME=VALUE...], NAME "
            f"of {', '.join(sorted(NAMED))}, then at most one of {', '.join(CONTROLS)}; and no "
            "numbers or reversal where they change nothing"
        )
    parts = [method] if method == "base" or made.dype else [method, "static"]
    if made.dype and DEFAULT_LAMBDA_S[method] is not None:
        parts += [f"{made.lambda_s:g}", f"{made.dype_exponent:g}"]
    more = tuple(
        f"{name}={value}" if isinstance(value, str) else f"{name}={value:g}"
        for name, value in named.items()
        if value != getattr(DyPEConfig(method), name)
    )
    parts += [*more, control] if control else more
    return Setting("_".join(parts), made, control, text, more)


def plan(name: str) -> list[Cell]:
    """The cells of the quick, the default and the full table, and of that of docs/cutoff.md."""
    dynamic = [name for name in METHODS if name != "base"]
    statics = dict.fromkeys(f"{STATIC[method]}:static" for method in dynamic)
    everything = ["base", *statics, *dynamic, "pi:1:1"]
    finalists = ["base", *(f"{one.split(':')[0]}:static" for one in BEST), *BEST]
    lines = {
        "quick": [(256, ["base"], 8), (512, finalists, 8)],
        "default": [(256, ["base"], 64), (512, everything, 64), (1024, finalists, 16)],
        "full": [(256, ["base"], 64), (512, [*everything, *CONTROLLED, *UNCAPPED], 64)]
        + [(1024, everything, 64)]
        + [(size, SCALING, 16) for size in (768, 1280, 1536)],
        "cutoff": [
            (512, [*everything, *RIVALS], 64),
            (512, [*UNCAPPED, *OURS], 16),
            (1024, [*finalists, *RIVALS], 16),
            ((256, 512), RIVALS, 32),
            ((512, 1024), RIVALS, 8),
        ],
    }[name]
    found = []
    for size, some, count in lines:
        size = (size, size) if isinstance(size, int) else size
        settings = {parsed.name: parsed for parsed in map(setting, some)}
        found += [Cell(size, parsed, count) for parsed in settings.values()]
    return found


def couples(settings: list[str], against: list[str], cutoff: bool) -> list[tuple[str, str]]:
    """Names of settings and of what they are held against by the flags; cutoff: in its table."""
    found = [*product(settings, against)]
    if cutoff:
        found = [*product(RIVALS, RIVALS), *product(OURS, UNCAPPED)]
        found += [(one, one.removesuffix(":model")) for one in OURS]
    named = [(setting(one).name, setting(other).name) for one, other in found]
    return [(name, other) for name, other in named if name != other]


def compared(some: dict[str, Cell]) -> list[tuple[str, str]]:
    """(setting, what it is held against): dynamic against its own static form, controls against
    what they control, the rest against `base`."""
    found = []
    for name, cell in some.items():
        config, control = cell.setting.config, cell.setting.control
        static = "_".join([STATIC[config.method], "static", *cell.setting.more])
        static += "_model" * (control == "model")
        others = [name.removesuffix(f"_{control}"), static if config.dype else "base", "base"]
        found += [(name, other) for other in dict.fromkeys(others) if other in some.keys() - {name}]
    return found
