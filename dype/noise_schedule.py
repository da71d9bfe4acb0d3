"""Noise schedule: mu and sigmas, and the shift that DyPE sets."""

import copy
import math

from dype.config import DyPEConfig
from dype.families import FLUX, PIXELS_PER_TOKEN, Family

FLUX2_CAP_STEPS = 50  # FLUX.2's rule depends on the steps: the cap takes the documented number


def noise_schedule(
    scheduler, height: int, width: int, steps: int, family: Family = FLUX
) -> tuple[float | None, list]:
    """Return the mu and the sigmas that a pipeline will use.

    Args:
        scheduler: of the pipeline, with the shift that DyPE set.
        height: px.
        width: px.
        steps: denoiser steps.
        family: of the pipeline.

    Returns:
        mu, or None for a static shift; and steps + 1 sigmas, the last is 0.
    """
    import numpy as np
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config, scheduler = scheduler.config, copy.deepcopy(scheduler)
    mu = None
    if family.own_mu_rule and hasattr(scheduler, "dype_shift"):
        mu = math.log(config.shift)  # `shift_settings` wrote the cap as a static shift
    if config.get("use_dynamic_shifting"):
        tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        if family.own_mu_rule:
            mu = family.own_mu_rule(tokens, steps)
        else:
            mu = calculate_shift(tokens, *[config[name] for name in names])
    # every pipeline passes these sigmas to its scheduler, which shifts them
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return mu, scheduler.sigmas.tolist()


def shift_settings(scheduler, config: DyPEConfig, family: Family) -> dict:
    """Return the entries to change in the scheduler's configuration; none for a static schedule.

    "cap" makes mu = max_shift at every size, as the authors' pipeline does (the paper does not
    mention it). FLUX.2's rule has no max_shift; its cap is the mu of the base resolution. "model"
    keeps the rule and replaces its two numbers where the config sets them.

    Args:
        scheduler: any scheduler with a `config`.
        config: settings of the encoding.
        family: of the pipeline.
    """
    if not scheduler.config.get("use_dynamic_shifting", False):
        return {}
    if (config.shift or family.shift) == "model":
        numbers = {"base_shift": config.base_shift, "max_shift": config.max_shift}
        return {name: value for name, value in numbers.items() if value is not None}
    cap = config.max_shift
    if family.own_mu_rule:  # the pipeline ignores the numbers; a static shift has the same curve
        tokens = ((config.base_resolution or family.base_resolution) // PIXELS_PER_TOKEN) ** 2
        cap = family.own_mu_rule(tokens, FLUX2_CAP_STEPS) if cap is None else cap
        return {"use_dynamic_shifting": False, "shift": math.exp(cap)}
    cap = scheduler.config.get("max_shift", 1.15) if cap is None else cap
    return {"base_shift": cap, "max_shift": cap}


def check_shift(schedule: dict, config: DyPEConfig, family: Family) -> None:
    """Raise ValueError if the config sets a shift that this schedule ignores.

    Args:
        schedule: configuration of the scheduler.
        config: settings of the encoding.
        family: of the pipeline.
    """
    numbers = [name for name in ("base_shift", "max_shift") if getattr(config, name) is not None]
    shift = config.shift or family.shift
    if not schedule.get("use_dynamic_shifting", False):
        reason = "this model's schedule is static, expected none"
    elif family.own_mu_rule and shift == "model":
        reason = "this model's pipeline has its own rule for mu, expected none or shift cap"
    elif "base_shift" in numbers and shift == "cap":
        reason = (
            "the schedule is capped: mu is max_shift at every size; expected shift model with it"
        )
    else:
        return
    if numbers:
        raise ValueError(f"{numbers[0]} is {getattr(config, numbers[0])}, but {reason}")


def set_shift(scheduler, settings: dict) -> None:
    """Change the scheduler's configuration, and store on it the earlier values beside ours."""
    earlier = {name: scheduler.config.get(name) for name in settings}
    scheduler.dype_shift = {name: (earlier[name], settings[name]) for name in settings}
    scheduler.register_to_config(**settings)
    if "shift" in settings:
        scheduler.set_shift(settings["shift"])  # the scheduler keeps a copy of this entry


def scheduler_config_without_dype(scheduler) -> dict:
    """Return the scheduler's configuration without our shift; later changes by a user stay."""
    config = dict(scheduler.config)
    for name, (earlier, ours) in getattr(scheduler, "dype_shift", {}).items():
        if config.get(name) == ours:
            config[name] = earlier
            if earlier is None:
                del config[name]
    return config


def restore_shift(scheduler) -> None:
    """Undo `set_shift` where its values are still in place; do nothing if it was not called."""
    if not hasattr(scheduler, "dype_shift"):
        return
    scheduler._internal_dict = type(scheduler.config)(scheduler_config_without_dype(scheduler))
    if "shift" in scheduler.dype_shift:
        scheduler.set_shift(scheduler.config["shift"])
    del scheduler.dype_shift
