"""What a finished sweep's pictures score: `python -m dype.metrics FOLDER`.

Metrics of single pictures become columns of results.csv; metrics of sets of pictures are taken per
setting and size. Means and set metrics, with bootstrap 95 % intervals, go to metrics.json and
metrics.txt. What is there is not computed again. docs/metrics.md says how each is computed.
"""

import argparse
import hashlib
import re
import sys
from functools import partial
from pathlib import Path

from dype.errors import Parser, UserError, fail, run_command, user_errors
from dype.metrics import report as metric_report
from dype.metrics import scores as metric_scores
from dype.metrics.inception_features import FILTERS, INPUT, forget, inception, real_files
from dype.metrics.scores import SETS, SINGLE, size_of
from dype.pipelines.devices import check_device, default_device
from dype.sweep import results
from dype.sweep.grid import read_prompts


def parser() -> Parser:
    made = Parser(
        prog="python -m dype.metrics",
        description=__doc__,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=98),
        allow_abbrev=False,
    )
    flag = made.add_argument
    flag("folder", type=Path, metavar="FOLDER", help="of a finished sweep, with its results.csv")
    flag("--metrics", nargs="+", metavar="NAME", help=f"{', '.join(SINGLE | SETS)}, or all "
         "(default: glcm compression; --real adds fid kid, --prompts clip_score)")  # fmt: skip
    flag("--prompts", type=Path, metavar="FILE", help="score against these, one per line, the n-th "
         "for the sweep's n-th prompt (default: the prompts that drew the pictures)")  # fmt: skip
    flag("--real", type=Path, metavar="FOLDER", help="pictures for FID and KID")
    flag("--filter", choices=FILTERS, default="bilinear",
         help="that brings real pictures to the drawn ones' size (default: bilinear)")  # fmt: skip
    flag("--patch", type=int, metavar="PX", help="side of a patch, for patch_fid, patch_kid, "
         f"patch_is (default: {INPUT}, or the picture's shorter side if that is less)")  # fmt: skip
    flag("--patches", type=int, metavar="N", default=8, help="of a picture (default: 8)")
    flag("--splits", type=int, metavar="N", default=10, help="of Inception score (default: 10)")
    flag("--resize", choices=("antialias", "tf1"), default="antialias",
         help="to Inception's 299 px: as torchmetrics, or as TensorFlow 1 and torch-fidelity "
         "(default: antialias)")  # fmt: skip
    flag("--weights", nargs="+", metavar="NAME=PATH", default=[], help="a metric's weights in a "
         "folder, or inception=FILE (default: from the hub)")  # fmt: skip
    flag("--python", metavar="FILE", default=sys.executable,
         help="interpreter that has ImageReward (default: this one)")  # fmt: skip
    flag("--device", metavar="NAME", help="(default: the accelerator, where there is one)")
    flag("--overwrite", action="store_true", help="compute anew what is there")
    return made


def asked(args) -> list[str]:
    """The metrics to compute, in the table's order. Raises UserError."""
    known = [*SINGLE, *SETS]
    names = [name for word in args.metrics or [] for name in word.split(",") if name]
    unknown = [name for name in names if name not in (*known, "all")]
    if unknown:
        raise UserError(f"--metrics is {unknown[0]!r}, expected {', '.join(known)} or all")
    if "all" in names:
        names = known
    if args.metrics is None:
        names = ["glcm", "compression", *(["fid", "kid"] if args.real else [])]
        names += ["clip_score"] if args.prompts else []
    against = [name for name in names if name in SETS and SETS[name].real]
    if against and not args.real:
        raise UserError(f"{against[0]} compares with real pictures, expected --real FOLDER")
    if args.real and not against:
        raise UserError("--real is for fid, kid, patch_fid, patch_kid; name one in --metrics")
    if args.prompts and not any(name in SINGLE and SINGLE[name].prompted for name in names):
        raise UserError("--prompts is for clip_score, image_reward, pick_score; name one")
    return [name for name in known if name in names]


def weights_of(args) -> dict[str, str | None]:
    """Where each metric's weights are, and Inception's. Raises UserError."""
    found = {name: metric.weights for name, metric in SINGLE.items()} | {"inception": None}
    free = [n for n in found if n not in ("glcm", "compression")]
    for word in args.weights:
        name, _, path = word.partition("=")
        if name not in free or not path:
            raise UserError(f"--weights is {word!r}, expected NAME=PATH, NAME of {', '.join(free)}")
        there = Path(path).is_file() if name == "inception" else Path(path).is_dir()
        if not there:
            kind = "file" if name == "inception" else "folder"
            raise UserError(f"--weights {name} is {path!r}, expected a {kind} that exists")
        found[name] = str(Path(path).absolute())
    return found


def check(args, rows: list[dict], names: list[str]) -> None:
    """Raise UserError for numbers that the pictures cannot meet."""
    for name in ("patches", "splits"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    if args.patch is not None and any(name in SETS and SETS[name].patched for name in names):
        side = min(min(size_of(row)) for row in rows)
        if not 1 <= args.patch <= side:
            raise UserError(f"--patch is {args.patch}, expected 1 to {side}, the shortest side")


def prompts_for(rows: list[dict], path: Path | None) -> dict[str, str]:
    """File name -> the prompt to score its picture against. Raises UserError."""
    if path is None:
        return {row["file"]: row["prompt"] for row in rows}
    try:
        texts = read_prompts({"prompts_file": path})
    except UserError as error:
        raise UserError(str(error).replace("--prompts_file", "--prompts")) from error
    numbers = {}  # a sweep's file names count its prompts from the second on
    for row in rows:
        found = re.search(r"_prompt_(\d+)\.png$", row["file"])
        numbers.setdefault(int(found[1]) if found else 1, {})[row["prompt"]] = row["file"]
    mixed = [number for number, own in numbers.items() if len(own) > 1]
    if mixed:
        raise UserError(
            f"--prompts cannot tell which prompt is the sweep's {mixed[0]}: its pictures are of "
            "several lists; score each in a folder of its own"
        )
    if len(texts) != len(numbers) or set(numbers) != set(range(1, len(texts) + 1)):
        raise UserError(
            f"--prompts {path} has {len(texts)}, the sweep {max(numbers)} prompts, expected one "
            "line for each, in the sweep's order"
        )
    of = {prompt: texts[number - 1] for number, own in numbers.items() for prompt in own}
    return {row["file"]: of[row["prompt"]] for row in rows}


def hows(args, names: list[str], weights: dict[str, str | None]) -> dict[str, dict]:
    """How each column is made, for the metrics of single pictures that are asked for."""
    prompts = None
    if args.prompts:
        content = hashlib.sha256(args.prompts.read_bytes()).hexdigest()[:12]
        prompts = f"{args.prompts.name} ({content})"
    found = {}
    for name in (name for name in names if name in SINGLE):
        found[name] = {"weights": weights[name]} if weights[name] else {}
        found[name] |= {"prompts": prompts} if SINGLE[name].prompted else {}
    return found


def run(args, names: list[str], weights: dict[str, str | None], reals: list[Path]) -> int:
    """Compute what is not there yet, write and print it; returns the exit code."""
    folder = args.folder
    for name in (results.RESULTS, metric_report.REPORT, metric_report.TABLE):
        for part in folder.glob(f".{name}.*.part"):  # of a killed run
            part.unlink()
    table = results.read_rows(folder)
    rows = [row for row in table if not row["error"]]
    check(args, rows, names)
    prompts = prompts_for(rows, args.prompts)
    report = metric_report.read_report(folder)
    metric_scores.settle(table, report, hows(args, names, weights), args.overwrite)
    device = args.device or default_device()
    check_device(device, "none")
    if args.overwrite:  # before the report: no value may stand without the way it was made
        metric_scores.write_rows(folder, table)
    report["sets"] = metric_scores.keep(report["sets"], [], rows, folder)
    metric_report.write_report(folder, rows, report, {})
    loads = {
        name: partial(SINGLE[name].load, weights[name], device, args.python)
        for name in names
        if name in SINGLE and not all(row[name] for row in rows)
    }
    sets, skipped = [name for name in names if name in SETS], {}
    for load in loads.values() if len(loads) + len(sets) > 1 else ():
        with load():  # what the last one lacks is said before the first one works for hours
            pass
    if sets:
        skipped = run_sets(args, sets, weights["inception"], reals, rows, report, device)
        metric_report.write_report(folder, rows, report, skipped)
    skipped |= metric_scores.score_singles(folder, table, loads, prompts)
    print(metric_report.write_report(folder, rows, report, skipped), end="")
    if skipped:
        path = folder / metric_report.TABLE
        return fail(
            "dype.metrics", f"skipped {len(skipped)}, the rest is scored: {path} says which and why"
        )
    return 0


def run_sets(
    args, names: list[str], weights: str | None, reals: list[Path], rows: list[dict],
    report: dict, device: str,
) -> dict[str, str]:  # fmt: skip
    """Put the set metrics into the report; returns why pictures were skipped, by file."""
    how = {"weights": weights or "pt_inception-2015-12-05"}
    how |= {n: getattr(args, n) for n in ("resize", "filter", "patch", "patches", "splits")}
    load = partial(inception, weights, device, args.resize == "antialias")
    known = report["sets"]
    if args.overwrite:
        known = []
        forget(args.folder)
    fresh, skipped = metric_scores.score_sets(args.folder, rows, names, reals, how, load, known)
    report["sets"] = metric_scores.keep(report["sets"], fresh, rows, args.folder)
    return skipped


def command(args) -> int:
    """Check what is asked for, and compute it. Raises UserError, UnavailableError, OSError."""
    names, weights = asked(args), weights_of(args)
    with user_errors():
        if not any(not row["error"] for row in results.read_rows(args.folder)):
            raise ValueError(
                f"{args.folder} has no {results.RESULTS} with pictures, expected the folder "
                "of a finished sweep"
            )
        reals = real_files(args.real) if args.real else []
    with results.locked(args.folder):
        return run(args, names, weights, reals)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 1 for the rest."""
    rest = "the same command computes the rest"
    return run_command(
        "dype.metrics",
        lambda: command(parser().parse_args(argv)),
        out_of_memory="try --device cpu",
        interrupted=rest,
    )


if __name__ == "__main__":
    sys.exit(main())
