"""apply_dype and remove_dype in FLUX's real pipelines, at a tiny size."""

import copy
import os
import pickle
from dataclasses import replace

import diffusers
import pytest
import torch
from conftest import Spy, generate_latents, needs, quiet, tiny_components, tiny_transformer
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
from dype.embedders import DyPEFluxPosEmbed
from dype.families import base_resolution
from dype.image_ids import make_grid_ids, parse_image_ids
from dype.pipelines.catalog import MODELS

CONFIG = DyPEConfig("yarn", base_resolution=64)
NO_SCHEDULE = replace(CONFIG, shift="model")  # for calls of a transformer without a scheduler


def scheduler_sigmas(pipe) -> list[float]:
    """Return the sigmas of the steps, without the final 0."""
    return pipe.scheduler.sigmas[:-1].tolist()


def test_remove_restores_bits(pipe):
    """remove_dype restores latents, configuration, modules and hooks."""
    before, config = generate_latents(pipe), dict(pipe.scheduler.config)
    names = list(pipe.transformer.state_dict())
    apply_dype(pipe, CONFIG)
    assert list(pipe.transformer.state_dict()) == names
    assert not torch.equal(generate_latents(pipe), before)
    remove_dype(pipe)
    assert torch.equal(generate_latents(pipe), before)
    assert dict(pipe.scheduler.config) == config
    assert not pipe.transformer._forward_pre_hooks
    remove_dype(pipe)  # a second call does nothing


def test_inactive_equals_stock(pipe):
    """At the base resolution, with the model's schedule, latents equal the stock pipeline's."""
    before = generate_latents(pipe)
    for method in ("yarn", "ntk", "vision_yarn"):
        apply_dype(pipe, DyPEConfig(method, base_resolution=256, shift="model"))
        assert torch.equal(generate_latents(pipe), before)


def test_sigmas_of_the_scheduler(pipe):
    """The embedder has the scheduler's sigmas, from the first step on and in a second run."""
    apply_dype(pipe, CONFIG)
    spy = Spy(pipe.transformer)
    for steps in (4, 3):
        spy.calls.clear()
        generate_latents(pipe, steps=steps)
        assert spy.sigmas == pytest.approx(scheduler_sigmas(pipe), abs=1e-6)
        assert spy.sigmas[0] == 1
        assert {call[1] for call in spy.calls} == {(16, 12)}


def test_sigmas_at_bfloat16(pipe):
    pipe.to(torch.bfloat16)
    apply_dype(pipe, CONFIG)
    spy = Spy(pipe.transformer)
    generate_latents(pipe, steps=6)
    assert spy.sigmas == pytest.approx(scheduler_sigmas(pipe), abs=2.5e-3)


def test_sigmas_with_true_cfg(pipe):
    """Both denoiser calls of a step have its sigma."""
    apply_dype(pipe, CONFIG)
    spy = Spy(pipe.transformer)
    generate_latents(pipe, negative_prompt="a moon", true_cfg_scale=3.0)
    expected = [sigma for sigma in scheduler_sigmas(pipe) for _ in (0, 1)]
    assert spy.sigmas == pytest.approx(expected, abs=1e-6)


def test_sigmas_in_image_to_image(pipe):
    """strength 0.6 of 5 steps gives the last 3 sigmas, from the first call on."""
    apply_dype(pipe, CONFIG)
    img2img = quiet(FluxImg2ImgPipeline.from_pipe(pipe))
    spy = Spy(pipe.transformer)
    image = Image.new("RGB", (192, 256), "teal")
    generate_latents(img2img, image=image, strength=0.6, steps=5)
    assert spy.sigmas == pytest.approx(scheduler_sigmas(img2img)[2:], abs=1e-6)


def test_hook_survives_the_end_of_offloading(pipe, monkeypatch):
    """DyPE's hook stays when a pipeline with offloading rebuilds accelerate's hooks after a call.

    The test replaces offloading by accelerate's hook on the CPU, because it needs no GPU.
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
        generate_latents(pipe)
        assert spy.sigmas == pytest.approx(scheduler_sigmas(pipe), abs=1e-6)


def test_batches_and_sizes_in_turn(pipe):
    """A batch of 2 works, and two sizes of equal token count equal those of a new pipeline."""
    apply_dype(pipe, CONFIG)
    wide, tall = generate_latents(pipe, 128, 256), generate_latents(pipe, 256, 128)
    pair = generate_latents(pipe, 128, 256, prompt=["a red sun over blue mountains"] * 2)
    assert pair.shape[0] == 2
    new_pipe = quiet(FluxPipeline(**tiny_components()))
    apply_dype(new_pipe, CONFIG)
    assert torch.equal(generate_latents(new_pipe, 256, 128), tall)
    assert torch.equal(generate_latents(new_pipe, 128, 256), wide)


def test_second_apply_replaces_the_first(pipe):
    stock = pipe.transformer.pos_embed
    apply_dype(pipe, CONFIG)
    apply_dype(pipe, DyPEConfig("ntk"))
    assert pipe.transformer.pos_embed.stock is stock
    assert len(pipe.transformer._forward_pre_hooks) == 1
    remove_dype(pipe)
    assert pipe.transformer.pos_embed is stock


def denoiser_call(ids, sigma: float) -> dict:
    """Return the arguments of one call of the tiny transformer."""
    return {
        "hidden_states": torch.randn(1, len(ids), 16),
        "encoder_hidden_states": torch.randn(1, 4, 128),
        "pooled_projections": torch.randn(1, 128),
        "timestep": torch.tensor([sigma]),
        "img_ids": ids,
        "txt_ids": torch.zeros(4, 3),
    }


def test_deep_copy_is_independent(pipe):
    """A deep copy drives its own embedder, and remove_dype on it leaves the original."""
    apply_dype(pipe, NO_SCHEDULE)
    duplicate = copy.deepcopy(pipe.transformer)
    pipe.transformer.pos_embed.set_timestep(0.25)
    spy = Spy(duplicate)
    duplicate(**denoiser_call(torch.zeros(16, 3), 0.75))
    assert spy.sigmas == [0.75]
    assert pipe.transformer.pos_embed.sigma == 0.25
    remove_dype(duplicate)
    assert not isinstance(duplicate.pos_embed, DyPEFluxPosEmbed)
    assert not duplicate._forward_pre_hooks
    assert len(pipe.transformer._forward_pre_hooks) == 1
    pickle.loads(pickle.dumps(pipe.transformer))


def test_positional_arguments():
    """A custom loop may call the transformer with positional arguments."""
    transformer = tiny_transformer()
    apply_dype(transformer, CONFIG)
    spy = Spy(transformer)
    hidden, text, pooled = torch.randn(1, 8, 16), torch.randn(1, 4, 128), torch.randn(1, 128)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(4.0))
    transformer(hidden, text, pooled, torch.tensor([0.5]), ids, torch.zeros(4, 3))
    assert spy.calls == [(0.5, (2, 4), (4, 0))]


def test_exact_ids_reach_the_embedder():
    """The hook replaces 289 distinct bfloat16 rows by 320 exact ones, because shards need them."""
    transformer = tiny_transformer().to(torch.bfloat16)
    apply_dype(transformer, NO_SCHEDULE)
    calls = []
    transformer.pos_embed.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    transformer(
        hidden_states=torch.randn(1, 640, 16, dtype=torch.bfloat16),
        encoder_hidden_states=torch.randn(1, 4, 128, dtype=torch.bfloat16),
        pooled_projections=torch.randn(1, 128, dtype=torch.bfloat16),
        timestep=torch.tensor([0.5], dtype=torch.bfloat16),
        img_ids=make_grid_ids(0, 320, 2).to(torch.bfloat16),
        txt_ids=torch.zeros(4, 3, dtype=torch.bfloat16),
    )
    assert len(calls[0][:, 1].unique()) == 320


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="the graph breaks in the embedder")
@pytest.mark.parametrize("order", ["wrapped", "in place", "compiled first"])
def test_one_compiled_graph(pipe, order):
    """One full graph serves all steps of two runs, also if compiled before apply_dype.

    Also with SEGA's m and copies of the text, which the graph does not contain.
    """
    later = {"attention_path": "sega", "text_repeat": "auto"}
    config = replace(CONFIG, **later) if order != "in place" else CONFIG
    apply_dype(pipe, config)
    expected = generate_latents(pipe)
    remove_dype(pipe)
    counter = CompileCounter()
    if order != "compiled first":
        apply_dype(pipe, config)
    if order == "in place":
        pipe.transformer.compile(fullgraph=True, backend=counter)
    else:
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=counter)
    apply_dype(pipe, config)
    for _ in range(2):
        torch.testing.assert_close(generate_latents(pipe), expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_a_refused_setting_changes_nothing(pipe):
    apply_dype(pipe, CONFIG)
    for settings in ({"rdfc_pairs": "3"}, {"rdfc_pairs": "0,99"}):
        with pytest.raises(ValueError, match=r"rdfc_pairs is '.*', expected numbers from 0 to 2"):
            apply_dype(pipe, DyPEConfig("rdfc", base_resolution=64, **settings))
        assert pipe.transformer.pos_embed.config == CONFIG
    apply_dype(pipe, DyPEConfig("yarn", rdfc_pairs="99"))  # it has no effect there


def test_inpainting(pipe):
    apply_dype(pipe, CONFIG)
    inpainting = quiet(FluxInpaintPipeline.from_pipe(pipe))
    spy = Spy(pipe.transformer)
    image, mask = Image.new("RGB", (192, 256), "teal"), Image.new("L", (192, 256), 255)
    generate_latents(inpainting, image=image, mask_image=mask, strength=0.6, steps=5)
    assert spy.sigmas == pytest.approx(scheduler_sigmas(inpainting)[2:], abs=1e-6)


def test_fill():
    # latents, masked latents, and 16 x 16 px of the mask per token
    components = tiny_components(in_channels=4 * 4 + 4 * 4 + 256, out_channels=16)
    pipe = quiet(FluxFillPipeline(**components))
    apply_dype(pipe, CONFIG)
    spy = Spy(pipe.transformer)
    image, mask = Image.new("RGB", (192, 256), "teal"), Image.new("L", (192, 256), 255)
    generate_latents(pipe, image=image, mask_image=mask)
    assert spy.sigmas == pytest.approx(scheduler_sigmas(pipe), abs=1e-6)
    assert spy.calls[0][1:] == ((16, 12), (16, 0))


def test_kontext(pipe):
    """The reference's tokens follow the image's and do not count as part of the grid."""
    needs("FluxKontextPipeline")
    kontext = quiet(diffusers.FluxKontextPipeline(**pipe.components))
    apply_dype(kontext, CONFIG)
    spy = Spy(kontext.transformer)
    image = Image.new("RGB", (128, 128), "teal")
    generate_latents(kontext, image=image, _auto_resize=False, max_area=256 * 192)
    (_, grid, (num_text, num_reference)), *_ = spy.calls
    assert grid == (16, 12)
    assert (num_text, num_reference) == (16, 64)


def test_ids_are_read_once_per_image(pipe, monkeypatch):
    """The ids are copied to the host once for all steps, and again after a change in place."""
    reads = []

    def count_and_parse(*args):
        reads.append(args)
        return parse_image_ids(*args)

    monkeypatch.setattr(embedders, "parse_image_ids", count_and_parse)
    apply_dype(pipe, NO_SCHEDULE)
    generate_latents(pipe, steps=3)
    assert len(reads) == 1
    generate_latents(pipe, steps=3)
    assert len(reads) == 2
    ids = make_grid_ids(0, 16, 12)
    call = denoiser_call(ids, 0.5)
    pipe.transformer(**call)
    assert pipe.transformer.pos_embed.grid == (16, 12)
    ids.copy_(make_grid_ids(0, 12, 16))
    pipe.transformer(**call)
    assert pipe.transformer.pos_embed.grid == (12, 16)


def test_controlnet(pipe):
    """The embedders of controlnets follow sigma and grid too, and are restored."""
    controlnet = FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2,
    )  # fmt: skip
    nets = [controlnet, copy.deepcopy(controlnet)]
    image = Image.new("RGB", (192, 256), "teal")
    one_net = {"control_image": image}
    two_nets = {"control_image": [image] * 2, "controlnet_conditioning_scale": [1.0] * 2}
    for model, active, arguments in (
        (controlnet, nets[:1], one_net),
        (FluxMultiControlNetModel(nets), nets, two_nets),
    ):
        control = quiet(FluxControlNetPipeline.from_pipe(pipe, controlnet=model))
        apply_dype(control, CONFIG)
        spy, net_spies = Spy(control.transformer), [Spy(net) for net in active]
        generate_latents(control, **arguments)
        for net_spy in net_spies:
            assert net_spy.sigmas == spy.sigmas
            assert net_spy.calls[0][1] == (16, 12)
        remove_dype(control)
        assert not any(isinstance(net.pos_embed, DyPEFluxPosEmbed) for net in nets)


def test_unknown_transformer():
    model = UNet2DModel(
        sample_size=8, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    with pytest.raises(TypeError, match="UNet2DModel is not supported; expected one of Flux"):
        apply_dype(model)


def test_config_of_wrong_type(pipe):
    with pytest.raises(TypeError, match="config is 'yarn', expected a DyPEConfig"):
        apply_dype(pipe, "yarn")


def test_base_resolution_of_the_demo_model(monkeypatch):
    """Only a transformer from the demo's folder has its base resolution of 512 px."""
    transformer = tiny_transformer()
    assert base_resolution(transformer) == 1024
    transformer.register_to_config(_name_or_path=f"{MODELS['demo'].repo}/transformer")
    assert base_resolution(transformer) == 512
    transformer.register_to_config(_name_or_path=f"{MODELS['demo'].repo}_of_another/transformer")
    assert base_resolution(transformer) == 1024
    monkeypatch.chdir(MODELS["demo"].repo)  # the current folder does not matter
    for name in ("", "black-forest-labs/FLUX.1-dev"):
        transformer.register_to_config(_name_or_path=name)
        assert base_resolution(transformer) == 1024


@pytest.mark.weights
@pytest.mark.skipif("DYPE_FLUX" not in os.environ, reason="needs DYPE_FLUX, a FLUX.1 folder")
def test_real_weights_inactive_equals_stock():
    """At 1024 px DyPE does not change a real FLUX.1's latents, bit for bit."""
    pipe = FluxPipeline.from_pretrained(os.environ["DYPE_FLUX"], dtype=torch.bfloat16)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    before = generate_latents(pipe, 1024, 1024, steps=2)
    apply_dype(pipe, DyPEConfig(shift="model"))
    assert torch.equal(generate_latents(pipe, 1024, 1024, steps=2), before)
