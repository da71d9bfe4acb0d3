"""Write folders of finished sweeps and score them by `python -m dype.metrics` in-process."""

import csv
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dype.metrics import __main__ as metrics
from dype.metrics import inception_features
from dype.sweep import results

PROMPT = "a red sun over blue mountains"
FEATURES, CLASSES = 12, 5


def noise(seed: int, height: int = 96, width: int = 128) -> Image.Image:
    """Return an image with coarse and fine structure."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    fine = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.asarray(coarse.resize((width, height))) // 2 + fine)


def write_results(folder: Path, rows: list[dict]) -> None:
    with (folder / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, results.COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def make_sweep(*changes: dict, folder: str = "out") -> Path:
    """Write a sweep's folder: a row and an image for each dict of changed columns."""
    path, rows = Path(folder), []
    path.mkdir(exist_ok=True)
    for number, change in enumerate(changes):
        default = dict.fromkeys(results.COLUMNS, "") | {"file": f"seed_{number}.png"}
        default |= {"height": "96", "width": "128", "method": "dy_yarn", "seed": str(number)}
        row = default | {"prompt": PROMPT, "seconds": "1.0", "peak_memory": "1"} | change
        if not row["error"]:
            noise(number, int(row["height"]), int(row["width"])).save(path / row["file"])
        rows.append(row)
    write_results(path, rows)
    return path


def make_reals(count: int, folder: str = "real") -> Path:
    Path(folder).mkdir()
    for number in range(count):
        noise(100 + number, 120, 140).save(f"{folder}/{number}.png")
    return Path(folder)


def score(*argv) -> int:
    return metrics.main([str(word) for word in argv])


def report(folder: str = "out") -> dict:
    return json.loads(Path(folder, "metrics.json").read_text())


def values(name: str, folder: str = "out") -> dict[str, float]:
    """Return the values of a metric by file."""
    rows = results.read_metrics(Path(folder))
    return {row["file"]: float(row["value"]) for row in rows if row["metric"] == name}


def random_projection():
    """Return a fixed random projection of images at 8 x 8, as a replacement of Inception."""
    rng = np.random.default_rng(5)
    to_features = rng.normal(size=(192, FEATURES))
    to_logits = rng.normal(size=(FEATURES, CLASSES))

    def extract(images):
        small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(images).double(), 8)
        features = small.flatten(1).numpy() / 255 @ to_features
        return features, features @ to_logits

    return extract


def replace_inception(monkeypatch) -> list[int]:
    """Replace Inception by the projection; returns the list of each call's number of images."""
    call_sizes, project = [], random_projection()

    def extract(images):
        call_sizes.append(len(images))
        return project(images)

    monkeypatch.setattr(inception_features, "load_inception", lambda weights, device: extract)
    return call_sizes
