"""dype/metrics/image_reward.py in an interpreter of its own, with a stand-in for the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import table
from scored_sweeps import make_sweep, report, score, values

from dype.metrics import image_reward, metrics_csv
from dype.sweep import results

pytestmark = pytest.mark.usefixtures("own_folder")

PACKAGE = """
import os, pathlib, signal, sys
assert not [name for name in sys.modules if name.split(".")[0] in ("dype", "torch", "PIL")]
class Model:
    calls = 0
    def score(self, prompt, path):
        Model.calls += 1
        if os.environ.get("KILL_AT") == str(Model.calls):
            os.kill(os.getpid(), signal.SIGKILL)
        return len(prompt) + pathlib.Path(path).stat().st_size / 1e6
def load(name, device=None, med_config=None):
    print("load", name, device, med_config)
    return Model()
"""


@pytest.fixture
def package():
    Path("ImageReward.py").write_text(PACKAGE)


def run(*argv, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, image_reward.__file__, *map(str, argv)]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_scores_of_the_package(package):
    """Prompt and image of every row but failed ones; other metrics and files keep their rows."""
    folder = make_sweep({}, {"prompt": 'a "disk", red'}, {"error": "out of memory", "seconds": ""})
    assert score(folder, "--metrics", "glcm") == 0
    kept = metrics_csv.read_metrics(folder)
    kept.append({"file": "gone.png", "metric": "image_reward", "value": "1.0", "protocol": "x"})
    metrics_csv.write_metrics(folder, kept)
    before = (folder / "results.csv").read_bytes()
    done = run(folder, "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert "load ImageReward-v1.0 cpu None" in done.stdout
    rows = metrics_csv.read_metrics(folder)
    assert rows[:3] == kept
    assert [row["file"] for row in rows[3:]] == ["seed_0.png", "seed_1.png"]
    for row, image in zip(rows[3:], table(), strict=False):
        expected = len(image["prompt"]) + (folder / image["file"]).stat().st_size / 1e6
        assert float(row["value"]) == pytest.approx(expected, rel=1e-6)
        assert row["protocol"] == "ImageReward-v1.0"
    assert (folder / "results.csv").read_bytes() == before
    assert score(folder, "--metrics", "compression") == 0  # the report knows it
    (mean,) = (entry for entry in report()["means"] if entry["metric"] == "image_reward")
    assert (mean["generated"], mean["protocol"]) == (2, "ImageReward-v1.0")
    assert "image_reward: ImageReward v1.0, higher is better" in Path("out/metrics.txt").read_text()


def test_weights_of_a_folder(package):
    """Named in the protocol; other weights than those of the values are refused."""
    folder = make_sweep({})
    Path("weights").mkdir()
    done = run(folder, "--weights", "weights")
    assert done.returncode == 0
    assert "load weights/ImageReward.pt None weights/med_config.json" in done.stdout
    (row,) = metrics_csv.read_metrics(folder)
    assert row["protocol"] == str(Path("weights").absolute())
    refused = run(folder)
    assert refused.returncode == 2
    assert "asked for 'ImageReward-v1.0', expected the same or --overwrite" in refused.stderr
    assert run(folder, "--overwrite").returncode == 0
    assert [r["protocol"] for r in metrics_csv.read_metrics(folder)] == ["ImageReward-v1.0"]


def test_a_killed_run_goes_on(package):
    """Values stay over a kill and are not computed again; --overwrite leaves no old ones."""
    folder = make_sweep({}, {}, {})
    assert run(folder, KILL_AT="3").returncode == -9
    assert list(values("image_reward")) == ["seed_0.png", "seed_1.png"]
    assert run(folder, KILL_AT="2").returncode == 0  # one image is left
    assert len(values("image_reward")) == 3
    again = run(folder, KILL_AT="1")
    assert again.returncode == 0
    assert "0 images scored, 3 had a value" in again.stdout
    assert run(folder, "--overwrite", KILL_AT="2").returncode == -9
    assert list(values("image_reward")) == ["seed_0.png"]


def test_an_image_that_is_gone_is_skipped(package):
    folder = make_sweep({}, {})
    (folder / "seed_0.png").unlink()
    done = run(folder)
    assert done.returncode == 1
    assert "Skipped seed_0.png: " in done.stdout
    assert list(values("image_reward")) == ["seed_1.png"]


def test_mistakes_are_one_sentence(package):
    folder = make_sweep({})
    Path("bare").mkdir()
    make_sweep({}, folder="spoiled")
    Path("spoiled/metrics.csv").write_text("no,table\n1,2\n")
    cases = {
        "bare has no results.csv with images": (["bare"], 2),
        "spoiled/metrics.csv is no table of this program; move it away": (["spoiled"], 2),
        "--weights is 'nowhere', expected a folder": ([folder, "--weights", "nowhere"], 2),
    }
    for words, (argv, code) in cases.items():
        done = run(*argv)
        assert (done.returncode, done.stdout) == (code, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    with results.locked(folder):
        done = run(folder)
    assert done.returncode == 1
    assert "another run is at work in out; wait for it" in done.stderr
    Path("ImageReward.py").write_text("import no_such_module")
    done = run(folder)
    assert done.returncode == 1
    assert "cannot import ImageReward (No module named 'no_such_module')" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("out/metrics.csv").exists()
