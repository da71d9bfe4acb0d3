"""Copies of the text: the same as a bias on its logits, in every family that can have them."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_transformer
from test_sega import denoiser_call
from tiny import FAMILIES, random_tensor

from dype import DyPEConfig, apply_dype
from dype.image_ids import make_grid_ids

REPEATING = [name for name in FAMILIES if name != "z-image"]


@pytest.mark.parametrize("method", ["base", "yarn"])
@pytest.mark.parametrize("copies", [4, "auto"])
def test_copies_are_a_bias(method, copies):
    """`text_repeat` k equals ln k on the logits of the text; auto is k = s_h s_w."""
    transformer, call = tiny_transformer().double(), denoiser_call((8, 12))
    call = {name: value.double() for name, value in call.items()}
    config = DyPEConfig(method, base_resolution=64, shift="model")
    apply_dype(transformer, config)
    bias = torch.zeros(1, 1, 1, 8 + 96, dtype=torch.float64)
    bias[..., :8] = math.log(4 if copies == 4 else 6)  # 8 x 12 tokens, of 4 x 4
    with torch.no_grad():
        plain = transformer(**call).sample
        expected = transformer(**call, joint_attention_kwargs={"attention_mask": bias}).sample
        config = DyPEConfig(method, base_resolution=64, shift="model", text_repeat=copies)
        apply_dype(transformer, config)
        ours = transformer(**call).sample
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
        assert (plain - expected).abs().max() > 1e-3
        with pytest.raises(ValueError, match="attention_mask, expected none with text_repeat"):
            transformer(**call, joint_attention_kwargs={"attention_mask": bias})


@pytest.mark.parametrize("family", REPEATING)
def test_every_family(family, monkeypatch):
    """An image with copies is that with ln k added to the logits of the text, in all attention."""
    build, generate = FAMILIES[family]
    pipe, attend, biased = build(), F.scaled_dot_product_attention, []
    image_tokens = 4 * 6

    def attend_with_bias(query, key, value, attn_mask=None, **options):
        num_text = key.shape[-2] - image_tokens
        if num_text > 0 and query.shape[-2] == key.shape[-2] and num_text % 8 == 0:
            bias = torch.zeros(1, 1, 1, key.shape[-2])
            bias[..., :num_text] = math.log(6)
            if attn_mask is not None:
                is_bool = attn_mask.dtype == torch.bool
                bias = torch.where(attn_mask, bias, -math.inf) if is_bool else bias + attn_mask
            attn_mask, _ = bias, biased.append(num_text)
        return attend(query, key, value, attn_mask, **options)

    settings = {"base_resolution": 32, "shift": "model"}
    apply_dype(pipe, DyPEConfig(**settings, text_repeat="auto"))
    ours = generate(pipe, 64, 96, steps=2)
    apply_dype(pipe, DyPEConfig(**settings))
    plain = generate(pipe, 64, 96, steps=2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_with_bias)
    expected = generate(pipe, 64, 96, steps=2)
    assert biased
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (ours - plain).abs().max() > 1e-4


def test_z_image_is_refused():
    """Its padding tokens cannot be copied from outside."""
    build, _ = FAMILIES["z-image"]
    with pytest.raises(ValueError, match="text_repeat is 4, but this model adds to its text"):
        apply_dype(build(), DyPEConfig(text_repeat=4))


MASKED = torch.ones(2, 8, dtype=torch.bool)
MASKED[1, 5:] = False
IDS = {"img_ids": make_grid_ids(0, 8, 12), "txt_ids": torch.zeros(8, 3)}
MASKED_CALLS = {  # name -> transformer, the arguments with the mask, those with positions
    "chroma": (
        lambda: FAMILIES["chroma"][0]().transformer,
        {"attention_mask": torch.cat([MASKED, torch.ones(2, 96, dtype=torch.bool)], 1)},
        IDS,
    ),
    "krea2": (
        lambda: FAMILIES["krea2"][0]().transformer,
        {"encoder_attention_mask": MASKED},
        {"position_ids": torch.cat([IDS["txt_ids"], IDS["img_ids"]])},
    ),
    "qwen-image": (
        lambda: FAMILIES["qwen-image"][0]().transformer,
        {"encoder_hidden_states_mask": MASKED},
        {"img_shapes": [[(1, 8, 12)]] * 2},
    ),
}


@pytest.mark.parametrize("family", MASKED_CALLS)
def test_masks_are_copied(family):
    """Masked text has no effect, in copies too: the second sample has five tokens."""
    build, mask, positions = MASKED_CALLS[family]
    transformer, images = build(), []
    apply_dype(transformer, DyPEConfig(base_resolution=64, shift="model", text_repeat=4))
    shape = (2, 8, 2, 16) if family == "krea2" else (2, 8, 16)
    call = {
        "hidden_states": random_tensor((2, 96, 16), 0),
        "timestep": torch.tensor([0.5, 0.5]),
        **mask,
        **positions,
    }
    for seed in (1, 2):
        text = random_tensor(shape, 1)
        text[1, 5:] = random_tensor(shape, seed)[1, 5:]
        with torch.no_grad():
            images.append(transformer(**call, encoder_hidden_states=text).sample)
    torch.testing.assert_close(*images, atol=1e-6, rtol=0)


def test_no_copies_without_a_stretch():
    transformer, call = tiny_transformer(), denoiser_call((4, 4))
    with torch.no_grad():
        stock = transformer(**call).sample
        apply_dype(transformer, DyPEConfig(base_resolution=64, shift="model", text_repeat=4))
        assert torch.equal(transformer(**call).sample, stock)
