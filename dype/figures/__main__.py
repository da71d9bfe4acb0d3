"""The paper's figures, and three that it lacks: `python -m dype.figures NAME [--out FILE]`.

Nothing is drawn with a model here. fig6, fig7 and ratios follow from the formulas; fig2a, fig2b,
fig5, fig18, eq11 and frontier read numbers saved in docs/data, and the others the images of a
finished sweep: `python -m dype.figures fig3 outputs/sweep`. Needs the packages of
requirements-dev.txt.
"""

import argparse
import inspect
import sys
from pathlib import Path

from dype.errors import Parser, UserError, raise_user_errors, run_command

try:
    import matplotlib

    from dype.figures import formulas, image_rows, saved_numbers, style
except ModuleNotFoundError as error:
    sys.exit(f"there is no {error.name}; pip install {error.name}")

FIGURES = {
    "fig2a": saved_numbers.fig2a,
    "fig2b": saved_numbers.fig2b,
    "fig5": saved_numbers.fig5,
    "fig6": formulas.fig6,
    "fig7": formulas.fig7,
    "fig18": saved_numbers.fig18,
    "eq11": saved_numbers.eq11,
    "frontier": saved_numbers.frontier,
    "ratios": formulas.ratios,
    **image_rows.FIGURES,
}


def parser() -> Parser:
    made = Parser(
        prog="python -m dype.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = made.add_argument
    flag("name", metavar="NAME", choices=FIGURES, help=", ".join(FIGURES))
    flag("folder", metavar="FOLDER", nargs="?", type=Path, help="of a finished sweep")
    file = {"metavar": "FILE", "type": Path}
    flag("--out", **file, help="(default: outputs/figures/NAME.png)")
    flag("--trajectories", **file, help=f"(default: {saved_numbers.TRAJECTORIES})")
    flag("--unguided", **file, help=f"(default: {saved_numbers.UNGUIDED})")
    flag("--ground_truth", **file, help=f"(default: {saved_numbers.GROUND_TRUTH})")
    flag("--score", metavar="WORD", help=f"{', '.join(saved_numbers.SCORES)} (default: joint)")
    standard = " ".join(saved_numbers.FORMS)
    flag("--settings", metavar="NAME", nargs="+", help=f"(default: {standard})")
    usual = f"(default: {image_rows.MIDDLE}; fig16 none)"
    shares = f"shares of width, height and the shorter side {usual}"
    flag("--crops", metavar="X,Y,SIZE", nargs="*", help=shares)
    flag("--methods", metavar="NAME,...", nargs="+", help="side by side (default: the paper's)")
    columns = "of results.csv, as seed=1 (default: the largest size and the first seed)"
    flag("--where", metavar="COLUMN=VALUE", nargs="+", help=columns)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 1 for the rest."""
    return run_command("dype.figures", lambda: run(parser().parse_args(argv)))


@raise_user_errors()
def run(args: argparse.Namespace) -> None:
    """Draw and save. Raises UserError, also for flags that the figure has no use for; OSError."""
    out = args.out or Path("outputs/figures") / f"{args.name}.png"
    if out.suffix.lower() not in style.FORMATS:
        raise UserError(f"--out is {out}, expected a name in {', '.join(style.FORMATS)}")
    function = FIGURES[args.name]
    known = inspect.signature(function).parameters
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in given.keys() - known.keys() - {"name", "out"}:
        users = [n for n, f in FIGURES.items() if name in inspect.signature(f).parameters]
        flag = "FOLDER" if name == "folder" else f"--{name}"
        raise UserError(f"{flag} is for {', '.join(users)}, expected none with {args.name}")
    if "folder" in known and "folder" not in given:
        raise UserError(f"{args.name} shows images, expected the FOLDER of a finished sweep")
    with matplotlib.rc_context(style.STYLE):
        made = function(**{name: given[name] for name in given.keys() & known.keys()})
        style.save(made, out, palette="folder" not in known)
    print(out)


if __name__ == "__main__":
    sys.exit(main())
