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
from dype.families import PIXELS_PER_TOKEN

# pipeline class whose transformer has a plan for context parallelism -> whether all processes get
# equal shards. Qwen-Image's shards may differ, because it does not pad its text tokens.
CONTEXT_PARALLEL_PIPELINES = {
    "FluxPipeline": True,
    "Flux2Pipeline": True,
    "Flux2KleinPipeline": True,
    "QwenImagePipeline": False,
}
device_mesh = lru_cache(init_device_mesh)  # because each new mesh creates new process groups
BARRIER_TIMEOUT = timedelta(days=1)  # how long a finished process waits for the others


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes, from torchrun's environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_processes(run, dry_run: bool) -> None:
    """Raise ValueError if a run's settings do not allow its --ulysses, --ring or --device.

    Args:
        run: a `RunSettings`.
        dry_run: nothing is generated, so the number of processes does not matter.
    """
    count, (_, world_size) = run.processes, rank_and_world_size()
    if world_size > 1 and run.device and torch.device(run.device).index is not None:
        raise ValueError(
            f"--device is {run.device!r}, expected no number: each of the {world_size} processes "
            "uses its own GPU"
        )
    if count == 1:
        return
    if run.ulysses > 1 and run.ring > 1:
        raise ValueError("--ulysses and --ring both split the tokens, expected one of them")
    flag, pipeline = "ulysses" if run.ulysses > 1 else "ring", run.entry.pipeline
    if pipeline not in CONTEXT_PARALLEL_PIPELINES:
        raise ValueError(
            f"--{flag} is {count}, but the tokens of a {pipeline} cannot be split, expected "
            f"{', '.join(CONTEXT_PARALLEL_PIPELINES)}"
        )
    if count != world_size and not dry_run:
        raise ValueError(
            f"--{flag} is {count}, but there {'is' if world_size == 1 else 'are'} {world_size} "
            f"process{'es' * (world_size > 1)}, expected torchrun --nproc-per-node={count} "
            "run_dype.py ..."
        )
    if run.cache != "off":
        raise ValueError(f"--cache is {run.cache!r}, expected off with --{flag}")
    if run.compile == "full":
        raise ValueError(f"--compile is 'full', expected blocks or off with --{flag}")
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    backends, attention = Registry._supports_context_parallel, run.attention or "native"
    if flag == "ring":  # because native attention does not return the log-sum-exp that ring needs
        backends = backends - {"native", "_native_npu"}
    if attention not in backends:
        raise ValueError(
            f"--{flag} is {count}, but --attention {attention} does not support it, expected "
            f"--attention {', '.join(sorted(backends))}"
        )
    sizes = [(image_pass["width"], image_pass["height"]) for image_pass in run.passes]
    tokens = {
        f"{width}x{height} px": width * height // PIXELS_PER_TOKEN**2 for width, height in sizes
    }
    tokens["--max_sequence_length"] = run.max_sequence_length
    for origin, number in tokens.items():
        if CONTEXT_PARALLEL_PIPELINES[pipeline] and number % count:
            raise ValueError(
                f"--{flag} is {count}, expected a divisor of the {number} tokens of {origin}"
            )


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
