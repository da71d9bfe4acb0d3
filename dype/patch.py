"""Put DyPE into a stock diffusers pipeline, and take it out again."""

import inspect
from contextlib import contextmanager
from functools import partial

import torch

from dype.config import DyPEConfig
from dype.families import (
    PIXELS_PER_TOKEN,
    base_resolution,
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


def apply_dype(target, config: DyPEConfig | None = None) -> None:
    """Give a pipeline, or a bare transformer or controlnet, position encodings that follow sigma.

    The rotary embedder of the transformer (and of the pipeline's controlnets) is replaced, and a
    forward pre-hook hands it the noise level and the grid at every denoiser call. Weights,
    state_dict keys and `forward` stay as they are; any resolution may be drawn afterwards. A second
    call replaces the first. Works before or after offloading, LoRA and `torch.compile`; apply it
    before `enable_parallelism`.

    Given a pipeline, the schedule shift is set in the configuration of its scheduler too (see
    `shift_settings`). A scheduler or transformer that several pipelines share is changed for all
    of them. A scheduler that is put in later has the shift of its own configuration; one made with
    `from_config(pipe.scheduler.config)`, or saved, carries ours along for good.

    Raises TypeError if the transformer's class is not supported or `config` is no DyPEConfig,
    ValueError if its configuration is not supported or a shift is asked for that would have no
    effect.
    """
    config = config or DyPEConfig()
    if not isinstance(config, DyPEConfig):
        raise TypeError(f'config is {config!r}, expected a DyPEConfig, as DyPEConfig("yarn")')
    modules = transformer_and_controlnets(target)
    families = [check_supported(module) for module in modules]
    scheduler = getattr(target, "scheduler", None)
    if scheduler is not None:
        drawing = family_of_pipeline(target, families[0])
        check_shift(scheduler_config_without_dype(scheduler), config, drawing)
        static = "shift" in shift_settings(scheduler, config, drawing)
        if static and not hasattr(scheduler, "set_shift"):
            raise ValueError(
                f"the shift of a {type(scheduler).__name__} cannot be set, expected "
                "FlowMatchEulerDiscreteScheduler or shift model"
            )
    remove_dype(target)
    trained = (config.base_resolution or base_resolution(modules[0])) / PIXELS_PER_TOKEN
    for module, family in zip(modules, families, strict=True):
        stock = getattr(module, family.attribute)
        embedder = family.embedder(stock, config, trained)
        setattr(module, family.attribute, embedder)
        embedder.family = family
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        hook = partial(dype_pre_hook, family.attribute, names)
        embedder.hook = module.register_forward_pre_hook(hook, with_kwargs=True)
    if scheduler is not None:
        set_shift(scheduler, shift_settings(scheduler, config, drawing))


def remove_dype(target) -> None:
    """Put back the embedders that `apply_dype` replaced, and the schedule shift if still ours.

    Does nothing where DyPE is not applied. Raises TypeError as `apply_dype` does.
    """
    for module in transformer_and_controlnets(target):
        attribute = family_of(module).attribute
        embedder = getattr(module, attribute)
        if hasattr(embedder, "stock"):
            embedder.hook.remove()
            setattr(module, attribute, embedder.stock)
    restore_shift(getattr(target, "scheduler", None))


@torch.compiler.disable
def dype_pre_hook(
    attribute: str, names: list[str], module: torch.nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """The pre-hook. Looks its embedder up on the module, so that a deep copy drives its own.

    attribute: where that sits. names: of the arguments of the module's `forward`.
    """
    call = dict(zip(names, args, strict=False)) | kwargs
    return (), getattr(module, attribute).prepare_call(module, call)


@contextmanager
def dype_applied(target, config: DyPEConfig | None = None):
    """`apply_dype` for a while: on leaving, by an exception too, the stock embedders are back."""
    apply_dype(target, config)
    try:
        yield target
    finally:
        remove_dype(target)


def transformer_and_controlnets(target) -> list[torch.nn.Module]:
    """The transformer and the controlnets of a pipeline, or the one module given, uncompiled."""
    if isinstance(target, torch.nn.Module):
        found = [target]
    else:
        controlnet = getattr(target, "controlnet", None)
        nets = getattr(controlnet, "nets", [] if controlnet is None else [controlnet])
        found = [getattr(target, "transformer", None), *nets]
    if found[0] is None:
        raise TypeError(f"{type(target).__name__} has no transformer; expected a pipeline with one")
    return list(dict.fromkeys(getattr(module, "_orig_mod", module) for module in found))
