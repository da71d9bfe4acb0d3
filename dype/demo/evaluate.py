"""Score the demo model against rendered truth: `python -m dype.demo.evaluate`.

The command generates images of seeded prompts under many settings, and compares them with rendered
scenes of the same size. It prints a table of scores of layout and texture, and a table of paired
differences. Existing images are not generated again, nor are those whose measurements --out has, in
measurements.npz; without that file images are measured again. docs/data/ground_truth has ours. The
packages of requirements-dev.txt are needed.
"""

import hashlib
import io
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from itertools import starmap, takewhile
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dype.config import check_choice, check_number
from dype.demo.experiments import (
    BASE,
    COUNT,
    DEMO,
    GRAMMAR,
    PAPER,
    TABLES,
    TWOPASS_STRENGTH,
    Cell,
    Table,
    default_pairs,
    format_size,
    image_paths,
    pairs_against,
    parse_setting,
    plan_cells,
)
from dype.demo.scenes import COMBINATIONS, HELD_OUT, Scene, sample_scene
from dype.errors import Parser, raise_user_errors, run_command
from dype.patch import apply_dype
from dype.pipelines.devices import autocast
from dype.pipelines.loading import load_pipeline
from dype.sampling import multipass, records
from dype.sampling.passes import resolve_passes
from dype.sweep.grid import parse_size

try:
    from dype.demo import report
    from dype.demo.measurements import Measurements
except ModuleNotFoundError as error:
    sys.exit(f"dype.demo.evaluate: it needs {error.name}; pip install -r requirements-dev.txt")


PROCESSES = min(os.cpu_count() or 1, 8)
DTYPES = ("bfloat16", "float32")
MEASUREMENTS = "measurements.npz"
SETTING_HELP = f"""
SETTING is {GRAMMAR}
  yarn, dy_yarn  a method, static or with DyPE
  dy_yarn:1:2    lambda_s 1 and lambda_t 2
  NAME=VALUE     a field of DyPEConfig, such as yarn_paper:alpha=2
  CONTROL        reversed: the encoding of 1 - sigma; model: mu by the rule of the model's
                 scheduler, not capped; progressive: as run_dype.py --progressive;
                 twopass: as run_dype.py --multipass twopass --pass2_strength {TWOPASS_STRENGTH}
"""
EXAMPLES = """examples:
  python -m dype.demo.evaluate --quick
  python -m dype.demo.evaluate base yarn dy_yarn --size 768 --count 8
  python -m dype.demo.evaluate dy_pi:1:1 dy_pi:1:1:reversed --seed 1 --count 8
  python -m dype.demo.evaluate --paper main --count 8 --save outputs/truth.json
  python -m dype.demo.evaluate --paper main --drawn --out docs/data/ground_truth
"""


def sample_scenes(seed: int, count: int, held_out: bool = False) -> list[Scene]:
    """Return the scenes of the first prompts of a seed; those that training left out if asked."""
    rng = np.random.default_rng(seed)
    combinations = HELD_OUT if held_out else COMBINATIONS
    return [sample_scene(rng, combinations) for _ in range(count)]


def seed_folder(seed: int, args) -> Path:
    """Return the folder of the images of a seed."""
    return args.out / f"seed_{seed}{'_held_out' * args.held_out}"


def resolve_cell_passes(cell: Cell, steps: int) -> list[dict]:
    """Return the passes of a cell for `run_passes`.

    Raises ValueError for a size at which progressive passes cannot begin smaller.
    """
    control = cell.setting.control
    name = control if control in ("progressive", "twopass") else "single"
    return resolve_passes(name, *cell.size, steps, (TWOPASS_STRENGTH,), BASE)


def generate_image(cell: Cell, noise_seed: int, path: Path, caption: str, args) -> None:
    """Generate an image and write it to `path`.

    Args:
        cell: setting and size.
        noise_seed: seed of the noise.
        path: PNG file to write.
        caption: the prompt.
        args: parsed flags; --dtype is not None.
    """
    pipe, hook = cached_pipeline(args.weights), nullcontext()
    apply_dype(pipe, cell.setting.config)
    if cell.setting.control == "reversed":
        hook = pipe.transformer.register_forward_pre_hook(reverse_time_hook, with_kwargs=True)
    with autocast(pipe.device, args.dtype), hook:
        image = multipass.run_passes(
            pipe,
            caption,
            resolve_cell_passes(cell, args.steps),
            guidance=args.guidance,
            max_sequence_length=DEMO.max_sequence_length,
            seed=noise_seed,
        )
    content = io.BytesIO()
    image.save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_atomically({path: content.getvalue()})


def reverse_time_hook(transformer, args, kwargs) -> None:
    """Set the encoding to 1 - sigma; a pre-hook that runs after DyPE's."""
    transformer.pos_embed.set_timestep(1 - kwargs["timestep"].flatten()[0])


@cache
def cached_pipeline(weights: Path):
    """Load a pipeline, once per process."""
    pipe = load_pipeline(str(weights), dtype=DEMO.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def init_worker() -> None:
    """Set one thread for a worker process, and leave Ctrl-C to the parent; end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait until the parent has ended, then end this process."""
    parent_process().join()
    os._exit(1)


def generate_images(jobs: list[tuple], processes: int) -> Iterator[None]:
    """Run `generate_image` for every job; yield after each.

    Several processes are faster than several threads because the matrices are small.
    """
    if processes == 1:
        yield from starmap(generate_image, jobs)
    elif jobs:
        with ProcessPoolExecutor(processes, get_context("spawn"), init_worker) as pool:
            yield from pool.map(generate_image, *zip(*jobs, strict=True))


def parser() -> Parser:
    """Return the parser of the command line."""
    argument_parser = Parser(
        prog="python -m dype.demo.evaluate", description=__doc__ + SETTING_HELP, epilog=EXAMPLES
    )
    flag = argument_parser.add_argument
    flag("settings", nargs="*", metavar="SETTING", help="settings to compare (default: the "
         "table main)")  # fmt: skip
    flag("--quick", action="store_true", help="small table; a few minutes on two cores")
    flag("--paper", nargs="*", choices=PAPER, metavar="TABLE", help="tables of docs/demo.md and "
         f"docs/log, each of one question: {', '.join(PAPER)} (default: all; an hour or two each "
         "on two cores)")  # fmt: skip
    flag("--drawn", action="store_true", help="scores of the images that exist or were measured; "
         "generates none")  # fmt: skip
    flag("--size", metavar="WxH", help="width x height of the SETTINGs' images in px, or one "
         "number for a square; 64 to 4096, multiples of 16 "
         f"(default: {2 * BASE})")  # fmt: skip
    flag("--count", type=int, metavar="N", help="number of prompts per setting, 1 or more "
         f"(default: {COUNT}); of a table, a limit")  # fmt: skip
    flag("--seed", type=int, metavar="N", help="seed of the SETTINGS' prompts; we report 0 and "
         "select settings on others (default: 0)")  # fmt: skip
    flag("--against", nargs="+", default=[], metavar="SETTING", help="baselines of the paired "
         "differences, among the SETTINGs (default: the static form and base)")  # fmt: skip
    flag("--held_out", action="store_true", help="prompts that training left out")
    flag("--steps", type=int, default=DEMO.steps, metavar="N", help="sampling steps; 1 or more "
         "(default: %(default)s)")  # fmt: skip
    flag("--guidance", type=float, default=DEMO.guidance, metavar="X", help="guidance_scale of the "
         "pipeline; 1 is off (default: %(default)g)")  # fmt: skip
    flag("--dtype", choices=DTYPES, metavar="DTYPE", help="number format of matrix products; "
         f"{', '.join(DTYPES)} (default: as in --out, else float32, as in our tables)")  # fmt: skip
    flag("--out", type=Path, default=Path("outputs/ground_truth"), metavar="FOLDER",
         help="folder of the images (default: %(default)s)")  # fmt: skip
    flag("--weights", type=Path, default=Path(DEMO.repo), metavar="FOLDER",
         help="folder of a trained pipeline (default: the demo's weights)")  # fmt: skip
    flag("--processes", type=int, default=PROCESSES, metavar="N", help="number of images to "
         "generate at once; 1 or more (default: one per core, up to 8)")  # fmt: skip
    flag("--save", type=Path, metavar="FILE.json", help="file of the results, for dype.figures; "
         "also writes FILE.csv, and FILE_pairs.csv with the paired differences; of "
         "--paper, FILE_TABLE.json")  # fmt: skip
    flag("--strip", type=Path, metavar="FILE", help="PNG or JPEG file with at most six "
         "images per setting, and a crop of each pixel for pixel")  # fmt: skip
    return argument_parser


def weights_hash(weights: Path, part: str = "transformer") -> str:
    """Return a hash of the weights of a part of a pipeline, to tell one training from another."""
    path = weights / part / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def resolve_protocol(args) -> dict:
    """Return the protocol that all images in --out share, and set --dtype to its value.

    Writes the protocol to --out if there is none. Raises ValueError if the one in --out differs, or
    is missing beside measurements, and OSError.
    """
    protocol = {name: getattr(args, name) for name in ("steps", "guidance", "dtype")}
    protocol["weights"] = weights_hash(args.weights)
    protocol["vae"] = weights_hash(args.weights, "vae")
    path = args.out / "protocol.json"
    earlier = read_earlier(path, dict)
    if earlier is None and (args.out / MEASUREMENTS).exists():
        raise ValueError(f"{args.out} has {MEASUREMENTS} alone, expected {path.name} beside it")
    reconcile_protocol(args.out, earlier, protocol)
    args.dtype = protocol["dtype"]
    if earlier is None:
        args.out.mkdir(parents=True, exist_ok=True)
        records.write_atomically({path: json.dumps(protocol).encode()})
    return protocol


def read_earlier(path: Path, convert: Callable):
    """Return `convert` of the JSON of an earlier run, or None if there is no file.

    Raises ValueError if it is another kind of file, and OSError.
    """
    try:
        return convert(json.loads(path.read_bytes())) if path.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of this program; move it away") from error


def reconcile_protocol(path: Path, earlier: dict | None, protocol: dict) -> None:
    """Set the dtype of `protocol` if it is None, and compare it with that of an earlier run.

    Args:
        path: file or folder of the earlier run, for the sentence.
        earlier: protocol of the earlier run, or None.
        protocol: protocol of this run.

    Raises:
        ValueError: the two differ.
    """
    dtype = (earlier or {}).get("dtype")
    if protocol["dtype"] is None:
        protocol["dtype"] = dtype if dtype in DTYPES else "float32"
    for name, value in protocol.items():
        if earlier is not None and earlier.get(name) != value:
            raise ValueError(
                f"{name} is {value!r}, but {path} was generated with {earlier.get(name)!r}, "
                "expected the same, or another --out"
            )


def check_flags(args) -> None:
    """Raise ValueError for wrong flags."""
    if args.quick + (args.paper is not None) + bool(args.settings) > 1:
        raise ValueError("--quick, --paper and SETTINGS, expected at most one of them")
    for name, least in (("count", 1), ("steps", 1), ("seed", 0), ("processes", 1)):
        if getattr(args, name) is not None:
            check_number(f"--{name}", getattr(args, name), least, math.inf, integer=True)
    check_number("--guidance", args.guidance, 0, 100)
    if not (args.weights / "model_index.json").is_file():
        raise ValueError(f"--weights is {args.weights}, expected the folder of a trained pipeline")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out is {args.out}, expected a folder")
    if args.strip and args.strip.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--strip is {args.strip}, expected a name in .png or .jpg")
    if args.save and args.save.suffix.lower() != ".json":
        raise ValueError(f"--save is {args.save}, expected a name in .json")
    for side in parse_size(args.size) if args.size else ():
        check_number("--size", side, 64, 4096, multiple=16)
    for flag in ("against", "seed", "size"):
        if not args.settings and getattr(args, flag) not in (None, []):
            raise ValueError(f"--{flag}, expected SETTINGS with it")
    if args.paper is not None and len(args.paper) != 1 and args.strip:
        raise ValueError("--strip, expected one table with it")


def requested_tables(args) -> dict[str, tuple[Table, list[Cell]]]:
    """Return each table that the flags ask for, with its cells, by name.

    Raises ValueError for wrong flags.
    """
    check_flags(args)
    if args.settings:
        settings = {setting.name: setting for setting in map(parse_setting, args.settings)}
        size = parse_size(args.size) if args.size else (2 * BASE, 2 * BASE)
        count = args.count or COUNT
        cells = [Cell(size, setting, count) for setting in settings.values()]
        for cell in cells:
            resolve_cell_passes(cell, args.steps)
        for text in args.against:
            check_choice("--against", parse_setting(text).name, settings)
        return {"": (Table("", (), args.seed or 0), cells)}
    if args.paper is None:
        names = ["quick" if args.quick else "main"]
    else:
        names = dict.fromkeys(args.paper or PAPER)
    return {name: (TABLES[name], plan_cells(TABLES[name], args.count)) for name in names}


def count_existing(
    cells: list[Cell], folder: Path, measurements: Measurements, args
) -> tuple[list[Cell], list[str]]:
    """Return the cells with images, with their number, and a text about each incomplete cell.

    Args:
        cells: cells of a table.
        folder: folder of the seed.
        measurements: file of what is measured already; but for --strip, such an image exists.
        args: parsed flags.
    """
    existing, incomplete = [], []
    for cell in cells:
        measured = 0 if args.strip else measurements.count(f"{folder.name}/{cell.folder}")
        paths = image_paths(cell, folder)[measured:]
        count = min(measured, cell.count) + len(list(takewhile(Path.exists, paths)))
        if count > 0:
            existing.append(cell._replace(count=count))
        if count < cell.count:
            incomplete.append(f"{cell.setting.name} {format_size(cell.size)} px {count}")
    return existing, incomplete


@raise_user_errors()
def run(args) -> None:
    """Generate missing images, score all, print and write the tables.

    Raises UserError and OSError.
    """
    tables = requested_tables(args)
    measurements = Measurements(args.out / MEASUREMENTS)
    incomplete = dict.fromkeys(tables, ())
    if args.drawn:
        for name, (table, cells) in tables.items():
            folder = seed_folder(table.seed, args)
            cells, incomplete[name] = count_existing(cells, folder, measurements, args)
            tables[name] = table, cells
        if not any(cells for _, cells in tables.values()):
            raise ValueError(f"{args.out} has none of these images, expected some with --drawn")
    protocol = resolve_protocol(args)
    print(f"dtype {args.dtype}")
    for name, (table, cells) in tables.items():
        if args.paper is not None:
            print(f"\n{name}: {table.question}\n")
        if incomplete[name]:
            print(f"incomplete: {', '.join(incomplete[name])}")
        if cells:
            run_table(name, table, cells, protocol, measurements, args)


def missing_images(
    seed: int, cells: list[Cell], scenes: list[Scene], measurements: Measurements, args
) -> list[tuple]:
    """Return the arguments of `generate_image` for every image to generate.

    An image that was measured is generated again only if --strip shows it.

    Args:
        seed: seed of the prompts; the noise of image i has 10000 times this plus i.
        cells: cells of a table.
        scenes: scene of each prompt.
        measurements: file of what is measured already.
        args: parsed flags; --dtype is not None.
    """
    folder = seed_folder(seed, args)
    jobs = []
    for cell in cells:
        measured = measurements.count(f"{folder.name}/{cell.folder}")
        for index, path in enumerate(image_paths(cell, folder)):
            is_needed = index >= measured or (args.strip and index < report.COLUMNS)
            if is_needed and not path.exists():
                jobs.append((cell, 10_000 * seed + index, path, scenes[index].caption, args))
    return jobs


def run_table(
    name: str, table: Table, cells: list[Cell], protocol: dict, measurements: Measurements, args
) -> None:
    """Generate the missing images of a table, score all, print and write it.

    Args:
        name: name of the table.
        table: its seed and baselines.
        cells: its cells.
        protocol: what all images in --out share.
        measurements: file of what is measured already.
        args: parsed flags; --dtype is not None.

    Raises:
        OSError: an image cannot be read, or a file cannot be written.
    """
    folder = seed_folder(table.seed, args)
    scenes = sample_scenes(table.seed, max(cell.count for cell in cells), args.held_out)
    jobs = [] if args.drawn else missing_images(table.seed, cells, scenes, measurements, args)
    vae, count = cached_pipeline(args.weights).vae, sum(cell.count for cell in cells)
    with tqdm(total=count, initial=count - len(jobs), unit="image", disable=args.drawn) as bar:
        for _ in generate_images(jobs, args.processes):
            bar.update()
    if args.against:
        pairs_of = partial(pairs_against, args.against)
    else:
        pairs_of = partial(default_pairs, baselines=table.baselines)
    results = report.score_cells(vae, args.dtype, cells, scenes, folder, measurements, pairs_of)
    print(report.to_markdown(results["rows"], report.ROW_COLUMNS[:3], signed=False))
    if results["pairs"]:
        print()
        print(report.to_markdown(results["pairs"], report.PAIR_COLUMNS, signed=True))
    files = {}
    if args.save:
        path = args.save
        if args.paper is not None:
            path = path.with_stem(f"{path.stem}_{name}")
        protocol = protocol | {"seed": table.seed, "held_out": args.held_out}
        files = files_to_save(path, protocol | {"base_resolution": BASE}, results)
    if args.strip:
        files[args.strip] = report.draw_image_strips(cells, folder, args.strip)
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    records.write_atomically(files)
    for path in files:
        print(path)


def files_to_save(path: Path, protocol: dict, tables: dict) -> dict[Path, bytes]:
    """Return the contents of the files of --save, by path.

    Args:
        path: JSON file; the two CSV files are beside it.
        protocol: protocol of the images.
        tables: tables of `report.score_cells`.
    """
    return {
        path: tables_to_json(json.dumps(protocol), **tables),
        path.with_suffix(".csv"): report.to_csv(tables["rows"], report.ROW_COLUMNS),
        path.with_name(f"{path.stem}_pairs.csv"): report.to_csv(
            tables["pairs"], report.PAIR_COLUMNS
        ),
    }


def tables_to_json(protocol: str, **tables: list[dict]) -> bytes:
    """Return JSON of tables with one row per line; `protocol` is JSON text."""
    entries = [f'"protocol": {protocol}']
    for name, rows in tables.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        entries.append(f'"{name}": [\n{lines}\n]')
    return ("{" + ",\n".join(entries) + "}\n").encode()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Exit codes: 0, 2 for a mistake of the user, 1 for other failures, 130 after Ctrl-C.
    """
    next_step = "the same command generates the rest"
    return run_command(
        "dype.demo.evaluate", lambda: run(parser().parse_args(argv)), interrupted=next_step
    )


if __name__ == "__main__":
    sys.exit(main())
