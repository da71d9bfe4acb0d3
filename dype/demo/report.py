"""The ground-truth table: how images are scored, and how that is shown."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dype.demo import scores
from dype.demo.experiments import Cell, Setting, compared, paths_of, shown_size, uses_lambdas
from dype.demo.scenes import Scene, render
from dype.sampling import records

# columns before the scores
ROW = ("size", "setting", "n", "method", "dype", "lambda_s", "lambda_t", "control")
PAIR = ("size", "setting", "against", "n")


def table(vae, cells: list[Cell], scenes: list[Scene], folder: Path, couples=()) -> dict:
    """Every cell's scores, the floors among them, and the paired differences.

    folder: of the seed's images. couples: names of (a setting, what it is held against), in place
    of `compared`'s.
    """
    rows, pairs = [], []
    for size in dict.fromkeys(cell.size for cell in cells):
        some = {cell.setting.name: cell for cell in cells if cell.size == size}
        scored = scenes[: max(cell.count for cell in some.values())]
        drawn, (truth, found) = {}, floors(vae, scored, size)
        rows += [cell_row(size, name, None, *of) for name, of in found.items()]
        named = shown_size(size)
        for name, cell in tqdm(some.items(), f"scores {named}", leave=False):
            pictures = [opened(path) for path in paths_of(cell, folder)]
            drawn[name] = scores.judged(pictures, scored[: cell.count])
            rows.append(cell_row(size, name, cell.setting, drawn[name], truth))
        known = [couple for couple in couples if some.keys() >= {*couple}]
        held = tqdm(known if couples else compared(some), f"pairs {named}", leave=False)
        for name, other in held:
            n = min(some[name].count, some[other].count)
            sets = [scores.taken(of, np.arange(n)) for of in (drawn[name], drawn[other], truth)]
            row = {"size": named, "setting": name, "against": other, "n": n}
            pairs.append(row | scores.difference(*sets))
    return {"rows": rows, "pairs": pairs}


def floors(vae, scenes: list[Scene], size: tuple[int, int]) -> tuple[scores.Judged, dict]:
    """What images are held against, rendered truth through the autoencoder; and what truth has.

    `truth` is other leaves on the same scenes against these; `truth_vae` both through the
    autoencoder: as near as the model could come; `vae` what the autoencoder alone costs.
    """
    judged, decibels, named = {}, [], shown_size(size)
    for name, more in (("these", 0), ("others", 1)):
        leaves = [replace(scene, seed=scene.seed + more) for scene in scenes]
        pictures = [render(one, *size) for one in tqdm(leaves, f"truth {named}", leave=False)]
        through = [round_trip(vae, one) for one in pictures]
        judged |= {name: scores.judged(pictures, scenes)}
        judged |= {f"{name}_vae": scores.judged(through, scenes)}
        decibels += map(psnr, pictures, through)
    print(f"{named} px: round trip {np.mean(decibels):.1f} dB, deviation {np.std(decibels):.1f}")
    return judged["these_vae"], {
        "truth": (judged["others"], judged["these"]),
        "truth_vae": (judged["others_vae"], judged["these_vae"]),
        "vae": (judged["others_vae"], judged["these"]),
    }


def opened(path: Path) -> np.ndarray:
    """An image, uint8 [H, W, 3]. Raises OSError, saying what to do."""
    try:
        return np.asarray(records.open_image(path))
    except OSError as error:
        raise OSError(f"{path} cannot be read; delete it to have it drawn again") from error


def cell_row(size, name: str, of: Setting | None, found, truth) -> dict:
    n = len(found.right)
    row = {"size": shown_size(size), "setting": name, "n": n, "control": ""}
    row |= dict.fromkeys(("method", "dype", "lambda_s", "lambda_t"))
    if of is not None:
        config = of.config
        row |= {"control": of.control, "method": config.method, "dype": config.dype}
        if uses_lambdas(config):
            row |= {"lambda_s": config.lambda_s, "lambda_t": config.dype_exponent}
    return row | scores.score(found, scores.taken(truth, np.arange(n)))


def printed(rows: list[dict], columns: tuple[str, ...], signed: bool) -> str:
    """Rows as a Markdown table."""
    heads = [*columns, *scores.SCORES]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        parts = [f"`{row[name]}`" if isinstance(row[name], str) else str(row[name])
                 for name in columns]  # fmt: skip
        parts += [scores.shown(row[name], signed) for name in scores.SCORES]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def to_csv(rows: list[dict], columns: tuple[str, ...]) -> bytes:
    """Format rows as CSV: the columns, then every score and the ends of its interval.

    A score `layout` has the columns `layout`, `layout_low` and `layout_high`.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    ends = ("", "_low", "_high")
    writer.writerow([*columns, *(score + end for score in scores.SCORES for end in ends)])
    for row in rows:
        results = [row[score] for score in scores.SCORES]
        numbers = [x for result in results for x in (result["mean"], *result["interval"])]
        writer.writerow([*(row[name] for name in columns), *(f"{x:.6g}" for x in numbers)])
    return text.getvalue().encode()


@torch.no_grad()
def round_trip(vae, picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] through encoder and decoder."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    out = vae(x).sample[0].permute(1, 2, 0)
    return ((out + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, dB."""
    return float(10 * np.log10(255**2 / np.mean((picture.astype(float) - other) ** 2)))


def strips(cells: list[Cell], folder: Path, path: Path) -> bytes:
    """A labeled row of the first six images per cell, in the format of the path's suffix."""
    font, side, bar = ImageFont.load_default(16), 160, 26
    sheet = Image.new("RGB", (6 * side, len(cells) * (side + bar)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, cell in enumerate(cells):
        top = row * (side + bar)
        pen.text((4, top + 5), f"{cell.setting.name}, {shown_size(cell.size)} px", "black", font)
        for column, place in enumerate(paths_of(cell, folder)[:6]):
            picture = Image.fromarray(opened(place))
            small = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (column * side, top + bar))
    content = io.BytesIO()
    kind = Image.registered_extensions()[path.suffix.lower()]
    sheet.save(content, kind, optimize=True, quality=80)
    return content.getvalue()
