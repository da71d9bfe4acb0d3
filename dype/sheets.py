"""Contact sheets and the summary of a finished sweep, from its results.csv alone."""

import io
import statistics
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from dype import memory, records

# what may vary over a sheet -> how its values are labelled
LABELS = {
    "method": "{}",
    "dype_scale": "scale {}",
    "dype_exponent": "exponent {}",
    "dype_start_sigma": "start {}",
    "steps": "{} steps",
    "guidance": "guidance {}",
    "true_cfg": "true CFG {}",
    "multipass": "{}",
    "pass2_strength": "pass 2 {}",
    "pass3_strength": "pass 3 {}",
    "seed": "seed {}",
    "prompt": "{}",
}
SAMPLES = ("seed", "prompt")  # of one setting
MOST_COLUMNS = 8
GAP, FONT = 8, 18  # px


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
    raise ValueError(f"--cols is {columns!r}, expected a number or one of {', '.join(LABELS)}")


def layout(rows: list[dict], columns: str | None) -> tuple[list[tuple], list[tuple], dict]:
    """The axes down, the axes across, and a picture's row for each place.

    A place is (values down, values across). A setting without effect on a picture, as lambda_t has
    none on a static method, is empty there, and the picture stands under every value of it.
    """
    varied = [name for name in LABELS if varies(rows, name)]
    if columns in LABELS:
        across = [columns]
    else:
        across = [name for name in varied if name in SAMPLES] or varied[-1:]
    down = [name for name in varied if name not in across]
    heads = dict.fromkeys(tuple(one[name] for name in across) for one in rows)
    heads = [head for head in heads if all(head)] or list(heads)
    sides = list(dict.fromkeys(tuple(one[name] for name in down) for one in rows))
    places = {}
    for one in rows:
        own = tuple(one[name] for name in across)
        for head in heads:
            if all(mine in ("", theirs) for mine, theirs in zip(own, head, strict=True)):
                places[tuple(one[name] for name in down), head] = one
    label = {"down": [labels(down, side) for side in sides]}
    label["across"] = [labels(across, head) for head in heads]
    return sides, heads, {"places": places, **label}


def varies(rows: list[dict], name: str) -> bool:
    """Whether a setting differs, and not just because each method has its own."""
    of = (lambda one: one["method"]) if name.startswith("dype_") else (lambda one: None)
    pairs = {(of(one), one[name]) for one in rows if one[name]}
    return len(pairs) > len({method for method, _ in pairs})


def labels(names: list[str], values: tuple) -> list[str]:
    return [LABELS[name].format(value) for name, value in zip(names, values, strict=True) if value]


def contact_sheet(rows: list[dict], folder: Path, size: tuple, columns: str | None) -> Image.Image:
    """All pictures of one size, labelled; those that failed as grey boxes that say why."""
    sides, heads, found = layout(rows, columns)
    most = int(columns) if columns and columns.isdecimal() else MOST_COLUMNS
    count = len(sides) * len(heads)
    side = max(64, min(320, int((40e6 / count) ** 0.5)))  # px, of the longer side
    height, width = (max(1, round(side * one / max(size))) for one in size)
    font = ImageFont.load_default(FONT)
    left = [wrapped(lines, 15) for lines in found["down"]]
    top = [wrapped(lines, max(6, width // 10)) for lines in found["across"]]
    margin = 150 if any(left) else GAP
    bar = GAP + max(map(len, top)) * (FONT + 4)
    blocks = [range(start, min(start + most, len(heads))) for start in range(0, len(heads), most)]
    block = bar + len(sides) * (height + GAP) + GAP
    full = Image.new(
        "RGB", (margin + min(most, len(heads)) * (width + GAP), block * len(blocks)), "white"
    )
    pen = ImageDraw.Draw(full)
    for number, block_columns in enumerate(blocks):
        y = number * block
        for x, column in enumerate(block_columns):
            place = margin + x * (width + GAP)
            pen.multiline_text((place, y + GAP // 2), "\n".join(top[column]), "black", font)
        for row, key in enumerate(sides):
            at = y + bar + row * (height + GAP)
            pen.multiline_text((GAP, at), "\n".join(left[row]), "black", font)
            for x, column in enumerate(block_columns):
                corner = margin + x * (width + GAP), at
                one = found["places"].get((key, heads[column]))
                if one is not None:
                    full.paste(small(one, folder, (width, height)), corner)
    return full


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
    settings: dict[str, list[dict]] = {}
    for one in rows:
        settings.setdefault(setting(one), []).append(one)
    lines = [f"{'pictures':>8}  {'failed':>6}  {'seconds':>16}  {'peak GiB':>14}  setting"]
    for key, some in settings.items():
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


def setting(one: dict) -> str:
    """All of a row that seeds and prompts are samples of."""
    own = [name for name in LABELS if one[name] and name not in SAMPLES]
    size = f"{one['height']}x{one['width']}"
    return ", ".join([size, *(LABELS[name].format(one[name]) for name in own)])


def spread(numbers: list[float], digits: int) -> str:
    """Mean and, of two or more, standard deviation."""
    if not numbers:
        return "-"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    more = "" if deviation is None else f" ({deviation:.{digits}f})"
    return f"{statistics.mean(numbers):.{digits}f}{more}"
