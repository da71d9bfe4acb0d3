"""Settings of DyPE: one frozen dataclass, the only home of their defaults and ranges."""

import math
import re
from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from types import NoneType
from typing import Any, get_args

# method -> lambda_s if `dype_scale` is None: the paper's (section 4, App. D); of `yarn_power` and
# `vision_yarn` that of their code. None: the method does not use kappa; `tasr`, `cutoff` use u
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
    "tide": 2.0,
    "sega": 1.0,
    "imax": 1.0,
    "rdfc": 1.0,
    "riflex": 1.0,
    "resonance": 1.0,
    "cutoff": None,
}
# what a flag with on|off accepts: TOML's words too
BOOLEANS = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False}
LAMBDA_S_HELP = ", ".join(f"{name} {scale:g}" for name, scale in DEFAULT_LAMBDA_S.items() if scale)
WITHOUT_LAMBDA_S = ", ".join(name for name, scale in DEFAULT_LAMBDA_S.items() if not scale)
DYNAMIC_NAMES = {f"dy_{name}": name for name in DEFAULT_LAMBDA_S if name != "base"}
STATIC_METHODS = ("sega",)  # without DyPE unless it is asked for, as their authors have them
SHIFTS = ("cap", "model", "log", "sqrt", "sd3")
SCALE_PATHS = ("constant", "falling", "rising")  # of a in m = 1 + a ln s, from t = 1 to 0
ATTENTION_PATHS = (*SCALE_PATHS, "proportional", "tide", "sega")  # the others have their own m
OTHER_RANGES = (  # of fields without a flag: name, low, high, whether low itself is out of range
    ("beta", 0, math.inf, True),
    ("cutoff_width", 0, 1000, True),
    ("spectrum_exponent", 0, 1000, True),
    ("ntk_factor", 1, 1000, False),
    ("rdfc_turns", 0, 1, True),
    ("sega_beta", 0, 1000, True),
    ("sega_floor", 0, 2, False),
    ("sega_reference", 0, 1, False),
)
PRESETS = ("off", "auto", "4k")


def has_kappa(settings: dict) -> bool:
    """Return whether lambda_s and lambda_t have an effect, from settings by name."""
    return settings["dype"] and DEFAULT_LAMBDA_S[settings["method"]] is not None


def attention_path_has_effect(settings: dict) -> bool:
    """Return whether `attention_path` has an effect, from settings by name."""
    path = settings["attention_path"]
    if path in SCALE_PATHS:
        return bool(settings["attention_scale"] and settings["dype"])
    return settings["method"] not in ("base", path)


def follows_latent(settings: dict) -> bool:
    """Return whether m is SEGA's, from settings by name."""
    method, path = settings["method"], settings["attention_path"]
    has_own_m = path in SCALE_PATHS and settings["attention_scale"] is None
    return method != "base" and (path == "sega" or (method == "sega" and has_own_m))


@dataclass(frozen=True)
class Flag:
    """A setting and its command-line flag: type, range, help and effect."""

    help: str
    default_help: str = ""  # the default in words; "": its value
    metavar: str = ""  # "": follows from the type
    low: float | None = None  # range and divisor of a number
    high: float = math.inf
    multiple: int | None = None
    exclusive: bool = False  # `low` itself is out of range
    choices: Collection[str] = ()
    spellings: tuple[tuple[str, str], ...] = ()  # further names of choices: (name, choice)
    words: tuple[str, ...] = ()  # accepted beside numbers
    label: str | None = None  # of a value on contact sheets, "scale {}"; None: accepts no list
    changes_image: bool = True  # False: decides only where or how fast the image is generated
    has_effect: Callable[[dict], bool] = lambda settings: True  # on an image with these settings
    needs: str = ""  # what the effect needs, in words
    group: str = ""  # heading in --help, for this flag and the next ones without a heading
    aliases: tuple[str, ...] = ()
    switches: tuple[tuple[str, Any, str], ...] = ()  # further flags: (name, value, help)
    parser_options: dict[str, Any] | None = None  # for the parser's `add_argument`
    # `flags_of` fills in the rest from the field
    name: str = ""
    option: str = ""  # name on the command line, without the dashes
    type: type = str
    optional: bool = False  # accepts None
    default: Any = ...  # ...: none, or the model's

    def parse(self, text: str):
        """Convert text to a checked value. Raise ValueError that names the flag."""
        value = text
        if not text and self.type is str and "prompt" not in self.name.split("_"):
            raise ValueError(f"--{self.option} is '', expected a value")
        if self.type is bool:
            value = BOOLEANS.get(text.lower())
            if value is None:
                check_choice(f"--{self.option}", text, ("on", "off"))
        elif self.type in (int, float) and text not in self.words:
            try:
                value = self.type(text)
            except ValueError:
                kind = "a whole number" if self.type is int else "a number"
                kind = " or ".join([kind, *self.words])
                raise ValueError(f"--{self.option} is {text!r}, expected {kind}") from None
        elif self.choices:
            value = find_choice(text, self.choices, self.spellings)
        self.check(value, "--")
        return value

    def check(self, value, prefix: str = "") -> None:
        """Raise ValueError unless `value` has the flag's type and is in its range."""
        name = prefix + self.option
        if (value is None and self.optional) or value in self.words:
            return
        if self.choices:
            check_choice(name, value, self.choices)
        elif self.type in (int, float):
            limits = {"exclusive": self.exclusive, "integer": self.type is int, "words": self.words}
            check_number(name, value, self.low, self.high, multiple=self.multiple, **limits)
        elif not isinstance(value, self.type):
            kind = "True or False" if self.type is bool else "text"
            raise ValueError(f"{name} is {value!r}, expected {kind}")
        elif self.type is str:
            check_text(name, value)


def flag(help: str, default=..., **row):
    """Return a dataclass field that carries its `Flag`."""
    defaults = {} if default is ... else {"default": default}
    return field(metadata={"flag": Flag(help, **row)}, **defaults)


def flags_of(settings: type) -> list[Flag]:
    """Return the flags of a dataclass; those of a nested DyPEConfig stand in its place."""
    flags, group = [], ""
    for part in fields(settings):
        if part.type is DyPEConfig:
            flags += flags_of(DyPEConfig)
        elif "flag" in part.metadata:
            row = part.metadata["flag"]
            group = row.group or group
            types = get_args(part.type) or (part.type,)
            row = replace(row, name=part.name, option=part.name.rstrip("_"), group=group)
            default = ... if part.default is MISSING else part.default
            flags.append(replace(row, type=types[0], optional=NoneType in types, default=default))
    return flags


@dataclass(frozen=True)
class DyPEConfig:
    """Settings of one position encoding and of the noise schedule.

    Attributes:
        method: "yarn" by default. A key of `rope.METHODS`; "dy_yarn" is yarn with `dype=True`.
        dype: None, True but for "sega". The encoding follows sigma; False is the static method. No
            effect on "base".
        dype_scale: None, the method's own (1 or 2). lambda_s of kappa = lambda_s u^lambda_t, in
            [0, 8]. A larger value stretches more at high sigma; the paper's Table 6 tries 1 to 2.5.
        dype_exponent: 2.0. lambda_t, in [0, 1000]. A larger value returns to the model's own
            encoding earlier: less time for the layout, more for detail. Try 1 below 3x.
        dype_start_sigma: 1.0. t_start, in (0, 1]. For t > t_start u is 1, below it u is
            t / t_start. 1 follows t from the first step.
        alpha, beta: 1.0 and 32.0. Ends of the ramp of `yarn_paper` and `tide`, in turns over the
            trained length; 0 < alpha < beta. Other methods ignore them.
        cutoff: 1.0. c of the method `cutoff`, in (0, 1000]: the wavelength of its cut at t = 1/2,
            in units of the trained length.
        cutoff_width, spectrum_exponent: 0.5 and 2.0. delta and omega of the method `cutoff`, in
            (0, 1000]. Keep them unless you study the method.
        ntk_factor: 10.0. k of the method `imax`, in [1, 1000]; HRDiT has 4 at 2x and 10 at 4x.
        rdfc_pairs: None, the pair whose wavelength is nearest to the trained length. Pairs that
            `rdfc` and `riflex` slow down, from 0, as 8 or "8,9".
        rdfc_turns: 1.0. Turns of these pairs over the image, in (0, 1]; `riflex` has 0.9.
        sega_alpha, sega_beta, sega_floor, sega_reference: 0.15, 1.5, 1.0 and 0.08. Strength, slope
            and least value of SEGA's m, and the exponent of s in its reference; in [0, 2],
            (0, 1000], [0, 2] and [0, 1].
        attention_scale: None, the method's own m. a of m = 1 + a ln s, in [0, 2], for any method
            but "base"; 0.1 is YaRN's.
        attention_path: "constant". How a follows sigma: "falling" is a u, "rising" a (1 - u). Needs
            `attention_scale`; no effect on a static method. Or another m for any method but "base",
            without `attention_scale`: "proportional" (one number, from the count of tokens),
            "tide" (by pair and sigma) or "sega" (by pair and axis, from the latent).
        text_repeat: 1. Number of copies of the text that attention sees, in [1, 256]; "auto": image
            area / trained area. Up to the trained size one. Not for Z-Image and Bria.
        base_resolution: None, that of the model's family (the demo's folder: 512). Side in px that
            the model was trained at, a multiple of 16.
        anisotropic: True. Each axis is stretched by its own scale; False: every axis by the
            largest. Try False where shapes look stretched in wide or tall images.
        shift: None, the model's default. "cap" keeps mu = max_shift at every size, as the authors
            do; "model" leaves the scheduler's own rule; "log", "sqrt" and "sd3" grow slower.
        base_shift, max_shift: None, the scheduler's. The two numbers of that rule, in [-10, 20].
        lambda_s: Derived: `dype_scale`, or the method's own.
        name: Derived: "dy_yarn" with DyPE, "yarn" static; of "base" always "base".
        follows_latent: Derived: whether m is SEGA's.

    Raises:
        ValueError: A value is out of range; nothing is clamped.
    """

    # fmt: off
    method: str = flag(
        "position encoding; one of the methods below", "yarn", choices=DEFAULT_LAMBDA_S,
        label="{}", group="position encoding", aliases=("--dype_method",),
    )
    dype: bool | None = flag(
        "DyPE, a stretch that falls with sigma; off: static, the same stretch at every step", None,
        label="", default_help=f"on, but off for {', '.join(STATIC_METHODS)}",
        switches=(("--no_dype", False, "same as --dype off"),),
    )
    dype_scale: float | None = flag(
        "lambda_s of kappa = lambda_s u^lambda_t (Eq. 13), where u is sigma, or as in "
        "--dype_start_sigma; 0 to 8", None, low=0, high=8, label="scale {}",
        has_effect=has_kappa,
        needs=f"DyPE, nor with the methods {WITHOUT_LAMBDA_S}",
        default_help=f"per method ({LAMBDA_S_HELP})",
    )
    dype_exponent: float = flag(
        "lambda_t of kappa; 0 to 1000; larger: sharper detail, smaller: safer layout", 2.0,
        low=0, high=1000, label="exponent {}",
        has_effect=has_kappa,
        needs=f"DyPE, nor with the methods {WITHOUT_LAMBDA_S}",
    )
    dype_start_sigma: float = flag(
        "sigma at which the stretch begins to fall: u = min(1, sigma / T); 0 < T <= 1", 1.0,
        metavar="T", low=0, high=1, exclusive=True, label="start {}",
        has_effect=lambda settings: settings["dype"],
        needs="DyPE",
    )
    alpha: float = flag(
        "turns over the trained length up to which methods yarn_paper (Eq. 8) and tide stretch a "
        "pair in full, with DyPE in the first step; 0 < X < 32", 1.0,
        low=0, exclusive=True, label="alpha {}",
        has_effect=lambda settings: settings["method"] in ("yarn_paper", "tide"),
        needs="--method yarn_paper or tide",
        default_help="1 (yarn_paper on the demo: 8)",
    )
    beta: float = 32.0  # yarn_paper, tide: turns from which a pair is not stretched
    cutoff: float = flag(
        "cutoff wavelength of method cutoff at sigma 1/2, in units of the trained length; "
        "0 < X <= 1000", 1.0, low=0, high=1000, exclusive=True, label="cutoff {}",
        has_effect=lambda settings: settings["method"] == "cutoff",
        needs="--method cutoff",
    )
    cutoff_width: float = 0.5  # delta, of ln wavelength
    spectrum_exponent: float = 2.0  # omega of C / f^omega
    ntk_factor: float = 10.0  # imax alone: k
    rdfc_pairs: str | None = flag(
        "pairs of an axis that methods rdfc and riflex slow down, from 0, as 8 or 8,9; no sweep",
        None, metavar="I,I",
        has_effect=lambda settings: settings["method"] in ("rdfc", "riflex"),
        needs="--method rdfc or riflex",
        default_help="the one whose wavelength is nearest to the trained length",
    )
    rdfc_turns: float = 1.0  # of these pairs over the image; rdfc alone
    sega_alpha: float = flag(
        "strength of SEGA's attention scale, of --method sega and --attention_path sega; 0 to 2; "
        "0: one m for all pairs", 0.15, low=0, high=2, label="sega alpha {}",
        has_effect=follows_latent,
        needs="SEGA's m, by --method sega or --attention_path sega",
    )
    sega_beta: float = 1.5  # slope of its tanh
    sega_floor: float = 1.0  # least m
    sega_reference: float = 0.08  # exponent of s in the m that the spectrum turns around
    attention_scale: float | None = flag(
        "factor on attention, as m = 1 + X ln s on cos and sin, where s is size / base "
        "resolution; 0 to 2, not for base", None, low=0, high=2,
        label="attention scale {}",
        has_effect=lambda settings: settings["method"] != "base",
        needs="another --method than base",
        default_help="the method's own m",
    )
    attention_path: str = flag(
        "change of --attention_scale X as sigma falls; constant: X (without X the method's own m), "
        "falling: X u, rising: X (1 - u); or another m, without X; proportional: from the number "
        "of tokens, tide: by pair and sigma, sega: by pair, from the spectrum of the latent",
        "constant", metavar="RULE", choices=ATTENTION_PATHS,
        label="attention {}",
        has_effect=attention_path_has_effect,
        needs="another --method, or DyPE for falling and rising",
    )
    text_repeat: int | str = flag(
        "number of copies of the text that attention sees; 1 to 256, or auto: image area / trained "
        "area; no effect up to the trained size, not for Z-Image", 1,
        low=1, high=256, words=("auto",), metavar="K|auto", label="text copies {}",
    )
    base_resolution: int | None = flag(
        "side of the model's training images; 16 to 16384, multiple of 16", None, metavar="PX",
        low=16, high=16384, multiple=16,
    )
    anisotropic: bool = flag(
        "separate scales for height and width; off: the larger one for both", True,
        switches=(("--isotropic", False, "same as --anisotropic off"),),
    )
    shift: str | None = flag(
        "rule for mu; cap: max_shift at every size, as the authors do; model: the scheduler's own, "
        "linear in the number of tokens; log, sqrt: linear in its logarithm or square root; sd3: "
        "max_shift + half of ln(tokens / 4096)", None, metavar="RULE", choices=SHIFTS,
        label="shift {}", group="noise schedule",
    )
    base_shift: float | None = flag(
        "base_shift of the scheduler, with --shift model, log or sqrt; -10 to 20",
        None, low=-10, high=20,
        default_help="the scheduler's",
    )
    max_shift: float | None = flag(
        "max_shift of the scheduler; -10 to 20", None, low=-10, high=20,
        default_help="the scheduler's",
    )
    # fmt: on

    def __post_init__(self):
        if self.method in DYNAMIC_NAMES:
            if self.dype not in (None, True):
                raise ValueError(f"dype is {self.dype!r}, expected True with {self.method!r}")
            object.__setattr__(self, "method", DYNAMIC_NAMES[self.method])
            object.__setattr__(self, "dype", True)
        if type(self.rdfc_pairs) is int:
            object.__setattr__(self, "rdfc_pairs", str(self.rdfc_pairs))
        if self.dype is None:
            object.__setattr__(self, "dype", self.method not in STATIC_METHODS)
        for row in CONFIG_FLAGS:
            row.check(getattr(self, row.name))
        for name, low, high, exclusive in OTHER_RANGES:
            check_number(name, getattr(self, name), low, high, exclusive=exclusive)
        if self.alpha >= self.beta:
            numbers = format_number(self.alpha), format_number(self.beta)
            raise ValueError("alpha is {}, expected a number below beta, {}".format(*numbers))
        if not re.fullmatch(
            r"[0-9]{1,3}(,[0-9]{1,3})*", "0" if self.rdfc_pairs is None else self.rdfc_pairs
        ):
            raise ValueError(f"rdfc_pairs is {self.rdfc_pairs!r}, expected numbers as 8 or 8,9")
        has_scale, path = self.attention_scale is not None, self.attention_path
        if path != "constant" and has_scale != (path in SCALE_PATHS):
            expected = "no attention_scale" if has_scale else "an attention_scale"
            raise ValueError(f"attention_path is {path!r}, expected {expected} with it")
        default = DEFAULT_LAMBDA_S[self.method] or 0.0
        lambda_s = default if self.dype_scale is None else self.dype_scale
        dynamic = self.dype and self.method != "base"
        # not fields, so that `to_dict` holds settings alone
        object.__setattr__(self, "lambda_s", lambda_s)
        object.__setattr__(self, "name", f"dy_{self.method}" if dynamic else self.method)
        object.__setattr__(self, "follows_latent", follows_latent(vars(self)))

    def to_dict(self) -> dict:
        """Return all fields by name; `from_dict` takes them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict) -> "DyPEConfig":
        """Return a config of these fields. Raise ValueError for an unknown name."""
        names = [part.name for part in fields(cls)]
        for name in settings:
            if name not in names:
                raise ValueError(f"unknown setting {name!r}, expected one of {', '.join(names)}")
        return cls(**settings)


CONFIG_FLAGS = flags_of(DyPEConfig)


def find_choice(text: str, choices: Collection[str], spellings: tuple = ()) -> str:
    """Return the choice that a text means, in any case and with any separators; else the text.

    Args:
        text: as the user wrote it.
        choices: the names that exist.
        spellings: pairs of a further name and its choice.
    """
    by_letters = {re.sub(r"[-_. ]", "", name).lower(): name for name in choices}
    letters = re.sub(r"[-_. ]", "", dict(spellings).get(text.lower(), text)).lower()
    return text if text in choices else by_letters.get(letters, text)


def name_flags(sentence: str) -> str:
    """Return an error of `DyPEConfig` with the names of flags instead of those of fields."""
    names = "|".join(row.name for row in CONFIG_FLAGS)
    sentence = re.sub(rf"^({names})(?= is )", r"--\1", sentence)
    return re.sub(rf"(?<![-\w])({names})(?!\w)", lambda x: "--" * ("_" in x[1]) + x[1], sentence)


@contextmanager
def flags_in_errors():
    """Turn the names of fields into those of flags in a ValueError within the `with` block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(name_flags(str(error))) from error


def check_choice(name: str, value, choices: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def check_text(name: str, value: str) -> None:
    """Raise ValueError unless files can hold a text: not with undecodable bytes, nor with NUL."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {value!r}, expected UTF-8 text") from None
    if "\0" in value:
        raise ValueError(f"{name} is {value!r}, expected text without a null character")


def check_number(
    name: str,
    value,
    low: float,
    high: float,
    *,
    optional: bool = False,
    exclusive: bool = False,
    integer: bool = False,
    multiple: int | None = None,
    words: Collection[str] = (),
) -> None:
    """Raise ValueError unless `value` is a number in [low, high].

    Args:
        name: begins the sentence.
        value: anything.
        low: least value.
        high: largest value; infinity itself is refused.
        optional: accept None.
        exclusive: refuse `low` itself.
        integer: accept whole numbers alone.
        multiple: accept multiples of this number alone.
        words: what the caller accepts beside numbers, for the sentence.
    """
    if value is None and optional:
        return
    limits = f"{'above' if exclusive else 'at least'} {format_number(low)}"
    limits += f" and at most {format_number(high)}" if math.isfinite(high) else ""
    limits = ", or ".join([limits, *words])
    kind = f"multiple of {multiple}," if multiple else "whole number" if integer else "number"
    valid = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
    valid = valid and low <= value <= high and not (exclusive and value == low)  # refuses NaN too
    if not valid or value == math.inf or (multiple and value % multiple):
        text = repr(value) if len(repr(value)) < 40 else repr(value)[:40] + "..."
        raise ValueError(f"{name} is {text}, expected a {kind} {limits}")


def format_number(value: float) -> str:
    """Return a number with all digits if it is whole, else with six."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def preset_settings(name: str, height: int, width: int, base_resolution: int) -> dict:
    """Return the settings of a preset at one size, by field of `DyPEConfig`.

    "auto" is off up to 1.5x the base resolution, where stretching changes little. Its exponents by
    scale are those that users of ComfyUI-DyPE and llm-dit recommend.

    Args:
        name: one of `PRESETS`.
        height: px.
        width: px.
        base_resolution: px.
    """
    check_choice("preset", name, PRESETS)
    scale = max(height, width) / base_resolution
    if name == "off" or (name == "auto" and scale <= 1.5):
        return {"method": "base", "dype": False}
    settings = {"method": "vision_yarn", "dype": True, "dype_scale": 2.0}
    if name == "4k":
        return settings | {"dype_exponent": 2.0, "dype_start_sigma": 1.0}
    return settings | {"dype_exponent": 1.0 if scale < 3 else 2.0}
