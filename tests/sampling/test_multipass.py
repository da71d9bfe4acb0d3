"""Several passes and image-to-image, with the text-to-image pipelines of every family."""

import numpy as np
import pytest
import torch
from conftest import quiet, tiny_components
from diffusers import FluxPipeline
from PIL import Image
from tiny import FAMILIES, TEXT, qwen3, seeded

from dype import DyPEConfig, apply_dype, noise_schedule
from dype.families import FAMILIES as CLASSES
from dype.sampling import multipass, sample
from dype.sampling.latents import add_noise, encode_image


def flux() -> FluxPipeline:
    return quiet(FluxPipeline(**tiny_components()))


BUILDS = {"flux": flux} | {name: build for name, (build, _) in FAMILIES.items()}
TWO = [{"scale": 0.5, "steps": 4}, {"scale": 1.0, "steps": 6, "strength": 0.5}]
SETTINGS = {"guidance": 0.0, "seed": 7, "max_sequence_length": 16}


def prompt_of(pipe):
    """A prompt where there are encoders, else random embeddings as `sample.encode_prompt` gives them."""
    if pipe.text_encoder is not None:
        return "a red ring on teal leaves"
    text, mask = seeded((1, TEXT, TEXT), 1), torch.ones(1, TEXT, dtype=torch.bool)
    return {
        "ZImagePipeline": {"prompt_embeds": [text[0]]},
        "QwenImagePipeline": {"prompt_embeds": text, "prompt_embeds_mask": mask.long()},
        "Krea2Pipeline": {
            "prompt_embeds": seeded((1, TEXT, 2, TEXT), 1),
            "prompt_embeds_mask": mask,
        },
        "Flux2KleinPipeline": {"prompt_embeds": text},
        "ChromaPipeline": {"prompt_embeds": text, "prompt_attention_mask": mask},
    }[type(pipe).__name__]


@pytest.fixture(params=BUILDS)
def pipe(request):
    made = BUILDS[request.param]()
    apply_dype(made, DyPEConfig("yarn", base_resolution=32))
    return made


def embedder_of(pipe):
    return getattr(pipe.transformer, CLASSES[type(pipe.transformer).__name__].attribute)


@pytest.fixture
def seen(pipe, monkeypatch):
    """(sigma, grid) at every denoiser call."""
    calls = []
    original = pipe.transformer.forward

    def noted(*args, **kwargs):
        embedder = embedder_of(pipe)
        grid = embedder.grid if hasattr(embedder, "grid") else embedder.grids[0]
        calls.append((float(embedder.sigma), tuple(grid)))
        return original(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", noted)
    return calls


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_two_passes(pipe, seen):
    """The sigmas and the grid of each pass, a non-square size, the same pixels twice."""
    prompt = prompt_of(pipe)
    first = multipass.multipass(pipe, prompt, 128, 192, TWO, **SETTINGS)
    family = CLASSES[type(pipe.transformer).__name__]
    half = noise_schedule.noise_schedule(pipe.scheduler, 64, 96, 4, family)[1]
    whole = noise_schedule.noise_schedule(pipe.scheduler, 128, 192, 6, family)[1]
    wanted = [(sigma, (4, 6)) for sigma in half[:-1]]
    wanted += [(sigma, (8, 12)) for sigma in whole[3:-1]]
    assert [grid for _, grid in seen] == [grid for _, grid in wanted]
    assert [sigma for sigma, _ in seen] == pytest.approx([s for s, _ in wanted], abs=1e-6)
    assert first.size == (192, 128)
    again = multipass.multipass(pipe, prompt, 128, 192, TWO, **SETTINGS)
    assert (pixels(again) == pixels(first)).all()


def test_passes_are_what_one_would_do_by_hand(pipe):
    """An image at half the size, then one from it at strength 0.5."""
    prompt = prompt_of(pipe)
    both = multipass.multipass(pipe, prompt, 128, 192, TWO, **SETTINGS)
    small = sample.generate(pipe, prompt, height=64, width=96, steps=4, **SETTINGS)
    large = sample.generate(
        pipe, prompt, height=128, width=192, steps=6, image=small, strength=0.5, **SETTINGS
    )
    assert (pixels(large) == pixels(both)).all()


def test_the_least_that_can_be_said():
    """Guidance is the pipeline's own then, and the seed 42."""
    pipe = flux()
    passes = [{"scale": 0.5, "steps": 2}, {"scale": 1.0, "steps": 2, "strength": 0.5}]
    least = multipass.multipass(pipe, "a red ring", 64, 96, passes=passes)
    said = {"guidance": 3.5, "seed": 42, "max_sequence_length": 512}
    most = multipass.multipass(pipe, "a red ring", 64, 96, passes, **said)
    assert (pixels(least) == pixels(most)).all()


def test_strength_1_starts_from_the_pipelines_own_noise(pipe):
    prompt = prompt_of(pipe)
    size = {"height": 64, "width": 96, "steps": 3}
    plain = sample.generate(pipe, prompt, **size, **SETTINGS)
    other = Image.effect_noise((96, 64), 80)
    started = sample.generate(pipe, prompt, **size, image=other, strength=1.0, **SETTINGS)
    assert (pixels(started) == pixels(plain)).all()


def test_embeddings_once_are_the_pipelines_own():
    """FLUX.1 by its prompt, and by what `encode_prompt` made of it: the same pixels."""
    pipe = flux()
    size = {"height": 64, "width": 96, "steps": 2}
    guided = {"negative_prompt": "a blue disk", "true_cfg": 3.0, **SETTINGS, "guidance": 3.0}
    by_hand = pipe(
        "a red ring", negative_prompt="a blue disk", true_cfg_scale=3.0, guidance_scale=3.0,
        height=64, width=96, num_inference_steps=2, max_sequence_length=16,
        generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
    assert (pixels(sample.generate(pipe, "a red ring", **size, **guided)) == pixels(by_hand)).all()
    texts = [sample.encode_prompt(pipe, text, 16) for text in ("a red ring", "a blue disk")]
    pipe.text_encoder = pipe.text_encoder_2 = None
    guided["negative_prompt"] = texts[1]
    assert (pixels(sample.generate(pipe, texts[0], **size, **guided)) == pixels(by_hand)).all()


def perfect(pipe, clean: torch.Tensor):
    """A transformer that knows the answer: the velocity that leads from x_t straight to x_0."""
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
    """What the autoencoder encodes, refined by a perfect transformer, is what it is to decode."""
    vae = pipe.vae
    if hasattr(vae, "bn"):
        vae.bn.running_mean.copy_(seeded((16,), 3))
        vae.bn.running_var.copy_(seeded((16,), 4).abs() + 0.5)
    video = type(vae).__name__ == "AutoencoderKLQwenImage"
    if video:
        vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 1.5, 0.5, 1.0])
    picture = Image.effect_noise((96, 64), 80).convert("RGB")
    tensor = torch.from_numpy(pixels(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        coded = vae.encode(tensor[:, :, None] if video else tensor).latent_dist.mode()
        latents = encode_image(pipe, picture, torch.device("cpu"))
        clean = add_noise(pipe, latents, 0.0, 7, torch.float32)
    if hasattr(pipe, "_patchify_latents"):
        clean = pipe._pack_latents(clean)
    decoded = []
    original = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **more: decoded.append(z) or original(z, **more))
    monkeypatch.setattr(pipe.transformer, "forward", perfect(pipe, clean))
    sample.generate(
        pipe, prompt_of(pipe), height=64, width=96, steps=5, image=picture, strength=0.5, **SETTINGS
    )
    torch.testing.assert_close(decoded[0], coded, atol=1e-4, rtol=1e-4)


def test_a_low_strength_keeps_the_picture():
    """On the demo model: its own image, refined at one step of twenty, hardly changes."""
    from dype.pipelines.loading import load_pipeline

    pipe = quiet(load_pipeline("demo"))
    apply_dype(pipe, DyPEConfig("yarn_paper", base_resolution=256))
    settings = {**SETTINGS, "negative_prompt": "", "true_cfg": 5.0}
    size = {"height": 256, "width": 256}
    text = "a red ring on teal leaves"
    picture = sample.generate(pipe, text, **size, steps=8, **{**settings, "seed": 8})
    near, far = (
        pixels(
            sample.generate(pipe, text, **size, steps=steps, image=picture, strength=s, **settings)
        )
        for steps, s in ((20, 0.05), (8, 0.9))
    )
    before = pixels(picture).astype(float)
    assert np.abs(near - before).mean() < 12
    assert np.abs(far - before).mean() > 2 * np.abs(near - before).mean()


def test_sizes_of_the_passes():
    """To the nearest token, the last one as asked."""
    passes = multipass.resolve_passes("threepass", 4096, 2736, 4, (0.5, 0.4), 1024)
    sizes = [(one["height"], one["width"]) for one in passes]
    assert sizes == [(1024, 688), (2048, 1376), (4096, 2736)]
    assert [one.get("strength") for one in passes] == [None, 0.5, 0.4]
    small = multipass.resolve_passes("threepass", 64, 112, 4, (0.5, 0.4), 1024)
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
    "a word of its own": ([{"scale": 1.0, "steps": 4, "cfg": 3}], "'cfg'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_passes(name):
    """Before anything is drawn: there is no pipeline at all."""
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
        encode_image(pipe, Image.new("RGB", (64, 64)), torch.device("cpu"))


INNER = {  # where each pipeline asks its encoder, and what it gets for 16 tokens
    "chroma": ("_get_t5_prompt_embeds", (TEXT, TEXT)),
    "flux2": ("_get_qwen3_prompt_embeds", (TEXT, TEXT)),
    "krea2": ("get_text_hidden_states", (TEXT, 2, TEXT)),
    "qwen-image": ("_get_qwen_prompt_embeds", (TEXT, TEXT)),
}


@pytest.mark.parametrize("name", [*INNER, "z-image"])
def test_a_prompt_means_what_it_means_to_the_pipeline(name, monkeypatch):
    """With guidance, and with the negative prompt that the pipeline implies: the same pixels.

    The encoders of the four are a function from text to embeddings; Z-Image's is a tiny real one.
    """
    made = BUILDS[name]()
    if name == "z-image":
        made.register_modules(**qwen3())
    else:
        inner, shape = INNER[name]

        def embeddings(*args, prompt=None, **more):
            text = prompt if prompt is not None else args[0]
            text = text if isinstance(text, str) else text[0]
            found = seeded((1, *shape), sum(map(ord, text)))
            mask = torch.ones(1, TEXT, dtype=torch.long if name == "qwen-image" else torch.bool)
            return found if name == "flux2" else (found, mask)

        monkeypatch.setattr(made, inner, embeddings)
    scale = {"true_cfg_scale": 3.0, "negative_prompt": " "} if name == "qwen-image" else {}
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16}
    call |= scale or {"guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(7)
    plain = made(prompt="a red ring", generator=generator, **call).images[0]
    settings = {**SETTINGS, "guidance": 0.0 if scale else 3.0}
    settings |= {"true_cfg": 3.0, "negative_prompt": " "} if scale else {}
    drawn = sample.generate(made, "a red ring", height=64, width=64, steps=2, **settings)
    assert (pixels(drawn) == pixels(plain)).all()
    without = sample.generate(
        made, "a red ring", height=64, width=64, steps=2,
        **settings | {"true_cfg": 1.0, "guidance": 0.0, "negative_prompt": None},
    )  # fmt: skip
    assert (pixels(without) != pixels(plain)).any()
