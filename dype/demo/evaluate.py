"""The ground-truth table: `python -m dype.demo.evaluate`, in under two hours on two CPU cores.

Draws seeded prompts with the demo model under many settings, and scores layout, texture and both
against rendered scenes of the same size. A picture that is there is not drawn again. A setting is
METHOD, METHOD:static or METHOD:SCALE:EXPONENT, then `:NAME=VALUE` of DyPEConfig's other numbers,
then `:reversed` (time runs the wrong way: a control), `:model` (the model's own noise schedule
instead of the capped one) or `:progressive` (as `run_dype.py --progressive`). Prompts of seed 0 are
there to report, those of another seed to choose by. Needs requirements-dev.txt.
"""

import hashlib
import io
import json
import math
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dype.config import number, one_of
from dype.demo.experiments import Cell, couples, plan, setting, shown_size
from dype.demo.scenes import HELD_OUT, TRIPLES, Scene, sample_scene
from dype.errors import Parser, run_command, user_errors
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
PIPE = None  # a worker process's own


def sampled(args) -> list[Scene]:
    """The scenes that the prompts ask for, 64 or as many as wanted."""
    rng = np.random.default_rng(args.seed)
    triples = HELD_OUT if args.held_out else TRIPLES
    return [sample_scene(rng, triples) for _ in range(max(64, args.count or 0))]


def folder_of(cell: Cell, args) -> Path:
    part = f"seed_{args.seed}{'_held_out' * args.held_out}"
    return args.out / part / str(shown_size(cell.size)) / cell.setting.name


def missing(cells: list[Cell], args) -> list[tuple[Cell, int, Path]]:
    """The pictures that are not there: cell, number of the prompt, and where it goes."""
    places = [(cell, i, folder_of(cell, args) / f"{i:03}.png") for cell in cells
              for i in range(cell.count)]  # fmt: skip
    return [place for place in places if not place[2].exists()]


def draw(pipe, cell: Cell, i: int, path: Path, scene: Scene, args) -> None:
    """Draw a picture of the i-th prompt, from noise of seed 10000 `--seed` + i."""
    apply_dype(pipe, cell.setting.config)
    control, hook = cell.setting.control, nullcontext()
    if control == "reversed":
        hook = pipe.transformer.register_forward_pre_hook(reverse, with_kwargs=True)
    drawing = in_passes if control == "progressive" else in_one
    with autocast(pipe.device, args.dtype), hook:
        picture = drawing(pipe, scene.caption, cell.size, 10_000 * args.seed + i, args)
    content = io.BytesIO()
    picture.save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write({path: content.getvalue()})


def in_one(pipe, caption: str, size: tuple[int, int], seed: int, args) -> Image.Image:
    """By the pipeline as it is."""
    [picture] = pipe(
        caption,
        negative_prompt=DEMO.negative_prompt or "",
        true_cfg_scale=args.true_cfg,
        guidance_scale=DEMO.guidance,
        height=size[0],
        width=size[1],
        num_inference_steps=args.steps,
        max_sequence_length=DEMO.max_sequence_length,
        generator=torch.Generator().manual_seed(seed),
    ).images
    return picture


def in_passes(pipe, caption: str, size: tuple[int, int], seed: int, args) -> Image.Image:
    """The base resolution first."""
    return multipass.multipass(
        pipe,
        caption,
        *size,
        multipass.progressive(*size, DEMO.base_resolution, args.steps),
        negative_prompt=DEMO.negative_prompt or "",
        true_cfg=args.true_cfg,
        guidance=DEMO.guidance,
        max_sequence_length=DEMO.max_sequence_length,
        seed=seed,
    )


def reverse(transformer, args, kwargs) -> None:
    """A later pre-hook than DyPE's own: the encoding at 1 - sigma."""
    transformer.pos_embed.set_timestep(1 - kwargs["timestep"].flatten()[0])


def quiet_pipeline(weights: Path):
    pipe = load_pipeline(str(weights), dtype=DEMO.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start(weights: Path) -> None:
    """A worker process: a pipeline of its own, one thread; Ctrl-C is the parent's to handle."""
    global PIPE
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    PIPE = quiet_pipeline(weights)


def work(job: tuple) -> None:
    draw(PIPE, *job)


def draw_all(pipe, jobs: list[tuple], args, bar: tqdm) -> None:
    """Draw in this process, or in several: small matrices don't keep many threads busy."""
    if args.processes == 1:
        for job in jobs:
            draw(pipe, *job)
            bar.update()
    elif jobs:
        spawn = get_context("spawn")
        with ProcessPoolExecutor(args.processes, spawn, start, (args.weights,)) as pool:
            for _ in pool.map(work, jobs):
                bar.update()


def parser() -> Parser:
    made = Parser(prog="python -m dype.demo.evaluate", description=__doc__)
    flag = made.add_argument
    flag("settings", nargs="*", metavar="METHOD[:...]", help="instead of the table's")
    flag("--quick", action="store_true", help="a table in under 5 minutes")
    flag("--full", action="store_true", help="everything, at sizes up to 6x: half a day")
    flag("--cutoff", action="store_true", help="that of docs/cutoff.md: as the default, the "
         "cutoffs held against their rivals, also at 2:1")  # fmt: skip
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
    flag("--dtype", choices=("bfloat16", "float32"), help="autocast to bfloat16 or not (default: "
         "as what is there, else bfloat16 where the device has it)")  # fmt: skip
    flag("--out", type=Path, default=Path("outputs/ground_truth"), metavar="FOLDER",
         help="of the pictures (default: outputs/ground_truth)")  # fmt: skip
    flag("--weights", type=Path, default=Path(DEMO.repo), metavar="FOLDER",
         help="of another training's pipeline (default: the demo's)")  # fmt: skip
    flag("--processes", type=int, default=PROCESSES, metavar="N",
         help=f"that draw at once (default: {PROCESSES}, one per core up to 8)")  # fmt: skip
    flag("--save", type=Path, metavar="FILE", help="the numbers as JSON, for dype.figures")
    flag("--strip", type=Path, metavar="FILE", help="PNG or JPEG of six pictures per setting")
    return made


def protocol(args) -> dict:
    """What every picture of a folder has in common."""
    found = {name: getattr(args, name) for name in ("steps", "true_cfg", "dtype")}
    return found | {"weights": weights_hash(args.weights)}


def weights_hash(weights: Path) -> str:
    """The transformer's, to tell one training from another."""
    path = weights / "transformer" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def agreed(args) -> None:
    """Write the folder's protocol, or see that it is this one's; settles --dtype.

    Raises ValueError, OSError.
    """
    path, now = args.out / "protocol.json", protocol(args)
    try:
        before = dict(json.loads(path.read_bytes())) if path.exists() else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not of this program; move it away") from error
    go_on(args.out, before, now)
    args.dtype = now["dtype"]
    if before is None:
        args.out.mkdir(parents=True, exist_ok=True)
        records.write({path: json.dumps(now).encode()})


def go_on(path: Path, before: dict | None, now: dict) -> None:
    """Settle the dtype of `now`, the protocol; ValueError if what is there had another one."""
    known = (before or {}).get("dtype")
    known = known if known in ("bfloat16", "float32") else None
    now["dtype"] = now["dtype"] or known or fast_dtype(default_device())
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
        number(f"--{name}", getattr(args, name), least, math.inf, whole=True)
    if not (args.weights / "model_index.json").is_file():
        raise ValueError(f"--weights is {args.weights}, expected the folder of a trained pipeline")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out is {args.out}, expected a folder")
    if args.strip and args.strip.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--strip is {args.strip}, expected a name in .png or .jpg")
    size = parse_size(args.size)
    for side in size:
        number("--size", side, 64, 4096, multiple=16)
    if args.settings:
        if any(setting(one).control == "progressive" for one in args.settings):
            multipass.progressive(*size, DEMO.base_resolution, args.steps)
        cells = [Cell(size, setting(one), args.count) for one in args.settings]
    else:
        plans = [name for name in ("quick", "full", "cutoff") if getattr(args, name)]
        cells = plan(*plans or ["default"])
    if args.against and not args.settings:
        raise ValueError("--against, expected SETTINGS with it")
    for one in args.against:
        one_of("--against", setting(one).name, dict.fromkeys(cell.setting.name for cell in cells))
    return there(cells, args) if args.drawn else cells


def there(cells: list[Cell], args) -> list[Cell]:
    """The cells with as many pictures as have been drawn. Raises ValueError if there are none."""
    found, short = [], []
    for cell in cells:
        paths = (folder_of(cell, args) / f"{i:03}.png" for i in range(cell.count))
        count = sum(1 for _ in takewhile(Path.exists, paths))
        found += [cell._replace(count=count)] * (count > 0)
        short += [f"{cell.setting.name} {shown_size(cell.size)} px {count}"] * (count < cell.count)
    if short and found:
        print(f"not all drawn: {', '.join(short)}")
    if not found:
        raise ValueError(f"{args.out} has none of these pictures, expected some with --drawn")
    return found


@user_errors()
def run(args) -> None:
    """Draw what is not there, score, print and write. Raises ValueError, OSError."""
    cells = asked(args)
    agreed(args)
    print(f"dtype {args.dtype}")
    scenes = sampled(args)
    pipe = quiet_pipeline(args.weights)
    count, rest = sum(cell.count for cell in cells), missing(cells, args)
    jobs = [(cell, i, path, scenes[i], args) for cell, i, path in rest]
    with tqdm(total=count, initial=count - len(jobs), unit="picture", disable=args.drawn) as bar:
        draw_all(pipe, jobs, args, bar)
    held = couples(args.settings, args.against, args.cutoff)
    found = report.table(pipe.vae, cells, scenes, lambda cell: folder_of(cell, args), held)
    print(report.printed(found["rows"], ("size", "setting", "n"), signed=False))
    if found["pairs"]:
        print()
        print(report.printed(found["pairs"], ("size", "setting", "against", "n"), signed=True))
    whole = {"protocol": protocol(args) | {"seed": args.seed, "held_out": args.held_out}, **found}
    files = {args.save: saved(whole)} if args.save else {}
    if args.strip:
        files[args.strip] = report.strips(cells, lambda cell: folder_of(cell, args), args.strip)
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    records.write(files)
    for path in files:
        print(path)


def saved(whole: dict) -> bytes:
    """JSON with a row to a line."""
    parts = [f'"protocol": {json.dumps(whole["protocol"])}']
    for name in ("rows", "pairs"):
        lines = ",\n".join(json.dumps(row) for row in whole[name])
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
