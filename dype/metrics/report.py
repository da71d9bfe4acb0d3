"""Write metrics.json and metrics.txt: the metrics of a sweep per setting, with intervals."""

import json
from pathlib import Path

import numpy as np

from dype.errors import UserError
from dype.metrics.image_metrics import IMAGE_METRICS
from dype.metrics.set_metrics import SET_METRICS
from dype.sampling import records
from dype.sweep import results

REPORT, TABLE = "metrics.json", "metrics.txt"
METRICS = IMAGE_METRICS | SET_METRICS
ENTRY = ("setting", "protocol", "value", "interval", "reason")  # of a set metric
ENTRY += ("generated", "real", "size", "upscaled")
HEADER = f"{'n':>5} {'value':>10}  {'95 % interval':22}  height x width, setting"
NOTE = (
    "Intervals are of 95 %, by bootstrap over the generated images: percentiles; for FID and "
    "Inception score 1.96 standard deviations. Of demo_layout, a share, they are Wilson's."
)
BIAS = (
    "A FID of a couple of hundred images is biased upward: it compares only within one pipeline "
    "and at one count of generated and real images. KID has no such bias."
)


def read_set_entries(folder: Path) -> dict[tuple[str, str], dict]:
    """Return the set metrics of an earlier run, by metric and setting. Raises UserError."""
    path = folder / REPORT
    try:
        entries = json.loads(path.read_bytes())["sets"] if path.exists() else []
        # Earlier versions wrote no protocol: nothing tells whether their values are up to date.
        entries = [e for e in entries if SET_METRICS[e["metric"]] and "protocol" in e]
        for entry in entries:
            [entry[name] for name in ENTRY]
        return {(entry["metric"], entry["setting"]): entry for entry in entries}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no report of this program; move it away") from error


def summarize_image_metrics(rows: list[dict], values: dict) -> list[dict]:
    """Return mean and interval of every image metric that is there, per protocol and setting."""
    entries = []
    for name, metric in IMAGE_METRICS.items():
        groups: dict[tuple[str, str], list[float]] = {}
        for setting, group in results.by_setting(rows).items():
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
    lines, last = [], ""
    for entry in entries:
        title = f"{entry['metric']}: {METRICS[entry['metric']].title}; {entry['protocol']}"
        if title != last:
            lines += ["", title, HEADER]
            last = title
        if entry["value"] is None:
            lines.append(f"{entry['generated']:5} {'-':>10}  {entry['setting']}: {entry['reason']}")
            continue
        interval = "[{:.5g}, {:.5g}]".format(*entry["interval"]) if entry["interval"] else "-"
        value = f"{entry['generated']:5} {entry['value']:10.5g}"
        lines.append(f"{value}  {interval:22}  {entry['setting']}")
    return "\n".join([*lines[1:], "", *notes, ""])


def make_notes(rows: list[dict], sets: list[dict], skipped: dict[str, str]) -> list[str]:
    """Return what a reader of the numbers has to know."""
    sizes = {row["size"] for row in rows}
    notes = [NOTE]
    if len(sizes) > 1:
        notes.append(f"The images have {len(sizes)} sizes; every number is of one of them.")
    if any(SET_METRICS[entry["metric"]].real for entry in sets):
        notes.append(BIAS)
    for entry in sets:
        real, generated, upscaled = (entry[name] for name in ("real", "generated", "upscaled"))
        if entry["value"] is not None and 0 < real < generated:
            notes.append(f"There are only {real} real images for {generated} generated ones.")
        if upscaled:
            size = "{}x{}".format(*entry["size"])
            notes.append(f"{upscaled} of the real images are smaller than {size} and upscaled.")
    notes = list(dict.fromkeys(notes))
    return notes + [f"Skipped {file}: {reason}" for file, reason in skipped.items()]


def write_report(
    folder: Path, rows: list[dict], values: dict, sets: dict, skipped: dict[str, str]
) -> str:
    """Write metrics.json and metrics.txt; returns the text. Raises OSError."""
    means = summarize_image_metrics(rows, values)
    notes = make_notes(rows, [*sets.values()], skipped)
    entries = sorted(sets.values(), key=lambda entry: [*SET_METRICS].index(entry["metric"]))
    report = {"means": means, "sets": entries, "skipped": skipped, "notes": notes}
    text = format_report(means + entries, notes)
    records.write({folder / REPORT: records.text_of(report), folder / TABLE: text.encode()})
    return text
