"""Read and write results.csv and metrics.csv; group and label their rows."""

import csv
import io
import math
import os
import statistics
from contextlib import contextmanager
from pathlib import Path

from dype.config import CONFIG_FLAGS
from dype.sampling import records
from dype.sampling.settings import RUN_FLAGS, RunSettings, format_name_part, format_value

RESULTS, METRICS = "results.csv", "metrics.csv"
# setting that may vary over a sheet -> format of its label; the last that varies is the columns
LABELS = {"model": "{}"}
LABELS |= {row.name: row.label for row in [*CONFIG_FLAGS, *RUN_FLAGS] if row.label}
LABELS |= {"settings": "{}", "seed": LABELS.pop("seed"), "prompt": "{}"}
REPLICATES = ("seed", "prompt")  # samples of one setting
COLUMNS = ["file", "model", "height", "width", *list(LABELS)[1:], "seconds", "peak_memory", "error"]
METRIC_COLUMNS = ["file", "metric", "value", "protocol"]


def check_columns(columns: str | None) -> None:
    """Raise ValueError if --cols is neither a positive number nor a setting."""
    if columns not in (None, *LABELS) and not (columns.isdecimal() and int(columns) > 0):
        raise ValueError(
            f"--cols is {columns!r}, expected a number above 0 or one of {', '.join(LABELS)}"
        )


def to_row(run: RunSettings, record: dict | None = None, error: str = "") -> dict:
    """Return a row of results.csv.

    Args:
        run: settings of the image.
        record: record of the image; None if it failed.
        error: reason of the failure; "" if there is none.
    """
    row = {name: run.identity.get(name) for name in LABELS}
    name_own_scale(row)
    row |= {"file": run.file_name, "height": run.height, "width": run.width, "error": error}
    row["method"] = run.config.name
    changes = [(key, value) for key, value in run.non_defaults.items() if key not in LABELS]
    words = [f"{key} {format_name_part(key, value)}" for key, value in changes]
    row["settings"] = ", ".join(words) or "defaults"
    row |= {name: (record or {}).get(name) for name in ("seconds", "peak_memory")}
    return {name: "" if value is None else format_value(value) for name, value in row.items()}


def name_own_scale(settings: dict) -> None:
    """Set the attention scale and its path to "own" where they are the method's own.

    settings: values by name, as of `RunSettings.identity`; changed in place.
    """
    if settings["attention_scale"] is None and settings["method"] != "base":
        settings["attention_scale"] = "own" if settings["attention_path"] is None else None
        settings["attention_path"] = settings["attention_path"] or "own"


def read_rows(folder: Path) -> list[dict]:
    """Read results.csv with all columns, and join the values of metrics.csv by metric.

    Raises ValueError if one of the files is not a table of this program.
    """
    path, metrics = folder / RESULTS, {}
    rows = read_table(path, ["file", "height", "width", "seconds", "error"])
    for value in read_metrics(folder):
        metrics.setdefault(value["file"], {})[value["metric"]] = value["value"]
    try:
        for row in rows:
            int(row["height"]), int(row["width"]), float(row["seconds"] or len(row["error"]))
            float(row.get("peak_memory") or 0)
    except ValueError as error:
        raise ValueError(f"{path} is no table of this program; move it away") from error
    complete = [{name: row.get(name, "") for name in COLUMNS} for row in rows]
    return [metrics.get(row["file"], {}) | row for row in complete]


def read_metrics(folder: Path) -> list[dict]:
    """Read metrics.csv. Raises ValueError for another table or a value that is not a number."""
    path = folder / METRICS
    rows = read_table(path, METRIC_COLUMNS)
    for row in rows:
        try:
            finite = math.isfinite(float(row["value"]))
        except ValueError:
            finite = False
        if not finite:
            raise ValueError(
                f"{path} has {row['metric']} {row['value']!r} of {row['file']}, expected a number"
            )
    return rows


def read_table(path: Path, columns: list[str]) -> list[dict]:
    """Read a CSV file with at least these columns; return [] if the file does not exist.

    Raises ValueError if it is not such a table.
    """
    if not path.exists():
        return []
    csv.field_size_limit(2**31 - 1)  # because a prompt may be longer than csv's limit
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets write a byte order mark
        if path.name == RESULTS and "settings" not in text.partition("\n")[0]:
            # Earlier versions appended lines, so a kill may have left half of the last one.
            text = text[: text.rfind("\n") + 1]
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(table)
        broken = any(None in row or None in row.values() for row in rows)
        if broken or not {*columns} <= {*(table.fieldnames or [])}:
            raise ValueError("other columns")
    except (ValueError, csv.Error) as error:  # not UTF-8, or not CSV
        raise ValueError(f"{path} is no table of this program; move it away") from error
    return rows


def write_table(path: Path, columns: list[str], rows) -> None:
    """Write a CSV file completely or not at all. Raises OSError.

    Args:
        path: the file.
        columns: names of the columns.
        rows: a dict per row; further keys are ignored, missing values are empty.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, "", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    # An error may quote bytes that are not UTF-8.
    records.write_atomically({path: text.getvalue().encode(errors="backslashreplace")})


@contextmanager
def lock_folder(folder: Path):
    """Lock a folder for one sweep; the lock ends with the process. Raises OSError."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"another run is at work in {folder}; wait for it, or use another folder"
            ) from error
        yield
    finally:
        os.close(handle)


def takes_several_values(rows: list[dict], name: str) -> bool:
    """Return True if a setting has several values, or for dype_* several within one method."""
    per_method = name.startswith("dype_")  # because each method has its own default
    pairs = {(row["method"] if per_method else None, row[name]) for row in rows if row[name]}
    return len(pairs) > len({method for method, _ in pairs})


def setting_labels(names: list[str], values) -> list[str]:
    """Return the labels of settings with these values; empty values have no label."""
    return [LABELS[name].format(value) for name, value in zip(names, values, strict=True) if value]


def group_by_setting(rows: list[dict]) -> dict[str, list[dict]]:
    """Group rows of results.csv by size, method and the other settings that vary.

    The keys are the labels of these settings. Seeds and prompts are samples of one setting.
    """
    varying = [
        name for name in LABELS if name not in REPLICATES and takes_several_values(rows, name)
    ]
    names = ["method", *(name for name in varying if name != "method")]
    groups: dict[str, list[dict]] = {}
    for row in rows:
        labels = setting_labels(names, [row[name] for name in names])
        key = ", ".join([f"{row['width']}x{row['height']}", *labels])
        groups.setdefault(key, []).append(row)
    return groups


def format_mean_std(numbers: list[float], digits: int) -> str:
    """Format the mean of numbers and, for two or more, the standard deviation in parentheses."""
    if not numbers:
        return "-"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    suffix = "" if deviation is None else f" ({deviation:.{digits}f})"
    return f"{statistics.mean(numbers):.{digits}f}{suffix}"
