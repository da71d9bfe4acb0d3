"""Embedders with real tables: fast against slow, exact positions, one compiled graph, formats."""

import copy

import diffusers
import numpy as np
import pytest
import reference
import torch
from conftest import needs
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from reference import turns
from tables import CONFIG, GRID, ORIGIN, assert_table, grid
from tiny import FAMILIES, TEXT, seeded
from torch import nn
from torch._dynamo.testing import CompileCounter

from dype import DyPEConfig, apply_dype
from dype.embedders import DyPEEmbedND, DyPEFluxPosEmbed, make_grid_ids, parse_image_ids
from dype.patch import dype_applied
from dype.rope import METHODS

STOCK = FluxPosEmbed(10000, [16, 56, 56])


def embedder(config=None, trained=64, grid=(1, 1), sigma=1.0, text=3, after=0) -> DyPEFluxPosEmbed:
    """As the hook leaves it, for ids of so many tokens before and after the grid."""
    made = DyPEFluxPosEmbed(STOCK, config or DyPEConfig(), trained)
    made.set_grid(*grid)
    made.set_token_layout(text, after)
    made.set_timestep(sigma)
    return made


def ids_of(grid, text=3, reference_grid=None, dtype=torch.float32):
    parts = [torch.zeros(text, 3), make_grid_ids(0, *grid)]
    if reference_grid:
        parts.append(make_grid_ids(1, *reference_grid))
    return torch.cat(parts).to(dtype)


@pytest.mark.parametrize("method", METHODS)
def test_against_plain_python(method):
    """The whole table of a non-square image: 1e-6."""
    grid, config = (10, 33), DyPEConfig(method)
    ours = embedder(config, 8, grid, 0.4)(ids_of(grid))
    theirs = reference.flux_table(method, grid, 3, 0.4, length=8, lambda_s=config.lambda_s)
    np.testing.assert_allclose(torch.stack(ours), np.array(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_fast_path_equals_slow_path(method):
    """Broadcasting rows and columns gives the bits of token by token, references included."""
    made = embedder(DyPEConfig(method), 16, (24, 32), 0.7, 5, 170)
    ids = ids_of((24, 32), 5, (10, 17))
    fast = torch.stack(made(ids))
    made.set_grid(24, 32)  # which knows nothing of the ids to come
    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    slow = torch.stack(made(ids[shuffled]))
    assert torch.equal(fast[:, shuffled], slow)


def test_unstretched_is_stock():
    for size in ((16, 16), (10, 16)):
        ids = ids_of(size, 5, (20, 15))
        for method in METHODS:
            ours = embedder(DyPEConfig(method), 16, size, 0.5, 5, 300)(ids)
            assert all(torch.equal(a, b) for a, b in zip(ours, STOCK(ids), strict=True))


def test_references_keep_the_stock_encoding():
    """Kontext's image (kind 1): stock cos and sin, m = 1; text at the origin carries m."""
    ids = ids_of((128, 128), 5, (64, 100))
    cos, sin = embedder(grid=(128, 128), text=5, after=6400)(ids)
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
    made.set_token_layout(3, 0)
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
    given = make_grid_ids(0, 320, 4).to(torch.bfloat16)
    assert len(given[:, 1].unique()) == 289
    exact, grid, after = parse_image_ids(given)
    assert (grid, after) == ((320, 4), 0)
    assert torch.equal(exact, make_grid_ids(0, 320, 4))
    wide, grid, after = parse_image_ids(make_grid_ids(0, 2, 700).to(torch.bfloat16))
    assert (grid, after) == ((2, 700), 0)
    assert torch.equal(wide, make_grid_ids(0, 2, 700))


def test_references_are_counted_again_too():
    both = torch.cat([make_grid_ids(0, 300, 20), make_grid_ids(1, 20, 300)])
    exact, grid, after = parse_image_ids(both.to(torch.bfloat16))
    assert (grid, after) == ((300, 20), 6000)
    assert torch.equal(exact, both)


def test_ids_that_are_no_grid_stay():
    """Positions of one's own are taken as they stand, token by token."""
    odd = make_grid_ids(0, 8, 8) * 1.5
    exact, grid, after = parse_image_ids(odd)
    assert torch.equal(exact, odd)
    assert (grid, after) == ((8, 8), None)
    made = embedder(DyPEConfig("base"), 4, (8, 8))
    made.set_grid(8, 8)
    cos, sin = made(odd)
    stock_cos, stock_sin = STOCK(odd)
    assert torch.equal(cos, stock_cos)
    assert torch.equal(sin, stock_sin)


def test_one_graph_for_all_noise_levels():
    """torch.compile(fullgraph=True) compiles once; shape and device stay, sigma is data."""
    counter = CompileCounter()
    made = embedder(grid=(8, 12), trained=4)
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


def test_flux2_references_and_ties():
    """References keep the stock encoding; as many text tokens as image tokens are still text."""
    transformer = FAMILIES["flux2"][0]().transformer
    apply_dype(transformer, CONFIG)
    seen = []
    transformer.pos_embed.register_forward_hook(lambda m, args, out: seen.append(out))
    for texts in (96, 120):
        picture = nn.functional.pad(make_grid_ids(0, *GRID), (0, 1)).long()
        reference = nn.functional.pad(make_grid_ids(10, 4, 6), (0, 1)).long()
        ids = torch.cat([picture, reference])
        text = torch.zeros(texts, 4, dtype=torch.long)
        text[:, 3] = torch.arange(texts)
        seen.clear()
        transformer(
            hidden_states=seeded((1, 120, 16), 0),
            encoder_hidden_states=seeded((1, texts, TEXT), 1),
            timestep=torch.tensor([0.5]),
            img_ids=ids[None],
            txt_ids=text[None],
        )
        for given, drawn, (cos, sin) in (
            (ids, [True] * 96 + [False] * 24, seen[0]),
            (text, None, seen[1]),
        ):
            positions = [tuple(row) for row in given.tolist()]
            expected = turns(
                "yarn",
                (4, 4, 4, 4),
                2000.0,
                positions,
                GRID,
                0.5,
                length=4,
                lambda_s=1,
                drawn=drawn,
            )
            assert_table(torch.complex(cos, sin)[:, ::2], expected)


@pytest.mark.parametrize("name", ["BriaTransformer2DModel", "BriaFiboTransformer2DModel"])
def test_bria_counts_time_to_a_thousand(name, tables):
    """FLUX's format at the timesteps themselves."""
    needs(name)
    torch.manual_seed(0)
    more = {"text_encoder_dim": TEXT} if name == "BriaFiboTransformer2DModel" else {}
    transformer = getattr(diffusers, name)(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=TEXT, axes_dims_rope=[4, 6, 6], **more,
    ).eval()  # fmt: skip
    apply_dype(transformer, CONFIG)
    if more:
        more = {"text_encoder_layers": [seeded((1, TEXT, TEXT), n) for n in range(2)]}
    transformer(
        hidden_states=seeded((1, 96, 16), 0),
        encoder_hidden_states=seeded((1, TEXT, TEXT), 1),
        timestep=torch.tensor([500.0]),
        img_ids=make_grid_ids(0, *GRID),
        txt_ids=torch.zeros(TEXT, 3),
        **more,
    )
    (sigma, table), *_ = tables
    assert sigma == 0.5
    places = ORIGIN + grid(0)
    assert_table(table, turns("yarn", (4, 6, 6), 10000.0, places, GRID, 0.5, length=4, lambda_s=1))


class EmbedND(nn.Module):
    """The published format of Black Forest Labs' embedder, for a tiny `Flux`."""

    def __init__(self, theta, axes_dim):
        super().__init__()
        self.theta, self.axes_dim = theta, axes_dim

    def forward(self, ids):
        parts = []
        for axis, dim in enumerate(self.axes_dim):
            steps = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            angle = ids[..., axis, None].double() * (1.0 / self.theta**steps)
            parts.append(
                torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(
                    -1, (2, 2)
                )
            )
        return torch.cat(parts, -3).float()[:, None]


class Flux(nn.Module):
    """A stand-in with the original's name, arguments and embedder; it returns the table."""

    def __init__(self):
        super().__init__()
        self.pe_embedder = EmbedND(10000, (4, 6, 6))

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y=None, guidance=None):
        return self.pe_embedder(torch.cat([txt_ids, img_ids], 1))


def test_rotation_matrices():
    """A host's own loop with BFL's classes, and its embedder back after an exception."""
    model, ids = Flux(), make_grid_ids(0, *GRID).repeat(2, 1, 1)
    stock = model.pe_embedder
    texts = torch.zeros(2, TEXT, 3)
    call = (None, ids, None, texts)
    before = model(*call, torch.tensor([0.5, 0.5]))
    with dype_applied(model, CONFIG):
        assert isinstance(model.pe_embedder, DyPEEmbedND)
        table = model(*call, torch.tensor([0.5, 0.5]))
        model.pe_embedder.set_timestep(0.25)
        model.pe_embedder.set_grid(*GRID)
        by_hand = model.pe_embedder(torch.cat([texts, ids], 1))
        assert torch.equal(by_hand, model(*call, torch.tensor([0.25, 0.25])))
    assert table.shape == before.shape == (2, 1, TEXT + 96, 8, 2, 2)
    cos, sin = table[1, 0, :, :, 0, 0], table[1, 0, :, :, 1, 0]
    assert torch.equal(table[0, 0, :, :, 1, 1], cos)
    assert torch.equal(table[0, 0, :, :, 0, 1], -sin)
    places = ORIGIN + grid(0)
    assert_table(
        torch.complex(cos, sin),
        turns("yarn", (4, 6, 6), 10000.0, places, GRID, 0.5, length=4, lambda_s=1),
    )
    with dype_applied(model, DyPEConfig(base_resolution=192)):
        assert torch.equal(model(*call, torch.tensor([0.5, 0.5])), before)
    with pytest.raises(KeyError), dype_applied(model, CONFIG):
        raise KeyError
    assert model.pe_embedder is stock
    assert not model._forward_pre_hooks
