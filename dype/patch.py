"""Apply DyPE to a stock diffusers pipeline, and remove it again."""

import inspect
from contextlib import contextmanager
from functools import partial

import torch

from dype.config import DyPEConfig
from dype.embedders import DyPEEmbedND, DyPEFluxPosEmbed
from dype.embedders_complex import DyPEQwenEmbedRope, DyPEZImageRopeEmbedder
from dype.families import (
    PIXELS_PER_TOKEN,
    UNSUPPORTED_IF,
    Family,
    base_resolution,
    check_pairs,
    check_pipeline,
    check_text_repeat,
    family_of,
    family_of_pipeline,
)
from dype.noise_schedule import ScheduleCheck, check_scheduler, restore_shift, set_shift

EMBEDDERS = {
    embedder.__name__: embedder
    for embedder in (
        DyPEFluxPosEmbed,
        DyPEEmbedND,
        DyPEQwenEmbedRope,
        DyPEZImageRopeEmbedder,
    )
}
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

    With a pipeline, the scheduler's `set_timesteps` gets the schedule shift too (see
    `DyPETimesteps`). Its configuration stays: a scheduler that is saved, or made with
    `from_config(pipe.scheduler.config)`, has no shift of ours; a deep copy has it. Pipelines that
    share a scheduler or a transformer share the change, also that of a later call with the bare
    transformer. A stretched image with another schedule gives a `ScheduleWarning`: after
    `pipe.scheduler = ...`, or with a bare transformer alone. Then call `apply_dype(pipe)` again, or
    use `DyPEConfig(shift="model")`.

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
    for module, family in zip(modules, families, strict=True):
        check_config(config, module, family)
    scheduler = getattr(target, "scheduler", None)
    schedulers = [pair for pair in schedulers_of(modules) if pair[0] is not scheduler]
    if scheduler is not None:
        family = family_of_pipeline(target, families[0])
        check_scheduler(scheduler, config, family)
        schedulers.append((scheduler, family))
    remove_dype(target)
    trained_tokens = (config.base_resolution or base_resolution(modules[0])) / PIXELS_PER_TOKEN
    for module, module_family in zip(modules, families, strict=True):
        stock = getattr(module, module_family.attribute)
        embedder = EMBEDDERS[module_family.embedder](stock, config, trained_tokens)
        setattr(module, module_family.attribute, embedder)
        embedder.family, embedder.schedulers = module_family, schedulers
        embedder.check_schedule = ScheduleCheck(config, module_family)
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        hook = partial(dype_pre_hook, module_family.attribute, names)
        embedder.hook = module.register_forward_pre_hook(hook, with_kwargs=True)
    for scheduler, family in schedulers:
        set_shift(scheduler, config, family)


def remove_dype(target) -> None:
    """Restore the embedders and the schedulers that `apply_dype` changed.

    These are the schedulers of all pipelines with this transformer. Without DyPE it does nothing.
    Raises TypeError as `apply_dype` does.
    """
    modules = transformer_and_controlnets(target)
    schedulers = [scheduler for scheduler, _ in schedulers_of(modules)]
    for module in modules:
        attribute = family_of(module).attribute
        embedder = getattr(module, attribute)
        if hasattr(embedder, "stock"):
            embedder.hook.remove()
            setattr(module, attribute, embedder.stock)
    for scheduler in [*schedulers, getattr(target, "scheduler", None)]:
        restore_shift(scheduler)


def schedulers_of(modules: list[torch.nn.Module]) -> list[tuple]:
    """Return the schedulers, with their families, of the pipelines that gave DyPE to modules."""
    embedders = [getattr(module, family_of(module).attribute) for module in modules]
    pairs = [pair for embedder in embedders for pair in getattr(embedder, "schedulers", [])]
    return list({id(pair[0]): pair for pair in pairs}.values())


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


def check_supported(module: torch.nn.Module) -> Family:
    """Return the family of a module. Raise TypeError or ValueError if DyPE cannot enter it."""
    family, config = family_of(module), getattr(module, "config", {})
    reasons = [reason for entry, reason in UNSUPPORTED_IF.items() if config.get(entry)]
    if family.timestep_arg not in inspect.signature(type(module).forward).parameters:
        reasons = [
            f"its forward has no {family.timestep_arg}, expected the original class's arguments"
        ]
    if reasons:
        raise ValueError(f"this {type(module).__name__} is not supported: {reasons[0]}")
    stock = getattr(module, family.attribute)
    stock = getattr(stock, "stock", stock)
    if not hasattr(stock, "theta"):
        raise TypeError(
            f"its {type(stock).__name__} has no theta, expected the original rotary embedder"
        )
    EMBEDDERS[family.embedder].check_stock(stock)
    return family


def check_config(config, module: torch.nn.Module, family: Family) -> None:
    """Raise ValueError if a setting does not fit a transformer or controlnet."""
    check_text_repeat(config, family)
    embedder = getattr(module, family.attribute)
    axes_dim = getattr(embedder, "axes_dim", None) or embedder.axes_dims
    check_pairs(config, max(axes_dim[1:3]) // 2)


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
        raise TypeError(
            f"{type(target).__name__} has no transformer; expected the pipeline that generates, "
            "once its transformer is loaded"
        )
    return list(dict.fromkeys(getattr(module, "_orig_mod", module) for module in modules))
