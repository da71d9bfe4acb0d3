"""The metrics by name, computed over the rows of a sweep."""

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dype.errors import UserError
from dype.metrics import image_metrics, intervals, set_metrics
from dype.metrics.inception_features import INPUT, drawn_picture, enlarged, features, stamp
from dype.sampling import records
from dype.sweep import results


class Single(NamedTuple):
    """A metric of single pictures."""

    load: Callable  # (weights, device, python) -> a context with a function of a Picture
    title: str
    weights: str | None = None  # a hub repository
    prompted: bool = False
    statistic: Callable = intervals.mean


class Sets(NamedTuple):
    """A metric of a set of pictures, by Inception."""

    compute: Callable  # (real or None, drawn, splits) -> value, interval
    title: str
    real: bool
    patched: bool


SINGLE = {
    "clip_score": Single(
        image_metrics.clip_score, "CLIPScore, ViT-L/14, x 100, higher is better",
        "openai/clip-vit-large-patch14", prompted=True,
    ),
    "image_reward": Single(
        image_metrics.image_reward, "ImageReward v1.0, higher is better", prompted=True,
    ),
    "aesthetic": Single(
        image_metrics.aesthetic, "LAION aesthetic predictor V1, ViT-L/14, higher is better",
        "shunk031/aesthetics-predictor-v1-vit-large-patch14",
    ),
    "pick_score": Single(
        image_metrics.pick_score, "PickScore v1, higher is better",
        "yuvalkirstain/PickScore_v1", prompted=True,
    ),
    "glcm": Single(image_metrics.glcm, "GLCM score of Aesthetic-4K, higher is richer"),
    "compression": Single(
        image_metrics.compression,
        "compression ratio of Aesthetic-4K, JPEG 95 4:2:0, harmonic mean, lower is richer",
        statistic=intervals.harmonic_mean,
    ),
}  # fmt: skip
SETS = {
    "fid": Sets(set_metrics.fid, "FID, lower is better", True, False),
    "kid": Sets(set_metrics.kid, "KID, unbiased, lower is better", True, False),
    "is": Sets(set_metrics.score, "Inception score, higher is better", False, False),
    "patch_fid": Sets(set_metrics.fid, "patch FID, lower is better", True, True),
    "patch_kid": Sets(set_metrics.kid, "patch KID, unbiased, lower is better", True, True),
    "patch_is": Sets(set_metrics.score, "patch Inception score, higher is better", False, True),
}


def size_of(row: dict) -> tuple[int, int]:
    return int(row["height"]), int(row["width"])


def write_rows(folder: Path, rows: list[dict]) -> None:
    names = list(dict.fromkeys([*results.COLUMNS, *(name for row in rows for name in row)]))
    text = results.table([{name: name for name in names}, *rows], names)
    records.write({folder / results.RESULTS: text.encode()})


def settle(rows: list[dict], report: dict, hows: dict[str, dict], overwrite: bool) -> None:
    """Empty the columns to be computed anew, and note how each is made. Raises UserError."""
    for name, row in ((name, row) for name in SINGLE for row in rows if row.get(name)):
        try:
            float(row[name])
        except ValueError:
            raise UserError(
                f"{results.RESULTS} has {name} {row[name]!r} of {row['file']}, expected a number"
            ) from None
    for name, how in hows.items():
        before = report["columns"].get(name, {})
        if any(row.get(name) for row in rows) and not overwrite:
            other = [part for part in how | before if how.get(part) != before.get(part)]
            if other:
                raise UserError(
                    f"{name} in {results.RESULTS} is by {other[0]} {before.get(other[0])!r}, "
                    f"asked for {how.get(other[0])!r}, expected the same or --overwrite"
                )
    for name, how in hows.items():
        for row in rows:
            row[name] = "" if overwrite else row.get(name, "")
        report["columns"][name] = how


def score_singles(
    folder: Path, table: list[dict], loads: dict[str, Callable], prompts: dict[str, str]
) -> dict[str, str]:
    """Fill the metrics' columns of results.csv, which is written after each picture.

    table: its rows, those of failed pictures too. loads: metric -> what loads it. prompts: by
    file. Returns why pictures were skipped, by file. Raises UnavailableError, OSError.
    """
    rows = [row for row in table if not row["error"]]
    skipped = {}
    for name, load in loads.items():
        todo = [row for row in rows if not row[name] and row["file"] not in skipped]
        done = len(rows) - len(todo)
        if not todo:
            continue
        with load() as measure:
            for row in tqdm(todo, name, total=len(rows), initial=done, disable=None):
                path = folder / row["file"]
                try:
                    image = drawn_picture(path, size_of(row))
                    value = measure(image_metrics.Picture(path, image, prompts[row["file"]]))
                    if not math.isfinite(value):
                        raise ValueError(f"{name} is {value}")
                except OSError as error:
                    skipped[row["file"]] = " ".join(str(error).split())
                    continue
                except ValueError as error:  # another metric may do
                    skipped[f"{row['file']}, {name}"] = str(error)
                    continue
                row[name] = f"{value:.7g}"
                write_rows(folder, table)
    return skipped


def digest(paths: list[Path]) -> str:
    """Tells a set of files from any other, and from later files of the same names."""
    stamps = [stamp(path) if path.exists() else path.name for path in paths]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:24]


def gather(paths: list[Path], label: str, skipped: dict, *more) -> dict | None:
    """ "features" and "logits" of pictures, [n, patches, ...], of those that can be read."""
    found = []
    for path in tqdm(paths, label, disable=None, leave=False):
        try:
            found.append(features(path, *more))
        except ValueError as error:
            skipped[path.name] = " ".join(str(error).split())
    if not found:
        return None
    return {name: np.stack([one[name] for one in found]).astype(float) for name in found[0]}


def how_of(name: str, how: dict, size: tuple[int, int]) -> dict:
    """What a set metric at (height, width) depends on; patch None is the whole picture."""
    own = {part: how[part] for part in ("weights", "resize")}
    if SETS[name].patched:
        own |= {"patch": how["patch"] or min(INPUT, *size), "patches": how["patches"]}
    else:
        own |= {"patch": None, "patches": 1}
    part = "filter" if SETS[name].real else "splits"
    return own | {part: how[part]}


def cannot(name: str, drawn: dict | None, real: dict | None, splits: int | None) -> str:
    """Why a set metric cannot be computed from what there is, or ""."""
    count = len(drawn["features"]) if drawn else 0
    if count < 2:
        return f"needs 2 readable pictures, there are {count}"
    if SETS[name].real and (real is None or len(real["features"]) < 2):
        return f"needs 2 readable real pictures, there are {len(real['features']) if real else 0}"
    rows = count * drawn["features"].shape[1]
    if not SETS[name].real and rows < splits:
        return f"needs {splits} pictures or patches, as many as --splits, there are {rows}"
    return ""


def score_sets(
    folder: Path, rows: list[dict], names: list[str], reals: list[Path], how: dict, load: Callable,
    known: list[dict],
) -> tuple[list[dict], dict[str, str]]:  # fmt: skip
    """The set metrics of every setting, and why pictures were skipped, by file.

    known: of an earlier run; those from the same files in the same way stand. load: Inception.
    """
    found, skipped, extract = [], {}, None
    with ExitStack() as stack:
        for setting, some in results.by_setting(rows).items():
            paths, size = [folder / row["file"] for row in some], size_of(some[0])
            for name in names:
                against = reals if SETS[name].real else []
                own = how_of(name, how, size)
                entry = {"metric": name, "setting": setting, "how": own}
                entry |= {"drawn": digest(paths), "real": digest(against)}
                counts = {"pictures": len(paths), "reals": len(against), "reason": ""}
                same = [one for one in known if (entry | counts).items() <= one.items()]
                if same:
                    found.append(same[0])
                    continue
                extract = extract or stack.enter_context(load())
                drawn = gather(paths, setting, skipped, folder, own, size, False, extract)
                real = gather(against, "real", skipped, folder, own, size, True, extract)
                entry |= {"enlarged": enlarged(against, size), "size": size}
                found.append(entry | set_entry(name, drawn, real, own))
    return found, skipped


def set_entry(name: str, drawn: dict | None, real: dict | None, how: dict) -> dict:
    """A set metric of a setting for metrics.json."""
    value, interval, reason = None, None, cannot(name, drawn, real, how.get("splits"))
    if not reason:
        value, interval = SETS[name].compute(real, drawn, how.get("splits"))
    counts = [len(one["features"]) if one else 0 for one in (drawn, real)]
    entry = {"value": value, "interval": interval, "reason": reason, "pictures": counts[0]}
    return entry | {"reals": counts[1]}


def keep(known: list[dict], fresh: list[dict], rows: list[dict], folder: Path) -> list[dict]:
    """The fresh entries, and those of an earlier run whose pictures are still the same."""
    ours = {(one["metric"], one["setting"]) for one in fresh}
    now = {
        setting: digest([folder / row["file"] for row in some])
        for setting, some in results.by_setting(rows).items()
    }
    kept = [one for one in known if now.get(one["setting"]) == one["drawn"]]
    return [one for one in kept if (one["metric"], one["setting"]) not in ours] + fresh
