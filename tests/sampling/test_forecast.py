"""What this machine did before says how long an image takes and how much memory it needs."""

import json
import os
from pathlib import Path

import pytest
from conftest import TINY_DEMO, run

from dype.cli import needs
from dype.cli.flags import parse
from dype.cli.settings import resolve
from dype.pipelines import loading, memory
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
    assert " GiB of main memory, as before on this machine" in out
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
    Path(os.environ["XDG_CACHE_HOME"]).write_text("a file where the folder should be")
    assert run(*TINY_DEMO, "--size", "64") == 0


def describe(*words):
    """Return the texts on memory and verdict of a command line."""
    image = settings(*words)
    plan = needs.plan_memory(image)
    return needs.describe_memory(image, plan), needs.describe_verdict(image, plan)


def test_memory_of_a_folder_and_of_the_catalog(monkeypatch):
    """Weights of a folder are counted in --dtype; of the hub only the transformer is known."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 8 * 2**30)
    text, verdict = describe(*DEMO, "--size", "1024", "--device", "cpu")
    parts = needs.component_bytes(settings(*DEMO))
    assert parts["transformer"] == pytest.approx(4 * 6.9e6, rel=0.02)
    assert parts.keys() == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert (text, verdict) == ("needs about 1.0 GiB of main memory; 8.0 GiB are free", "fits")
    halved = needs.component_bytes(settings(*DEMO, "--dtype", "bfloat16"))
    assert halved["transformer"] == parts["transformer"] / 2
    dropped = settings(*DEMO, "--text_encoder_device", "cpu")
    assert needs.component_bytes(dropped).keys() == {"transformer", "vae"}
    text, verdict = describe("--size", "2048", "--device", "cpu")
    assert text == ("needs about 26.4 GiB of main memory, plus its text encoders; 8.0 GiB are free")
    assert verdict == "does not fit; try a smaller --size"
    monkeypatch.setattr(memory, "available_bytes", lambda device: 80 * 2**30)
    verdict = describe("--size", "2048", "--device", "cpu")[1]
    assert verdict == "fits, if its text encoders do too"


@pytest.fixture
def large_model(monkeypatch):
    """Let the models take 22 and 9 GiB; return a function that sets the free GiB of devices."""
    sizes = {"transformer": 22 * 2**30, "text_encoder_2": 9 * 2**30}
    monkeypatch.setattr(needs, "component_bytes", lambda run: sizes)

    def set_free(cuda: float | None, main: float) -> None:
        def available_bytes(device):
            if device != "cpu" and cuda is None:
                raise AssertionError("Torch not compiled with CUDA enabled")
            return int((main if device == "cpu" else cuda) * 2**30)

        monkeypatch.setattr(memory, "available_bytes", available_bytes)

    return set_free


def test_memory_under_offload(large_model):
    """On a GPU the text says what must fit there, and what waits in main memory."""
    large_model(20, 40)
    text, verdict = describe("--size", "2048", "--device", "cuda")
    assert text == (
        "needs about 4.0 GiB on cuda with --offload group, and 31.0 GiB of main memory; "
        "20.0 GiB are free on cuda, and 40.0 GiB of main memory"
    )
    assert verdict == "fits"
    text, verdict = describe("--size", "2048", "--device", "cuda", "--offload", "model")
    assert text.startswith("needs about 26.0 GiB on cuda with --offload model")
    assert verdict == "does not fit; try --offload group"
    for mode in ("auto", "model"):
        verdict = describe("--size", "8192", "--device", "cuda", "--offload", mode)[1]
        assert verdict == "does not fit; try a smaller --size"
    large_model(20, 16)
    verdict = describe("--size", "2048", "--device", "cuda")[1]
    assert verdict == "does not fit in main memory; try --quantize int8"
    large_model(None, 16)
    text, verdict = describe("--size", "2048", "--device", "cuda")
    assert text == (
        "needs about 35.0 GiB on cuda (4.0 GiB with --offload group); "
        "there is no cuda on this machine to compare with"
    )
    assert verdict == "unknown"


def test_encoders_of_unknown_size(monkeypatch):
    """Only a choice of --offload auto that they cannot change is named."""
    free = {"cuda": 24 * 2**30, "cpu": 64 * 2**30}
    monkeypatch.setattr(memory, "available_bytes", free.get)
    words = ["--device", "cuda", "--size", "2048"]
    assert needs.plan_memory(settings(*words)).offload == "group"
    free["cuda"] = 80 * 2**30
    plan = needs.plan_memory(settings(*words))
    assert (plan.offload, plan.tiled) == ("auto", None)
    assert describe(*words)[1] == "fits, if its text encoders do too"


def test_tiles_of_auto(monkeypatch, capsys):
    """The configuration of a folder's autoencoder says whether the image is decoded in tiles."""
    line = [*DEMO, "--size", "1024", "--device", "cpu"]
    whole = memory.decode_bytes(loading.load_pipeline("demo", device="cpu").vae, 1024**2, "cpu")
    assert needs.estimate_decode(settings(*line), "cpu") == whole
    weights = sum(needs.component_bytes(settings(*line)).values())
    for room, tiled in ((1, False), (-2, True)):
        monkeypatch.setattr(memory, "available_bytes", lambda device, x=room: weights + whole + x)
        assert needs.plan_memory(settings(*line)).tiled == tiled
        assert ("with tiles" in describe(*line)[0]) == tiled
        assert run(*line, "--dry_run", "full") == 0
        word = "on" if tiled else "off"
        assert f"  tiled_vae            auto, here {word}\n" in capsys.readouterr().out
    assert describe(*line, "--tiled_vae", "off")[1] == "does not fit; try --tiled_vae on"


def test_an_estimate_names_the_size_that_it_is_scaled_from(capsys):
    """So do the plans of sweeps; a file of an earlier version has no sizes."""
    line = [*TINY_DEMO, "--steps", "2"]
    forecast.remember(settings(*line, "--size", "128x64"), [2], 1.0, 0.0, None)
    text = forecast.describe_time(settings(*line, "--size", "256"))
    assert ", scaled from 128x64 on this machine;" in text
    assert ", as before on this" in forecast.describe_time(settings(*line, "--size", "128x64"))
    for sizes, origin in (("256", "scaled from 128x64"), ("128x64", "as before")):
        assert run(*line, "--size", sizes, "--seed", "0-1", "--dry_run") == 0
        assert f"left, {origin} on this machine" in capsys.readouterr().out
    path = forecast.history_path()
    history = json.loads(path.read_text())
    for sizes in history.values():
        sizes["32"].pop("size")
    path.write_text(json.dumps(history))
    text = forecast.describe_time(settings(*line, "--size", "256"))
    assert ", scaled from another size on this machine;" in text
