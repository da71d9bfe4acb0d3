"""Generate images beyond the training resolution with DyPE: `python run_dype.py --prompt "..."`."""

import io
import os
import sys
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

# Before torch is imported; dype/__init__.py has the reason.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dype.cli.flags import parse
from dype.cli.output import check_output, check_words, read_sweep
from dype.cli.settings import resolve
from dype.cli.validation import check_paths
from dype.errors import run_command
from dype.pipelines.processes import rank_and_world_size
from dype.pipelines.sources import check_reached, check_sources

PROGRAM = "run_dype.py"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Exit codes: 0, 2 for a mistake of the user, 1 for other failures, 130 after Ctrl-C.
    """
    rank, _ = rank_and_world_size()
    with redirect_stdout(io.StringIO()) if rank else nullcontext():  # only one process prints
        return run_command(
            PROGRAM,
            partial(command, sys.argv[1:] if argv is None else argv, rank),
            out_of_memory="try --offload group or --quantize int8",
            interrupted="the same command generates the remaining images of a sweep",
            rank=rank,
        )


def command(argv: list[str], rank: int) -> int:
    """Parse and resolve the arguments, then generate one image or a sweep."""
    words = vars(parse(argv))
    check_words(words)
    if "grid_from" in words:
        check_paths(words)
        folder, columns = words["grid_from"], words.get("cols")
        rows = read_sweep(folder, columns)
    else:
        options, runs = resolve(words)
        check_output(options, runs[0])
        check_sources(runs[0].model, runs[0].entry, **runs[0].files)
        if not options.dry_run:
            check_reached(runs[0].model, runs[0].entry, runs[0].files["loras"])
    # Here, because torch and diffusers take seconds to import, which a mistake need not wait for.
    from dype.cli import generate

    if "grid_from" in words:
        return 0 if rank else generate.draw_sheets(rows, Path(folder), columns)
    return generate.generate_images(options, runs)


if __name__ == "__main__":
    sys.exit(main())
