"""Contact sheets and the summary of a finished sweep, from its results.csv alone."""

import io
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dype.pipelines import memory
from dype.sampling import records
from dype.sweep.results import LABELS, SAMPLES, by_setting, labels, spread, varies

MOST_COLUMNS = 8
GAP, FONT = 8, 16  # px


def draw(rows: list[dict], folder: Path, columns: str | None = None) -> list[Path]:
    """Write `comparison_HxW.png` for every size and `summary.txt`; returns their paths.

    rows: of results.csv. columns: the most columns in a row, or the setting that goes across; by
    default seeds and prompts, where there are several, else the last setting that varies. Raises
    ValueError for a setting that there is none of, OSError.
    """
    check_columns(columns)
    contents = {}
    for size in dict.fromkeys((int(one["height"]), int(one["width"])) for one in rows):
        some = [one for one in rows if (int(one["height"]), int(one["width"])) == size]
        picture = io.BytesIO()
        contact_sheet(some, folder, size, columns).save(picture, "png", optimize=True)
        contents[folder / f"comparison_{size[0]}x{size[1]}.png"] = picture.getvalue()
    contents[folder / "summary.txt"] = summary(rows).encode()
    records.write(contents)
    return list(contents)


def check_columns(columns: str | None) -> None:
    """Raise ValueError for --cols that is neither a number nor a setting."""
    if columns is None or columns in LABELS or (columns.isdecimal() and int(columns) > 0):
        return
    raise ValueError(
        f"--cols is {columns!r}, expected a number above 0 or one of {', '.join(LABELS)}"
    )


def layout(rows: list[dict], columns: str | None) -> tuple[list, list, list[list[dict | None]]]:
    """The labels down, those across, and the rows of results.csv at each place.

    A setting without effect on a picture, as lambda_t has none on a static method, is empty in its
    row, and the picture stands under every value of it.
    """
    varied = [name for name in LABELS if varies(rows, name)]
    if columns in LABELS:
        across = [columns]
    else:
        across = [name for name in varied if name in SAMPLES] or varied[-1:]
    down = [name for name in varied if name not in across]

    def values(one, names):
        return tuple(one[name] for name in names)

    heads = list(dict.fromkeys(values(one, across) for one in rows))
    heads = [head for head in heads if all(head)] or heads
    sides = list(dict.fromkeys(values(one, down) for one in rows))
    places: list[list[dict | None]] = [[None] * len(heads) for _ in sides]
    for one in rows:
        for column, head in enumerate(heads):
            own = values(one, across)
            if all(mine in ("", theirs) for mine, theirs in zip(own, head, strict=True)):
                places[sides.index(values(one, down))][column] = one
    return [labels(down, side) for side in sides], [labels(across, h) for h in heads], places


def contact_sheet(rows: list[dict], folder: Path, size: tuple, columns: str | None) -> Image.Image:
    """All pictures of one size (height, width), labelled; the failed as boxes that say why."""
    sides, heads, places = layout(rows, columns)
    most = int(columns) if columns and columns.isdecimal() else MOST_COLUMNS
    most = min(most, len(heads))
    side = max(64, min(320, int((40e6 / len(sides) / len(heads)) ** 0.5)))  # px, the longer one
    height, width = (max(1, round(side * one / max(size))) for one in size)
    left = [wrapped(lines, 16) for lines in sides]
    top = [wrapped(lines, max(8, width // 8)) for lines in heads]
    margin = 150 if any(left) else GAP
    bar, title = GAP + max(map(len, top)) * (FONT + 4), FONT + 2 * GAP
    block = bar + len(sides) * (height + GAP) + GAP  # of `most` columns; more go below
    blocks = -(-len(heads) // most)
    sheet = Image.new("RGB", (margin + most * (width + GAP), title + block * blocks), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    title_text = textwrap.shorten(constants(rows, size), sheet.width // 8, placeholder="...")
    pen.text((GAP, GAP // 2), title_text, "black", font)
    for column, lines in enumerate(top):
        x = margin + column % most * (width + GAP)
        y = title + column // most * block
        pen.multiline_text((x, y + GAP // 2), "\n".join(lines), "black", font)
        for row in range(len(sides)):
            at = y + bar + row * (height + GAP)
            if column % most == 0:
                pen.multiline_text((GAP, at), "\n".join(left[row]), "black", font)
            one = places[row][column]
            if one is not None:
                sheet.paste(small(one, folder, (width, height)), (x, at))
    return sheet


def constants(rows: list[dict], size: tuple[int, int]) -> str:
    """What all pictures of a sheet have in common."""
    names = [n for n in ("model", "method", "seed", "prompt") if len({one[n] for one in rows}) == 1]
    shared = labels(names, [rows[0][name] for name in names])
    return ", ".join([f"height x width {size[0]}x{size[1]}", *shared])


def wrapped(lines: list[str], width: int) -> list[str]:
    """Labels in lines of at most so many characters, five lines at most."""
    found = [part for line in lines for part in textwrap.wrap(line, width)]
    return found if len(found) <= 5 else [*found[:4], found[4][: width - 3] + "..."]


def small(one: dict, folder: Path, size: tuple[int, int]) -> Image.Image:
    """A picture at the size of the sheet, or a box that says why there is none."""
    reason = one["error"]
    if not reason:
        try:
            with (
                (folder / one["file"]).open("rb") as file,
                PngImagePlugin.PngImageFile(file) as picture,  # Image.open refuses large ones
            ):
                return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        except (OSError, SyntaxError):
            reason = f"{one['file']} is missing"
    box = Image.new("RGB", size, "lightgrey")
    text = "\n".join(textwrap.wrap(reason, max(8, size[0] // 9))[:10])
    ImageDraw.Draw(box).multiline_text((4, 4), text, "black", ImageFont.load_default(FONT - 2))
    return box


def summary(rows: list[dict]) -> str:
    """Per setting: pictures, failures, mean and standard deviation of seconds and memory."""
    heads = f"{'pictures':>8}  {'failed':>6}  {'seconds':>16}  {'peak GiB':>14}"
    lines = [f"{heads}  height x width, setting"]
    for key, some in by_setting(rows).items():
        good = [one for one in some if not one["error"]]
        seconds = spread([float(one["seconds"]) for one in good], 1)
        peaks = [float(one["peak_memory"]) / memory.GIB for one in good if one["peak_memory"]]
        lines.append(
            f"{len(good):8}  {len(some) - len(good):6}  {seconds:>16}  {spread(peaks, 2):>14}  "
            + key
        )
    return "\n".join(
        [*lines, "", "Mean and standard deviation over the pictures of a setting.", ""]
    )
