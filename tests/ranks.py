"""`run_dype.py` in two processes on a CPU, where diffusers wants to see an accelerator for each.

    python tests/ranks.py JOBS
    torchrun --nproc-per-node=2 tests/ranks.py [EXTRA] ARGUMENTS...

JOBS is JSON, a list of [EXTRA, ARGUMENTS...]: for each two children are forked after the imports,
and the rest are ended when one of them fails, as torchrun does. Prints their exit codes as JSON.
EXTRA is `die:RANK`: that process ends without a word at its second denoiser call; `raise:RANK`: it
raises an error there that the program knows nothing of; `save:FILE`: afterwards the latents of
tiny pipelines, drawn by all processes together, go there; or "".
"""

import functools
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from accelerate import PartialState

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import tiny  # noqa: E402
from conftest import latents, quiet, tiny_components  # noqa: E402
from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: E402

import run_dype  # noqa: E402
from dype import DyPEConfig, apply_dype  # noqa: E402
from dype.pipelines import distributed  # noqa: E402

CONFIG = DyPEConfig("yarn", base_resolution=64)
FAMILIES = {
    "flux": (lambda: quiet(FluxPipeline(**tiny_components())), latents),
    "flux2": tiny.FAMILIES["flux2"],
    "qwen-image": (tiny.qwen, functools.partial(tiny.draw_qwen, tokens=15)),
}
SIZES = (128, 192), (192, 128), (32, 64)  # the last has as many tokens as half of FLUX.2's text


def drawn(ulysses: int) -> dict[str, torch.Tensor]:
    """A family -> latents of an image of each size, by so many processes each."""
    found = {}
    for name, (build, draw) in FAMILIES.items():
        pipe, pictures = build(), []
        for size in SIZES:
            apply_dype(pipe, CONFIG)
            with distributed.context_parallel(
                pipe.transformer, ulysses, equal_shards=name != "qwen-image"
            ):
                pictures.append(draw(pipe, *size).flatten())
        found[name] = pictures
    return found


def mortal(rank: int, how: str) -> None:
    """Let one process die at its second denoiser call, or raise an error."""
    forward, calls = FluxTransformer2DModel.forward, []

    @functools.wraps(forward)
    def dying(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2 and int(os.environ["RANK"]) == rank:
            if how == "die":
                os._exit(3)
            raise KeyError("no such thing")
        return forward(*args, **kwargs)

    FluxTransformer2DModel.forward = dying


def work(extra: str, *words: str) -> int:
    """One process's part."""
    torch.accelerator.device_count = lambda: 2  # there is none to count on this machine
    torch.set_num_threads(1)
    kind, _, value = extra.partition(":")
    if kind in ("die", "raise"):
        mortal(int(value), kind)
    if kind == "save":
        leave = PartialState.destroy_process_group
        PartialState.destroy_process_group = lambda state: None  # it is still needed
    code = run_dype.main([*words])
    if kind == "save":
        found = drawn(2)
        if int(os.environ["RANK"]) == 0:
            torch.save(found, value)
        leave(PartialState())
    return code


def fork(extra: str, *words: str) -> list[int]:
    """The exit codes of both ranks; negative for one that was ended because the other failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in group.items()})
            code = 1
            try:
                code = work(extra, *words)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        children[pid] = rank
    codes = [0, 0]
    while children:
        pid, status = os.wait()
        codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status:
            for other in children:
                os.kill(other, signal.SIGTERM)
    return codes


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(work(*sys.argv[1:]))
    print(json.dumps([fork(*job) for job in json.loads(sys.argv[1])]))
