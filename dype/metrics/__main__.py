"""Compute the metrics of a finished sweep: `python -m dype.metrics FOLDER`.

Values of image metrics go to metrics.csv, a row per image and metric. Means and set metrics per
setting, with 95 % intervals, go to metrics.json and metrics.txt. What is there with the same
protocol is not computed again. docs/metrics.md says how each metric is computed.
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
from dype.sweep import results
from dype.sweep.grid import read_prompts


def parser() -> Parser:
    command = Parser(prog="python -m dype.metrics", description=__doc__)
    flag = command.add_argument
    flag("folder", type=Path, metavar="FOLDER", help="of a finished sweep, with its results.csv")
    flag("--metrics", nargs="+", metavar="NAME", help=f"{', '.join(METRICS)}, or all (but "
         "image_reward and the demo's); default: glcm compression, with --real also fid kid, with "
         "--prompts also clip_score")  # fmt: skip
    flag("--prompts", type=Path, metavar="FILE", help="prompts to score against, one per line, "
         "the n-th for the sweep's n-th prompt; default: those in results.csv")  # fmt: skip
    flag("--real", type=Path, metavar="FOLDER", help="real images, for FID and KID")
    flag("--filter", choices=inception_features.FILTERS, default="bilinear",
         help="filter that resizes real images; default: bilinear")  # fmt: skip
    flag("--patch", type=int, metavar="PX", help="side of a patch, for patch_fid, patch_kid, "
         "patch_is; default: 299, or the shorter side if less")  # fmt: skip
    flag("--patches", type=int, metavar="N", default=8, help="patches per image; default: 8")
    flag("--splits", type=int, metavar="N", default=10, help="of Inception score; default: 10")
    flag("--weights", nargs="+", metavar="NAME=PATH", default=[], help="folder with the weights "
         "of a metric, or inception=FILE; default: from the hub")  # fmt: skip
    flag("--device", metavar="NAME", help="default: the accelerator, if there is one")
    flag("--overwrite", action="store_true", help="compute the metrics asked for anew")
    return command


def select_metrics(args) -> list[str]:
    """Return the metrics to compute, in the tables' order. Raises UserError."""
    names = [name for word in args.metrics or [] for name in word.split(",") if name]
    unknown = [name for name in names if name not in (*METRICS, "all")]
    if unknown:
        raise UserError(f"--metrics is {unknown[0]!r}, expected {', '.join(METRICS)} or all")
    if "all" in names:  # but the demo's, for its captions, and ImageReward, for an environment
        names += [name for name in METRICS if name != "image_reward" and name[:5] != "demo_"]
    if args.metrics is None:
        names = ["glcm", "compression", *(["fid", "kid"] if args.real else [])]
        names += ["clip_score"] if args.prompts else []
    comparing = [name for name, metric in SET_METRICS.items() if metric.real]
    prompted = [name for name, metric in IMAGE_METRICS.items() if metric.prompted]
    for name in names:
        if name in comparing and not args.real:
            raise UserError(f"{name} compares with real images, expected --real FOLDER")
    for flag, users in (("real", comparing), ("prompts", prompted)):
        if getattr(args, flag) and not {*users} & {*names}:
            raise UserError(f"--{flag} is for {', '.join(users)}; name one in --metrics")
    return [name for name in METRICS if name in names]


def parse_weights(words: list[str]) -> dict[str, str | None]:
    """Return where the weights of each metric, and of Inception, are. Raises UserError."""
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
    """Return the rows with a file's prompts, and what protocols say of it. Raises UserError."""
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


def read_kept_values(args, rows: list[dict], protocols: dict[str, str]) -> tuple[dict, dict]:
    """Return what an earlier run computed and this one does not.

    Rows of metrics.csv by (file, metric), and set metrics by (metric, setting).
    Raises UserError for spoiled files, and for values of another protocol without --overwrite.
    """
    values = {(row["file"], row["metric"]): row for row in results.read_metrics(args.folder)}
    asked = {(row["file"], name): protocols[name] for row in rows for name in protocols}
    if args.overwrite:
        values = {key: row for key, row in values.items() if key not in asked}
    for key, row in values.items():
        if row["protocol"] != asked.get(key, row["protocol"]):
            raise UserError(
                f"{row['metric']} in {results.METRICS} is by {row['protocol']!r}, asked for "
                f"{asked[key]!r}, expected the same or --overwrite"
            )
    sets, settings = scores.read_set_entries(args.folder), results.group_by_setting(rows)
    for name, setting in list(sets):
        if setting not in settings or (args.overwrite and name in args.metrics):
            del sets[name, setting]
    return values, sets


def compute(args, rows: list[dict]) -> int:
    """Compute what is not there yet, write and print it; returns the exit code."""
    rows, source = replace_prompts(rows, args.prompts) if args.prompts else (rows, "")
    protocols = {
        name: (args.weights.get(name) or metric.protocol) + (source if metric.prompted else "")
        for name, metric in IMAGE_METRICS.items()
        if name in args.metrics
    }
    values, sets = read_kept_values(args, rows, protocols)
    args.device = args.device or default_device()
    check_device(args.device, "none")
    names = [name for name in protocols if any((row["file"], name) not in values for row in rows)]
    set_names = [name for name in args.metrics if name in SET_METRICS]
    if args.overwrite or len(names) + len(set_names) > 1:
        for name in names:  # what the last one lacks is said before anything is computed or deleted
            with IMAGE_METRICS[name].load(args.weights.get(name), args.device):
                pass
        if args.overwrite and set_names:
            inception_features.load_inception(args.weights["inception"], args.device)
    if args.overwrite:  # a stopped run must leave no values of the way before
        scores.write_metrics(args.folder, values)
        scores.write_report(args.folder, rows, values, sets, {})
    skipped = scores.score_sets(args, rows, set_names, values, sets)
    skipped |= scores.score_images(args, rows, names, values, protocols)
    print(scores.write_report(args.folder, rows, values, sets, skipped), end="")
    if not skipped:
        return 0
    where = f"{args.folder / scores.TABLE} says which and why"
    return fail("dype.metrics", f"skipped {len(skipped)}, the rest is scored: {where}")


def command(args) -> int:
    """Check what is asked for, and compute it. Raises UserError, UnavailableError, OSError."""
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
        args.reals = inception_features.list_real_images(args.real) if args.real else []
    for name in ("patches", "splits"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, expected 1 or more")
    patched = {name for name, metric in SET_METRICS.items() if metric.patched}
    side = min(min(row["size"]) for row in rows)
    if args.patch is not None and patched & {*args.metrics} and not 1 <= args.patch <= side:
        raise UserError(f"--patch is {args.patch}, expected 1 to {side}, the shortest side")
    with results.lock_folder(args.folder):
        for part in args.folder.glob(".metrics.*.part"):  # of a killed run
            part.unlink()
        return compute(args, rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 1 for the rest."""
    return run_command(
        "dype.metrics",
        lambda: command(parser().parse_args(argv)),
        out_of_memory="try --device cpu",
        interrupted="the same command computes the rest",
    )


if __name__ == "__main__":
    sys.exit(main())
