"""Settings of the ground-truth benchmark, the cells of its tables, and the pairs to compare."""

import re
from collections.abc import Iterable
from dataclasses import fields
from itertools import product, takewhile
from pathlib import Path
from typing import NamedTuple

from dype.config import CONFIG_FLAGS, DEFAULT_LAMBDA_S, DyPEConfig, check_choice, has_kappa
from dype.pipelines.catalog import MODELS
from dype.rope import METHODS

DEMO = MODELS["demo"]
BASE = DEMO.base_resolution  # px
COUNT = 24  # of the prompts of settings without a table
NAMED_SETTINGS = {part.name for part in fields(DyPEConfig)}
NAMED_SETTINGS -= {"method", "dype", "dype_scale", "dype_exponent", "anisotropic"}
NAMED_SETTINGS -= {"shift", "base_shift", "max_shift"}
TEXT_SETTINGS = ("attention_path", "rdfc_pairs")
# no effect on a static method
DYNAMIC_SETTINGS = ("attention_path=falling", "attention_path=rising", "dype_start_sigma=")
# name -> the methods whose frequencies follow it
SETTING_METHODS = {"beta": ("yarn_paper", "tide")}
SETTING_METHODS |= dict.fromkeys(("cutoff_width", "spectrum_exponent"), ("cutoff",))
SETTING_METHODS |= {"ntk_factor": ("imax",), "rdfc_turns": ("rdfc",)}
# method -> the first method with the same static frequencies and m
STATIC_FORMS = {method: method for method in METHODS} | {"ntk_mult": "ntk"}
STATIC_FORMS |= dict.fromkeys(("yarn_ntk_only", "yarn_both", "yarn_power", "vision_yarn"), "yarn")
STATIC_CONTROLS = ("model", "progressive", "twopass")
CONTROLS = ("reversed", *STATIC_CONTROLS)
TWOPASS_STRENGTH = 0.3
SCALING_SETTINGS = ["base", "yarn_paper", "dy_yarn_paper"]  # stock and the paper's method
RISING = ":attention_path=rising"
# by the table "choice"
CHOSEN = "dy_cutoff:cutoff=0.5"
ALPHA = "dy_yarn_paper:alpha=8"
RISING_CHOSEN = f"{CHOSEN}:attention_scale=1.2{RISING}"
GRAMMAR = "base or [dy_]METHOD[:LAMBDA_S[:LAMBDA_T]], then [:NAME=VALUE...][:CONTROL]"


class Setting(NamedTuple):
    """A position encoding and a control."""

    name: str  # `parse_setting` accepts it
    config: DyPEConfig
    control: str = ""  # one of CONTROLS, or none
    overrides: tuple[str, ...] = ()  # NAME=VALUE, without the method's default values

    @property
    def folder(self) -> str:
        """Return METHOD_static or METHOD_LAMBDA_S_LAMBDA_T, as in folders of older versions."""
        method, config = self.config.method, self.config
        words = [method] if method == "base" or config.dype else [method, "static"]
        if has_kappa(config.to_dict()):
            words += [f"{config.lambda_s:g}", f"{config.dype_exponent:g}"]
        words += [*self.overrides, self.control] if self.control else self.overrides
        return "_".join(words)


class Cell(NamedTuple):
    """Images of one setting at one size: the first `count` prompts of a seed."""

    size: tuple[int, int]  # height, width, px
    setting: Setting
    count: int

    @property
    def folder(self) -> str:
        """Return the folder of the images, in that of the seed: SIZE/SETTING."""
        return f"{format_size(self.size)}/{self.setting.folder}"


class Table(NamedTuple):
    """A table of square images of the prompts of one seed."""

    question: str  # that it answers
    lines: tuple[tuple[int, list[str], int], ...]  # scale, settings, number of prompts
    seed: int = 0  # of the prompts
    baselines: tuple[str, ...] = ()  # of paired differences, beside those of `default_pairs`


METHOD_NAMES = [name for name in METHODS if name != "base"]
ALL_SETTINGS = ["base", *dict.fromkeys(STATIC_FORMS[name] for name in METHOD_NAMES)]
ALL_SETTINGS += [f"dy_{name}" for name in METHOD_NAMES]
MAIN_SETTINGS = ["base", "yarn", "dy_yarn", "yarn_paper", "dy_yarn_paper"]
MAIN_SETTINGS += ["yarn_paper:alpha=8", ALPHA, "pi", CHOSEN]
LARGE_SETTINGS = ["base", "yarn_paper:alpha=8", ALPHA, CHOSEN]
CANDIDATES = [
    *("pi", "pi:attention_scale=0.1", "pi:attention_scale=0.3"),
    *("dy_pi:1", "dy_pi:1:1", "dy_pi:1:0.5"),
    *("yarn_paper", "dy_yarn_paper", "dy_yarn_paper:1:1", "dy_yarn_paper:1:0.5"),
    *("dy_yarn_paper:alpha=4", ALPHA, f"dy_yarn_paper:attention_scale=0.6{RISING}"),
    *("dy_cutoff:cutoff=2", "dy_cutoff", CHOSEN, "dy_cutoff:cutoff=0.25"),
    *(f"{CHOSEN}:attention_path=sega", f"{CHOSEN}:attention_scale=0.6{RISING}", RISING_CHOSEN),
]
SCALED_SETTINGS = [f"{name}:attention_path=sega" for name in MAIN_SETTINGS[1:]]
CONTROLLED_SETTINGS = ["base", "yarn_paper", "dy_yarn_paper", ALPHA, CHOSEN]
CONTROLLED_SETTINGS += [f"{name}:model" for name in CONTROLLED_SETTINGS]
CONTROLLED_SETTINGS += [f"{ALPHA}:reversed", f"{CHOSEN}:reversed"]
CONTROLLED_SETTINGS += [f"{ALPHA}:twopass", f"{ALPHA}:progressive"]
RECIPES = ["base", "base:text_repeat=4", "yarn_paper", "yarn_paper:text_repeat=4", "sega"]
RECIPES += ["dy_sega", "sega:attention_scale=0.1", ALPHA, CHOSEN]
RECIPES += [f"{name}:attention_path=sega" for name in ("yarn_paper", ALPHA, CHOSEN)]
TABLES = {
    "quick": Table("does the demo work here?", ((1, ["base"], 3), (2, ["base", ALPHA], 3))),
    "choice": Table(
        "which settings? on prompts that no other table has",
        ((2, CANDIDATES, 8),),
        seed=1,
        baselines=("pi",),
    ),
    "main": Table(
        "which encoding keeps layout and texture at 2x?",
        ((1, ["base"], 32), (2, [*MAIN_SETTINGS, f"{ALPHA}:progressive"], 32)),
        baselines=("pi", "dy_yarn_paper", ALPHA),
    ),
    "large": Table(
        "and at 4x?",
        ((1, ["base"], 6), (2, LARGE_SETTINGS, 6), (4, LARGE_SETTINGS, 6)),
        baselines=(ALPHA,),
    ),
    "methods": Table(
        "how do all methods compare at 2x?", ((2, [*ALL_SETTINGS, ALPHA, CHOSEN], 12),)
    ),
    "scales": Table(
        "what do attention scales give at 2x?",
        ((2, [*MAIN_SETTINGS, *SCALED_SETTINGS, RISING_CHOSEN], 32),),
    ),
    "controls": Table(
        "does it hang on time, the schedule, the passes?",
        ((2, CONTROLLED_SETTINGS, 16),),
        baselines=("base:model", f"{ALPHA}:model"),
    ),
    "recipes": Table(
        "SEGA, copies of the text and the cutoff, each at one m?",
        ((2, RECIPES, 16),),
        baselines=(ALPHA, f"{ALPHA}:attention_path=sega"),
    ),
}
PAPER = [name for name in TABLES if name != "quick"]


def format_size(size: tuple[int, int]) -> int | str:
    """Return the side of a square in px, or WIDTHxHEIGHT."""
    height, width = size
    return height if height == width else f"{width}x{height}"


def image_paths(cell: Cell, folder: Path) -> list[Path]:
    """Return the paths of a cell's images, in the folder of a seed."""
    return [folder / cell.folder / f"{i:03}.png" for i in range(cell.count)]


def parse_setting(text: str) -> Setting:
    """Return the setting of a text, with its shortest text as the name.

    GRAMMAR is the syntax, with NAME one of NAMED_SETTINGS and CONTROL one of CONTROLS. "dy_yarn" is
    the method with DyPE, "yarn" the static one.

    Raises:
        ValueError: the text is no setting, or a part of it has no effect.
    """
    name, *words = text.split(":")
    method = name.removeprefix("dy_")
    dype = name != method
    check_choice("method", method, DEFAULT_LAMBDA_S)
    if "static" in words:
        words = [word for word in words if "=" in word or word in CONTROLS]
        static = ":".join([method, *(word for word in words if not needs_dype(word))])
        static = parse_setting(static).name
        raise ValueError(f"setting {text!r} is an old spelling, expected {static!r}")
    control = words[-1] if words and words[-1] in CONTROLS else ""
    parts = words[:-1] if control else words
    lambda_words = list(takewhile(lambda word: "=" not in word, parts))
    try:
        lambdas = [float(word) for word in lambda_words]
        assignments = dict(map(parse_assignment, parts[len(lambda_words) :]))
        is_valid = len(lambdas) <= 2 * (DEFAULT_LAMBDA_S[method] is not None)
        is_valid &= method != "base" or not (dype or control == "reversed")
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"setting {text!r}, expected {GRAMMAR}, NAME of {', '.join(sorted(NAMED_SETTINGS))}, "
            f"CONTROL of {', '.join(CONTROLS)}; dy_ is with DyPE"
        )
    settings = {"method": method, "base_resolution": BASE, "dype": dype}
    settings |= {"shift": "model"} if control == "model" else {}
    settings |= dict(zip(("dype_scale", "dype_exponent"), lambdas, strict=False))
    config = DyPEConfig(**settings | assignments)
    check_effects(text, config, words, assignments)
    overrides = format_overrides(assignments)
    return Setting(shortest_name(config, overrides, control), config, control, overrides)


def parse_assignment(word: str) -> tuple[str, str | float]:
    """Return name and value of NAME=VALUE. Raise ValueError if it is no such text."""
    name, value = word.split("=", 1)
    if name not in NAMED_SETTINGS:
        raise ValueError(name)
    if name in TEXT_SETTINGS or value == "auto":
        return name, value
    return name, int(value) if value.isdecimal() else float(value)


def format_overrides(assignments: dict[str, str | float]) -> tuple[str, ...]:
    """Return NAME=VALUE of values by name, without default values."""
    defaults = DyPEConfig(base_resolution=BASE)
    return tuple(
        f"{name}={value}" if isinstance(value, str) else f"{name}={value:.12g}"
        for name, value in assignments.items()
        if value != getattr(defaults, name)
    )


def needs_dype(word: str) -> bool:
    """Return whether a word after the method has no effect on a static method."""
    is_dynamic = word.startswith(DYNAMIC_SETTINGS)
    return is_dynamic or not ("=" in word or word in STATIC_CONTROLS)


def check_effects(text: str, config: DyPEConfig, words: list[str], assignments: dict) -> None:
    """Raise ValueError if a part of a setting has no effect.

    Args:
        text: the setting.
        config: its position encoding.
        words: its parts after the method.
        assignments: value by name, of its parts NAME=VALUE.
    """
    dynamic = config.to_dict() | {"dype": True}
    useless = [row.name for row in CONFIG_FLAGS if not row.has_effect(dynamic)]
    useless += [name for name, methods in SETTING_METHODS.items() if config.method not in methods]
    if not config.follows_latent:
        useless += ["sega_beta", "sega_floor", "sega_reference"]
    for name in assignments:
        if name in useless:
            raise ValueError(f"setting {text!r}, expected no {name}: it has no effect there")
    ignored = [word for word in words if needs_dype(word)]
    if ignored and not config.dype:
        parts, dynamic_name = ":".join(ignored), parse_setting(f"dy_{text}").name
        raise ValueError(
            f"setting {text!r} is static and ignores {parts}, expected {dynamic_name!r}"
        )


def shortest_name(config: DyPEConfig, overrides: tuple[str, ...], control: str) -> str:
    """Return the shortest text of a setting.

    Args:
        config: position encoding.
        overrides: NAME=VALUE, without default values.
        control: one of CONTROLS, or "".
    """
    words, defaults = [config.name], DyPEConfig(config.method)
    if has_kappa(config.to_dict()):
        is_default = config.dype_exponent == defaults.dype_exponent
        count = int(config.lambda_s != defaults.lambda_s) if is_default else 2
        words += [f"{value:.12g}" for value in (config.lambda_s, config.dype_exponent)[:count]]
    words += [*overrides, control] if control else overrides
    return ":".join(words)


def is_setting_name(text: str) -> bool:
    """Return whether a text is the name of a setting in this version."""
    try:
        return parse_setting(text).name == text
    except ValueError:
        return False


def plan_cells(table: Table, limit: int | None = None) -> list[Cell]:
    """Return the cells of a table, with at most `limit` prompts per setting."""
    cells = []
    for scale, texts, count in table.lines:
        settings = {setting.name: setting for setting in map(parse_setting, texts)}
        size = (scale * BASE, scale * BASE)
        cells += [Cell(size, setting, min(count, limit or count)) for setting in settings.values()]
    return cells


def pairs_against(baselines: Iterable[str], cells: dict[str, Cell]) -> list[tuple[str, str]]:
    """Return every (setting, baseline) among cells by the name of their setting."""
    names = dict.fromkeys(parse_setting(text).name for text in baselines)
    return [
        (name, baseline)
        for name, baseline in product(cells, names)
        if name != baseline and baseline in cells
    ]


def without_scale(name: str) -> str:
    """Return the name of a setting without its attention scale."""
    return re.sub(":attention_[a-z]+=[^:]+", "", name)


def default_pairs(cells: dict[str, Cell], baselines: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Return the (setting, baseline) names to compare among cells by the name of their setting.

    Each setting is compared with `base`, a method with DyPE also with its static form, one with a
    control, an attention scale or other settings than its method's also with the one without, and
    all with the given baselines.
    """
    pairs = []
    for name, cell in cells.items():
        config, control = cell.setting.config, cell.setting.control
        overrides = [part for part in cell.setting.overrides if not needs_dype(part)]
        static = ":".join([STATIC_FORMS[config.method], *overrides])
        static += ":model" * (control == "model")
        default = ":".join(part for part in name.split(":") if "=" not in part)
        names = [name.removesuffix(f":{control}"), without_scale(name), default]
        names += [] if control else [config.name]
        names += [static if config.dype else "base", "base", *baselines]
        names = [text for text in dict.fromkeys(names) if text in cells.keys() - {name}]
        pairs += [(name, baseline) for baseline in names]
    return pairs
