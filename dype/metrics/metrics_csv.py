"""Read and write metrics.csv, the values of image metrics in a sweep's folder."""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path

from dype.sampling import records

FILE = "metrics.csv"
COLUMNS = ["file", "metric", "value", "protocol"]


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv; none where there is no file.

    Raises ValueError for another table, and for a value that is no number.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        table = csv.DictReader(io.StringIO(path.read_text("utf-8"), newline=""), strict=True)
        rows = list(table)
        if table.fieldnames != COLUMNS or any(None in (*row, *row.values()) for row in rows):
            raise ValueError("other columns")
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table of this program; move it away") from error
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


def write_metrics(folder: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write metrics.csv, whole or not at all. Raises OSError."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    records.write({folder / FILE: text.getvalue().encode()})
