"""`python -m dype.metrics`: its files, how it resumes, and bad input."""

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import table
from scored_sweeps import (
    make_sweep,
    noise,
    replace_inception,
    report,
    score,
    values,
    write_results,
)

from dype.metrics import image_metrics
from dype.sweep import results

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_values_and_means():
    """metrics.csv has no failed images, results.csv does not change, means are per setting."""
    failed = {"error": "out of memory", "seconds": ""}
    folder = make_sweep({}, {"method": "base"}, failed, {})
    before = (folder / "results.csv").read_bytes()
    assert score(folder) == 0
    assert (folder / "results.csv").read_bytes() == before
    assert (folder / "metrics.csv").read_text().startswith("file,metric,value,protocol\n")
    rows = results.read_metrics(folder)
    assert len(rows) == 6
    protocols = {(row["metric"], row["protocol"]) for row in rows}
    assert protocols == {
        ("glcm", "64 gray levels, patches of 64 px"),
        ("compression", "JPEG 95, 4:2:0"),
    }
    expected = image_metrics.measure_glcm(noise(1))
    assert values("glcm")["seed_1.png"] == pytest.approx(expected, rel=1e-6)
    means = {(entry["metric"], entry["setting"]): entry for entry in report()["means"]}
    glcm = means["glcm", "128x96, dy_yarn"]
    numbers = [values("glcm")[f"seed_{i}.png"] for i in (0, 3)]
    assert glcm["generated"] == 2
    assert glcm["value"] == pytest.approx(np.mean(numbers))
    assert min(numbers) - 1e-9 <= glcm["interval"][0] < glcm["interval"][1] <= max(numbers) + 1e-9
    ratios = [1 / values("compression")[f"seed_{i}.png"] for i in (0, 3)]
    assert means["compression", "128x96, dy_yarn"]["value"] == pytest.approx(1 / np.mean(ratios))
    assert means["glcm", "128x96, base"]["interval"] is None
    text = Path("out/metrics.txt").read_text()
    assert f"{glcm['value']:.5g}" in text
    assert "128x96, base" in text
    assert "64 gray levels" in text


SPOILED = {
    "glcm 'much' of seed_0.png, expected a number": "seed_0.png,glcm,much,x\n",
    "metrics.csv is no table of this program": "seed_0.png,glcm,1\n",
    "metrics.csv is no table of this program;": "seed_0.png,glcm,1,x,y\n",
}


@pytest.mark.parametrize("words", SPOILED)
def test_a_spoiled_table(words, capsys):
    folder = make_sweep({})
    text = "file,metric,value,protocol\n" + SPOILED[words]
    Path("out/metrics.csv").write_text(text)
    assert score(folder, "--metrics", "compression") == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert Path("out/metrics.csv").read_text() == text


def test_another_table(capsys):
    folder = make_sweep({})
    for content in (b"file,value\n", b"", b"\xff\xfe"):
        Path("out/metrics.csv").write_bytes(content)
        assert score(folder, "--metrics", "compression") == 2
        assert "metrics.csv is no table of this program; move it away" in capsys.readouterr().err


def test_rows_of_other_files_are_kept():
    """Rows of other files and of other metrics stay byte for byte, also with --overwrite."""
    folder = make_sweep({}, {})
    text = 'gone.png,glcm,1.0,"an ""older"" way, of two"\nseed_0.png,beauty,7.50,x\n'
    Path("out/metrics.csv").write_text("file,metric,value,protocol\n" + text)
    assert score(folder, "--metrics", "glcm") == 0
    assert score(folder, "--metrics", "glcm", "--overwrite") == 0
    _, *lines = Path("out/metrics.csv").read_text().splitlines(keepends=True)
    assert "".join(lines[:2]) == text
    assert len(lines) == 4


def test_another_protocol_is_refused(monkeypatch, capsys):
    """The run stops first, with one sentence; --overwrite computes only that metric again."""
    folder = make_sweep({}, {})
    assert score(folder) == 0
    before, catalog = values("compression"), image_metrics.IMAGE_METRICS
    changed = catalog["glcm"]._replace(protocol="32 gray levels")
    monkeypatch.setitem(catalog, "glcm", changed)
    text = Path("out/metrics.csv").read_text()
    noise(7).save("out/seed_1.png")
    assert score(folder) == 2
    assert capsys.readouterr().err == (
        "dype.metrics: glcm in metrics.csv has the protocol '64 gray levels, patches of 64 px', "
        "this run has '32 gray levels'; use --overwrite to compute it again\n"
    )
    assert Path("out/metrics.csv").read_text() == text
    assert score(folder, "--metrics", "compression") == 0  # because its protocol has not changed
    assert score(folder, "--metrics", "glcm", "--overwrite") == 0
    rows = results.read_metrics(folder)
    assert {row["protocol"] for row in rows if row["metric"] == "glcm"} == {"32 gray levels"}
    assert values("compression") == before  # because --overwrite was for glcm only
    expected = image_metrics.measure_glcm(noise(7))
    assert values("glcm")["seed_1.png"] == pytest.approx(expected, rel=1e-6)


def test_an_interrupted_run_goes_on(monkeypatch, capsys):
    """Existing values stay to the digit and are not computed again; a new image is computed."""
    folder = make_sweep({}, {}, {}, {})
    sizes, measure = [], image_metrics.measure_glcm

    def measure_two(image, prompt):
        sizes.append(image.size)
        if len(sizes) == 3:
            raise KeyboardInterrupt
        return measure(image)

    monkeypatch.setattr(image_metrics, "measure_glcm", measure_two)
    assert score(folder, "--metrics", "glcm") == 130
    assert "the same command" in capsys.readouterr().err
    first = values("glcm")
    assert list(first) == ["seed_0.png", "seed_1.png"]
    assert score(folder, "--metrics", "glcm") == 0
    assert len(sizes) == 5
    assert list(values("glcm").items())[:2] == list(first.items())
    noise(9).save("out/seed_9.png")
    write_results(folder, [*table(), table()[0] | {"file": "seed_9.png"}])
    assert score(folder, "--metrics", "glcm") == 0
    assert len(sizes) == 6
    assert "seed_9.png" in values("glcm")
    assert score(folder, "--metrics", "glcm", "--overwrite") == 0
    assert len(sizes) == 11


def test_a_kill_keeps_the_values():
    """A kill during a write keeps the previous table; the next run deletes the partial file."""
    folder = make_sweep({}, {}, {})

    def run_and_die():
        replace, count = Path.replace, []

        def replace_or_die(path, target):
            count.append(path)
            if len(count) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(path, target)

        Path.replace = replace_or_die
        score(folder, "--metrics", "compression")

    child = multiprocessing.get_context("fork").Process(target=run_and_die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert list(values("compression")) == ["seed_0.png", "seed_1.png"]
    assert list(folder.glob(".metrics.csv.*.part"))
    assert score(folder, "--metrics", "compression") == 0
    assert len(values("compression")) == 3
    assert not list(folder.glob(".*.part"))


def test_an_interrupted_overwrite_leaves_no_old_values(monkeypatch):
    """Otherwise the next run would take the old values for values of the new protocol."""
    replace_inception(monkeypatch)
    folder, argv = make_sweep({}, {}), ["--metrics", "glcm", "is", "--splits", 1]
    assert score(folder, *argv) == 0
    assert len(report()["sets"]) == 1

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dype.metrics.scores.stack_features", interrupt)
    assert score(folder, *argv, "--overwrite") == 130
    assert values("glcm") == {}
    assert report()["sets"] == []


BAD = {
    "--metrics is 'beauty', expected clip_score": ["out", "--metrics", "beauty"],
    "fid compares with real images, expected --real": ["out", "--metrics", "fid"],
    "--real is for fid": ["out", "--metrics", "glcm", "--real", "out"],
    "--real is 'nowhere', expected a folder": ["out", "--real", "nowhere"],
    "holds 0 images, expected two or more": ["out", "--real", "bare"],
    "bare has no results.csv with images": ["bare"],
    "nowhere has no results.csv with images": ["nowhere"],
    "text/results.csv is no table of this program": ["text"],
    "failed has no results.csv with images": ["failed"],
    "--prompts is for clip_score": ["out", "--metrics", "glcm", "--prompts", "p.txt"],
    "--prompts p.txt cannot be read: No such file": ["out", "--prompts", "p.txt"],
    "--weights is 'clip', expected NAME=PATH": ["out", "--weights", "clip"],
    "--weights is 'glcm=x', expected": ["out", "--weights", "glcm=x"],
    "--weights clip_score is 'x', expected a folder": ["out", "--weights", "clip_score=x"],
    "--weights inception is 'bare', expected a file": ["out", "--weights", "inception=bare"],
    "--patches is 0, expected 1 or more": ["out", "--metrics", "patch_is", "--patches", "0"],
    "--splits is -1, expected 1 or more": ["out", "--metrics", "is", "--splits", "-1"],
    "--patch is 97, expected 1 to 96": ["out", "--metrics", "patch_is", "--patch", "97"],
    "argument --patch: invalid int value: 'x'": ["out", "--patch", "x"],
    "argument --filter: invalid choice: 'box'": ["out", "--filter", "box"],
    "the following arguments are required: FOLDER": [],
    "unrecognized arguments: --resize tf1": ["out", "--resize", "tf1"],
}


@pytest.mark.parametrize("words", BAD)
def test_a_mistake_is_one_sentence(words, capsys):
    make_sweep({})
    make_sweep({"error": "out of memory", "seconds": ""}, folder="failed")
    Path("bare").mkdir()
    Path("text").mkdir()
    Path("text/results.csv").write_text("no,table\n1,2\n")
    before = Path("out/results.csv").read_bytes()
    assert score(*BAD[words]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert Path("out/results.csv").read_bytes() == before
    assert not Path("out/metrics.csv").exists()
    assert not Path("out/metrics.json").exists()


def test_all_is_every_metric_that_any_sweep_can_have():
    """It excludes the demo's metrics and ImageReward, which needs another environment."""
    from dype.metrics import __main__ as metrics

    args = metrics.parser().parse_args(["out", "--metrics", "all", "--real", "real"])
    expected = "clip_score aesthetic pick_score glcm compression"
    expected += " fid kid is patch_fid patch_kid patch_is"
    assert metrics.select_metrics(args) == expected.split()


def test_a_missing_device(capsys):
    assert score(make_sweep({}), "--device", "tpu") == 1
    assert "no device tpu" in capsys.readouterr().err


def test_a_spoiled_report(capsys):
    folder = make_sweep({})
    for content in ("[1]", '{"sets": [{}]}', '{"sets": [{"metric": "beauty"}]}', "{"):
        Path("out/metrics.json").write_text(content)
        assert score(folder) == 2
        assert "metrics.json is not a report" in capsys.readouterr().err
    Path("out/metrics.json").write_text('{"sets": [{"metric": "fid"}]}')  # of an earlier version
    assert score(folder) == 0


def test_one_run_at_a_time(capsys):
    folder = make_sweep({})
    with results.lock_folder(folder):
        assert score(folder) == 1
    assert "another run is at work in out; wait for it" in capsys.readouterr().err


def test_the_page_has_the_scores():
    """The command writes the page of the sweep again, so that its table has the new scores."""
    folder = make_sweep({}, {})
    assert score(folder, "--metrics", "glcm") == 0
    data = re.search(r'id="data">(.*?)</script>', (folder / "index.html").read_text())[1]
    [column] = [item for item in json.loads(data)["scores"] if item["name"] == "glcm"]
    assert all("glcm" in image["scores"] for image in json.loads(data)["images"]), column
