"""Cheaper steps by what the ecosystem has: compilers, attention kernels, caches of features."""

from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from dype.errors import UnavailableError, UserError, first_line
from dype.pipelines.devices import DTYPES

COMPILES = ("off", "blocks", "full")
# --cache -> the pipelines where diffusers supports it: its blocks are known there, and every
# denoiser call names itself. On FLUX.2 its first-block cache stumbles over the second kind of
# block (diffusers 0.42.1); MagCache's ratios were measured on FLUX.1-dev alone.
CACHES = {
    "off": (),
    "first_block": ("FluxPipeline", "QwenImagePipeline"),
    "taylorseer": ("FluxPipeline", "Flux2KleinPipeline", "QwenImagePipeline"),
    "magcache": ("FluxPipeline",),
}
CACHE_WARNING = (
    "--cache {}: steps may reuse features that were made under older frequencies; not for "
    "results that are to be compared"
)
USES_ATTENTION_MASK = (
    "ChromaPipeline",
    "Krea2Pipeline",
)  # whose attention always has a mask of text tokens


def attention_backends() -> list[str]:
    """The attention backends that diffusers knows, installed or not."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [backend.value for backend in AttentionBackendName]


def use_attention(name: str | None):
    """A context with attention by one of `backends()`; None changes nothing.

    diffusers has one backend per process where a model has none of its own, and that one is put
    back on leaving. Raises RuntimeError, or whatever the backend does, if it cannot be used.
    """
    from diffusers.models.attention_dispatch import attention_backend

    return nullcontext() if name is None else attention_backend(name)


def check_attention(name: str | None, device: str, dtype: str, masked: bool = False) -> None:
    """Try a backend on a few tokens. Raises `UnavailableError` if it is not installed, or not for
    this device, number format or, if `masked`, a mask of tokens."""
    if name is None:
        return
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    try:
        with use_attention(name):
            token = torch.zeros(1, 16, 2, 128, device=device, dtype=DTYPES[dtype])  # [B, S, H, D]
            mask = torch.ones(1, 1, 16, 16, device=device, dtype=torch.bool) if masked else None
            dispatch_attention_fn(token, token, token, attn_mask=mask)
    except Exception as error:  # whatever somebody's kernel says
        raise UnavailableError(
            f"--attention {name} cannot be used here: {first_line(error)}; try --attention native"
        ) from error


def check_offload(how: str, offload: str) -> None:
    """Raise UserError if weights are moved within what is compiled."""
    moving = {"blocks": ("group", "sequential"), "full": ("model", "group", "sequential")}
    if offload in moving.get(how, ()):
        raise UserError(
            f"--compile is {how!r}, but --offload {offload} moves weights within it, expected one "
            "of them off"
        )


def compile_transformer(pipe, how: str, **more) -> None:
    """Compile the transformer in place: "blocks" each kind of block once, "full" the whole.

    One graph serves all steps of a size and method. more: of `torch.compile`. Raises UserError
    where weights are moved within what is compiled.
    """
    if how == "off":
        return
    check_offload(how, pipe.dype_offload)
    torch._dynamo.config.recompile_limit = 256  # settings and sizes of one sweep, each anew
    if how == "blocks":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, **more)
    else:
        pipe.transformer.compile(fullgraph=True, **more)


@contextmanager
def use_feature_cache(pipe, name: str, steps: int):
    """Let denoiser calls reuse features of earlier ones for a while: a key of CACHES but "off".

    steps: that the drawing takes. Raises ValueError where diffusers has no support for it.
    """
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    kind = type(pipe).__name__
    if kind not in CACHES[name]:
        raise ValueError(f"--cache is {name!r}, but {describe_caches(kind)}")
    configs = {
        "first_block": FirstBlockCacheConfig,
        "taylorseer": TaylorSeerCacheConfig,
        "magcache": partial(MagCacheConfig, num_inference_steps=steps, mag_ratios=FLUX_MAG_RATIOS),
    }
    pipe.transformer.enable_cache(configs[name]())
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


def describe_caches(kind: str) -> str:
    """Which caches a class of pipelines has, as the end of a sentence."""
    known = [name for name, kinds in CACHES.items() if kind in kinds]
    has = ", ".join(known) or "none in diffusers"
    return f"a {kind} has {has}, expected {', '.join([*known, 'off'])}"
