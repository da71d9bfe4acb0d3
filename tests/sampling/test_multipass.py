"""Multi-pass and image-to-image with the text-to-image pipelines of every family."""

import numpy as np
import pytest
import torch
from conftest import quiet, tiny_components, tiny_taesd
from diffusers import FluxPipeline, UniPCMultistepScheduler
from PIL import Image
from tiny import FAMILIES, TEXT, qwen3, random_tensor

from dype import DyPEConfig, apply_dype, noise_schedule
from dype.families import FAMILIES as CLASSES
from dype.sampling import multipass, sample
from dype.sampling.latents import encode_latents, noisy_latents
from dype.sampling.passes import resolve_passes


def flux() -> FluxPipeline:
    return quiet(FluxPipeline(**tiny_components()))


def flux_taesd() -> FluxPipeline:
    return quiet(FluxPipeline(**tiny_components() | {"vae": tiny_taesd()}))


BUILDS = {"flux": flux, "flux-taesd": flux_taesd} | {
    name: build for name, (build, _) in FAMILIES.items()
}
TWO = [{"scale": 0.5, "steps": 4}, {"scale": 1.0, "steps": 6, "strength": 0.5}]
SETTINGS = {"guidance": 0.0, "seed": 7, "max_sequence_length": 16}


def prompt_of(pipe):
    """Return a prompt; without text encoders, random embeddings as from `sample.encode_prompt`."""
    if pipe.text_encoder is not None:
        return "a red sun over blue mountains"
    text, mask = random_tensor((1, TEXT, TEXT), 1), torch.ones(1, TEXT, dtype=torch.bool)
    return {
        "ZImagePipeline": {"prompt_embeds": [text[0]]},
        "QwenImagePipeline": {"prompt_embeds": text, "prompt_embeds_mask": mask.long()},
        "Krea2Pipeline": {
            "prompt_embeds": random_tensor((1, TEXT, 2, TEXT), 1),
            "prompt_embeds_mask": mask,
        },
        "Flux2KleinPipeline": {"prompt_embeds": text},
        "ChromaPipeline": {"prompt_embeds": text, "prompt_attention_mask": mask},
    }[type(pipe).__name__]


@pytest.fixture(params=BUILDS)
def pipe(request):
    pipeline = BUILDS[request.param]()
    apply_dype(pipeline, DyPEConfig("yarn", base_resolution=32))
    return pipeline


def embedder_of(pipe):
    return getattr(pipe.transformer, CLASSES[type(pipe.transformer).__name__].attribute)


@pytest.fixture
def denoiser_calls(pipe, monkeypatch):
    """A list of (sigma, grid), to which every denoiser call appends."""
    calls = []
    original = pipe.transformer.forward

    def spy(*args, **kwargs):
        embedder = embedder_of(pipe)
        calls.append((float(embedder.sigma), embedder.grid))
        return original(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", spy)
    return calls


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_two_passes(pipe, denoiser_calls):
    """Each pass runs its own sigmas and grid at a non-square size, and the pixels repeat."""
    prompt = prompt_of(pipe)
    first = multipass.multipass(pipe, prompt, 128, 192, TWO, **SETTINGS)
    family = CLASSES[type(pipe.transformer).__name__]
    half_sigmas = noise_schedule.noise_schedule(pipe.scheduler, 64, 96, 4, family)[1]
    full_sigmas = noise_schedule.noise_schedule(pipe.scheduler, 128, 192, 6, family)[1]
    expected = [(sigma, (4, 6)) for sigma in half_sigmas[:-1]]
    expected += [(sigma, (8, 12)) for sigma in full_sigmas[3:-1]]
    assert [grid for _, grid in denoiser_calls] == [grid for _, grid in expected]
    expected_sigmas = pytest.approx([sigma for sigma, _ in expected], abs=1e-6)
    assert [sigma for sigma, _ in denoiser_calls] == expected_sigmas
    assert first.size == (192, 128)
    again = multipass.multipass(pipe, prompt, 128, 192, TWO, **SETTINGS)
    assert (pixels(again) == pixels(first)).all()


def test_passes_equal_two_calls_by_hand(pipe):
    """Two passes equal an image at half the size and its refinement at strength 0.5."""
    prompt = prompt_of(pipe)
    both = multipass.multipass(pipe, prompt, 128, 192, TWO, **SETTINGS)
    small = sample.generate(pipe, prompt, height=64, width=96, steps=4, **SETTINGS)
    large = sample.generate(
        pipe, prompt, height=128, width=192, steps=6, image=small, strength=0.5, **SETTINGS
    )
    assert (pixels(large) == pixels(both)).all()


def test_defaults():
    """The defaults are the pipeline's own guidance and seed 42."""
    pipe = flux()
    passes = [{"scale": 0.5, "steps": 2}, {"scale": 1.0, "steps": 2, "strength": 0.5}]
    by_default = multipass.multipass(pipe, "a red sun", 64, 96, passes=passes)
    defaults = {"guidance": 3.5, "seed": 42, "max_sequence_length": 512}
    explicit = multipass.multipass(pipe, "a red sun", 64, 96, passes, **defaults)
    assert (pixels(by_default) == pixels(explicit)).all()


def test_strength_1_starts_from_the_pipelines_own_noise(pipe):
    prompt = prompt_of(pipe)
    size = {"height": 64, "width": 96, "steps": 3}
    plain = sample.generate(pipe, prompt, **size, **SETTINGS)
    image = Image.effect_noise((96, 64), 80)
    refined = sample.generate(pipe, prompt, **size, image=image, strength=1.0, **SETTINGS)
    assert (pixels(refined) == pixels(plain)).all()


def test_embeddings_give_the_same_pixels_as_the_prompt():
    """FLUX.1 generates the same pixels from a prompt and from its `encode_prompt` embeddings."""
    pipe = flux()
    size = {"height": 64, "width": 96, "steps": 2}
    guided = {"negative_prompt": "a white moon", "true_cfg": 3.0, **SETTINGS, "guidance": 3.0}
    by_hand = pipe(
        "a red sun", negative_prompt="a white moon", true_cfg_scale=3.0, guidance_scale=3.0,
        height=64, width=96, num_inference_steps=2, max_sequence_length=16,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    assert (pixels(sample.generate(pipe, "a red sun", **size, **guided)) == pixels(by_hand)).all()
    texts = [sample.encode_prompt(pipe, text, 16) for text in ("a red sun", "a white moon")]
    pipe.text_encoder = pipe.text_encoder_2 = None
    guided["negative_prompt"] = texts[1]
    assert (pixels(sample.generate(pipe, texts[0], **size, **guided)) == pixels(by_hand)).all()


def perfect_forward(pipe, clean: torch.Tensor):
    """Return a `forward` whose velocity leads from x_t straight to the latents `clean`."""
    transformer = pipe.transformer
    family = CLASSES[type(transformer).__name__]

    def forward(*args, **kwargs):
        sigma = float(embedder_of(pipe).sigma)
        if family.timestep_arg == "t":  # Z-Image: a list of [C, 1, h, w], and the other sign
            return ([-(x - clean[0][:, None]) / sigma for x in kwargs["x"]],)
        x = kwargs["hidden_states"]
        return ((x - clean) / sigma,)

    return forward


def test_normalization_is_the_inverse_of_the_pipelines(pipe, monkeypatch):
    """A perfect transformer passes the latents of the encoder unchanged to the decoder."""
    vae = pipe.vae
    if hasattr(vae, "bn"):
        vae.bn.running_mean.copy_(random_tensor((16,), 3))
        vae.bn.running_var.copy_(random_tensor((16,), 4).abs() + 0.5)
    is_video = type(vae).__name__ == "AutoencoderKLQwenImage"
    if is_video:
        vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 1.5, 0.5, 1.0])
    image = Image.effect_noise((96, 64), 80).convert("RGB")
    tensor = torch.from_numpy(pixels(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        encoded = vae.encode(tensor[:, :, None] if is_video else tensor)
        encoded = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
        latents = encode_latents(pipe, image, torch.device("cpu"))
        clean = noisy_latents(pipe, latents, 0.0, 7, torch.float32)
    if hasattr(pipe, "_patchify_latents"):
        clean = pipe._pack_latents(clean)
    decoded = []
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **kw: decoded.append(z) or decode(z, **kw))
    monkeypatch.setattr(pipe.transformer, "forward", perfect_forward(pipe, clean))
    sample.generate(
        pipe, prompt_of(pipe), height=64, width=96, steps=5, image=image, strength=0.5, **SETTINGS
    )
    torch.testing.assert_close(decoded[0], encoded, atol=1e-4, rtol=1e-4)


def test_a_low_strength_keeps_the_image():
    """One step of twenty hardly changes an image of the demo model."""
    from dype.pipelines.loading import load_pipeline

    pipe = quiet(load_pipeline("demo"))
    apply_dype(pipe)
    settings = {**SETTINGS, "guidance": 4.0}
    size = {"height": 256, "width": 256}
    text = "a red sun over blue mountains"
    image = sample.generate(pipe, text, **size, steps=8, **{**settings, "seed": 8})
    weak, strong = (
        pixels(
            sample.generate(pipe, text, **size, steps=steps, image=image, strength=s, **settings)
        )
        for steps, s in ((20, 0.05), (8, 0.9))
    )
    original = pixels(image).astype(float)
    assert np.abs(weak - original).mean() < 12
    assert np.abs(strong - original).mean() > 2 * np.abs(weak - original).mean()


def test_sizes_of_the_passes():
    """Sizes are rounded to the nearest token; the last one is the size of the image."""
    passes = resolve_passes("threepass", 4096, 2736, 4, (0.5, 0.4), 1024)
    sizes = [(settings["height"], settings["width"]) for settings in passes]
    assert sizes == [(1024, 688), (2048, 1376), (4096, 2736)]
    assert [settings.get("strength") for settings in passes] == [None, 0.5, 0.4]
    small = resolve_passes("threepass", 64, 112, 4, (0.5, 0.4), 1024)
    assert small[0] == {"height": 16, "width": 32, "steps": 4}


BAD = {
    "no passes": ([], "empty"),
    "scales that do not grow": ([TWO[0], {**TWO[1], "scale": 0.5}], "scale is 0.5"),
    "a last scale that is not 1": ([TWO[0]], "expected 1"),
    "a scale above 1": ([{"scale": 2.0, "steps": 4}], "scale is 2.0"),
    "strength 0": ([TWO[0], {**TWO[1], "strength": 0}], "strength is 0"),
    "strength above 1": ([TWO[0], {**TWO[1], "strength": 1.5}], "strength is 1.5"),
    "no strength": ([TWO[0], {"scale": 1.0, "steps": 4}], "strength from the second on"),
    "strength in the first": ([{"scale": 1.0, "steps": 4, "strength": 0.5}], "from the second"),
    "no steps": ([{"scale": 1.0}], "expected scale and steps"),
    "half a step": ([{"scale": 1.0, "steps": 0.5}], "steps is 0.5"),
    "an unknown key": ([{"scale": 1.0, "steps": 4, "cfg": 3}], "'cfg'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_passes(name):
    """Bad passes are refused before the pipeline is used: here it is None."""
    passes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        multipass.multipass(None, "x", 128, 128, passes, **SETTINGS)


def test_bad_strength():
    pipe = flux()
    with pytest.raises(ValueError, match="strength is 0"):
        sample.generate(
            pipe, "x", height=64, width=64, steps=2, image=Image.new("RGB", (64, 64)),
            strength=0, **SETTINGS,
        )  # fmt: skip


def test_an_unknown_pipeline_or_autoencoder():
    pipe = flux()
    with pytest.raises(TypeError, match="expected one of FluxPipeline"):
        sample.encode_prompt(object(), "x")
    pipe.vae = torch.nn.Identity()
    with pytest.raises(TypeError, match="Identity is not supported"):
        encode_latents(pipe, Image.new("RGB", (64, 64)), torch.device("cpu"))
    with pytest.raises(TypeError, match="Identity is not supported"):  # before the first pass
        multipass.multipass(pipe, None, 128, 128, TWO, **SETTINGS)


def test_a_scheduler_that_makes_its_own_sigmas():
    """FluxPipeline with such a scheduler ignores the sigmas at which a refining pass starts."""
    pipe = flux()
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    with pytest.raises(TypeError, match="ignores sigmas with a UniPCMultistepScheduler"):
        multipass.multipass(pipe, None, 128, 128, TWO, **SETTINGS)


ENCODER_METHODS = {  # the method in which a pipeline calls its encoder, and the shape for 16 tokens
    "chroma": ("_get_t5_prompt_embeds", (TEXT, TEXT)),
    "flux2": ("_get_qwen3_prompt_embeds", (TEXT, TEXT)),
    "krea2": ("get_text_hidden_states", (TEXT, 2, TEXT)),
    "qwen-image": ("_get_qwen_prompt_embeds", (TEXT, TEXT)),
}


@pytest.mark.parametrize("name", [*ENCODER_METHODS, "z-image"])
def test_prompts_give_the_same_pixels_as_the_pipeline(name, monkeypatch):
    """The pixels agree with guidance and with the negative prompt that the pipeline implies.

    The encoders of four pipelines are a function from text to embeddings. Z-Image has a tiny real
    encoder.
    """
    pipeline = BUILDS[name]()
    if name == "z-image":
        pipeline.register_modules(**qwen3())
    else:
        method, shape = ENCODER_METHODS[name]

        def encode(*args, prompt=None, **options):
            text = prompt if prompt is not None else args[0]
            text = text if isinstance(text, str) else text[0]
            embeddings = random_tensor((1, *shape), sum(map(ord, text)))
            mask = torch.ones(1, TEXT, dtype=torch.long if name == "qwen-image" else torch.bool)
            return embeddings if name == "flux2" else (embeddings, mask)

        monkeypatch.setattr(pipeline, method, encode)
    scale = {"true_cfg_scale": 3.0, "negative_prompt": " "} if name == "qwen-image" else {}
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16}
    call |= scale or {"guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(7)
    plain = pipeline(prompt="a red sun", generator=generator, **call).images[0]
    settings = {**SETTINGS, "guidance": 0.0 if scale else 3.0}
    settings |= {"true_cfg": 3.0, "negative_prompt": " "} if scale else {}
    guided = sample.generate(pipeline, "a red sun", height=64, width=64, steps=2, **settings)
    assert (pixels(guided) == pixels(plain)).all()
    unguided = sample.generate(
        pipeline, "a red sun", height=64, width=64, steps=2,
        **settings | {"true_cfg": 1.0, "guidance": 0.0, "negative_prompt": None},
    )  # fmt: skip
    assert (pixels(unguided) != pixels(plain)).any()
