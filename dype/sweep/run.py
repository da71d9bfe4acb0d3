"""Run a sweep: generate each image once, also after an interruption.

An image is finished when its PNG exists. Its JSON is written before the PNG. results.csv is written
anew after each image, and its rows come from the records.
"""

import gc
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from dype import errors
from dype.pipelines import distributed
from dype.pipelines.fingerprint import find_changed_weights
from dype.pipelines.processes import rank_and_world_size
from dype.sampling import records
from dype.sampling.progress import ImageBar, show_word
from dype.sampling.run import (
    explain_out_of_memory,
    generate_with_record,
    image_bar,
    load_for_run,
    prepare_pipeline,
)
from dype.sampling.sample import prompt_encoder
from dype.sampling.settings import RunSettings, image_settings, weight_sources
from dype.sweep.clock import SweepClock, bar_labels
from dype.sweep.results import COLUMNS, RESULTS, lock_folder, read_rows, to_row, write_table
from dype.sweep.viewer import PAGE

Rows = dict[str, dict | None]  # file -> row of results.csv; None: not generated yet


def existing_records(runs: list[RunSettings], folder: Path, overwrite: bool) -> list[dict | None]:
    """Return the record of each run's image; None for an image that must be generated.

    Args:
        runs: settings of the images.
        folder: folder of the sweep.
        overwrite: generate images again that have other settings, other weights or no record.

    Raises:
        ValueError: such an image exists, and `overwrite` is False.
    """
    result = []
    for run in runs:
        try:
            result.append(read_existing_record(run, folder / run.file_name))
        except ValueError:
            if not overwrite:
                raise
            result.append(None)
    return result


def read_existing_record(run: RunSettings, path: Path) -> dict | None:
    """Read the record of a run's image; return None if the image does not exist.

    The record of a PNG without text is its JSON, if that is of the same size.
    Raises ValueError if the image has other settings, other weights or no record.
    """
    try:
        record, source = records.find_record(path)
        existing = image_settings(record)
        size = existing["width"], existing["height"]
        if source != path and not has_size(path, size):
            raise ValueError(f"it carries no settings, and is not of the size in {source.name}")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, ValueError) else "it carries no complete settings"
        raise ValueError(
            f"{path} is in the way: {reason}; try --overwrite, or another --output_dir"
        ) from error
    if existing["model"] == run.model:  # first, because other weights have other defaults
        check_weights(run, record, path)
    for name, value in run.identity.items():
        # earlier versions recorded the guidance of a model that takes none
        if value != existing.get(name) and (name != "guidance" or run.entry.guidance):
            raise ValueError(
                f"--{name} is {value!r}, but {path} was generated with {existing.get(name)!r}, "
                "expected the same, --overwrite, or another --output_dir"
            )
    return record


def has_size(path: Path, size: tuple[int, int]) -> bool:
    """Return whether a file is an image of a size, width first."""
    try:
        return records.read_size(path) == size
    except OSError:
        return False


def check_weights(run: RunSettings, record: dict, path: Path) -> None:
    """Raise ValueError if the weights of an image were others of the same name.

    Args:
        run: settings of an image of the sweep; all have the same model and LoRAs.
        record: record of an image in the folder of the sweep.
        path: of that image.
    """
    expected, sources = sources_of_record(run.record), sources_of_record(record)
    common = [part for part in expected if expected[part] == sources.get(part)]
    changed = find_changed_weights(record, {part: run.weight_sources[part] for part in common})
    if changed:
        raise ValueError(
            f"{changed} has other weights than when {path} was generated, expected the same, "
            "--overwrite, or another --output_dir"
        )


def sources_of_record(record: dict) -> dict[str, tuple]:
    """Return the names and revisions of the weights in a record. Raises as `image_settings`."""
    flags = record["flags"]
    return weight_sources(flags["model"], flags)


def read_folder(runs: list[RunSettings], folder: Path, overwrite: bool) -> list[dict]:
    """Return the rows of results.csv, of which each image can stand beside those of a sweep.

    Args:
        runs: settings of all images of the sweep.
        folder: folder of the sweep.
        overwrite: accept images with other weights.

    Raises:
        ValueError: an image that is not of this sweep has other weights of the same name, or the
            table is of an earlier version.
    """
    rows = read_rows(folder)
    check_version(rows, folder)
    paths = {folder / row["file"] for row in rows} - {folder / run.file_name for run in runs}
    for path in sorted(paths) if not overwrite else ():
        try:
            record = records.read_record(path)
            sources_of_record(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # because such an image is nothing that this sweep needs
        check_weights(runs[0], record, path)
    return rows


def check_version(rows: list[dict], folder: Path) -> None:
    """Raise ValueError for rows of an earlier version, which used other file names."""
    if any(not row["settings"] for row in rows):
        raise ValueError(
            f"{folder / RESULTS} is of an earlier version of this program and can only be read; "
            "give another --output_dir, or move the folder away"
        )


def open_folder(runs: list[RunSettings], folder: Path, overwrite: bool) -> tuple[Rows, list[str]]:
    """Repair the table and the JSONs of a folder from its images, after a kill at any moment.

    The caller must have locked the folder.

    Args:
        runs: settings of all images of the sweep.
        folder: folder of the sweep.
        overwrite: as in `existing_records`.

    Returns:
        The rows of results.csv, new ones last, and the file names of the images to generate.
        Images that are not of this sweep keep their rows, but not those whose file is gone.

    Raises:
        ValueError: an image or the table is in the way.
        OSError: a file cannot be read or written.
    """
    earlier, current = read_folder(runs, folder, overwrite), {run.file_name for run in runs}
    rows: Rows = {
        row["file"]: row
        for row in earlier
        if row["error"] or row["file"] in current or (folder / row["file"]).exists()
    }
    names = []
    for run, record in zip(runs, existing_records(runs, folder, overwrite), strict=True):
        rows[run.file_name] = to_row(run, record) if record else None
        json_path = (folder / run.file_name).with_suffix(".json")
        if record is None:
            names.append(run.file_name)
            json_path.unlink(missing_ok=True)
        elif not json_path.exists() or json_path.read_bytes() != records.to_json(record):
            records.write_atomically({json_path: records.to_json(record)})
    images = {
        records.shorten_name(Path(name).with_suffix(suffix).name, records.MAX_TEMPORARY_NAME)
        for name in rows
        for suffix in (".png", ".json")
    }
    for temporary in folder.glob(".*.part"):
        target = temporary.name[1:].rsplit(".", 2)[0]  # the name is .TARGET.PROCESS.part
        is_table = target in (RESULTS, "summary.txt", PAGE) or target.startswith("comparison_")
        if is_table or target in images:
            temporary.unlink()
    write_rows(folder, rows)
    return rows, names


def write_rows(folder: Path, rows: Rows) -> None:
    """Write results.csv. Raises OSError."""
    write_table(folder / RESULTS, COLUMNS, [row for row in rows.values() if row])


def run_sweep(runs: list[RunSettings], folder: Path, overwrite: bool) -> int | None:
    """Generate the unfinished images of a sweep and write results.csv.

    Several processes divide the images between them. With --ulysses or --ring they generate each
    image together.

    Args:
        runs: settings of all images of the sweep.
        folder: folder of the sweep.
        overwrite: as in `existing_records`.

    Returns:
        The number of failed images in the main process, None in the others.

    Raises:
        ValueError: an image or the table is in the way.
        OSError: a file cannot be read or written.
        UserError: the settings do not fit the checkpoint or the processes.
    """
    rank, _ = rank_and_world_size()
    together = runs[0].processes > 1
    distributed.check_start(runs[0])
    with ExitStack() as stack:
        rows, names = {}, []
        if rank == 0:  # the other processes wait in `init_processes`
            records.check_writable(folder, max((run.file_name for run in runs), key=len))
            stack.enter_context(lock_folder(folder))
            rows, names = open_folder(runs, folder, overwrite)
        state = distributed.init_processes(runs[0])
        [names] = broadcast_object_list([names])
        finished, total = len(runs) - len(names), f"{len(runs)}"
        print(f"{folder}: {len(runs)} images, {finished} finished")
        share = names if together else names[rank :: state.num_processes]
        if len(share) < len(names):
            finished, total = 0, f"{len(share)} of this process"
        labels = [f"[{finished + number}/{total}]" for number in range(1, 1 + len(share))]
        by_name = {run.file_name: run for run in runs}
        share_runs = [by_name[name] for name in share]
        new = generate_all(share_runs, labels, folder, rows, state) if share_runs else {}
        if not together:
            new = {row["file"]: row for row in gather_object([*new.values()])}
        # Not in a `finally`, because after an error the other processes may have ended.
        state.destroy_process_group()
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
    """Load a pipeline, generate images and return their rows, with the reason of each failure.

    Args:
        runs: settings of the images that this process generates.
        labels: label of each image in the progress lines.
        folder: folder of the sweep.
        rows: rows of results.csv, which the main process writes after each image.
        state: from `distributed.init_processes`. If the processes generate each image together,
            an error ends the run, because the other processes would wait for this one.

    Raises:
        OSError: an error that would fail every other image too, as a full disk.
        UserError: the settings do not fit the checkpoint.
    """
    is_main, together = state.is_main_process, runs[0].processes > 1
    pipe = load_for_run(runs[0], max(run.height * run.width for run in runs), state)
    with show_word("encoding the prompts", is_main):
        encode, new = prompt_encoder(pipe, runs), {}
    clock = SweepClock(runs)
    for label, text, run in zip(labels, bar_labels(runs, labels), runs, strict=True):
        time_left = partial(clock.describe, run)
        with image_bar(run, text, visible=is_main, time_left=time_left) as bar:
            failure, generated = try_generate(pipe, run, encode, together, bar)
        if generated and (is_main or not together):
            try:
                records.save_image(*generated, folder / run.file_name)
            except OSError as error:  # its sentence says where the image is now
                row = {run.file_name: to_row(run, error=str(error))}
                if is_main:
                    with suppress(OSError):
                        write_rows(folder, rows | new | row)
                raise
        new[run.file_name] = to_row(run, generated and generated[1], failure)
        if is_main:
            write_rows(folder, rows | new)
        estimate = clock.finish(run, bar.compile_seconds)
        print(f"{label} {run.file_name}  {failure or 'done'}{estimate}", flush=True)
    return new


def try_generate(
    pipe, run: RunSettings, encode: Callable, together: bool, bar: ImageBar
) -> tuple[str, tuple | None]:
    """Generate an image; return the reason of a failure or "", and the image with its record.

    Args:
        pipe: loaded pipeline.
        run: settings of the image.
        encode: function from a text to its embeddings.
        together: the processes generate each image together, so every error is raised.
        bar: bar of the image.
    """
    try:
        return "", generate_with_record(pipe, run, prepare_pipeline(pipe, run), encode, bar)
    except Exception as error:  # an error of one setting must not end the sweep
        fatal = isinstance(error, OSError | errors.UserError) or errors.is_compiler_error(error)
        if together or fatal:
            raise
        is_sentence = isinstance(error, errors.UnavailableError)
        failure = f"{error}" if is_sentence else f"{type(error).__name__}: {error}"
        failure = " ".join(failure.split())[:300]
        if errors.is_out_of_memory(error):
            failure = explain_out_of_memory(pipe, run)
    gc.collect()  # outside of the handler, because its traceback refers to the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure, None
