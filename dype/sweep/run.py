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
from dype.errors import UserError
from dype.pipelines import distributed
from dype.sampling import records
from dype.sampling.run import generate_with_record, load, out_of_memory, prepare
from dype.sampling.sample import prompt_encoder
from dype.sampling.settings import RunSettings, image_settings
from dype.sweep.results import COLUMNS, RESULTS, locked, read_own_rows, to_row, write_table

Rows = dict[str, dict | None]  # file -> row of results.csv; None: an image that is not there


def find_finished(
    runs: list[RunSettings], folder: Path, overwrite: bool
) -> list[tuple[RunSettings, dict | None]]:
    """The runs, each with the record of its image, None where that is to be generated.

    Raises ValueError if an image of other settings, or of nobody's, has the name of one of them;
    with `overwrite` it counts as not there.
    """
    found = []
    for run in runs:
        path, record = folder / run.file_name, None
        try:
            record = records.load(path)
            now, before = image_settings(run.record), image_settings(record)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            record = None
            if not overwrite:
                raise ValueError(
                    f"{path} is in the way: {error}; try --overwrite, or another --output_dir"
                ) from error
        else:
            differing = [name for name in now if now[name] != before.get(name)]
            if differing and not overwrite:
                name = differing[0]
                raise ValueError(
                    f"--{name} is {now[name]!r}, but {path} was drawn with {before.get(name)!r}, "
                    "expected the same, --overwrite, or another --output_dir"
                )
            record = None if differing else record
        found.append((run, record))
    return found


def open_folder(runs: list[RunSettings], folder: Path, overwrite: bool) -> tuple[Rows, list[str]]:
    """Make a folder's tables and JSONs say what its images say, after a kill at any moment.

    The folder is locked by the caller. Returns its rows, those of other sweeps first, and the names
    of the images that are to be generated. Raises ValueError, OSError.
    """
    rows: Rows = {row["file"]: row for row in read_own_rows(folder)}
    names = []
    for run, record in find_finished(runs, folder, overwrite):
        rows.pop(run.file_name, None)
        rows[run.file_name] = to_row(run, record) if record else None
        beside = (folder / run.file_name).with_suffix(".json")
        if record is None:
            names.append(run.file_name)
        elif not beside.exists() or beside.read_bytes() != records.text_of(record):
            records.write({beside: records.text_of(record)})
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
    main, together = distributed.rank_and_world_size()[0] == 0, runs[0].ulysses * runs[0].ring > 1
    with ExitStack() as stack:
        rows, names = {}, []
        if main:  # the others wait for it in `join`
            records.check_writable(folder)
            stack.enter_context(locked(folder))
            rows, names = open_folder(runs, folder, overwrite)
        state = distributed.join(runs[0], alone=False)
        [names] = broadcast_object_list([names])
        there = len(runs) - len(names)
        print(f"{folder}: pictures {len(runs)}, there already {there}")
        with state.split_between_processes(names) as share:
            chosen = {*(names if together else share)}
        mine = [run for run in runs if run.file_name in chosen]
        whole = f"{len(runs)}"
        if len(mine) < len(names):
            there, whole = 0, f"{len(mine)} of this process"
        labels = [f"[{there + number}/{whole}]" for number in range(1, 1 + len(mine))]
        new = generate_all(mine, labels, folder, rows, state, together) if mine else {}
        if not together:
            new = {row["file"]: row for row in gather_object([*new.values()])}
        state.destroy_process_group()  # not after an error: the others may not be there any more
        if main:
            write_rows(folder, rows | new)
        return sum(bool(row["error"]) for row in new.values()) if main else None


def generate_all(
    runs: list[RunSettings],
    labels: list[str],
    folder: Path,
    rows: Rows,
    state: PartialState,
    together: bool,
) -> Rows:
    """Load a pipeline, generate images, and return their rows; one that fails is noted there.

    Args:
        runs: of the images that this process generates.
        labels: of the lines that are printed of them.
        rows: of the folder, which the main process writes after each image.
        state: of `distributed.join`.
        together: whether all processes generate each image. An error then ends the run, since the
            others would wait for this one.

    Raises:
        OSError: a full disk, say, would fail every other image too.
    """
    main = state.is_main_process
    pipe = load(runs[0], max(run.height * run.width for run in runs), state)
    pipe.set_progress_bar_config(disable=not main)
    encode, new = prompt_encoder(pipe, runs), {}
    start, done, left = time.perf_counter(), 0, sum(map(estimate_work, runs))
    for label, run in zip(labels, runs, strict=True):
        failure, generated = attempt(pipe, run, encode, together)
        if generated and (main or not together):
            records.save(*generated, folder / run.file_name)
        new[run.file_name] = to_row(run, generated and generated[1], failure)
        if main:
            write_rows(folder, rows | new)
        done, left = done + estimate_work(run), left - estimate_work(run)
        seconds = (time.perf_counter() - start) * left / done
        rest = f", about {span(seconds)} left" if left else ""
        print(f"{label} {run.file_name}  {failure or 'done'}{rest}", flush=True)
    return new


def attempt(pipe, run: RunSettings, encode: Callable, together: bool) -> tuple[str, tuple | None]:
    """Why an image could not be generated, or ""; and the image with its record."""
    try:
        return "", generate_with_record(pipe, run, prepare(pipe, run), encode)
    except Exception as error:  # the fault of one setting, unless it would hit every other too
        alone = isinstance(error, OSError | UserError) or errors.of_compiler(
            error
        )  # no fault of its settings
        if together or alone:
            raise
        failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if errors.ran_out(error):
            failure = out_of_memory(pipe, run)
    gc.collect()  # outside of the handler, whose traceback holds on to the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure, None


def estimate_work(run: RunSettings) -> int:
    """Steps times pixels, by which the time that is left is estimated."""
    return run.steps * run.height * run.width


def outline(runs: list[RunSettings], folder: Path, overwrite: bool) -> str:
    """What a sweep would draw, and about how long that takes.

    Raises ValueError as `open_folder` does.
    """
    read_own_rows(folder)
    found = find_finished(runs, folder, overwrite)
    done = [(run, record) for run, record in found if record]
    lines = [f"  {run.file_name}{'  (there)' * bool(record)}" for run, record in found]
    lines.append(f"pictures {len(runs)}, there already {len(done)}")
    if done:
        rate = sum(record["seconds"] for _, record in done)
        rate /= sum(estimate_work(run) for run, _ in done)
        rest = sum(estimate_work(run) for run, record in found if not record)
        lines[-1] += f"; the rest: about {span(rest * rate)} at the pace of those"
    else:
        lines[-1] += "; how long that takes can be said once one is there"
    return "\n".join(lines)


def span(seconds: float) -> str:
    """59 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
