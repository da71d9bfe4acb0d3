"""Noise schedule: mu and sigmas, the shift that DyPE sets, and the warning if it is missing."""

import copy
import inspect
import math
import warnings
import weakref
from contextvars import ContextVar

from dype.config import DyPEConfig
from dype.families import FLUX, PIXELS_PER_TOKEN, Family

FLUX2_CAP_STEPS = 50  # FLUX.2's rule depends on the steps: the cap takes the documented number
# of the pipelines' rule for mu, where a scheduler's configuration lacks them
SEQUENCE_LENGTHS = ("base_image_seq_len", "max_image_seq_len")  # in tokens
DEFAULT_RULE = {"base_image_seq_len": 256, "max_image_seq_len": 4096}
DEFAULT_RULE |= {"base_shift": 0.5, "max_shift": 1.15}
CURVES = {"sqrt": math.sqrt, "log": math.log}  # of the tokens, in which mu is a straight line
SIGMA_TOLERANCE = 0.01  # because bfloat16 rounds sigma by up to 2e-3, and some schedulers round too
SET_SCHEDULE = ContextVar("dype_set_schedule", default=None)  # a `SetSchedule`, per thread
SCHEDULERS = weakref.WeakValueDictionary()  # id -> scheduler whose `set_timesteps` of ours ran


def noise_schedule(
    scheduler, height: int, width: int, steps: int, family: Family = FLUX
) -> tuple[float | None, list]:
    """Return the mu and the sigmas that a pipeline will use.

    Args:
        scheduler: of the pipeline, with or without the shift that DyPE sets.
        height: px.
        width: px.
        steps: denoiser steps.
        family: of the pipeline.

    Returns:
        mu, or None for a static shift; and steps + 1 sigmas, the last is 0.
    """
    import numpy as np
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config, ours, scheduler = scheduler.config, dype_timesteps(scheduler), copy.deepcopy(scheduler)
    restore_shift(scheduler)  # of the copy, because its set_timesteps would begin an image
    mu = None
    if config.get("use_dynamic_shifting"):
        tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
        if family.own_mu_rule:
            mu = family.own_mu_rule(tokens, steps)
        else:
            rule = [config.get(name, default) for name, default in DEFAULT_RULE.items()]
            mu = calculate_shift(tokens, *rule)
        mu = ours.replace_mu(mu) if ours else mu
    parameters = inspect.signature(scheduler.set_timesteps).parameters
    call = {"mu": mu} if "mu" in parameters else {}
    makes_sigmas = config.get("use_flow_sigmas") and family.scheduler_makes_sigmas
    if "sigmas" in parameters and not makes_sigmas:
        # the pipeline passes these sigmas to its scheduler, which shifts them
        call["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    else:
        call["num_inference_steps"] = steps
    scheduler.set_timesteps(**call)
    return mu, scheduler.sigmas.tolist()


class DyPETimesteps:
    """`set_timesteps` of one scheduler with DyPE's shift, put on the instance by `set_shift`.

    The scheduler's class and configuration stay: `from_config(scheduler.config)` and a saved
    scheduler have no shift of ours. A deep copy of the scheduler has the shift; a shallow copy
    calls the original's `set_timesteps`, until `set_shift` or `restore_shift`.

    Args:
        scheduler: any scheduler with a `config`.
        config: settings of the encoding.
        family: of the pipeline.
    """

    def __init__(self, scheduler, config: DyPEConfig, family: Family):
        self.scheduler, self.config, self.family = scheduler, config, family
        self.stock = scheduler.set_timesteps
        self.replaced = vars(scheduler).get("set_timesteps")  # by another program, or None

    @property
    def __signature__(self) -> inspect.Signature:
        """Return the stock signature, in which pipelines look for `sigmas` and `timesteps`."""
        return inspect.signature(self.stock)

    def __call__(self, *args, **kwargs) -> None:
        """Set the timesteps with our mu, which may be missing if the shift is a cap."""
        call = self.__signature__.bind(*args, **kwargs)
        if self.scheduler.config.get("use_dynamic_shifting"):
            call.arguments["mu"] = self.replace_mu(call.arguments.get("mu"))
        self.stock(*call.args, **call.kwargs)
        SET_SCHEDULE.set(SetSchedule(self.scheduler))
        SCHEDULERS[id(self.scheduler)] = self.scheduler

    def replace_mu(self, mu: float | None) -> float | None:
        """Return our mu for the mu of the pipeline.

        "cap" makes mu = max_shift at every size, as the authors' pipeline does (the paper does not
        mention it). FLUX.2's rule has no max_shift; its cap is the mu of the base resolution.
        "model" keeps the rule, a straight line in the number of tokens N, and replaces its two
        numbers where the config sets them. "sqrt" and "log" (TIDE) are straight in sqrt N and ln N
        through the same two points; "sd3" is max_shift + ln(N / N_max) / 2, so that the shift
        grows with sqrt N (Stable Diffusion 3, arXiv 2403.03206).
        """
        config, family, schedule = self.config, self.family, self.scheduler.config
        base, end = (schedule.get(name, DEFAULT_RULE[name]) for name in ("base_shift", "max_shift"))
        our_end = end if config.max_shift is None else config.max_shift
        if (config.shift or family.shift) == "cap":
            if family.own_mu_rule and config.max_shift is None:
                side = (config.base_resolution or family.base_resolution) // PIXELS_PER_TOKEN
                return family.own_mu_rule(side**2, FLUX2_CAP_STEPS)
            return our_end
        if mu is None:
            return None  # and the scheduler says that it needs it
        our_base = base if config.base_shift is None else config.base_shift
        share = (mu - base) / (end - base)
        start, stop = (schedule.get(name, DEFAULT_RULE[name]) for name in SEQUENCE_LENGTHS)
        tokens = max(1.0, start + share * (stop - start))  # no image has less
        if config.shift == "sd3":
            return our_end + 0.5 * math.log(tokens / stop)
        if config.shift in CURVES:
            curve = CURVES[config.shift]
            share = (curve(tokens) - curve(start)) / (curve(stop) - curve(start))
        return our_base + (our_end - our_base) * share


def dype_timesteps(scheduler) -> DyPETimesteps | None:
    """Return the `set_timesteps` that `set_shift` put on a scheduler, or None."""
    ours = getattr(scheduler, "__dict__", {}).get("set_timesteps")
    return ours if isinstance(ours, DyPETimesteps) else None


def resolve_shift(config: DyPEConfig, family: Family) -> tuple | None:
    """Return shift, base_shift and max_shift; None if all is left to the scheduler."""
    shift = config.shift or family.shift, config.base_shift, config.max_shift
    return None if shift == ("model", None, None) else shift


def check_shift(schedule: dict, config: DyPEConfig, family: Family) -> None:
    """Raise ValueError if the config sets a shift that this schedule ignores.

    Args:
        schedule: configuration of the scheduler.
        config: settings of the encoding.
        family: of the pipeline.
    """
    numbers = [name for name in ("base_shift", "max_shift") if getattr(config, name) is not None]
    if config.shift in (*CURVES, "sd3"):
        numbers.append("shift")
    shift, rule = config.shift or family.shift, DEFAULT_RULE | dict(schedule)
    if not schedule.get("use_dynamic_shifting", False):
        reason = "this model's schedule is static, expected none"
    elif family.own_mu_rule and shift != "cap":
        expected = "model or cap" if numbers == ["shift"] else "none or shift cap"
        reason = f"this model's pipeline has its own rule for mu, expected {expected}"
    elif "base_shift" in numbers and shift in ("cap", "sd3"):
        reason = "mu does not depend on it; expected shift model, log or sqrt with it"
    elif shift != "cap" and rule["base_shift"] == rule["max_shift"]:
        reason = "this scheduler's mu is the same at every size, expected shift cap with max_shift"
    else:
        return
    if numbers:
        raise ValueError(f"{numbers[0]} is {getattr(config, numbers[0])}, but {reason}")


def check_scheduler(scheduler, config: DyPEConfig, family: Family) -> None:
    """Raise ValueError if the shift of the config cannot be set on a scheduler.

    Args:
        scheduler: any scheduler with a `config`.
        config: settings of the encoding.
        family: of the pipeline.
    """
    check_shift(scheduler.config, config, family)
    is_dynamic = scheduler.config.get("use_dynamic_shifting", False)
    takes_mu = "mu" in inspect.signature(scheduler.set_timesteps).parameters
    if is_dynamic and not takes_mu and resolve_shift(config, family):
        raise ValueError(
            f"the shift of a {type(scheduler).__name__} cannot be set, because its set_timesteps "
            "takes no mu; expected FlowMatchEulerDiscreteScheduler or shift model"
        )


def set_shift(scheduler, config: DyPEConfig, family: Family) -> None:
    """Put a `set_timesteps` with our shift on a scheduler, in place of an earlier one.

    A static schedule keeps its sigmas, and `ScheduleCheck` knows that it was asked.

    Args:
        scheduler: any scheduler with a `config`.
        config: settings of the encoding.
        family: of the pipeline.
    """
    restore_shift(scheduler)
    if resolve_shift(config, family):
        scheduler.set_timesteps = DyPETimesteps(scheduler, config, family)


def restore_shift(scheduler) -> None:
    """Undo `set_shift`; do nothing if it was not called."""
    ours = dype_timesteps(scheduler)
    if ours is None:
        return
    del scheduler.set_timesteps
    if ours.replaced is not None:
        scheduler.set_timesteps = ours.replaced
    # because some schedulers store exp(mu) in an attribute of their configuration
    scheduler._internal_dict = type(scheduler.config)(scheduler.config)


class ScheduleWarning(UserWarning):
    """The noise schedule of an image does not have the shift that `DyPEConfig` asks for."""


class SetSchedule:
    """The schedule that was set last in a thread; without a scheduler: none of ours."""

    def __init__(self, scheduler=None):
        self.scheduler = None if scheduler is None else weakref.ref(scheduler)
        self.begun = set()  # checks of the denoisers that began an image before the first step
        self.last_sigmas = {}  # check -> sigma of its last call without a schedule of ours

    def is_used(self, check: "ScheduleCheck", sigma) -> bool:
        """Return whether a denoiser that begins an image at sigma runs through this schedule."""
        if self.scheduler is None:  # a host may set the schedule in another thread
            schedulers = [reference() for reference in SCHEDULERS.valuerefs()]
            return any(is_at_step(each, check.shift, sigma) for each in schedulers)
        scheduler = self.scheduler()
        if getattr(scheduler, "step_index", None) is None:
            if check in self.begun:
                return False
            self.begun.add(check)
        return is_at_step(scheduler, check.shift, sigma)


def is_at_step(scheduler, shift: tuple, sigma) -> bool:
    """Return whether a scheduler has a shift of ours, and begins an image or is at sigma."""
    ours = dype_timesteps(scheduler)  # None if it was restored since
    if ours is None or resolve_shift(ours.config, ours.family) != shift:
        return False
    step = getattr(scheduler, "step_index", None)
    if step is None:
        return True
    if step >= len(scheduler.timesteps):
        return False  # its image is complete
    expected = scheduler.timesteps[step] / scheduler.config.num_train_timesteps
    return abs(float(expected) - float(sigma)) < SIGMA_TOLERANCE


class ScheduleCheck:
    """A function that an embedder calls at the first denoiser call of a stretched image.

    It gives a `ScheduleWarning`, once per image, if the settings ask for a shift and the schedule
    that was set last in this thread does not have it: `apply_dype` had the transformer without its
    pipeline, or the pipeline has another scheduler now. In a thread that set no schedule of ours,
    that of any thread will do. `DyPEConfig(shift="model")` asks for none;
    `warnings.simplefilter("ignore", ScheduleWarning)` silences it.

    Args:
        config: settings of the encoding.
        family: of the denoiser.
    """

    def __init__(self, config: DyPEConfig, family: Family):
        self.shift = resolve_shift(config, family)

    def __call__(self, sigma, has_references: bool = False) -> None:
        """Warn if this image's schedule is not ours.

        Args:
            sigma: of the call, a float or a 0-dim tensor. It is read within an image alone, where
                FLUX.2's pipeline makes new ids at every step.
            has_references: the image has references, so it may be such an image.
        """
        if self.shift is None:
            return
        if SET_SCHEDULE.get() is None:
            SET_SCHEDULE.set(SetSchedule())
        schedule = SET_SCHEDULE.get()
        if schedule.is_used(self, sigma):
            return
        if has_references:
            last, schedule.last_sigmas[self] = schedule.last_sigmas.get(self, 0), float(sigma)
            if schedule.last_sigmas[self] < last:
                return
        text = (
            f"shift is {self.shift[0]}, but this image's noise schedule is not DyPE's: call "
            "apply_dype on the pipeline once it has its scheduler, or keep the scheduler's own "
            'schedule by DyPEConfig(shift="model") without base_shift and max_shift'
        )
        # not `warn`, because Python would show an equal warning once per process
        warnings.warn_explicit(text, ScheduleWarning, filename=__file__, lineno=0)
