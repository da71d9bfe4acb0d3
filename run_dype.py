"""Generate images beyond the training resolution with DyPE: `python run_dype.py --prompt "..."`."""

import io
import os
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

# Before torch is imported; dype/__init__.py has the reason.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dype.cli.dry_run import dry_run, summary_line
from dype.cli.flags import RunOptions, parse
from dype.cli.settings import resolve
from dype.cli.validation import check_paths
from dype.errors import (
    UnavailableError,
    UserError,
    fail,
    is_out_of_memory,
    raise_user_errors,
    run_command,
)
from dype.pipelines import distributed
from dype.sampling import records
from dype.sampling.run import (
    check_checkpoint,
    explain_out_of_memory,
    generate_with_record,
    load_for_run,
    prepare_pipeline,
)
from dype.sampling.sample import prompt_encoder
from dype.sampling.settings import RunSettings
from dype.sweep import contact_sheet, results, viewer
from dype.sweep import run as sweep

PROGRAM = "run_dype.py"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Exit codes: 0, 2 for a mistake of the user, 1 for other failures, 130 after Ctrl-C.
    """
    rank, _ = distributed.rank_and_world_size()
    with redirect_stdout(io.StringIO()) if rank else nullcontext():  # only one process prints
        return run_command(
            PROGRAM,
            partial(command, sys.argv[1:] if argv is None else argv, rank),
            out_of_memory="try --offload group or --quantize int8",
            interrupted="the same command generates the remaining images of a sweep",
            rank=rank,
        )


def command(argv: list[str], rank: int) -> int:
    """Parse and resolve the arguments, then generate one image or a sweep."""
    words = vars(parse(argv))
    if "grid_from" in words:
        check_paths(words)
        return 0 if rank else draw_sheets(Path(words["grid_from"]), words.get("cols"))
    options, runs = resolve(words)
    check_checkpoint(runs[0])  # because all images share what is loaded
    return generate_sweep(options, runs) if options.sweep else generate_one(options, runs[0])


def generate_one(options: RunOptions, run: RunSettings) -> int:
    """Load a pipeline, generate one image and save it with its record."""
    path = output_path(options, run)
    if options.dry_run:
        return dry_run(run)
    distributed.check_start(run, single_image=True)
    state = distributed.init_processes(run)
    records.check_writable(path.parent, path.name)
    pipe = load_for_run(run, run.height * run.width, state)
    pipe.set_progress_bar_config(disable=not state.is_main_process)
    prepared = prepare_pipeline(pipe, run)
    print(summary_line(run, prepared))
    try:
        image, record = generate_with_record(pipe, run, prepared, prompt_encoder(pipe, [run]))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UnavailableError(explain_out_of_memory(pipe, run)) from error
    if state.is_main_process:
        saved_record = None if options.no_metadata else record
        # because another run may have taken the name in the meantime
        path = records.save_image(image, saved_record, path, options.overwrite)
    print(f"{path}  {record['seconds']:.1f} s")
    # Not in a `finally`, because after an error the other processes may have ended.
    state.destroy_process_group()
    return 0


def generate_sweep(options: RunOptions, runs: list[RunSettings]) -> int:
    """Generate the unfinished images of a sweep, then write the contact sheets and the summary."""
    folder = Path(options.output_dir or f"outputs/{options.sweep}")
    if options.output is not None:
        raise UserError("--output names one file, expected one image or --output_dir")
    with raise_user_errors():
        contact_sheet.check_columns(options.cols)
        viewer.check_page(folder / viewer.PAGE)
        if options.dry_run:
            print(sweep.describe_plan(runs, folder, options.overwrite))
            return 0
        failures = sweep.run_sweep(runs, folder, options.overwrite)
    if failures is None:  # only the main process writes the sheets
        return 0
    draw_sheets(folder, options.cols)
    if not failures:
        return 0
    table = folder / results.RESULTS
    sentence = f"{failures} of {len(runs)} images failed, see {table}; the same command tries "
    return fail(PROGRAM, sentence + "them again")


def draw_sheets(folder: Path, columns: str | None) -> int:
    """Write contact sheets, summary and page of a finished sweep. Raises UserError, OSError."""
    with raise_user_errors():
        rows = results.read_rows(folder)
        if not rows:
            raise ValueError(f"{folder} has no finished sweep, expected one with its results.csv")
        for path in contact_sheet.write_contact_sheets(rows, folder, columns):
            print(path)
        print(viewer.write_sweep_page(rows, folder))
    return 0


def output_path(options: RunOptions, run: RunSettings) -> Path:
    """Return the path of the image. Raises UserError for a file that --output cannot name."""
    if options.output is None:
        name = "image.png" if options.no_metadata else run.file_name
        path = Path(options.output_dir or "outputs") / name
        path = path if options.overwrite else records.next_free_path(path)
    else:
        path = Path(options.output)
        if path.suffix.lower() != ".png":
            raise UserError(f"--output is {options.output!r}, expected a name ending in .png")
        for target in (path, path.with_suffix(".json")):
            if target.is_dir() or (target.exists() and not options.overwrite):
                raise UserError(f"--output: {target} exists, expected --overwrite or another name")
    return path


if __name__ == "__main__":
    sys.exit(main())
