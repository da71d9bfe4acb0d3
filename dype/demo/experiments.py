"""Settings of the ground-truth benchmark, the cells of its tables, and the pairs to compare."""

from dataclasses import fields
from itertools import product, takewhile
from pathlib import Path
from typing import NamedTuple

from dype.config import CONFIG_FLAGS, DEFAULT_LAMBDA_S, DyPEConfig, check_choice, has_kappa
from dype.pipelines.catalog import MODELS
from dype.rope import METHODS

DEMO = MODELS["demo"]
BASE = DEMO.base_resolution  # px
COUNT = 24  # of the prompts at 1x and 2x
LARGE_COUNT = 4  # of the prompts of larger images
NAMED_SETTINGS = {part.name for part in fields(DyPEConfig)}
NAMED_SETTINGS -= {"method", "dype", "dype_scale", "dype_exponent", "anisotropic"}
NAMED_SETTINGS -= {"shift", "base_shift", "max_shift"}
TEXT_SETTINGS = ("attention_path", "rdfc_pairs")
# no effect on a static method
DYNAMIC_SETTINGS = ("attention_path=falling", "attention_path=rising", "dype_start_sigma=")
# name -> the methods whose frequencies follow it
SETTING_METHODS = {"alpha": ("yarn_paper", "tide"), "beta": ("yarn_paper", "tide")}
SETTING_METHODS |= dict.fromkeys(("cutoff_width", "spectrum_exponent"), ("cutoff",))
SETTING_METHODS |= {"ntk_factor": ("imax",), "rdfc_turns": ("rdfc",)}
# method -> the first method with the same static frequencies and m
STATIC_FORMS = {method: method for method in METHODS} | {"ntk_mult": "ntk"}
STATIC_FORMS |= dict.fromkeys(("yarn_ntk_only", "yarn_both", "yarn_power", "vision_yarn"), "yarn")
STATIC_CONTROLS = ("model", "progressive")
CONTROLS = ("reversed", *STATIC_CONTROLS)
CONTROL_SETTINGS = ["dy_yarn_paper:reversed", "dy_pi:1:1:reversed"]
UNCAPPED_SETTINGS = ["base:model", "yarn_paper:model", "dy_yarn_paper:model"]
RISING_ATTENTION = ":attention_scale=1.2:attention_path=rising"  # selected on the same prompts
CUTOFF_COMPARISON = ["dy_cutoff", f"dy_cutoff{RISING_ATTENTION}", "yarn_paper", "dy_yarn_paper"]
CUTOFF_COMPARISON += [f"dy_yarn_paper{RISING_ATTENTION}"]
PAPER_SETTINGS = ["base", "yarn", "dy_yarn", "yarn_paper", "dy_yarn_paper", "ntk", "dy_ntk"]
PAPER_SETTINGS += ["pi", "dy_pi"]
# at every size, and in fig5 and fig18: stock and the demo's method
SCALING_SETTINGS = ["base", DEMO.dype_defaults["method"], f"dy_{DEMO.dype_defaults['method']}"]
PROGRESSIVE = f"{SCALING_SETTINGS[-1]}:progressive"
UNCAPPED_CUTOFF = [f"{name}:model" for name in CUTOFF_COMPARISON[:2]]
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


def format_size(size: tuple[int, int]) -> int | str:
    """Return the side of a square in px, or WIDTHxHEIGHT."""
    height, width = size
    return height if height == width else f"{width}x{height}"


def image_paths(cell: Cell, folder: Path) -> list[Path]:
    """Return the paths of a cell's images, in the folder of a seed."""
    cell_folder = folder / str(format_size(cell.size)) / cell.setting.folder
    return [cell_folder / f"{i:03}.png" for i in range(cell.count)]


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


def plan_cells(name: str) -> list[Cell]:
    """Return the cells of a table: "quick", "default", "full" or "cutoff"."""
    methods = [method for method in METHODS if method != "base"]
    static_methods = dict.fromkeys(STATIC_FORMS[method] for method in methods)
    all_settings = ["base", *static_methods, *(f"dy_{method}" for method in methods), "dy_pi:1:1"]
    base_line = (1, 1), ["base"], COUNT
    lines = {
        "quick": [((1, 1), ["base"], 3), ((2, 2), SCALING_SETTINGS, 3)],
        "default": [
            base_line,
            ((2, 2), [*PAPER_SETTINGS, PROGRESSIVE], COUNT),
            ((4, 4), [*SCALING_SETTINGS, PROGRESSIVE], LARGE_COUNT),
        ],
        "full": [
            base_line,
            ((2, 2), [*all_settings, *CONTROL_SETTINGS, *UNCAPPED_SETTINGS], COUNT),
            ((4, 4), all_settings, LARGE_COUNT),
            *(((scale, scale), SCALING_SETTINGS, LARGE_COUNT) for scale in (3, 5, 6)),
        ],
        "cutoff": [
            ((2, 2), [*all_settings, *CUTOFF_COMPARISON], COUNT),
            ((2, 2), [*UNCAPPED_SETTINGS, *UNCAPPED_CUTOFF], COUNT),
            ((4, 4), [*SCALING_SETTINGS, *CUTOFF_COMPARISON], LARGE_COUNT),
            ((1, 2), CUTOFF_COMPARISON, COUNT),
            ((2, 4), CUTOFF_COMPARISON, LARGE_COUNT),
        ],
    }[name]
    cells = []
    for scales, texts, count in lines:
        size = (scales[0] * BASE, scales[1] * BASE)
        settings = {setting.name: setting for setting in map(parse_setting, texts)}
        cells += [Cell(size, setting, count) for setting in settings.values()]
    return cells


def requested_pairs(
    settings: list[str], baselines: list[str], is_cutoff_table: bool
) -> list[tuple[str, str]]:
    """Return the (setting, baseline) names that the flags ask for, without equal names.

    Args:
        settings: texts of settings.
        baselines: texts of --against.
        is_cutoff_table: return the pairs of the table of --cutoff instead.
    """
    pairs = [*product(settings, baselines)]
    if is_cutoff_table:
        pairs = [*product(CUTOFF_COMPARISON, CUTOFF_COMPARISON)]
        pairs += [*product(UNCAPPED_CUTOFF, UNCAPPED_SETTINGS)]
        pairs += [(text, text.removesuffix(":model")) for text in UNCAPPED_CUTOFF]
    names = [tuple(parse_setting(text).name for text in pair) for pair in pairs]
    return [(name, baseline) for name, baseline in names if name != baseline]


def default_pairs(cells: dict[str, Cell]) -> list[tuple[str, str]]:
    """Return the (setting, baseline) names to compare among cells by the name of their setting.

    Each setting is compared with `base`, a method with DyPE also with its static form, and one
    with a control or with other settings than its method's also with the one without.
    """
    pairs = []
    for name, cell in cells.items():
        config, control = cell.setting.config, cell.setting.control
        overrides = [part for part in cell.setting.overrides if not needs_dype(part)]
        static = ":".join([STATIC_FORMS[config.method], *overrides])
        static += ":model" * (control == "model")
        default = ":".join(part for part in name.split(":") if "=" not in part)
        baselines = [name.removesuffix(f":{control}"), default]
        baselines += [static if config.dype else "base", "base"]
        baselines = [text for text in dict.fromkeys(baselines) if text in cells.keys() - {name}]
        pairs += [(name, baseline) for baseline in baselines]
    return pairs
