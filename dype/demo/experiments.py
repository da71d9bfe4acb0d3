"""What the ground-truth tables draw: settings by name, and what is held against what."""

from itertools import product, takewhile
from pathlib import Path
from typing import NamedTuple

from dype.config import CONFIG_FLAGS, DEFAULT_LAMBDA_S, DyPEConfig
from dype.pipelines.catalog import MODELS
from dype.rope import METHODS

BASE = MODELS["demo"].base_resolution
NAMED = {"cutoff", "cutoff_width", "spectrum_exponent", "attention_scale", "attention_path"}
NAMED |= {"alpha", "beta", "dype_start_sigma", "base_resolution"}
DYNAMIC = {"attention_path", "dype_start_sigma"}  # with DyPE alone
# method -> the first one with the same static frequencies and m
STATIC = {method: method for method in METHODS} | {"ntk_mult": "ntk"}
STATIC |= dict.fromkeys(("yarn_ntk_only", "yarn_both", "yarn_power", "vision_yarn"), "yarn")
CONTROLS = ("reversed", "model", "progressive")
CONTROLLED = ["dy_yarn_paper:reversed", "dy_pi:1:1:reversed"]
UNCAPPED = ["base:model", "yarn_paper:model", "dy_yarn_paper:model"]
BEST = ("dy_yarn_paper", "dy_pi:1:1", "dy_yarn")  # by the joint score on prompts of seed 1
SHARP = ":attention_scale=1.2:attention_path=rising"  # chosen likewise
RIVALS = ["dy_cutoff", f"dy_cutoff{SHARP}", "yarn_paper", "dy_yarn_paper", f"dy_yarn_paper{SHARP}"]
SCALING = ["base", "yarn_paper", "dy_yarn_paper"]  # of fig5, with 1x, 2x and 4x; of fig18
OURS = [f"{one}:model" for one in RIVALS[:2]]  # uncapped
GRAMMAR = "base or [dy_]METHOD[:LAMBDA_S[:LAMBDA_T]][:NAME=VALUE...][:CONTROL]"


class Setting(NamedTuple):
    """What is judged: an encoding, and what a control changes about it."""

    name: str  # `setting` reads it again
    config: DyPEConfig
    control: str = ""
    more: tuple[str, ...] = ()  # NAME=VALUE of what is not by default

    @property
    def folder(self) -> str:
        """Return METHOD_static or METHOD_SCALE_EXPONENT: the older name, so that images stay."""
        method, config = self.config.method, self.config
        parts = [method] if method == "base" or config.dype else [method, "static"]
        if uses_lambdas(config):
            parts += [f"{config.lambda_s:g}", f"{config.dype_exponent:g}"]
        parts += [*self.more, self.control] if self.control else self.more
        return "_".join(parts)


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
    place = folder / str(shown_size(cell.size)) / cell.setting.folder
    return [place / f"{i:03}.png" for i in range(cell.count)]


def uses_lambdas(config: DyPEConfig) -> bool:
    """Say whether lambda_s and lambda_t have an effect."""
    return config.dype and DEFAULT_LAMBDA_S[config.method] is not None


def setting(text: str) -> Setting:
    """Parse GRAMMAR: `dy_yarn` is with DyPE, `yarn` static. Raises ValueError.

    NAME is of NAMED, CONTROL of CONTROLS. The setting's own name is its shortest text.
    """
    name, *words = text.split(":")
    method = name.removeprefix("dy_")
    dype = name != method
    if "static" in words:
        static = ":".join([method, *(word for word in words if word != "static")])
        raise ValueError(f"setting {text!r} is an old spelling, expected {static!r}")
    control = words.pop() if words and words[-1] in CONTROLS else ""
    plain = list(takewhile(lambda word: "=" not in word, words))
    wrong = method == "base" and bool(dype or words or control == "reversed")
    try:
        numbers = [float(word) for word in plain]
        named = dict(word.split("=", 1) for word in words[len(plain) :])
        for name, value in named.items():
            if name != "attention_path":
                named[name] = int(value) if value.isdecimal() else float(value)
    except ValueError:
        wrong, numbers, named = True, [], {}
    config = {"method": method, "base_resolution": BASE, "dype": dype}
    config |= {"shift": "model"} if control == "model" else {}
    config |= dict(zip(("dype_scale", "dype_exponent"), numbers, strict=False))
    made = DyPEConfig.from_dict(config | named)
    wrong |= len(numbers) > 2 * (DEFAULT_LAMBDA_S[method] is not None) or not named.keys() <= NAMED
    if wrong:
        raise ValueError(
            f"setting {text!r}, expected {GRAMMAR}, NAME of {', '.join(sorted(NAMED))}, CONTROL of "
            f"{', '.join(CONTROLS)}; dy_ is with DyPE"
        )
    if not dype and (numbers or control == "reversed" or named.keys() & DYNAMIC):
        dynamic = f"dy_{text}"
        raise ValueError(f"setting {text!r} is static and ignores a part, expected {dynamic!r}")
    for row in CONFIG_FLAGS:
        if row.name in named and not row.has_effect(made.to_dict()):
            raise ValueError(f"setting {text!r}, expected no {row.name}: it has no effect there")
    usual = DyPEConfig(method)
    more = tuple(
        f"{name}={value}" if isinstance(value, str) else f"{name}={value:.12g}"
        for name, value in named.items()
        if value != getattr(usual, name)
    )
    parts = [made.name]
    if uses_lambdas(made):
        values = [made.lambda_s, made.dype_exponent]
        shown = 2 if values[1] != usual.dype_exponent else int(values[0] != usual.lambda_s)
        parts += [f"{value:.12g}" for value in values[:shown]]
    parts += [*more, control] if control else more
    return Setting(":".join(parts), made, control, more)


def plan(name: str) -> list[Cell]:
    """The cells of the quick, the default and the full table, and of that of the cutoffs."""
    methods = [name for name in METHODS if name != "base"]
    statics = dict.fromkeys(STATIC[method] for method in methods)
    everything = ["base", *statics, *(f"dy_{method}" for method in methods), "dy_pi:1:1"]
    finalists = ["base", *(one.split(":")[0].removeprefix("dy_") for one in BEST), *BEST]
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
        static = ":".join([STATIC[config.method], *cell.setting.more])
        static += ":model" * (control == "model")
        others = [name.removesuffix(f":{control}"), static if config.dype else "base", "base"]
        found += [(name, other) for other in dict.fromkeys(others) if other in some.keys() - {name}]
    return found
