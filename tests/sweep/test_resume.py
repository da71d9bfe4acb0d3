"""A sweep that is killed many times ends like an uninterrupted one."""

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
SWEEP = "--model demo --method yarn_paper,ntk --seed 0-2 --size 64,96x64 --steps 1"
SWEEP += " --base_resolution 32 --output_dir out"
CUES = [
    ["png", 1],
    ["png", 2],
    ["generate", 2],
    ["table", 2],
    ["png_exists", 1],
    ["json_exists", 1],
    ["json", 1],
    ["table", 1],
    ["png", 1],
    ["generate", 1],
    ["png_exists", 2],
    ["sheets", 1],
]
UNEQUAL = {"seconds", "peak_memory"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of a sweep that was killed at every cue and of an uninterrupted one."""
    if not hasattr(os, "fork"):
        pytest.skip("kills forked children")
    names = ("killed", "uninterrupted")
    killed, uninterrupted = (tmp_path_factory.mktemp(name) for name in names)
    cues = [[str(killed), *cue] for cue in CUES]
    cues += [[str(killed)], [str(killed)], [str(uninterrupted)]]
    program = [sys.executable, ROOT / "tests" / "interrupted.py", json.dumps(cues)]
    result = subprocess.run(
        [*program, *SWEEP.split()],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    codes = json.loads(result.stdout.splitlines()[-1])
    assert codes == [-9] * len(CUES) + [0, 0, 0]
    return killed / "out", uninterrupted / "out"


def table(folder: Path) -> list[dict]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_same_files(folders):
    killed, uninterrupted = (sorted(path.name for path in folder.iterdir()) for folder in folders)
    assert killed == uninterrupted
    assert len([name for name in killed if name.startswith("seed_")]) == 2 * 12
    assert {"results.csv", "summary.txt", "comparison_64x64.png"} <= set(killed)


def test_the_same_pixels(folders):
    for path in folders[1].glob("*.png"):
        pair = [np.asarray(Image.open(folder / path.name)) for folder in folders]
        assert (pair[0] == pair[1]).all(), path.name


def test_the_same_records(folders):
    """The records in PNG and JSON are the same, except for seconds and memory."""
    for path in folders[1].glob("seed_*.png"):
        pair = []
        for folder in folders:
            record = records.read_record(folder / path.name)
            json_path = (folder / path.name).with_suffix(".json")
            assert record == json.loads(json_path.read_text())
            pair.append({k: v for k, v in record.items() if k not in UNEQUAL})
        assert pair[0] == pair[1]


def test_each_image_once_in_the_table(folders):
    killed, uninterrupted = (table(folder) for folder in folders)
    assert len({row["file"] for row in killed}) == len(killed) == 12
    assert all((folders[0] / row["file"]).exists() and not row["error"] for row in killed)
    for row, expected in zip(killed, uninterrupted, strict=True):
        assert {k: v for k, v in row.items() if k not in UNEQUAL} == {
            k: v for k, v in expected.items() if k not in UNEQUAL
        }
        assert float(row["seconds"]) > 0
        assert int(row["peak_memory"]) > 0
