"""The paper's figures, and four that it lacks: `python -m dype.figures NAME [--out FILE]`.

Nothing is drawn with a model here. fig6, fig7 and ratios follow from the formulas; fig2a, fig2b,
fig5, fig18, eq11, frontier and pairs read numbers saved in docs/data, and the others the pictures
of a finished sweep: `python -m dype.figures fig3 outputs/sweep`. Needs the packages of
requirements-dev.txt.
"""

import argparse
import inspect
import sys
from pathlib import Path

from dype.flags import Parser, UserError

try:
    import matplotlib

    from dype import figure_formulas as formulas
    from dype import figure_pictures as picture_rows
    from dype import figure_style as style
    from dype import figure_trajectories as sampled
    from dype import figure_truth as truth_table
except ModuleNotFoundError as error:
    sys.exit(f"there is no {error.name}; pip install -r requirements-dev.txt")

FIGURES = {
    "fig2a": sampled.fig2a,
    "fig2b": sampled.fig2b,
    "fig5": truth_table.fig5,
    "fig6": formulas.fig6,
    "fig7": formulas.fig7,
    "fig18": sampled.fig18,
    "eq11": sampled.eq11,
    "frontier": truth_table.frontier,
    "pairs": truth_table.pairs,
    "ratios": formulas.ratios,
    **picture_rows.FIGURES,
}


def parser() -> Parser:
    made = Parser(
        prog="python -m dype.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("name", metavar="NAME", choices=FIGURES, help=", ".join(FIGURES))
    made.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="of a finished sweep")
    made.add_argument(
        "--out", metavar="FILE", type=Path, help="(default: outputs/figures/NAME.png)"
    )
    for name, default in {
        "trajectories": sampled.TRAJECTORIES,
        "unguided": sampled.UNGUIDED,
        "ground_truth": truth_table.GROUND_TRUTH,
    }.items():
        made.add_argument(f"--{name}", metavar="FILE", type=Path, help=f"(default: {default})")
    made.add_argument(
        "--score", metavar="WORD", help=f"{', '.join(truth_table.SCORES)} (default: joint)"
    )
    made.add_argument(
        "--settings",
        metavar="NAME",
        nargs="+",
        help=f"(default: {' '.join(truth_table.STANDARD)})",
    )
    picture_rows.add_flags(made)
    return made


def draw(args: argparse.Namespace):
    """The figure asked for. Raises UserError, ValueError for flags that it has no use for."""
    function = FIGURES[args.name]
    known = inspect.signature(function).parameters
    given = {
        name: value
        for name, value in vars(args).items()
        if value is not None and name not in ("name", "out")
    }
    for name in given.keys() - known.keys():
        users = [n for n, f in FIGURES.items() if name in inspect.signature(f).parameters]
        flag = "FOLDER" if name == "folder" else f"--{name}"
        raise UserError(f"{flag} is for {', '.join(users)}, expected none with {args.name}")
    if "folder" in known and "folder" not in given:
        raise UserError(f"{args.name} shows pictures, expected the FOLDER of a finished sweep")
    return function(**given)


def main(argv: list[str] | None = None) -> int:
    try:
        args = parser().parse_args(argv)
        out = args.out or Path("outputs/figures") / f"{args.name}.png"
        if out.suffix.lower() not in style.FORMATS:
            raise UserError(f"--out is {out}, expected a name in {', '.join(style.FORMATS)}")
        with matplotlib.rc_context(style.STYLE):
            style.save(draw(args), out, palette=args.name not in picture_rows.FIGURES)
    except (UserError, ValueError) as error:
        return failed(2, error)
    except OSError as error:
        return failed(1, error)
    print(out)
    return 0


def failed(code: int, error: Exception) -> int:
    print(f"dype.figures: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
