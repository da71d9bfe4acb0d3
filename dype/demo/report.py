"""Tables and image strips of the ground-truth benchmark."""

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dype.config import has_kappa
from dype.demo import scores
from dype.demo.drawing import render
from dype.demo.experiments import (
    Cell,
    Setting,
    default_pairs,
    format_size,
    image_paths,
)
from dype.demo.layout_check import PARTS
from dype.demo.measurements import Measurements
from dype.demo.scenes import Scene
from dype.pipelines.devices import autocast
from dype.sampling import records
from dype.sampling.crops import find_detail

# columns before the scores
ROW_COLUMNS = ("size", "setting", "n", "method", "dype", "lambda_s", "lambda_t", "control")
PAIR_COLUMNS = ("size", "setting", "against", "n")
COLUMNS = 6  # of a strip
SIDE, GAP, LABEL = 160, 6, 34  # px of a strip: width of an image, space, height of a label
# columns of each printed table; one table of all scores is wider than a terminal
PRINTED_SCORES = (
    ("layout", "overlap", "joint"),
    ("sun", "horizon", "shift"),
    ("spectrum", "directions"),
    ("patches", "lite0"),
)


def score_cells(
    vae,
    dtype: str,
    cells: list[Cell],
    scenes: list[Scene],
    folder: Path,
    measurements: Measurements,
    pairs_of: Callable[[dict[str, Cell]], list[tuple[str, str]]] = default_pairs,
) -> dict:
    """Return the scores of every cell and of the truth as "rows", paired differences as "pairs".

    Args:
        vae: autoencoder that rendered truth passes through.
        dtype: number format of the images' own decoding.
        cells: cells with finished images.
        scenes: scene of each prompt, at least as many as the largest cell has.
        folder: folder of the seed.
        measurements: file of what is measured already; the rest is added to it.
        pairs_of: takes the cells of a size by the name of their setting, returns the (setting,
            baseline) names to compare.
    """
    rows, differences = [], []
    for size in dict.fromkeys(cell.size for cell in cells):
        cells_by_name = {cell.setting.name: cell for cell in cells if cell.size == size}
        size_scenes = scenes[: max(cell.count for cell in cells_by_name.values())]
        label, statistics = format_size(size), {}
        prefix = f"{folder.name}/{label}"
        truth, baselines = truth_baselines(vae, dtype, size_scenes, size, measurements, prefix)
        rows += [score_row(size, name, None, *sets) for name, sets in baselines.items()]
        for name, cell in tqdm(cells_by_name.items(), f"scores {label}", leave=False):
            statistics[name] = measurements.measure(
                f"{folder.name}/{cell.folder}",
                size_scenes[: cell.count],
                lambda i, cell=cell: read_image(image_paths(cell, folder)[i], cell.size),
            )
            rows.append(score_row(size, name, cell.setting, statistics[name], truth))
        for name, baseline in tqdm(pairs_of(cells_by_name), f"pairs {label}", leave=False):
            n = min(cells_by_name[name].count, cells_by_name[baseline].count)
            sets = statistics[name], statistics[baseline], truth
            sets = [scores.select(images, np.arange(n)) for images in sets]
            row = {"size": label, "setting": name, "against": baseline, "n": n}
            differences.append(row | scores.paired_differences(*sets))
    return {"rows": rows, "pairs": differences}


def truth_baselines(
    vae,
    dtype: str,
    scenes: list[Scene],
    size: tuple[int, int],
    measurements: Measurements,
    prefix: str,
) -> tuple[scores.ImageStatistics, dict]:
    """Return the truth that images are compared with, and the rows that score truth itself.

    The truth is the rendered scenes after a round trip through the autoencoder. The rows compare it
    with the same layouts under another seed, which has other ridges, clouds and ripples. `truth`:
    both without the autoencoder; `truth_vae`: both through it, the best that a model can reach;
    `vae`: one through it and the truth without it, the cost of the autoencoder.

    Args:
        vae: autoencoder.
        dtype: number format of the round trip.
        scenes: scenes to render.
        size: (height, width), px.
        measurements: file of what is measured already; the rest is added to it.
        prefix: beginning of the names in that file.

    Returns:
        Statistics of the truth; (statistics of a row, statistics it is compared with) by name.
    """
    statistics = {}
    for name, seed_offset in (("same_seed", 0), ("other_seed", 1)):
        variants = [replace(scene, seed=scene.seed + seed_offset) for scene in scenes]

        def draw(index, variants=variants):
            return render(variants[index], *size)

        def decode(index, draw=draw):
            return round_trip(vae, draw(index), dtype)

        for key, read in ((name, draw), (f"{name}_vae", decode)):
            statistics[key] = measurements.measure(f"{prefix}/truth_{key}", scenes, read)
    return statistics["same_seed_vae"], {
        "truth": (statistics["other_seed"], statistics["same_seed"]),
        "truth_vae": (statistics["other_seed_vae"], statistics["same_seed_vae"]),
        "vae": (statistics["other_seed_vae"], statistics["same_seed"]),
    }


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return an image, uint8 [H, W, 3].

    Args:
        path: file of the image.
        size: (height, width) that it must have, because it is compared with truth of that size.

    Raises:
        OSError: it cannot be read or has another size; the sentence says what to do.
    """
    try:
        image = np.asarray(records.open_image(path))
    except OSError as error:
        raise OSError(f"{path} cannot be read; delete it to generate it again") from error
    if size is not None and image.shape[:2] != size:
        height, width = image.shape[:2]
        raise OSError(
            f"{path} is {width}x{height} px, so it cannot be compared with truth of "
            f"{size[1]}x{size[0]} px; delete it to generate it again"
        )
    return image


def score_row(size: tuple[int, int], name: str, setting: Setting | None, images, truth) -> dict:
    """Return a row of the table.

    Args:
        size: (height, width), px.
        name: name of the setting or of the truth.
        setting: None for truth.
        images: `scores.ImageStatistics` of n images.
        truth: the same of n or more scenes, of which the first n count.
    """
    n = len(images.is_right)
    row = {"size": format_size(size), "setting": name, "n": n, "control": ""}
    row |= dict.fromkeys(("method", "dype", "lambda_s", "lambda_t"))
    if setting is not None:
        config = setting.config
        row |= {"control": setting.control, "method": config.method, "dype": config.dype}
        if has_kappa(config.to_dict()):
            row |= {"lambda_s": config.lambda_s, "lambda_t": config.dype_exponent}
    return row | scores.score(images, scores.select(truth, np.arange(n)))


def to_markdown(rows: list[dict], columns: tuple[str, ...], signed: bool) -> str:
    """Return rows as Markdown tables: of layout, of its parts, of spectra and of patches.

    Args:
        rows: rows or pairs of `score_cells`.
        columns: columns before the scores.
        signed: write scores with their sign, for differences.
    """
    tables = []
    for group in PRINTED_SCORES:
        names = [name for name in group if name in score_columns(rows)]
        heads = [*columns, *names]
        lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for row in rows:
            values = [row[name] for name in columns]
            texts = [f"`{value}`" if isinstance(value, str) else str(value) for value in values]
            texts += [scores.format_interval(row[name], signed) for name in names]
            lines.append(f"| {' | '.join(texts)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def score_columns(rows: list[dict]) -> list[str]:
    """Return the names of the scores that all rows have.

    Rows that an earlier version saved, or one without the packages of `lite0`, have fewer.
    """
    return [name for name in (*scores.SCORES, *PARTS) if all(name in row for row in rows)]


def to_csv(rows: list[dict], columns: tuple[str, ...]) -> bytes:
    """Return rows as CSV: the columns, then their scores and the ends of the intervals.

    A score `layout` has the columns `layout`, `layout_low` and `layout_high`.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names, ends = score_columns(rows), ("", "_low", "_high")
    writer.writerow([*columns, *(name + end for name in names for end in ends)])
    for row in rows:
        results = [row[name] for name in names]
        numbers = [x for result in results for x in (result["mean"], *result["interval"])]
        writer.writerow([*(row[name] for name in columns), *(f"{x:.6g}" for x in numbers)])
    return text.getvalue().encode()


@torch.no_grad()
def round_trip(vae, image: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """Encode and decode an image, uint8 [H, W, 3], in a number format; return the same."""
    x = torch.from_numpy(image).to(vae.device).permute(2, 0, 1)[None].float() / 127.5 - 1
    with autocast(vae.device, dtype):
        out = vae(x).sample[0].permute(1, 2, 0).float()
    return ((out + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def draw_image_strips(cells: list[Cell], folder: Path, path: Path) -> bytes:
    """Draw a labeled strip of the first images of each cell, COLUMNS at most, and their crops.

    The crops have one pixel of the image per pixel. All images of a prompt and size have the same
    one, where their edges are strongest. The strips are as long as the shortest cell.

    Args:
        cells: cells with finished images.
        folder: folder of the seed.
        path: file to write to; its suffix says the format.

    Returns:
        Content of the file.
    """
    columns = min(COLUMNS, *(cell.count for cell in cells))
    paths = [image_paths(cell, folder)[:columns] for cell in cells]
    images = [
        [Image.fromarray(read_image(path, cell.size)) for path in row]
        for cell, row in zip(cells, paths, strict=True)
    ]
    heights = [round(SIDE * height / width) for height, width in (cell.size for cell in cells)]
    crop = min(SIDE, *(side for cell in cells for side in cell.size))
    tops = [0, *accumulate(LABEL + height + GAP + crop for height in heights)]
    size = columns * (SIDE + GAP) - GAP, tops[-1] + LABEL
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    corners = crop_corners(cells, images, crop)
    for cell, row, top, height in zip(cells, images, tops[:-1], heights, strict=True):
        text = f"{cell.setting.name}, {format_size(cell.size)} px"
        pen.text((4, top + LABEL - 9), text, "black", font, anchor="ls")
        for column, (image, corner) in enumerate(zip(row, corners[cell.size], strict=True)):
            left, image_top = column * (SIDE + GAP), top + LABEL
            sheet.paste(image.resize((SIDE, height), Image.Resampling.LANCZOS), (left, image_top))
            (x, y), scale = corner, SIDE / image.width
            frame = np.array([[x, y], [x + crop, y + crop]]) * scale
            frame = frame.round().clip(1, (SIDE - 2, height - 2)) + np.array([left, image_top])
            draw_frame(pen, frame.astype(int).ravel().tolist())
            detail = image.crop((x, y, x + crop, y + crop))
            sheet.paste(detail, (left, image_top + height + GAP))
    note = "Below each image: its marked part, pixel for pixel."
    pen.text((4, size[1] - 8), note, "dimgray", ImageFont.load_default(13), anchor="ls")
    content = io.BytesIO()
    file_format = Image.registered_extensions()[path.suffix.lower()]
    sheet.save(content, file_format, optimize=True, quality=80)
    return content.getvalue()


def crop_corners(cells: list[Cell], images: list[list], side: int) -> dict:
    """Return left and top of the crop of each column, by the size of the cells.

    Args:
        cells: cells of the strips.
        images: images of each cell.
        side: of the crops, px.
    """
    rows_by_size = {}
    for cell, row in zip(cells, images, strict=True):
        rows_by_size.setdefault(cell.size, []).append(row)
    return {
        size: [find_detail(column, side)[0] for column in zip(*rows, strict=True)]
        for size, rows in rows_by_size.items()
    }


def draw_frame(pen: ImageDraw.ImageDraw, box: list[int]) -> None:
    """Draw a frame that stands out from any image; box: left, top, right, bottom, px."""
    left, top, right, bottom = box
    pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="black")
    pen.rectangle(box, outline="white")
