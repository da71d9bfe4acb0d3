"""Apply DyPE to a stock diffusers pipeline, and remove it again."""

import inspect
from contextlib import contextmanager
from functools import partial

import torch

from dype.config import DyPEConfig
from dype.families import (
    PIXELS_PER_TOKEN,
    base_resolution,
    check_pipeline,
    check_supported,
    family_of,
    family_of_pipeline,
)
from dype.noise_schedule import (
    check_shift,
    restore_shift,
    scheduler_config_without_dype,
    set_shift,
    shift_settings,
)

# torch prints it if somebody exports with strict=True; before 2.7 it takes no reason
DISABLE_REASON = {"reason": "with DyPE, export by torch.export.export(..., strict=False)"}
if "reason" not in inspect.signature(torch.compiler.disable).parameters:
    DISABLE_REASON = {}


def apply_dype(target, config: DyPEConfig | None = None) -> None:
    """Replace the rotary embedders of a pipeline by DyPE's, which follow sigma.

    A forward pre-hook passes sigma and the token grid to the embedder at every denoiser call.
    Weights, state_dict keys and `forward` do not change. Any resolution can be generated
    afterwards. A second call replaces the first. It works before or after offloading, LoRA and
    `torch.compile`; call it before `enable_parallelism`, which hooks
    into the embedder of Qwen-Image.

    With a pipeline, the schedule shift is set in the scheduler's configuration too (see
    `shift_settings`). Pipelines that share a scheduler or a transformer share the change. A
    scheduler assigned later has the shift of its own configuration. A scheduler made with
    `from_config(pipe.scheduler.config)`, or saved, keeps our shift for good.

    Args:
        target: A pipeline (its transformer and controlnets), or a bare transformer or controlnet.
        config: settings; None: `DyPEConfig()`.

    Raises:
        TypeError: the transformer's class is not supported, or `config` is no DyPEConfig.
        ValueError: the transformer's configuration is not supported, or a shift of `config` has no
            effect on this schedule.
    """
    config = config or DyPEConfig()
    if not isinstance(config, DyPEConfig):
        raise TypeError(f'config is {config!r}, expected a DyPEConfig, as DyPEConfig("yarn")')
    check_pipeline(target)
    modules = transformer_and_controlnets(target)
    families = [check_supported(module) for module in modules]
    scheduler = getattr(target, "scheduler", None)
    if scheduler is not None:
        family = family_of_pipeline(target, families[0])
        check_shift(scheduler_config_without_dype(scheduler), config, family)
        is_static = "shift" in shift_settings(scheduler, config, family)
        if is_static and not hasattr(scheduler, "set_shift"):
            raise ValueError(
                f"the shift of a {type(scheduler).__name__} cannot be set, expected "
                "FlowMatchEulerDiscreteScheduler or shift model"
            )
    remove_dype(target)
    trained_tokens = (config.base_resolution or base_resolution(modules[0])) / PIXELS_PER_TOKEN
    for module, module_family in zip(modules, families, strict=True):
        stock = getattr(module, module_family.attribute)
        embedder = module_family.embedder(stock, config, trained_tokens)
        setattr(module, module_family.attribute, embedder)
        embedder.family = module_family
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        hook = partial(dype_pre_hook, module_family.attribute, names)
        embedder.hook = module.register_forward_pre_hook(hook, with_kwargs=True)
    if scheduler is not None:
        set_shift(scheduler, shift_settings(scheduler, config, family))


def remove_dype(target) -> None:
    """Restore the embedders that `apply_dype` replaced, and the shift unless it was changed since.

    Without DyPE it does nothing. Raises TypeError as `apply_dype` does.
    """
    for module in transformer_and_controlnets(target):
        attribute = family_of(module).attribute
        embedder = getattr(module, attribute)
        if hasattr(embedder, "stock"):
            embedder.hook.remove()
            setattr(module, attribute, embedder.stock)
    restore_shift(getattr(target, "scheduler", None))


@partial(torch.compiler.disable, **DISABLE_REASON)
def dype_pre_hook(
    attribute: str, names: list[str], module: torch.nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """Pass sigma and grid of a denoiser call to the embedder; return the call (FLUX: exact ids).

    The embedder is looked up on the module, so that a deep copy uses its own.

    Args:
        attribute: of the module, holds the embedder.
        names: argument names of the module's `forward`.
        module: the denoiser.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    call = dict(zip(names, args, strict=False)) | kwargs
    return (), getattr(module, attribute).prepare_call(module, call)


@contextmanager
def dype_applied(target, config: DyPEConfig | None = None):
    """Apply DyPE within a `with` block; restore the stock embedders after it, also on an error."""
    apply_dype(target, config)
    try:
        yield target
    finally:
        remove_dype(target)


def transformer_and_controlnets(target) -> list[torch.nn.Module]:
    """Return the transformer and controlnets of a pipeline, or the bare module; uncompiled."""
    if isinstance(target, torch.nn.Module):
        modules = [target]
    else:
        controlnet = getattr(target, "controlnet", None)
        nets = getattr(controlnet, "nets", [] if controlnet is None else [controlnet])
        modules = [getattr(target, "transformer", None), *nets]
    if modules[0] is None:
        raise TypeError(f"{type(target).__name__} has no transformer; expected a pipeline with one")
    return list(dict.fromkeys(getattr(module, "_orig_mod", module) for module in modules))
