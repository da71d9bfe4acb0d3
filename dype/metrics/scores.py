"""Score the images of a sweep one by one, and its settings as sets of images."""

import math
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from dype.metrics.image_metrics import read_generated_image
from dype.metrics.inception_features import INCEPTION_SIZE, stack_features
from dype.metrics.set_metrics import SET_METRICS
from dype.sweep import results


def score_images(
    folder: Path, rows: list[dict], values: dict, protocols: dict, loaders: dict[str, Callable]
) -> dict[str, str]:
    """Compute the values that are not there, and write metrics.csv after each image.

    rows: of results.csv, of images, with their "size". values: rows of metrics.csv by (file,
    metric), those that are there; gets the new ones. protocols, loaders: by metric; a loader
    takes nothing and returns a context of `image_metrics`.
    Returns why images were skipped, by file.
    """
    skipped: dict[str, str] = {}
    for name, load in loaders.items():
        with load() as measure:
            for row in tqdm(rows, name, disable=None):
                file = row["file"]
                if file in skipped or (file, name) in values:
                    continue
                try:
                    image = read_generated_image(folder / file, row["size"])
                    value = measure(image, row["prompt"])
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


def write_metrics(folder: Path, values: dict) -> None:
    """Write metrics.csv, whole or not at all. Raises OSError."""
    results.write_table(folder / results.METRICS, results.METRIC_COLUMNS, values.values())


def set_protocol(args, name: str, patch: int | None, generated: int, real: int) -> str:
    """Return how a set metric is computed from so many images, in a line of text."""
    images = f"{args.patches} patches of {patch} px" if patch else "whole images"
    reference = f"{args.splits} splits"
    if SET_METRICS[name].real:
        reference = f"{real} real of {args.real.absolute()}, {args.filter}"
    return f"{images}; {generated} generated; {reference}; {args.weights['inception']}"


def score_sets(
    args, rows: list[dict], names: list[str], sets: dict, save: Callable[[dict], str]
) -> dict[str, str]:
    """Compute the set metrics of every setting that are not there.

    rows: as in `score_images`. names: of set metrics. sets: entries of an earlier run by (metric,
    setting); gets the new ones, at its end, in place of those of another protocol. save: called
    with the skipped images after each new entry.
    Returns why images were skipped, by file.
    """
    skipped, real = {}, {}
    for setting, group in results.by_setting(rows).items():
        paths, size = [args.folder / row["file"] for row in group], group[0]["size"]
        generated = {}
        for name in names:
            patch = None
            if SET_METRICS[name].patched:
                patch = args.patch or min(INCEPTION_SIZE, *size)
            protocol = set_protocol(args, name, patch, len(paths), len(args.reals))
            if sets.get((name, setting), {}).get("protocol") == protocol:
                continue
            view = size, patch
            if view not in generated:
                generated[view] = stack_features(args, paths, *view, None, skipped)
            if SET_METRICS[name].real and view not in real:
                real[view] = stack_features(args, args.reals, *view, args.filter, skipped)
            entry = set_entry(args, name, *view, generated[view], real.get(view))
            sets.pop((name, setting), None)
            sets[name, setting] = {"metric": name, "setting": setting} | entry
            save(skipped)
    return skipped


def set_entry(
    args, name: str, size: tuple[int, int], patch: int | None, generated: dict, real: dict | None
) -> dict:
    """Return a set metric of a setting for metrics.json."""
    metric, count = SET_METRICS[name], len(generated["features"])
    real_count = len(real["features"]) if metric.real else 0
    samples = count * (args.patches if patch else 1)
    value, interval, reason = None, None, ""
    if count < 2:
        reason = f"needs 2 readable images, there are {count}"
    elif metric.real and real_count < 2:
        reason = f"needs 2 readable real images, there are {real_count}"
    elif not metric.real and samples < args.splits:
        reason = f"needs {args.splits} images or patches, as many as --splits, there are {samples}"
    else:
        value, interval = metric.compute(real, generated, args.splits)
    protocol = set_protocol(args, name, patch, count, real_count)
    upscaled = real["upscaled"] if metric.real else 0
    entry = {"protocol": protocol, "value": value, "interval": interval, "generated": count}
    return entry | {"real": real_count, "size": size, "upscaled": upscaled, "reason": reason}
