"""Print what a run would do, without loading weights."""

from pathlib import Path

from dype.cli.needs import describe_memory
from dype.config import CONFIG_FLAGS, DEFAULT_LAMBDA_S, DyPEConfig
from dype.embedders import count_text_copies
from dype.families import PIXELS_PER_TOKEN
from dype.noise_schedule import set_shift
from dype.pipelines.catalog import Model
from dype.pipelines.loading import silence_known_warnings
from dype.pipelines.sources import find_lora
from dype.sampling import forecast
from dype.sampling.run import lora_pairs, schedule_record
from dype.sampling.settings import CONFIG_DEFAULTS, RunSettings
from dype.sweep.run import existing_records, read_folder

CONFIG_ONLY = CONFIG_DEFAULTS.keys() - {row.name for row in CONFIG_FLAGS}  # fields without a flag


def summary_line(run: RunSettings, schedule: dict) -> str:
    """Return one line that describes the image of a run; schedule: of `schedule_record`."""
    mu = "static shift" if schedule["mu"] is None else f"mu {schedule['mu']:.2f}"
    size = f"{run.width}x{run.height}"
    return f"{run.model}  {size}  {run.config.name}  {run.steps} steps  {mu}  seed {run.seed}"


def dry_run(run: RunSettings, full: bool = False) -> int:
    """Print what an image takes and its settings; return the exit code.

    Args:
        run: settings of the image.
        full: print also the settings that have no effect, and the schedule.
    """
    schedule = schedule_record(local_scheduler(run.entry, run.config), run)
    print(summary_line(run, schedule))
    if run.entry.is_guess:
        print(f"  nothing could be read of {run.entry.repo}: defaults of FLUX.1-dev")
    for path, _ in lora_pairs(run):
        if find_lora(path, download=False) is None:
            print(f"  the LoRA {path} is not on this machine, so its file was not checked")
    rows = {"time": forecast.describe_time(run), "memory": describe_memory(run)}
    rows["passes"] = "; ".join(map(describe_pass, schedule["passes"]))
    resolved = {name: schedule[name] for name in ("shift", "lambda_s")}
    settings = run.record["flags"] | run.config.to_dict() | resolved
    if not full:
        settings = {name: value for name, value in settings.items() if matters(run, name, value)}
    if run.config.text_repeat == "auto":
        trained = run.config.base_resolution / PIXELS_PER_TOKEN
        grid = run.height // PIXELS_PER_TOKEN, run.width // PIXELS_PER_TOKEN
        settings["text_repeat"] = f"auto, here {count_text_copies('auto', trained, grid)}"
    for name, value in (rows | settings | {"prompt": run.prompt}).items():
        print(f"  {name:20} {value}")
    if full:
        print_schedule(run, schedule)
    return 0


def matters(run: RunSettings, name: str, value) -> bool:
    """Return whether a setting has an effect, and is none that only --config could change.

    Args:
        run: settings of the image.
        name: of the setting.
        value: its value.
    """
    if value in (None, []) or (name in CONFIG_ONLY and value == CONFIG_DEFAULTS[name]):
        return False
    return run.identity.get(name, value) is not None


def describe_pass(settings: dict) -> str:
    """Return size and steps of a pass of `schedule_record`."""
    text = f"{settings['width']}x{settings['height']} px, "
    steps, count = settings["steps"], len(settings["sigmas"]) - 1
    if settings.get("strength", 1) is None:
        return f"{text}the last of {steps} steps, as the first pass decides"
    return text + (f"{steps} steps" if count == steps else f"the last {count} of {steps} steps")


def print_schedule(run: RunSettings, schedule: dict) -> None:
    """Print the sigmas of every pass, and sigma and kappa of every step at the final size.

    Args:
        run: settings of the image.
        schedule: of `schedule_record`.
    """
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
    pairs = zip(schedule["sigmas"], schedule["kappas"], strict=False)
    for step, (sigma, kappa) in enumerate(pairs):
        text = f"{kappa:.4f}" if has_kappa else "     -"
        print(f"  {step:4}  {sigma:.4f}  {text}")


def describe_plan(runs: list[RunSettings], folder: Path, overwrite: bool) -> str:
    """Return the plan of a sweep: file names, number of images, estimates of time and memory.

    Args:
        runs: settings of all images of the sweep.
        folder: folder of the sweep, which may not exist yet.
        overwrite: as in `existing_records`.

    Raises:
        ValueError: an image or the table is in the way.
    """
    read_folder(runs, folder, overwrite)
    pairs = [*zip(runs, existing_records(runs, folder, overwrite), strict=True)]
    finished = [(run, record) for run, record in pairs if record]
    remaining = [run for run, record in pairs if not record]
    lines = [f"  {run.file_name}{'  (finished)' * bool(record)}" for run, record in pairs]
    largest = max(runs, key=lambda run: run.height * run.width)
    lines.append(f"memory: {describe_memory(largest)}")
    lines.append(f"{len(runs)} images, {len(finished)} finished")
    seconds = [*map(forecast.estimate_seconds, remaining)]
    if finished:
        rate = sum(record["seconds"] for _, record in finished)
        rate /= sum(forecast.work_of(run) for run, _ in finished)
        duration = forecast.format_duration(sum(map(forecast.work_of, remaining)) * rate)
        lines[-1] += f"; about {duration} left at the same speed"
    elif None not in seconds:
        duration = forecast.format_duration(sum(seconds))
        lines[-1] += f"; about {duration} left, as before on this machine"
    else:
        lines[-1] += "; the time is unknown until the first is done"
    return "\n".join(lines)


def local_scheduler(model: Model, config: DyPEConfig):
    """Return a scheduler with the model's configuration and DyPE's shift, without the model."""
    silence_known_warnings()
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler_config)
    set_shift(scheduler, config, model.family)
    return scheduler
