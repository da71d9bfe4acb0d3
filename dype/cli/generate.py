"""Generate the images of resolved settings: a single one, or a sweep with its sheets."""

from pathlib import Path

from dype.cli.dry_run import describe_plan, dry_run, summary_line
from dype.cli.flags import RunOptions
from dype.cli.output import output_path, read_sweep
from dype.errors import UnavailableError, fail, is_out_of_memory, raise_user_errors
from dype.pipelines import distributed
from dype.sampling import records
from dype.sampling.run import (
    check_checkpoint,
    explain_out_of_memory,
    generate_with_record,
    image_bar,
    load_for_run,
    prepare_pipeline,
)
from dype.sampling.sample import prompt_encoder
from dype.sampling.settings import RunSettings
from dype.sweep import contact_sheet, results, viewer
from dype.sweep import run as sweep


def generate_images(options: RunOptions, runs: list[RunSettings]) -> int:
    """Generate one image or a sweep, and return the exit code."""
    check_checkpoint(runs[0])  # because all images share what is loaded
    return generate_sweep(options, runs) if options.sweep else generate_one(options, runs[0])


def generate_one(options: RunOptions, run: RunSettings) -> int:
    """Load a pipeline, generate one image and save it with its record."""
    path = output_path(options, run)
    if options.dry_run:
        return dry_run(run, options.dry_run == "full")
    distributed.check_start(run, single_image=True)
    state = distributed.init_processes(run)
    records.check_writable(path.parent, path.name)
    pipe = load_for_run(run, run.height * run.width, state)
    prepared = prepare_pipeline(pipe, run)
    print(summary_line(run, prepared))
    try:
        with image_bar(run, visible=state.is_main_process) as bar:
            encode = prompt_encoder(pipe, [run])
            image, record = generate_with_record(pipe, run, prepared, encode, bar)
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
    with raise_user_errors():
        viewer.check_page(folder / viewer.PAGE)
        if options.dry_run:
            print(describe_plan(runs, folder, options.overwrite))
            return 0
        failures = sweep.run_sweep(runs, folder, options.overwrite)
    if failures is None:  # only the main process writes the sheets
        return 0
    draw_sheets(read_sweep(folder), folder, options.cols)
    if not failures:
        return 0
    table = folder / results.RESULTS
    sentence = f"{failures} of {len(runs)} images failed, see {table}; the same command tries "
    return fail("run_dype.py", sentence + "them again")


def draw_sheets(rows: list[dict], folder: Path, columns: str | None) -> int:
    """Write contact sheets, summary and page of a finished sweep; return the exit code.

    Args:
        rows: of results.csv.
        folder: of the sweep.
        columns: the value of --cols.

    Raises:
        UserError: another program's index.html is in the way.
        OSError: a file cannot be written.
    """
    with raise_user_errors():
        viewer.check_page(folder / viewer.PAGE)
    for path in contact_sheet.write_contact_sheets(rows, folder, columns):
        print(path)
    with raise_user_errors():
        print(viewer.write_sweep_page(rows, folder))
    return 0
