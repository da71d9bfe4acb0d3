"""The FLUX embedder alone: fast against slow, exact positions, one compiled graph."""

import copy

import numpy as np
import pytest
import reference
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch._dynamo.testing import CompileCounter

from dype import DyPEConfig
from dype.embedders import FluxDyPE, grid_ids, read_ids
from dype.rope import METHODS

STOCK = FluxPosEmbed(10000, [16, 56, 56])


def embedder(config=None, trained=64, grid=(1, 1), sigma=1.0) -> FluxDyPE:
    made = FluxDyPE(STOCK, config or DyPEConfig(), trained)
    made.set_grid(*grid)
    made.set_timestep(sigma)
    return made


def ids_of(grid, text=3, reference_grid=None, dtype=torch.float32):
    parts = [torch.zeros(text, 3), grid_ids(0, *grid)]
    if reference_grid:
        parts.append(grid_ids(1, *reference_grid))
    return torch.cat(parts).to(dtype)


@pytest.mark.parametrize("method", METHODS)
def test_against_plain_python(method):
    """The whole table of a non-square picture: 1e-6."""
    grid, config = (10, 33), DyPEConfig(method)
    ours = embedder(config, 8, grid, 0.4)(ids_of(grid))
    theirs = reference.flux_table(method, grid, 3, 0.4, length=8, lambda_s=config.lambda_s)
    np.testing.assert_allclose(torch.stack(ours), np.array(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_fast_path_equals_slow_path(method):
    """Broadcasting rows and columns gives the bits of token by token, references included."""
    made = embedder(DyPEConfig(method), 16, (24, 32), 0.7)
    ids = ids_of((24, 32), 5, (10, 17))
    fast = torch.stack(made(ids))
    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    slow = torch.stack(made(ids[shuffled]))
    assert torch.equal(fast[:, shuffled], slow)


def test_unstretched_is_stock():
    for grid in ((16, 16), (10, 16)):
        ids = ids_of(grid, 5, (20, 15))
        for method in METHODS:
            ours = embedder(DyPEConfig(method), 16, grid, 0.5)(ids)
            assert all(torch.equal(a, b) for a, b in zip(ours, STOCK(ids), strict=True))


def test_references_keep_the_stock_encoding():
    """Kontext's picture (kind 1): stock cos and sin, m = 1; text at the origin carries m."""
    ids = ids_of((128, 128), 5, (64, 100))
    cos, sin = embedder(grid=(128, 128))(ids)
    stock_cos, stock_sin = STOCK(ids)
    assert torch.equal(cos[-6400:], stock_cos[-6400:])
    assert torch.equal(sin[-6400:], stock_sin[-6400:])
    m = 0.1 * np.log(2) + 1
    assert torch.equal(cos[:5, :16], torch.ones(5, 16))
    torch.testing.assert_close(cos[:5, 16:], torch.full((5, 112), m, dtype=torch.float32))


def test_grids_of_equal_token_count():
    """2048x4096, then 4096x2048: nothing is left over from the first."""
    made = embedder(grid=(128, 256))
    made(ids_of((128, 256)))
    made.set_grid(256, 128)
    again = torch.stack(made(ids_of((256, 128))))
    assert torch.equal(again, torch.stack(embedder(grid=(256, 128))(ids_of((256, 128)))))


def test_calls_share_no_memory():
    made = embedder(grid=(128, 128))
    first = torch.stack(made(ids_of((128, 128))))
    kept = first.clone()
    made(ids_of((128, 128)))[0].zero_()
    assert torch.equal(first, kept)


def test_rows_beyond_256_in_bfloat16():
    """320 rows give 320 positions, where bfloat16 itself tells 289 apart."""
    given = grid_ids(0, 320, 4).to(torch.bfloat16)
    assert len(given[:, 1].unique()) == 289
    exact, grid, after = read_ids(given)
    assert (grid, after) == ((320, 4), 0)
    assert torch.equal(exact, grid_ids(0, 320, 4))
    wide, grid, after = read_ids(grid_ids(0, 2, 700).to(torch.bfloat16))
    assert (grid, after) == ((2, 700), 0)
    assert torch.equal(wide, grid_ids(0, 2, 700))


def test_references_are_counted_again_too():
    both = torch.cat([grid_ids(0, 300, 20), grid_ids(1, 20, 300)])
    exact, grid, after = read_ids(both.to(torch.bfloat16))
    assert (grid, after) == ((300, 20), 6000)
    assert torch.equal(exact, both)


def test_ids_that_are_no_grid_stay():
    """Positions of one's own are taken as they stand, token by token."""
    odd = grid_ids(0, 8, 8) * 1.5
    exact, grid, after = read_ids(odd)
    assert torch.equal(exact, odd)
    assert (grid, after) == ((8, 8), None)
    made = embedder(DyPEConfig("base"), 4, (8, 8))
    cos, sin = made(odd)
    stock_cos, stock_sin = STOCK(odd)
    assert torch.equal(cos, stock_cos)
    assert torch.equal(sin, stock_sin)


def test_one_graph_for_all_noise_levels():
    """torch.compile(fullgraph=True) compiles once; shape and device stay, sigma is data."""
    counter = CompileCounter()
    made = embedder(grid=(8, 12), trained=4)
    made.set_layout(3, 0)
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    ids = ids_of((8, 12))
    for sigma in (1.0, 0.7, torch.tensor(0.3), torch.tensor(0.1, dtype=torch.bfloat16), 0.0):
        made.set_timestep(sigma)
        ours, expected = compiled(ids), made(ids)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert counter.frame_count == 1


def test_no_state_of_tensors():
    made = embedder()
    assert not list(made.parameters())
    assert not list(made.buffers())
    assert not made.state_dict()
    assert not list(made.children())


def test_a_deep_copy_has_its_own_sigma():
    made = embedder(sigma=0.5)
    other = copy.deepcopy(made)
    other.set_timestep(0.1)
    assert made.sigma == 0.5
    assert other.sigma == 0.1


def test_noise_level_after_inference_mode():
    with torch.inference_mode():
        made = embedder()
        made.set_timestep(torch.tensor(0.5))
    made.set_timestep(torch.tensor(0.25))
    assert made.sigma == 0.25
    made.set_timestep(0.125)
    assert made.sigma == 0.125
