"""The demo model: its parts, its training, and the images it generates."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from landscapes import make_scenes
from PIL import Image
from torch.nn import ModuleDict

import run_dype
from dype.demo import model as demo_model
from dype.demo import train, train_autoencoder, train_stage
from dype.demo.drawing import render
from dype.demo.layout_check import check
from dype.demo.optimizer import Optimizer
from dype.demo.report import round_trip
from dype.demo.scenes import parse_caption
from dype.demo.scores import log_spectrum, mean_power
from dype.errors import UserError
from dype.noise_schedule import noise_schedule
from dype.pipelines.catalog import MODELS

WEIGHTS = Path(MODELS["demo"].repo)
CHILDREN = ("children_user", "children_system")


@pytest.fixture(scope="module")
def demo():
    return FluxPipeline.from_pretrained(WEIGHTS, local_files_only=True)


def psnr(image, reference):
    """Return the peak signal-to-noise ratio of two uint8 images, dB."""
    return 10 * np.log10(255**2 / np.mean((image.astype(float) - reference) ** 2))


def test_autoencoder(demo):
    """Unseen scenes keep 34 dB, and their spectrum up to half of Nyquist within 0.3."""
    for size, count in ((512, 4), (1024, 2)):
        images = [render(scene, size) for scene in make_scenes(count, seed=99)]
        decoded = [round_trip(demo.vae, image) for image in images]
        assert np.mean([*map(psnr, images, decoded)]) >= 34
        spectra = [
            np.mean([log_spectrum(mean_power(image)) for image in group], 0)[:-4]
            for group in (images, decoded)
        ]
        assert np.sqrt(np.mean((spectra[0] - spectra[1]) ** 2)) <= 0.3


def test_the_last_latents_are_like_the_others(demo):
    """They are those of an image with a border.

    Without the encoder's training the error of the last column is 12 times the variance.
    """
    images = np.stack([render(scene, 512) for scene in make_scenes(2, seed=98)])
    x = train_autoencoder.to_tensor(images, "cpu")
    padded = np.pad(images, ((0, 0), (0, 48), (0, 48), (0, 0)), "reflect")
    with torch.no_grad():
        latents = demo.vae.encode(x).latent_dist.mode()
        larger = demo.vae.encode(train_autoencoder.to_tensor(padded, "cpu")).latent_dist.mode()
        expected = larger[..., :64, :64]
        with_border = train_autoencoder.encode_with_border(demo.vae, x)
    assert (with_border - expected).square().mean() < 1e-3 * expected.var()
    for last in ((..., slice(None), -1), (..., -1, slice(None))):  # the column, the row
        assert (latents - expected)[last].square().mean() < 0.1 * expected.var()


def test_it_is_a_flux_pipeline(demo):
    """FLUX's classes, head layout and schedule at the demo's scale; 24 MB at most."""
    config = demo.transformer.config
    assert (config.attention_head_dim, tuple(config.axes_dims_rope)) == (128, (16, 56, 56))
    assert demo.vae_scale_factor == 8
    assert not demo.vae.config.mid_block_add_attention
    mu = [noise_schedule(demo.scheduler, n, n, 4)[0] for n in (512, 1024, 2048)]
    assert mu == pytest.approx([1.15, 3.23, 11.55], abs=0.01)
    assert sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) < 24e6
    assert all(p.dtype == torch.float32 for p in demo.transformer.parameters())


def test_image_of_the_prompt(tmp_path, monkeypatch):
    """The command line generates the README's prompt at the base resolution."""
    monkeypatch.chdir(tmp_path)
    size = ["--size", str(MODELS["demo"].base_resolution), "--output", "lake.png"]
    assert run_dype.main(["--model", "demo", *size]) == 0
    record = json.loads(Path("lake.json").read_text())
    verdict = check(np.asarray(Image.open("lake.png")), parse_caption(record["prompt"]))
    assert verdict.layout, verdict
    assert record["prompt"] == "a low red sun over snowy blue mountains and a lake at dusk"
    assert record["mu"] == 1.15


def test_the_demo_command(tmp_path):
    """The README's command with 2 steps takes at most 40 CPU s and 2.5 GB."""
    words = ["--model", "demo", "--prompt", MODELS["demo"].prompt, "--steps", "2"]
    words += ["--height", "1024", "--width", "1024", "--output", str(tmp_path / "lake.png")]
    # through a shell, because a child of this process would inherit its peak memory
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    before = os.times()
    subprocess.run([*shell, sys.executable, run_dype.__file__, *words], check=True)
    after = os.times()
    seconds = [getattr(after, kind) - getattr(before, kind) for kind in CHILDREN]
    assert sum(seconds) < 40
    record = json.loads((tmp_path / "lake.json").read_text())
    assert record["peak_memory"] < 2.5e9


def set_tiny_modules(monkeypatch) -> None:
    """Replace the demo's modules by small ones of the same classes, for a fast training."""
    vae = dict(demo_model.vae().config) | {"block_out_channels": (8,) * 4}
    transformer = dict(demo_model.transformer().config)
    transformer |= {"num_single_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(demo_model, "vae", lambda: AutoencoderKL.from_config(vae))
    monkeypatch.setattr(
        demo_model, "transformer", lambda: FluxTransformer2DModel.from_config(transformer)
    )


def test_training_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """A run that is interrupted in every stage ends with the weights of a whole run."""
    set_tiny_modules(monkeypatch)
    for module in (train, train_autoencoder):
        monkeypatch.setattr(module, "BASE", 64)
    monkeypatch.setattr(train_stage, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(train_autoencoder, "VAE_IMAGES", {256: 2, 272: 1, 288: 1})
    monkeypatch.setattr(train, "NUM_SCENES", 8)
    small = ["--device", "cpu", "--batch", "2", "--vae_steps", "4", "--dtype", "float32"]
    small += ["--encoder_steps", "4", "--decoder_steps", "4", "--half_steps", "4", "--steps", "4"]
    small += ["--guidance_steps", "4"]

    def run_training(name, seed="3", *flags):
        folder = ["--work", str(tmp_path / name), "--out", str(tmp_path / name / "out")]
        return train.main([*small, *folder, "--seed", seed, *flags])

    def load_weights(name):
        pipe = FluxPipeline.from_pretrained(tmp_path / name / "out")
        modules = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae)
        return [value for module in modules for value in module.state_dict().values()]

    assert run_training("whole") == 0
    path = tmp_path / "other" / "half.pt"
    path.parent.mkdir()
    torch.save(torch.load(tmp_path / "whole" / "half.pt") | {"start": 1.0}, path)
    flags = ["--vae", str(tmp_path / "whole" / "out")]
    assert run_training("other", "3", *flags) == 2
    assert "half.pt began with other weights, expected another --work" in capsys.readouterr().err
    save = train_stage.save_checkpoint
    left = ["vae", "encoder", "decoder", "half", "full", "guidance"]

    def save_or_interrupt(path, **state):
        save(path, **state)
        if path.stem in left and state["step"] == 2:
            left.remove(path.stem)
            raise KeyboardInterrupt

    monkeypatch.setattr(train_stage, "save_checkpoint", save_or_interrupt)
    assert [run_training("parts") for _ in range(7)] == [130] * 6 + [0]
    assert all(map(torch.equal, load_weights("whole"), load_weights("parts")))
    monkeypatch.setattr(train, "train_autoencoder", None)
    monkeypatch.setattr(train_stage, "save_checkpoint", save)
    flags = ["--vae", str(tmp_path / "whole" / "out"), "--steps", "1", "--half_steps", "1"]
    flags += ["--guidance_steps", "1"]
    assert [run_training(seed, seed, *flags) for seed in "34"] == [0, 0]
    whole, seed_3, seed_4 = (load_weights(name) for name in ("whole", "3", "4"))
    largest = max(range(len(whole)), key=lambda i: whole[i].numel())  # of the transformer
    assert not torch.equal(seed_3[largest], seed_4[largest])
    # The decoder's last bias is that of --vae.
    last = whole[-1].float(), seed_4[-1].float()
    torch.testing.assert_close(*last, rtol=1e-3, atol=1e-3)


def test_texture_error():
    """It is 0 for the same texture elsewhere, 1 without texture, and 1 at twice the strength."""
    x = torch.arange(64) * torch.pi / 4
    stripes = torch.sin(x + torch.tensor([[0.0], [1.0]]))[:, None, None].expand(2, 3, 64, 64)
    error = train_autoencoder.texture_error(stripes, stripes.flip(0))
    assert error < 0.02
    random = torch.randn(2, 3, 64, 64)
    for decoded, expected in ((random, 0), (0 * random, 1), (2 * random, 1)):
        assert train_autoencoder.texture_error(decoded, random) == pytest.approx(expected, abs=1e-5)


def test_training_continues_in_its_number_format(tmp_path, monkeypatch):
    """A checkpoint names its format; another --dtype is a mistake."""
    monkeypatch.setattr(train, "fast_dtype", lambda device: "float32")
    args = train.parser().parse_args(["--work", str(tmp_path)])
    assert train.resolve_dtype(args) == "float32"
    torch.save({"dtype": "bfloat16"}, tmp_path / "vae.pt")
    assert train.resolve_dtype(args) == "bfloat16"
    args.dtype = "float32"
    with pytest.raises(UserError, match=r"--dtype is float32, but .* was trained in bfloat16"):
        train.resolve_dtype(args)


def test_training_needs_its_device(tmp_path, capsys):
    assert train.main(["--work", str(tmp_path / "work"), "--device", "tpu"]) == 1
    assert "this machine has no device tpu; try cpu" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def loss_arguments(batch):
    """Return arguments of a training step of a batch of half-sized scenes."""
    args = argparse.Namespace(device="cpu", seed=0, dtype="float32")
    latents = torch.zeros(batch, demo_model.LATENT_CHANNELS, 32, 32)
    return {"latents": latents, "scenes": make_scenes(batch), "args": args, "batch": batch}


def test_dilution(demo, monkeypatch):
    """Text gets the attention that it has among up to 16 times as many image tokens, per sample."""
    masks, attend, texts = [], F.scaled_dot_product_attention, demo_model.MAX_TOKENS

    def record_mask(query, key, value, attn_mask=None, **options):
        if key.shape[-2] == texts + 256:  # in the transformer
            masks.append(attn_mask)
        return attend(query, key, value, attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record_mask)
    train.flow_matching_loss(demo, step=0, **loss_arguments(8))
    assert len(masks) == 5  # one double block, four single ones
    bias = masks[0][:, 0, 0].float()
    assert bias.shape == (8, texts + 256)
    assert not bias[:, texts:].any()
    assert (bias[:, :texts] == bias[:, :1]).all()
    assert -math.log(train.DILUTION) - 0.01 <= bias.min() < bias.max() <= 0
    assert len(bias[:, 0].unique()) == 8

    query, key, value = torch.randn(3, 1, 1, 12, 8)
    large = [torch.cat([x[:, :, :4], x[:, :, 4:].repeat(1, 1, 16, 1)], 2) for x in (key, value)]
    bias = F.pad(torch.full((4,), -math.log(16)), (0, 8))
    torch.testing.assert_close(attend(query, key, value, bias[None]), attend(query, *large))


def test_half_sized_images_lie_at_the_positions_of_full_ones(demo):
    """Of 16 tokens per side the i-th lies between the tokens 2 i and 2 i + 1 of 32."""
    positions = []
    hook = demo.transformer.pos_embed.register_forward_pre_hook(
        lambda module, inputs: positions.append(inputs[0])
    )
    with hook:
        train.flow_matching_loss(demo, step=0, **loss_arguments(2))
    ids = positions[0][demo_model.MAX_TOKENS :]
    assert ids[:, 2].view(16, 16)[3].tolist() == [2 * i + 0.5 for i in range(16)]
    assert ids[:, 1].view(16, 16)[:, 3].tolist() == [2 * i + 0.5 for i in range(16)]


def test_guidance_is_distilled(demo, monkeypatch):
    """The target is the teacher's classifier-free guidance at the scale that the student gets."""
    scales = []

    def predict(pipe, modules, ids, noisy, sigma, guidance, bias):
        with_text = (ids[1] != demo.tokenizer_2.pad_token_id).sum(1) > 1  # more than <eos>
        if modules == "teacher":
            assert guidance.tolist() == [1] * 8
            return with_text.float()[:, None, None].expand_as(noisy)
        assert with_text.tolist() == [True] * 4
        scales.extend(guidance.tolist())
        return guidance[:, None, None].expand_as(noisy)

    monkeypatch.setattr(train, "predict", predict)
    loss = train.flow_matching_loss(demo, step=0, teacher="teacher", **loss_arguments(4))
    assert loss < 1e-12
    assert 1 <= min(scales) < max(scales) <= train.GUIDANCE


def test_muon_moves_convolutions_in_place():
    """A step moves hidden weights by about the rate, whatever the gradient's size."""
    vae = demo_model.vae().to(memory_format=torch.channels_last)
    optimizer = Optimizer(vae, 1e-3, 0.02, "bfloat16")
    pairs = zip(optimizer.matrices, optimizer.hidden, strict=True)
    assert all(matrix.data_ptr() == weight.data_ptr() for matrix, weight in pairs)
    weight = vae.decoder.mid_block.resnets[0].conv1.weight
    before = weight.detach().clone()
    for parameter in vae.parameters():
        parameter.grad = 1e-6 * torch.randn_like(parameter)
    optimizer.step(1.0)
    change = (weight - before).detach().flatten(1)
    singular_values = torch.linalg.svdvals(change) / 0.02
    assert 0.5 < singular_values.min() < singular_values.max() < 1.5
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_muon_in_float32():
    """It does not round to bfloat16, which CPUs with AVX2 alone multiply slowly.

    Expected: five Newton-Schulz steps of Jordan et al. 2024, in float64.
    """
    layer = torch.nn.Linear(8, 24)
    layer.weight.data.zero_()
    gradient = torch.randn(24, 8)
    layer.weight.grad = gradient.clone()
    Optimizer(ModuleDict({"layer": layer}), 1e-3, 0.02, "float32").step(1.0)
    x = (gradient / gradient.norm()).double()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    torch.testing.assert_close(layer.weight.double(), -0.02 * 3**0.5 * x, rtol=1e-4, atol=1e-6)


def test_vocabulary_is_the_captions():
    """The tokenizer knows every word of the captions; another word becomes <unk>."""
    tokenizer = demo_model.tokenizer(None)
    unknown = tokenizer.unk_token_id
    assert all(unknown not in tokenizer(scene.caption).input_ids for scene in make_scenes(50))
    assert unknown in tokenizer("a red castle").input_ids
