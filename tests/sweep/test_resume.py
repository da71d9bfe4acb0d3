"""A sweep that is killed again and again ends as one that never was."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dype.sampling import records

ROOT = Path(__file__).parents[2]
SWEEP = "--model demo --method yarn_paper,ntk --seed 0-2 --size 64,96x64 --steps 1 --true_cfg 1"
SWEEP += " --base_resolution 32 --output_dir out"
CUES = [
    ["png", 1],
    ["png", 2],
    ["draw", 2],
    ["table", 2],
    ["png_there", 1],
    ["json_there", 1],
    ["json", 1],
    ["table", 1],
    ["png", 1],
    ["draw", 1],
    ["png_there", 2],
    ["sheets", 1],
]
UNEQUAL = {"seconds", "peak_memory"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What a sweep left that was killed at every cue, and one that was not."""
    if not hasattr(os, "fork"):
        pytest.skip("kills forked children")
    killed, whole = (tmp_path_factory.mktemp(name) for name in ("killed", "whole"))
    cues = [[str(killed), *cue] for cue in CUES] + [[str(killed)], [str(killed)], [str(whole)]]
    words = [sys.executable, ROOT / "tests" / "interrupted.py", json.dumps(cues)]
    done = subprocess.run(
        [*words, *SWEEP.split()],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [-9] * len(CUES) + [0, 0, 0]
    return killed / "out", whole / "out"


def table(folder: Path) -> list[dict]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_same_files(folders):
    killed, whole = (sorted(path.name for path in folder.iterdir()) for folder in folders)
    assert killed == whole
    assert len([name for name in killed if name.startswith("seed_")]) == 2 * 12
    assert {"results.csv", "summary.txt", "comparison_64x64.png"} <= set(killed)


def test_the_same_pixels(folders):
    for path in folders[1].glob("*.png"):
        pair = [np.asarray(Image.open(folder / path.name)) for folder in folders]
        assert (pair[0] == pair[1]).all(), path.name


def test_the_same_records(folders):
    """In the images and beside them, but for seconds and memory."""
    for path in folders[1].glob("seed_*.png"):
        found = []
        for folder in folders:
            record = records.read_record(folder / path.name)
            beside = (folder / path.name).with_suffix(".json")
            assert record == json.loads(beside.read_text())
            found.append({k: v for k, v in record.items() if k not in UNEQUAL})
        assert found[0] == found[1]


def test_each_cell_once_in_the_table(folders):
    killed, whole = (table(folder) for folder in folders)
    assert len({row["file"] for row in killed}) == len(killed) == 12
    assert all((folders[0] / row["file"]).exists() and not row["error"] for row in killed)
    for one, other in zip(killed, whole, strict=True):
        assert {k: v for k, v in one.items() if k not in UNEQUAL} == {
            k: v for k, v in other.items() if k not in UNEQUAL
        }
        assert float(one["seconds"]) > 0
        assert int(one["peak_memory"]) > 0
