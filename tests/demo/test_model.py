"""The demo model: its scenes, the layout check, its training, and the images it generates."""

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
from PIL import Image

import run_dype
from dype.demo import model as demo_model
from dype.demo import train
from dype.demo.layout_check import check
from dype.demo.report import psnr, round_trip
from dype.demo.scenes import COLORS, HELD_OUT, SHAPES, TRIPLES, render, sample_scene
from dype.errors import UserError
from dype.noise_schedule import noise_schedule
from dype.pipelines.catalog import MODELS

WEIGHTS = Path(MODELS["demo"].repo)
CHILDREN = ("children_user", "children_system")


def make_scenes(count, seed=7):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def demo():
    return FluxPipeline.from_pretrained(WEIGHTS, local_files_only=True)


def test_scenes_are_free_of_resolution():
    """A larger rendering, averaged down, is the smaller one but for its finest leaves."""
    for scene in make_scenes(3):
        small = render(scene, 128).astype(float)
        large = render(scene, 256).reshape(128, 2, 128, 2, 3).mean((1, 3))
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.9
        assert (render(scene, 128) == small).all()


def test_held_out_triples():
    assert len(set(HELD_OUT)) == 40
    assert not set(HELD_OUT) & set(train.TRAIN_TRIPLES)
    assert len(TRIPLES) == len(SHAPES) * len(COLORS) * (len(COLORS) - 1)


def test_caption_variants():
    scene = make_scenes(1)[0]
    color, shape, ground = scene.color, scene.shape, scene.ground
    assert [caption.split(",")[0] for caption in train.caption_variants(scene)] == [
        f"a {shape} on leaves",
        f"a {shape} on {ground} leaves",
        f"a {color} {shape} on leaves",
        f"a {color} {shape} on {ground} leaves",
    ]
    assert train.caption_variants(scene)[3] == scene.caption


@pytest.mark.parametrize(("size", "count"), [(256, 12), (512, 2)])
def test_check_passes_the_truth(size, count, demo):
    """Every rendered scene passes after a round trip through the autoencoder."""
    for scene in make_scenes(count):
        verdict = check(round_trip(demo.vae, render(scene, size)), scene.color, scene.ground)
        assert verdict.layout, (scene, verdict)
        assert verdict.shape == scene.shape, (scene, verdict)


def test_check_fails_wrong_images():
    """Another color, another ground, four objects, an object off center, no object."""
    scene = make_scenes(1)[0]
    image = render(scene, 256)
    wrong_color = next(c for c in COLORS if c not in (scene.color, scene.ground))
    assert not check(image, wrong_color, scene.ground).layout
    assert not check(image, scene.color, wrong_color).layout
    small = np.asarray(Image.fromarray(image).resize((128, 128)))
    wrong_images = np.tile(small, (2, 2, 1)), np.roll(image, 70, 0), image[:64, :64]
    assert check(image, scene.color, scene.ground).layout
    assert not any(check(wrong, scene.color, scene.ground).layout for wrong in wrong_images)


def test_autoencoder(demo):
    """At least 26 dB at 256, 512 and 1024 px, and within 2 dB of each other."""
    means = {}
    for size, count in ((256, 4), (512, 2), (1024, 1)):
        levels = []
        for scene in make_scenes(count, seed=99):
            image = render(scene, size)
            levels.append(psnr(image, round_trip(demo.vae, image)))
        means[size] = np.mean(levels)
    assert min(means.values()) >= 26, means
    assert max(means.values()) - min(means.values()) <= 2, means


def test_it_is_a_flux_pipeline(demo):
    """FLUX's classes, head layout and schedule at the demo's scale; 24 MB at most."""
    config = demo.transformer.config
    assert (config.attention_head_dim, tuple(config.axes_dims_rope)) == (128, (16, 56, 56))
    assert demo.vae_scale_factor == 8
    assert not demo.vae.config.mid_block_add_attention
    mu = [noise_schedule(demo.scheduler, n, n, 4)[0] for n in (256, 512, 1024)]
    assert mu == pytest.approx([1.15, 3.23, 11.55], abs=0.01)
    assert sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) < 24e6
    assert all(p.dtype == torch.float32 for p in demo.transformer.parameters())


def test_image_of_the_prompt(tmp_path, monkeypatch):
    """The command line generates the README's prompt at the base resolution."""
    monkeypatch.chdir(tmp_path)
    size = ["--height", "256", "--width", "256", "--output", "ring.png"]
    assert run_dype.main(["--model", "demo", *size]) == 0
    verdict = check(np.asarray(Image.open("ring.png")), "red", "teal")
    assert verdict.layout, verdict
    record = json.loads(Path("ring.json").read_text())
    assert record["prompt"] == "a red ring on teal leaves"
    assert record["mu"] == 1.15


def test_the_demo_command(tmp_path):
    """The README's command with 5 steps takes 5/20 of 120 CPU s at most, under 3 GB; a ring."""
    words = ["--model", "demo", "--prompt", "a red ring on teal leaves", "--steps", "5"]
    words += ["--height", "512", "--width", "512", "--output", str(tmp_path / "ring.png")]
    # through a shell, because a child of this process would inherit its peak memory
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    before = os.times()
    subprocess.run([*shell, sys.executable, run_dype.__file__, *words], check=True)
    after = os.times()
    seconds = [getattr(after, kind) - getattr(before, kind) for kind in CHILDREN]
    assert sum(seconds) < 2 * 60 * 5 / 20
    record = json.loads((tmp_path / "ring.json").read_text())
    assert record["peak_memory"] < 3e9
    verdict = check(np.asarray(Image.open(tmp_path / "ring.png")), "red", "teal")
    assert verdict.layout, verdict
    assert verdict.shape == "ring", verdict


def set_tiny_modules(monkeypatch) -> None:
    """Replace the demo's modules by small ones of the same classes, for a fast training."""
    vae = dict(demo_model.vae().config) | {"block_out_channels": (8,) * 4}
    transformer = dict(demo_model.transformer().config)
    transformer |= {"num_single_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(demo_model, "vae", lambda: AutoencoderKL.from_config(vae))
    monkeypatch.setattr(
        demo_model, "transformer", lambda: FluxTransformer2DModel.from_config(transformer)
    )


def test_training_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """A run that is interrupted in stages 2 and 3 ends with the weights of a whole run."""
    set_tiny_modules(monkeypatch)
    monkeypatch.setattr(train, "BASE", 64)
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(train, "VAE_IMAGES", {64: 2, 128: 1, 256: 1})
    monkeypatch.setattr(train, "NUM_SCENES", 8)
    small = ["--device", "cpu", "--batch", "2", "--vae_steps", "2", "--dtype", "float32"]
    small += ["--steps", "4", "--diluted_steps", "4"]

    def run_training(name, seed="3", *flags):
        folder = ["--work", str(tmp_path / name), "--out", str(tmp_path / name / "out")]
        return train.main([*small, *folder, "--seed", seed, *flags])

    def load_weights(name):
        pipe = FluxPipeline.from_pretrained(tmp_path / name / "out")
        modules = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae)
        return [value for module in modules for value in module.state_dict().values()]

    assert run_training("whole") == 0
    save, left = train.save, ["transformer", "diluted"]

    def save_or_interrupt(path, **state):
        save(path, **state)
        if path.stem in left and state["step"] == 2:
            left.remove(path.stem)
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", save_or_interrupt)
    assert [run_training("parts") for _ in range(3)] == [130, 130, 0]
    assert all(map(torch.equal, load_weights("whole"), load_weights("parts")))
    monkeypatch.setattr(train, "train_vae", None)
    monkeypatch.setattr(train, "save", save)
    flags = ["--vae", str(tmp_path / "whole" / "out"), "--steps", "1", "--diluted_steps", "1"]
    assert [run_training(seed, seed, *flags) for seed in "34"] == [0, 0]
    whole, seed_3, seed_4 = (load_weights(name) for name in ("whole", "3", "4"))
    largest = max(range(len(whole)), key=lambda i: whole[i].numel())  # of the transformer
    assert not torch.equal(seed_3[largest], seed_4[largest])
    # The decoder's last bias is that of --vae.
    last = whole[-1].float(), seed_4[-1].float()
    torch.testing.assert_close(*last, rtol=1e-3, atol=1e-3)


def test_training_continues_in_its_number_format(tmp_path, monkeypatch):
    """A checkpoint names its format; another --dtype is a mistake."""
    monkeypatch.setattr(train, "fast_dtype", lambda device: "float32")
    args = train.parser().parse_args(["--work", str(tmp_path)])
    assert train.resolve_dtype(args) == "float32"
    torch.save({"step": 250}, tmp_path / "vae.pt")  # of older versions, without a format
    assert train.resolve_dtype(args) == "bfloat16"
    torch.save({"dtype": "float32"}, tmp_path / "transformer.pt")
    assert train.resolve_dtype(args) == "float32"
    args.dtype = "bfloat16"
    with pytest.raises(UserError, match=r"--dtype is bfloat16, but .* was trained in float32"):
        train.resolve_dtype(args)


def test_training_needs_its_device(tmp_path, capsys):
    assert train.main(["--work", str(tmp_path / "work"), "--device", "tpu"]) == 1
    assert "this machine has no device tpu; try cpu" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_dilution(demo, monkeypatch):
    """Text gets the attention that it has among up to 16 times as many image tokens, per sample."""
    masks, attend, texts = [], F.scaled_dot_product_attention, demo_model.MAX_TOKENS

    def record_mask(query, key, value, attn_mask=None, **options):
        if key.shape[-2] == texts + 256:  # in the transformer
            masks.append(attn_mask)
        return attend(query, key, value, attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record_mask)
    args = argparse.Namespace(batch=8, device="cpu", seed=0, dtype="float32")
    latents = torch.zeros(8, demo_model.LATENT_CHANNELS, 32, 32)
    loss_at = train.make_flow_matching_loss(demo, latents, make_scenes(8), args)
    for dilution in (1, train.DILUTION):
        masks.clear()
        loss_at(0, dilution)
        assert len(masks) == 5  # one double block, four single ones
        bias = masks[0][:, 0, 0].float()
        assert bias.shape == (8, texts + 256)
        assert not bias[:, texts:].any()
        assert (bias[:, :texts] == bias[:, :1]).all()
        assert bias.min() >= -math.log(dilution) - 0.01
        assert bias.max() <= 0
        assert len(bias[:, 0].unique()) == (1 if dilution == 1 else 8)

    query, key, value = torch.randn(3, 1, 1, 12, 8)
    large = [torch.cat([x[:, :, :4], x[:, :, 4:].repeat(1, 1, 16, 1)], 2) for x in (key, value)]
    bias = F.pad(torch.full((4,), -math.log(16)), (0, 8))
    torch.testing.assert_close(attend(query, key, value, bias[None]), attend(query, *large))


def test_vocabulary_is_the_captions():
    """The tokenizer knows every word of the captions; another word becomes <unk>."""
    tokenizer = demo_model.tokenizer(None)
    unknown = tokenizer.unk_token_id
    assert all(unknown not in tokenizer(scene.caption).input_ids for scene in make_scenes(50))
    assert unknown in tokenizer("a red castle").input_ids
