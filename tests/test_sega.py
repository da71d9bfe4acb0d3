"""SEGA's attention scale: golden numbers, properties, and what it sees of a denoiser call."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from conftest import tiny_transformer
from tiny import FAMILIES, random_tensor

from dype import DyPEConfig, apply_dype, remove_dype
from dype.benchmark.embedder import count_launches
from dype.image_ids import make_grid_ids
from dype.patch import dype_applied
from dype.sega import attention_scales, latent_map

CPU = torch.device("cpu")


def make_constant(*key, make):
    """Stand for the `get_constant` of an embedder, without keeping anything."""
    return make()


def scales(latent, s=4.0, pairs=(28, 28), **settings) -> list[np.ndarray]:
    """Return m of rows and columns for a latent [H, W]."""
    latent = torch.as_tensor(latent, dtype=torch.float64)
    axes = attention_scales(latent, pairs, s, DyPEConfig("sega", **settings), make_constant)
    return [m.numpy() for axis in axes for m in axis]


def make_latent(t: float) -> np.ndarray:
    """Return the latent of the golden numbers: an image with the spectrum 1/f^2, and noise."""
    rng = np.random.default_rng(0)
    base, noise = rng.standard_normal((256, 256)), rng.standard_normal((256, 256))
    f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256))
    f[0, 0] = np.inf
    image = np.fft.ifft2(np.fft.fft2(base) / f).real
    return (1 - t) * (image - image.mean()) / image.std() + t * noise


@pytest.mark.parametrize("s", [2, 4])
def test_published_formulas_agree(s):
    path = Path(__file__).parent / "golden" / f"methods_flux_{s}x.json"
    golden = json.loads(path.read_text())
    for t in (1, 0.5, 0.1047):
        rows, _ = scales(make_latent(t), s)
        np.testing.assert_allclose(rows, golden[f"m sega (rows) t={t}"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("grid", [(48, 32), (32, 80), (20, 12)])
def test_transcription_agrees(grid):
    """Rows and columns of a latent that is not square, with unequal numbers of pairs."""
    latent = make_latent(0.4)[: grid[0], : grid[1]]
    for pairs, s in (((28, 28), 4.0), ((24, 16), 2.0)):
        for axis, m in enumerate(scales(latent, s, pairs)):
            expected = reference.sega_scales(latent, axis, pairs[axis], s)
            np.testing.assert_allclose(m, expected, rtol=1e-9)


def test_white_noise_and_alpha():
    """White noise gives m near the reference, alpha = 0 the reference itself."""
    noise = random_tensor((128, 192), 0)
    assert np.abs(np.stack(scales(noise)) - 4**0.08).max() < 0.01
    assert (np.stack(scales(make_latent(0.5), sega_alpha=0.0)) == 4**0.08).all()


def test_rows_and_columns():
    """A transposed latent exchanges m of rows and columns; waves along rows alone differ."""
    latent = make_latent(0.3)[:96]
    rows, columns = scales(latent, pairs=(28, 12))
    again = scales(latent.T, pairs=(12, 28))
    np.testing.assert_allclose(again[1], rows, rtol=1e-12)
    np.testing.assert_allclose(again[0], columns, rtol=1e-12)
    equal = scales(latent)
    np.testing.assert_allclose(equal[0], rows, rtol=1e-12)
    assert np.abs(equal[0] - equal[1]).max() > 0.001


def test_energy_lowers_m():
    """Pairs have a small m where their axis has much energy; the floor holds.

    A band of waves around 3/4 of Nyquist lies at the place of pair 6.75 of 28.
    """
    spectrum = np.fft.rfft(random_tensor((128, 128), 0).numpy(), axis=0)
    spectrum[46:51] *= 10
    latent = np.fft.irfft(spectrum, axis=0)
    rows, columns = scales(latent, sega_floor=0.01)
    assert {*rows.argsort()[:2].tolist()} == {6, 7}
    assert columns.argmin() not in (6, 7)
    assert scales(make_latent(0.1), sega_floor=1.1)[0].min() == 1.1


def test_a_constant_latent():
    """Without any spectrum, or with one pair alone, every m is the reference."""
    for latent in (torch.zeros(8, 8), torch.ones(16, 24)):
        np.testing.assert_allclose(scales(latent), 4**0.08, rtol=1e-12)
    np.testing.assert_allclose(scales(make_latent(0.5)[:16], pairs=(1, 1)), 4**0.08, rtol=1e-12)
    assert np.isfinite(scales(make_latent(0.5)[:1, :24], pairs=(1, 3))[1]).all()


def denoiser_call(grid, seed=0) -> dict:
    """Return the arguments of a call of the tiny FLUX with two samples."""
    count = grid[0] * grid[1]
    return {
        "hidden_states": random_tensor((2, count, 16), seed),
        "encoder_hidden_states": random_tensor((2, 8, 128), 1),
        "pooled_projections": random_tensor((2, 128), 2),
        "timestep": torch.tensor([0.7, 0.7]),
        "img_ids": make_grid_ids(0, *grid),
        "txt_ids": torch.zeros(8, 3),
    }


def test_the_map_is_what_the_transformer_sees():
    """It is the mean of the embedded tokens, up to a constant."""
    transformer, call = tiny_transformer(), denoiser_call((8, 12))
    tokens = call["hidden_states"]
    expected = transformer.x_embedder(tokens).mean((0, 2)).view(8, 12)
    ours = latent_map(tokens, transformer.x_embedder, (8, 12), make_constant)
    torch.testing.assert_close(ours - ours.mean(), expected - expected.mean(), atol=1e-6, rtol=0)


def test_the_latent_of_each_call():
    """m follows the latent of the call, not that of an earlier one; other methods ignore it."""
    transformer = tiny_transformer()
    settings = {"base_resolution": 64, "shift": "model"}
    for config, differs in (
        (DyPEConfig("sega", **settings), True),
        (DyPEConfig("yarn", **settings), False),
        (DyPEConfig("yarn", attention_path="sega", **settings), True),
    ):
        with dype_applied(transformer, config):
            embedder, tables = transformer.pos_embed, []
            for seed in (0, 1, 0):
                embedder.prepare_call(transformer, denoiser_call((8, 12), seed))
                tables.append(embedder.state.tables[0])
        assert torch.equal(tables[0], tables[2])
        assert torch.equal(tables[0], tables[1]) != differs


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    """Each family's call has the latent, and without a stretch images are stock bits."""
    build, generate = FAMILIES[family]
    pipe = build()
    stock = generate(pipe, 64, 96, steps=2)
    apply_dype(pipe, DyPEConfig("sega", base_resolution=96, shift="model"))
    assert torch.equal(generate(pipe, 64, 96, steps=2), stock)
    images = []
    for alpha in (0.0, 2.0):
        config = DyPEConfig("sega", base_resolution=32, shift="model", sega_alpha=alpha)
        apply_dype(pipe, config)
        images.append(generate(pipe, 64, 96, steps=2, batch=2))
    assert images[0].isfinite().all()
    assert not torch.equal(*images)
    remove_dype(pipe)
    assert torch.equal(generate(pipe, 64, 96, steps=2), stock)


def test_other_orders_of_the_tokens_are_refused():
    """References before the image, or shuffled tokens, have no map in row-major order."""
    transformer, call = tiny_transformer(), denoiser_call((8, 12))
    apply_dype(transformer, DyPEConfig("sega", base_resolution=64, shift="model"))
    first = torch.cat([make_grid_ids(1, 2, 2), call["img_ids"]])
    for ids in (first, call["img_ids"].flip(0)):
        tokens = random_tensor((2, len(ids), 16), 0)
        call |= {"img_ids": ids, "hidden_states": tokens}
        with pytest.raises(ValueError, match="the image is not the first row-major grid"):
            transformer(**call)
    apply_dype(transformer, DyPEConfig("sega", base_resolution=256, shift="model"))
    transformer(**call)  # no stretch, so nobody looks


def test_a_loop_without_the_hook():
    """`set_grid` forgets the latent of an earlier call, and m is the reference."""
    transformer, call = tiny_transformer(), denoiser_call((8, 12))
    apply_dype(transformer, DyPEConfig("sega", base_resolution=64, shift="model"))
    embedder = transformer.pos_embed
    embedder.prepare_call(transformer, call)
    assert embedder.frequencies((8, 12), CPU)[1].unique().numel() > 1
    embedder.set_grid(8, 12)
    np.testing.assert_allclose(embedder.frequencies((8, 12), CPU)[1], 3**0.08, rtol=1e-12)


def test_weights_that_are_not_on_the_device_yet(monkeypatch):
    """With model offload they come after the pre-hook; the layer is called where they are."""
    layer, keys = torch.nn.Linear(16, 32), []
    elsewhere = SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr(layer, "parameters", lambda: [elsewhere])
    units = torch.eye(17, 16)
    tokens = random_tensor((1, 24, 16), 0)
    latent_map(tokens, layer, (4, 6), lambda *key, make: keys.append(key) or units)
    assert keys[0][-1] == elsewhere.device


def test_launches():
    """A call launches at most 60 kernels, with the spectrum."""
    transformer, call = tiny_transformer(), denoiser_call((32, 32))
    apply_dype(transformer, DyPEConfig("sega", base_resolution=64, shift="model"))
    embedder = transformer.pos_embed
    embedder.prepare_call(transformer, call)
    with torch.no_grad():
        count = count_launches(lambda: embedder.prepare_call(transformer, call), CPU)
    assert 0 < count <= 60
