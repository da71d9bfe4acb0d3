"""Inception's input images and the loading of its weights."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scored_sweeps import CLASSES, make_reals, make_sweep, noise, report, score

from dype.metrics import inception_features
from dype.metrics.inception_features import WEIGHTS, random_patches

pytestmark = pytest.mark.usefixtures("in_tmp_path")
TORCHMETRICS = ("torchmetrics", "torchmetrics.image", "torchmetrics.image.fid")


def test_patches_are_of_the_image():
    image, square = noise(0, 40, 60), noise(0, 40, 40)
    assert (random_patches(image, 40, 2, "a")[0].shape) == (3, 40, 40)
    full_patch = random_patches(square, 40, 1, "a")[0]
    assert np.array_equal(full_patch, np.asarray(square).transpose(2, 0, 1))
    first, repeated, renamed = (random_patches(image, 8, 3, name) for name in ("a", "a", "b"))
    assert np.array_equal(first, repeated)
    assert not np.array_equal(first, renamed)


def test_real_images_keep_their_shape(monkeypatch):
    """A wide image is cropped at its sides, not squeezed."""
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste(Image.new("RGB", (100, 100), "blue"), (100, 0))
    wide.save("wide.png")
    monkeypatch.setattr(inception_features, "load_inception", lambda *_: lambda x: (x, x))
    args = types.SimpleNamespace(weights={"inception": WEIGHTS}, device="cpu")
    paths = [Path("wide.png")]
    stacks = inception_features.stack_features(args, {}, paths, "lanczos", (50, 50), None)
    pixels = stacks["features"][0, 0]
    assert pixels.shape == (3, 50, 50)
    assert pixels[2].min() > 200
    assert pixels[0].max() < 60


def test_missing_inception(monkeypatch, capsys):
    """Without the packages the error is one sentence, before the run computes a value."""
    for name in TORCHMETRICS:
        monkeypatch.setitem(sys.modules, name, None)
    folder = make_sweep({}, {})
    assert score(folder, "--metrics", "glcm", "is", "--splits", 1) == 1
    captured = capsys.readouterr()
    assert "pip install torchmetrics==1.9.0 torch-fidelity==0.4.0" in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("out/metrics.csv").exists()


def test_inception_is_torchmetrics(monkeypatch):
    """The network has 2048 features, antialiasing and the weights file; logits have no bias."""
    requests = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2048, CLASSES)

        def forward(self, images):
            assert images.dtype == torch.uint8
            return images.float().mean((2, 3)) @ torch.ones(3, 2048)

    network = Network()

    class FrechetInceptionDistance:
        def __init__(self, *args, **kwargs):
            requests.append((args, kwargs))
            self.inception = network

    stub = types.SimpleNamespace(FrechetInceptionDistance=FrechetInceptionDistance)
    for name in TORCHMETRICS:
        monkeypatch.setitem(sys.modules, name, stub)
    images = np.full((2, 3, 8, 8), 5, np.uint8)
    for weights, path in ((WEIGHTS, {}), ("a.pth", {"feature_extractor_weights_path": "a.pth"})):
        features, logits = inception_features.load_inception.__wrapped__(weights, "cpu")(images)
        assert requests[-1] == ((2048,), {"antialias": True} | path)
        assert (features == 15).all()
        assert features.shape == (2, 2048)
        assert logits.shape == (2, CLASSES)
        expected = features @ network.fc.weight.detach().numpy().T
        np.testing.assert_allclose(logits, expected, rtol=1e-5)


@pytest.fixture
def inception_weights(monkeypatch) -> Path:
    """Random weights for torch-fidelity's Inception; skips because its package is optional."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs torch-fidelity and a torchvision for this torch: {error}")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], "")
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), "inception.pth")
    return Path("inception.pth")


def test_torch_fidelity_agrees(inception_weights):
    """FID, KID and Inception score against torch-fidelity's own run on the same PNGs, within 1e-3.

    The network is the real one with random weights. The images have 299 px, because the two
    packages resize other sizes differently. Skipped where the packages are missing.
    """
    import torch_fidelity

    folder, real = make_sweep(*[{"height": "299", "width": "299"}] * 3), make_reals(3)
    for number, path in enumerate(sorted(real.glob("*.png"))):
        noise(100 + number, 299, 299).save(path)
    argv = ["--metrics", "fid", "kid", "is", "--real", real, "--splits", 1]
    assert score(folder, *argv, "--weights", f"inception={inception_weights}") == 0
    expected = torch_fidelity.calculate_metrics(
        input1="out", input2="real", cuda=False, fid=True, kid=True, isc=True, isc_splits=1,
        kid_subsets=1, kid_subset_size=3, feature_extractor_weights_path=str(inception_weights),
        verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    values = [entry["value"] for entry in report()["sets"]]
    names = "frechet_inception_distance", "kernel_inception_distance_mean", "inception_score_mean"
    assert values == pytest.approx([expected[name] for name in names], rel=1e-3)
