"""Draw pictures beyond the training resolution with DyPE: `python run_dype.py --prompt "..."`."""

import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from dype import ablation, apply_dype, load_pipeline, memory, parallel, records, sheets, speed
from dype.cells import Cell, describe_schedule, drawn, encoder, out_of_memory, plan
from dype.config import METHOD_SCALES
from dype.flags import UserError, parse
from dype.parallel import ElsewhereError, Team
from dype.pipelines import UnavailableError, check_device, default_device, local_scheduler
from dype.settings import CITATION, Settings, resolve


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 1 for the rest."""
    with open(os.devnull, "w") as silence:
        quiet = redirect_stdout(silence) if parallel.started()[0] else nullcontext()
        with quiet:  # of several processes one speaks
            return guarded(argv)


def guarded(argv: list[str] | None) -> int:
    """What was asked for, and one sentence if it cannot be done; returns the exit code."""
    try:
        given = vars(parse(sys.argv[1:] if argv is None else argv))
        if given["cite"]:
            print(CITATION)
            return 0
        if parallel.started()[0] and (given["grid_from"] or given["dry_run"]):
            return 0
        if given["grid_from"]:
            return sheet(Path(given["grid_from"]), given["cols"])
        given, settings = resolve(given)
        return draw(given, settings)
    except ElsewhereError:
        return 1
    except UserError as error:
        return failed(2, error)
    except (UnavailableError, OSError) as error:
        return failed(1, error)
    except (RuntimeError, MemoryError) as error:
        if speed.of_compiler(error):
            return failed(1, f"cannot compile: {speed.shortened(error)}; try --compile off")
        if not memory.ran_out(error):
            raise
        return failed(1, "out of memory before drawing; try --offload group or --quantize int8")
    except KeyboardInterrupt:
        return failed(130, "interrupted; of a sweep the same command draws the rest")


def draw(given: dict, settings: list[Settings]) -> int:
    """Draw a picture or a sweep, on one process or several."""
    one = len(settings) == len(settings[0].prompts) == 1 and "sweep" not in given
    if given.get("dry_run"):
        return dry_run(settings[0]) if one else dry_sweep(given, settings)
    team = parallel.join(settings[0].flags, alone=one)
    code = single(given, settings[0], team) if one else sweep(given, settings, team)
    parallel.leave()  # not after an error, when the others may not be there to be taken leave of
    return code


def failed(code: int, error) -> int:
    """Say what went wrong; a mistake, which every process sees, by one of them alone."""
    if code == 1 or parallel.started()[0] == 0:
        print(f"run_dype.py: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def load(settings: Settings, pixels: int):
    """The pipeline, with DyPE applied once to see that it can be."""
    flags, device = settings.flags, parallel.own_device(settings.flags)
    names = ("revision", "dtype", "text_encoder_device", "vae_device", "offload", "quantize")
    if flags["attention"] or flags["compile"] != "off":
        check_device(device or default_device(), "none")
    masked = settings.model.pipeline in speed.MASKED
    speed.check_attention(flags["attention"], device or default_device(), flags["dtype"], masked)
    speed.check_compiler(flags["compile"], device or default_device())
    pipe = load_pipeline(
        flags["model"],
        **{name: flags[name] for name in names},
        device=device,
        loras=settings.loras,
        pixels=pixels,
    )
    if flags["cache"] != "off":
        print(speed.CACHE_WARNING.format(flags["cache"]))
    try:
        apply_dype(pipe, settings.config)
        parallel.check_heads(pipe.transformer, flags["ulysses"])
        speed.compile_steps(pipe, flags["compile"])
    except (TypeError, ValueError) as error:  # what only the loaded checkpoint can tell
        raise UserError(f"{flags['model']}: {error}") from error
    return pipe


def single(given: dict, settings: Settings, team: Team) -> int:
    """Load, draw one picture, save it."""
    path = output_path(given, settings)
    flags = settings.flags
    pipe = load(settings, flags["height"] * flags["width"])
    pipe.set_progress_bar_config(disable=not team.main)
    print(headline(settings, describe_schedule(pipe.scheduler, settings)))
    cell = Cell(settings, settings.prompts[0], path)
    try:
        image, record = drawn(pipe, settings, cell.prompt, encoder(pipe, [cell]))
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        return failed(1, out_of_memory(pipe, settings))
    if team.main:
        path = records.save(image, path, record, given.get("overwrite", False))
    print(f"{path}  {record['seconds']:.1f} s")
    return 0


def planned(given: dict, settings: list[Settings]) -> tuple[Path, list[Cell]]:
    """The folder of a sweep and its cells. Raises UserError."""
    if "output" in given:
        raise UserError("--output names one file, expected one picture or --output_dir")
    folder = Path(given.get("output_dir", Path("outputs") / given.get("sweep", "sweep")))
    try:
        sheets.check_columns(given.get("cols"))
    except ValueError as error:
        raise UserError(str(error)) from error
    return folder, plan(settings, folder)


def dry_sweep(given: dict, settings: list[Settings]) -> int:
    """Print what a sweep would draw."""
    folder, cells = planned(given, settings)
    try:
        print(ablation.outline(cells, folder, given.get("overwrite", False)))
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def sweep(given: dict, settings: list[Settings], team: Team) -> int:
    """Draw every cell that is not there yet, then the contact sheets and the summary."""
    folder, cells = planned(given, settings)
    overwrite = given.get("overwrite", False)

    def ready(rest):
        sizes = [cell.settings.flags["height"] * cell.settings.flags["width"] for cell in rest]
        pipe = load(settings[0], max(sizes))
        return pipe, encoder(pipe, rest)

    try:
        failures = ablation.run(cells, folder, ready, overwrite, team)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not team.main:
        return 0
    sheet(folder, given.get("cols"))
    if failures:
        return failed(
            1, f"{failures} of {len(cells)} pictures failed, see {folder / ablation.RESULTS}; "
            "the same command tries them again"
        )  # fmt: skip
    return 0


def sheet(folder: Path, columns: str | None) -> int:
    """Contact sheets and summary of a finished sweep. Raises UserError, OSError."""
    try:
        rows = ablation.read_rows(folder)
        if not rows:
            raise ValueError(f"{folder} has no finished sweep, expected one with its results.csv")
        for path in sheets.draw(rows, folder, columns):
            print(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


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


def output_path(given: dict, settings: Settings) -> Path:
    """Where the picture goes, checked before anything is loaded. Raises UserError, OSError."""
    if "output" in given:
        path = Path(given["output"])
        if path.suffix.lower() != ".png":
            raise UserError(f"--output is {given['output']!r}, expected a name ending in .png")
        for taken in (path, path.with_suffix(".json")):
            if taken.is_dir() or (taken.exists() and not given.get("overwrite")):
                raise UserError(f"--output: {taken} exists, expected --overwrite or another name")
    else:
        [cell] = plan([settings], Path(given.get("output_dir", "outputs")))
        path = cell.path if given.get("overwrite") else records.free_path(cell.path)
    records.check_writable(path.parent)
    return path


if __name__ == "__main__":
    sys.exit(main())
