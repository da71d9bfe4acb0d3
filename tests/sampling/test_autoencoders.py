"""Passes that encode an image work with every supported autoencoder, and refuse the others."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import quiet, run, tiny_components, tiny_taesd
from diffusers import AutoencoderTiny, FluxPipeline
from PIL import Image

from dype.pipelines import memory
from dype.sampling import latents, records
from dype.sampling import run as sampling_run

pytestmark = pytest.mark.usefixtures("in_tmp_path")
SMALL = ["--size", "128", "--steps", "2", "--base_resolution", "64", "--max_sequence_length", "16"]
ENCODING = {  # flags of passes that encode an image
    "twopass": ["--multipass", "twopass"],
    "threepass": ["--multipass", "threepass"],
    "progressive": ["--progressive"],
    "init_image": ["--init_image", "small.png"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny FLUX pipeline with a tiny autoencoder, in the diffusers folder format."""
    path = tmp_path_factory.mktemp("taesd")
    quiet(FluxPipeline(**tiny_components() | {"vae": tiny_taesd()})).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def small_image(in_tmp_path):
    Image.effect_noise((64, 64), 80).convert("RGB").save("small.png")


@pytest.mark.parametrize("name", ENCODING)
def test_a_tiny_autoencoder_in_passes_that_encode(name, folder):
    """Also with tiled decoding."""
    line = ["--model", folder, *SMALL, *ENCODING[name], "--tiled_vae", "on"]
    assert run(*line, "--output", "a.png") == 0
    assert np.asarray(records.open_image("a.png")).std() > 0


def test_a_tiny_autoencoder_of_16_channels_encodes_despite_tiling():
    """TAEF1 has 16 channels, for which diffusers' tiled encoder fails; tiling stays on."""
    torch.manual_seed(0)
    blocks = {f"{part}_block_out_channels": (4,) * 4 for part in ("encoder", "decoder")}
    counts = {f"num_{part}_blocks": (1,) * 4 for part in ("encoder", "decoder")}
    vae = AutoencoderTiny(**blocks, **counts, latent_channels=16).eval()
    image, device = Image.effect_noise((64, 96), 80), torch.device("cpu")
    plain = latents.encode_latents(SimpleNamespace(vae=vae), image, device)
    assert plain.shape == (1, 16, 12, 8)
    vae.enable_tiling()
    assert (latents.encode_latents(SimpleNamespace(vae=vae), image, device) == plain).all()
    assert vae.use_tiling


def test_the_estimate_of_a_tiny_autoencoder_has_no_attention():
    pixels = 4096**2
    assert memory.decode_bytes(tiny_taesd(), pixels, "cuda") == memory.decode_bytes(
        tiny_taesd(), pixels, "cpu"
    )


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderKLFlux2"])
@pytest.mark.parametrize("name", ENCODING)
def test_an_unknown_autoencoder_is_refused_before_loading(name, kind, folder, monkeypatch, capsys):
    """The index of a folder tells its class; without such passes it may do."""
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", kind]
    files = {"model_index.json": index}
    monkeypatch.setattr(
        "dype.pipelines.catalog.load_hub_json", lambda repo, file, revision: files.get(file, {})
    )
    monkeypatch.setattr(sampling_run, "load_pipeline", None)  # a call would be a TypeError
    for extra in ([], ["--dry_run"]):
        assert run("--model", folder, *SMALL, *ENCODING[name], *extra) == 2
        err = capsys.readouterr().err
        assert f"{kind} is not supported by --multipass, --progressive and --init_image" in err
        assert err.count("\n") == 1
    assert run("--model", folder, *SMALL, "--dry_run") == 0


def test_an_autoencoder_that_only_the_checkpoint_shows(folder, monkeypatch, capsys):
    """It is refused right after loading: a sweep has no failed rows."""
    monkeypatch.setattr("dype.cli.validation.check_autoencoder", lambda *args: None)
    monkeypatch.setattr("dype.sampling.passes.AUTOENCODERS", ("AutoencoderKL",))
    generate = "dype.sampling.multipass.run_passes"
    monkeypatch.setattr(generate, lambda *args, **kwargs: pytest.fail("a pass began"))
    line = ["--model", folder, *SMALL, "--multipass", "twopass"]
    for seeds in ("0", "0-1"):
        assert run(*line, "--seed", seeds) == 2
        assert "AutoencoderTiny is not supported by --multipass" in capsys.readouterr().err
