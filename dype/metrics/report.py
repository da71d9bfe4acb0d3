"""metrics.json and metrics.txt: the metrics of a sweep per setting and size, with intervals."""

import json
from pathlib import Path

import numpy as np

from dype.errors import UserError
from dype.metrics import intervals
from dype.metrics.inception_features import INPUT
from dype.metrics.scores import SETS, SINGLE, size_of
from dype.sampling import records
from dype.sweep import results

REPORT, TABLE = "metrics.json", "metrics.txt"
RESIZED = {
    "antialias": f"brought to {INPUT} px antialiased",
    "tf1": f"brought to {INPUT} px as TensorFlow 1 did",
}
HEAD = "height x width, setting"
NOTE = (
    "Intervals are of 95 %, by bootstrap over the drawn pictures: percentiles; for FID and "
    "Inception score 1.96 standard deviations."
)
BIAS = (
    "A FID of a couple of hundred pictures is biased upward: it compares only within one pipeline "
    "and at one count of drawn and real pictures. KID has no such bias."
)


def read_report(folder: Path) -> dict:
    """metrics.json of an earlier run, or an empty one. Raises UserError."""
    path = folder / REPORT
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
        return {"columns": dict(found.get("columns", {})), "sets": list(found.get("sets", []))}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no report of this program; move it away") from error


def means(rows: list[dict]) -> list[dict]:
    """Mean and interval of every metric of single pictures that there is, per setting."""
    found = []
    for name, metric in SINGLE.items():
        for setting, some in results.by_setting(rows).items():
            values = np.array([float(row[name]) for row in some if row.get(name)])
            if len(values):
                entry = {"metric": name, "setting": setting, "pictures": len(values)}
                entry["value"] = float(metric.statistic(values))
                found.append(entry | {"interval": intervals.interval(values, metric.statistic)})
    return found


def describe(one: dict, columns: dict) -> str:
    """The line above a metric's table: what it is and how it was computed."""
    name = one["metric"]
    if name in SINGLE:
        how = columns.get(name, {})
        more = [how["weights"]] if how.get("weights") else []
        more += [f"prompts of {how['prompts']}"] if how.get("prompts") else []
        return "; ".join([f"{name}: {SINGLE[name].title}", *more])
    how, resized = one["how"], RESIZED[one["how"]["resize"]]
    seen = f"whole pictures {resized}"
    if how["patch"]:
        seen = f"{how['patches']} patches of {how['patch']} px of a picture, {resized}"
    more = f"{one['reals']} real pictures, {how['filter']}" if SETS[name].real else ""
    more = more or f"{how['splits']} splits"
    return "; ".join([f"{name}: {SETS[name].title}", seen, more])


def text_of(entries: list[dict], columns: dict, notes: list[str]) -> str:
    """metrics.txt: a block for each metric, a line for each setting."""
    lines, last = [], None
    for one in entries:
        title = describe(one, columns)
        if title != last:
            lines += ["", title, f"{'n':>5} {'value':>10}  {'95 % interval':22}  " + HEAD]
            last = title
        if one["value"] is None:
            lines.append(f"{one['pictures']:5} {'-':>10}  {one['setting']}: {one['reason']}")
            continue
        low, high = one["interval"] or (None, None)
        span = "-" if low is None else f"[{low:.5g}, {high:.5g}]"
        lines.append(f"{one['pictures']:5} {one['value']:10.5g}  {span:22}  {one['setting']}")
    return "\n".join([*lines[1:], "", *notes, ""])


def notes(rows: list[dict], sets: list[dict], skipped: dict[str, str]) -> list[str]:
    """What a reader of the numbers has to know."""
    sizes = {size_of(row) for row in rows}
    found = [NOTE]
    if len(sizes) > 1:
        found.append(f"The pictures have {len(sizes)} sizes; every number is of one of them.")
    if any(SETS[one["metric"]].real for one in sets):
        found.append(BIAS)
    for one in sets:
        if one["value"] is not None and 0 < one["reals"] < one["pictures"]:
            found.append(
                f"There are only {one['reals']} real pictures for {one['pictures']} drawn ones."
            )
        if one["enlarged"]:
            found.append(
                f"{one['enlarged']} of the real pictures are smaller than "
                f"{one['size'][0]}x{one['size'][1]} and were enlarged."
            )
    found = list(dict.fromkeys(found))
    return found + [f"Skipped {file}: {reason}" for file, reason in skipped.items()]


def write_report(folder: Path, rows: list[dict], report: dict, skipped: dict[str, str]) -> str:
    """Write metrics.json and metrics.txt; returns the text. Raises OSError."""
    entries = means(rows) + sorted(report["sets"], key=lambda one: [*SETS].index(one["metric"]))
    more = notes(rows, report["sets"], skipped)
    whole = {"columns": report["columns"], "means": means(rows), "sets": report["sets"]}
    whole |= {"skipped": skipped, "notes": more}
    text = text_of(entries, report["columns"], more)
    records.write({folder / REPORT: records.text_of(whole), folder / TABLE: text.encode()})
    return text
