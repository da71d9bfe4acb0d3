"""Tiny pipelines of every family, of diffusers' own classes, with random weights and embeddings.

`FAMILIES` maps a name to (build, generate): build() -> pipeline, and
generate(pipeline, height, width, **arguments) -> latents.
"""

import diffusers
import torch
from conftest import needs, quiet, tiny_vae
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from dype.demo import model as demo_model

DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
TEXT = 16  # number of text tokens, and their width
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def random_tensor(shape, seed: int) -> torch.Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def common_arguments(height, width, steps, seed) -> dict:
    """Return the arguments that all pipelines take."""
    return {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }


def zimage_transformer(**changes) -> nn.Module:
    needs("ZImageTransformer2DModel")
    torch.manual_seed(0)
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
        **changes,
    ).eval()


def zimage(text_encoder=None, tokenizer=None) -> DiffusionPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    components = tiny_vae(), text_encoder, tokenizer, zimage_transformer()
    return quiet(diffusers.ZImagePipeline(scheduler, *components))


def qwen3() -> dict:
    """Return a tiny text encoder and a tokenizer with a chat template, for runs with a prompt."""
    # here, because the core's tests run on releases too old for it
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = demo_model.tokenizer("<bos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT,
        intermediate_size=TEXT,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return {"text_encoder": Qwen3Model(config).eval(), "tokenizer": tokenizer}


def generate_zimage(
    pipe, height, width, steps=3, seed=0, batch=1, guidance=0.0, tokens=TEXT, **arguments
):
    embeds = [random_tensor((tokens, TEXT), 1).to(pipe.device, pipe.dtype)] * batch
    negative = [random_tensor((tokens + 20, TEXT), 2).to(pipe.device, pipe.dtype)] * batch
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        guidance_scale=guidance,
        **common_arguments(height, width, steps, seed),
        **arguments,
    ).images


def qwen_vae() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def qwen_transformer(**changes) -> nn.Module:
    needs("QwenImageTransformer2DModel")
    torch.manual_seed(0)
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
        **changes,
    ).eval()


def qwen() -> DiffusionPipeline:
    transformer = qwen_transformer()
    scheduler = FlowMatchEulerDiscreteScheduler(
        **DYNAMIC | {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    )
    return quiet(diffusers.QwenImagePipeline(scheduler, qwen_vae(), None, None, transformer))


def prompt_embeddings(pipe, batch: int, *shape) -> dict:
    """Return random embeddings [batch, *shape] and masks of a prompt and of a negative prompt."""
    mask = torch.ones(batch, shape[0], dtype=torch.long, device=pipe.device)
    embeddings = {}
    for seed, prefix in enumerate(("", "negative_"), 1):
        text = random_tensor((1, *shape), seed).to(pipe.device, pipe.dtype)
        embeddings[f"{prefix}prompt_embeds"] = text.repeat(batch, *[1] * len(shape))
        embeddings[f"{prefix}prompt_embeds_mask"] = mask
    return embeddings


def generate_qwen(
    pipe, height, width, steps=3, seed=0, batch=1, guidance=1.0, tokens=TEXT, **arguments
):
    call = common_arguments(height, width, steps, seed)
    call |= prompt_embeddings(pipe, batch, tokens, TEXT)
    return pipe(**call, true_cfg_scale=guidance, **arguments).images


def krea2() -> DiffusionPipeline:
    needs("Krea2Transformer2DModel")
    torch.manual_seed(0)
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=TEXT,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    pipe = diffusers.Krea2Pipeline(
        scheduler, qwen_vae(), None, None, transformer, text_encoder_select_layers=(0, 1)
    )
    return quiet(pipe)


def generate_krea2(pipe, height, width, steps=3, seed=0, batch=1, guidance=0.0, **arguments):
    text = prompt_embeddings(pipe, batch, TEXT, 2, TEXT)
    call = {name: value.bool() if "mask" in name else value for name, value in text.items()}
    call |= common_arguments(height, width, steps, seed)
    return pipe(**call, guidance_scale=guidance, **arguments).images


def flux2() -> DiffusionPipeline:
    needs("Flux2Transformer2DModel")
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=TEXT,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        **HEADS,
    ).eval()
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return quiet(diffusers.Flux2KleinPipeline(scheduler, vae, None, None, transformer))


def generate_flux2(pipe, height, width, steps=3, seed=0, batch=1, guidance=1.0, **arguments):
    embeds = {
        f"{prefix}prompt_embeds": random_tensor((1, TEXT, TEXT), n)
        .repeat(batch, 1, 1)
        .to(pipe.device, pipe.dtype)
        for n, prefix in enumerate(("", "negative_"), 1)
    }
    call = common_arguments(height, width, steps, seed) | embeds
    return pipe(**call, guidance_scale=guidance, **arguments).images


def chroma() -> DiffusionPipeline:
    needs("ChromaTransformer2DModel")
    torch.manual_seed(0)
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
        **HEADS,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    return quiet(diffusers.ChromaPipeline(scheduler, tiny_vae(), None, None, transformer))


def generate_chroma(pipe, height, width, steps=3, seed=0, batch=1, guidance=0.0, **arguments):
    call = common_arguments(height, width, steps, seed)
    for name, value in prompt_embeddings(pipe, batch, TEXT, TEXT).items():
        is_mask = name.endswith("_mask")
        call[name.replace("embeds_mask", "attention_mask")] = value.bool() if is_mask else value
    return pipe(**call, guidance_scale=guidance, **arguments).images


FAMILIES = {
    "z-image": (zimage, generate_zimage),
    "qwen-image": (qwen, generate_qwen),
    "krea2": (krea2, generate_krea2),
    "flux2": (flux2, generate_flux2),
    "chroma": (chroma, generate_chroma),
}
