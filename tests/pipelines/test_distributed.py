"""Several processes: one image by all, a shared sweep, and failures."""

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
from conftest import TINY_DEMO, run, table, tiny_transformer
from PIL import Image

from dype.pipelines import distributed
from dype.sampling import records

ROOT = Path(__file__).parents[2]
SINGLE = [*TINY_DEMO, "--size", "64x96", "--device", "cpu"]
SWEEP = [*TINY_DEMO, "--device", "cpu", "--size", "64,96x64", "--output_dir", "out"]


def run_python(*words, folder) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Run two processes in a folder: an image, a sweep that one process began, and an error.

    Returns the folder, the images of the one process, the result of the two, and their exit codes
    after the error. The folder has two.png, latents in two.pt, and the sweep in out.
    """
    if not hasattr(os, "fork"):
        pytest.skip("forks its processes")
    folder = tmp_path_factory.mktemp("two_processes")
    assert run(*SWEEP, "--seed", "1", "--output_dir", folder / "out") == 0
    first_files = {path.name: path.read_bytes() for path in (folder / "out").glob("seed_*.png")}
    split = [*SINGLE, "--steps", "2", "--ulysses", "2", "--output"]
    jobs = [["save:two.pt", *split, "two.png"], ["", *SWEEP, "--seed", "0-2"]]
    jobs += [["raise:1", *split, "never.png"]]
    result = run_python(ROOT / "tests" / "ranks.py", json.dumps(jobs), folder=folder)
    assert result.returncode == 0, result.stderr
    *codes, codes_of_error = json.loads(result.stdout.splitlines()[-1])
    assert codes == [[0, 0], [0, 0]], result.stderr
    return folder, first_files, result, codes_of_error


@pytest.mark.parametrize("name", ranks.FAMILIES)
def test_split_latents(two_processes, name):
    """Two processes with --ulysses 2 match one process within 1e-4, at three sizes in turn."""
    latents_by_size = torch.load(two_processes[0] / "two.pt", weights_only=True)[name]
    build, generate = ranks.FAMILIES[name]
    for latents, size in zip(latents_by_size, ranks.SIZES, strict=True):
        pipe = build()
        ranks.apply_dype(pipe, ranks.CONFIG)
        expected = generate(pipe, *size).flatten()
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
        if max(size) > 64:  # DyPE changes the latents, so the match includes it
            ranks.apply_dype(pipe, ranks.DyPEConfig("base", base_resolution=64))
            assert (generate(pipe, *size).flatten() - expected).abs().max() > 5e-4


def test_split_image(two_processes, in_tmp_path):
    """From the command line, two processes match one within one level of each color."""
    folder, _, result, _ = two_processes
    assert result.stdout.count("two.png") == 1  # because rank 0 alone prints
    assert run(*SINGLE, "--steps", "2", "--output", "one.png") == 0
    assert abs(pixels("one.png") - pixels(folder / "two.png")).max() <= 1
    record = records.read_record(folder / "two.png")
    assert record["flags"]["ulysses"] == 2
    assert run("--from", folder / "two.png", "--output", "from.png") == 0  # without --ulysses
    assert (pixels("from.png") == pixels("one.png")).all()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["out", "two.json", "two.png", "two.pt"]


def test_an_error_in_one_process_ends_the_run(two_processes):
    """No process saves an image, and the error is not swallowed."""
    folder, _, result, (_, code) = two_processes
    assert code == 1
    assert "KeyError: 'no such thing'" in result.stderr
    assert not (folder / "never.png").exists()


def test_a_process_that_dies_ends_the_run(tmp_path):
    """torchrun ends the run with an error; the other process does not wait."""
    start, words = time.monotonic(), ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    words += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    words += [ROOT / "tests" / "ranks.py", "die:1", *SINGLE, "--steps", "3", "--ulysses", "2"]
    result = run_python(*words, folder=tmp_path)
    assert result.returncode == 1
    assert re.search(r"rank +: 1 ", result.stderr)
    assert re.search(r"exitcode +: 3 ", result.stderr)  # of its second denoiser call
    assert time.monotonic() - start < 100
    assert not list(tmp_path.rglob("*.png"))


def test_shared_sweep(two_processes, monkeypatch):
    """One process begins a sweep, two finish it, and one more finds nothing to do.

    There is one table, one page with its thumbnails, and one contact sheet per size.
    """
    folder, first_files, result, _ = two_processes
    monkeypatch.chdir(folder)
    assert "6 images, 2 finished" in result.stdout
    assert "[2/2 of this process]" in result.stdout
    rows = table()
    first, second = ["64 1", "96 1"], ["64 0", "64 2", "96 0", "96 2"]
    assert [f"{row['width']} {row['seed']}" for row in rows] == first + second
    assert not any(row["error"] for row in rows)
    names = {path.name for path in Path("out").iterdir()}
    assert {"comparison_64x64.png", "comparison_64x96.png", "summary.txt"} <= names
    assert {"index.html", "thumbs"} <= names
    assert len(names) == 2 * 6 + 6
    for name, content in first_files.items():
        assert Path("out", name).read_bytes() == content
    times = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("seed_*")}
    assert run(*SWEEP, "--seed", "0-2") == 0
    assert times == {path.name: path.stat().st_mtime_ns for path in Path("out").glob("seed_*")}


def test_a_shared_sweep_matches_one_process(two_processes, in_tmp_path):
    assert run(*SWEEP, "--seed", "0-2") == 0
    for path in Path("out").glob("seed_*.png"):
        assert abs(pixels(path) - pixels(two_processes[0] / "out" / path.name)).max() <= 1


MISTAKES = {  # flags, processes -> error
    ("--ulysses 2", 1): "there is 1 process, expected torchrun --nproc-per-node=2 run_dype.py",
    ("--ulysses 2", 4): "--ulysses is 2, but there are 4 processes, expected torchrun",
    ("", 2): "one image on 2 processes, expected --ulysses 2 or --ring 2",
    ("--ulysses 3", 3): "--ulysses is 3, expected a divisor of the 4096 tokens of 1024x1024 px",
    ("--ulysses 5 --size 80", 5): "a divisor of the 24 tokens of --max_sequence_length",
    ("--ulysses 8 --size 128 --multipass threepass", 8): "the 4 tokens of 32x32 px",
    ("--ulysses 2 --ring 2", 4): "--ulysses and --ring both split the tokens, expected one",
    ("--ring 2", 2): "--attention native does not support it, expected --attention _flash_3_hub",
    ("--ulysses 2 --attention flex", 2): "--attention flex does not support it, expected",
    ("--model z-image --ulysses 2", 2): "a ZImagePipeline cannot be split, expected FluxPipeline",
    ("--ulysses 2 --cache taylorseer", 2): "--cache is 'taylorseer', expected off with --ulysses",
    ("--ulysses 2 --device cuda:1", 2): "--device is 'cuda:1', expected no number",
    ("--ulysses 2 --compile full", 2): "--compile is 'full', expected blocks or off with --ulysses",
}


@pytest.mark.parametrize(("flags", "count"), MISTAKES)
def test_mistakes(flags, count, in_tmp_path, capsys, monkeypatch):
    """Each mistake gives one sentence and exit code 2, before anything is loaded or joined."""
    monkeypatch.setenv("WORLD_SIZE", str(count))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("dype.sampling.run.load_pipeline", None)
    assert run("--model", "demo", *flags.split()) == 2
    error = capsys.readouterr().err
    assert MISTAKES[flags, count] in error
    assert error.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert run("--model", "demo", *flags.split()) == 2
    assert not capsys.readouterr().err  # because rank 0 alone reports


def test_one_process_counts_no_gpus(in_tmp_path, monkeypatch):
    """Counting GPUs raises an error if torch was built for CUDA and there is no driver."""
    monkeypatch.setattr(torch.accelerator, "device_count", None)
    assert run(*SINGLE, "--output", "a.png") == 0
    assert run(*SWEEP, "--seed", "0") == 0


def test_too_few_gpus(in_tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    assert run("--model", "demo", "--ulysses", "2") == 1
    assert "2 processes need a GPU each, and there are 0" in capsys.readouterr().err


def test_ulysses_divides_the_heads():
    with pytest.raises(ValueError, match="--ulysses is 3, expected a divisor of its 2 heads"):
        distributed.check_heads(tiny_transformer(), 3)
    distributed.check_heads(tiny_transformer(), 2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_ring(tmp_path):
    """Would show that two GPUs with ring attention match one GPU, within bfloat16."""
    words = ["--model", "demo", "--dtype", "bfloat16", "--attention", "_native_flash"]
    start, script = ["-m", "torch.distributed.run", "--nproc-per-node=2"], ROOT / "run_dype.py"
    for command in ([*start, script, "--ring", "2"], [script]):
        result = run_python(*command, *words, "--output", f"{len(command)}.png", folder=tmp_path)
        assert result.returncode == 0, result.stderr
    single, ring = (pixels(path) for path in sorted(tmp_path.glob("*.png")))
    assert abs(ring - single).mean() < 4
