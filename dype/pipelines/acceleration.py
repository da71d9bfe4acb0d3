"""Faster steps by PyTorch and diffusers: torch.compile, attention backends, feature caches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from dype.errors import UnavailableError, first_line
from dype.pipelines.choices import CACHES, check_offload, describe_caches
from dype.pipelines.devices import DTYPES

CACHE_WARNING = (
    "--cache {}: steps may reuse features that were made under older frequencies; do not compare "
    "the results with others"
)
# pipeline classes whose attention always masks text tokens, which some backends do not support
MASKED_PIPELINES = ("ChromaPipeline", "Krea2Pipeline")


def use_attention(name: str | None):
    """Return a context that computes attention with a backend; None changes nothing.

    diffusers has one backend per process for models without a backend of their own. The context
    restores it at the end. The context raises the backend's error, often RuntimeError, if the
    backend cannot be used.
    """
    from diffusers.models.attention_dispatch import attention_backend

    return nullcontext() if name is None else attention_backend(name)


def check_attention(name: str | None, device: str, dtype: str, has_mask: bool = False) -> None:
    """Run an attention backend on 16 tokens to check that it works.

    Args:
        name: one of `attention_backends()`; None needs no check.
        device: the device to run on.
        dtype: a key of `DTYPES`.
        has_mask: the model's attention has a mask of tokens.

    Raises:
        UnavailableError: the backend is not installed, or does not support the device, the dtype
            or the mask.
    """
    if name is None:
        return
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    try:
        with use_attention(name):
            token = torch.zeros(1, 16, 2, 128, device=device, dtype=DTYPES[dtype])  # [B, S, H, D]
            mask = torch.ones(1, 1, 16, 16, device=device, dtype=torch.bool) if has_mask else None
            dispatch_attention_fn(token, token, token, attn_mask=mask)
    except Exception as error:  # because third-party kernels raise errors of any class
        raise UnavailableError(
            f"--attention {name} cannot be used here: {first_line(error)}; try --attention native"
        ) from error


def compile_transformer(pipe, extent: str, **compile_options) -> None:
    """Compile the pipeline's transformer in place.

    One graph serves all steps of a size and method.

    Args:
        pipe: a pipeline after `place_components`.
        extent: one of `COMPILES`; "blocks" compiles each kind of block once, "full" the whole
            transformer.
        compile_options: arguments of `torch.compile`.

    Raises:
        UserError: the pipeline's offloading moves weights within a compiled module.
    """
    if extent == "off":
        return
    check_offload(extent, pipe.dype_offload)
    # because each setting and size of a sweep needs its own graph
    torch._dynamo.config.recompile_limit = 256
    if extent == "blocks":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, **compile_options)
    else:
        pipe.transformer.compile(fullgraph=True, **compile_options)


@contextmanager
def watch_compiler(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    """Call functions when torch.compile begins and ends to work, within the context."""
    from torch._dynamo.callback import callback_handler

    def call_begin(*args) -> None:
        begin()

    def call_end(*args) -> None:
        end()

    callback_handler.register_start_callback(call_begin)
    callback_handler.register_end_callback(call_end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(call_begin)
        callback_handler.remove_end_callback(call_end)


@contextmanager
def use_feature_cache(pipe, name: str, steps: int):
    """Let denoiser calls within the context reuse features of earlier calls.

    Args:
        pipe: the pipeline.
        name: a key of `CACHES`, except "off".
        steps: number of steps that the image takes.

    Raises:
        ValueError: diffusers does not support this cache for the pipeline's class.
    """
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    pipeline_class = type(pipe).__name__
    if pipeline_class not in CACHES[name]:
        raise ValueError(f"--cache is {name!r}, but {describe_caches(pipeline_class)}")
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
