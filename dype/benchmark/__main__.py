"""Measure the cost of DyPE: `python -m dype.benchmark [embedder | step | pipeline]`.

embedder: one call of each family's embedder, against the stock embedder and a plain copy.
step: one denoiser step with DyPE against one without.
pipeline: a whole image with DyPE against one without.
The command prints ratios and times; --save FILE.json writes all results.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from dype.benchmark import embedder, step
from dype.config import DEFAULT_LAMBDA_S, DYNAMIC_NAMES
from dype.errors import Parser, UserError, run_command
from dype.families import PIXELS_PER_TOKEN
from dype.pipelines.acceleration import check_attention
from dype.pipelines.choices import COMPILES, attention_backends
from dype.pipelines.devices import check_device, default_device, device_name, fast_dtype
from dype.sampling.records import write_atomically

RUNS = {"embedder": embedder.run, "step": step.time_steps, "pipeline": step.time_images}
SIZES = {"embedder": (1024, 2048, 4096, 8192), "step": (512, 1024), "pipeline": (512,)}
LARGE = (1024, 2048, 4096)  # of step and pipeline on a GPU
REPEATS = {"embedder": 9, "step": 15, "pipeline": 2}


EXAMPLES = """examples:
  python -m dype.benchmark --repeats 15
  python -m dype.benchmark step --sizes 512 1024 2048
  python -m dype.benchmark step --model flux --sizes 1024 2048 --device cuda
  python -m dype.benchmark pipeline --model flux --sizes 4096 --repeats 1 --alone
"""


def parser() -> Parser:
    """Return the parser of the command line."""
    argument_parser = Parser(
        prog="python -m dype.benchmark",
        description=__doc__,
        epilog=EXAMPLES,
    )
    flag = argument_parser.add_argument
    sizes = ", ".join(f"{name} {' '.join(map(str, sides))}" for name, sides in SIZES.items())
    repeats = ", ".join(f"{name} {count}" for name, count in REPEATS.items())
    families, methods = ", ".join(embedder.FAMILIES), ", ".join(DEFAULT_LAMBDA_S)
    flag("benchmark", nargs="?", choices=RUNS, default="embedder", metavar="BENCHMARK",
         help=f"benchmark to run; {', '.join(RUNS)} (default: %(default)s)")  # fmt: skip
    flag("--sizes", nargs="+", type=int, metavar="PX", help="sides of square images; multiples of "
         f"{PIXELS_PER_TOKEN} (default: {sizes}; on a GPU step and pipeline "
         f"{' '.join(map(str, LARGE))})")  # fmt: skip
    flag("--repeats", type=int, metavar="N", help="number of timed calls or images; 1 or more "
         f"(default: {repeats})")  # fmt: skip
    flag("--save", type=Path, metavar="FILE", help="file of the results; FILE.json for all, "
         "FILE.csv for the table of embedder (default: none)")  # fmt: skip
    flag("--device", metavar="NAME", help="device to measure; cpu or cuda (default: cpu for "
         "embedder, else the GPU, or cpu without one)")  # fmt: skip
    flag("--families", nargs="+", choices=embedder.FAMILIES, default=[*embedder.FAMILIES],
         metavar="NAME", help=f"model families of embedder; {families} (default: all)")  # fmt: skip
    flag("--model", choices=step.MODELS, metavar="NAME", help="model of step and pipeline; demo, "
         "or flux or z-image at real size with random weights (default: demo on a CPU, flux on a "
         "GPU)")  # fmt: skip
    flag("--method", choices=[*DEFAULT_LAMBDA_S, *DYNAMIC_NAMES], default="yarn", metavar="NAME",
         help=f"extrapolation method; {methods}; always with DyPE, so that dy_yarn is yarn "
         "(default: %(default)s)")  # fmt: skip
    flag("--attention", metavar="NAME", help="attention backend of step and pipeline; a name of "
         "diffusers, such as flash (default: the one that diffusers selects)")  # fmt: skip
    flag("--compile", choices=COMPILES, default="off", metavar="NAME", help="compilation in "
         f"step and pipeline; {', '.join(COMPILES)} (default: %(default)s)")  # fmt: skip
    flag("--steps", type=int, metavar="N", help="steps per image of pipeline; 1 or more "
         "(default: per model, see docs/models.md)")  # fmt: skip
    flag("--alone", action="store_true", help="run pipeline only with DyPE (default: in turns "
         "with and without)")  # fmt: skip
    return argument_parser


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Check the flags and fill in their defaults. Raises UserError, UnavailableError."""
    args.device = args.device or ("cpu" if args.benchmark == "embedder" else default_device())
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device is {args.device!r}, expected cpu or cuda")
    check_device(args.device, "none")
    large = args.device != "cpu" and args.benchmark != "embedder"
    args.sizes = args.sizes or (LARGE if large else SIZES[args.benchmark])
    args.repeats = REPEATS[args.benchmark] if args.repeats is None else args.repeats
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}, expected at least 1")
    endings = (".json", ".csv") if args.benchmark == "embedder" else (".json",)
    if args.save is not None and args.save.suffix not in endings:
        names = " or ".join(endings)
        raise UserError(f"--save is {args.save}, expected a name in {names} with {args.benchmark}")
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
    if args.benchmark != "embedder":
        check_attention(args.attention, args.device, args.dtype)
    return args


def machine_info(device: str) -> dict:
    """Return the names of the processor or GPU and of the torch version."""
    return {"device": device_name(device), "torch": torch.__version__}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Exit codes: 0, 2 for a mistake of the user, 1 for other failures, 130 after Ctrl-C.
    """

    def run() -> None:
        """Run the benchmark, print its results and write them to --save."""
        args = with_defaults(parser().parse_args(argv))
        embedder.use_single_thread(torch.device(args.device))
        machine = machine_info(args.device)
        print(f"{machine['device']}, torch {machine['torch']}")
        report = {"benchmark": args.benchmark} | machine | RUNS[args.benchmark](args)
        if args.save is not None and args.save.suffix == ".json":
            args.save.parent.mkdir(parents=True, exist_ok=True)
            write_atomically({args.save: json.dumps(report, indent=1).encode() + b"\n"})

    return run_command("dype.benchmark", run, out_of_memory="try smaller --sizes")


if __name__ == "__main__":
    sys.exit(main())
