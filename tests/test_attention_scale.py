"""The attention scale `proportional`: the same as a factor on all logits, in every family."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_transformer
from test_sega import denoiser_call
from tiny import FAMILIES

from dype import DyPEConfig, apply_dype
from dype.rope import proportional_scale

GRID = (8, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, monkeypatch):
    """An image is that with logits times sqrt(ln N / ln N0); N counts all keys of the attention."""
    build, generate = FAMILIES[family]
    pipe, attend, lengths, factor = build(), F.scaled_dot_product_attention, [], 1.0

    def attend_with_factor(query, key, value, attn_mask=None, **options):
        lengths.append(key.shape[-2])
        # Krea 2 attends to the text alone without positions
        is_rotated = family != "krea2" or key.shape[-2] == max(lengths)
        return attend(query * factor if is_rotated else query, key, value, attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_with_factor)
    settings = {"base_resolution": 32, "shift": "model", "dype_scale": 0.0}  # stock frequencies
    apply_dype(pipe, DyPEConfig("pi", **settings))
    plain = generate(pipe, 128, 192, steps=2)
    num_text = max(lengths) - math.prod(GRID)
    assert num_text > 0
    factor = math.sqrt(math.log(max(lengths)) / math.log(2 * 2 + num_text))
    expected = generate(pipe, 128, 192, steps=2)
    factor = 1.0
    apply_dype(pipe, DyPEConfig("pi", **settings, attention_path="proportional"))
    ours = generate(pipe, 128, 192, steps=2)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


def test_copies_of_the_text_count():
    """In N all of them, in N0 one; `set_token_layout` counts them as the hook does."""
    transformer, config = tiny_transformer(), DyPEConfig(
        "pi", base_resolution=64, shift="model", attention_path="proportional", text_repeat=3
    )  # fmt: skip
    apply_dype(transformer, config)
    embedder = transformer.pos_embed
    embedder.prepare_call(transformer, denoiser_call(GRID))
    expected = proportional_scale(96 + 3 * 8, 4 * 4 + 8)
    norms = embedder.state.tables[0].norm(dim=0)
    torch.testing.assert_close(norms, torch.full_like(norms, expected))
    embedder.set_grid(*GRID)
    embedder.set_token_layout(8, 0)
    norms = torch.stack(embedder(denoiser_call(GRID)["txt_ids"])).norm(dim=0)
    expected = proportional_scale(96 + 8, 4 * 4 + 8)
    torch.testing.assert_close(norms, torch.full_like(norms, expected))
