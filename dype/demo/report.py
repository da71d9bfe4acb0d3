"""The ground-truth table: what is judged, what it is held against, and how that is shown."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dype import records
from dype.config import METHOD_SCALES, DyPEConfig
from dype.demo import scores
from dype.demo.scenes import Scene, render
from dype.models import MODELS
from dype.rope import METHODS, axis_frequencies

BASE = MODELS["demo"].base_resolution
CONTROLS = ("reversed", "model", "progressive")


class Setting(NamedTuple):
    """What is judged: an encoding, and what a control changes about it."""

    name: str
    config: DyPEConfig
    control: str = ""
    text: str = ""  # as it was asked for


class Cell(NamedTuple):
    """Pictures of one setting at one size: the first `count` prompts of a seed."""

    size: tuple[int, int]  # height, width, px
    setting: Setting
    count: int


def shown_size(size: tuple[int, int]) -> int | str:
    """The side in px, or WIDTHxHEIGHT where they differ."""
    height, width = size
    return height if height == width else f"{width}x{height}"


def setting(text: str) -> Setting:
    """METHOD[:static | :SCALE[:EXPONENT]][:NAME=VALUE...][:CONTROL], of CONTROLS. Raises ValueError.

    NAME: of another setting of `DyPEConfig`. The setting's own name has the numbers that have an
    effect: METHOD_SCALE_EXPONENT, METHOD_static, `base`, then those with a name.
    """
    method, *more = text.split(":")
    control = more.pop() if more and more[-1] in CONTROLS else ""
    named = [part for part in more if "=" in part]
    plain = more[: len(more) - len(named)]
    config = {"method": method, "base_resolution": BASE, "dype": plain != ["static"]}
    config |= {"shift": "model"} if control == "model" else {}
    wrong = plain + named != more
    try:
        numbers = [float(part) for part in plain] if config["dype"] else []
        for name, _, value in (part.partition("=") for part in named):
            config[name] = value if name == "attention_path" else float(value)
    except ValueError:
        wrong, numbers = True, []
    config |= dict(zip(("dype_scale", "dype_exponent"), numbers, strict=False))
    made = DyPEConfig.from_dict(config)
    still = method == "base" or not made.dype
    wrong |= len(numbers) > 2 * (METHOD_SCALES[method] is not None)
    if wrong or (still and control == "reversed"):
        raise ValueError(
            f"setting {text!r}, expected METHOD[:static|:SCALE[:EXPONENT]][:NAME=VALUE...], then "
            f"at most one of {', '.join(CONTROLS)}; and no scale, exponent or reversal where they "
            "change nothing"
        )
    parts = [method] if method == "base" or made.dype else [method, "static"]
    if made.dype and METHOD_SCALES[method] is not None:
        parts += [f"{made.lambda_s:g}", f"{made.dype_exponent:g}"]
    parts += named
    return Setting("_".join([*parts, control] if control else parts), made, control, text)


def static_form(method: str) -> str:
    """The first method whose static frequencies and m are this one's, as NTK is `ntk_mult`'s."""

    def table(name):
        f, m = axis_frequencies(56, 10000.0, 16, 64, 1.0, DyPEConfig(name, dype=False))
        return [*f.tolist(), m.item()]

    return next(name for name in METHODS if table(name) == table(method))


def table(vae, cells: list[Cell], scenes: list[Scene], folder_of: Callable, against=()) -> dict:
    """Every cell's scores, the floors among them, and the paired differences.

    against: names of the settings that all others are held against, in place of `compared`'s.
    """
    rows, pairs = [], []
    for size in dict.fromkeys(cell.size for cell in cells):
        some = {cell.setting.name: cell for cell in cells if cell.size == size}
        count = max(cell.count for cell in some.values())
        scored = scenes[:count]
        drawn, (truth, found) = {}, floors(vae, scored, size)
        rows += [cell_row(size, name, None, *of) for name, of in found.items()]
        for name, cell in tqdm(some.items(), f"scores {shown_size(size)}", leave=False):
            drawn[name] = scores.judged(pictures_of(cell, folder_of), scored[: cell.count])
            rows.append(cell_row(size, name, cell.setting, drawn[name], truth))
        couples = [(name, other) for other in against for name in some if name != other]
        couples = [couple for couple in couples if couple[1] in some] if against else compared(some)
        pairs += [pair_row(size, *names, drawn, truth) for names in couples]
    return {"rows": rows, "pairs": pairs}


def floors(vae, scenes: list[Scene], size: tuple[int, int]) -> tuple[scores.Judged, dict]:
    """What pictures are held against, rendered truth through the autoencoder; and what truth has.

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


def pictures_of(cell: Cell, folder_of: Callable, most: int | None = None) -> list[np.ndarray]:
    """A cell's pictures, or the first of them, uint8 [H, W, 3]."""
    paths = [folder_of(cell) / f"{i:03}.png" for i in range(cell.count)][:most]
    return [opened(path) for path in paths]


def opened(path: Path) -> np.ndarray:
    """Raises OSError, saying what to do."""
    try:
        return np.asarray(records.open_picture(path))
    except OSError as error:
        raise OSError(f"{path} cannot be read; delete it to have it drawn again") from error


def cell_row(size, name: str, of: Setting | None, found, truth) -> dict:
    n = len(found.right)
    row = {"size": shown_size(size), "setting": name, "n": n, "control": "", "method": None, "dype": None}
    row |= {"lambda_s": None, "lambda_t": None}
    if of is not None:
        config = of.config
        row |= {"text": of.text, "control": of.control, "method": config.method, "dype": config.dype}
        if config.dype and METHOD_SCALES[config.method] is not None:
            row |= {"lambda_s": config.lambda_s, "lambda_t": config.dype_exponent}
    return row | scores.score(found, scores.taken(truth, np.arange(n)))


def compared(some: dict[str, Cell]) -> list[tuple[str, str]]:
    """(setting, what it is held against): dynamic against its own static form, controls against
    what they control, the rest against `base`."""
    found = []
    for name, cell in some.items():
        config, control = cell.setting.config, cell.setting.control
        static = f"{static_form(config.method)}_static" + "_model" * (control == "model")
        others = [name.removesuffix(f"_{control}"), static if config.dype else "base", "base"]
        found += [
            (name, other) for other in dict.fromkeys(others) if other in some and other != name
        ]
    return found


def pair_row(size, name: str, other: str, found: dict, truth) -> dict:
    n = min(len(found[name].right), len(found[other].right))
    first = [scores.taken(part, np.arange(n)) for part in (found[name], found[other], truth)]
    row = {"size": shown_size(size), "setting": name, "against": other, "n": n}
    return row | scores.difference(*first)


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


@torch.no_grad()
def round_trip(vae, picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] through encoder and decoder."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    out = vae.decode(vae.encode(x).latent_dist.mode()).sample[0].permute(1, 2, 0)
    return ((out + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, dB."""
    return float(10 * np.log10(255**2 / np.mean((picture.astype(float) - other) ** 2)))


def strips(cells: list[Cell], folder_of: Callable, path: Path, side: int = 160) -> bytes:
    """A labelled row of the first six pictures per cell, in the format of the path's suffix."""
    font, bar = ImageFont.load_default(16), 26
    sheet = Image.new("RGB", (6 * side, len(cells) * (side + bar)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, cell in enumerate(cells):
        top = row * (side + bar)
        pen.text((4, top + 5), f"{cell.setting.name}, {shown_size(cell.size)} px", "black", font)
        for column, picture in enumerate(pictures_of(cell, folder_of, 6)):
            small = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (column * side, top + bar))
    content = io.BytesIO()
    sheet.save(
        content, Image.registered_extensions()[path.suffix.lower()], optimize=True, quality=80
    )
    return content.getvalue()
