"""Several processes: one picture by all of them, or the pictures of a sweep shared out.

`torchrun --nproc-per-node=N run_dype.py ...` starts them; accelerate makes them a group, each with
a device of its own. With `--ulysses N` or `--ring N` all draw each picture together, its tokens
split between them (diffusers' context parallelism); else each draws its share of the pictures. One
that dies ends the others: torchrun sees to that.
"""

import logging
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import torch

from dype.errors import ElsewhereError, UnavailableError, UserError
from dype.families import TOKEN

# the pipelines whose transformers say how their tokens may be split, and if evenly: their texts all
# have --max_sequence_length tokens, Qwen-Image's as many as their words
SPLIT = {
    "FluxPipeline": True,
    "Flux2Pipeline": True,
    "Flux2KleinPipeline": True,
    "QwenImagePipeline": False,
}
PATIENCE = timedelta(days=1)  # of one that has drawn its share, with the others


@dataclass(frozen=True)
class Team:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    count: int = 1
    together: bool = False  # all draw each picture; else each draws a share of them

    @property
    def main(self) -> bool:
        """Whether this is the one that prints and writes what all share."""
        return self.rank == 0

    def share(self, cells: list) -> list:
        """What this one draws."""
        return cells if self.together else cells[self.rank :: self.count]

    def agreed(self, make: Callable):
        """What `make` returned to the main one. Raises what it raised there, or ElsewhereError."""
        if self.count == 1:
            return make()
        message, error = [None], None
        if self.main:
            try:
                message = [(make(),)]
            except Exception as raised:  # again below, once the others know
                error = raised
        torch.distributed.broadcast_object_list(message)
        if error is not None:
            raise error
        if message[0] is None:
            raise ElsewhereError
        return message[0][0]

    def total(self, number: int) -> int:
        """The sum over all, when all have come this far."""
        if self.count == 1 or self.together:
            return number
        numbers = [None] * self.count
        torch.distributed.all_gather_object(numbers, number)
        return sum(numbers)


ALONE = Team()


def started() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def degree(flags: dict) -> int:
    """How many processes draw one picture."""
    return flags["ulysses"] * flags["ring"]


def check(flags: dict, model, passes: list[dict], dry: bool) -> None:
    """Raise ValueError for a picture that cannot be split as the flags ask.

    passes: with their sizes, as of `multipass.sized`. dry: nothing is drawn, by however many.
    """
    count, (_, started_count) = degree(flags), started()
    if started_count > 1 and flags["device"] and torch.device(flags["device"]).index is not None:
        raise ValueError(
            f"--device is {flags['device']!r}, expected no number: each of the {started_count} "
            "processes has a card of its own"
        )
    if count == 1:
        return
    if flags["ulysses"] > 1 and flags["ring"] > 1:
        raise ValueError("--ulysses and --ring both split the tokens, expected one of them")
    name = "ulysses" if flags["ulysses"] > 1 else "ring"
    if model.pipeline not in SPLIT:
        raise ValueError(
            f"--{name} is {count}, but a {model.pipeline} cannot be split, expected "
            f"{', '.join(SPLIT)}"
        )
    if count != started_count and not dry:
        raise ValueError(
            f"--{name} is {count}, but there {'is' if started_count == 1 else 'are'} "
            f"{started_count} process{'es' * (started_count > 1)}, expected torchrun "
            f"--nproc-per-node={count} run_dype.py ..."
        )
    if flags["cache"] != "off":
        raise ValueError(f"--cache is {flags['cache']!r}, expected off with --{name}")
    if flags["compile"] == "full":
        raise ValueError(f"--compile is 'full', expected blocks or off with --{name}")
    check_backend(name, count, flags["attention"] or "native")
    if not SPLIT[model.pipeline]:
        return
    for one in passes:
        tokens = one["height"] * one["width"] // TOKEN**2
        divides(name, count, tokens, f"tokens of {one['width']}x{one['height']} px")
    divides(name, count, flags["max_sequence_length"], "tokens of --max_sequence_length")


def divides(name: str, count: int, tokens: int, what: str) -> None:
    """Raise ValueError unless `count` divides a number of tokens."""
    if tokens % count:
        raise ValueError(f"--{name} is {count}, expected a divisor of the {tokens} {what}")


def check_backend(name: str, count: int, attention: str) -> None:
    """Raise ValueError for an attention backend that cannot be split so.

    Ring attention joins partial results by their log-sum-exp, which native attention keeps.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    known = Registry._supports_context_parallel
    if name == "ring":
        known = known - {"native", "_native_npu"}
    if attention not in known:
        raise ValueError(
            f"--{name} is {count}, but --attention {attention} cannot be split so, expected "
            f"--attention {', '.join(sorted(known))}"
        )


def join(flags: dict, alone: bool) -> Team:
    """Join the others, if there are any. Raises UserError, `UnavailableError`.

    alone: whether one picture is to be drawn.
    """
    rank, count = started()
    together = degree(flags) > 1
    if count == 1:
        return ALONE
    if not together and alone:
        raise UserError(
            f"one picture on {count} processes, expected --ulysses {count} or --ring {count}"
        )
    from accelerate import PartialState

    on_cpu = flags["device"] == "cpu" or not torch.accelerator.is_available()
    cards, here = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if cards < here and (together or not on_cpu):
        raise UnavailableError(f"{here} processes need a GPU each, and there are {cards}")
    try:
        PartialState(cpu=on_cpu, **{} if together else {"timeout": PATIENCE})
    except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
        raise UnavailableError(f"the {count} processes cannot join: {error}") from error
    mute(rank)
    return Team(rank, count, together)


def mute(rank: int) -> None:
    """Progress bars from one process alone; silence, one message at a time, what libraries say of
    each other."""
    from diffusers.utils.logging import disable_progress_bar

    if rank:
        disable_progress_bar()
    logging.getLogger("diffusers.models.modeling_utils").addFilter(
        lambda record: "enable_parallelism` is an experimental" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", "`torch.distributed._functional_collectives", FutureWarning)


def leave() -> None:
    """Take leave of the others, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def own_device(flags: dict) -> str | None:
    """--device, or among several processes this one's card; None: what there is."""
    if started()[1] == 1 or flags["device"] == "cpu":
        return flags["device"]
    from accelerate import PartialState

    own = PartialState().device
    return flags["device"] if own.type == "cpu" else str(own)


def check_heads(transformer: torch.nn.Module, ulysses: int) -> None:
    """Raise ValueError if a transformer's heads cannot be shared out."""
    if ulysses > 1 and transformer.config.num_attention_heads % ulysses:
        raise ValueError(
            f"--ulysses is {ulysses}, expected a divisor of its "
            f"{transformer.config.num_attention_heads} heads"
        )


@lru_cache
def mesh(device: str, ring: int, ulysses: int):
    """The processes as diffusers wants them; made once, since each makes new groups."""
    names = {"mesh_dim_names": ("ring", "ulysses")}
    return torch.distributed.device_mesh.init_device_mesh(device, (ring, ulysses), **names)


@contextmanager
def split(transformer: torch.nn.Module, ulysses: int = 1, ring: int = 1, evenly: bool = True):
    """Split the tokens of every denoiser call between the processes of the group, for a while.

    DyPE is to be applied before: on Qwen-Image the split is a hook on the embedder. evenly: every
    number of tokens can be divided; else the shares may differ.
    """
    if ulysses * ring == 1:
        yield
        return
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import remove_context_parallel

    where = torch.accelerator.current_accelerator() or torch.device("cpu")
    groups = mesh(where.type, ring, ulysses)
    uneven = {"ulysses_anything": ulysses > 1, "ring_anything": ring > 1} if not evenly else {}
    degrees = {"ulysses_degree": ulysses, "ring_degree": ring}
    config = ContextParallelConfig(**degrees, **uneven, mesh=groups)
    transformer.enable_parallelism(config=config)
    try:
        yield
    finally:
        remove_context_parallel(transformer, transformer._cp_plan)
        transformer._parallel_config = None
        for module in transformer.modules():
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                module.processor._parallel_config = None
