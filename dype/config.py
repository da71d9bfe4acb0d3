"""The settings of DyPE: one frozen dataclass, the only home of their defaults."""

import math
from collections.abc import Callable, Collection
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from types import NoneType
from typing import Any, get_args

# method -> lambda_s when `dype_scale` is None (paper section 4 and App. D; the two power forms as
# their authors' code has them); None where kappa has no use: `tasr` follows t itself.
DEFAULT_LAMBDA_S = {
    "base": None,
    "pi": 2.0,
    "ntk": 2.0,
    "ntk_mult": 2.0,
    "tasr": None,
    "yarn": 1.0,
    "yarn_ntk_only": 2.0,
    "yarn_both": 1.0,
    "yarn_power": 2.0,
    "yarn_paper": 1.0,
    "vision_yarn": 2.0,
    "cutoff": None,
}
LAMBDA_S_HELP = ", ".join(f"{name} {scale:g}" for name, scale in DEFAULT_LAMBDA_S.items() if scale)
SHIFTS = ("cap", "model")
ATTENTION_PATHS = ("constant", "falling", "rising")  # of the attention scale, as the noise falls
PRESETS = ("off", "auto", "4k")


@dataclass(frozen=True)
class Flag:
    """A setting and its flag on the command line: every use of either is a loop over these."""

    help: str  # with its default where no single value says it
    metavar: str = ""  # "": by its type
    low: float | None = None  # of numbers: the least, the most, of what a multiple
    high: float = math.inf
    multiple: int | None = None
    exclusive: bool = False  # the least is out of range itself
    choices: Collection[str] = ()
    label: str | None = None  # a value on contact sheets, "scale {}"; None: takes no list of values
    changes_image: bool = True  # False: says where or how fast alone
    has_effect: Callable[[dict], bool] = lambda settings: True  # in an image of these settings
    group: str = ""  # title in --help, of the flags that follow too
    aliases: tuple[str, ...] = ()
    switches: tuple[tuple[str, Any, str], ...] = ()  # further flags: (name, value, help)
    parser_options: dict[str, Any] | None = None  # of argparse's `add_argument`
    # of the field that it is written at; default ...: there is none, or it is the model's
    name: str = ""
    option: str = ""  # its name on the command line
    type: type = str
    optional: bool = False
    default: Any = ...

    def parse(self, text: str):
        """The value that a text stands for. Raises ValueError, naming the flag."""
        value = text
        if self.type is bool:
            check_choice(f"--{self.option}", text, ("on", "off"))
            value = text == "on"
        elif self.type in (int, float):
            try:
                value = self.type(text)
            except ValueError:
                kind = "a whole number" if self.type is int else "a number"
                raise ValueError(f"--{self.option} is {text!r}, expected {kind}") from None
        self.check(value, "--")
        return value

    def check(self, value, prefix: str = "") -> None:
        """Raise ValueError unless a value is of the flag's type and in its range."""
        name = prefix + self.option
        if value is None and self.optional:
            return
        if self.choices:
            check_choice(name, value, self.choices)
        elif self.type in (int, float):
            integer, limits = self.type is int, (self.low, self.high)
            check_number(
                name,
                value,
                *limits,
                exclusive=self.exclusive,
                integer=integer,
                multiple=self.multiple,
            )
        elif not isinstance(value, self.type):
            kind = "True or False" if self.type is bool else "text"
            raise ValueError(f"{name} is {value!r}, expected {kind}")
        elif self.type is str:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name} is {value!r}, expected UTF-8 text") from None


def flag(help: str, default=..., **row):
    """A field of a dataclass of settings, with all that is said of it in a `Flag`."""
    known = {} if default is ... else {"default": default}
    return field(metadata={"flag": Flag(help, **row)}, **known)


def flags_of(settings: type) -> list[Flag]:
    """The flags of a dataclass, those of a dataclass within it in its place."""
    flags, group = [], ""
    for part in fields(settings):
        kinds = get_args(part.type) or (part.type,)
        if part.type is DyPEConfig:
            flags += flags_of(DyPEConfig)
        elif "flag" in part.metadata:
            row = part.metadata["flag"]
            group = row.group or group
            default = ... if part.default is MISSING else part.default
            known = {"name": part.name, "option": part.name.rstrip("_"), "type": kinds[0]}
            known |= {"optional": NoneType in kinds, "default": default, "group": group}
            flags.append(replace(row, **known))
    return flags


@dataclass(frozen=True)
class DyPEConfig:
    """Settings of one encoding. Raises ValueError on a value out of range; nothing is clamped.

    lambda_s: `dype_scale`, or the method's own. name: `yarn`, or `dy_yarn` where it follows the
    noise level; never `dy_base`.
    """

    # fmt: off
    method: str = flag(
        ", ".join(DEFAULT_LAMBDA_S), "yarn", choices=DEFAULT_LAMBDA_S, label="{}",
        group="position encoding", aliases=("--dype_method",),
    )
    dype: bool = flag(
        "follow the noise level", True, label="",
        switches=(("--no_dype", False, "the static method, as --dype off"),),
    )
    dype_scale: float | None = flag(
        f"lambda_s, 0 to 8 (default: the method's, {LAMBDA_S_HELP})", None, low=0, high=8,
        label="scale {}",
        has_effect=lambda settings: settings["dype"] and DEFAULT_LAMBDA_S[settings["method"]],
    )
    dype_exponent: float = flag(
        "lambda_t, 0 to 1000", 2.0, low=0, high=1000, label="exponent {}",
        has_effect=lambda settings: settings["dype"] and DEFAULT_LAMBDA_S[settings["method"]],
    )
    dype_start_sigma: float = flag(
        "t_start, above 0 to 1: above it the encoding stays as at t = 1", 1.0, metavar="T",
        low=0, high=1, exclusive=True, label="start {}", has_effect=lambda settings: settings["dype"],
    )
    alpha: float = 1.0  # yarn_paper alone: the ramp's ends, turns over the trained length
    beta: float = 32.0
    cutoff: float = flag(
        "c of the method cutoff: the wavelength of its cut at t = 1/2, times the trained length; "
        "above 0 to 1000", 1.0, low=0, high=1000, exclusive=True, label="cutoff {}",
        has_effect=lambda settings: settings["method"] == "cutoff",
    )
    cutoff_width: float = 0.5  # delta, of ln wavelength
    spectrum_exponent: float = 2.0  # omega of C / f^omega
    attention_scale: float | None = flag(
        "a of m = 1 + a ln s, 0 to 2, for any method (default: the method's own m)", None,
        low=0, high=2, label="attention scale {}",
        has_effect=lambda settings: settings["method"] != "base",
    )
    attention_path: str = flag(
        "with --attention_scale: a stays (constant), falls with the noise (falling: times u) or "
        "rises as it falls (rising: times 1 - u)", "constant", choices=ATTENTION_PATHS,
        has_effect=lambda settings: settings["attention_scale"] and settings["dype"],
    )
    base_resolution: int | None = flag(
        "side that the model was trained at", None, metavar="PX", low=16, high=16384, multiple=16
    )
    anisotropic: bool = flag(
        "stretch each axis by its own scale; off: every axis by the largest", True,
        switches=(("--isotropic", False, "as --anisotropic off"),),
    )
    shift: str | None = flag(
        "cap: mu = max_shift at every size, as the authors; model: the scheduler's own rule", None,
        metavar="cap|model", choices=SHIFTS, group="noise schedule",
    )
    base_shift: float | None = flag(
        "with --shift model (default: the scheduler's)", None, low=-10, high=20
    )
    max_shift: float | None = flag("(default: the scheduler's)", None, low=-10, high=20)
    # fmt: on

    def __post_init__(self):
        for row in CONFIG_FLAGS:
            row.check(getattr(self, row.name))
        check_number("alpha", self.alpha, 0, math.inf, exclusive=True)
        check_number("beta", self.beta, self.alpha, math.inf, exclusive=True)
        for name in ("cutoff_width", "spectrum_exponent"):
            check_number(name, getattr(self, name), 0, 1000, exclusive=True)
        if self.attention_path != "constant" and self.attention_scale is None:
            raise ValueError(
                f"attention_path is {self.attention_path!r}, expected an attention_scale with it"
            )
        default = DEFAULT_LAMBDA_S[self.method] or 0.0
        lambda_s = default if self.dype_scale is None else self.dype_scale
        dynamic = self.dype and self.method != "base"
        # what follows from the fields is none itself
        object.__setattr__(self, "lambda_s", lambda_s)
        object.__setattr__(self, "name", f"dy_{self.method}" if dynamic else self.method)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict) -> "DyPEConfig":
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise ValueError(f"unknown setting {name!r}, expected one of {', '.join(known)}")
        return cls(**settings)


CONFIG_FLAGS = flags_of(DyPEConfig)


def check_choice(name: str, value, accepted) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(accepted)}")


def check_number(
    name, value, low, high, *, optional=False, exclusive=False, integer=False, multiple=None
) -> None:
    """Raise ValueError unless `value` is a number in [low, high], or (low, high] if `exclusive`."""
    if value is None and optional:
        return
    wanted = f"{'above' if exclusive else 'at least'} {low:g}"
    wanted += f" and at most {high:g}" if math.isfinite(high) else ""
    kind = f"multiple of {multiple}," if multiple else "whole number" if integer else "number"
    good = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
    good = good and low <= value <= high and not (exclusive and value == low)  # no NaN passes this
    if not good or value == math.inf or (multiple and value % multiple):
        shown = repr(value) if len(repr(value)) < 40 else repr(value)[:40] + "..."
        raise ValueError(f"{name} is {shown}, expected a {kind} {wanted}")


def preset_settings(name: str, height: int, width: int, base_resolution: int) -> dict:
    """The settings that a preset stands for at one size (px); {} where it changes none.

    `auto` leaves sizes up to 1.5x the base resolution alone, since the encoding is stock there or
    nearly; its exponents by scale are those that users of the ComfyUI and llm-dit ports settled on.
    """
    check_choice("preset", name, PRESETS)
    scale = max(height, width) / base_resolution
    if name == "off" or (name == "auto" and scale <= 1.5):
        return {"method": "base", "dype": False}
    settings = {"method": "vision_yarn", "dype": True, "dype_scale": 2.0}
    if name == "4k":
        return settings | {"dype_exponent": 2.0, "dype_start_sigma": 1.0}
    return settings | {"dype_exponent": 1.0 if scale < 3 else 2.0}
