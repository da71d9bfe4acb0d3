"""NaN and infinity end an image with a sentence, in every pass and with every pipeline."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import LATENT_CHANNELS, TINY_DEMO, quiet, run, table, tiny_components
from diffusers import AutoencoderTiny, FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from test_multipass import BUILDS, SETTINGS, TWO, prompt_of

import dype
from dype.errors import UnavailableError
from dype.sampling import multipass, sample

SIZE = {"height": 64, "width": 64, "steps": 2}


@pytest.fixture(params=BUILDS)
def pipe(request):
    return BUILDS[request.param]()


def fill(module: torch.nn.Module, value: float) -> None:
    """Set the last bias or weight of a module to a value."""
    with torch.no_grad():
        list(module.parameters())[-1].fill_(value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_latents_that_are_not_finite(pipe, value):
    fill(pipe.transformer, value)
    with pytest.raises(UnavailableError, match="the generated latent has values that are NaN or"):
        sample.generate(pipe, prompt_of(pipe), **SIZE, **SETTINGS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_decoded_image_that_is_not_finite(pipe, value):
    """Some autoencoders clamp their output, which turns infinity into white."""
    decoder = pipe.vae.decoder
    fill(decoder.conv_out if hasattr(decoder, "conv_out") else decoder.layers[-1], value)
    with pytest.raises(UnavailableError, match="the decoded image has values that are NaN or"):
        sample.generate(pipe, prompt_of(pipe), **SIZE, **SETTINGS)
    assert not pipe.vae.decoder._forward_hooks


def test_an_embedding_that_is_not_finite(pipe):
    """A text encoder in float16 overflows; the image ends before its steps."""
    prompt, calls = prompt_of(pipe), []
    if isinstance(prompt, str):
        prompt = sample.encode_prompt(pipe, prompt, 16)
    prompt["prompt_embeds"][0][..., -1] = math.inf
    pipe.transformer.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(UnavailableError, match="the embedding of the prompt has values"):
        sample.generate(pipe, prompt, **SIZE, **SETTINGS)
    assert not calls


def test_an_image_to_refine_whose_latents_are_not_finite(pipe):
    """The second pass ends before its steps."""
    fill(pipe.vae.encoder, math.nan)
    calls = []
    pipe.transformer.register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(UnavailableError, match="the latent of the image to refine has values"):
        multipass.multipass(pipe, prompt_of(pipe), 128, 128, TWO, **SETTINGS)
    assert len(calls) == TWO[0]["steps"]


def test_a_second_pass_that_is_not_finite():
    """As where attention overflows in the longer sequence alone."""
    pipe = quiet(FluxPipeline(**tiny_components()))

    def overflow(module, args, kwargs, output):
        return (output[0] * (math.nan if kwargs["hidden_states"].shape[1] > 16 else 1),)

    pipe.transformer.register_forward_hook(overflow, with_kwargs=True)
    with pytest.raises(UnavailableError, match="generated latent"):
        multipass.multipass(pipe, "a red sun", 128, 128, TWO, **SETTINGS)
    sample.generate(pipe, "a red sun", **SIZE, **SETTINGS)


@pytest.mark.parametrize("override", [{}, {"vae": "cpu"}])
def test_one_tile_that_is_not_finite(override):
    """Also with an autoencoder on a device of its own."""
    pipe = quiet(FluxPipeline(**tiny_components()))
    pipe.dype_device_overrides = override
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 8
    outputs = []

    def overflow(decoder, args, output):
        outputs.append(output)
        return output * (math.inf if len(outputs) == 3 else 1)

    pipe.vae.decoder.register_forward_hook(overflow)
    with pytest.raises(UnavailableError, match="decoded image"):
        sample.generate(pipe, "a red sun", height=128, width=128, steps=1, **SETTINGS)
    assert len(outputs) > 3


def test_a_tiny_autoencoder():
    """Its decoder bounds what it gets, so that infinity in the latents leaves no trace."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        shift_factor=0.0,
    ).eval()
    pipe = quiet(FluxPipeline(**tiny_components() | {"vae": vae}))
    sample.generate(pipe, "a red sun", **SIZE, **SETTINGS)
    fill(pipe.transformer, math.inf)
    with pytest.raises(UnavailableError, match="generated latent"):
        sample.generate(pipe, "a red sun", **SIZE, **SETTINGS)


def test_the_host_waits_once(monkeypatch):
    """The check reads one value of the device, whatever the number of steps and tiles."""
    pipe = quiet(FluxPipeline(**tiny_components()))
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 8
    reads, to_bool = [], torch.Tensor.__bool__

    def spy(tensor):
        reads.append(tensor.shape)
        return to_bool(tensor)

    def count(steps, size):
        reads.clear()
        sample.generate(pipe, "x", height=size, width=size, steps=steps, **SETTINGS)
        return len(reads)

    monkeypatch.setattr(torch.Tensor, "__bool__", spy)
    assert count(2, 64) == count(2, 192)


@pytest.mark.parametrize(
    "flags", ["", "--vae_device cpu", "--tiled_vae on", "--multipass twopass", "--progressive"]
)
def test_the_command_line(flags, tmp_path, monkeypatch, capsys):
    """No file is left; a sweep has failed rows, which the same command tries again."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(dype.__file__).parent / "demo" / "weights", "copy")
    path = "copy/vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"].fill_(math.nan)
    save_file(weights, path)
    line = [*TINY_DEMO, "--model", "copy", "--max_sequence_length", "16", "--size", "64"]
    line += ["--prompt", "a sun", *flags.split()]
    assert run(*line, "--output", "a.png") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("run_dype.py: the decoded image has values that are NaN or infinite")
    for words in ("--dtype bfloat16", "--lora", "--attention native"):
        assert words in error
    assert not [*Path().glob("a.*")]
    if flags:
        return
    for _ in range(2):
        assert run(*line, "--seed", "0-1", "--output_dir", "out") == 1
        out, error = capsys.readouterr()
        assert "out: 2 images, 0 finished" in out
        assert "2 of 2 images failed" in error
        assert [row["error"][:17] for row in table()] == ["the decoded image"] * 2
        assert not [*Path("out").glob("seed_*")]


def test_the_pixels_are_those_of_the_pipeline(pipe):
    """The conversion to 8 bits is diffusers' own."""
    prompt = prompt_of(pipe)
    if isinstance(prompt, str):
        prompt = sample.encode_prompt(pipe, prompt, 16)
    image = sample.generate(pipe, prompt, **SIZE, **SETTINGS)
    generator, scale = torch.Generator().manual_seed(SETTINGS["seed"]), {"guidance_scale": 0.0}
    if type(pipe).__name__ == "QwenImagePipeline":
        scale = {"guidance_scale": None, "true_cfg_scale": 1.0}
    plain = pipe(
        **prompt, **scale, height=64, width=64, num_inference_steps=2, generator=generator
    ).images[0]
    assert isinstance(image, Image.Image)
    assert image.mode == plain.mode
    assert image.tobytes() == plain.tobytes()
