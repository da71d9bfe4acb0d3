"""What DyPE costs: `python -m dype.benchmark [embedder | step | pipeline]`.

embedder: a call of each family's embedder, beside stock and a plain copy. step: a denoiser step
with and without DyPE, in pairs. pipeline: whole images. Ratios come first; the last line is all
of it as JSON.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from dype.benchmark import embedder, step
from dype.config import DEFAULT_LAMBDA_S
from dype.errors import Parser, UserError, run_command
from dype.families import PIXELS_PER_TOKEN
from dype.pipelines.acceleration import COMPILES, attention_backends, check_attention
from dype.pipelines.devices import check_device, default_device, fast_dtype

RUNS = {"embedder": embedder.run, "step": step.time_steps, "pipeline": step.time_images}
SIZES = {"embedder": (1024, 2048, 4096, 8192), "step": (512, 1024), "pipeline": (512,)}
LARGE = (1024, 2048, 4096)  # of step and pipeline on a GPU
REPEATS = {"embedder": 9, "step": 15, "pipeline": 2}


def parser() -> Parser:
    made = Parser(prog="python -m dype.benchmark", description=__doc__)
    flag = made.add_argument
    sizes = ", ".join(f"{name} {' '.join(map(str, sides))}" for name, sides in SIZES.items())
    repeats = ", ".join(f"{name} {count}" for name, count in REPEATS.items())
    flag("what", nargs="?", choices=RUNS, default="embedder")
    flag("--sizes", nargs="+", type=int, metavar="PX", help=f"(default: {sizes}; on a GPU step and "
         f"pipeline {' '.join(map(str, LARGE))})")  # fmt: skip
    flag("--repeats", type=int, metavar="N", help=f"(default: {repeats})")
    flag("--device", metavar="NAME", help="cpu or cuda (default: cpu for embedder, else the best)")
    flag("--families", nargs="+", choices=embedder.FAMILIES, default=[*embedder.FAMILIES],
         help="of embedder (default: all)")  # fmt: skip
    flag("--model", choices=step.MODELS, help="of step, pipeline: demo, or the real size "
         "with random weights (default: demo on a CPU, flux on a GPU)")  # fmt: skip
    flag("--method", choices=DEFAULT_LAMBDA_S, default="yarn", help="(default: yarn)")
    flag("--attention", metavar="NAME", help="of step, pipeline (default: diffusers' own)")
    flag("--compile", choices=COMPILES, default="off", help="of step, pipeline (default: off)")
    flag("--steps", type=int, metavar="N", help="of pipeline (default: the model's)")
    flag("--alone", action="store_true", help="of pipeline: with DyPE only (default: in turns)")
    return made


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with their defaults, checked. Raises UserError, `UnavailableError`."""
    args.device = args.device or ("cpu" if args.what == "embedder" else default_device())
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device is {args.device!r}, expected cpu or cuda")
    check_device(args.device, "none")
    large = args.device != "cpu" and args.what != "embedder"
    args.sizes = args.sizes or (LARGE if large else SIZES[args.what])
    args.repeats = REPEATS[args.what] if args.repeats is None else args.repeats
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, expected at least 1")
    for size in args.sizes:
        if size < PIXELS_PER_TOKEN or size % PIXELS_PER_TOKEN:
            raise UserError(f"--sizes has {size}, expected multiples of {PIXELS_PER_TOKEN} px")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}, expected at least 1")
    if args.attention is not None and args.attention not in attention_backends():
        raise UserError(
            f"--attention is {args.attention!r}, expected {', '.join(attention_backends())}"
        )
    args.model = args.model or ("demo" if args.device == "cpu" else "flux")
    args.dtype = "float32" if args.model == "demo" else fast_dtype(args.device)
    if args.what != "embedder":
        check_attention(args.attention, args.device, args.dtype)
    return args


def machine_info(device: str) -> dict:
    """What the figures hold for."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((one.split(": ")[1] for one in lines if one.startswith("model name")), name)
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": name, "torch": torch.__version__}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 1 for the rest."""

    def run() -> None:
        args = with_defaults(parser().parse_args(argv))
        embedder.single_thread(torch.device(args.device))
        print(
            json.dumps(
                {"benchmark": args.what, **machine_info(args.device), **RUNS[args.what](args)}
            )
        )

    return run_command("dype.benchmark", run, out_of_memory="try smaller --sizes")


if __name__ == "__main__":
    sys.exit(main())
