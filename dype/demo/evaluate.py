"""The ground-truth table: `python -m dype.demo.evaluate`, in under two hours on two CPU cores.

Generates seeded prompts with the demo model under many settings, and scores layout, texture and
both against rendered scenes of the same size. An image that is there is not generated again. A
setting is `base`, or a method without DyPE (`yarn`) or with it (`dy_yarn`); `dy_yarn:1:2` says
lambda_s and lambda_t, and `:NAME=VALUE` DyPEConfig's other numbers. Then comes a control:
`:reversed` (time runs the wrong way), `:model` (the model's own noise schedule instead of the
capped one) or `:progressive` (as `run_dype.py --progressive`). Prompts of seed 0 are there to
report, those of another seed to choose by. Needs requirements-dev.txt.
"""

import hashlib
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import starmap, takewhile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dype.config import check_choice, check_number
from dype.demo.experiments import Cell, couples, paths_of, plan, setting, shown_size
from dype.demo.scenes import HELD_OUT, TRIPLES, Scene, sample_scene
from dype.errors import Parser, raise_user_errors, run_command
from dype.patch import apply_dype
from dype.pipelines.catalog import MODELS
from dype.pipelines.devices import autocast, default_device, fast_dtype
from dype.pipelines.loading import load_pipeline
from dype.sampling import multipass, records
from dype.sweep.grid import parse_size

try:
    from dype.demo import report
except ModuleNotFoundError as error:
    sys.exit(f"there is no {error.name}; pip install {error.name}")


DEMO = MODELS["demo"]
PROCESSES = min(os.cpu_count() or 1, 8)
FORMATS = ("bfloat16", "float32")


def sampled(args) -> list[Scene]:
    """The scenes that the prompts ask for, 64 or as many as wanted."""
    rng = np.random.default_rng(args.seed)
    triples = HELD_OUT if args.held_out else TRIPLES
    return [sample_scene(rng, triples) for _ in range(max(64, args.count))]


def folder_of(args) -> Path:
    """Of the images of a seed."""
    return args.out / f"seed_{args.seed}{'_held_out' * args.held_out}"


def passes_of(cell: Cell, steps: int) -> list[dict]:
    """For `run_passes`. Raises ValueError for a size that progressive passes do not begin below."""
    name = "progressive" if cell.setting.control == "progressive" else "single"
    return multipass.resolve_passes(name, *cell.size, steps, (), DEMO.base_resolution)


def draw(cell: Cell, i: int, path: Path, caption: str, args) -> None:
    """Draw an image of the i-th prompt, from noise of seed 10000 `--seed` + i."""
    pipe, hook = pipeline(args.weights), nullcontext()
    apply_dype(pipe, cell.setting.config)
    if cell.setting.control == "reversed":
        hook = pipe.transformer.register_forward_pre_hook(reverse, with_kwargs=True)
    with autocast(pipe.device, args.dtype), hook:
        picture = multipass.run_passes(
            pipe,
            caption,
            passes_of(cell, args.steps),
            negative_prompt=DEMO.negative_prompt,
            true_cfg=args.true_cfg,
            guidance=DEMO.guidance,
            max_sequence_length=DEMO.max_sequence_length,
            seed=10_000 * args.seed + i,
        )
    content = io.BytesIO()
    picture.save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_atomically({path: content.getvalue()})


def reverse(transformer, args, kwargs) -> None:
    """A later pre-hook than DyPE's own: the encoding at 1 - sigma."""
    transformer.pos_embed.set_timestep(1 - kwargs["timestep"].flatten()[0])


@cache
def pipeline(weights: Path):
    """Loaded once in a process."""
    pipe = load_pipeline(str(weights), dtype=DEMO.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start() -> None:
    """A worker process: one thread; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def draw_all(jobs: list[tuple], processes: int) -> Iterator[None]:
    """Draw in this process, or in several: small matrices don't keep many threads busy."""
    if processes == 1:
        yield from starmap(draw, jobs)
    elif jobs:
        with ProcessPoolExecutor(processes, get_context("spawn"), start) as pool:
            yield from pool.map(draw, *zip(*jobs, strict=True))


def parser() -> Parser:
    made = Parser(prog="python -m dype.demo.evaluate", description=__doc__)
    flag = made.add_argument
    flag("settings", nargs="*", metavar="SETTING", help="instead of the table's")
    flag("--quick", action="store_true", help="a table in under 5 minutes")
    flag("--full", action="store_true", help="everything, at sizes up to 6x: half a day")
    flag("--cutoff", action="store_true", help="as the default, with the cutoffs held against "
         "their rivals, also at 2:1")  # fmt: skip
    flag("--drawn", action="store_true", help="score what is there, draw nothing")
    flag("--size", default="512", metavar="WxH", help="of the settings, width x height in px, or "
         "one number for both (default: 512)")  # fmt: skip
    flag("--count", type=int, default=64, metavar="N", help="prompts of each (default: 64)")
    flag("--seed", type=int, default=0, metavar="N", help="of the prompts (default: 0, to report)")
    flag("--against", nargs="+", default=[], metavar="SETTING", help="of those drawn: hold every "
         "other one against these (default: against its own static form and `base`)")  # fmt: skip
    flag("--held_out", action="store_true", help="only triples never trained on")
    flag("--steps", type=int, default=DEMO.steps, metavar="N", help=f"(default: {DEMO.steps})")
    flag("--true_cfg", type=float, default=DEMO.true_cfg, metavar="X", help="(default: "
         f"{DEMO.true_cfg:g})")  # fmt: skip
    flag("--dtype", choices=FORMATS, help="autocast to bfloat16 or not (default: "
         "as what is there, else bfloat16 where the device has it)")  # fmt: skip
    flag("--out", type=Path, default=Path("outputs/ground_truth"), metavar="FOLDER",
         help="of the images (default: outputs/ground_truth)")  # fmt: skip
    flag("--weights", type=Path, default=Path(DEMO.repo), metavar="FOLDER",
         help="of another training's pipeline (default: the demo's)")  # fmt: skip
    flag("--processes", type=int, default=PROCESSES, metavar="N",
         help=f"that draw at once (default: {PROCESSES}, one per core up to 8)")  # fmt: skip
    flag("--save", type=Path, metavar="FILE.json", help="the numbers, for dype.figures; also as "
         "FILE.csv and the paired differences as FILE_pairs.csv")  # fmt: skip
    flag("--strip", type=Path, metavar="FILE", help="PNG or JPEG of six images per setting")
    return made


def weights_hash(weights: Path) -> str:
    """The transformer's, to tell one training from another."""
    path = weights / "transformer" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def agreed(args) -> dict:
    """The protocol, what every image of a folder has in common; settles --dtype.

    Written to the folder, or held against what is there. Raises ValueError, OSError.
    """
    protocol = {name: getattr(args, name) for name in ("steps", "true_cfg", "dtype")}
    protocol["weights"] = weights_hash(args.weights)
    path = args.out / "protocol.json"
    before = left_there(path, dict)
    go_on(args.out, before, protocol)
    args.dtype = protocol["dtype"]
    if before is None:
        args.out.mkdir(parents=True, exist_ok=True)
        records.write_atomically({path: json.dumps(protocol).encode()})
    return protocol


def left_there(path: Path, parts: Callable):
    """`parts` of the JSON of an earlier run; None if there was none. Raises ValueError, OSError."""
    try:
        return parts(json.loads(path.read_bytes())) if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of this program; move it away") from error


def go_on(path: Path, before: dict | None, now: dict) -> None:
    """Settle the dtype of `now`, the protocol; ValueError if what is there had another one."""
    known = (before or {}).get("dtype")
    if now["dtype"] is None:
        now["dtype"] = known if known in FORMATS else fast_dtype(default_device())
    for name, value in now.items():
        if before is not None and before.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, but {path} was drawn with {before.get(name)!r}, "
                "expected the same, or another --out"
            )


def asked(args) -> list[Cell]:
    """The cells that the flags ask for. Raises ValueError."""
    if args.quick + args.full + args.cutoff + bool(args.settings) > 1:
        raise ValueError("--quick, --full, --cutoff and SETTINGS, expected at most one of them")
    for name, least in (("count", 1), ("steps", 1), ("seed", 0), ("processes", 1)):
        check_number(f"--{name}", getattr(args, name), least, math.inf, integer=True)
    if not (args.weights / "model_index.json").is_file():
        raise ValueError(f"--weights is {args.weights}, expected the folder of a trained pipeline")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out is {args.out}, expected a folder")
    if args.strip and args.strip.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--strip is {args.strip}, expected a name in .png or .jpg")
    if args.save and args.save.suffix != ".json":
        raise ValueError(f"--save is {args.save}, expected a name in .json")
    size = parse_size(args.size)
    for side in size:
        check_number("--size", side, 64, 4096, multiple=16)
    if args.settings:
        cells = [Cell(size, setting(one), args.count) for one in args.settings]
        for cell in cells:
            passes_of(cell, args.steps)
    else:
        plans = [name for name in ("quick", "full", "cutoff") if getattr(args, name)]
        cells = plan(*plans or ["default"])
    if args.against and not args.settings:
        raise ValueError("--against, expected SETTINGS with it")
    for one in args.against:
        check_choice(
            "--against", setting(one).name, dict.fromkeys(cell.setting.name for cell in cells)
        )
    return there(cells, args) if args.drawn else cells


def there(cells: list[Cell], args) -> list[Cell]:
    """The cells with as many images as have been drawn. Raises ValueError if there are none."""
    found, short = [], []
    for cell in cells:
        count = len(list(takewhile(Path.exists, paths_of(cell, folder_of(args)))))
        if count > 0:
            found.append(cell._replace(count=count))
        if count < cell.count:
            short.append(f"{cell.setting.name} {shown_size(cell.size)} px {count}")
    if short and found:
        print(f"not all drawn: {', '.join(short)}")
    if not found:
        raise ValueError(f"{args.out} has none of these images, expected some with --drawn")
    return found


@raise_user_errors()
def run(args) -> None:
    """Draw what is not there, score, print and write. Raises ValueError, OSError."""
    cells = asked(args)
    protocol = agreed(args)
    print(f"dtype {args.dtype}")
    scenes, folder = sampled(args), folder_of(args)
    jobs = [
        (cell, i, path, scenes[i].caption, args)
        for cell in cells
        for i, path in enumerate(paths_of(cell, folder))
        if not path.exists()
    ]
    vae, count = pipeline(args.weights).vae, sum(cell.count for cell in cells)
    with tqdm(total=count, initial=count - len(jobs), unit="image", disable=args.drawn) as bar:
        for _ in draw_all(jobs, args.processes):
            bar.update()
    held = couples(args.settings, args.against, args.cutoff)
    found = report.table(vae, cells, scenes, folder, held)
    print(report.printed(found["rows"], report.ROW[:3], signed=False))
    if found["pairs"]:
        print()
        print(report.printed(found["pairs"], report.PAIR, signed=True))
    files = {}
    if args.save:
        protocol |= {"seed": args.seed, "held_out": args.held_out}
        files = files_to_save(args.save, protocol, found)
    if args.strip:
        files[args.strip] = report.strips(cells, folder, args.strip)
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    records.write_atomically(files)
    for path in files:
        print(path)


def files_to_save(path: Path, protocol: dict, tables: dict) -> dict[Path, bytes]:
    """Format the JSON of --save, and its rows and its pairs as CSV files beside it."""
    return {
        path: by_rows(json.dumps(protocol), **tables),
        path.with_suffix(".csv"): report.to_csv(tables["rows"], report.ROW),
        path.with_name(f"{path.stem}_pairs.csv"): report.to_csv(tables["pairs"], report.PAIR),
    }


def by_rows(protocol: str, **tables: list[dict]) -> bytes:
    """JSON with a row to a line; protocol: as JSON already."""
    parts = [f'"protocol": {protocol}']
    for name, rows in tables.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        parts.append(f'"{name}": [\n{lines}\n]')
    return ("{" + ",\n".join(parts) + "}\n").encode()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 1 for the rest."""
    rest = "the same command draws the rest"
    return run_command(
        "dype.demo.evaluate", lambda: run(parser().parse_args(argv)), interrupted=rest
    )


if __name__ == "__main__":
    sys.exit(main())
