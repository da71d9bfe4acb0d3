"""What a run would do, without loading weights."""

from dype.config import DEFAULT_LAMBDA_S
from dype.noise_schedule import set_shift, shift_settings
from dype.pipelines.loading import silence_known_warnings
from dype.sampling.run import schedule_record
from dype.sampling.settings import RunSettings


def summary_line(run: RunSettings, schedule: dict) -> str:
    """One line that says what is about to be drawn."""
    mu = "static shift" if schedule["mu"] is None else f"mu {schedule['mu']:.2f}"
    size = f"{run.height}x{run.width}"
    return f"{run.model}  {size}  {run.config.name}  {run.steps} steps  {mu}  seed {run.seed}"


def dry_run(run: RunSettings) -> int:
    """Print every resolved setting and the schedule, without loading weights."""
    schedule = schedule_record(local_scheduler(run.entry, run.config), run)
    print(summary_line(run, schedule))
    if run.entry.is_guess:
        print(f"  nothing could be read of {run.entry.repo}: defaults as FLUX.1-dev's")
    used = {name: schedule[name] for name in ("shift", "lambda_s")}
    for name, value in (run.record["flags"] | run.config.to_dict() | used).items():
        print(f"  {name:20} {value}")
    print(f"  {'prompt':20} {run.prompt}")
    whole = len(schedule["passes"]) == 1 and "strength" not in schedule["passes"][0]
    for part in [] if whole else schedule["passes"]:
        sigmas = " ".join(f"{sigma:.4f}" for sigma in part["sigmas"])
        later = ", from a later one that the first pass decides"
        later *= part.get("strength", 1) is None
        print(f"  pass at {part['height']}x{part['width']}: sigmas {sigmas}{later}")
    print("  step   sigma   kappa")
    without = run.config.method != "base" and DEFAULT_LAMBDA_S[run.config.method] is None
    for step, (sigma, kappa) in enumerate(
        zip(schedule["sigmas"], schedule["kappas"], strict=False)
    ):
        shown = "     -" if without else f"{kappa:.4f}"
        print(f"  {step:4}  {sigma:.4f}  {shown}")
    return 0


def local_scheduler(model, config):
    """A scheduler as the model's will be, with the shift that DyPE would set, without the model."""
    silence_known_warnings()
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler_config)
    set_shift(scheduler, shift_settings(scheduler, config, model.family))
    return scheduler
