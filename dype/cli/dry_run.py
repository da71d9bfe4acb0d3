"""Print what a run would do, without loading weights."""

from dype.config import DEFAULT_LAMBDA_S, DyPEConfig
from dype.noise_schedule import set_shift
from dype.pipelines.catalog import Model
from dype.pipelines.loading import silence_known_warnings
from dype.pipelines.sources import find_lora
from dype.sampling.run import lora_pairs, schedule_record
from dype.sampling.settings import RunSettings


def summary_line(run: RunSettings, schedule: dict) -> str:
    """Return one line that describes the image of a run; schedule: of `schedule_record`."""
    mu = "static shift" if schedule["mu"] is None else f"mu {schedule['mu']:.2f}"
    size = f"{run.width}x{run.height}"
    return f"{run.model}  {size}  {run.config.name}  {run.steps} steps  {mu}  seed {run.seed}"


def dry_run(run: RunSettings) -> int:
    """Print every resolved setting and the schedule of an image; return the exit code."""
    schedule = schedule_record(local_scheduler(run.entry, run.config), run)
    print(summary_line(run, schedule))
    if run.entry.is_guess:
        print(f"  nothing could be read of {run.entry.repo}: defaults of FLUX.1-dev")
    for path, _ in lora_pairs(run):
        if find_lora(path, download=False) is None:
            print(f"  the LoRA {path} is not on this machine, so its file was not checked")
    resolved = {name: schedule[name] for name in ("shift", "lambda_s")}
    for name, value in (run.record["flags"] | run.config.to_dict() | resolved).items():
        print(f"  {name:20} {value}")
    print(f"  {'prompt':20} {run.prompt}")
    passes = schedule["passes"]
    if len(passes) == 1 and "strength" not in passes[0]:
        passes = []  # because the table below has all sigmas of a pass from noise
    for settings in passes:
        sigmas = " ".join(f"{sigma:.4f}" for sigma in settings["sigmas"])
        is_progressive = settings.get("strength", 1) is None
        note = "; the first pass decides at which of these it starts" if is_progressive else ""
        print(f"  pass at {settings['width']}x{settings['height']}: sigmas {sigmas}{note}")
    print("  step   sigma   kappa")
    method = run.config.method
    has_kappa = method == "base" or DEFAULT_LAMBDA_S[method] is not None
    for step, (sigma, kappa) in enumerate(
        zip(schedule["sigmas"], schedule["kappas"], strict=False)
    ):
        text = f"{kappa:.4f}" if has_kappa else "     -"
        print(f"  {step:4}  {sigma:.4f}  {text}")
    return 0


def local_scheduler(model: Model, config: DyPEConfig):
    """Return a scheduler with the model's configuration and DyPE's shift, without the model."""
    silence_known_warnings()
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler_config)
    set_shift(scheduler, config, model.family)
    return scheduler
