"""What a run would do, without loading weights."""

from dype.config import METHOD_SCALES
from dype.noise_schedule import set_shift, shift_settings
from dype.pipelines.loading import mute
from dype.sampling import records
from dype.sampling.run import Settings, describe_schedule


def headline(settings: Settings, schedule: dict) -> str:
    """One line that says what is about to be drawn."""
    flags, config = settings.flags, settings.config
    mu = "static shift" if schedule["mu"] is None else f"mu {schedule['mu']:.2f}"
    method = records.method_name(config.method, config.dype)
    return (
        f"{flags['model']}  {flags['height']}x{flags['width']}  {method}  "
        f"{flags['steps']} steps  {mu}  seed {flags['seed']}"
    )


def dry_run(settings: Settings) -> int:
    """Print every resolved setting and the schedule, without loading weights."""
    scheduler = local_scheduler(settings.model, settings.config)
    schedule = describe_schedule(scheduler, settings)
    print(headline(settings, schedule))
    if settings.model.assumed:
        print(f"  nothing could be read of {settings.model.repo}: defaults as FLUX.1-dev's")
    used = {name: schedule[name] for name in ("shift", "lambda_s")}
    for name, value in (settings.flags | settings.config.to_dict() | used).items():
        print(f"  {name:20} {value}")
    print(f"  {'prompt':20} {settings.prompts[0]}")
    whole = len(schedule["passes"]) == 1 and "strength" not in schedule["passes"][0]
    for one in [] if whole else schedule["passes"]:
        sigmas = " ".join(f"{sigma:.4f}" for sigma in one["sigmas"])
        part = ", from a later one that the first pass decides"
        part *= one.get("strength", 1) is None
        print(f"  pass at {one['height']}x{one['width']}: sigmas {sigmas}{part}")
    print("  step   sigma   kappa")
    without = settings.config.method != "base" and METHOD_SCALES[settings.config.method] is None
    for step, (sigma, kappa) in enumerate(
        zip(schedule["sigmas"], schedule["kappas"], strict=False)
    ):
        shown = "     -" if without else f"{kappa:.4f}"
        print(f"  {step:4}  {sigma:.4f}  {shown}")
    return 0


def local_scheduler(model, config):
    """A scheduler as the model's will be, with the shift that DyPE would set, without the model."""
    mute()
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.schedule)
    set_shift(scheduler, shift_settings(scheduler, config, model.family))
    return scheduler
