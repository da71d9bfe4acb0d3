"""apply_dype and remove_dype in real pipelines of tiny size."""

import copy
import os
import pickle

import diffusers
import pytest
import torch
from conftest import Spy, latents, needs, quiet, tiny_components, tiny_transformer
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxMultiControlNetModel,
    FluxPipeline,
    UNet2DModel,
)
from PIL import Image
from torch._dynamo.testing import CompileCounter

from dype import DyPEConfig, apply_dype, embedders, remove_dype
from dype.embedders import DyPEFluxPosEmbed, make_grid_ids, parse_image_ids
from dype.families import base_resolution
from dype.pipelines.catalog import MODELS

CONFIG = DyPEConfig("yarn", base_resolution=64)


def scheduled(pipe) -> list[float]:
    return pipe.scheduler.sigmas[:-1].tolist()


def test_remove_restores_bits(pipe):
    """Latents, configuration, modules and hooks are what they were."""
    before, config = latents(pipe), dict(pipe.scheduler.config)
    names = list(pipe.transformer.state_dict())
    apply_dype(pipe, CONFIG)
    assert list(pipe.transformer.state_dict()) == names
    assert not torch.equal(latents(pipe), before)
    remove_dype(pipe)
    assert torch.equal(latents(pipe), before)
    assert dict(pipe.scheduler.config) == config
    assert not pipe.transformer._forward_pre_hooks
    remove_dype(pipe)  # nothing left to remove


def test_inactive_equals_stock(pipe):
    """At the base resolution and the model's own schedule every method is the stock pipeline."""
    before = latents(pipe)
    for method in ("yarn", "ntk", "vision_yarn"):
        apply_dype(pipe, DyPEConfig(method, base_resolution=256, shift="model"))
        assert torch.equal(latents(pipe), before)


def test_sigmas_of_the_scheduler(pipe):
    """The embedder sees the scheduler's sigmas: at the first step, and in a second run."""
    apply_dype(pipe, CONFIG)
    spy = Spy(pipe.transformer)
    for steps in (4, 3):
        spy.calls.clear()
        latents(pipe, steps=steps)
        assert spy.sigmas == pytest.approx(scheduled(pipe), abs=1e-6)
        assert spy.sigmas[0] == 1
        assert {call[1] for call in spy.calls} == {(16, 12)}


def test_sigmas_at_bfloat16(pipe):
    pipe.to(torch.bfloat16)
    apply_dype(pipe, CONFIG)
    spy = Spy(pipe.transformer)
    latents(pipe, steps=6)
    assert spy.sigmas == pytest.approx(scheduled(pipe), abs=2.5e-3)


def test_sigmas_with_true_cfg(pipe):
    """Two denoiser calls per step, the same noise level in both."""
    apply_dype(pipe, CONFIG)
    spy = Spy(pipe.transformer)
    latents(pipe, negative_prompt="a disk", true_cfg_scale=3.0)
    assert spy.sigmas == pytest.approx([s for s in scheduled(pipe) for _ in (0, 1)], abs=1e-6)


def test_sigmas_in_image_to_image(pipe):
    """strength 0.6 of 5 steps: the last 3 sigmas, the first call included."""
    apply_dype(pipe, CONFIG)
    other = quiet(FluxImg2ImgPipeline.from_pipe(pipe))
    spy = Spy(pipe.transformer)
    image = Image.new("RGB", (192, 256), "teal")
    latents(other, image=image, strength=0.6, steps=5)
    assert spy.sigmas == pytest.approx(scheduled(other)[2:], abs=1e-6)


def test_hook_survives_the_end_of_offloading(pipe, monkeypatch):
    """Pipelines rebuild accelerate's hooks after every call when models are offloaded.

    There is no accelerator here: accelerate's own hook on the CPU stands in for it.
    """
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    def offload():
        remove_hook_from_module(pipe.transformer, recurse=True)
        add_hook_to_module(pipe.transformer, ModelHook())

    offload()
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: offload())
    apply_dype(pipe, CONFIG)
    spy = Spy(pipe.transformer)
    for _ in range(2):
        spy.calls.clear()
        latents(pipe)
        assert spy.sigmas == pytest.approx(scheduled(pipe), abs=1e-6)


def test_batches_and_sizes_in_turn(pipe):
    """Batch 2; then two sizes of one token count: as on a fresh pipeline each."""
    apply_dype(pipe, CONFIG)
    wide, tall = latents(pipe, 128, 256), latents(pipe, 256, 128)
    pair = latents(pipe, 128, 256, prompt=["a red ring on teal leaves"] * 2)
    assert pair.shape[0] == 2
    fresh = quiet(FluxPipeline(**tiny_components()))
    apply_dype(fresh, CONFIG)
    assert torch.equal(latents(fresh, 256, 128), tall)
    assert torch.equal(latents(fresh, 128, 256), wide)


def test_second_apply_replaces_the_first(pipe):
    stock = pipe.transformer.pos_embed
    apply_dype(pipe, CONFIG)
    apply_dype(pipe, DyPEConfig("ntk"))
    assert pipe.transformer.pos_embed.stock is stock
    assert len(pipe.transformer._forward_pre_hooks) == 1
    remove_dype(pipe)
    assert pipe.transformer.pos_embed is stock


def denoiser_call(ids, sigma: float) -> dict:
    """The arguments of one call of the tiny transformer."""
    return {
        "hidden_states": torch.randn(1, len(ids), 16),
        "encoder_hidden_states": torch.randn(1, 4, 128),
        "pooled_projections": torch.randn(1, 128),
        "timestep": torch.tensor([sigma]),
        "img_ids": ids,
        "txt_ids": torch.zeros(4, 3),
    }


def test_deep_copy_drives_its_own(pipe):
    apply_dype(pipe, CONFIG)
    other = copy.deepcopy(pipe.transformer)
    pipe.transformer.pos_embed.set_timestep(0.25)
    mine = Spy(other)
    other(**denoiser_call(torch.zeros(16, 3), 0.75))
    assert mine.sigmas == [0.75]
    assert pipe.transformer.pos_embed.sigma == 0.25
    remove_dype(other)
    assert not isinstance(other.pos_embed, DyPEFluxPosEmbed)
    assert not other._forward_pre_hooks
    assert len(pipe.transformer._forward_pre_hooks) == 1
    pickle.loads(pickle.dumps(pipe.transformer))


def test_positional_arguments():
    """A hand-written loop may call the transformer without names."""
    transformer = tiny_transformer()
    apply_dype(transformer, CONFIG)
    spy = Spy(transformer)
    hidden, text, pooled = torch.randn(1, 8, 16), torch.randn(1, 4, 128), torch.randn(1, 128)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(4.0))
    transformer(hidden, text, pooled, torch.tensor([0.5]), ids, torch.zeros(4, 3))
    assert spy.calls == [(0.5, (2, 4), (4, 0))]


def test_exact_ids_reach_the_embedder():
    """The hook hands on 320 distinct rows where bfloat16 ids have 289: shards need them."""
    transformer = tiny_transformer().to(torch.bfloat16)
    apply_dype(transformer, CONFIG)
    seen = []
    transformer.pos_embed.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    transformer(
        hidden_states=torch.randn(1, 640, 16, dtype=torch.bfloat16),
        encoder_hidden_states=torch.randn(1, 4, 128, dtype=torch.bfloat16),
        pooled_projections=torch.randn(1, 128, dtype=torch.bfloat16),
        timestep=torch.tensor([0.5], dtype=torch.bfloat16),
        img_ids=make_grid_ids(0, 320, 2).to(torch.bfloat16),
        txt_ids=torch.zeros(4, 3, dtype=torch.bfloat16),
    )
    assert len(seen[0][:, 1].unique()) == 320


@pytest.mark.parametrize("how", ["wrapped", "in place", "compiled first"])
def test_one_compiled_graph(pipe, how):
    """fullgraph, one graph for all steps of two runs; also when compiled before apply_dype."""
    apply_dype(pipe, CONFIG)
    expected = latents(pipe)
    remove_dype(pipe)
    counter = CompileCounter()
    if how != "compiled first":
        apply_dype(pipe, CONFIG)
    if how == "in place":
        pipe.transformer.compile(fullgraph=True, backend=counter)
    else:
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=counter)
    apply_dype(pipe, CONFIG)
    for _ in range(2):
        torch.testing.assert_close(latents(pipe), expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_inpainting(pipe):
    apply_dype(pipe, CONFIG)
    other = quiet(FluxInpaintPipeline.from_pipe(pipe))
    spy = Spy(pipe.transformer)
    picture, mask = Image.new("RGB", (192, 256), "teal"), Image.new("L", (192, 256), 255)
    latents(other, image=picture, mask_image=mask, strength=0.6, steps=5)
    assert spy.sigmas == pytest.approx(scheduled(other)[2:], abs=1e-6)


def test_fill():
    parts = tiny_components(in_channels=4 * 4 + 4 * 4 + 256, out_channels=16)
    other = quiet(FluxFillPipeline(**parts))
    apply_dype(other, CONFIG)
    spy = Spy(other.transformer)
    picture, mask = Image.new("RGB", (192, 256), "teal"), Image.new("L", (192, 256), 255)
    latents(other, image=picture, mask_image=mask)
    assert spy.sigmas == pytest.approx(scheduled(other), abs=1e-6)
    assert spy.calls[0][1:] == ((16, 12), (16, 0))


def test_kontext(pipe):
    """The reference's tokens follow the image's and are not counted as the image."""
    needs("FluxKontextPipeline")
    parts = pipe.components
    other = quiet(diffusers.FluxKontextPipeline(**parts))
    apply_dype(other, CONFIG)
    spy = Spy(other.transformer)
    picture = Image.new("RGB", (128, 128), "teal")
    latents(other, image=picture, _auto_resize=False, max_area=256 * 192)
    (_, grid, (text, after)), *_ = spy.calls
    assert grid == (16, 12)
    assert (text, after) == (16, 64)


def test_ids_are_read_once_per_picture(pipe, monkeypatch):
    """One copy to the host for all steps; ids that somebody wrote to are read again."""
    reads = []

    def counted(*args):
        reads.append(args)
        return parse_image_ids(*args)

    monkeypatch.setattr(embedders, "parse_image_ids", counted)
    apply_dype(pipe, CONFIG)
    latents(pipe, steps=3)
    assert len(reads) == 1
    latents(pipe, steps=3)
    assert len(reads) == 2
    ids = make_grid_ids(0, 16, 12)
    call = denoiser_call(ids, 0.5)
    pipe.transformer(**call)
    assert pipe.transformer.pos_embed.grid == (16, 12)
    ids.copy_(make_grid_ids(0, 12, 16))
    pipe.transformer(**call)
    assert pipe.transformer.pos_embed.grid == (12, 16)


def test_controlnet(pipe):
    """Controlnets have embedders of their own, which follow too and are restored too."""
    controlnet = FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2,
    )  # fmt: skip
    nets = [controlnet, copy.deepcopy(controlnet)]
    image = Image.new("RGB", (192, 256), "teal")
    several = FluxMultiControlNetModel(nets)
    for net, control in ((controlnet, {"control_image": image}), (several, {
        "control_image": [image, image], "controlnet_conditioning_scale": [1.0, 1.0]
    })):  # fmt: skip
        other = quiet(FluxControlNetPipeline.from_pipe(pipe, controlnet=net))
        apply_dype(other, CONFIG)
        used = nets if net is several else nets[:1]
        spy, its = Spy(other.transformer), [Spy(net) for net in used]
        latents(other, **control)
        for net in its:
            assert net.sigmas == spy.sigmas
            assert net.calls[0][1] == (16, 12)
        remove_dype(other)
        assert not any(isinstance(net.pos_embed, DyPEFluxPosEmbed) for net in nets)


def test_unknown_transformer():
    model = UNet2DModel(
        sample_size=8, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    with pytest.raises(TypeError, match="UNet2DModel is not supported; expected one of Flux"):
        apply_dype(model)


def test_config_must_be_one(pipe):
    with pytest.raises(TypeError, match="config is 'yarn', expected a DyPEConfig"):
        apply_dype(pipe, "yarn")


def test_base_resolution_follows_what_was_loaded(monkeypatch):
    transformer = tiny_transformer()
    assert base_resolution(transformer) == 1024
    transformer.register_to_config(_name_or_path=f"{MODELS['demo'].repo}/transformer")
    assert base_resolution(transformer) == 256
    transformer.register_to_config(_name_or_path=f"{MODELS['demo'].repo}_of_another/transformer")
    assert base_resolution(transformer) == 1024
    monkeypatch.chdir(MODELS["demo"].repo)  # whatever folder one works in
    for name in ("", "black-forest-labs/FLUX.1-dev"):
        transformer.register_to_config(_name_or_path=name)
        assert base_resolution(transformer) == 1024


@pytest.mark.weights
@pytest.mark.skipif("DYPE_FLUX" not in os.environ, reason="needs DYPE_FLUX, a FLUX.1 folder")
def test_real_weights_inactive_equals_stock():
    """Would show that at 1024 px DyPE leaves a real FLUX.1's latents as they are, bit for bit."""
    pipe = FluxPipeline.from_pretrained(os.environ["DYPE_FLUX"], dtype=torch.bfloat16)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    before = latents(pipe, 1024, 1024, steps=2)
    apply_dype(pipe, DyPEConfig(shift="model"))
    assert torch.equal(latents(pipe, 1024, 1024, steps=2), before)
