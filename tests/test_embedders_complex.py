"""Embedders with complex tables, Qwen-Image's and Z-Image's, against tests/reference.py."""

import diffusers
import pytest
import torch
from conftest import needs
from diffusers import FlowMatchEulerDiscreteScheduler
from reference import rotary_table
from tables import CAPTION, CONFIG, GRID, assert_table, grid
from tiny import (
    FAMILIES,
    HEADS,
    TEXT,
    generate_zimage,
    qwen_transformer,
    random_tensor,
    zimage_transformer,
)
from torch import nn

from dype import DyPEConfig, apply_dype
from dype.embedders_complex import DyPEQwenEmbedRope, DyPEZImageRopeEmbedder, pad_to_32
from dype.image_ids import make_grid_ids
from dype.rope import axis_frequencies, stock_frequencies


def test_z_image_beyond_its_table(tables):
    """With 36 rows and a table of 32 stock raises; `base` and `yarn` are exact."""
    pipe = FAMILIES["z-image"][0]()
    with pytest.raises(IndexError):
        generate_zimage(pipe, 576, 64, steps=1)
    for method in ("base", "yarn"):
        apply_dype(pipe, DyPEConfig(method, base_resolution=256))
        tables.clear()
        generate_zimage(pipe, 576, 64, steps=1)
        positions = [(CAPTION + 1, r, c) for r in range(36) for c in range(4)]
        sigma, table = tables[0]
        expected = rotary_table(
            method, (4, 6, 6), 256.0, positions, (36, 4), sigma, trained_tokens=16, lambda_s=1
        )
        error = (table[: len(expected)] - torch.tensor(expected)).abs().max()
        assert error < (2e-5 if method == "base" else 1e-6)  # `base` has stock's float32 angles


def test_z_image_with_images_of_two_sizes(tables):
    """Each image, its padding and its caption follow their own grid, at equal lengths too."""
    transformer = zimage_transformer()
    apply_dype(transformer, CONFIG)
    sizes = [(6, 10), (12, 4)]
    for captions in ((10, 40), (32, 96)):  # the second has as many ids as the images, 128
        tables.clear()
        transformer(
            [random_tensor((4, 1, 2 * h, 2 * w), 0) for h, w in sizes],
            torch.full((2,), 0.25),
            [random_tensor((n, TEXT), 1) for n in captions],
        )
        lengths = [pad_to_32(n) for n in captions]
        image_call, caption_call = [], []
        for size, length, caption in zip(sizes, lengths, captions, strict=True):
            tokens = [(length + 1, r, c) for r in range(size[0]) for c in range(size[1])]
            image_call.append(tokens + [(0, 0, 0)] * (pad_to_32(len(tokens)) - len(tokens)))
            # diffusers appends the padding to the padded length and cuts it off again
            tokens = [(1 + i, 0, 0) for i in range(length)]
            caption_call.append(tokens + [(0, 0, 0)] * (length - caption))
        for (sigma, table), call in zip(tables, (image_call, caption_call), strict=True):
            assert sigma == 0.75
            expected = [
                row
                for size, positions in zip(sizes, call, strict=True)
                for row in rotary_table(
                    "yarn", (4, 6, 6), 256.0, positions, size, 0.75, trained_tokens=4, lambda_s=1
                )
            ]
            assert_table(table, expected)


def z_image_ids(sizes, captions) -> torch.Tensor:
    """Return the ids with which diffusers calls the embedder for these images, int [S, 3]."""
    image_ids = []
    for (height, width), caption in zip(sizes, captions, strict=True):
        ids = make_grid_ids(pad_to_32(caption) + 1, height, width).int()
        image_ids.append(nn.functional.pad(ids, (0, 0, 0, pad_to_32(len(ids)) - len(ids))))
    return torch.cat(image_ids)


def test_z_image_in_a_host_loop():
    """A host's loop may call set_grid itself; without caption lengths the error says so."""
    transformer = zimage_transformer()
    apply_dype(transformer, CONFIG)
    embedder, sizes = transformer.rope_embedder, [(6, 10), (12, 4)]
    embedder.set_timestep(0.75)
    embedder.set_grid(sizes, captions=[10, 40])
    ids = torch.zeros(128, 3, dtype=torch.int32)
    ids[64, 1] = 11
    table = embedder(ids)
    f, m = embedder.frequencies((12, 4), ids.device)
    assert torch.allclose(table[64, 2:5], torch.polar(m[0].expand(3), 11 * f[0]).to(table))
    embedder.set_grid(sizes)
    with pytest.raises(ValueError, match="expected set_grid"):
        embedder(ids)


@pytest.mark.parametrize("sizes", [[(8, 8)], [(6, 10), (12, 4)], [(2, 3), (9, 9), (2, 3)]])
@pytest.mark.parametrize("base", [64, 96, 1024])
def test_z_image_broadcast_equals_look_up(sizes, base, monkeypatch):
    """Both tables agree bit for bit, with padding and with several sizes."""
    captions = [10, 40, 70][: len(sizes)]
    transformer = zimage_transformer()
    apply_dype(transformer, DyPEConfig("vision_yarn", base_resolution=base))
    embedder, ids = transformer.rope_embedder, z_image_ids(sizes, captions)
    embedder.set_timestep(0.6)
    embedder.set_grid(sizes, captions=captions, row_major=True)
    table_from_ids = embedder(ids)
    calls, original = [], DyPEZImageRopeEmbedder.table_by_broadcast
    monkeypatch.setattr(
        DyPEZImageRopeEmbedder,
        "table_by_broadcast",
        lambda *args: calls.append(0) or original(*args),
    )
    assert torch.equal(embedder(ids), table_from_ids)
    assert calls or base == 1024  # nothing extrapolates there, so the stock embedder may answer


def test_z_image_padding_and_long_captions(tables):
    """Padding is at the origin; caption positions increase beyond the length of the table."""
    pipe = FAMILIES["z-image"][0]()
    apply_dype(pipe, CONFIG)
    # 35 image tokens are padded to 64, 70 caption tokens to 96
    generate_zimage(pipe, 80, 112, steps=1, tokens=70)
    sigma, table = tables[0]
    expected = rotary_table(
        "yarn", (4, 6, 6), 256.0, [(0, 0, 0)] * 29, (5, 7), sigma, trained_tokens=4, lambda_s=1
    )
    assert_table(table[35:], expected)
    positions = [(1 + i, 0, 0) for i in range(96)]
    expected = rotary_table(
        "yarn", (4, 6, 6), 256.0, positions, (5, 7), sigma, trained_tokens=4, lambda_s=1
    )
    assert_table(tables[1][1][:96], expected)


def test_qwen_references_and_text_keep_the_stock_encoding():
    transformer = qwen_transformer()
    stock = transformer.pos_embed
    shapes = [[(1, *GRID), (1, 6, 40)]]  # text positions start at the larger image's edge
    images, text = stock(shapes, max_txt_seq_len=TEXT)
    apply_dype(transformer, CONFIG)
    transformer.pos_embed.set_timestep(0.5)
    transformer.pos_embed.set_grid(*GRID)
    ours, our_text = transformer.pos_embed(shapes, max_txt_seq_len=TEXT)
    num_target = GRID[0] * GRID[1]
    assert torch.equal(ours[num_target:], images[num_target:])
    assert torch.equal(our_text, text)
    expected = rotary_table(
        "yarn", (4, 6, 6), 10000.0, grid(0, centered=True), GRID, 0.5, trained_tokens=4, lambda_s=1
    )
    assert_table(ours[:num_target], expected)


def test_nucleus_has_qwen_images_format(tables):
    needs("NucleusMoEImageTransformer2DModel")
    torch.manual_seed(0)
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6), moe_enabled=False, **HEADS,
    ).eval()  # fmt: skip
    call = {
        "hidden_states": random_tensor((1, 96, 16), 0),
        "encoder_hidden_states": random_tensor((1, TEXT, TEXT), 1),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, *GRID)],
    }
    _, text = transformer.pos_embed([(1, *GRID)], max_txt_seq_len=TEXT)
    before = transformer(**call).sample
    apply_dype(transformer, DyPEConfig(base_resolution=192))
    assert torch.equal(transformer(**call).sample, before)
    apply_dype(transformer, CONFIG)
    tables.clear()
    transformer(**call)
    (sigma, table), *_ = tables
    assert sigma == 0.5
    positions = grid(0, centered=True)
    assert_table(
        table,
        rotary_table(
            "yarn", (4, 6, 6), 10000.0, positions, GRID, 0.5, trained_tokens=4, lambda_s=1
        ),
    )
    _, ours = transformer.pos_embed([(1, *GRID)], max_txt_seq_len=TEXT)
    assert torch.equal(ours, text)


@pytest.mark.parametrize("steps", [50, 100])
def test_z_image_is_continuous_down_to_the_last_sigma(steps):
    """Frequencies rise to stock without a jump; the authors' jump at t = 0.159 and 0.044."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    sigmas, config = scheduler.sigmas.tolist(), DyPEConfig("yarn")
    tables = [axis_frequencies(48, 256.0, 64, 256, t, config)[0] for t in sigmas]
    ratio = torch.stack(tables) / stock_frequencies(48, 256.0)
    assert ratio.isfinite().all()
    assert (ratio.diff(dim=0) >= -1e-12).all()
    assert torch.equal(ratio[-1], torch.ones(24, dtype=torch.float64))


def test_cached_constants_match_the_grid():
    """An embedder that was used at other sizes equals a new one, bit for bit."""
    config = DyPEConfig("yarn")

    def call_z_image(embedder, side):
        embedder.set_timestep(0.5)
        embedder.set_grid(side, side)
        return embedder(make_grid_ids(3, side, side).int())

    def call_qwen(embedder, frames):
        embedder.set_timestep(0.5)
        embedder.set_grid(9, 7)
        return embedder([[(frames, 9, 7)]], torch.device("cpu"), 4)[0]

    z_stock, qwen_stock = zimage_transformer().rope_embedder, qwen_transformer().pos_embed
    cases = [
        # 36 exceeds the stock table of 32, 48 extrapolates
        (call_z_image, lambda: DyPEZImageRopeEmbedder(z_stock, config, 40), (36, 48, 36)),
        (call_qwen, lambda: DyPEQwenEmbedRope(qwen_stock, config, 4), (1, 2, 1)),
    ]
    for call, make, arguments in cases:
        embedder = make()
        for argument in arguments:
            assert torch.equal(call(embedder, argument), call(make(), argument))
