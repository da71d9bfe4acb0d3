"""The file of measured images: what it keeps, and that tables follow from it alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dype.demo import evaluate, scores
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


def test_other_files_are_refused(tmp_path, capsys):
    """With one sentence, before an image is generated."""
    words = ["base", "--size", "64", "--out", str(tmp_path)]
    path = tmp_path / "measurements.npz"
    Image.new("RGB", (4, 4)).save(path, "png")
    assert evaluate.main(words) == 2
    assert f"{path} is not a file of this program; move it away" in capsys.readouterr().err
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
