"""The settings of DyPE: one frozen dataclass, the only home of their defaults."""

import math
from dataclasses import asdict, dataclass, fields

# method -> lambda_s when `dype_scale` is None (paper section 4 and App. D; the two power forms as
# their authors' code has them); None where kappa has no use: `tasr` follows t itself.
METHOD_SCALES = {
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
SHIFTS = ("cap", "model")
PATHS = ("constant", "falling", "rising")  # of the attention scale, as the noise falls
PRESETS = ("off", "auto", "4k")


@dataclass(frozen=True)
class DyPEConfig:
    """Settings of one encoding. Raises ValueError on a value out of range; nothing is clamped."""

    method: str = "yarn"  # a key of METHOD_SCALES
    dype: bool = True  # False: the static method
    dype_scale: float | None = None  # lambda_s in [0, 8]; None: the method's own
    dype_exponent: float = 2.0  # lambda_t in [0, 1000]
    dype_start_sigma: float = 1.0  # t_start in (0, 1]: above it the encoding stays as at t = 1
    alpha: float = 1.0  # yarn_paper alone: the ramp's ends, turns over the trained length
    beta: float = 32.0
    cutoff: float = 1.0  # c of the method cutoff: a wavelength, times the trained length
    cutoff_width: float = 0.5  # delta, of ln wavelength
    spectrum_exponent: float = 2.0  # omega of C / f^omega
    attention_scale: float | None = None  # a of m = 1 + a ln s in [0, 2]; None: the method's own m
    attention_path: str = "constant"  # a times 1, u ("falling"), 1 - u ("rising"); static: 1
    base_resolution: int | None = None  # px; None: the model's own
    anisotropic: bool = True  # each axis by its own scale; False: every axis by the largest
    shift: str | None = None  # "cap", "model", or None: the model's default
    base_shift: float | None = None  # of the schedule; None: the scheduler's own
    max_shift: float | None = None

    def __post_init__(self):
        one_of("method", self.method, METHOD_SCALES)
        for name in ("dype", "anisotropic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected True or False")
        if self.shift is not None:
            one_of("shift", self.shift, SHIFTS)
        number("dype_scale", self.dype_scale, 0, 8, optional=True)
        number("dype_exponent", self.dype_exponent, 0, 1000)
        number("dype_start_sigma", self.dype_start_sigma, 0, 1, above=True)
        number("alpha", self.alpha, 0, math.inf, above=True)
        number("beta", self.beta, self.alpha, math.inf, above=True)
        for name in ("cutoff", "cutoff_width", "spectrum_exponent"):
            number(name, getattr(self, name), 0, 1000, above=True)
        number("attention_scale", self.attention_scale, 0, 2, optional=True)
        one_of("attention_path", self.attention_path, PATHS)
        if self.attention_path != "constant" and self.attention_scale is None:
            raise ValueError(
                f"attention_path is {self.attention_path!r}, expected an attention_scale with it"
            )
        number("base_resolution", self.base_resolution, 16, 16384, optional=True, multiple=16)
        number("base_shift", self.base_shift, -10, 20, optional=True)
        number("max_shift", self.max_shift, -10, 20, optional=True)

    @property
    def lambda_s(self) -> float:
        """`dype_scale`, or the method's own."""
        own = METHOD_SCALES[self.method] or 0.0
        return own if self.dype_scale is None else self.dype_scale

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict) -> "DyPEConfig":
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise ValueError(f"unknown setting {name!r}, expected one of {', '.join(known)}")
        return cls(**settings)


def one_of(name: str, value, accepted) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(accepted)}")


def number(
    name, value, low, high, *, optional=False, above=False, whole=False, multiple=None
) -> None:
    """Raise ValueError unless `value` is a number in [low, high], or (low, high] if `above`."""
    if value is None and optional:
        return
    wanted = f"{'above' if above else 'at least'} {low:g}"
    wanted += f" and at most {high:g}" if math.isfinite(high) else ""
    kind = f"multiple of {multiple}," if multiple else "whole number" if whole else "number"
    good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    good = good and low <= value <= high and not (above and value == low)  # no NaN passes this
    if not good or value == math.inf or (multiple and value % multiple):
        shown = repr(value) if len(repr(value)) < 40 else repr(value)[:40] + "..."
        raise ValueError(f"{name} is {shown}, expected a {kind} {wanted}")


def preset(name: str, height: int, width: int, base_resolution: int) -> dict:
    """The settings that a preset stands for at one size (px); {} where it changes none.

    `auto` leaves sizes up to 1.5x the base resolution alone, since the encoding is stock there or
    nearly; its exponents by scale are those that users of the ComfyUI and llm-dit ports settled on.
    """
    one_of("preset", name, PRESETS)
    if name == "off":
        return {"method": "base", "dype": False}
    vision_yarn = {"method": "vision_yarn", "dype": True, "dype_scale": 2.0}
    if name == "4k":
        return vision_yarn | {"dype_exponent": 2.0, "dype_start_sigma": 1.0}
    scale = max(height, width) / base_resolution
    if scale <= 1.5:
        return {"method": "base", "dype": False}
    return vision_yarn | {"dype_exponent": 1.0 if scale < 3 else 2.0}
