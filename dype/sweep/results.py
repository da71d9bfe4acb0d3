"""results.csv, and how its rows are grouped and labelled."""

import csv
import io
import os
import statistics
from contextlib import contextmanager
from pathlib import Path

from dype.sampling import records

RESULTS = "results.csv"
# what may be swept -> its part of the file name; sheets and tables take them in this order
AXES = {
    "dype_scale": "scale",
    "dype_exponent": "exponent",
    "dype_start_sigma": "start",
    "cutoff": "cutoff",
    "attention_scale": "attention",
    "steps": "steps",
    "guidance": "guidance",
    "true_cfg": "cfg",
    "pass2_strength": "pass2",
    "pass3_strength": "pass3",
}
COLUMNS = ["file", "model", "height", "width", "method", *AXES, "multipass", "seed", "prompt"]
COLUMNS += ["seconds", "peak_memory", "error"]
# what may vary over a sheet -> how its values are labelled
LABELS = {
    "model": "{}",
    "method": "{}",
    "dype_scale": "scale {}",
    "dype_exponent": "exponent {}",
    "dype_start_sigma": "start {}",
    "cutoff": "cutoff {}",
    "attention_scale": "attention scale {}",
    "steps": "{} steps",
    "guidance": "guidance {}",
    "true_cfg": "true CFG {}",
    "multipass": "{}",
    "pass2_strength": "strength {}",
    "pass3_strength": "third {}",
    "seed": "seed {}",
    "prompt": "{}",
}
SAMPLES = ("seed", "prompt")  # of one setting


def short(value: float) -> str:
    """1.5 -> 1.5, 2.0 -> 2: in full, so that two values never look the same."""
    return str(value).removesuffix(".0")


def read_rows(folder: Path) -> list[dict]:
    """The rows of results.csv, every column filled; a line that a kill left half is none.

    Raises ValueError if it is no such table.
    """
    path = folder / RESULTS
    if not path.exists():
        return []
    try:
        whole = path.read_text("utf-8").rpartition("\n")[0]
        rows = list(csv.DictReader(io.StringIO(whole, newline="")))
        rows = [one for one in rows if None not in one and None not in one.values()]
        for one in rows:
            int(one["height"]), int(one["width"]), float(one["seconds"] or len(one["error"]))
    except (ValueError, KeyError, csv.Error) as error:  # no UTF-8, no columns of ours, no CSV
        raise ValueError(f"{path} is no table of a sweep; move it away") from error
    return [dict.fromkeys(COLUMNS, "") | one for one in rows]


def table(rows: list[dict], names: list[str]) -> str:
    """Rows as CSV, without the header."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, names, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def append(path: Path, found: dict) -> None:
    """Add a row to results.csv, in the order of its header: at once, as other processes may too."""
    with path.open(encoding="utf-8", newline="") as file:
        names = next(csv.reader(file))
    with path.open("ab", buffering=0) as file:
        file.write(table([found], names).encode())


def rewrite(folder: Path, rows: list[dict]) -> None:
    """results.csv anew, whole or not at all; with the columns that others have put in."""
    names = dict.fromkeys([*COLUMNS, *(name for one in rows for name in one)])
    records.write({folder / RESULTS: table([{n: n for n in names}, *rows], [*names]).encode()})


@contextmanager
def locked(folder: Path):
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


def varies(rows: list[dict], name: str) -> bool:
    """Whether a setting differs, and not just because each method has its own."""
    of = (lambda one: one["method"]) if name.startswith("dype_") else (lambda one: None)
    pairs = {(of(one), one[name]) for one in rows if one[name]}
    return len(pairs) > len({method for method, _ in pairs})


def labels(names: list[str], values) -> list[str]:
    return [LABELS[name].format(value) for name, value in zip(names, values, strict=True) if value]


def by_setting(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each setting, of which seeds and prompts are samples, by what sets it apart."""
    varied = [name for name in LABELS if name not in SAMPLES and varies(rows, name)]
    shown = ["method", *(name for name in varied if name != "method")]
    found: dict[str, list[dict]] = {}
    for one in rows:
        parts = [f"{one['height']}x{one['width']}", *labels(shown, [one[name] for name in shown])]
        found.setdefault(", ".join(parts), []).append(one)
    return found


def spread(numbers: list[float], digits: int) -> str:
    """Mean and, of two or more, standard deviation."""
    if not numbers:
        return "-"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    more = "" if deviation is None else f" ({deviation:.{digits}f})"
    return f"{statistics.mean(numbers):.{digits}f}{more}"
