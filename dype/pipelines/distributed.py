"""Several processes: all generate each image together, or each generates a share of a sweep.

`torchrun --nproc-per-node=N run_dype.py ...` starts the processes. accelerate joins them to a
group, and gives each process its own device. With `--ulysses N` or `--ring N` diffusers' context
parallelism splits the tokens of each image between the processes. Without these flags each process
generates its share of the images. If a process dies, torchrun ends the others.
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
from dype.pipelines.processes import rank_and_world_size

device_mesh = lru_cache(init_device_mesh)  # because each new mesh creates new process groups
BARRIER_TIMEOUT = timedelta(days=1)  # how long a finished process waits for the others


def check_start(run, single_image: bool = False) -> None:
    """Raise UserError or UnavailableError if torchrun's processes cannot do a run.

    Args:
        run: a `RunSettings`.
        single_image: the run generates one image, so its processes cannot share a sweep.
    """
    _, count = rank_and_world_size()
    if count == 1:
        return
    if single_image and run.processes == 1:
        raise UserError(
            f"one image on {count} processes, expected --ulysses {count} or --ring {count}"
        )
    on_cpu = run.device == "cpu" or not torch.accelerator.is_available()
    num_gpus = torch.accelerator.device_count()
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", count))  # processes of this machine
    if num_gpus < num_local and (run.processes > 1 or not on_cpu):
        raise UnavailableError(f"{num_local} processes need a GPU each, and there are {num_gpus}")


def init_processes(run) -> PartialState:
    """Return accelerate's state after joining the other processes of a `RunSettings`, if any.

    Raises UnavailableError if they cannot join.
    """
    from diffusers.utils.logging import disable_progress_bar

    rank, count = rank_and_world_size()
    if count == 1:
        return PartialState()
    on_cpu = run.device == "cpu" or not torch.accelerator.is_available()
    if rank:
        disable_progress_bar()  # because rank 0 shows the same progress
    warnings.filterwarnings("ignore", "`torch.distributed._functional_collectives", FutureWarning)
    try:
        return PartialState(cpu=on_cpu, **{} if run.processes > 1 else {"timeout": BARRIER_TIMEOUT})
    except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
        raise UnavailableError(f"the {count} processes cannot join: {error}") from error


def check_heads(transformer: torch.nn.Module, ulysses: int) -> None:
    """Raise UserError if the processes cannot get equal numbers of a transformer's heads."""
    heads = transformer.config.num_attention_heads
    if heads % ulysses:
        raise UserError(f"--ulysses is {ulysses}, expected a divisor of its {heads} heads")


@contextmanager
def context_parallel(
    transformer: torch.nn.Module, ulysses: int = 1, ring: int = 1, equal_shards: bool = True
):
    """Split the tokens of each denoiser call within the context between the processes.

    Apply DyPE before, because on Qwen-Image the split is a hook on the embedder.

    Args:
        transformer: of a pipeline in `CONTEXT_PARALLEL_PIPELINES`.
        ulysses: number of processes that exchange heads.
        ring: number of processes that pass keys and values round.
        equal_shards: all processes get shards of equal size; otherwise the sizes may differ.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import remove_context_parallel

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    mesh = device_mesh(device.type, (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    uneven = {} if equal_shards else {"ulysses_anything": ulysses > 1, "ring_anything": ring > 1}
    config = ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring, mesh=mesh, **uneven)
    transformer.enable_parallelism(config=config)
    try:
        yield
    finally:
        remove_context_parallel(transformer, transformer._cp_plan)
        transformer._parallel_config = None
        for processor in transformer.attn_processors.values():
            processor._parallel_config = None
