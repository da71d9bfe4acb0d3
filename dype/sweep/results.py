"""results.csv and metrics.csv, and how their rows are grouped and labeled."""

import csv
import io
import math
import os
import statistics
from contextlib import contextmanager
from pathlib import Path

from dype.config import CONFIG_FLAGS
from dype.sampling import records
from dype.sampling.settings import (
    RUN_FLAGS,
    RunSettings,
    format_name_part,
    format_value,
)

RESULTS, METRICS = "results.csv", "metrics.csv"
# what may vary over a sheet -> how its values are labeled; the last that varies goes across
LABELS = {"model": "{}"}
LABELS |= {row.name: row.label for row in [*CONFIG_FLAGS, *RUN_FLAGS] if row.label}
LABELS |= {"settings": "{}", "seed": LABELS.pop("seed"), "prompt": "{}"}
REPLICATES = ("seed", "prompt")  # of one setting
COLUMNS = ["file", "model", "height", "width", *list(LABELS)[1:], "seconds", "peak_memory", "error"]
METRIC_COLUMNS = ["file", "metric", "value", "protocol"]


def to_row(run: RunSettings, record: dict | None = None, error: str = "") -> dict:
    """Return a row of results.csv: of an image with its record, or of one that failed."""
    row = {name: run.identity.get(name) for name in LABELS}
    if row["attention_scale"] is None and run.config.method != "base":
        row["attention_scale"] = "own"
    row |= {"file": run.file_name, "height": run.height, "width": run.width, "error": error}
    row["method"] = run.config.name
    parts = [
        f"{key} {format_name_part(run.changed[key])}" for key in run.changed if key not in LABELS
    ]
    row["settings"] = ", ".join(parts) or "defaults"
    row |= {name: (record or {}).get(name) for name in ("seconds", "peak_memory")}
    return {name: "" if value is None else format_value(value) for name, value in row.items()}


def read_rows(folder: Path) -> list[dict]:
    """Return the rows of results.csv, every column filled, with metrics.csv joined by metric.

    A last line that a kill of an earlier version left half is none. Raises ValueError if one of
    the files is no table of this program.
    """
    path, metrics = folder / RESULTS, {}
    rows = read_table(path, ["file", "height", "width", "seconds", "error"])
    for value in read_metrics(folder):
        metrics.setdefault(value["file"], {})[value["metric"]] = value["value"]
    try:
        for row in rows:
            int(row["height"]), int(row["width"]), float(row["seconds"] or len(row["error"]))
    except ValueError as error:
        raise ValueError(f"{path} is no table of this program; move it away") from error
    filled = [{name: row.get(name, "") for name in COLUMNS} for row in rows]
    return [metrics.get(row["file"], {}) | row for row in filled]


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.csv. Raises ValueError for another table and for what is no number."""
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
    """The rows of a CSV file with at least these columns; none where there is no file.

    Raises ValueError for another table.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text("utf-8")
        if path.name == RESULTS and "settings" not in text.partition("\n")[0]:
            text = text[: text.rfind("\n") + 1]  # earlier versions appended: a kill left half
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(table)
        broken = any(None in row or None in row.values() for row in rows)
        if broken or not {*columns} <= {*(table.fieldnames or [])}:
            raise ValueError("other columns")
    except (ValueError, csv.Error) as error:  # no UTF-8, no CSV
        raise ValueError(f"{path} is no table of this program; move it away") from error
    return rows


def write_table(path: Path, columns: list[str], rows) -> None:
    """Write a CSV file, whole or not at all. Raises OSError."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, "", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    records.write_atomically({path: text.getvalue().encode()})


@contextmanager
def lock_folder(folder: Path):
    """One sweep at a time in a folder; a killed one holds no lock. Raises OSError."""
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
    """Whether a setting differs, and not just because each method has its own."""
    of = (lambda one: one["method"]) if name.startswith("dype_") else (lambda one: None)
    pairs = {(of(one), one[name]) for one in rows if one[name]}
    return len(pairs) > len({method for method, _ in pairs})


def setting_labels(names: list[str], values) -> list[str]:
    return [LABELS[name].format(value) for name, value in zip(names, values, strict=True) if value]


def group_by_setting(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each setting, of which seeds and prompts are samples, by what sets it apart."""
    varied = [
        name for name in LABELS if name not in REPLICATES and takes_several_values(rows, name)
    ]
    shown = ["method", *(name for name in varied if name != "method")]
    found: dict[str, list[dict]] = {}
    for one in rows:
        parts = [
            f"{one['height']}x{one['width']}",
            *setting_labels(shown, [one[name] for name in shown]),
        ]
        found.setdefault(", ".join(parts), []).append(one)
    return found


def format_mean_std(numbers: list[float], digits: int) -> str:
    """Mean and, of two or more, standard deviation."""
    if not numbers:
        return "-"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    more = "" if deviation is None else f" ({deviation:.{digits}f})"
    return f"{statistics.mean(numbers):.{digits}f}{more}"
