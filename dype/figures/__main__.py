"""Draw a figure: `python -m dype.figures NAME`. It generates no image.

fig6, fig7 and ratios follow from formulas.
fig2a, fig2b, fig18 and eq11 show measurements of dype.demo.trajectories in docs/data.
fig5 and frontier show results of dype.demo.evaluate in docs/data.
The other figures show images of a sweep, with enlarged crops. They need its FOLDER.
fig1 to fig18 are figures of the paper; eq11, frontier and ratios are not.
The packages of requirements-dev.txt are needed.
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
    sys.exit(f"dype.figures: it needs {error.name}; pip install -r requirements-dev.txt")

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


EXAMPLES = """examples:
  python -m dype.figures fig2b
  python -m dype.figures fig5 --settings base pi dy_pi:1:1 --score layout
  python -m dype.figures fig3 outputs/sweep --where seed=1 --crops 0.1,0.1,0.2 0.7,0.7,0.2
  python -m dype.figures fig1 outputs/sweep --methods base,pi,dy_pi --out outputs/pi.jpg
"""
FLAG_NAMES = {"folder": "FOLDER", "filters": "--where"}  # argument -> flag, where they differ


def parser() -> Parser:
    """Return the parser of the command line."""
    argument_parser = Parser(prog="python -m dype.figures", description=__doc__, epilog=EXAMPLES)
    flag = argument_parser.add_argument
    flag("name", metavar="NAME", choices=FIGURES, help=f"name of the figure; {', '.join(FIGURES)}")
    flag("folder", metavar="FOLDER", nargs="?", type=Path, help="folder of a finished sweep")
    flag("--out", metavar="FILE", type=Path, help="file of the figure; in "
         f"{', '.join(style.FORMATS)} (default: outputs/figures/NAME.png)")  # fmt: skip
    flag("--trajectories", metavar="FILE", type=Path, help="measurements for fig2a, fig2b, fig18 "
         f"and eq11 (default: {saved_numbers.TRAJECTORIES})")  # fmt: skip
    flag("--unguided", metavar="FILE", type=Path, help="measurements with guidance 1 for eq11 "
         f"(default: {saved_numbers.UNGUIDED})")  # fmt: skip
    flag("--ground_truth", metavar="FILE", type=Path, help="results for fig5 and frontier "
         f"(default: fig5 {saved_numbers.LARGE}, frontier "
         f"{saved_numbers.MAIN})")  # fmt: skip
    flag("--score", metavar="NAME", help="score on the y axis; fig5: "
         f"{', '.join(saved_numbers.SCORES)}; frontier: {', '.join(saved_numbers.TEXTURE)} "
         "(default: fig5 joint, frontier spectrum)")  # fmt: skip
    flag("--settings", metavar="NAME", nargs="+", help="settings of fig5, or those of frontier "
         "that get intervals; names in the results (default: fig5 "
         f"{' '.join(saved_numbers.LARGE_SETTINGS)})")  # fmt: skip
    flag("--crops", metavar="X,Y,SIZE", nargs="*", help="squares to enlarge; left, top and side "
         "in shares of the width, the height and the shorter side (default: one, where the edges "
         "are strongest, pixel for pixel; fig16 none; fig17 three)")  # fmt: skip
    flag("--methods", metavar="NAME,...", nargs="+", help="methods from left to right; as in "
         "results.csv (default: the paper's)")  # fmt: skip
    flag("--where", dest="filters", metavar="COLUMN=VALUE", nargs="+", help="images to show; by "
         "columns of results.csv (default: the largest size and the first seed)")  # fmt: skip
    return argument_parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Exit codes: 0, 2 for a mistake of the user, 1 for other failures, 130 after Ctrl-C.
    """
    return run_command("dype.figures", lambda: run(parser().parse_args(argv)))


@raise_user_errors()
def run(args: argparse.Namespace) -> None:
    """Draw and save a figure. Raises UserError, also for flags of other figures, and OSError."""
    out = args.out or Path("outputs/figures") / f"{args.name}.png"
    if out.suffix.lower() not in style.FORMATS:
        raise UserError(f"--out is {out}, expected a name in {', '.join(style.FORMATS)}")
    function = FIGURES[args.name]
    accepted = inspect.signature(function).parameters
    explicit = {name: value for name, value in vars(args).items() if value is not None}
    for name in explicit.keys() - accepted.keys() - {"name", "out"}:
        users = [n for n, f in FIGURES.items() if name in inspect.signature(f).parameters]
        flag = FLAG_NAMES.get(name, f"--{name}")
        raise UserError(f"{flag} is for {', '.join(users)}, expected none with {args.name}")
    if "folder" in accepted and "folder" not in explicit:
        raise UserError(f"{args.name} shows images, expected the FOLDER of a finished sweep")
    with matplotlib.rc_context(style.STYLE):
        figure = function(**{name: explicit[name] for name in explicit.keys() & accepted.keys()})
        style.save(figure, out, palette="folder" not in accepted)
    print(out)


if __name__ == "__main__":
    sys.exit(main())
