"""Set metrics of a sweep's folder: per setting, from Inception's features, with resuming."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from PIL import ImageOps
from scored_sweeps import (
    make_reals,
    make_sweep,
    noise,
    random_projection,
    replace_inception,
    report,
    score,
    values,
)
from test_set_metrics import plain_kid

from dype.errors import UnavailableError
from dype.metrics import inception_features
from dype.metrics.inception_features import random_patches

pytestmark = pytest.mark.usefixtures("in_tmp_path")


@pytest.fixture
def inception(monkeypatch) -> list[int]:
    return replace_inception(monkeypatch)


def test_set_metrics(inception, capsys):
    """FID against scipy's `sqrtm`, within 1e-3, and KID pair by pair, within 1e-6: of patches.

    Through a sweep's folder, from the same features; per setting.
    """
    folder, real = make_sweep(*[{}] * 5, *[{"method": "base"}] * 4), make_reals(6)
    argv = ["--metrics", "fid", "patch_fid", "patch_kid", "--patch", 40, "--patches", 3]
    assert score(folder, *argv, "--real", real) == 0
    extract = random_projection()
    patches = [random_patches(noise(i), 40, 3, f"seed_{i}.png") for i in range(5)]
    ours = extract(np.concatenate(patches))[0]
    fitted = [ImageOps.fit(noise(100 + i, 120, 140), (128, 96), 2) for i in range(6)]
    patches = [random_patches(image, 40, 3, f"{i}.png") for i, image in enumerate(fitted)]
    theirs = extract(np.concatenate(patches))[0]
    entries = {(entry["metric"], entry["setting"]): entry for entry in report()["sets"]}
    assert len(entries) == 6
    entry = entries["patch_kid", "128x96, dy_yarn"]
    assert entry["value"] == pytest.approx(plain_kid(theirs, ours, 3), rel=1e-6)
    assert (entry["generated"], entry["real"]) == (5, 6)
    assert entry["protocol"] == (
        f"3 patches of 40 px; 5 generated; 6 real of {real.absolute()}, bilinear; "
        "pt_inception-2015-12-05"
    )
    root = scipy.linalg.sqrtm(np.cov(ours.T) @ np.cov(theirs.T)).real
    distance = ((ours.mean(0) - theirs.mean(0)) ** 2).sum()
    distance += np.trace(np.cov(ours.T) + np.cov(theirs.T) - 2 * root)
    assert entries["patch_fid", "128x96, dy_yarn"]["value"] == pytest.approx(distance, rel=1e-3)
    out = capsys.readouterr().out
    assert "3 patches of 40 px" in out
    assert "biased upward" in out


def test_inception_sees_an_image_once(inception):
    """Inception also sees its patches once, for any number of metrics and settings."""
    folder, real = make_sweep({}, {}, {"method": "base"}, {"method": "base"}), make_reals(3)
    names = ["fid", "kid", "is", "patch_fid", "patch_kid", "patch_is"]
    argv = ["--metrics", *names, "--real", real, "--splits", 2, "--patches", 2]
    assert score(folder, *argv) == 0
    assert len(report()["sets"]) == 12
    assert sorted(inception) == [1] * 7 + [2] * 7


def test_set_metrics_go_on(inception):
    """An entry of the same protocol stays; another number of images is another protocol."""
    folder, real = make_sweep({}, {}, {}), make_reals(3)
    argv = [folder, "--metrics", "kid", "--real", real]
    assert score(*argv) == 0
    assert len(inception) == 6
    first = report()["sets"]
    assert score(*argv) == 0
    assert score(folder, "--metrics", "compression") == 0
    assert len(inception) == 6
    assert report()["sets"] == first
    noise(50).save("out/seed_1.png")
    assert score(*argv) == 0  # docs/metrics.md: --overwrite is for a replaced image
    assert report()["sets"] == first
    assert score(*argv, "--overwrite") == 0
    assert len(inception) == 12
    (entry,) = report()["sets"]
    assert entry["value"] != first[0]["value"]
    make_reals(3, "other")
    for change in (["--filter", "lanczos"], ["--real", "other"]):
        count = len(inception)
        assert score(*argv, *change) == 0
        assert len(inception) == count + 6
        (entry,) = report()["sets"]
        assert change[1] in entry["protocol"]
    make_sweep({}, {}, {}, {})
    assert score(*argv) == 0
    (entry,) = report()["sets"]
    assert "4 generated" in entry["protocol"]
    assert entry["generated"] == 4
    make_sweep({"method": "base"}, {"method": "base"})
    assert score(folder, "--metrics", "compression") == 0
    assert report()["sets"] == []  # because its setting is gone


def test_overwrite_keeps_what_it_cannot_compute(inception, monkeypatch, capsys):
    """Without Inception's weights no entry is deleted."""
    argv = [make_sweep({}, {}, {}), "--metrics", "kid", "--real", make_reals(3), "--overwrite"]
    assert score(*argv) == 0
    before = report()

    def fail_to_load(*_):
        raise UnavailableError("cannot load Inception")

    monkeypatch.setattr(inception_features, "load_inception", fail_to_load)
    assert score(*argv) == 1
    assert "cannot load Inception" in capsys.readouterr().err
    assert report() == before


def test_an_interrupted_run_keeps_its_settings(monkeypatch, inception):
    """The set metrics of a finished setting are not computed again."""
    folder = make_sweep({}, {}, {"method": "base"}, {"method": "base"})
    argv, extract = [folder, "--metrics", "is", "--splits", 1], random_projection()

    def interrupt_third(images):
        inception.append(len(images))
        if len(inception) == 3:
            raise KeyboardInterrupt
        return extract(images)

    with monkeypatch.context() as patch:
        patch.setattr("dype.metrics.inception_features.load_inception", lambda *_: interrupt_third)
        assert score(*argv) == 130
    assert [entry["setting"] for entry in report()["sets"]] == ["128x96, dy_yarn"]
    assert score(*argv) == 0
    assert len(inception) == 5
    assert len(report()["sets"]) == 2


def test_a_corrupt_image_is_skipped_and_counted(inception, capsys):
    folder, real = make_sweep(*[{}] * 5), make_reals(4)
    content = Path("out/seed_2.png").read_bytes()
    Path("out/seed_2.png").write_bytes(content[: len(content) // 2])
    Path("real/1.png").write_bytes(b"no image")
    for _ in range(2):
        assert score(folder, "--metrics", "compression", "glcm", "kid", "--real", real) == 1
        captured = capsys.readouterr()
        assert "skipped 2" in captured.err
        assert captured.err.count("\n") == 1
        assert "Skipped seed_2.png: " in captured.out
        assert "Skipped 1.png: " in captured.out
    assert list(values("glcm")) == [f"seed_{i}.png" for i in (0, 1, 3, 4)]
    assert report()["means"][0]["generated"] == 4
    (entry,) = report()["sets"]
    assert (entry["generated"], entry["real"]) == (4, 3)
    assert "4 generated; 3 real" in entry["protocol"]
    Path("out/seed_2.png").write_bytes(content)
    noise(3).save("real/1.png")
    assert score(folder, "--metrics", "compression", "glcm", "kid", "--real", real) == 0
    assert [entry["generated"] for entry in report()["sets"]] == [5]


def test_mixed_sizes(inception, capsys):
    """Settings never mix sizes; an image too small for GLCM still gets the other metrics."""
    folder = make_sweep({}, {}, {}, *[{"height": "40", "width": "48"}] * 3)
    argv = ["--metrics", "kid", "patch_kid", "glcm", "compression", "--real", make_reals(3)]
    assert score(folder, *argv) == 1
    out = capsys.readouterr().out
    assert "2 sizes" in out
    assert "Skipped seed_3.png, glcm: the image is smaller than a patch of 64 px" in out
    settings = ["128x96, dy_yarn", "48x40, dy_yarn"]
    assert [entry["setting"] for entry in report()["sets"]] == settings * 2
    assert len(values("compression")) == 6
    views = [entry["protocol"].split(";")[0] for entry in report()["sets"]]
    assert views == ["whole images"] * 2 + ["8 patches of 96 px", "8 patches of 40 px"]
    noise(0, 50, 50).save("out/seed_0.png")
    assert score(folder, "--metrics", "compression", "--overwrite") == 1
    assert "the image is 50x50, results.csv says 128x96" in capsys.readouterr().out


def test_few_images(inception, capsys):
    """The report says where a set metric has too few images, or fewer real than generated."""
    folder = make_sweep({"method": "base"}, {}, {}, {})
    assert score(folder, "--metrics", "kid", "is", "--splits", 4, "--real", make_reals(2)) == 0
    out = capsys.readouterr().out
    assert "128x96, base: needs 2 readable images, found 1" in out
    assert "needs 4 images or patches for --splits, found 3" in out
    assert "only 2 real images for 3 generated images" in out
    assert [entry["value"] is None for entry in report()["sets"]] == [True, False, True, True]


def test_upscaled_real_images_are_counted(inception, capsys):
    folder = make_sweep({"height": "200"}, {"height": "200"})
    assert score(folder, "--metrics", "kid", "--real", make_reals(3)) == 0
    assert "3 real images are smaller than 128x200 and were upscaled" in capsys.readouterr().out


def test_images_of_two_sizes_are_no_pair(inception):
    """Images of a sweep count for images of their size alone; the report says what is left out."""
    large = {"height": "192", "width": "256"}
    folder = make_sweep({}, {}, {}, large, large, large)
    real = make_sweep(*[{}] * 2, *[large] * 3, folder="reals")
    assert score(folder, "--metrics", "fid", "--real", real) == 0
    entries = {entry["setting"].partition(",")[0]: entry for entry in report()["sets"]}
    counts = {size: (entry["real"], entry["left_out"]) for size, entry in entries.items()}
    assert counts == {"128x96": (2, 3), "256x192": (3, 2)}
    assert [entry["upscaled"] for entry in entries.values()] == [0, 0]
    text = Path("out/metrics.txt").read_text()
    assert "3 real images are of another size than 128x96 and were left out." in text
    calls = len(inception)
    assert score(folder, "--metrics", "fid", "--real", real) == 0
    assert len(inception) == calls
    larger = make_sweep(*[large] * 2, folder="larger")
    assert score(make_sweep({}, {}), "--metrics", "fid", "--real", larger) == 0
    [entry] = report()["sets"]
    assert entry["value"] is None
    assert entry["reason"] == "needs 2 readable real images, found 0"
