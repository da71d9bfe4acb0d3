"""Print what a run would do, without loading weights."""

from pathlib import Path

from dype.cli.needs import (
    MemoryPlan,
    describe_memory,
    describe_verdict,
    local_folder,
    plan_memory,
)
from dype.config import DEFAULT_LAMBDA_S, DyPEConfig
from dype.embedders import count_text_copies
from dype.errors import UnavailableError
from dype.families import PIXELS_PER_TOKEN
from dype.noise_schedule import set_shift
from dype.pipelines.catalog import Model
from dype.pipelines.loading import check_machine, silence_known_warnings
from dype.pipelines.sources import find_lora
from dype.sampling import forecast
from dype.sampling.run import lora_pairs, schedule_record
from dype.sampling.settings import FLAGS, RUN_FLAGS, RunSettings, format_value
from dype.sweep.run import existing_records, read_folder


def summary_line(run: RunSettings, schedule: dict) -> str:
    """Return one line that describes the image of a run; schedule: of `schedule_record`."""
    mu = "static shift" if schedule["mu"] is None else f"shift mu {schedule['mu']:.2f}"
    size = f"{run.width}x{run.height}"
    return f"{run.model}  {size}  {run.config.name}  {run.steps} steps  {mu}  seed {run.seed}"


def dry_run(run: RunSettings, full: bool = False) -> int:
    """Print what an image takes and its settings; return the exit code.

    It is 0 also where this machine refuses the run, because the plan may be for another one.

    Args:
        run: settings of the image.
        full: print all settings, not only those that are not at their defaults, and the schedule.
    """
    schedule = schedule_record(local_scheduler(run.entry, run.config), run)
    print(summary_line(run, schedule))
    refusal = find_refusal(run)
    for note in filter(None, [refusal, *find_gaps(run)]):
        print(f"  {note}")
    plan = plan_memory(run)
    verdict = describe_verdict(run, plan)
    if refusal and plan.free is not None:
        hint = "; --device cuda plans for a GPU" if run.device is None else ""
        verdict = f"does not run on this machine, as said above{hint * (plan.device == 'cpu')}"
    rows = {
        "time": forecast.describe_time(run),
        "memory": describe_memory(run, plan),
        "passes": "; ".join(map(describe_pass, schedule["passes"])),
        "verdict": verdict,
    }
    rows |= all_settings(run, plan, schedule) if full else list_flags(run)
    for name, value in rows.items():
        print(f"  {name:20} {format_value(value) if isinstance(value, bool) else value}")
    if full:
        print_schedule(run, schedule)
    else:
        print("  the other settings are at their defaults; --dry_run full lists all")
    return 0


def find_refusal(run: RunSettings) -> str:
    """Return the sentence with which this machine refuses a run before it loads; "" for none."""
    overrides = run.text_encoder_device, run.vae_device
    try:
        check_machine(run.model, run.entry, run.device, run.offload, run.quantize, overrides)
    except UnavailableError as error:
        return f"refused on this machine: {error}"
    return ""


def find_gaps(run: RunSettings) -> list[str]:
    """Return sentences on the files that could not be checked."""
    repo, sentences = run.entry.repo, []
    if run.entry.is_guess:
        sentences.append(f"nothing could be read of {repo}: defaults of FLUX.1-dev")
    if local_folder(run) is None:
        sentences.append(f"{repo} is not on this machine, so its files were not checked")
    for path, _ in lora_pairs(run):
        if find_lora(path, download=False) is None:
            sentences.append(f"the LoRA {path} is not on this machine, so its file was not checked")
    return sentences


def all_settings(run: RunSettings, plan: MemoryPlan, schedule: dict) -> dict:
    """Return every setting by its name; "auto" with what it stands for here.

    Args:
        run: settings of the image.
        plan: of `plan_memory`.
        schedule: of `schedule_record`.
    """
    settings = run.record["flags"] | run.config.to_dict()
    settings |= {name: schedule[name] for name in ("shift", "lambda_s")}
    choices = {"offload": plan.offload, "text_repeat": count_copies(run)}
    choices["tiled_vae"] = "auto" if plan.tiled is None else format_value(plan.tiled)
    for name, choice in choices.items():
        if settings[name] == "auto" != choice:
            settings[name] = f"auto, here {choice}"
    return settings | {"prompt": run.prompt}


def count_copies(run: RunSettings) -> int:
    """Return how often `--text_repeat auto` repeats the text."""
    trained = run.config.base_resolution / PIXELS_PER_TOKEN
    grid = run.height // PIXELS_PER_TOKEN, run.width // PIXELS_PER_TOKEN
    return count_text_copies("auto", trained, grid)


def list_flags(run: RunSettings) -> dict[str, str]:
    """Return the flags that are not at the model's defaults, and are not in the summary."""
    values = run.record["flags"] | run.config.to_dict() | {"prompt": run.prompt}
    options = {row.name: f"--{row.option}" for row in FLAGS}
    machine = [row for row in RUN_FLAGS if not row.changes_image]
    names = [name for name in run.non_defaults if name not in ("model", "steps")]
    names += [row.name for row in machine if values[row.name] != row.default]
    flags = {}
    for name in names:
        value = values[name]
        text = " ".join(value) if isinstance(value, list) else format_value(value)
        if name == "text_repeat" and value == "auto":
            text = f"auto, here {count_copies(run)}"
        flags[options.get(name, name)] = text
    return flags


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
    plan = plan_memory(largest)
    lines += filter(None, [find_refusal(largest), *find_gaps(largest)])
    lines += [f"memory: {describe_memory(largest, plan)}"]
    lines += [f"verdict: {describe_verdict(largest, plan)}"]
    lines.append(f"{len(runs)} images, {len(finished)} finished")
    seconds = [*map(forecast.estimate_seconds, remaining)]
    if finished:
        rate = sum(record["seconds"] for _, record in finished)
        rate /= sum(forecast.work_of(run) for run, _ in finished)
        duration = forecast.format_duration(sum(map(forecast.work_of, remaining)) * rate)
        lines[-1] += f"; about {duration} left at the same speed"
    elif None not in seconds:
        duration = forecast.format_duration(sum(seconds))
        lines[-1] += f"; about {duration} left, {forecast.describe_origin(remaining)}"
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
