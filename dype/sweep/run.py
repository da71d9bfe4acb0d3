"""A sweep: each of its images generated once, whatever interrupts it.

An image is finished when its PNG is there: the JSON beside it was written before it, and the row of
results.csv, which is written whole after each image, is made from its record.
"""

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from dype import errors
from dype.pipelines import distributed
from dype.sampling import records
from dype.sampling.run import (
    explain_out_of_memory,
    generate_with_record,
    load_for_run,
    prepare_pipeline,
)
from dype.sampling.sample import prompt_encoder
from dype.sampling.settings import RunSettings, image_settings
from dype.sweep.results import COLUMNS, RESULTS, lock_folder, read_rows, to_row, write_table

Rows = dict[str, dict | None]  # file -> row of results.csv; None: an image that is not there


def find_images(runs: list[RunSettings], folder: Path, overwrite: bool) -> list[dict | None]:
    """Return the records of the runs' images, None for those that are to be generated.

    Raises ValueError if an image of other settings, or of nobody's, has the name of one of them;
    with `overwrite` it is to be generated.
    """
    images = []
    for run in runs:
        try:
            images.append(read_image(run, folder / run.file_name))
        except ValueError:
            if not overwrite:
                raise
            images.append(None)
    return images


def read_image(run: RunSettings, path: Path) -> dict | None:
    """Return the record of a run's image, None if there is none. Raises ValueError if the image is
    another one."""
    try:
        record = records.read_record(path)
        before = image_settings(record)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else "it carries no complete settings"
        raise ValueError(
            f"{path} is in the way: {reason}; try --overwrite, or another --output_dir"
        ) from error
    for name, value in run.identity.items():
        if value != before.get(name):
            raise ValueError(
                f"--{name} is {value!r}, but {path} was drawn with {before.get(name)!r}, expected "
                "the same, --overwrite, or another --output_dir"
            )
    return record


def check_version(rows: list[dict], folder: Path) -> None:
    """Raise ValueError for rows of an earlier version, which named its images by another rule."""
    if any(not row["settings"] for row in rows):
        raise ValueError(
            f"{folder / RESULTS} is of an earlier version of this program, which can only be read; "
            "give another --output_dir, or move the folder away"
        )


def open_folder(runs: list[RunSettings], folder: Path, overwrite: bool) -> tuple[Rows, list[str]]:
    """Make a folder's tables and JSONs say what its images say, after a kill at any moment.

    The folder is locked by the caller. Returns its rows, new ones last, and the names of the images
    that are to be generated. Raises ValueError, OSError.
    """
    earlier = read_rows(folder)
    check_version(earlier, folder)
    rows: Rows = {row["file"]: row for row in earlier}
    names = []
    for run, record in zip(runs, find_images(runs, folder, overwrite), strict=True):
        rows[run.file_name] = to_row(run, record) if record else None
        beside = (folder / run.file_name).with_suffix(".json")
        if record is None:
            names.append(run.file_name)
            beside.unlink(missing_ok=True)
        elif not beside.exists() or beside.read_bytes() != records.to_json(record):
            records.write_atomically({beside: records.to_json(record)})
    for part in folder.glob(".*.part"):
        owner = part.name[1:].rsplit(".", 2)[0]  # .NAME.PROCESS.part
        tables = owner in (RESULTS, "summary.txt") or owner.startswith("comparison_")
        if tables or Path(owner).with_suffix(".png").name in rows:
            part.unlink()
    write_rows(folder, rows)
    return rows, names


def write_rows(folder: Path, rows: Rows) -> None:
    """Write results.csv. Raises OSError."""
    write_table(folder / RESULTS, COLUMNS, [row for row in rows.values() if row])


def run_sweep(runs: list[RunSettings], folder: Path, overwrite: bool) -> int | None:
    """Generate the images that are not there yet, and write results.csv.

    Of several processes each generates its share; with --ulysses or --ring all of them each image.
    Returns how many images failed, in the main process. Raises ValueError, OSError, UserError.
    """
    rank, _ = distributed.rank_and_world_size()
    together = runs[0].processes > 1
    distributed.check_start(runs[0])
    with ExitStack() as stack:
        rows, names = {}, []
        if rank == 0:  # the others wait for it in `init_processes`
            records.check_writable(folder)
            stack.enter_context(lock_folder(folder))
            rows, names = open_folder(runs, folder, overwrite)
        state = distributed.init_processes(runs[0])
        [names] = broadcast_object_list([names])
        there, whole = len(runs) - len(names), f"{len(runs)}"
        print(f"{folder}: images {len(runs)}, there already {there}")
        share = names if together else names[rank :: state.num_processes]
        if len(share) < len(names):
            there, whole = 0, f"{len(share)} of this process"
        labels = [f"[{there + number}/{whole}]" for number in range(1, 1 + len(share))]
        by_name = {run.file_name: run for run in runs}
        mine = [by_name[name] for name in share]
        new = generate_all(mine, labels, folder, rows, state) if mine else {}
        if not together:
            new = {row["file"]: row for row in gather_object([*new.values()])}
        state.destroy_process_group()  # not after an error: the others may not be there any more
        if rank > 0:
            return None
        write_rows(folder, rows | new)
        return sum(bool(row["error"]) for row in new.values())


def generate_all(
    runs: list[RunSettings],
    labels: list[str],
    folder: Path,
    rows: Rows,
    state: PartialState,
) -> Rows:
    """Load a pipeline, generate images, and return their rows; one that fails is noted there.

    Args:
        runs: of the images that this process generates.
        labels: of the lines that are printed of them.
        rows: of the folder, which the main process writes after each image.
        state: of `distributed.init_processes`. Where all processes generate each image, an error ends the
            run, since the others would wait for this one.

    Raises:
        OSError: a full disk, say, would fail every other image too.
    """
    main, together = state.is_main_process, runs[0].processes > 1
    pipe = load_for_run(runs[0], max(run.height * run.width for run in runs), state)
    pipe.set_progress_bar_config(disable=not main)
    encode, new = prompt_encoder(pipe, runs), {}
    start, done, left = time.perf_counter(), 0, sum(map(estimate_work, runs))
    for label, run in zip(labels, runs, strict=True):
        failure, generated = try_generate(pipe, run, encode, together)
        if generated and (main or not together):
            records.save_image(*generated, folder / run.file_name)
        new[run.file_name] = to_row(run, generated and generated[1], failure)
        if main:
            write_rows(folder, rows | new)
        done, left = done + estimate_work(run), left - estimate_work(run)
        seconds = (time.perf_counter() - start) * left / done
        rest = f", about {format_duration(seconds)} left" if left else ""
        print(f"{label} {run.file_name}  {failure or 'done'}{rest}", flush=True)
    return new


def try_generate(
    pipe, run: RunSettings, encode: Callable, together: bool
) -> tuple[str, tuple | None]:
    """Why an image could not be generated, or ""; and the image with its record."""
    try:
        return "", generate_with_record(pipe, run, prepare_pipeline(pipe, run), encode)
    except Exception as error:  # the fault of one setting, unless it would hit every other too
        fatal = isinstance(error, OSError | errors.UserError) or errors.is_compiler_error(error)
        if together or fatal:
            raise
        failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if errors.is_out_of_memory(error):
            failure = explain_out_of_memory(pipe, run)
    gc.collect()  # outside of the handler, whose traceback holds on to the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure, None


def estimate_work(run: RunSettings) -> int:
    """Steps times pixels, by which the time that is left is estimated."""
    return run.steps * run.height * run.width


def describe_plan(runs: list[RunSettings], folder: Path, overwrite: bool) -> str:
    """What a sweep would draw, and about how long that takes.

    Raises ValueError as `open_folder` does.
    """
    check_version(read_rows(folder), folder)
    images = find_images(runs, folder, overwrite)
    pairs = [*zip(runs, images, strict=True)]
    done = [(run, record) for run, record in pairs if record]
    lines = [f"  {run.file_name}{'  (there)' * bool(record)}" for run, record in pairs]
    lines.append(f"images {len(runs)}, there already {len(done)}")
    if done:
        rate = sum(record["seconds"] for _, record in done)
        rate /= sum(estimate_work(run) for run, _ in done)
        rest = sum(estimate_work(run) for run, record in pairs if not record)
        lines[-1] += f"; the rest: about {format_duration(rest * rate)} at the pace of those"
    else:
        lines[-1] += "; how long that takes can be said once one is there"
    return "\n".join(lines)


def format_duration(seconds: float) -> str:
    """59 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
