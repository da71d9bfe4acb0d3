"""Compute the metrics of a finished sweep: `python -m dype.metrics FOLDER`.

An image metric scores one image. Its values go to metrics.csv, one row per image and metric.
A set metric scores the images of one setting. Set metrics and the means of image metrics go to
metrics.json and metrics.txt, with 95 % intervals. A later run skips the values that exist with
the same protocol. docs/metrics.md describes every metric.
"""

import hashlib
import sys
from pathlib import Path

from dype.errors import Parser, UserError, fail, raise_user_errors, run_command
from dype.metrics import inception_features, scores
from dype.metrics.image_metrics import IMAGE_METRICS
from dype.metrics.scores import METRICS
from dype.metrics.set_metrics import SET_METRICS
from dype.pipelines.devices import check_device, default_device
from dype.sweep import results, viewer
from dype.sweep.grid import read_prompts

EXAMPLES = """examples:
  python -m dype.metrics outputs/sweep
  python -m dype.metrics outputs/sweep --metrics clip_score aesthetic pick_score
  python -m dype.metrics outputs/sweep --metrics fid kid patch_fid patch_kid --real photos
  python -m dype.metrics outputs/sweep --metrics glcm --overwrite
"""


def parser() -> Parser:
    """Return the parser of the command line."""
    argument_parser = Parser(
        prog="python -m dype.metrics",
        description=__doc__,
        epilog=EXAMPLES,
    )
    flag = argument_parser.add_argument
    flag("folder", type=Path, metavar="FOLDER", help="folder of a finished sweep; has results.csv")
    flag("--metrics", nargs="+", metavar="NAME", help=f"metrics to compute; {', '.join(METRICS)}, "
         "or all (without image_reward, demo_layout, demo_overlap) (default: glcm compression; "
         "with --real also fid kid; with --prompts also clip_score)")  # fmt: skip
    flag("--prompts", type=Path, metavar="FILE", help="text file of the prompts to score against; "
         "line n replaces the sweep's prompt n (default: the prompts in results.csv)")  # fmt: skip
    flag("--real", type=Path, metavar="FOLDER", help="folder of two or more real images; for FID "
         "and KID; those of a sweep's folder count for images of their size alone "
         "(default: none)")  # fmt: skip
    flag("--filter", choices=inception_features.FILTERS, default="bilinear", metavar="NAME",
         help=f"filter that resizes real images; {', '.join(inception_features.FILTERS)} "
         "(default: %(default)s)")  # fmt: skip
    flag("--patch", type=int, metavar="PX", help="side of a patch for patch_fid, patch_kid and "
         "patch_is; 1 to the shortest side (default: 299, or less for smaller images)")  # fmt: skip
    flag("--patches", type=int, metavar="N", default=8, help="number of patches per image; 1 or "
         "more (default: %(default)s)")  # fmt: skip
    flag("--splits", type=int, metavar="N", default=10, help="number of splits of the Inception "
         "score; 1 or more (default: %(default)s)")  # fmt: skip
    flag("--weights", nargs="+", metavar="NAME=PATH", default=[], help="weights of a metric on "
         "this machine; METRIC=FOLDER or inception=FILE (default: from the hub)")  # fmt: skip
    flag("--device", metavar="NAME", help="device that runs the metrics; such as cpu, cuda or mps "
         "(default: the accelerator, or cpu without one)")  # fmt: skip
    flag("--overwrite", action="store_true", help="compute existing values of the selected "
         "metrics again (default: off)")  # fmt: skip
    return argument_parser


def select_metrics(args) -> list[str]:
    """Return the metrics to compute, in the tables' order. Raises UserError."""
    names = [name for word in args.metrics or [] for name in word.split(",") if name]
    unknown = [name for name in names if name not in (*METRICS, "all")]
    if unknown:
        raise UserError(f"--metrics is {unknown[0]!r}, expected {', '.join(METRICS)} or all")
    if "all" in names:
        # without the demo's metrics and ImageReward, because they need its captions or another
        # environment
        names += [name for name in METRICS if name != "image_reward" and name[:5] != "demo_"]
    if args.metrics is None:
        names = ["glcm", "compression", *(["fid", "kid"] if args.real else [])]
        names += ["clip_score"] if args.prompts else []
    with_real = [name for name, metric in SET_METRICS.items() if metric.uses_real]
    with_prompt = [name for name, metric in IMAGE_METRICS.items() if metric.uses_prompt]
    for name in names:
        if name in with_real and not args.real:
            raise UserError(f"{name} compares with real images, expected --real FOLDER")
    for flag, users in (("real", with_real), ("prompts", with_prompt)):
        if getattr(args, flag) and not {*users} & {*names}:
            raise UserError(f"--{flag} is for {', '.join(users)}; name one in --metrics")
    return [name for name in METRICS if name in names]


def parse_weights(words: list[str]) -> dict[str, str | None]:
    """Return the location of the weights of each metric and of Inception. Raises UserError."""
    weights = {name: metric.weights for name, metric in IMAGE_METRICS.items() if metric.weights}
    weights |= {"image_reward": None, "inception": inception_features.WEIGHTS}
    for word in words:
        name, _, path = word.partition("=")
        if name not in weights or not path:
            names = ", ".join(weights)
            raise UserError(f"--weights is {word!r}, expected NAME=PATH, NAME of {names}")
        kind, exists = ("file", Path.is_file) if name == "inception" else ("folder", Path.is_dir)
        if not exists(Path(path)):
            raise UserError(f"--weights {name} is {path!r}, expected a {kind} that exists")
        weights[name] = str(Path(path).absolute())
    return weights


def replace_prompts(rows: list[dict], path: Path) -> tuple[list[dict], str]:
    """Return the rows with a file's prompts, and a note for the protocols. Raises UserError."""
    texts = read_prompts(path, "--prompts")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    if len(texts) != len(prompts):
        raise UserError(
            f"--prompts {path} has {len(texts)}, the sweep {len(prompts)} prompts, expected one "
            "line for each, in the order of results.csv"
        )
    replacement = dict(zip(prompts, texts, strict=True))
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    rows = [row | {"prompt": replacement[row["prompt"]]} for row in rows]
    return rows, f"; prompts of {path.name} ({content})"


def read_existing_values(args, rows: list[dict], protocols: dict[str, str]) -> tuple[dict, dict]:
    """Return the values of earlier runs that this run does not replace.

    Args:
        args: the command line.
        rows: rows of results.csv.
        protocols: protocol of this run by image metric.

    Returns:
        Rows of metrics.csv by (file, metric), and set metrics by (metric, setting).

    Raises:
        UserError: a file is damaged, or a protocol differs and --overwrite is off.
    """
    values = {(row["file"], row["metric"]): row for row in results.read_metrics(args.folder)}
    selected = {(row["file"], name): protocols[name] for row in rows for name in protocols}
    if args.overwrite:
        values = {key: row for key, row in values.items() if key not in selected}
    for key, row in values.items():
        if row["protocol"] != selected.get(key, row["protocol"]):
            raise UserError(
                f"{row['metric']} in {results.METRICS} has the protocol {row['protocol']!r}, this "
                f"run has {selected[key]!r}; use --overwrite to compute it again"
            )
    sets, settings = scores.read_set_entries(args.folder), results.group_by_setting(rows)
    for name, setting in list(sets):
        if setting not in settings or (args.overwrite and name in args.metrics):
            del sets[name, setting]
    return values, sets


def compute(args, rows: list[dict]) -> int:
    """Compute the missing values, write and print the report; returns the exit code."""
    rows, prompt_note = replace_prompts(rows, args.prompts) if args.prompts else (rows, "")
    protocols = {
        name: (args.weights.get(name) or metric.protocol)
        + (prompt_note if metric.uses_prompt else "")
        for name, metric in IMAGE_METRICS.items()
        if name in args.metrics
    }
    values, sets = read_existing_values(args, rows, protocols)
    args.device = args.device or default_device()
    check_device(args.device, "none")
    names = [name for name in protocols if any((row["file"], name) not in values for row in rows)]
    set_names = [name for name in args.metrics if name in SET_METRICS]
    if args.overwrite or len(names) + len(set_names) > 1:
        # Load every metric once, because missing weights must be reported before the run computes
        # or deletes a value.
        for name in names:
            with IMAGE_METRICS[name].load(args.weights.get(name), args.device):
                pass
        if args.overwrite and set_names:
            inception_features.load_inception(args.weights["inception"], args.device)
    if args.overwrite:  # because a stopped run must not leave values of the old protocol
        scores.write_metrics(args.folder, values)
        scores.write_report(args.folder, rows, values, sets, {})
    skipped = scores.score_sets(args, rows, set_names, values, sets)
    skipped |= scores.score_images(args, rows, names, values, protocols)
    print(scores.write_report(args.folder, rows, values, sets, skipped), end="")
    if not skipped:
        return 0
    path = args.folder / scores.TABLE
    return fail("dype.metrics", f"skipped {len(skipped)} and scored the rest; {path} has reasons")


def run(args) -> int:
    """Check the arguments and compute. Raises UserError, UnavailableError, OSError."""
    args.metrics = select_metrics(args)
    args.weights = parse_weights(args.weights)
    with raise_user_errors():
        rows = [row for row in results.read_rows(args.folder) if not row["error"]]
        for row in rows:
            row["size"] = int(row["height"]), int(row["width"])
        if not rows:
            raise ValueError(
                f"{args.folder} has no {results.RESULTS} with images, expected the folder of a "
                "finished sweep"
            )
        viewer.check_page(args.folder / viewer.PAGE)
        args.real_paths = inception_features.list_real_images(args.real) if args.real else {}
    for name in ("patches", "splits"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    patch_metrics = {name for name, metric in SET_METRICS.items() if metric.uses_patches}
    side = min(min(row["size"]) for row in rows)
    if args.patch is not None and patch_metrics & {*args.metrics} and not 1 <= args.patch <= side:
        raise UserError(f"--patch is {args.patch}, expected 1 to {side}, the shortest side")
    with results.lock_folder(args.folder):
        for partial_file in args.folder.glob(".metrics.*.part"):  # left by a killed run
            partial_file.unlink()
        exit_code = compute(args, rows)
        print(viewer.write_sweep_page(results.read_rows(args.folder), args.folder))
        return exit_code


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Exit codes: 0, 2 for a mistake of the user, 1 for other failures, 130 after Ctrl-C.
    """
    return run_command(
        "dype.metrics",
        lambda: run(parser().parse_args(argv)),
        out_of_memory="try --device cpu",
        interrupted="the same command computes the rest",
    )


if __name__ == "__main__":
    sys.exit(main())
