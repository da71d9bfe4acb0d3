"""Score a sweep's images by ImageReward v1.0 (arXiv 2304.05977), into FOLDER/metrics.csv:

    reward/bin/python dype/metrics/image_reward.py FOLDER

The package needs older libraries than this program, so it runs in an environment of its own
(docs/metrics.md). This file imports nothing of dype. Images that have a value keep it.
"""

import argparse
import csv
import math
import os
import sys
from pathlib import Path

METRIC, COLUMNS = "image_reward", ["file", "metric", "value", "protocol"]


def stop(message: str, code: int = 1):
    """End with one sentence on stderr: 2 for a user's mistake, 1 for what is missing."""
    print(f"{METRIC}: {message}", file=sys.stderr)
    sys.exit(code)


def read_table(path: Path, columns: list) -> list:
    """Return the rows of a CSV file that has these columns; none where there is no file."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file, strict=True)
            rows = list(table)
        if not set(columns) <= set(table.fieldnames or []):
            raise ValueError
        if any(None in row or None in row.values() for row in rows):
            raise ValueError
    except (ValueError, csv.Error):
        stop(f"{path} is no table of this program; move it away", 2)
    return rows


def write_table(path: Path, rows: list) -> None:
    """Write metrics.csv, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def lock_folder(folder: Path) -> None:
    """Keep other runs out of a folder until this process ends."""
    try:
        import fcntl

        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return
    except BlockingIOError:
        stop(f"another run is at work in {folder}; wait for it")


def load_model(weights, device):
    """Load ImageReward, from a folder or from the hub."""
    try:
        import ImageReward
    except ImportError as error:
        stop(
            f"{sys.executable} cannot import ImageReward ({error}); docs/metrics.md says how to "
            "make an environment for it"
        )
    options = {"name": "ImageReward-v1.0"}
    if weights:
        options["name"] = str(weights / "ImageReward.pt")
        options["med_config"] = str(weights / "med_config.json")
    if device:
        options["device"] = device
    return ImageReward.load(**options)


def score(model, image: dict, folder: Path) -> float:
    """Return the score of a row of results.csv. Raises OSError, ValueError."""
    value = float(model.score(image["prompt"], str(folder / image["file"])))
    if not math.isfinite(value):
        raise ValueError(f"the score is {value}")
    return value


def score_folder(folder: Path, weights, device, overwrite: bool) -> int:
    """Score the images that have no value; returns the exit code."""
    if weights and not weights.is_dir():
        stop(f"--weights is {str(weights)!r}, expected a folder that exists", 2)
    images = read_table(folder / "results.csv", ["file", "prompt", "error"])
    images = [row for row in images if not row["error"]]
    if not images:
        stop(f"{folder} has no results.csv with images, expected a finished sweep", 2)
    lock_folder(folder)
    path, files = folder / "metrics.csv", {row["file"] for row in images}
    protocol = str(weights.absolute()) if weights else "ImageReward-v1.0"
    rows = read_table(path, COLUMNS)
    present = [row for row in rows if row["metric"] == METRIC and row["file"] in files]
    for old in {row["protocol"] for row in present} - {protocol}:
        if not overwrite:
            expected = "expected the same or --overwrite"
            stop(f"{METRIC} in metrics.csv is by {old!r}, asked for {protocol!r}, {expected}", 2)
    done = set() if overwrite else {row["file"] for row in present}
    todo = [row for row in images if row["file"] not in done]
    model = load_model(weights, device) if todo else None
    rows = [row for row in rows if row not in present or row["file"] in done]
    skipped = 0
    for image in todo:
        try:
            value = f"{score(model, image, folder):.7g}"
            rows.append(dict(zip(COLUMNS, (image["file"], METRIC, value, protocol))))  # noqa: B905
        except (OSError, ValueError) as error:
            print(f"Skipped {image['file']}: {error}")
            skipped += 1
        write_table(path, rows)
    print(f"{METRIC}: {len(todo) - skipped} images scored, {len(done)} had a value")
    return 1 if skipped else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a finished sweep")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="with ImageReward.pt and "
                        "med_config.json (default: from the hub)")  # fmt: skip
    parser.add_argument("--device", metavar="NAME", help="(default: the package's)")
    parser.add_argument("--overwrite", action="store_true", help="compute anew what is there")
    try:
        return score_folder(**vars(parser.parse_args()))
    except OSError as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop("interrupted; the same command computes the rest", 130)


if __name__ == "__main__":
    sys.exit(main())
