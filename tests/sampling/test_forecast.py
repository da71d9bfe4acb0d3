"""What this machine did before says how long an image takes and how much memory it needs."""

import json
import os
from pathlib import Path

import pytest
from conftest import TINY_DEMO, run

from dype.cli import needs
from dype.cli.flags import parse
from dype.cli.settings import resolve
from dype.pipelines import memory
from dype.sampling import forecast

pytestmark = pytest.mark.usefixtures("in_tmp_path")
DEMO = ["--model", "demo", "--base_resolution", "32"]


def settings(*words):
    """Return the settings of one image."""
    return resolve(vars(parse([str(word) for word in words])))[1][0]


def test_work_has_the_quadratic_part_of_attention():
    """At 6 x channels tokens attention doubles the work; only the steps that run count."""
    assert forecast.work_of_pass(6 * 256, 2, 256) == 2 * 2 * 6 * 256
    small = settings(*DEMO, "--size", "512")
    large = settings(*DEMO, "--size", "1024")
    # docs/performance.md has 8.4 for the step of the demo
    assert forecast.work_of(large) / forecast.work_of(small) == pytest.approx(8.4, rel=0.1)
    two = settings(*DEMO, "--size", "512", "--multipass", "twopass")
    half = settings(*DEMO, "--size", "256")
    assert forecast.count_steps(two) == [20, 10]
    work = forecast.work_of(half) + forecast.work_of(small) / 2
    assert forecast.work_of(two) == pytest.approx(work)


def test_an_image_is_remembered(capsys):
    """--dry_run knows nothing at first; then the time and the memory of an image of that size."""
    line = [*TINY_DEMO, "--size", "64"]
    assert run(*line, "--dry_run") == 0
    assert "unknown until this machine has generated such an image" in capsys.readouterr().out
    assert run(*line) == 0
    capsys.readouterr()
    assert run(*line, "--dry_run") == 0
    out = capsys.readouterr().out
    assert " s, as before on this machine" in out
    assert " GiB, as before on this machine" in out
    assert run(*line, "--seed", "0-3", "--dry_run") == 0
    assert "4 images, 0 finished; about " in capsys.readouterr().out


def test_seconds_follow_the_work():
    """Twice the steps take twice as long; the compiler's seconds are apart; far sizes say nothing.

    An image that compiled nothing keeps the seconds of the last one that did.
    """
    line = [*DEMO, "--size", "512", "--compile", "blocks"]
    forecast.remember(settings(*line, "--steps", "10"), [10], 60.0, 50.0, 2**30)
    assert forecast.estimate_seconds(settings(*line, "--steps", "20")) == pytest.approx(20)
    forecast.remember(settings(*line, "--steps", "10"), [10], 10.0, 0.0, 2**30)
    longer = settings(*line, "--steps", "20")
    assert forecast.estimate_seconds(longer) == pytest.approx(20)
    assert forecast.estimate_compile_seconds(longer) == 50
    assert "about 20 s, as before on this machine, and 50 s to comp" in forecast.describe_time(
        longer
    )
    larger = settings(*DEMO, "--size", "1024", "--steps", "10", "--compile", "blocks")
    ratio = forecast.work_of_pass(4096, 1, 256) / forecast.work_of_pass(1024, 1, 256)
    assert forecast.estimate_seconds(larger) == pytest.approx(10 * ratio)
    assert forecast.estimate_compile_seconds(larger) is None
    assert forecast.estimate_peak(larger) is None
    far = settings(*DEMO, "--size", "4096", "--compile", "blocks")
    assert forecast.estimate_seconds(far) is None
    assert forecast.estimate_seconds(settings(*DEMO, "--size", "512")) is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"KEY": []}', '{"KEY": {"16": {}}}',
                                     '{"KEY": {"x": {"rate": 1}}}'])  # fmt: skip
def test_a_broken_history_is_an_empty_one(content):
    image = settings(*DEMO, "--size", "64")
    path = forecast.history_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content.replace('"KEY"', json.dumps(forecast.speed_key(image))))
    assert forecast.estimate_seconds(image) is None
    forecast.remember(image, [20], 1.0, 0.0, None)


def test_a_history_that_cannot_be_written(capsys):
    """It is no error."""
    Path(os.environ["XDG_CACHE_HOME"]).parent.mkdir(parents=True, exist_ok=True)
    Path(os.environ["XDG_CACHE_HOME"]).write_text("a file where the folder should be")
    assert run(*TINY_DEMO, "--size", "64") == 0


def test_memory_of_a_folder_and_of_the_catalog(monkeypatch):
    """Weights of a folder are counted in --dtype; of the hub only the transformer is known."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 8 * 2**30)
    text = needs.describe_memory(settings(*DEMO, "--size", "1024", "--device", "cpu"))
    parts = needs.component_bytes(settings(*DEMO))
    assert parts["transformer"] == pytest.approx(4 * 6.9e6, rel=0.02)
    assert parts.keys() == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert text == "needs about 1.0 GiB; 8.0 GiB free of main memory"
    halved = needs.component_bytes(settings(*DEMO, "--dtype", "bfloat16"))
    assert halved["transformer"] == parts["transformer"] / 2
    dropped = settings(*DEMO, "--text_encoder_device", "cpu")
    assert needs.component_bytes(dropped).keys() == {"transformer", "vae"}
    text = needs.describe_memory(settings("--size", "2048", "--device", "cpu"))
    assert text == "needs about 26.4 GiB, and its text encoders; 8.0 GiB free of main memory"


def test_memory_under_offload(monkeypatch):
    """On a GPU the text says what must fit there, and what waits in main memory."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 20 * 2**30)
    sizes = {"transformer": 22 * 2**30, "text_encoder_2": 9 * 2**30}
    monkeypatch.setattr(needs, "component_bytes", lambda run: sizes)
    text = needs.describe_memory(settings("--size", "2048", "--device", "cuda"))
    assert text.startswith("needs about 4.0 GiB with --offload group, and 31.0 GiB of main memory;")
    assert "20.0 GiB free on cuda, 20.0 GiB of main memory" in text
    moved = settings("--size", "2048", "--device", "cuda", "--offload", "model")
    text = needs.describe_memory(moved)
    assert text.startswith("needs about 26.0 GiB with --offload model")
