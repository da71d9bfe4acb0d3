"""Settings of the ground-truth benchmark, the cells of its tables, and the pairs to compare."""

from itertools import product, takewhile
from pathlib import Path
from typing import NamedTuple

from dype.config import CONFIG_FLAGS, DEFAULT_LAMBDA_S, DyPEConfig
from dype.pipelines.catalog import MODELS
from dype.rope import METHODS

BASE = MODELS["demo"].base_resolution  # px
NAMED_SETTINGS = {"cutoff", "cutoff_width", "spectrum_exponent", "attention_scale"}
NAMED_SETTINGS |= {"attention_path", "alpha", "beta", "dype_start_sigma", "base_resolution"}
DYNAMIC_SETTINGS = {"attention_path", "dype_start_sigma"}  # no effect on a static method
# method -> the first method with the same static frequencies and m
STATIC_FORMS = {method: method for method in METHODS} | {"ntk_mult": "ntk"}
STATIC_FORMS |= dict.fromkeys(("yarn_ntk_only", "yarn_both", "yarn_power", "vision_yarn"), "yarn")
CONTROLS = ("reversed", "model", "progressive")
CONTROL_SETTINGS = ["dy_yarn_paper:reversed", "dy_pi:1:1:reversed"]
UNCAPPED_SETTINGS = ["base:model", "yarn_paper:model", "dy_yarn_paper:model"]
# best joint scores on prompts of seed 1
FINALISTS = ("dy_yarn_paper", "dy_pi:1:1", "dy_yarn")
RISING_ATTENTION = ":attention_scale=1.2:attention_path=rising"  # selected on the same prompts
CUTOFF_COMPARISON = ["dy_cutoff", f"dy_cutoff{RISING_ATTENTION}", "yarn_paper", "dy_yarn_paper"]
CUTOFF_COMPARISON += [f"dy_yarn_paper{RISING_ATTENTION}"]
SCALING_SETTINGS = ["base", "yarn_paper", "dy_yarn_paper"]  # from 1x to 6x, in fig5 and fig18
UNCAPPED_CUTOFF = [f"{name}:model" for name in CUTOFF_COMPARISON[:2]]
GRAMMAR = "base or [dy_]METHOD[:LAMBDA_S[:LAMBDA_T]][:NAME=VALUE...][:CONTROL]"


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
        if uses_lambdas(config):
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


def uses_lambdas(config: DyPEConfig) -> bool:
    """Return whether lambda_s and lambda_t have an effect."""
    return config.dype and DEFAULT_LAMBDA_S[config.method] is not None


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
    if "static" in words:
        static = ":".join([method, *(word for word in words if word != "static")])
        raise ValueError(f"setting {text!r} is an old spelling, expected {static!r}")
    control = words.pop() if words and words[-1] in CONTROLS else ""
    lambda_words = list(takewhile(lambda word: "=" not in word, words))
    is_wrong = method == "base" and bool(dype or words or control == "reversed")
    try:
        lambdas = [float(word) for word in lambda_words]
        assignments = dict(word.split("=", 1) for word in words[len(lambda_words) :])
        for name, value in assignments.items():
            if name != "attention_path":
                assignments[name] = int(value) if value.isdecimal() else float(value)
    except ValueError:
        is_wrong, lambdas, assignments = True, [], {}
    settings = {"method": method, "base_resolution": BASE, "dype": dype}
    settings |= {"shift": "model"} if control == "model" else {}
    settings |= dict(zip(("dype_scale", "dype_exponent"), lambdas, strict=False))
    config = DyPEConfig.from_dict(settings | assignments)
    is_wrong |= len(lambdas) > 2 * (DEFAULT_LAMBDA_S[method] is not None)
    is_wrong |= not assignments.keys() <= NAMED_SETTINGS
    if is_wrong:
        raise ValueError(
            f"setting {text!r}, expected {GRAMMAR}, NAME of {', '.join(sorted(NAMED_SETTINGS))}, "
            f"CONTROL of {', '.join(CONTROLS)}; dy_ is with DyPE"
        )
    if not dype and (lambdas or control == "reversed" or assignments.keys() & DYNAMIC_SETTINGS):
        dynamic = f"dy_{text}"
        raise ValueError(f"setting {text!r} is static and ignores a part, expected {dynamic!r}")
    for row in CONFIG_FLAGS:
        if row.name in assignments and not row.has_effect(config.to_dict()):
            raise ValueError(f"setting {text!r}, expected no {row.name}: it has no effect there")
    defaults = DyPEConfig(method)
    overrides = tuple(
        f"{name}={value}" if isinstance(value, str) else f"{name}={value:.12g}"
        for name, value in assignments.items()
        if value != getattr(defaults, name)
    )
    words = [config.name]
    if uses_lambdas(config):
        is_default = config.dype_exponent == defaults.dype_exponent
        count = int(config.lambda_s != defaults.lambda_s) if is_default else 2
        lambdas = [config.lambda_s, config.dype_exponent][:count]
        words += [f"{value:.12g}" for value in lambdas]
    words += [*overrides, control] if control else overrides
    return Setting(":".join(words), config, control, overrides)


def plan_cells(name: str) -> list[Cell]:
    """Return the cells of a table: "quick", "default", "full" or "cutoff"."""
    methods = [method for method in METHODS if method != "base"]
    static_methods = dict.fromkeys(STATIC_FORMS[method] for method in methods)
    all_settings = ["base", *static_methods, *(f"dy_{method}" for method in methods), "dy_pi:1:1"]
    static_finalists = [text.split(":")[0].removeprefix("dy_") for text in FINALISTS]
    finalists = ["base", *static_finalists, *FINALISTS]
    lines = {
        "quick": [(256, ["base"], 8), (512, finalists, 8)],
        "default": [(256, ["base"], 64), (512, all_settings, 64), (1024, finalists, 16)],
        "full": [(256, ["base"], 64)]
        + [(512, [*all_settings, *CONTROL_SETTINGS, *UNCAPPED_SETTINGS], 64)]
        + [(1024, all_settings, 64)]
        + [(size, SCALING_SETTINGS, 16) for size in (768, 1280, 1536)],
        "cutoff": [
            (512, [*all_settings, *CUTOFF_COMPARISON], 64),
            (512, [*UNCAPPED_SETTINGS, *UNCAPPED_CUTOFF], 16),
            (1024, [*finalists, *CUTOFF_COMPARISON], 16),
            ((256, 512), CUTOFF_COMPARISON, 32),
            ((512, 1024), CUTOFF_COMPARISON, 8),
        ],
    }[name]
    cells = []
    for size, texts, count in lines:
        size = (size, size) if isinstance(size, int) else size
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

    Each setting is compared with `base`, a method with DyPE also with its static form, and a
    control also with the setting that it changes.
    """
    pairs = []
    for name, cell in cells.items():
        config, control = cell.setting.config, cell.setting.control
        static = ":".join([STATIC_FORMS[config.method], *cell.setting.overrides])
        static += ":model" * (control == "model")
        baselines = [name.removesuffix(f":{control}"), static if config.dype else "base", "base"]
        baselines = [text for text in dict.fromkeys(baselines) if text in cells.keys() - {name}]
        pairs += [(name, baseline) for baseline in baselines]
    return pairs
