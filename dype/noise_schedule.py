"""The noise schedule: mu and sigmas, and the shift that DyPE sets."""

import copy
import math

from dype.config import DyPEConfig
from dype.families import FLUX, PIXELS_PER_TOKEN, Family

FLUX2_CAP_STEPS = (
    50  # at which FLUX.2's own rule is taken for the cap, its documented number of steps
)


def noise_schedule(
    scheduler, height: int, width: int, steps: int, family: Family = FLUX
) -> tuple[float | None, list]:
    """The mu (None: a static shift) and the sigmas, ending in 0, that a pipeline will use."""
    import numpy as np
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config, scheduler = scheduler.config, copy.deepcopy(scheduler)
    mu = None
    if family.own_mu_rule and hasattr(scheduler, "dype_shift"):
        mu = math.log(config.shift)  # the cap, which stands in the configuration as a static shift
    if config.get("use_dynamic_shifting"):
        tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        numbers = [config[name] for name in names]
        mu = (
            family.own_mu_rule(tokens, steps)
            if family.own_mu_rule
            else calculate_shift(tokens, *numbers)
        )
    # what every pipeline hands to its scheduler, which shifts it
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return mu, scheduler.sigmas.tolist()


def shift_settings(scheduler, config: DyPEConfig, family: Family) -> dict:
    """What to change in the scheduler's configuration.

    "cap" makes mu = max_shift at every size, as the authors' pipeline does (the paper does not say
    so); FLUX.2 has a rule without a max_shift, and is capped at what it gives at the base
    resolution. "model" leaves the rule, with its two numbers replaced where the config gives them.
    A static schedule has nothing to change.
    """
    if not scheduler.config.get("use_dynamic_shifting", False):
        return {}
    if (config.shift or family.shift) == "model":
        wanted = {"base_shift": config.base_shift, "max_shift": config.max_shift}
        return {name: value for name, value in wanted.items() if value is not None}
    cap = config.max_shift
    if (
        family.own_mu_rule
    ):  # the pipeline reads no mu from the configuration: a static shift is the curve
        tokens = ((config.base_resolution or family.base_resolution) // PIXELS_PER_TOKEN) ** 2
        cap = family.own_mu_rule(tokens, FLUX2_CAP_STEPS) if cap is None else cap
        return {"use_dynamic_shifting": False, "shift": math.exp(cap)}
    cap = scheduler.config.get("max_shift", 1.15) if cap is None else cap
    return {"base_shift": cap, "max_shift": cap}


def check_shift(schedule: dict, config: DyPEConfig, family: Family) -> None:
    """Raise ValueError if the config sets a shift that this schedule would ignore."""
    asked = [name for name in ("base_shift", "max_shift") if getattr(config, name) is not None]
    shift = config.shift or family.shift
    if not schedule.get("use_dynamic_shifting", False):
        reason = "this model's schedule is static, expected none"
    elif family.own_mu_rule and shift == "model":
        reason = "this model's pipeline has a rule of its own for mu, expected none or shift cap"
    elif "base_shift" in asked and shift == "cap":
        reason = (
            "the schedule is capped: mu is max_shift at every size; expected shift model with it"
        )
    else:
        return
    if asked:
        raise ValueError(f"{asked[0]} is {getattr(config, asked[0])}, but {reason}")


def set_shift(scheduler, wanted: dict) -> None:
    """Change the scheduler's configuration and note on it what was there and what is ours."""
    scheduler.dype_shift = {name: (scheduler.config.get(name), wanted[name]) for name in wanted}
    scheduler.register_to_config(**wanted)
    if "shift" in wanted:
        scheduler.set_shift(wanted["shift"])  # the scheduler keeps a copy of this one


def scheduler_config_without_dype(scheduler) -> dict:
    """The scheduler's configuration as it would be without us; what others changed since stays."""
    config = dict(scheduler.config)
    for name, (before, ours) in getattr(scheduler, "dype_shift", {}).items():
        if config.get(name) == ours:
            config[name] = before
            if before is None:
                del config[name]
    return config


def restore_shift(scheduler) -> None:
    """Undo `set_shift`, if it was called, except for values that somebody else has changed."""
    if not hasattr(scheduler, "dype_shift"):
        return
    scheduler._internal_dict = type(scheduler.config)(scheduler_config_without_dype(scheduler))
    if "shift" in scheduler.dype_shift:
        scheduler.set_shift(scheduler.config["shift"])
    del scheduler.dype_shift
