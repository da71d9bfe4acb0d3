"""Every family beside FLUX.1 in its real pipeline of tiny size."""

import copy
import inspect
import math
import warnings

import diffusers
import pytest
import torch
from conftest import latents, needs, quiet
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from PIL import Image
from reference import turns
from tables import CONFIG, FORMATS, GRID, assert_table, grid
from tiny import (
    FAMILIES,
    HEADS,
    TEXT,
    draw_qwen,
    qwen,
    qwen_transformer,
    seeded,
    zimage,
    zimage_transformer,
)
from torch import nn

from dype import DyPEConfig, apply_dype, remove_dype
from dype.embedders_complex import pad_to_32
from dype.families import FAMILIES as CLASSES
from dype.families import KREA2_TURBO
from dype.noise_schedule import noise_schedule


@pytest.fixture(params=FAMILIES)
def family(request):
    build, draw = FAMILIES[request.param]
    return build(), draw, FORMATS[request.param]


def test_inactive_equals_stock(family):
    """At the base resolution, and with `base` above it: the stock pipeline's bits."""
    pipe, draw, _ = family
    before = draw(pipe, 128, 192)
    apply_dype(pipe, DyPEConfig("yarn", base_resolution=192, shift="model"))
    assert torch.equal(draw(pipe, 128, 192), before)
    apply_dype(pipe, DyPEConfig("base", base_resolution=64, shift="model"))
    assert torch.equal(draw(pipe, 128, 192), before)


def test_remove_restores_bits(family):
    pipe, draw, _ = family
    transformer = pipe.transformer
    before, attributes = draw(pipe, 128, 192), set(dir(transformer))
    names, scheduler = list(transformer.state_dict()), dict(pipe.scheduler.config)
    shift = pipe.scheduler.shift
    apply_dype(pipe, DyPEConfig(base_resolution=64))
    assert list(transformer.state_dict()) == names
    assert not torch.equal(draw(pipe, 128, 192), before)
    remove_dype(pipe)
    assert torch.equal(draw(pipe, 128, 192), before)
    assert dict(pipe.scheduler.config) == scheduler
    assert pipe.scheduler.shift == shift
    assert not transformer._forward_pre_hooks
    assert set(dir(transformer)) == attributes


@pytest.mark.parametrize("method", ["yarn", "vision_yarn", "ntk"])
def test_tables_follow_every_step(family, tables, method):
    """First and second call, with and without guidance, batch 2: the reference at each sigma."""
    pipe, draw, form = family
    config = DyPEConfig(method, base_resolution=64, shift="model")
    apply_dype(pipe, config)
    for steps, guidance in ((3, 0.0), (2, form.cfg)):
        tables.clear()
        draw(pipe, 128, 192, steps=steps, guidance=guidance, batch=2)
        per_step = form.calls_per_step if guidance else 1
        sigmas = pipe.scheduler.sigmas[:-1].tolist()
        wanted = [s for s in sigmas for _ in range(per_step * len(form.calls))]
        assert [sigma for sigma, _ in tables] == pytest.approx(wanted, abs=1e-6)
        for call, ((_, table), sigma) in enumerate(zip(tables, wanted, strict=True)):
            positions = form.calls[call % len(form.calls)]
            if guidance and form is FORMATS["z-image"]:
                continue  # one batch with captions of two lengths: test_z_image_with_guidance
            expected = turns(
                method, form.axes, form.theta, positions, GRID, sigma, length=4,
                lambda_s=config.lambda_s,
            )  # fmt: skip
            samples = 2 if form is FORMATS["z-image"] else 1  # its table holds the whole batch
            for sample in table.chunk(samples):
                assert_table(sample[: len(expected)], expected)
    embedder = getattr(pipe.transformer, CLASSES[type(pipe.transformer).__name__].attribute)
    assert getattr(embedder, "layout", ()) is not None  # written by one broadcast, no gather


def test_z_image_with_guidance(tables):
    """Two images with and two without the prompt in one call, captions of 16 and 36 tokens."""
    build, draw = FAMILIES["z-image"]
    pipe = build()
    apply_dype(pipe, CONFIG)
    draw(pipe, 128, 192, steps=2, guidance=3.0, batch=2)
    counts = [TEXT, TEXT, TEXT + 20, TEXT + 20]
    lengths = [pad_to_32(count) for count in counts]
    pictures = [place for n in lengths for place in grid(n + 1)]
    captions = []
    for count, n in zip(counts, lengths, strict=True):
        captions += [(1 + i, 0, 0) for i in range(n)] + [(0, 0, 0)] * (n - count)
    for (sigma, table), places in zip(tables, [pictures, captions] * 2, strict=True):
        expected = turns("yarn", (4, 6, 6), 256.0, places, GRID, sigma, length=4, lambda_s=1)
        assert_table(table, expected)


def test_non_square_in_turn(family):
    """Two sizes of one token count, one after the other: as on a fresh pipeline each."""
    pipe, draw, _ = family
    apply_dype(pipe, CONFIG)
    wide, tall = draw(pipe, 64, 256), draw(pipe, 256, 64)
    fresh = next(build for build, other in FAMILIES.values() if other is draw)()
    apply_dype(fresh, CONFIG)
    assert torch.equal(draw(fresh, 256, 64), tall)
    assert torch.equal(draw(fresh, 64, 256), wide)


def z_image_controlled() -> DiffusionPipeline:
    parts = zimage().components
    torch.manual_seed(0)
    control = diffusers.ZImageControlNetModel(
        dim=32,
        n_heads=2,
        n_kv_heads=2,
        n_refiner_layers=1,
        control_layers_places=[0],
        control_in_dim=4,
    )
    return diffusers.ZImageControlNetPipeline(**parts, controlnet=control)


def qwen_image_controlled() -> DiffusionPipeline:
    parts = qwen().components
    control = diffusers.QwenImageControlNetModel.from_transformer(
        parts["transformer"], num_layers=1, **HEADS
    )
    return diffusers.QwenImageControlNetPipeline(**parts, controlnet=control)


@pytest.mark.parametrize(
    ("build", "name"), [(z_image_controlled, "z-image"), (qwen_image_controlled, "qwen-image")]
)
def test_controlnets_follow(build, name, tables):
    """In their pipelines: the transformer's table at every step; then what was there before."""
    pipe, draw = quiet(build()), FAMILIES[name][1]
    attribute = CLASSES[type(pipe.controlnet).__name__].attribute
    image = Image.new("RGB", (192, 128), "red")
    stock = getattr(pipe.controlnet, attribute)
    before = draw(pipe, 128, 192, control_image=image)
    apply_dype(pipe, CONFIG)
    assert getattr(pipe.controlnet, attribute) is not getattr(pipe.transformer, attribute)
    draw(pipe, 128, 192, control_image=image)
    half = len(FORMATS[name].calls)
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert [sigma for sigma, _ in tables[:: 2 * half]] == pytest.approx(sigmas, abs=1e-6)
    for step in range(0, len(tables), 2 * half):
        for control, drawn in zip(tables[step:][:half], tables[step + half :][:half], strict=True):
            assert control[0] == drawn[0]
            assert torch.equal(control[1], drawn[1])
    remove_dype(pipe)
    assert getattr(pipe.controlnet, attribute) is stock
    assert torch.equal(draw(pipe, 128, 192, control_image=image), before)


def test_qwen_image_edit_keeps_its_reference(tables, monkeypatch):
    """The image follows every step; the one that is edited has the stock encoding."""
    parts = qwen().components
    pipe = diffusers.QwenImageEditPipeline(**parts, processor=None)
    small = lambda area, ratio: (96, 64, None)  # noqa: E731, in place of a megapixel
    monkeypatch.setattr(inspect.getmodule(type(pipe)), "calculate_dimensions", small)
    stock, _ = pipe.transformer.pos_embed([[(1, *GRID), (1, 4, 6)]], max_txt_seq_len=TEXT)
    apply_dype(pipe, CONFIG)
    draw_qwen(quiet(pipe), 128, 192, image=Image.new("RGB", (96, 64), "red"))
    assert len(tables) == 3
    drawn = GRID[0] * GRID[1]
    for sigma, table in tables:
        positions = grid(0, centered=True)
        expected = turns("yarn", (4, 6, 6), 10000.0, positions, GRID, sigma, length=4, lambda_s=1)
        assert_table(table[:drawn], expected)
        assert torch.equal(table[drawn:], stock[drawn:])


def test_bfloat16_keeps_the_tables(family, tables):
    """Sigma arrives rounded twice, as a timestep and as a fraction; its tables are exact."""
    pipe, draw, form = family
    for part in (pipe.transformer, pipe.vae):
        nn.Module.to(part, torch.bfloat16)  # diffusers' own warns of nothing
    apply_dype(pipe, CONFIG)
    assert draw(pipe, 128, 192).isfinite().all()
    wanted = [s for s in pipe.scheduler.sigmas[:-1].tolist() for _ in form.calls]
    assert [sigma for sigma, _ in tables] == pytest.approx(wanted, abs=4e-3)
    for call, (sigma, table) in enumerate(tables):
        positions = form.calls[call % len(form.calls)]
        expected = turns(
            "yarn", form.axes, form.theta, positions, GRID, sigma, length=4, lambda_s=1
        )
        assert_table(table[: len(expected)], expected)


def named(name: str) -> nn.Module:
    return type(name, (nn.Module,), {})()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: named("HiDreamImageTransformer2DModel"), "forces every image to 1024x1024"),
        (lambda: named("ErnieImageTransformer2DModel"), "returns angles"),
        (lambda: named("OvisImageTransformer2DModel"), "text counts on along the image's rows"),
        (lambda: named("LongCatImageTransformer2DModel"), "open question"),
        (lambda: named("BriaFibo2Transformer2DModel"), "references share one"),
        (lambda: named("QwenImage21Transformer2DModel"), "share one table"),
        (lambda: named("Flux"), "its forward has no timesteps"),
        (lambda: named("Strange"), "Strange is not supported; expected one of FluxTransformer"),
        (lambda: qwen_transformer(use_layer3d_rope=True), "Qwen-Image-Layered"),
        (lambda: zimage_transformer(siglip_feat_dim=8), "Z-Image-Omni"),
        (lambda: nn.Module(), "Module is not supported"),
    ],
)  # fmt: skip
def test_refused_by_name(model, message):
    with pytest.raises((TypeError, ValueError), match=message):
        apply_dype(model(), CONFIG)


def test_flux2_schedule():
    """Capped: the same sigmas at every size, as at the base resolution; else its own rule."""
    build, draw = FAMILIES["flux2"]
    pipe, family = build(), CLASSES["Flux2Transformer2DModel"]

    def sigmas(size, steps=50):
        mu, expected = noise_schedule(pipe.scheduler, size, size, steps, family)
        draw(pipe, 128, 128, steps=2)
        return mu, expected

    stock = [sigmas(size)[0] for size in (1024, 2048, 4096)]
    assert stock == pytest.approx([2.02, 3.23, 11.55], abs=0.01)
    apply_dype(pipe, DyPEConfig())
    capped = [sigmas(size) for size in (1024, 4096)]
    assert capped[0] == capped[1]
    assert capped[0][0] == pytest.approx(2.02, abs=0.01)
    remove_dype(pipe)
    assert sigmas(1024)[1] == pytest.approx(capped[0][1], abs=1e-6)
    other = UniPCMultistepScheduler.from_config(pipe.scheduler.config, use_flow_sigmas=True)
    before, pipe.scheduler = pipe.scheduler, other
    config = dict(other.config)
    with pytest.raises(ValueError, match="a UniPCMultistepScheduler cannot be set"):
        apply_dype(pipe, DyPEConfig())
    assert dict(other.config) == config
    pipe.scheduler = before
    apply_dype(pipe, DyPEConfig(max_shift=1.0))
    assert pipe.scheduler.config.shift == pytest.approx(math.e)
    with pytest.raises(ValueError, match="has a rule of its own"):
        apply_dype(pipe, DyPEConfig(max_shift=1.0, shift="model"))


@pytest.mark.parametrize("name", FAMILIES)
def test_pipelines_use_the_foretold_schedule(name):
    """What --dry_run prints is what the pipeline then uses, at the default shift."""
    build, draw = FAMILIES[name]
    pipe = build()
    family = CLASSES[type(pipe.transformer).__name__]
    for shift in (None, "model"):
        apply_dype(pipe, DyPEConfig(base_resolution=64, shift=shift))
        draw(pipe, 128, 192, steps=4)
        _, expected = noise_schedule(pipe.scheduler, 128, 192, 4, family)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)


def test_schedule_of_the_distilled_krea_2():
    """Its pipeline takes mu = 1.15 whatever the scheduler says."""
    build, draw = FAMILIES["krea2"]
    pipe = build()
    pipe.register_to_config(is_distilled=True)
    for shift in (None, "model"):
        apply_dype(pipe, DyPEConfig(base_resolution=64, shift=shift))
        draw(pipe, 128, 192, steps=4)
        mu, expected = noise_schedule(pipe.scheduler, 128, 192, 4, KREA2_TURBO)
        assert mu == pytest.approx(1.15)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="a rule of its own"):
        apply_dype(pipe, DyPEConfig(max_shift=3.0, shift="model"))


def test_pipeline_without_a_transformer():
    class StableDiffusionXLPipeline:
        unet = nn.Module()

    with pytest.raises(TypeError, match="StableDiffusionXLPipeline has no transformer"):
        apply_dype(StableDiffusionXLPipeline())


def test_second_apply_and_deep_copy(family):
    """Each replaces the one before; a deep copy drives its own."""
    pipe, draw, _ = family
    apply_dype(pipe, CONFIG)
    expected = draw(pipe, 128, 192)
    apply_dype(pipe, DyPEConfig("ntk"))
    apply_dype(pipe, CONFIG)
    other = copy.deepcopy(pipe.transformer)
    assert len(other._forward_pre_hooks) == 1
    apply_dype(pipe, DyPEConfig("ntk", base_resolution=32, shift="model"))
    draw(pipe, 64, 64, steps=2)
    pipe.transformer = other
    assert torch.equal(draw(pipe, 128, 192), expected)


def test_quantized_transformer():
    """Layers of another kind, the same encoding: quantization replaces linear layers alone."""
    build, draw = FAMILIES["qwen-image"]
    pipe = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of this namespace
        pipe.transformer = torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear})
        before = draw(pipe, 128, 192)
        apply_dype(pipe, CONFIG)
        assert not torch.equal(draw(pipe, 128, 192), before)
        remove_dype(pipe)
        assert torch.equal(draw(pipe, 128, 192), before)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_loaded_before_or_after(when):
    peft = pytest.importorskip("peft")
    build, draw = FAMILIES["z-image"]

    def adapt(pipe):
        torch.manual_seed(1)
        targets = ["to_q", "to_k", "to_v"]
        lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        pipe.transformer.add_adapter(lora)

    pipe, plain = build(), build()
    apply_dype(plain, CONFIG)
    steps = [adapt, lambda p: apply_dype(p, CONFIG)]
    for step in steps if when == "before" else reversed(steps):
        step(pipe)
    ours = draw(pipe, 128, 192)
    assert not torch.equal(ours, draw(plain, 128, 192))
    remove_dype(pipe)
    bare = build()
    adapt(bare)
    assert torch.equal(draw(pipe, 128, 192), draw(bare, 128, 192))


def test_flux_ip_adapter(pipe):
    """Attention processors of an IP-Adapter beside DyPE, put in before and after."""
    needs("FluxIPAdapterAttnProcessor")
    adapted = diffusers.models.transformers.transformer_flux.FluxIPAdapterAttnProcessor

    def adapt():
        torch.manual_seed(1)
        pipe.transformer.encoder_hid_proj = MultiIPAdapterImageProjection(
            [ImageProjection(TEXT, 8, num_image_text_embeds=2)]
        )
        pipe.transformer.config["encoder_hid_dim_type"] = "ip_image_proj"
        processors = {
            name: adapted(32, 8, num_tokens=(2,), scale=[1.0])
            if name.startswith("transformer_blocks")
            else processor
            for name, processor in pipe.transformer.attn_processors.items()
        }
        pipe.transformer.set_attn_processor(processors)

    image = {
        "ip_adapter_image_embeds": [seeded((1, 1, TEXT), 5)],
        "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, TEXT)],
    }
    apply_dype(pipe, CONFIG)
    without = latents(pipe, 128, 192)
    adapt()
    after = latents(pipe, 128, 192, **image)
    remove_dype(pipe)
    stock = latents(pipe, 128, 192, **image)
    apply_dype(pipe, CONFIG)
    assert torch.equal(latents(pipe, 128, 192, **image), after)
    assert not torch.equal(after, without)
    assert not torch.equal(after, stock)
