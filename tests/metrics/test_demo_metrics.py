"""demo_layout and demo_overlap on rendered scenes."""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scored_sweeps import make_sweep, report, score, values

import dype.metrics
from dype.demo.drawing import render
from dype.demo.scenes import GROUNDS, HILLS, SUNS, TIMES, sample_scene

pytestmark = pytest.mark.usefixtures("in_tmp_path")
METRICS = ["--metrics", "demo_layout", "demo_overlap"]
SMALL = {"height": "256", "width": "256"}
CHOICES = {"time": TIMES, "color": SUNS, "hills": HILLS, "ground": GROUNDS}


def make_truth(wrong: str = "") -> Path:
    """Write a sweep of rendered scenes; every second caption has a wrong value of `wrong`."""
    rng = np.random.default_rng(0)
    scenes, rows = [sample_scene(rng) for _ in range(8)], []
    for number, scene in enumerate(scenes):
        prompt = scene.caption
        if number % 2 and wrong:
            wrong_word = next(value for value in CHOICES[wrong] if value != getattr(scene, wrong))
            prompt = replace(scene, **{wrong: wrong_word}).caption
        method = "wrong" if number % 2 else "right"
        rows.append({"method": method, "prompt": prompt, "file": f"{number}.png"} | SMALL)
    folder = make_sweep(*rows)
    for number, scene in enumerate(scenes):
        Image.fromarray(render(scene, 256)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("wrong", ["", *CHOICES])
def test_truth_and_wrong_captions(wrong):
    """Against rendered truth: every scene is right, none whose caption asks for something else.

    The interval of the share is Wilson's.
    """
    assert score(make_truth(wrong), *METRICS) == 0
    layout, overlap = values("demo_layout"), values("demo_overlap")
    wrong_files = {f"{n}.png" for n in range(8) if n % 2} if wrong else set()
    assert layout == {f"{n}.png": float(f"{n}.png" not in wrong_files) for n in range(8)}
    for file, value in overlap.items():
        assert value < 0.1 if wrong == "color" and file in wrong_files else value > 0.9
    entries = {(e["metric"], e["setting"]): e for e in report()["means"]}
    share = entries["demo_layout", "256x256, right"]
    assert share["value"] == 1
    assert share["interval"] == pytest.approx([0.510, 1], abs=1e-3)  # Wilson's interval of 4 of 4
    assert share["protocol"] == "dype.demo.layout_check"
    low, high = entries["demo_overlap", "256x256, right"]["interval"]
    assert low < entries["demo_overlap", "256x256, right"]["value"] < high <= 1


def test_another_prompt_is_skipped_and_named(capsys):
    folder = make_sweep({"prompt": "a cat"}, {"prompt": "a red sun over mountains and a lake"})
    assert score(folder, *METRICS) == 1
    captured = capsys.readouterr()
    reason = "'a cat' is not a caption of the demo model"
    assert f"Skipped seed_0.png, demo_layout: {reason}" in captured.out
    assert f"Skipped seed_0.png, demo_overlap: {reason}" in captured.out
    assert captured.err.count("\n") == 1
    assert list(values("demo_layout")) == ["seed_1.png"]


def test_missing_scipy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "dype.demo.layout_check", None)
    assert score(make_sweep({}), "--metrics", "demo_layout") == 1
    line = capsys.readouterr().err
    assert "demo_layout needs dype.demo and scipy" in line
    assert "pip install scipy==1.17.1" in line


def test_the_demo_is_imported_only_with_its_metrics():
    """No module of dype.metrics imports dype.demo or scipy at module level."""
    (folder,) = dype.metrics.__path__
    modules = set()
    for path in Path(folder).glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                modules.add(node.module)
            elif isinstance(node, ast.Import):
                modules |= {name.name for name in node.names}
    assert "dype.sweep" in modules
    assert not [name for name in modules if name.startswith(("dype.demo", "scipy"))]
