"""Running a sweep: what is written, found again, mended, refused."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, run, table
from PIL import Image

from dype.sampling import records, sample
from dype.sampling import run as sampling_run
from dype.sweep import results
from dype.sweep import run as run_images

pytestmark = pytest.mark.usefixtures("own_folder")


def test_a_sweep_from_one_command(capsys, monkeypatch):
    """Images, records, table, sheets and summary; a second time nothing is drawn or loaded."""
    loads, load = [], sampling_run.load_pipeline

    def counted(*args, **kwargs):
        loads.append(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(sampling_run, "load_pipeline", counted)
    line = [*TINY, *shlex.split("--method yarn,base --seed 0-1 --size 64,64x96 --output_dir out")]
    assert run(*line) == 0
    rows = table()
    assert len(rows) == 8
    assert {row["method"] for row in rows} == {"dy_yarn", "base"}
    assert {(row["height"], row["width"]) for row in rows} == {("64", "64"), ("96", "64")}
    for row in rows:
        record = records.read_record(Path("out") / row["file"])
        assert record["flags"]["seed"] == int(row["seed"])
        assert record["seconds"] == float(row["seconds"])
        picture = records.open_image(Path("out") / row["file"])
        assert picture.size == (int(row["width"]), int(row["height"]))
    assert (Path("out") / "comparison_96x64.png").exists()
    text = Path("out/summary.txt").read_text()
    assert text.count("dy_yarn") == 2
    before = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("seed_*")}
    capsys.readouterr()
    assert run(*line) == 0
    assert "out: images 8, there already 8" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").glob("seed_*")} == before
    assert table() == rows
    assert [call["pixels"] for call in loads] == [64 * 96]


def test_more_of_the_same_is_added(monkeypatch):
    """A longer list, or another setting, draws what is new; names hang on no other image."""
    line = [*TINY, "--size", "64", "--output_dir", "out"]
    assert run(*line, "--seed", "0-1") == 0
    first = table()
    draws = []
    draw = sample.generate
    monkeypatch.setattr(
        sample, "generate", lambda *a, **k: draws.append(k["seed"]) or draw(*a, **k)
    )
    assert run(*line, "--seed", "0-3") == 0
    assert run(*line, "--seed", "0-1", "--dype_scale", "1,2") == 0
    assert run(*line, "--seed", "0", "--true_cfg", "2,5", "--base_resolution", "48") == 0
    assert draws == [2, 3, 0, 1, 0, 0]
    rows = table()
    assert all(row in rows for row in first)
    assert len({row["file"] for row in rows}) == len(rows) == 8
    assert (
        sorted(row["settings"] for row in rows)
        == ["base_resolution 32"] * 6 + ["base_resolution 48"] * 2
    )


def test_settings_without_a_column_of_their_own():
    """They are named in one, by which sheets and summary tell them apart from the defaults."""
    line = ["--model", "demo", "--steps", "1", "--size", "64", "--seed", "0-1", "--output_dir", "o"]
    assert run(*line, "--true_cfg", "1") == 0
    assert run(*line, "--true_cfg", "1", "--isotropic", "--base_resolution", "32") == 0
    told = ["defaults"] * 2 + ["base_resolution 32, anisotropic off"] * 2
    assert [row["settings"] for row in table("o")] == told
    lines = Path("o/summary.txt").read_text().splitlines()[1:3]
    assert [line.split("64x64, dy_yarn_paper, ")[1] for line in lines] == [told[0], told[2]]


def test_an_edited_prompts_file(monkeypatch):
    """Images are known by their records: what is new is drawn, what is gone stays."""
    line = [*TINY, "--size", "64", "--output_dir", "out", "--prompts_file", "prompts.txt"]
    Path("prompts.txt").write_text("a ring\na cross\n")
    assert run(*line) == 0
    before = {path.name: path.read_bytes() for path in Path("out").glob("seed_*.png")}
    drawn, draw = [], run_images.generate_with_record

    def counted(pipe, run, *args):
        drawn.append(run.prompt)
        return draw(pipe, run, *args)

    monkeypatch.setattr(run_images, "generate_with_record", counted)
    Path("prompts.txt").write_text("a disk\na ring\na star\n")
    assert run(*line) == 0
    assert drawn == ["a disk", "a star"]
    assert [row["prompt"] for row in table()] == ["a ring", "a cross", "a disk", "a star"]
    for name, content in before.items():
        assert Path("out", name).read_bytes() == content


def test_a_folder_of_an_earlier_version(capsys):
    """It can be read, not gone on with: one sentence says what to do, and nothing changes."""
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    path = Path("out/results.csv")
    rows = [{k: v for k, v in row.items() if k != "settings"} for row in table()]
    results.write_table(path, list(rows[0]), rows)
    before = path.read_bytes()
    for more in ([], ["--dry_run"], ["--overwrite"]):
        capsys.readouterr()
        assert run(*line, *more) == 2
        assert "of an earlier version" in capsys.readouterr().err
    assert path.read_bytes() == before
    path.write_bytes(before + before.splitlines()[-1][:30])  # killed within a line
    assert run("--grid_from", "out") == 0
    assert len(results.read_rows(Path("out"))) == 2


BROKEN = {
    "nobody's": (None, "it carries no settings"),
    "flags a list": ({"flags": [], "config": {}, "prompt": "x"}, "no complete settings"),
    "nothing in it": ({}, "no complete settings"),
    "unknown method": ({"flags": {}, "config": {"method": "x"}, "prompt": "x"}, "no complete"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_somebody_elses_picture_stays(name, capsys):
    record, reason = BROKEN[name]
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
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


def test_a_metric_named_like_a_column():
    """It takes no column's place, and a column of somebody's is no metric."""
    assert run(*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 0
    rows = [row | {"note": "nice"} for row in table()]
    results.write_table(Path("out/results.csv"), [*rows[0]], rows)
    entry = {"file": rows[0]["file"], "metric": "height", "value": "0.5", "protocol": ""}
    results.write_table(Path("out/metrics.csv"), results.METRIC_COLUMNS, [entry])
    assert [row["height"] for row in results.read_rows(Path("out"))] == ["64", "64"]
    assert run("--grid_from", "out") == 0


def test_a_deleted_picture_is_drawn_again_under_its_name():
    """Its record, left alone, is no reason for another name."""
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    before = sorted(os.listdir("out"))
    gone = next(Path("out").glob("seed_0*.png"))
    pixels = gone.read_bytes()[:200]
    gone.unlink()
    assert run(*line) == 0
    assert sorted(os.listdir("out")) == before
    assert len(table()) == 2
    assert gone.read_bytes()[:30] == pixels[:30]


def test_a_record_of_before_an_overwrite_is_mended():
    """As a kill between image and record leaves it."""
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    beside = next(Path("out").glob("seed_0*.json"))
    right = beside.read_bytes()
    beside.write_text('{"prompt": "of before"}')
    assert run(*line) == 0
    assert beside.read_bytes() == right


def test_one_picture_of_a_named_sweep_is_a_sweep(capsys):
    """In its own folder, with a table."""
    line = ["--model", "demo", "--steps", "1", "--sweep", "methods", "--multipass_only"]
    assert run(*line, "--base_resolution", "32") == 0
    assert len(table("outputs/methods")) == 1
    capsys.readouterr()
    assert run(*line, "--base_resolution", "32") == 0
    assert "there already 1" in capsys.readouterr().out


def test_an_image_of_other_settings_in_the_way(capsys):
    """As another rule of names would leave it: the flag is named, --overwrite draws it again."""
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    path, other = sorted(Path("out").glob("seed_*.png"))
    path.write_bytes(other.read_bytes())
    capsys.readouterr()
    assert run(*line) == 2
    err = capsys.readouterr().err
    assert f"--seed is 0, but {path} was drawn with 1" in err
    assert path.read_bytes() == other.read_bytes()
    assert run(*line, "--overwrite") == 0
    assert "there already 1" in capsys.readouterr().out
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


def test_cells_that_fail_are_written_down_and_the_rest_go_on(monkeypatch, capsys):
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-6"]
    draw = sample.generate

    def fails(*args, **kwargs):
        if error := FAILURES[kwargs["seed"]]:
            raise error
        return draw(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", fails)
    assert run(*line) == 1
    assert "5 of 7 images failed" in capsys.readouterr().err
    for row, error in zip(table(), FAILURES, strict=True):
        assert bool(row["error"]) == bool(error)
        wanted = "no such thing" if "such" in str(error) else "out of memory at a peak of"
        assert error is None or wanted in row["error"]
        assert (Path("out") / row["file"]).exists() == (error is None)
    assert Path("out/summary.txt").read_text().splitlines()[1].split()[:2] == ["2", "5"]
    monkeypatch.setattr(sample, "generate", draw)
    assert run(*line) == 0
    assert [(row["seed"], row["error"]) for row in table()] == [(n, "") for n in "0123456"]


def test_out_of_memory_alone_says_what_is_cheaper(monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sample, "generate", fails)
    assert run(*TINY, "--size", "64") == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"run_dype.py: out of memory at a peak of .* GiB; try --tiled_vae on", err)


def test_dry_run_prints_the_plan(capsys):
    """The number of images and an estimate; with an image there, hours; nothing is written."""
    line = [*TINY, "--size", "64,128", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "images 4, there already 0; how long" in out
    assert not Path("out").exists()
    assert run(*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 0
    capsys.readouterr()
    assert run(*line, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "images 4, there already 2" in out
    assert "at the pace of those" in out


def test_two_sweeps_in_one_folder(capsys):
    """The second is told to wait; a lock that its process no longer holds is none."""
    os.mkdir("out")
    hold = "import fcntl, os, sys; fcntl.flock(os.open('out', 0), 2); print(flush=True); input()"
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        assert run(*line) == 1
        assert "another run is at work in out; wait for it" in capsys.readouterr().err
        other.kill()
    assert run(*line) == 0


def test_multipass_and_init_image_by_the_command_line():
    """Two passes are a small image and one from it; the record says what each pass ran."""
    line = [*TINY[:2], "--base_resolution", "32", "--steps", "4"]
    assert (
        run(*line, "--size", "192x128", "--dype_multipass", "twopass", "--output", "two.png") == 0
    )
    assert run(*line, "--size", "96x64", "--output", "small.png") == 0
    from_small = ["--init_image", "small.png", "--strength", "0.5"]
    assert run(*line, "--size", "192x128", *from_small, "--output", "one.png") == 0
    two, one = (np.asarray(Image.open(name)) for name in ("two.png", "one.png"))
    assert (two == one).all()
    passes = records.read_record("two.png")["passes"]
    assert [(p["height"], p["width"], len(p["sigmas"])) for p in passes] == [
        (64, 96, 5),
        (128, 192, 3),
    ]
    assert records.read_record("one.png")["passes"][0]["sigmas"] == passes[1]["sigmas"]
    assert run("--from", "two.png", "--output", "again.png") == 0
    assert (np.asarray(Image.open("again.png")) == two).all()
    Image.new("RGB", (96, 64)).save("small.png")
    assert run("--from", "one.png", "--output", "other.png") == 2
    assert run("--from", "one.png", "--init_image", "small.png", "--output", "other.png") == 0
    assert (np.asarray(Image.open("other.png")) != two).any()
    assert run(*line, "--size", "96x64", "--output", "small.png", "--overwrite") == 0
    weaker = ["--strength", "0.25", "--output", "weaker.png"]
    assert run("--from", "one.png", *weaker) == 0
    assert len(records.read_record("weaker.png")["passes"][0]["sigmas"]) == 2
    assert run("--from", "one.png", "--output", "again2.png") == 0
    assert (np.asarray(Image.open("again2.png")) == two).all()
