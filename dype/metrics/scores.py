"""Score the images of a sweep one by one, and its settings as sets of images."""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dype.metrics.image_metrics import IMAGE_METRICS, read_generated_image
from dype.metrics.inception_features import INCEPTION_SIZE, View, count_upscaled, stack_features
from dype.metrics.set_metrics import SET_METRICS
from dype.sweep import results

Values = dict[tuple[str, str], dict]  # (file, metric) -> its row of metrics.csv


def image_size(row: dict) -> tuple[int, int]:
    """Return (height, width) of a row of results.csv."""
    return int(row["height"]), int(row["width"])


def image_protocol(name: str, weights: str | None, prompts: Path | None) -> str:
    """Return how an image metric is computed, in a line of text."""
    metric = IMAGE_METRICS[name]
    protocol = weights or metric.protocol
    if metric.prompted and prompts:
        content = hashlib.sha256(prompts.read_bytes()).hexdigest()[:12]
        protocol += f"; prompts of {prompts.name} ({content})"
    return protocol


def check_protocols(values: Values, files: set[str], protocols: dict[str, str]) -> None:
    """Raise ValueError if a value of a metric to compute was computed in another way."""
    for (file, name), row in values.items():
        asked = protocols.get(name, row["protocol"])
        if file in files and row["protocol"] != asked:
            raise ValueError(
                f"{name} in {results.METRICS} is by {row['protocol']!r}, asked for {asked!r}, "
                "expected the same or --overwrite"
            )


def score_images(
    folder: Path, rows: list[dict], values: Values, protocols: dict[str, str],
    loaders: dict[str, Callable[[], AbstractContextManager]], prompts: dict[str, str],
) -> dict[str, str]:  # fmt: skip
    """Compute the values that are not there, and write metrics.csv after each image.

    Args:
        rows: of results.csv, of images.
        values: those that are there; gets the new ones.
        protocols, loaders: by metric.
        prompts: by file.

    Returns:
        Why images were skipped, by file.
    """
    skipped: dict[str, str] = {}
    for name, load in loaders.items():
        missing = [row for row in rows if (row["file"], name) not in values]
        todo = [row for row in missing if row["file"] not in skipped]
        done = len(rows) - len(missing)
        with load() as measure:
            for row in tqdm(todo, name, total=len(rows), initial=done, disable=None):
                file = row["file"]
                try:
                    image = read_generated_image(folder / file, image_size(row))
                    value = measure(image, prompts[file])
                    if not math.isfinite(value):
                        raise ValueError(f"{name} is {value}")
                except OSError as error:
                    skipped[file] = " ".join(str(error).split())
                except ValueError as error:  # another metric may work
                    skipped[f"{file}, {name}"] = str(error)
                else:
                    entry = {"file": file, "metric": name, "value": f"{value:.7g}"}
                    values[file, name] = entry | {"protocol": protocols[name]}
                    write_metrics(folder, values)
    return skipped


def write_metrics(folder: Path, values: Values) -> None:
    """Write metrics.csv, whole or not at all. Raises OSError."""
    results.write_table(folder / results.METRICS, results.METRIC_COLUMNS, values.values())


class SetOptions(NamedTuple):
    """What the command line says of set metrics."""

    real_folder: Path | None
    reals: list[Path]
    filter: str
    patch: int | None
    patches: int
    splits: int
    weights: str

    def view(self, name: str, size: tuple[int, int]) -> View:
        """Return what a metric looks at in images of (height, width)."""
        if not SET_METRICS[name].patched:
            return View(size, None, 1)
        return View(size, self.patch or min(INCEPTION_SIZE, *size), self.patches)

    def protocol(self, name: str, view: View, generated: int, real: int) -> str:
        """Return how a metric is computed from so many images, in a line of text."""
        images = f"{view.patches} patches of {view.patch} px" if view.patch else "whole images"
        reference = f"{self.splits} splits"
        if SET_METRICS[name].real:
            reference = f"{real} real of {self.real_folder.absolute()}, {self.filter}"
        return f"{images}; {generated} generated; {reference}; {self.weights}"


def score_sets(
    folder: Path, rows: list[dict], names: list[str], options: SetOptions,
    load_inception: Callable, entries: list[dict], save: Callable[[dict], None],
) -> dict[str, str]:  # fmt: skip
    """Compute the set metrics of every setting that are not there.

    Args:
        rows: of results.csv, of images.
        names: of set metrics.
        load_inception: called where there is an entry to compute; loads once.
        entries: of an earlier run; gets the new ones in place of those of another protocol.
        save: called with the skipped images after each new entry.

    Returns:
        Why images were skipped, by file.
    """
    skipped, real = {}, {}
    for setting, group in results.by_setting(rows).items():
        paths, size, generated = [folder / row["file"] for row in group], image_size(group[0]), {}
        for name in names:
            view, key = options.view(name, size), {"metric": name, "setting": setting}
            asked = key | {"protocol": options.protocol(name, view, len(paths), len(options.reals))}
            if any(asked.items() <= entry.items() for entry in entries):
                continue
            if view not in generated:
                generated[view] = stack_features(paths, view, None, load_inception(), skipped)
            if SET_METRICS[name].real and view not in real:
                real[view] = stack_features(
                    options.reals, view, options.filter, load_inception(), skipped
                )
            entry = key | set_entry(name, options, view, generated[view], real.get(view))
            entries[:] = [e for e in entries if not key.items() <= e.items()] + [entry]
            save(skipped)
    return skipped


def set_entry(
    name: str, options: SetOptions, view: View, generated: dict | None, real: dict | None
) -> dict:
    """Return a set metric of a setting for metrics.json."""
    if not SET_METRICS[name].real:
        real = None
    counts = [len(features["features"]) if features else 0 for features in (generated, real)]
    entry = {"protocol": options.protocol(name, view, *counts), "value": None, "interval": None}
    entry |= {"generated": counts[0], "real": counts[1], "size": view.size}
    entry["upscaled"] = count_upscaled(options.reals, view.size) if real else 0
    entry["reason"] = why_not_computable(name, generated, *counts, options.splits)
    if not entry["reason"]:
        value, interval = SET_METRICS[name].compute(real, generated, options.splits)
        entry |= {"value": value, "interval": interval}
    return entry


def why_not_computable(
    name: str, features: dict | None, generated: int, real: int, splits: int
) -> str:
    """Return why there are too few images for a set metric, or ""."""
    if generated < 2:
        return f"needs 2 readable images, there are {generated}"
    if SET_METRICS[name].real:
        return "" if real > 1 else f"needs 2 readable real images, there are {real}"
    rows = generated * features["features"].shape[1]
    if rows >= splits:
        return ""
    return f"needs {splits} images or patches, as many as --splits, there are {rows}"
