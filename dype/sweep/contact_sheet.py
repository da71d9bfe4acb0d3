"""Draw contact sheets and write the summary of a sweep from its tables, without a model."""

import io
import re
from pathlib import Path

from PIL import Image, ImageDraw

from dype.pipelines import memory
from dype.sampling import records
from dype.sweep import labels
from dype.sweep.results import (
    COLUMNS,
    LABELS,
    REPLICATES,
    check_columns,
    format_mean_std,
    group_by_setting,
    setting_labels,
    takes_several_values,
)

MAX_COLUMNS = 8
GAP, FONT = 8, 16  # px


def write_contact_sheets(rows: list[dict], folder: Path, columns: str | None = None) -> list[Path]:
    """Write `comparison_HxW.png` for every size and `summary.txt`; return their paths.

    Args:
        rows: rows of results.csv.
        folder: folder of the sweep.
        columns: maximum number of columns of a sheet, or the setting whose values are the columns.
            Further columns go to `comparison_HxW_2.png`, ... None puts seeds and prompts in the
            columns if they vary, else the last setting that varies.

    Raises:
        ValueError: `columns` is neither a number nor a setting.
        OSError: a file cannot be written.
    """
    check_columns(columns)
    contents = {}
    for size in dict.fromkeys((int(row["height"]), int(row["width"])) for row in rows):
        same_size = [row for row in rows if (int(row["height"]), int(row["width"])) == size]
        for number, sheet in enumerate(contact_sheets(same_size, folder, size, columns), 1):
            png = io.BytesIO()
            sheet.save(png, "png")
            suffix = f"_{number}" if number > 1 else ""
            contents[folder / f"comparison_{size[0]}x{size[1]}{suffix}.png"] = png.getvalue()
    contents[folder / "summary.txt"] = summarize_rows(rows).encode()
    records.write_atomically(contents)
    # An earlier call with fewer columns a sheet has left sheets with higher numbers.
    for path in {*folder.glob("comparison_*.png")} - contents.keys():
        if re.fullmatch(r"comparison_\d+x\d+_\d+\.png", path.name):
            path.unlink()
    return list(contents)


def arrange_grid(rows: list[dict], columns: str | None) -> tuple[list[str], list[str], list]:
    """Arrange rows of results.csv in a grid, by the settings that vary.

    Some settings have no effect on some images, as lambda_t on a static method. Their cells in
    results.csv are empty, and the image appears in every column of such a setting.

    Returns:
        A label for each line and for each column of the grid, and for each column the list of its
        rows of results.csv, None where there is no image.
    """
    varying = [name for name in LABELS if takes_several_values(rows, name)]
    column_settings = [name for name in varying if name in REPLICATES] or varying[-1:]
    if columns in LABELS:
        column_settings = [columns]
    line_settings = [name for name in varying if name not in column_settings]
    column_keys = list(dict.fromkeys(tuple(row[name] for name in column_settings) for row in rows))
    column_keys = [key for key in column_keys if all(key)] or column_keys
    line_keys = list(dict.fromkeys(tuple(row[name] for name in line_settings) for row in rows))
    grid = []
    for key in column_keys:
        values = [*zip(column_settings, key, strict=True)]
        matches = [row for row in rows if all(row[name] in ("", value) for name, value in values)]
        by_line = {tuple(row[name] for name in line_settings): row for row in matches}
        grid.append([by_line.get(line_key) for line_key in line_keys])
    line_labels = [", ".join(setting_labels(line_settings, key)) for key in line_keys]
    column_labels = [", ".join(setting_labels(column_settings, key)) for key in column_keys]
    return line_labels, column_labels, grid


def contact_sheets(rows: list[dict], folder: Path, size: tuple, columns: str | None) -> list:
    """Draw the contact sheets of all images of one size.

    Args:
        rows: rows of results.csv, all of that size.
        folder: folder of the sweep.
        size: height and width in px.
        columns: as in `write_contact_sheets`.
    """
    line_labels, column_labels, grid = arrange_grid(rows, columns)
    step = int(columns) if columns and columns.isdecimal() else MAX_COLUMNS
    count = len(line_labels) * min(step, len(column_labels))
    side = max(64, min(320, int((40e6 / count) ** 0.5)))  # px of the longer side
    height, width = (max(1, round(side * length / max(size))) for length in size)
    lines = labels.wrap_all(line_labels, FONT, 480, 1)
    heads = labels.wrap_all(column_labels, FONT, max(72, width), 3)
    slices = [slice(first, first + step) for first in range(0, len(column_labels), step)]
    return [draw_sheet(lines, heads[s], grid[s], folder, (width, height)) for s in slices]


def draw_sheet(
    line_labels: list, column_labels: list, grid: list, folder: Path, size: tuple[int, int]
) -> Image.Image:
    """Draw one sheet; a failed image is a box with the reason.

    Args:
        line_labels: label of each line, as a list of its lines of text.
        column_labels: label of each column, the same.
        grid: for each column its rows of results.csv, or None.
        folder: folder of the sweep.
        size: width and height of the images on the sheet in px.
    """
    width, height = size
    step = FONT + GAP // 2
    left = GAP + max(round(labels.measure(line, FONT)) + GAP for [line] in line_labels)
    top = GAP + step * max(map(len, column_labels))
    shape = left + len(column_labels) * (width + GAP), top + len(line_labels) * (height + GAP)
    sheet = Image.new("RGB", shape, "white")
    pen = ImageDraw.Draw(sheet)
    xs, ys = range(left, sheet.width, width + GAP), range(top, sheet.height, height + GAP)
    for x, label, column in zip(xs, column_labels, grid, strict=True):
        labels.draw(pen, (x, GAP // 2), label, FONT, step)
        for y, row in zip(ys, column, strict=True):
            if row is not None:
                sheet.paste(thumbnail(row, folder, size), (x, y))
    for y, label in zip(ys, line_labels, strict=True):
        labels.draw(pen, (GAP, y), label, FONT, step)
    return sheet


def thumbnail(row: dict, folder: Path, size: tuple[int, int]) -> Image.Image:
    """Return a row's image at a size (width, height), or a box with the reason of its absence."""
    reason = row["error"]
    if not reason:
        try:
            return records.open_image(folder / row["file"]).resize(size, Image.Resampling.LANCZOS)
        except OSError:
            reason = f"{row['file']} is missing"
    box = Image.new("RGB", size, "lightgray")
    lines = labels.wrap(reason, FONT - 2, max(64, size[0] - 8), 10)
    labels.draw(ImageDraw.Draw(box), (4, 4), lines, FONT - 2, FONT)
    return box


def summarize_rows(rows: list[dict]) -> str:
    """Summarize each setting: images, failures, mean and deviation of seconds, memory, metrics."""
    metrics = sorted({name for row in rows for name in row} - {*COLUMNS})
    heads = [f"{'images':>8}", f"{'failed':>6}", f"{'seconds':>16}", f"{'peak GiB':>14}"]
    lines = ["  ".join([*heads, *(f"{name:>16}" for name in metrics), "width x height, setting"])]
    for setting, group in group_by_setting(rows).items():
        finished = [row for row in group if not row["error"]]
        seconds = format_mean_std([float(row["seconds"]) for row in finished], 1)
        peaks = [float(row["peak_memory"]) / memory.GIB for row in finished if row["peak_memory"]]
        cells = [f"{len(finished):8}", f"{len(group) - len(finished):6}", f"{seconds:>16}"]
        cells.append(f"{format_mean_std(peaks, 2):>14}")
        for name in metrics:
            values = [float(row[name]) for row in finished if row.get(name)]
            cells.append(f"{format_mean_std(values, 3):>16}")
        lines.append("  ".join([*cells, setting]))
    return "\n".join([*lines, "", "Mean and standard deviation over the images of a setting.", ""])
