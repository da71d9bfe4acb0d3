"""Draw pictures beyond the training resolution with DyPE: `python run_dype.py --prompt "..."`."""

import io
import os
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, as dype/__init__.py

from dype.cli.dry_run import dry_run, headline
from dype.cli.flags import parse
from dype.cli.settings import resolve
from dype.errors import UnavailableError, UserError, fail, ran_out, run_command, user_errors
from dype.patch import apply_dype
from dype.pipelines import acceleration, distributed
from dype.pipelines.devices import check_device, default_device
from dype.pipelines.distributed import Team
from dype.pipelines.loading import load_pipeline
from dype.sampling import records
from dype.sampling.run import Settings, describe_schedule, drawn, encoder, out_of_memory
from dype.sweep import contact_sheet, results
from dype.sweep import run as sweep_run
from dype.sweep.cells import Cell, plan

PROGRAM = "run_dype.py"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 1 for the rest."""
    rank, _ = distributed.started()
    quiet = redirect_stdout(io.StringIO()) if rank else nullcontext()
    with quiet:  # of several processes one speaks
        return run_command(
            PROGRAM,
            partial(command, sys.argv[1:] if argv is None else argv),
            out_of_memory="try --offload group or --quantize int8",
            interrupted="of a sweep the same command draws the rest",
            rank=rank,
        )


def command(argv: list[str]) -> int:
    """What was asked for: a picture or a sweep, on one process or several, or what it would be."""
    given = vars(parse(argv))
    if distributed.started()[0] and (given["grid_from"] or given["dry_run"]):
        return 0
    if given["grid_from"]:
        return sheet(Path(given["grid_from"]), given["cols"])
    given, settings = resolve(given)
    one = len(settings) == len(settings[0].prompts) == 1 and "sweep" not in given
    if given.get("dry_run"):
        return dry_run(settings[0]) if one else dry_sweep(given, settings)
    team = distributed.join(settings[0].flags, alone=one)
    code = single(given, settings[0], team) if one else sweep(given, settings, team)
    distributed.leave()  # not after an error, when the others may not be there to be taken leave of
    return code


def load(settings: Settings, pixels: int):
    """The pipeline, with DyPE applied once to see that it can be."""
    flags, device = settings.flags, distributed.own_device(settings.flags)
    names = ("revision", "dtype", "text_encoder_device", "vae_device", "offload", "quantize")
    if flags["attention"]:
        check_device(device or default_device(), "none")
    masked = settings.model.pipeline in acceleration.MASKED
    acceleration.check_attention(
        flags["attention"], device or default_device(), flags["dtype"], masked
    )
    pipe = load_pipeline(
        flags["model"],
        **{name: flags[name] for name in names},
        device=device,
        loras=settings.loras,
        pixels=pixels,
    )
    if flags["cache"] != "off":
        print(acceleration.CACHE_WARNING.format(flags["cache"]))
    try:
        apply_dype(pipe, settings.config)
        distributed.check_heads(pipe.transformer, flags["ulysses"])
        acceleration.compile_steps(pipe, flags["compile"])
    except (TypeError, ValueError) as error:  # what only the loaded checkpoint can tell
        raise UserError(f"{flags['model']}: {error}") from error
    return pipe


def single(given: dict, settings: Settings, team: Team) -> int:
    """Load, draw one picture, save it."""
    path = output_path(given, settings)
    flags, prompt = settings.flags, settings.prompts[0]
    pipe = load(settings, flags["height"] * flags["width"])
    pipe.set_progress_bar_config(disable=not team.main)
    print(headline(settings, describe_schedule(pipe.scheduler, settings)))
    try:
        image, record = drawn(pipe, settings, prompt, encoder(pipe, [(settings, prompt)]))
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise UnavailableError(out_of_memory(pipe, settings)) from error
    if team.main:
        path = records.save(image, path, record, given.get("overwrite", False))
    print(f"{path}  {record['seconds']:.1f} s")
    return 0


def planned(given: dict, settings: list[Settings]) -> tuple[Path, list[Cell]]:
    """The folder of a sweep and its cells. Raises UserError."""
    if "output" in given:
        raise UserError("--output names one file, expected one picture or --output_dir")
    folder = Path(given.get("output_dir", Path("outputs") / given.get("sweep", "sweep")))
    with user_errors():
        contact_sheet.check_columns(given.get("cols"))
    return folder, plan(settings, folder)


def dry_sweep(given: dict, settings: list[Settings]) -> int:
    """Print what a sweep would draw."""
    folder, cells = planned(given, settings)
    with user_errors():
        print(sweep_run.outline(cells, folder, given.get("overwrite", False)))
    return 0


def sweep(given: dict, settings: list[Settings], team: Team) -> int:
    """Draw every cell that is not there yet, then the contact sheets and the summary."""
    folder, cells = planned(given, settings)

    def ready(rest):
        sizes = [cell.settings.flags["height"] * cell.settings.flags["width"] for cell in rest]
        pipe = load(settings[0], max(sizes))
        return pipe, encoder(pipe, [(cell.settings, cell.prompt) for cell in rest])

    with user_errors():
        failures = sweep_run.run(cells, folder, ready, given.get("overwrite", False), team)
    if not team.main:
        return 0
    sheet(folder, given.get("cols"))
    if not failures:
        return 0
    table = folder / results.RESULTS
    sentence = f"{failures} of {len(cells)} pictures failed, see {table}; the same command tries "
    return fail(PROGRAM, sentence + "them again")


def sheet(folder: Path, columns: str | None) -> int:
    """Contact sheets and summary of a finished sweep. Raises UserError, OSError."""
    with user_errors():
        rows = results.read_rows(folder)
        if not rows:
            raise ValueError(f"{folder} has no finished sweep, expected one with its results.csv")
        for path in contact_sheet.draw(rows, folder, columns):
            print(path)
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
