"""`run_dype.py` on a CPU where diffusers wants to see an accelerator per process.

    torchrun --nproc-per-node=2 tests/ranks.py [EXTRA] ARGUMENTS...

EXTRA is `die:RANK`: that process ends without a word at its second denoiser call; `raise:RANK`: it
raises an error there that the program knows nothing of; or `save:FILE`: afterwards the latents of
tiny pipelines, drawn by all processes together, go there.
"""

import functools
import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

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
    """A family -> latents of a picture of each size, by so many processes each."""
    found = {}
    for name, (build, draw) in FAMILIES.items():
        pipe, pictures = build(), []
        for size in SIZES:
            apply_dype(pipe, CONFIG)
            with distributed.split(pipe.transformer, ulysses, evenly=name != "qwen-image"):
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


def main(extra: str, *words: str) -> int:
    torch.accelerator.device_count = lambda: 2  # there is none to count on this machine
    torch.set_num_threads(1)
    kind, _, value = extra.partition(":")
    if kind in ("die", "raise"):
        mortal(int(value), kind)
    if kind == "save":
        leave, distributed.leave = distributed.leave, lambda: None  # the group is still needed
    code = run_dype.main([*words] if value else [extra, *words])
    if kind == "save":
        found = drawn(2)
        if int(os.environ["RANK"]) == 0:
            torch.save(found, value)
        leave()
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
