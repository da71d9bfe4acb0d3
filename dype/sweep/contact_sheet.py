"""Contact sheets and the summary of a finished sweep, from its tables alone."""

import io
import re
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dype.pipelines import memory
from dype.sampling import records
from dype.sweep.results import (
    COLUMNS,
    LABELS,
    REPLICATES,
    format_mean_std,
    group_by_setting,
    setting_labels,
    takes_several_values,
)

MAX_COLUMNS = 8
GAP, FONT = 8, 16  # px


def write_contact_sheets(rows: list[dict], folder: Path, columns: str | None = None) -> list[Path]:
    """Write `comparison_HxW.png` for every size and `summary.txt`; returns their paths.

    rows: of results.csv. columns: the most columns of a sheet (more go to `comparison_HxW_2.png`,
    ...), or the setting that goes across; by default seeds and prompts, where there are several,
    else the last setting that varies. Raises ValueError for a setting that there is none of,
    OSError.
    """
    check_columns(columns)
    contents = {}
    for size in dict.fromkeys((int(row["height"]), int(row["width"])) for row in rows):
        of_size = [row for row in rows if (int(row["height"]), int(row["width"])) == size]
        for number, sheet in enumerate(contact_sheets(of_size, folder, size, columns), 1):
            picture = io.BytesIO()
            sheet.save(picture, "png", optimize=True)
            more = f"_{number}" if number > 1 else ""
            contents[folder / f"comparison_{size[0]}x{size[1]}{more}.png"] = picture.getvalue()
    contents[folder / "summary.txt"] = summarize_rows(rows).encode()
    records.write_atomically(contents)
    for path in {*folder.glob("comparison_*.png")} - contents.keys():  # of more columns before
        if re.fullmatch(r"comparison_\d+x\d+_\d+\.png", path.name):
            path.unlink()
    return list(contents)


def check_columns(columns: str | None) -> None:
    """Raise ValueError for --cols that is neither a number nor a setting."""
    if columns not in (None, *LABELS) and not (columns.isdecimal() and int(columns) > 0):
        raise ValueError(
            f"--cols is {columns!r}, expected a number above 0 or one of {', '.join(LABELS)}"
        )


def arrange_grid(rows: list[dict], columns: str | None) -> tuple[list[str], list[str], list]:
    """A label for every line and column, and down each column the rows of results.csv.

    A setting without effect on an image, as lambda_t has none on a static method, is empty in its
    row, and the image stands under every value of it.
    """
    varied = [name for name in LABELS if takes_several_values(rows, name)]
    across = [name for name in varied if name in REPLICATES] or varied[-1:]
    if columns in LABELS:
        across = [columns]
    down = [name for name in varied if name not in across]
    heads = list(dict.fromkeys(tuple(row[name] for name in across) for row in rows))
    heads = [head for head in heads if all(head)] or heads
    sides = list(dict.fromkeys(tuple(row[name] for name in down) for row in rows))
    stacks = []
    for head in heads:
        wanted = [*zip(across, head, strict=True)]
        under = [row for row in rows if all(row[name] in ("", value) for name, value in wanted)]
        beside = {tuple(row[name] for name in down): row for row in under}
        stacks.append([beside.get(side) for side in sides])
    names = [", ".join(setting_labels(down, side)) for side in sides]
    return names, [", ".join(setting_labels(across, head)) for head in heads], stacks


def contact_sheets(rows: list[dict], folder: Path, size: tuple, columns: str | None) -> list:
    """All images of one size (height, width): settings down, seeds and prompts across."""
    sides, heads, stacks = arrange_grid(rows, columns)
    most = int(columns) if columns and columns.isdecimal() else MAX_COLUMNS
    parts = [slice(first, first + most) for first in range(0, len(heads), most)]
    return [draw_sheet(sides, heads[part], stacks[part], folder, size) for part in parts]


def draw_sheet(sides: list, heads: list, stacks: list, folder: Path, size: tuple) -> Image.Image:
    """One sheet, up to three lines of text for a label; the failed as boxes that say why."""
    side = max(64, min(320, int((40e6 / len(sides) / len(heads)) ** 0.5)))  # px, the longer one
    height, width = (max(1, round(side * one / max(size))) for one in size)
    font, sides = ImageFont.load_default(FONT), [wrap_label(label, 60, 1) for label in sides]
    heads = [wrap_label(label, width // 9, 3) for label in heads]
    left = GAP + max(round(font.getlength(label)) + GAP for label in sides)
    top = GAP + (FONT + GAP // 2) * max(label.count("\n") + 1 for label in heads)
    shape = left + len(heads) * (width + GAP), top + len(sides) * (height + GAP)
    sheet = Image.new("RGB", shape, "white")
    pen = ImageDraw.Draw(sheet)
    xs, ys = range(left, sheet.width, width + GAP), range(top, sheet.height, height + GAP)
    for x, label, stack in zip(xs, heads, stacks, strict=True):
        pen.text((x, GAP // 2), label, "black", font)
        for y, row in zip(ys, stack, strict=True):
            if row is not None:
                sheet.paste(thumbnail(row, folder, (width, height)), (x, y))
    for y, label in zip(ys, sides, strict=True):
        pen.text((GAP, y), label, "black", font)
    return sheet


def wrap_label(label: str, letters: int, most: int) -> str:
    """The label in at most so many lines of so many letters."""
    return textwrap.fill(label, max(8, letters), max_lines=most, placeholder="...")


def thumbnail(one: dict, folder: Path, size: tuple[int, int]) -> Image.Image:
    """An image at the size of the sheet, or a box that says why there is none."""
    reason = one["error"]
    if not reason:
        try:
            picture = records.read_png(folder / one["file"])
            return picture.resize(size, Image.Resampling.LANCZOS)
        except OSError:
            reason = f"{one['file']} is missing"
    box = Image.new("RGB", size, "lightgray")
    text = "\n".join(textwrap.wrap(reason, max(8, size[0] // 9))[:10])
    ImageDraw.Draw(box).multiline_text((4, 4), text, "black", ImageFont.load_default(FONT - 2))
    return box


def summarize_rows(rows: list[dict]) -> str:
    """Per setting: images, failures, mean and standard deviation of seconds, memory, metrics."""
    metrics = sorted({name for row in rows for name in row} - {*COLUMNS})
    heads = [f"{'pictures':>8}", f"{'failed':>6}", f"{'seconds':>16}", f"{'peak GiB':>14}"]
    lines = ["  ".join([*heads, *(f"{name:>16}" for name in metrics), "height x width, setting"])]
    for setting, group in group_by_setting(rows).items():
        good = [row for row in group if not row["error"]]
        seconds = format_mean_std([float(row["seconds"]) for row in good], 1)
        peaks = [float(row["peak_memory"]) / memory.GIB for row in good if row["peak_memory"]]
        cells = [f"{len(good):8}", f"{len(group) - len(good):6}", f"{seconds:>16}"]
        cells.append(f"{format_mean_std(peaks, 2):>14}")
        for name in metrics:
            values = [float(row[name]) for row in good if row.get(name)]
            cells.append(f"{format_mean_std(values, 3):>16}")
        lines.append("  ".join([*cells, setting]))
    return "\n".join([*lines, "", "Mean and standard deviation over the images of a setting.", ""])
