"""Every family except FLUX.1 in its real pipeline, at a tiny size."""

import copy
import inspect
import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from conftest import generate_latents, needs, quiet
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from PIL import Image
from reference import rotary_table
from tables import CONFIG, FORMATS, GRID, assert_table, grid
from tiny import (
    FAMILIES,
    HEADS,
    TEXT,
    generate_qwen,
    qwen,
    qwen_transformer,
    random_tensor,
    zimage,
    zimage_transformer,
)
from torch import nn
from torch.utils._pytree import tree_map_only

from dype import DyPEConfig, apply_dype, remove_dype
from dype.embedders_complex import pad_to_32
from dype.families import FAMILIES as CLASSES
from dype.families import KREA2_TURBO
from dype.noise_schedule import noise_schedule


@pytest.fixture(params=FAMILIES)
def family(request):
    """Return a pipeline, its generate function and its format."""
    build, generate = FAMILIES[request.param]
    return build(), generate, FORMATS[request.param]


def test_inactive_equals_stock(family):
    """At the base resolution, and with `base` above it, latents equal the stock pipeline's."""
    pipe, generate, _ = family
    before = generate(pipe, 128, 192)
    apply_dype(pipe, DyPEConfig("yarn", base_resolution=192, shift="model"))
    assert torch.equal(generate(pipe, 128, 192), before)
    apply_dype(pipe, DyPEConfig("base", base_resolution=64, shift="model"))
    assert torch.equal(generate(pipe, 128, 192), before)


def test_remove_restores_bits(family):
    pipe, generate, _ = family
    transformer = pipe.transformer
    before, attributes = generate(pipe, 128, 192), set(dir(transformer))
    names, scheduler = list(transformer.state_dict()), dict(pipe.scheduler.config)
    shift = pipe.scheduler.shift
    apply_dype(pipe, DyPEConfig(base_resolution=64))
    assert list(transformer.state_dict()) == names
    assert not torch.equal(generate(pipe, 128, 192), before)
    remove_dype(pipe)
    assert torch.equal(generate(pipe, 128, 192), before)
    assert dict(pipe.scheduler.config) == scheduler
    assert pipe.scheduler.shift == shift
    assert not transformer._forward_pre_hooks
    assert set(dir(transformer)) == attributes


@pytest.mark.parametrize("method", ["yarn", "vision_yarn", "ntk"])
def test_tables_follow_every_step(family, tables, method):
    """Each table equals tests/reference.py at the step's sigma.

    This holds in a second run too, with and without guidance, at batch size 2.
    """
    pipe, generate, form = family
    config = DyPEConfig(method, base_resolution=64, shift="model")
    apply_dype(pipe, config)
    for steps, guidance in ((3, 0.0), (2, form.cfg)):
        tables.clear()
        generate(pipe, 128, 192, steps=steps, guidance=guidance, batch=2)
        per_step = form.calls_per_step if guidance else 1
        schedule = pipe.scheduler.sigmas[:-1].tolist()
        sigmas = [sigma for sigma in schedule for _ in range(per_step * len(form.calls))]
        assert [sigma for sigma, _ in tables] == pytest.approx(sigmas, abs=1e-6)
        for call, ((_, table), sigma) in enumerate(zip(tables, sigmas, strict=True)):
            positions = form.calls[call % len(form.calls)]
            if guidance and form is FORMATS["z-image"]:
                continue  # test_z_image_with_guidance, because captions have two lengths
            expected = rotary_table(
                method, form.axes, form.theta, positions, GRID, sigma, trained_tokens=4,
                lambda_s=config.lambda_s,
            )  # fmt: skip
            # because Z-Image's table has the rows of all samples
            samples = 2 if form is FORMATS["z-image"] else 1
            for sample in table.chunk(samples):
                assert_table(sample[: len(expected)], expected)
    embedder = getattr(pipe.transformer, CLASSES[type(pipe.transformer).__name__].attribute)
    # without a layout the table would be made from ids, which is slower
    assert form is FORMATS["qwen-image"] or embedder.state.layout is not None


def test_z_image_with_guidance(tables):
    """One call holds two images with the prompt, of 16 tokens, and two with the negative, of 36."""
    build, generate = FAMILIES["z-image"]
    pipe = build()
    apply_dype(pipe, CONFIG)
    generate(pipe, 128, 192, steps=2, guidance=3.0, batch=2)
    counts = [TEXT, TEXT, TEXT + 20, TEXT + 20]
    lengths = [pad_to_32(count) for count in counts]
    images = [position for length in lengths for position in grid(length + 1)]
    captions = []
    for count, length in zip(counts, lengths, strict=True):
        captions += [(1 + i, 0, 0) for i in range(length)] + [(0, 0, 0)] * (length - count)
    for (sigma, table), positions in zip(tables, [images, captions] * 2, strict=True):
        expected = rotary_table(
            "yarn", (4, 6, 6), 256.0, positions, GRID, sigma, trained_tokens=4, lambda_s=1
        )
        assert_table(table, expected)


def test_non_square_in_turn(family):
    """Two sizes of equal token count, one after the other, equal those of a new pipeline."""
    pipe, generate, _ = family
    apply_dype(pipe, CONFIG)
    wide, tall = generate(pipe, 64, 256), generate(pipe, 256, 64)
    build = next(build for build, function in FAMILIES.values() if function is generate)
    new_pipe = build()
    apply_dype(new_pipe, CONFIG)
    assert torch.equal(generate(new_pipe, 256, 64), tall)
    assert torch.equal(generate(new_pipe, 64, 256), wide)


def z_image_with_controlnet() -> DiffusionPipeline:
    components = zimage().components
    torch.manual_seed(0)
    control = diffusers.ZImageControlNetModel(
        dim=32,
        n_heads=2,
        n_kv_heads=2,
        n_refiner_layers=1,
        control_layers_places=[0],
        control_in_dim=4,
    )
    return diffusers.ZImageControlNetPipeline(**components, controlnet=control)


def qwen_image_with_controlnet() -> DiffusionPipeline:
    components = qwen().components
    control = diffusers.QwenImageControlNetModel.from_transformer(
        components["transformer"], num_layers=1, **HEADS
    )
    return diffusers.QwenImageControlNetPipeline(**components, controlnet=control)


@pytest.mark.parametrize(
    ("build", "name"),
    [(z_image_with_controlnet, "z-image"), (qwen_image_with_controlnet, "qwen-image")],
)
def test_controlnets_follow(build, name, tables):
    """Controlnets use the transformer's table at every step, until DyPE is removed."""
    pipe, generate = quiet(build()), FAMILIES[name][1]
    attribute = CLASSES[type(pipe.controlnet).__name__].attribute
    image = Image.new("RGB", (192, 128), "red")
    stock = getattr(pipe.controlnet, attribute)
    before = generate(pipe, 128, 192, control_image=image)
    apply_dype(pipe, CONFIG)
    assert getattr(pipe.controlnet, attribute) is not getattr(pipe.transformer, attribute)
    generate(pipe, 128, 192, control_image=image)
    half = len(FORMATS[name].calls)
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert [sigma for sigma, _ in tables[:: 2 * half]] == pytest.approx(sigmas, abs=1e-6)
    for step in range(0, len(tables), 2 * half):
        control_calls, calls = tables[step:][:half], tables[step + half :][:half]
        for (control_sigma, control_table), (sigma, table) in zip(
            control_calls, calls, strict=True
        ):
            assert control_sigma == sigma
            assert torch.equal(control_table, table)
    remove_dype(pipe)
    assert getattr(pipe.controlnet, attribute) is stock
    assert torch.equal(generate(pipe, 128, 192, control_image=image), before)


def test_qwen_image_edit_keeps_its_reference(tables, monkeypatch):
    """The new image follows every step; the edited image has the stock encoding."""
    components = qwen().components  # first, because it skips with a diffusers without Qwen-Image
    pipe = diffusers.QwenImageEditPipeline(**components, processor=None)
    # because the pipeline would scale the edited image to a megapixel
    monkeypatch.setattr(
        inspect.getmodule(type(pipe)), "calculate_dimensions", lambda area, ratio: (96, 64, None)
    )
    stock, _ = pipe.transformer.pos_embed([[(1, *GRID), (1, 4, 6)]], max_txt_seq_len=TEXT)
    apply_dype(pipe, CONFIG)
    generate_qwen(quiet(pipe), 128, 192, image=Image.new("RGB", (96, 64), "red"))
    assert len(tables) == 3
    num_target = GRID[0] * GRID[1]
    for sigma, table in tables:
        positions = grid(0, centered=True)
        expected = rotary_table(
            "yarn", (4, 6, 6), 10000.0, positions, GRID, sigma, trained_tokens=4, lambda_s=1
        )
        assert_table(table[:num_target], expected)
        assert torch.equal(table[num_target:], stock[num_target:])


def test_bfloat16_keeps_the_tables(family, tables):
    """The pipeline rounds sigma, as a timestep and as a fraction; its table stays exact."""
    pipe, generate, form = family
    for module in (pipe.transformer, pipe.vae):
        nn.Module.to(module, torch.bfloat16)  # because diffusers' own method warns without reason
    apply_dype(pipe, CONFIG)
    assert generate(pipe, 128, 192).isfinite().all()
    sigmas = [sigma for sigma in pipe.scheduler.sigmas[:-1].tolist() for _ in form.calls]
    assert [sigma for sigma, _ in tables] == pytest.approx(sigmas, abs=4e-3)
    for call, (sigma, table) in enumerate(tables):
        positions = form.calls[call % len(form.calls)]
        expected = rotary_table(
            "yarn", form.axes, form.theta, positions, GRID, sigma, trained_tokens=4, lambda_s=1
        )
        assert_table(table[: len(expected)], expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("HiDreamImageTransformer2DModel", "generates 1024x1024 px alone"),
        ("ErnieImageTransformer2DModel", "returns angles"),
        ("OvisImageTransformer2DModel", "text positions continue the image's rows"),
        ("LongCatImageTransformer2DModel", "open question"),
        ("BriaFibo2Transformer2DModel", "references share one"),
        ("QwenImage21Transformer2DModel", "share one table"),
        ("Flux", "its forward has no timesteps"),
        ("Strange", "Strange is not supported; expected one of FluxTransformer"),
        ("Module", "Module is not supported"),
    ],
)
def test_unsupported_class(name, message):
    transformer = type(name, (nn.Module,), {})()
    with pytest.raises((TypeError, ValueError), match=message):
        apply_dype(transformer, CONFIG)


@pytest.mark.parametrize("name", ["VisualClozePipeline", "VisualClozeGenerationPipeline"])
def test_unsupported_pipeline(name):
    """A pipeline that uses a supported transformer in another way is refused by name."""
    with pytest.raises(TypeError, match=f"{name} is not supported: its examples"):
        apply_dype(type(name, (), {"transformer": qwen_transformer()})())


def test_threads_share_a_transformer(family):
    """Each of two threads gets its own tables, although both hooks run before either forward."""
    pipe, generate, _ = family
    apply_dype(pipe, CONFIG)
    jobs = [(128, 192), (192, 64)]
    expected = [generate(pipe, *size, steps=2) for size in jobs]
    barrier = threading.Barrier(2, timeout=10)

    def wait(module, args) -> None:
        barrier.wait()

    def generate_in_thread(size):
        thread_pipe = copy.copy(pipe)
        thread_pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return generate(thread_pipe, *size, steps=2)

    pipe.transformer.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        images = list(pool.map(generate_in_thread, jobs))
    assert all(map(torch.equal, images, expected))


def test_unsupported_variant():
    """A supported class is rejected if its configuration selects another encoding."""
    with pytest.raises(ValueError, match="Qwen-Image-Layered"):
        apply_dype(qwen_transformer(use_layer3d_rope=True), CONFIG)
    with pytest.raises(ValueError, match="Z-Image-Omni"):
        apply_dype(zimage_transformer(siglip_feat_dim=8), CONFIG)


def test_flux2_schedule():
    """Capped, FLUX.2 has the sigmas of its base resolution at every size."""
    build, generate = FAMILIES["flux2"]
    pipe, family = build(), CLASSES["Flux2Transformer2DModel"]

    def sigmas(size, steps=50):
        mu, expected = noise_schedule(pipe.scheduler, size, size, steps, family)
        generate(pipe, 128, 128, steps=2)
        return mu, expected

    stock = [sigmas(size)[0] for size in (1024, 2048, 4096)]
    assert stock == pytest.approx([2.02, 3.23, 11.55], abs=0.01)
    apply_dype(pipe, DyPEConfig())
    capped = [sigmas(size) for size in (1024, 4096)]
    assert capped[0] == capped[1]
    assert capped[0][0] == sigmas(1024, steps=2)[0] == pytest.approx(2.02, abs=0.01)
    remove_dype(pipe)
    assert sigmas(1024)[1] == pytest.approx(capped[0][1], abs=1e-6)
    apply_dype(pipe, DyPEConfig(max_shift=1.0))
    mu, expected = sigmas(4096, steps=2)
    assert mu == 1
    assert expected[1] == pytest.approx(math.e / (math.e + 1))
    with pytest.raises(ValueError, match="has its own rule"):
        apply_dype(pipe, DyPEConfig(max_shift=1.0, shift="model"))


@pytest.mark.parametrize("name", FAMILIES)
def test_pipelines_use_the_printed_schedule(name):
    """A pipeline uses the sigmas of `noise_schedule`, which --dry_run prints."""
    build, generate = FAMILIES[name]
    pipe = build()
    family = CLASSES[type(pipe.transformer).__name__]
    for shift in (None, "model"):
        apply_dype(pipe, DyPEConfig(base_resolution=64, shift=shift))
        generate(pipe, 128, 192, steps=4)
        _, expected = noise_schedule(pipe.scheduler, 128, 192, 4, family)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"z-image"}))  # it fails in diffusers
def test_pipelines_use_the_schedule_of_unipc(name):
    """FLUX's and FLUX.2's pipelines alone leave the sigmas to UniPC."""
    build, generate = FAMILIES[name]
    pipe, unipc = build(), diffusers.UniPCMultistepScheduler
    if "sigmas" not in inspect.signature(unipc.set_timesteps).parameters:
        pytest.skip("the UniPC of this diffusers takes no sigmas")
    flow = {"use_dynamic_shifting": True, "use_flow_sigmas": True}
    pipe.scheduler = unipc.from_config(pipe.scheduler.config, **flow)
    generate(pipe, 128, 192, steps=4)
    family = CLASSES[type(pipe.transformer).__name__]
    _, expected = noise_schedule(pipe.scheduler, 128, 192, 4, family)
    assert pipe.scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)


def test_schedule_of_the_distilled_krea_2():
    """The pipeline of the distilled Krea 2 ignores the scheduler and has mu = 1.15."""
    build, generate = FAMILIES["krea2"]
    pipe = build()
    pipe.register_to_config(is_distilled=True)
    for shift in (None, "model"):
        apply_dype(pipe, DyPEConfig(base_resolution=64, shift=shift))
        generate(pipe, 128, 192, steps=4)
        mu, expected = noise_schedule(pipe.scheduler, 128, 192, 4, KREA2_TURBO)
        assert mu == pytest.approx(1.15)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="its own rule"):
        apply_dype(pipe, DyPEConfig(max_shift=3.0, shift="model"))


def test_pipeline_without_a_transformer():
    class StableDiffusionXLPipeline:
        unet = nn.Module()

    with pytest.raises(
        TypeError, match="XLPipeline has no transformer; expected the pipeline that generates, once"
    ):
        apply_dype(StableDiffusionXLPipeline())


def test_second_apply_and_deep_copy(family):
    """A second apply_dype replaces the first; a deep copy has an embedder of its own."""
    pipe, generate, _ = family
    apply_dype(pipe, CONFIG)
    expected = generate(pipe, 128, 192)
    apply_dype(pipe, DyPEConfig("ntk"))
    apply_dype(pipe, CONFIG)
    duplicate = copy.deepcopy(pipe.transformer)
    assert len(duplicate._forward_pre_hooks) == 1
    apply_dype(pipe, DyPEConfig("ntk", base_resolution=32, shift="model"))
    generate(pipe, 64, 64, steps=2)
    pipe.transformer = duplicate
    assert torch.equal(generate(pipe, 128, 192), expected)


def test_a_call_moves_after_the_hook(family, tables):
    """Tables follow a call that other hooks move to another device, as those that offload do.

    The device is "meta", where tensors have no values.
    """
    pipe, generate, _ = family
    calls, transformer = [], pipe.transformer
    record = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    generate(pipe, 128, 192, steps=2)
    record.remove()
    apply_dype(pipe, CONFIG)
    transformer.to("meta").register_forward_pre_hook(
        lambda module, args, kwargs: tree_map_only(torch.Tensor, move_to_meta, (args, kwargs)),
        with_kwargs=True,
    )
    (args, kwargs), *_ = calls
    with torch.no_grad():
        transformer(*args, **kwargs)
    assert {table.device.type for _, table in tables} == {"meta"}


def move_to_meta(x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


def test_quantized_transformer():
    """DyPE works in a quantized transformer, because only its linear layers change."""
    build, generate = FAMILIES["qwen-image"]
    pipe = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # because torch deprecates this namespace
        pipe.transformer = torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear})
        before = generate(pipe, 128, 192)
        apply_dype(pipe, CONFIG)
        assert not torch.equal(generate(pipe, 128, 192), before)
        remove_dype(pipe)
        assert torch.equal(generate(pipe, 128, 192), before)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_loaded_before_or_after(order):
    peft = pytest.importorskip("peft")
    build, generate = FAMILIES["z-image"]

    def adapt(pipe):
        torch.manual_seed(1)
        targets = ["to_q", "to_k", "to_v"]
        lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        pipe.transformer.add_adapter(lora)

    pipe, without_lora = build(), build()
    apply_dype(without_lora, CONFIG)
    changes = [adapt, lambda pipe: apply_dype(pipe, CONFIG)]
    for change in changes if order == "before" else reversed(changes):
        change(pipe)
    ours = generate(pipe, 128, 192)
    assert not torch.equal(ours, generate(without_lora, 128, 192))
    remove_dype(pipe)
    without_dype = build()
    adapt(without_dype)
    assert torch.equal(generate(pipe, 128, 192), generate(without_dype, 128, 192))


def test_flux_ip_adapter(pipe):
    """DyPE works with an IP-Adapter's attention processors, set before or after it."""
    needs("FluxIPAdapterAttnProcessor")
    processor_class = diffusers.models.transformers.transformer_flux.FluxIPAdapterAttnProcessor

    def adapt():
        torch.manual_seed(1)
        pipe.transformer.encoder_hid_proj = MultiIPAdapterImageProjection(
            [ImageProjection(TEXT, 8, num_image_text_embeds=2)]
        )
        pipe.transformer.config["encoder_hid_dim_type"] = "ip_image_proj"
        processors = {
            name: processor_class(32, 8, num_tokens=(2,), scale=[1.0])
            if name.startswith("transformer_blocks")
            else processor
            for name, processor in pipe.transformer.attn_processors.items()
        }
        pipe.transformer.set_attn_processor(processors)

    image = {
        "ip_adapter_image_embeds": [random_tensor((1, 1, TEXT), 5)],
        "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, TEXT)],
    }
    apply_dype(pipe, CONFIG)
    without_adapter = generate_latents(pipe, 128, 192)
    adapt()
    with_both = generate_latents(pipe, 128, 192, **image)
    remove_dype(pipe)
    without_dype = generate_latents(pipe, 128, 192, **image)
    apply_dype(pipe, CONFIG)
    assert torch.equal(generate_latents(pipe, 128, 192, **image), with_both)
    assert not torch.equal(with_both, without_adapter)
    assert not torch.equal(with_both, without_dype)
