"""Several processes: one image together, a sweep shared out, and how they fail."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from conftest import TINY, run, table, tiny_transformer
from PIL import Image

from dype.pipelines import distributed
from dype.sampling import records

ROOT = Path(__file__).parents[2]
ONE = [*TINY, "--size", "64x96", "--device", "cpu"]


SWEEP = [*TINY, "--device", "cpu", "--size", "64,96x64", "--output_dir", "out"]


def program(*words, folder) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder where two processes have worked together, and what they printed.

    An image and latents (two.png, two.pt), a sweep that one process had begun (out), and a run in
    which one of them raised an error.
    """
    if not hasattr(os, "fork"):
        pytest.skip("forks its processes")
    folder = tmp_path_factory.mktemp("together")
    assert run(*SWEEP, "--seed", "1", "--output_dir", folder / "out") == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").glob("seed_*.png")}
    split = [*ONE, "--steps", "2", "--ulysses", "2", "--output"]
    jobs = [["save:two.pt", *split, "two.png"], ["", *SWEEP, "--seed", "0-2"]]
    jobs += [["raise:1", *split, "never.png"]]
    done = program(ROOT / "tests" / "ranks.py", json.dumps(jobs), folder=folder)
    assert done.returncode == 0, done.stderr
    *codes, raised = json.loads(done.stdout.splitlines()[-1])
    assert codes == [[0, 0], [0, 0]], done.stderr
    return folder, before, done, raised


@pytest.mark.parametrize("name", ranks.FAMILIES)
def test_split_latents(together, name):
    """Two processes by Ulysses draw what one does, within 1e-4; three sizes in turn."""
    found = torch.load(together[0] / "two.pt", weights_only=True)[name]
    build, draw = ranks.FAMILIES[name]
    for latents, size in zip(found, ranks.SIZES, strict=True):
        pipe = build()
        ranks.apply_dype(pipe, ranks.CONFIG)
        expected = draw(pipe, *size).flatten()
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
        if max(size) > 64:  # not by chance
            ranks.apply_dype(pipe, ranks.DyPEConfig("base", base_resolution=64))
            assert (draw(pipe, *size).flatten() - expected).abs().max() > 5e-4


def test_split_picture(together, own_folder):
    """Through the command line: the image of one process, to the last bit of its colors."""
    folder, _, done, _ = together
    assert done.stdout.count("two.png") == 1  # from one of them
    assert run(*ONE, "--steps", "2", "--output", "one.png") == 0
    assert abs(pixels("one.png") - pixels(folder / "two.png")).max() <= 1
    record = records.read_record(folder / "two.png")
    assert record["flags"]["ulysses"] == 2
    assert run("--from", folder / "two.png", "--output", "from.png") == 0  # by one again
    assert (pixels("from.png") == pixels("one.png")).all()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["out", "two.json", "two.png", "two.pt"]


def test_an_error_of_one_ends_the_run(together):
    """It is not kept, and the other is not left to save half of an image."""
    folder, _, done, (_, code) = together
    assert code == 1
    assert "KeyError: 'no such thing'" in done.stderr
    assert not (folder / "never.png").exists()


def test_one_that_dies_ends_the_run(tmp_path):
    """By torchrun: with an error, not with the other one waiting for it."""
    start, words = time.monotonic(), ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    words += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    words += [ROOT / "tests" / "ranks.py", "die:1", *ONE, "--steps", "3", "--ulysses", "2"]
    done = program(*words, folder=tmp_path)
    assert done.returncode == 1
    assert re.search(r"rank +: 1 ", done.stderr)
    assert re.search(r"exitcode +: 3 ", done.stderr)  # at its second denoiser call, not before
    assert time.monotonic() - start < 100
    assert not list(tmp_path.rglob("*.png"))


def test_shared_sweep(together, monkeypatch):
    """One process begins, two go on, one finds nothing to do: one table, one contact sheet each."""
    folder, before, done, _ = together
    monkeypatch.chdir(folder)
    assert "images 6, there already 2" in done.stdout
    assert "[2/2 of this process]" in done.stdout
    rows = table()
    there, new = ["64 1", "96 1"], ["64 0", "64 2", "96 0", "96 2"]
    assert [f"{row['width']} {row['seed']}" for row in rows] == there + new
    assert not any(row["error"] for row in rows)
    names = {path.name for path in Path("out").iterdir()}
    assert {"comparison_64x64.png", "comparison_64x96.png", "summary.txt"} <= names
    assert len(names) == 2 * 6 + 4
    for name, content in before.items():
        assert Path("out", name).read_bytes() == content
    times = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("seed_*")}
    assert run(*SWEEP, "--seed", "0-2") == 0
    assert times == {path.name: path.stat().st_mtime_ns for path in Path("out").glob("seed_*")}


def test_a_share_is_what_one_process_draws(together, own_folder):
    assert run(*SWEEP, "--seed", "0-2") == 0
    for path in Path("out").glob("seed_*.png"):
        assert abs(pixels(path) - pixels(together[0] / "out" / path.name)).max() <= 1


MISTAKES = {  # flags, processes -> what is said
    ("--ulysses 2", 1): "there is 1 process, expected torchrun --nproc-per-node=2 run_dype.py",
    ("--ulysses 2", 4): "--ulysses is 2, but there are 4 processes, expected torchrun",
    ("", 2): "one image on 2 processes, expected --ulysses 2 or --ring 2",
    ("--ulysses 3", 3): "--ulysses is 3, expected a divisor of the 1024 tokens of 512x512 px",
    ("--ulysses 5 --size 80", 5): "a divisor of the 16 tokens of --max_sequence_length",
    ("--ulysses 8 --size 128 --multipass threepass", 8): "the 4 tokens of 32x32 px",
    ("--ulysses 2 --ring 2", 4): "--ulysses and --ring both split the tokens, expected one",
    ("--ring 2", 2): "--attention native cannot be split so, expected --attention _flash_3_hub",
    ("--ulysses 2 --attention flex", 2): "--attention flex cannot be split so, expected",
    ("--model z-image --ulysses 2", 2): "a ZImagePipeline cannot be split, expected FluxPipeline",
    ("--ulysses 2 --cache taylorseer", 2): "--cache is 'taylorseer', expected off with --ulysses",
    ("--ulysses 2 --device cuda:1", 2): "--device is 'cuda:1', expected no number",
    ("--ulysses 2 --compile full", 2): "--compile is 'full', expected blocks or off with --ulysses",
}


@pytest.mark.parametrize(("flags", "count"), MISTAKES)
def test_mistakes(flags, count, own_folder, capsys, monkeypatch):
    """One sentence and exit code 2, before anything is loaded or any group is made."""
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("dype.sampling.run.load_pipeline", None)
    assert run("--model", "demo", *flags.split()) == 2
    error = capsys.readouterr().err
    assert MISTAKES[flags, count] in error
    assert error.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert run("--model", "demo", *flags.split()) == 2
    assert not capsys.readouterr().err  # said once


def test_one_process_counts_no_cards(own_folder, monkeypatch):
    """Where torch was built for CUDA and there is no driver, counting them is an error."""
    monkeypatch.setattr(torch.accelerator, "device_count", None)
    assert run(*ONE, "--output", "a.png") == 0
    assert run(*SWEEP, "--seed", "0") == 0


def test_no_gpu_for_each(own_folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    assert run("--model", "demo", "--ulysses", "2") == 1
    assert "2 processes need a GPU each, and there are 0" in capsys.readouterr().err


def test_what_only_the_model_tells():
    with pytest.raises(ValueError, match="--ulysses is 3, expected a divisor of its 2 heads"):
        distributed.check_divisible(tiny_transformer(), 3)
    distributed.check_divisible(tiny_transformer(), 2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_ring(tmp_path):
    """Would show that two GPUs draw by ring attention what one draws, within bfloat16."""
    words = ["--model", "demo", "--dtype", "bfloat16", "--attention", "_native_flash"]
    start, script = ["-m", "torch.distributed.run", "--nproc-per-node=2"], ROOT / "run_dype.py"
    for command in ([*start, script, "--ring", "2"], [script]):
        done = program(*command, *words, "--output", f"{len(command)}.png", folder=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (pixels(path) for path in sorted(tmp_path.glob("*.png")))
    assert abs(one - two).mean() < 4
