"""Several processes: one image by all of them, or the images of a sweep shared out.

`torchrun --nproc-per-node=N run_dype.py ...` starts them; accelerate makes them a group, each with
a device of its own. With `--ulysses N` or `--ring N` all draw each image together, its tokens
split between them (diffusers' context parallelism); else each draws its share of the images. One
that dies ends the others: torchrun sees to that.
"""

import os
import warnings
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh

from dype.errors import UnavailableError, UserError
from dype.families import PIXELS_PER_TOKEN

# the pipelines whose transformers say how their tokens may be split, and if evenly: their texts all
# have --max_sequence_length tokens, Qwen-Image's as many as their words
CONTEXT_PARALLEL_PIPELINES = {
    "FluxPipeline": True,
    "Flux2Pipeline": True,
    "Flux2KleinPipeline": True,
    "QwenImagePipeline": False,
}
device_mesh = lru_cache(init_device_mesh)  # once each: every one that is made makes new groups
BARRIER_TIMEOUT = timedelta(days=1)  # of one that has drawn its share, with the others


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_processes(run, dry: bool) -> None:
    """Raise ValueError for an image that cannot be split as a `RunSettings` asks.

    dry: nothing is drawn, by however many.
    """
    count, (_, world_size) = run.processes, rank_and_world_size()
    if world_size > 1 and run.device and torch.device(run.device).index is not None:
        raise ValueError(
            f"--device is {run.device!r}, expected no number: each of the {world_size} processes "
            "has a card of its own"
        )
    if count == 1:
        return
    if run.ulysses > 1 and run.ring > 1:
        raise ValueError("--ulysses and --ring both split the tokens, expected one of them")
    name, pipeline = "ulysses" if run.ulysses > 1 else "ring", run.entry.pipeline
    if pipeline not in CONTEXT_PARALLEL_PIPELINES:
        raise ValueError(
            f"--{name} is {count}, but a {pipeline} cannot be split, expected {', '.join(CONTEXT_PARALLEL_PIPELINES)}"
        )
    if count != world_size and not dry:
        raise ValueError(
            f"--{name} is {count}, but there {'is' if world_size == 1 else 'are'} {world_size} "
            f"process{'es' * (world_size > 1)}, expected torchrun --nproc-per-node={count} "
            "run_dype.py ..."
        )
    if run.cache != "off":
        raise ValueError(f"--cache is {run.cache!r}, expected off with --{name}")
    if run.compile == "full":
        raise ValueError(f"--compile is 'full', expected blocks or off with --{name}")
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    backends, attention = Registry._supports_context_parallel, run.attention or "native"
    if name == "ring":  # joins partial results by their log-sum-exp, which native attention keeps
        backends = backends - {"native", "_native_npu"}
    if attention not in backends:
        raise ValueError(
            f"--{name} is {count}, but --attention {attention} cannot be split so, expected "
            f"--attention {', '.join(sorted(backends))}"
        )
    sizes = [(part["width"], part["height"]) for part in run.passes]
    tokens = {
        f"{width}x{height} px": width * height // PIXELS_PER_TOKEN**2 for width, height in sizes
    }
    tokens["--max_sequence_length"] = run.max_sequence_length
    for what, number in tokens.items():
        if CONTEXT_PARALLEL_PIPELINES[pipeline] and number % count:
            raise ValueError(
                f"--{name} is {count}, expected a divisor of the {number} tokens of {what}"
            )


def check_start(run, single_image: bool = False) -> None:
    """Raise UserError or UnavailableError if the processes that were started cannot do a run."""
    _, count = rank_and_world_size()
    if count == 1:
        return
    if single_image and run.processes == 1:
        raise UserError(
            f"one image on {count} processes, expected --ulysses {count} or --ring {count}"
        )
    on_cpu = run.device == "cpu" or not torch.accelerator.is_available()
    cards, here = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if cards < here and (run.processes > 1 or not on_cpu):
        raise UnavailableError(f"{here} processes need a GPU each, and there are {cards}")


def init_processes(run) -> PartialState:
    """Join the other processes, if there are any. Raises `UnavailableError`."""
    from diffusers.utils.logging import disable_progress_bar

    rank, count = rank_and_world_size()
    if count == 1:
        return PartialState()
    on_cpu = run.device == "cpu" or not torch.accelerator.is_available()
    if rank:
        disable_progress_bar()  # one process shows them
    warnings.filterwarnings("ignore", "`torch.distributed._functional_collectives", FutureWarning)
    try:
        return PartialState(cpu=on_cpu, **{} if run.processes > 1 else {"timeout": BARRIER_TIMEOUT})
    except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
        raise UnavailableError(f"the {count} processes cannot join: {error}") from error


def check_divisible(transformer: torch.nn.Module, ulysses: int) -> None:
    """Raise UserError if a transformer's heads cannot be shared out."""
    heads = transformer.config.num_attention_heads
    if heads % ulysses:
        raise UserError(f"--ulysses is {ulysses}, expected a divisor of its {heads} heads")


@contextmanager
def context_parallel(
    transformer: torch.nn.Module, ulysses: int = 1, ring: int = 1, evenly: bool = True
):
    """Split the tokens of every denoiser call between the processes of the group, for a while.

    DyPE is to be applied before: on Qwen-Image the split is a hook on the embedder. evenly: every
    number of tokens can be divided; else the shares may differ.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import remove_context_parallel

    where = torch.accelerator.current_accelerator() or torch.device("cpu")
    mesh = device_mesh(where.type, (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    uneven = {"ulysses_anything": ulysses > 1, "ring_anything": ring > 1} if not evenly else {}
    config = ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring, mesh=mesh, **uneven)
    transformer.enable_parallelism(config=config)
    try:
        yield
    finally:
        remove_context_parallel(transformer, transformer._cp_plan)
        transformer._parallel_config = None
        for processor in transformer.attn_processors.values():
            processor._parallel_config = None
