"""Embedders with real tables: values, exact positions, one compiled graph, formats."""

import copy

import diffusers
import numpy as np
import pytest
import reference
import torch
from conftest import needs, tiny_transformer
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from reference import rotary_table
from tables import CONFIG, GRID, ORIGIN, assert_table, grid
from tiny import FAMILIES, TEXT, random_tensor
from torch import nn
from torch._dynamo.testing import CompileCounter

from dype import DyPEConfig, apply_dype, embedders
from dype.embedders import DyPEEmbedND, DyPEFluxPosEmbed
from dype.families import FAMILIES as FAMILIES_BY_CLASS
from dype.image_ids import make_grid_ids, parse_image_ids
from dype.patch import dype_applied
from dype.rope import METHODS

STOCK = FluxPosEmbed(10000, [16, 56, 56])


def make_embedder(
    config=None, trained_tokens=64, grid=(1, 1), sigma=1.0, num_text=3, num_reference=0
) -> DyPEFluxPosEmbed:
    """Return an embedder in the state in which the pre-hook leaves it."""
    embedder = DyPEFluxPosEmbed(STOCK, config or DyPEConfig(), trained_tokens)
    embedder.set_grid(*grid)
    embedder.set_token_layout(num_text, num_reference)
    embedder.set_timestep(sigma)
    return embedder


def make_ids(grid, num_text=3, reference_grid=None, dtype=torch.float32):
    """Return the ids of text, image and reference image [S, 3]."""
    ids = [torch.zeros(num_text, 3), make_grid_ids(0, *grid)]
    if reference_grid:
        ids.append(make_grid_ids(1, *reference_grid))
    return torch.cat(ids).to(dtype)


def denoiser_call(ids, sigma=0.5) -> dict:
    """Return the arguments of one call of the tiny transformer, with TEXT text tokens."""
    return {
        "hidden_states": random_tensor((1, len(ids), 16), 0),
        "encoder_hidden_states": random_tensor((1, TEXT, 128), 1),
        "pooled_projections": random_tensor((1, 128), 2),
        "timestep": torch.tensor([sigma]),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }


@pytest.mark.parametrize("method", METHODS)
def test_against_plain_python(method):
    """The table of a non-square image equals tests/reference.py within 1e-6."""
    grid, config = (10, 33), DyPEConfig(method, dype=True)
    ours = make_embedder(config, 8, grid, 0.4)(make_ids(grid))
    theirs = reference.flux_table(method, grid, 3, 0.4, trained_tokens=8, lambda_s=config.lambda_s)
    np.testing.assert_allclose(torch.stack(ours), np.array(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_fast_path_equals_slow_path(method):
    """The table by broadcast equals the table from ids, bit for bit, references included."""
    embedder = make_embedder(DyPEConfig(method), 16, (24, 32), 0.7, 5, 170)
    ids = make_ids((24, 32), 5, (10, 17))
    fast = torch.stack(embedder(ids))
    embedder.set_grid(24, 32)  # forgets the token layout, so that the ids are looked up
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    slow = torch.stack(embedder(ids[order]))
    assert torch.equal(fast[:, order], slow)


def test_no_stretch_is_stock():
    for size in ((16, 16), (10, 16)):
        ids = make_ids(size, 5, (20, 15))
        for method in METHODS:
            ours = make_embedder(DyPEConfig(method), 16, size, 0.5, 5, 300)(ids)
            assert all(torch.equal(a, b) for a, b in zip(ours, STOCK(ids), strict=True))


def test_references_keep_the_stock_encoding():
    """A reference image (kind 1) has stock cos and sin and m = 1; text at the origin has m."""
    ids = make_ids((128, 128), 5, (64, 100))
    cos, sin = make_embedder(grid=(128, 128), num_text=5, num_reference=6400)(ids)
    stock_cos, stock_sin = STOCK(ids)
    assert torch.equal(cos[-6400:], stock_cos[-6400:])
    assert torch.equal(sin[-6400:], stock_sin[-6400:])
    m = 0.1 * np.log(2) + 1
    assert torch.equal(cos[:5, :16], torch.ones(5, 16))
    torch.testing.assert_close(cos[:5, 16:], torch.full((5, 112), m, dtype=torch.float32))


def test_grids_of_equal_token_count():
    """After 2048x4096, the table of 4096x2048 equals that of a new embedder."""
    embedder = make_embedder(grid=(128, 256))
    embedder(make_ids((128, 256)))
    embedder.set_grid(256, 128)
    embedder.set_token_layout(3, 0)
    table = torch.stack(embedder(make_ids((256, 128))))
    assert torch.equal(table, torch.stack(make_embedder(grid=(256, 128))(make_ids((256, 128)))))


def test_calls_share_no_memory():
    embedder = make_embedder(grid=(128, 128))
    first = torch.stack(embedder(make_ids((128, 128))))
    copy_of_first = first.clone()
    embedder(make_ids((128, 128)))[0].zero_()
    assert torch.equal(first, copy_of_first)


def test_rows_beyond_256_in_bfloat16():
    """320 rows have 320 positions, although bfloat16 represents only 289 of them."""
    rounded = make_grid_ids(0, 320, 4).to(torch.bfloat16)
    assert len(rounded[:, 1].unique()) == 289
    exact, grid, num_reference, _ = parse_image_ids(rounded)
    assert (grid, num_reference) == ((320, 4), 0)
    assert torch.equal(exact, make_grid_ids(0, 320, 4))
    wide, grid, num_reference, _ = parse_image_ids(make_grid_ids(0, 2, 700).to(torch.bfloat16))
    assert (grid, num_reference) == ((2, 700), 0)
    assert torch.equal(wide, make_grid_ids(0, 2, 700))


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("shift", [(0, 0), (0, 20), (300, 20), (600, 0), (0, 400)])
def test_reference_ids_are_exact_too(kind, shift):
    reference = make_grid_ids(kind, 20, 300) + torch.tensor([0, *shift])
    both = torch.cat([make_grid_ids(0, 300, 20), reference])
    exact, grid, num_reference, _ = parse_image_ids(both.to(torch.bfloat16))
    assert (grid, num_reference) == ((300, 20), 6000)
    assert torch.equal(exact, both)


def test_image_from_another_origin():
    """Its ids stay, and the grid is their extent."""
    ids = make_grid_ids(0, 8, 12) + torch.tensor([0, 4, 2])
    exact, grid, num_reference, _ = parse_image_ids(ids)
    assert torch.equal(exact, ids)
    assert (grid, num_reference) == ((8, 12), None)


def test_ids_that_are_no_grid_stay():
    """Irregular positions are encoded unchanged, token by token."""
    irregular = make_grid_ids(0, 8, 8) * 1.5
    exact, grid, num_reference, _ = parse_image_ids(irregular)
    assert torch.equal(exact, irregular)
    assert (grid, num_reference) == ((12, 12), None)  # rows and columns 0 to 10.5
    embedder = make_embedder(DyPEConfig("base"), 4, (12, 12))
    embedder.set_grid(12, 12)
    cos, sin = embedder(irregular)
    stock_cos, stock_sin = STOCK(irregular)
    assert torch.equal(cos, stock_cos)
    assert torch.equal(sin, stock_sin)


def test_references_of_kind_0():
    """A second grid of kind 0, shifted or not, is a reference image, with the stock encoding."""
    image, reference = make_grid_ids(0, 16, 16), make_grid_ids(0, 8, 8)
    for shift in ([0, 0, 0], [0, 0, 16], [0, 0, -8], [0, 16, 16]):
        for second in (reference, make_grid_ids(0, 16, 16)):
            ids = torch.cat([image, second + torch.tensor(shift)])
            exact, grid, num_reference, has_distinct_kinds = parse_image_ids(ids)
            assert (grid, num_reference, has_distinct_kinds) == ((16, 16), len(second), False)
            assert torch.equal(exact, ids)
    call = denoiser_call(torch.cat([image, reference]))
    transformer, tables = tiny_transformer(), []
    stock = transformer.pos_embed(call["img_ids"])
    apply_dype(transformer, CONFIG)
    transformer.pos_embed.register_forward_hook(lambda m, args, output: tables.append(output))
    transformer(**call)
    for ours, stock_table in zip(tables[0], stock, strict=True):
        assert torch.equal(ours[-64:], stock_table[-64:])
        assert not torch.equal(ours[TEXT:-64], stock_table[:-64])
    transformer._parallel_config = "a shard does not tell a reference from the image"
    with pytest.raises(ValueError, match="a reference image has kind 0"):
        transformer(**call)


@pytest.mark.parametrize("order", ["columns first", "from the end", "with gaps"])
def test_order_of_tokens(order):
    """The grid of tokens in another order is their extent, and every token has its position."""
    ids = make_grid_ids(0, 8, 12)
    indices = {
        "columns first": torch.arange(96).view(8, 12).t().flatten(),
        "from the end": torch.arange(96).flip(0),
        "with gaps": torch.cat([torch.arange(0, 40), torch.arange(43, 96)]),
    }[order]
    row_major, transformer = [], tiny_transformer()
    apply_dype(transformer, CONFIG)
    transformer.pos_embed.register_forward_hook(lambda m, args, output: row_major.append(output[0]))
    transformer(**denoiser_call(ids))
    transformer(**denoiser_call(ids[indices]))
    assert transformer.pos_embed.grid == (8, 12)
    assert torch.equal(row_major[1][TEXT:], row_major[0][TEXT:][indices])


def test_ids_without_a_generated_image():
    """VisualCloze counts its kinds from 1: refused in a sentence, never ignored."""
    ids = torch.cat([make_grid_ids(kind, 8, 12) for kind in (1, 2)])
    transformer = tiny_transformer()
    apply_dype(transformer, CONFIG)
    with pytest.raises(ValueError, match="kinds in img_ids are 1, 2, expected 0"):
        transformer(**denoiser_call(ids))


class AppleTensor(torch.Tensor):
    """Tensor that says it is on an Apple GPU, and refuses float64 as torch 2.13 does there."""

    @staticmethod
    def __new__(cls, values):
        shape, dtype = values.shape, values.dtype
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="meta")

    def __init__(self, values):
        self.values = values

    @property
    def device(self):
        return torch.device("mps:0")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__
        casts_to_float64 = name == "_to_copy" and kwargs.get("dtype") == torch.float64
        if casts_to_float64 or (name == "copy_" and args[0].dtype == torch.float64):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        is_on_cpu = name == "_to_copy" and str(kwargs.pop("device", "")) == "cpu"
        out = function(*[x.values if isinstance(x, cls) else x for x in args], **kwargs)
        return out if is_on_cpu else cls(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_without_float64(dtype):
    """The values move to the CPU first, where they become float64, in every family."""
    time = AppleTensor(torch.tensor([0.75], dtype=dtype))
    with pytest.raises(TypeError, match="float64"):
        time.double()
    with pytest.raises(TypeError, match="float64"):
        time.to("cpu", torch.float64)
    assert embedders.to_float64(time).equal(torch.tensor([0.75], dtype=torch.float64))
    for family in set(FAMILIES_BY_CLASS.values()):
        embedder = DyPEFluxPosEmbed(STOCK, CONFIG, 64)
        embedder.family = family
        embedder.set_timestep_from({family.timestep_arg: time})
        assert embedder.sigma.dtype == torch.float64
        assert embedder.sigma == float(family.to_sigma(torch.tensor(0.75, dtype=torch.float64)))


def test_a_device_is_asked_for_float64(monkeypatch):
    """A try decides, whatever the device's name and whatever error it raises."""
    assert embedders.float64_device("cpu") == torch.device("cpu")
    embedders.try_float64.cache_clear()
    for error in (TypeError, RuntimeError, NotImplementedError, AssertionError):

        def refuse(*args, dtype, device, error=error):
            raise error(f"{device} has no {dtype}")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "ones", refuse)
            assert embedders.float64_device("xpu:1") == torch.device("cpu")
        embedders.try_float64.cache_clear()


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="the graph breaks in the embedder")
def test_one_graph_for_all_sigmas():
    """torch.compile(fullgraph=True) compiles once for all sigmas."""
    counter = CompileCounter()
    embedder = make_embedder(grid=(8, 12), trained_tokens=4)
    compiled = torch.compile(embedder, fullgraph=True, backend=counter)
    ids = make_ids((8, 12))
    for sigma in (1.0, 0.7, torch.tensor(0.3), torch.tensor(0.1, dtype=torch.bfloat16), 0.0):
        embedder.set_timestep(sigma)
        ours, expected = compiled(ids), embedder(ids)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert counter.frame_count == 1


def test_no_state_of_tensors():
    embedder = make_embedder()
    assert not list(embedder.parameters())
    assert not list(embedder.buffers())
    assert not embedder.state_dict()
    assert not list(embedder.children())


def test_a_deep_copy_has_its_own_sigma():
    embedder = make_embedder(sigma=0.5)
    duplicate = copy.deepcopy(embedder)
    duplicate.set_timestep(0.1)
    assert embedder.sigma == 0.5
    assert duplicate.sigma == 0.1


def test_sigma_after_inference_mode():
    with torch.inference_mode():
        embedder = make_embedder()
        embedder.set_timestep(torch.tensor(0.5))
    embedder.set_timestep(torch.tensor(0.25))
    assert embedder.sigma == 0.25
    embedder.set_timestep(0.125)
    assert embedder.sigma == 0.125


def test_flux2_references_and_ties():
    """References keep the stock encoding, also with as many text tokens as image tokens."""
    transformer = FAMILIES["flux2"][0]().transformer
    apply_dype(transformer, CONFIG)
    tables = []
    transformer.pos_embed.register_forward_hook(lambda m, args, output: tables.append(output))
    for num_text in (96, 120):  # the image has 96 tokens, 120 with the reference
        image_ids = nn.functional.pad(make_grid_ids(0, *GRID), (0, 1)).long()
        reference_ids = nn.functional.pad(make_grid_ids(10, 4, 6), (0, 1)).long()
        ids = torch.cat([image_ids, reference_ids])
        text_ids = torch.zeros(num_text, 4, dtype=torch.long)
        text_ids[:, 3] = torch.arange(num_text)
        tables.clear()
        transformer(
            hidden_states=random_tensor((1, 120, 16), 0),
            encoder_hidden_states=random_tensor((1, num_text, TEXT), 1),
            timestep=torch.tensor([0.5]),
            img_ids=ids[None],
            txt_ids=text_ids[None],
        )
        for call_ids, is_target, (cos, sin) in (
            (ids, [True] * 96 + [False] * 24, tables[0]),
            (text_ids, None, tables[1]),
        ):
            positions = [tuple(row) for row in call_ids.tolist()]
            expected = rotary_table(
                "yarn",
                (4, 4, 4, 4),
                2000.0,
                positions,
                GRID,
                0.5,
                trained_tokens=4,
                lambda_s=1,
                is_target=is_target,
            )
            assert_table(torch.complex(cos, sin)[:, ::2], expected)


@pytest.mark.parametrize("name", ["BriaTransformer2DModel", "BriaFiboTransformer2DModel"])
def test_bria_timesteps_are_thousandths(name, tables):
    """Bria has FLUX's format, with timesteps up to 1000."""
    needs(name)
    torch.manual_seed(0)
    is_fibo = name == "BriaFiboTransformer2DModel"
    transformer = getattr(diffusers, name)(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=TEXT, axes_dims_rope=[4, 6, 6],
        **({"text_encoder_dim": TEXT} if is_fibo else {}),
    ).eval()  # fmt: skip
    apply_dype(transformer, CONFIG)
    layers = {"text_encoder_layers": [random_tensor((1, TEXT, TEXT), n) for n in range(2)]}
    transformer(
        hidden_states=random_tensor((1, 96, 16), 0),
        encoder_hidden_states=random_tensor((1, TEXT, TEXT), 1),
        timestep=torch.tensor([500.0]),
        img_ids=make_grid_ids(0, *GRID),
        txt_ids=torch.zeros(TEXT, 3),
        **(layers if is_fibo else {}),
    )
    (sigma, table), *_ = tables
    assert sigma == 0.5
    positions = ORIGIN + grid(0)
    assert_table(
        table,
        rotary_table(
            "yarn", (4, 6, 6), 10000.0, positions, GRID, 0.5, trained_tokens=4, lambda_s=1
        ),
    )


@pytest.mark.parametrize("axes", [(4, 4, 8), (8, 6, 2), (4, 2, 2), (12, 4, 0)])
@pytest.mark.parametrize("method", METHODS)
def test_axes_of_any_length(axes, method):
    """Rows and columns may have different numbers of dimensions, two, or none."""
    config = DyPEConfig(method, dype=True)
    embedder = DyPEFluxPosEmbed(FluxPosEmbed(10000, axes), config, 4)
    embedder.set_grid(*GRID)
    embedder.set_token_layout(TEXT, 0)
    embedder.set_timestep(0.4)
    positions = ORIGIN + grid(0)
    cos, sin = embedder(torch.tensor(positions, dtype=torch.float32))
    expected = rotary_table(
        method, axes, 10000.0, positions, GRID, 0.4, trained_tokens=4, lambda_s=config.lambda_s
    )
    assert_table(torch.complex(cos, sin)[:, ::2], expected)


def test_nunchaku_has_another_format():
    """Its transformer derives from diffusers' class; its embedder returns one packed tensor."""
    cls = type("NunchakuFluxTransformer2DModelV2", (diffusers.FluxTransformer2DModel,), {})
    transformer = tiny_transformer()
    transformer.__class__, stock = cls, transformer.pos_embed
    transformer.pos_embed = PackedPosEmbed()
    with pytest.raises(TypeError, match="its PackedPosEmbed returns a table of another format"):
        apply_dype(transformer)
    assert isinstance(transformer.pos_embed, PackedPosEmbed)
    transformer.pos_embed = stock
    apply_dype(transformer)  # a subclass with diffusers' own embedder is as good as diffusers'


def test_a_call_without_values():
    """On the "meta" device, where programs ask for shapes, a call gives shapes."""
    transformer = tiny_transformer().to("meta")
    apply_dype(transformer, CONFIG)
    call = denoiser_call(make_grid_ids(0, 8, 12))
    (output,) = transformer(**{k: v.to("meta") for k, v in call.items()}, return_dict=False)
    assert output.shape == (1, 96, 16)


def test_embedder_of_another_kind():
    transformer = tiny_transformer()
    transformer.pos_embed = nn.Identity()
    with pytest.raises(TypeError, match="its Identity has no theta, expected the original rotary"):
        apply_dype(transformer)


class PackedPosEmbed(nn.Module):
    """Embedder with the format of Nunchaku's: sin and cos in one tensor [1, 1, S, D / 2, 1, 2]."""

    theta, axes_dim = 10000, (4, 6, 6)

    def forward(self, ids):
        return torch.zeros(1, 1, len(ids), 8, 1, 2)


class EmbedND(nn.Module):
    """Equivalent of Black Forest Labs' embedder, for a tiny `Flux`."""

    def __init__(self, theta, axes_dim):
        super().__init__()
        self.theta, self.axes_dim = theta, axes_dim

    def forward(self, ids):
        tables = []
        for axis, dim in enumerate(self.axes_dim):
            steps = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            angle = ids[..., axis, None].double() * (1.0 / self.theta**steps)
            entries = [angle.cos(), -angle.sin(), angle.sin(), angle.cos()]
            tables.append(torch.stack(entries, -1).unflatten(-1, (2, 2)))
        return torch.cat(tables, -3).float()[:, None]


class Flux(nn.Module):
    """Transformer with the name, arguments and embedder of the original; returns the table."""

    def __init__(self):
        super().__init__()
        self.pe_embedder = EmbedND(10000, (4, 6, 6))

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y=None, guidance=None):
        return self.pe_embedder(torch.cat([txt_ids, img_ids], 1))


def test_rotation_matrices():
    """DyPE works in a host's loop with BFL's classes; an exception restores the embedder."""
    model, ids = Flux(), make_grid_ids(0, *GRID).repeat(2, 1, 1)
    stock = model.pe_embedder
    text_ids = torch.zeros(2, TEXT, 3)
    call = (None, ids, None, text_ids)
    before = model(*call, torch.tensor([0.5, 0.5]))
    with dype_applied(model, CONFIG):
        assert isinstance(model.pe_embedder, DyPEEmbedND)
        table = model(*call, torch.tensor([0.5, 0.5]))
        model.pe_embedder.set_timestep(0.25)
        model.pe_embedder.set_grid(*GRID)
        direct_table = model.pe_embedder(torch.cat([text_ids, ids], 1))
        assert torch.equal(direct_table, model(*call, torch.tensor([0.25, 0.25])))
    assert table.shape == before.shape == (2, 1, TEXT + 96, 8, 2, 2)
    cos, sin = table[1, 0, :, :, 0, 0], table[1, 0, :, :, 1, 0]
    assert torch.equal(table[0, 0, :, :, 1, 1], cos)
    assert torch.equal(table[0, 0, :, :, 0, 1], -sin)
    positions = ORIGIN + grid(0)
    assert_table(
        torch.complex(cos, sin),
        rotary_table(
            "yarn", (4, 6, 6), 10000.0, positions, GRID, 0.5, trained_tokens=4, lambda_s=1
        ),
    )
    with dype_applied(model, DyPEConfig(base_resolution=192)):
        assert torch.equal(model(*call, torch.tensor([0.5, 0.5])), before)
    with pytest.raises(KeyError), dype_applied(model, CONFIG):
        raise KeyError
    assert model.pe_embedder is stock
    model.pe_embedder = PackedPosEmbed()
    with pytest.raises(TypeError, match="its PackedPosEmbed returns a table of another format"):
        apply_dype(model, CONFIG)
    model.pe_embedder = stock
    assert not model._forward_pre_hooks
