"""Score the images of a sweep, one by one and as sets, and write the metrics per setting."""

import json
import math
from functools import cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dype.errors import UserError
from dype.metrics.image_metrics import IMAGE_METRICS, read_generated_image
from dype.metrics.inception_features import INCEPTION_SIZE, stack_features
from dype.metrics.set_metrics import SET_METRICS
from dype.sampling import records
from dype.sweep import results

REPORT, TABLE = "metrics.json", "metrics.txt"
METRICS = IMAGE_METRICS | SET_METRICS
ENTRY_KEYS = ("setting", "protocol", "value", "interval", "reason")  # of a set metric
ENTRY_KEYS += ("generated", "real", "size", "upscaled")
HEADER = f"{'n':>5} {'value':>10}  {'95 % interval':22}  width x height, setting"
INTERVAL_NOTE = (
    "Intervals are 95 % intervals. A bootstrap over the generated images gives 1.96 standard "
    "deviations for FID and Inception score, and percentiles for the rest. demo_layout has "
    "Wilson's interval."
)
BIAS_NOTE = (
    "The FID of a few hundred images is biased upward. Compare it only within one pipeline, and at "
    "equal numbers of generated and real images. KID has no such bias."
)


def score_images(
    args, rows: list[dict], names: list[str], values: dict, protocols: dict[str, str]
) -> dict[str, str]:
    """Compute the missing values of image metrics; write metrics.csv after each image.

    Args:
        args: the command line.
        rows: rows of results.csv, each with its "size", (height, width).
        names: image metrics.
        values: existing rows of metrics.csv by (file, metric); receives the new ones.
        protocols: protocol by metric.

    Returns:
        The reasons for skipped images, by file name.
    """
    skipped: dict[str, str] = {}
    for name in names:
        with IMAGE_METRICS[name].load(args.weights.get(name), args.device) as measure:
            for row in tqdm(rows, name, disable=None):
                file = row["file"]
                if file in skipped or (file, name) in values:
                    continue
                try:
                    image = read_generated_image(args.folder / file, row["size"])
                    value = measure(image, row["prompt"])
                    if not math.isfinite(value):
                        raise ValueError(f"{name} is {value}")
                except OSError as error:
                    skipped[file] = " ".join(str(error).split())
                except ValueError as error:  # of this metric only, because another may work
                    skipped[f"{file}, {name}"] = str(error)
                else:
                    entry = {"file": file, "metric": name, "value": f"{value:.7g}"}
                    values[file, name] = entry | {"protocol": protocols[name]}
                    write_metrics(args.folder, values)
    return skipped


def write_metrics(folder: Path, values: dict) -> None:
    """Write metrics.csv atomically. Raises OSError."""
    results.write_table(folder / results.METRICS, results.METRIC_COLUMNS, values.values())


def set_protocol(args, name: str, patch: int | None, generated: int, real: int) -> str:
    """Return the protocol of a set metric, one line of text.

    Args:
        args: the command line.
        name: the set metric.
        patch: side of a patch, px; None for whole images.
        generated: number of generated images.
        real: number of real images.
    """
    images = f"{args.patches} patches of {patch} px" if patch else "whole images"
    reference = f"{args.splits} splits"
    if SET_METRICS[name].uses_real:
        reference = f"{real} real of {args.real.absolute()}, {args.filter}"
    return f"{images}; {generated} generated; {reference}; {args.weights['inception']}"


def score_sets(
    args, rows: list[dict], names: list[str], values: dict, sets: dict
) -> dict[str, str]:
    """Compute the missing set metrics of every setting; write the report after each.

    Args:
        args: the command line.
        rows: rows of results.csv, each with its "size", (height, width).
        names: set metrics.
        values: rows of metrics.csv by (file, metric), for the report.
        sets: existing entries by (metric, setting); a new entry is appended, and replaces one of
            another protocol.

    Returns:
        The reasons for skipped images, by file name.
    """
    skipped: dict[str, str] = {}
    stack = partial(stack_features, args, skipped)
    filters = {path: None if size else args.filter for path, size in args.real_paths.items()}

    @cache
    def stack_real(paths: tuple[Path, ...], size: tuple[int, int], patch: int | None) -> dict:
        # A sweep's images have the size already, and are checked rather than resized.
        real_filter = filters[paths[0]] if paths else None
        return stack(paths, real_filter, size, patch)

    for setting, group in results.group_by_setting(rows).items():
        paths, size = [args.folder / row["file"] for row in group], group[0]["size"]
        stack_generated = cache(partial(stack, paths, None))
        real_paths = tuple(p for p, real in args.real_paths.items() if real in (None, size))
        left_out = len(args.real_paths) - len(real_paths)
        for name in names:
            metric = SET_METRICS[name]
            patch = (args.patch or min(INCEPTION_SIZE, *size)) if metric.uses_patches else None
            protocol = set_protocol(args, name, patch, len(paths), len(real_paths))
            if sets.get((name, setting), {}).get("protocol") == protocol:
                continue
            generated = stack_generated(size, patch)
            real = stack_real(real_paths, size, patch) if metric.uses_real else None
            entry = set_entry(args, name, size, patch, generated, real)
            if metric.uses_real and left_out:
                entry["left_out"] = left_out
            sets.pop((name, setting), None)
            sets[name, setting] = {"metric": name, "setting": setting} | entry
            write_report(args.folder, rows, values, sets, skipped)
    return skipped


def set_entry(
    args, name: str, size: tuple[int, int], patch: int | None, generated: dict, real: dict | None
) -> dict:
    """Compute a set metric of a setting and return its entry of metrics.json.

    Args:
        args: the command line.
        name: the set metric.
        size: (height, width) of the images, px.
        patch: side of a patch, px; None for whole images.
        generated: result of `stack_features` for the setting's images.
        real: the same for the real images; None if the metric does not use them.
    """
    real = real or {"features": [], "upscaled": 0}
    metric, count, real_count = SET_METRICS[name], len(generated["features"]), len(real["features"])
    samples = count * (args.patches if patch else 1)
    value, interval, reason = None, None, ""
    if count < 2:
        reason = f"needs 2 readable images, found {count}"
    elif metric.uses_real and real_count < 2:
        reason = f"needs 2 readable real images, found {real_count}"
    elif not metric.uses_real and samples < args.splits:
        reason = f"needs {args.splits} images or patches for --splits, found {samples}"
    else:
        value, interval = metric.compute(real, generated, args.splits)
    protocol = set_protocol(args, name, patch, count, real_count)
    entry = {"protocol": protocol, "value": value, "interval": interval, "generated": count}
    entry |= {"real": real_count, "size": size, "upscaled": real["upscaled"]}
    return entry | {"reason": reason}


def read_set_entries(folder: Path) -> dict[tuple[str, str], dict]:
    """Return the set metrics of an earlier run by (metric, setting). Raises UserError."""
    path = folder / REPORT
    try:
        entries = json.loads(path.read_bytes())["sets"] if path.exists() else []
        # Drop entries of earlier versions, because without a protocol they cannot be compared.
        entries = [e for e in entries if SET_METRICS[e["metric"]] and "protocol" in e]
        for entry in entries:
            [entry[name] for name in ENTRY_KEYS]
        return {(entry["metric"], entry["setting"]): entry for entry in entries}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a report of this program; move it away") from error


def summarize_image_metrics(rows: list[dict], values: dict) -> list[dict]:
    """Return mean and interval of every image metric per protocol and setting."""
    entries = []
    for name, metric in IMAGE_METRICS.items():
        groups: dict[tuple[str, str], list[float]] = {}
        for setting, group in results.group_by_setting(rows).items():
            for row in (values[r["file"], name] for r in group if (r["file"], name) in values):
                groups.setdefault((row["protocol"], setting), []).append(float(row["value"]))
        for (protocol, setting), numbers in sorted(groups.items(), key=lambda item: item[0][0]):
            array = np.array(numbers)
            entry = {"metric": name, "setting": setting, "protocol": protocol}
            entry |= {"generated": len(array), "value": float(metric.statistic(array))}
            entries.append(entry | {"interval": metric.interval(array, metric.statistic)})
    return entries


def format_report(entries: list[dict], notes: list[str]) -> str:
    """Return metrics.txt: a block for each metric and protocol, a line for each setting."""
    lines, last_title = [], ""
    for entry in entries:
        title = f"{entry['metric']}: {METRICS[entry['metric']].title}; {entry['protocol']}"
        if title != last_title:
            lines += ["", title, HEADER]
            last_title = title
        if entry["value"] is None:
            lines.append(f"{entry['generated']:5} {'-':>10}  {entry['setting']}: {entry['reason']}")
            continue
        interval = "[{:.5g}, {:.5g}]".format(*entry["interval"]) if entry["interval"] else "-"
        value = f"{entry['generated']:5} {entry['value']:10.5g}"
        lines.append(f"{value}  {interval:22}  {entry['setting']}")
    return "\n".join([*lines[1:], "", *notes, ""])


def make_notes(rows: list[dict], sets: list[dict], skipped: dict[str, str]) -> list[str]:
    """Return the remarks below the report: intervals, sizes, bias and skipped images."""
    sizes = {row["size"] for row in rows}
    notes = [INTERVAL_NOTE]
    if len(sizes) > 1:
        notes.append(f"The images have {len(sizes)} sizes; every number uses images of one size.")
    if any(SET_METRICS[entry["metric"]].uses_real for entry in sets):
        notes.append(BIAS_NOTE)
    for entry in sets:
        real, generated, upscaled = (entry[name] for name in ("real", "generated", "upscaled"))
        if entry["value"] is not None and 0 < real < generated:
            notes.append(f"There are only {real} real images for {generated} generated images.")
        size = "{1}x{0}".format(*entry["size"])
        if left_out := entry.get("left_out"):
            notes.append(
                f"{left_out} real images are of another size than {size} and were left out."
            )
        if upscaled:
            notes.append(f"{upscaled} real images are smaller than {size} and were upscaled.")
    notes += [f"Skipped {file}: {reason}" for file, reason in skipped.items()]
    return list(dict.fromkeys(notes))


def write_report(
    folder: Path, rows: list[dict], values: dict, sets: dict, skipped: dict[str, str]
) -> str:
    """Write metrics.json and metrics.txt, and return the text.

    Args:
        folder: folder of the sweep.
        rows: rows of results.csv, each with its "size".
        values: rows of metrics.csv by (file, metric).
        sets: set metrics by (metric, setting).
        skipped: reasons for skipped images, by file name.

    Raises:
        OSError: the files cannot be written.
    """
    means = summarize_image_metrics(rows, values)
    notes = make_notes(rows, [*sets.values()], skipped)
    entries = sorted(sets.values(), key=lambda entry: [*SET_METRICS].index(entry["metric"]))
    report = {"means": means, "sets": entries, "skipped": skipped, "notes": notes}
    text = format_report(means + entries, notes)
    records.write_atomically(
        {folder / REPORT: records.to_json(report), folder / TABLE: text.encode()}
    )
    return text
