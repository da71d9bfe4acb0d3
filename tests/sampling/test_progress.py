"""The bar of an image: all steps of all passes, words for waits, and nothing without a terminal."""

import io
import logging
import re
import warnings
from types import SimpleNamespace

import pytest
from conftest import TINY_DEMO, run
from diffusers.utils.logging import enable_progress_bar
from tqdm import tqdm

from dype.pipelines.loading import load_pipeline, silence_known_warnings
from dype.sampling import progress
from dype.sampling.progress import ImageBar, show_word
from dype.sweep import clock as sweep_clock

pytestmark = pytest.mark.usefixtures("in_tmp_path")


class Terminal(io.StringIO):
    """Stream that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    """Replace stderr by a terminal of 80 columns, and let every change of a bar be drawn."""
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(
        progress,
        "tqdm",
        lambda **options: tqdm(
            **options | {"dynamic_ncols": False, "ncols": 79, "mininterval": 0, "file": stream}
        ),
    )
    return stream


def screens(stream: Terminal) -> list[str]:
    """Return what each line of the terminal showed, one after the other."""
    return [text.strip() for text in stream.getvalue().replace("\n", "\r").split("\r")]


def test_one_bar_for_all_passes(terminal, capsys):
    """Steps of both passes count in one bar with the image's label; no other bar is shown."""
    assert run(*TINY_DEMO[:2], "--base_resolution", "32", "--steps", "4", "--size", "64x96",
               "--multipass", "twopass", "--seed", "7") == 0  # fmt: skip
    lines = [line for line in screens(terminal) if line]
    assert lines[0] == "loading demo"
    bars = [line for line in lines if "|" in line]
    assert all(line.startswith("64x96 seed 7") and len(line) <= 79 for line in bars)
    counts = [re.search(r"\d/\d", line)[0] for line in bars]
    assert list(dict.fromkeys(counts)) == [f"{n}/6" for n in range(7)]
    assert "4/6" in next(line for line in bars if "decoding" in line)
    assert "encoding the prompt" in bars[0]
    assert screens(terminal)[-1] == ""


def test_a_sweep_shows_the_time_left(terminal, capsys):
    """From the first image on; each image has its number, its method and its seed."""
    line = [*TINY_DEMO[:2], "--base_resolution", "32", "--steps", "3", "--size", "64"]
    assert run(*line, "--seed", "0-1", "--output_dir", "out") == 0
    bars = [line for line in screens(terminal) if "|" in line]
    assert any(line.startswith("[1/2] dy_yarn_paper seed 0") and "s left" in line for line in bars)
    assert any(line.startswith("[2/2] dy_yarn_paper seed 1") for line in bars)


@pytest.mark.parametrize("flags", [[], ["--seed", "0-1", "--output_dir", "out"]])
def test_nothing_without_a_terminal(flags, capfd):
    """A log gets no bar and no line of a library."""
    assert run(*TINY_DEMO, "--size", "64", *flags) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "\r" not in out


def test_loading_shows_no_bar_in_a_log(capfd, monkeypatch):
    """Diffusers' bar of a pipeline's components is for a terminal."""
    enable_progress_bar()
    load_pipeline("demo")
    assert capfd.readouterr().err == ""


MESSAGES = {  # logger and text of a library -> whether it is shown
    ("diffusers.loaders.lora_base", "No LoRA keys associated to CLIPTextModel found"): False,
    ("diffusers.loaders.peft", "No LoRA keys associated to FluxTransformer2DModel found"): True,
    ("diffusers.loaders.lora_base", "something else"): True,
}


@pytest.mark.parametrize(("name", "text"), MESSAGES)
def test_messages_of_libraries(name, text):
    """Those about what is right are silent, one by one; others are not."""
    silence_known_warnings()
    record = logging.LogRecord(name, logging.WARNING, "", 0, text, (), None)
    assert bool(logging.getLogger(name).filter(record)) == MESSAGES[name, text]


def test_warnings_of_torch():
    """Warnings are errors in the tests, and one text of torch is none."""
    with warnings.catch_warnings():
        silence_known_warnings()
        warnings.warn("Mismatch dtype between input and weight: input dtype", stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn("Mismatch of something else", stacklevel=1)


def test_a_pass_that_turns_out_shorter():
    """The total follows, so that the bar ends at 100 %."""
    with ImageBar("a", [4, 4], visible=False) as bar:
        for number in range(1, 5):
            bar.finish_step(number, 4)
        for number in range(1, 3):
            bar.finish_step(number, 2)
        assert (bar.steps, bar.bar.total) == ([4, 2], 6)


def test_compiling_is_said_and_counted(terminal, monkeypatch):
    """The bar says how long the compiler may take, and its seconds are not those of steps."""
    times = iter([10.0, 35.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    fractions = []
    left = lambda *values: fractions.append(values) or ""  # noqa: E731
    with ImageBar("a", [2], time_left=left) as bar:
        bar.begin_compiling(", about 25 s")
        bar.end_compiling()
        bar.finish_step(1, 2)
    assert fractions == [(0.5, 25.0)]
    assert any("compiling, about 25 s" in line for line in screens(terminal))


def test_a_word_is_removed(terminal):
    with show_word("loading"):
        assert screens(terminal) == ["loading", ""]
    assert terminal.getvalue().endswith("loading\r       \r")


def test_the_time_left_is_proportional_to_the_work(monkeypatch):
    """Half of the first of two equal images took 10 s, of which 4 s are the compiler's."""
    runs, now = ["a", "b"], [0.0]
    monkeypatch.setattr(sweep_clock, "work_of", lambda run: 5.0)
    monkeypatch.setattr(sweep_clock.time, "perf_counter", lambda: now[0])
    clock = sweep_clock.SweepClock(runs)
    now[0] = 10.0
    assert clock.describe("a", 0.5, 4.0) == "sweep 18 s left"
    now[0] = 16.0
    assert clock.finish("a", 4.0) == ", about 12 s left"
    assert clock.finish("b", 0.0) == ""
