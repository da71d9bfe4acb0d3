"""Running a sweep: its files, resuming, repairs and errors."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_DEMO, run, table
from PIL import Image

from dype.pipelines.fingerprint import fingerprint
from dype.sampling import records, sample
from dype.sampling import run as sampling_run
from dype.sweep import results
from dype.sweep import run as sweep_run

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_a_sweep_from_one_command(capsys, monkeypatch):
    """A sweep writes images, records, table, sheets, summary; a second run generates nothing."""
    loads, load = [], sampling_run.load_pipeline

    def spy(*args, **kwargs):
        loads.append(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(sampling_run, "load_pipeline", spy)
    flags = "--method yarn,base --seed 0-1 --size 64,64x96 --output_dir out"
    line = [*TINY_DEMO, *flags.split()]
    assert run(*line) == 0
    rows = table()
    assert len(rows) == 8
    assert {row["method"] for row in rows} == {"dy_yarn", "base"}
    assert {(row["height"], row["width"]) for row in rows} == {("64", "64"), ("96", "64")}
    for row in rows:
        record = records.read_record(Path("out") / row["file"])
        assert record["flags"]["seed"] == int(row["seed"])
        assert record["seconds"] == float(row["seconds"])
        image = records.open_image(Path("out") / row["file"])
        assert image.size == (int(row["width"]), int(row["height"]))
    assert (Path("out") / "comparison_96x64.png").exists()
    text = Path("out/summary.txt").read_text()
    assert text.count("dy_yarn") == 2
    before = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("seed_*")}
    capsys.readouterr()
    assert run(*line) == 0
    assert "out: 8 images, 8 finished" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").glob("seed_*")} == before
    assert table() == rows
    assert [call["pixels"] for call in loads] == [64 * 96]


def test_a_longer_list_adds_images(monkeypatch):
    """A longer list or another setting generates only new images; names do not change."""
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out"]
    assert run(*line, "--seed", "0-1") == 0
    first = table()
    seeds = []
    generate = sample.generate
    monkeypatch.setattr(
        sample, "generate", lambda *a, **k: seeds.append(k["seed"]) or generate(*a, **k)
    )
    assert run(*line, "--seed", "0-3") == 0
    assert run(*line, "--seed", "0-1", "--dype_scale", "1,2") == 0
    assert run(*line, "--seed", "0", "--guidance", "2,5", "--base_resolution", "48") == 0
    assert seeds == [2, 3, 0, 1, 0, 0]
    rows = table()
    assert all(row in rows for row in first)
    assert len({row["file"] for row in rows}) == len(rows) == 8
    assert (
        sorted(row["settings"] for row in rows)
        == ["base_resolution 32"] * 6 + ["base_resolution 48"] * 2
    )


def test_settings_without_a_column_of_their_own():
    """One column names them all, so that sheets and summary separate them from the defaults."""
    line = ["--model", "demo", "--steps", "1", "--size", "64", "--seed", "0-1", "--output_dir", "o"]
    assert run(*line) == 0
    assert run(*line, "--isotropic", "--base_resolution", "32") == 0
    settings = ["defaults"] * 2 + ["base_resolution 32, anisotropic off"] * 2
    assert [row["settings"] for row in table("o")] == settings
    lines = Path("o/summary.txt").read_text().splitlines()[1:3]
    assert [line.split("64x64, dy_yarn_paper, ")[1] for line in lines] == [settings[0], settings[2]]


@pytest.fixture
def gray_runs(monkeypatch) -> list:
    """Return the runs that a sweep generates, each as a gray image, without a model."""
    runs = []

    def generate(pipe, run, *args):
        runs.append(run)
        record = run.record | {"commit": None, "tiled_vae": False, "seconds": 1, "peak_memory": 1}
        record["weights"] = {part: fingerprint(*x) for part, x in run.weight_sources.items()}
        return Image.new("RGB", (64, 64), "gray"), record

    pipe = SimpleNamespace(set_progress_bar_config=lambda disable: None)
    for name in ("load_for_run", "prepare_pipeline", "prompt_encoder"):
        monkeypatch.setattr(sweep_run, name, lambda *args: pipe)
    monkeypatch.setattr(sweep_run, "generate_with_record", generate)
    return runs


def read_images() -> dict[Path, bytes]:
    """Return the contents of all images and records."""
    return {path: path.read_bytes() for path in Path("out").glob("seed_*")}


def test_an_image_without_its_text_is_known_by_its_json(gray_runs):
    """A program that makes PNGs smaller may remove their text."""
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    for path in Path("out").glob("seed_*.png"):
        Image.new("RGB", (64, 64)).save(path)
    before = read_images()
    assert run(*line) == 0
    assert read_images() == before
    assert [run.seed for run in gray_runs] == [0, 1]


EDITS = {  # lists of prompts, of which the second follows the first -> prompts that are new
    "removed": ("a b c", "a c", ""),
    "all but one removed": ("a b c", "b", ""),
    "all but a new one removed": ("a b c", "d", "d"),
    "reordered": ("a b c", "c a b", ""),
    "replaced": ("a b c", "a d c", "d"),
    "inserted": ("a b", "d a b", "d"),
    "edited throughout": ("a b", "d a e", "d e"),
    "repeated": ("a b", "b a b", ""),
}
FORMS = {"file": "--prompts_file prompts.txt", "flags": "--prompt={}"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edit", EDITS)
def test_images_are_known_by_their_settings(edit, form, gray_runs):
    """Whatever becomes of a list, images stay, and only new ones are generated."""

    def run_list(texts):
        Path("prompts.txt").write_text("\n".join(texts))
        words = [word.format(text) for word in FORMS[form].split() for text in texts]
        words = words if form == "flags" else FORMS[form].split()
        assert run(*TINY_DEMO, "--size", "64", "--output_dir", "out", *words) == 0

    first, second, new = (words.split() for words in EDITS[edit])
    run_list(first)
    before = read_images()
    gray_runs.clear()
    run_list(second)
    assert [run.prompt for run in gray_runs] == new
    assert [row["prompt"] for row in table()] == first + new
    assert before.items() <= read_images().items()
    assert len(read_images()) == 2 * len(first + new)


def test_a_shorter_list_of_seeds_generates_nothing(gray_runs):
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out"]
    assert run(*line, "--seed", "0-2") == 0
    before = sorted(os.listdir("out"))
    for seeds in ("0-1", "2,0", "1"):
        assert run(*line, "--seed", seeds) == 0
        assert sorted(os.listdir("out")) == before
    assert [run.seed for run in gray_runs] == [0, 1, 2]
    assert [row["seed"] for row in table()] == ["0", "1", "2"]


def test_another_table_is_not_in_the_way_of_a_single_image():
    """A single image joins only a sweep that can be continued."""
    Path("out").mkdir()
    Path("out/results.csv").write_text("a,b\n1,2\n")
    assert run(*TINY_DEMO, "--size", "64", "--output_dir", "out") == 0
    assert len(read_images()) == 2
    assert Path("out/results.csv").read_text() == "a,b\n1,2\n"


def test_rows_go_with_their_images(gray_runs):
    """The row of a deleted image goes, unless the command generates the image again."""
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out"]
    assert run(*line, "--seed", "0-2") == 0
    for path in Path("out").glob("seed_[01]*.png"):
        path.unlink()
    assert run(*line, "--seed", "1-2") == 0
    assert [row["seed"] for row in table()] == ["1", "2"]


def test_a_folder_of_an_earlier_version(gray_runs, capsys):
    """It can be read but not continued: one sentence says what to do, and nothing changes."""
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    path = Path("out/results.csv")
    rows = [{k: v for k, v in row.items() if k != "settings"} for row in table()]
    results.write_table(path, list(rows[0]), rows)
    before = path.read_bytes()
    for flags in ([], ["--dry_run"], ["--overwrite"]):
        capsys.readouterr()
        assert run(*line, *flags) == 2
        assert "of an earlier version" in capsys.readouterr().err
    assert path.read_bytes() == before
    path.write_bytes(before + before.splitlines()[-1][:30])  # killed within a line
    assert run("--grid_from", "out") == 0
    assert len(results.read_rows(Path("out"))) == 2


def test_an_image_that_has_lost_its_text(gray_runs, capsys):
    """The JSON beside it counts if it is of the same size; a file that is no image stays."""
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    path = next(Path("out").glob("seed_0*.png"))
    Image.new("RGB", (64, 64)).save(path)
    assert run(*line, "--dry_run") == 0
    assert "2 images, 2 finished" in capsys.readouterr().out
    Image.new("RGB", (64, 32)).save(path)
    assert run(*line, "--dry_run") == 2
    assert "is not of the size in seed_0" in capsys.readouterr().err
    path.write_text("no image")
    assert run(*line, "--dry_run") == 2
    assert "is not of the size in seed_0" in capsys.readouterr().err


BROKEN = {
    "no record": (None, "it carries no settings"),
    "flags a list": ({"flags": [], "config": {}, "prompt": "x"}, "no complete settings"),
    "empty": ({}, "no complete settings"),
    "unknown method": ({"flags": {}, "config": {"method": "x"}, "prompt": "x"}, "no complete"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_foreign_image_stays(name, gray_runs, capsys):
    record, reason = BROKEN[name]
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    path = next(Path("out").glob("seed_0*.png"))
    if record is None:
        Image.new("RGB", (8, 8)).save(path)
    else:
        records.save_image(Image.new("RGB", (8, 8)), record, path)
    before = path.read_bytes()
    capsys.readouterr()
    assert run(*line) == 2
    error = capsys.readouterr().err
    assert f"{path} is in the way" in error
    assert reason in error
    assert path.read_bytes() == before
    assert run(*line, "--overwrite") == 0
    assert records.read_record(path)["flags"]["seed"] == 0


def test_a_table_that_a_spreadsheet_has_saved(gray_runs):
    """It has a byte order mark and other line ends."""
    assert run(*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 0
    path, rows = Path("out/results.csv"), results.read_rows(Path("out"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert results.read_rows(Path("out")) == rows


def test_a_metric_named_like_a_column(gray_runs):
    """A metric does not replace a column, and an unknown column is not a metric."""
    assert run(*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 0
    rows = [row | {"note": "nice"} for row in table()]
    results.write_table(Path("out/results.csv"), [*rows[0]], rows)
    entry = {"file": rows[0]["file"], "metric": "height", "value": "0.5", "protocol": ""}
    results.write_table(Path("out/metrics.csv"), results.METRIC_COLUMNS, [entry])
    assert [row["height"] for row in results.read_rows(Path("out"))] == ["64", "64"]
    assert run("--grid_from", "out") == 0


def test_a_deleted_image_is_generated_again_under_its_name(gray_runs):
    """The JSON that is left does not change the name."""
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    before = sorted(os.listdir("out"))
    path = next(Path("out").glob("seed_0*.png"))
    content = path.read_bytes()[:200]
    path.unlink()
    assert run(*line) == 0
    assert sorted(os.listdir("out")) == before
    assert len(table()) == 2
    assert path.read_bytes()[:30] == content[:30]


def test_an_outdated_json_is_repaired(gray_runs):
    """A kill between the JSON and the image may leave one."""
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    path = next(Path("out").glob("seed_0*.json"))
    expected = path.read_bytes()
    path.write_text('{"prompt": "outdated"}')
    assert run(*line) == 0
    assert path.read_bytes() == expected


def test_one_image_of_a_named_sweep_is_a_sweep(capsys):
    """It has its own folder and a table."""
    line = ["--model", "demo", "--steps", "1", "--sweep", "methods", "--multipass_only"]
    assert run(*line, "--base_resolution", "32") == 0
    assert len(table("outputs/methods")) == 1
    capsys.readouterr()
    assert run(*line, "--base_resolution", "32") == 0
    assert "1 images, 1 finished" in capsys.readouterr().out


def test_an_image_of_other_settings_in_the_way(gray_runs, capsys):
    """The error names the flag that differs; --overwrite generates the image again."""
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    path, second = sorted(Path("out").glob("seed_*.png"))
    path.write_bytes(second.read_bytes())
    capsys.readouterr()
    assert run(*line) == 2
    err = capsys.readouterr().err
    assert f"--seed is 0, but {path} was generated with 1" in err
    assert path.read_bytes() == second.read_bytes()
    assert run(*line, "--overwrite") == 0
    assert "2 images, 1 finished" in capsys.readouterr().out
    assert records.read_record(path)["flags"]["seed"] == 0


FAILURES = [
    None,
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    MemoryError(),
    ValueError("no such thing"),
    IndexError("no such thing"),
    None,
]


def test_failures_are_recorded_and_the_sweep_continues(monkeypatch, capsys):
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-6"]
    generate = sample.generate

    def fail(*args, **kwargs):
        if error := FAILURES[kwargs["seed"]]:
            raise error
        return generate(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", fail)
    assert run(*line) == 1
    assert "5 of 7 images failed" in capsys.readouterr().err
    for row, error in zip(table(), FAILURES, strict=True):
        assert bool(row["error"]) == bool(error)
        expected = "no such thing" if "such" in str(error) else "out of memory at a peak of"
        assert error is None or expected in row["error"]
        assert (Path("out") / row["file"]).exists() == (error is None)
    assert Path("out/summary.txt").read_text().splitlines()[1].split()[:2] == ["2", "5"]
    monkeypatch.setattr(sample, "generate", generate)
    assert run(*line) == 0
    assert [(row["seed"], row["error"]) for row in table()] == [(n, "") for n in "0123456"]


def test_out_of_memory_suggests_a_cheaper_setting(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sample, "generate", fail)
    assert run(*TINY_DEMO, "--size", "64") == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"run_dype.py: out of memory at a peak of .* GiB; try --tiled_vae on", err)


def test_dry_run_prints_the_plan(gray_runs, capsys):
    """The plan has the number of images and, after a first image, a time; nothing is written."""
    line = [*TINY_DEMO, "--size", "64,128", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "4 images, 0 finished; the time is unknown until the first is done" in out
    assert not Path("out").exists()
    assert run(*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 0
    capsys.readouterr()
    assert run(*line, "--dry_run") == 0
    out = capsys.readouterr().out
    assert out.count("  (finished)\n") == 2
    assert re.search(r"4 images, 2 finished; about \d+ s left at the same speed", out)


def test_two_sweeps_in_one_folder(gray_runs, capsys):
    """The second sweep is told to wait; the lock ends with its process."""
    os.mkdir("out")
    code = "import fcntl, os, sys; fcntl.flock(os.open('out', 0), 2); print(flush=True); input()"
    line = [*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        assert run(*line) == 1
        assert "another run is at work in out; wait for it" in capsys.readouterr().err
        process.kill()
    assert run(*line) == 0


def test_multipass_and_init_image_by_the_command_line():
    """Two passes equal a small image and --init_image; the record has the sigmas of each pass."""
    line = [*TINY_DEMO[:2], "--base_resolution", "32", "--steps", "4"]
    assert (
        run(*line, "--size", "192x128", "--dype_multipass", "twopass", "--output", "two.png") == 0
    )
    assert run(*line, "--size", "96x64", "--output", "small.png") == 0
    from_small = ["--init_image", "small.png", "--strength", "0.5"]
    assert run(*line, "--size", "192x128", *from_small, "--output", "one.png") == 0
    two_passes, refined = (np.asarray(Image.open(name)) for name in ("two.png", "one.png"))
    assert (two_passes == refined).all()
    passes = records.read_record("two.png")["passes"]
    assert [(p["height"], p["width"], len(p["sigmas"])) for p in passes] == [
        (64, 96, 5),
        (128, 192, 3),
    ]
    assert records.read_record("one.png")["passes"][0]["sigmas"] == passes[1]["sigmas"]
    assert run("--from", "two.png", "--output", "again.png") == 0
    assert (np.asarray(Image.open("again.png")) == two_passes).all()
    Image.new("RGB", (96, 64)).save("small.png")
    assert run("--from", "one.png", "--output", "other.png") == 2
    assert run("--from", "one.png", "--init_image", "small.png", "--output", "other.png") == 0
    assert (np.asarray(Image.open("other.png")) != two_passes).any()
    assert run(*line, "--size", "96x64", "--output", "small.png", "--overwrite") == 0
    weaker = ["--strength", "0.25", "--output", "weaker.png"]
    assert run("--from", "one.png", *weaker) == 0
    assert len(records.read_record("weaker.png")["passes"][0]["sigmas"]) == 2
    assert run("--from", "one.png", "--output", "again2.png") == 0
    assert (np.asarray(Image.open("again2.png")) == two_passes).all()
