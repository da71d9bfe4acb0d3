"""Check the output of a run, before anything is loaded."""

from pathlib import Path

from dype.cli.flags import RunOptions
from dype.errors import UserError, raise_user_errors
from dype.sampling import records
from dype.sampling.settings import RunSettings
from dype.sweep import results


@raise_user_errors()
def check_output(options: RunOptions, run: RunSettings) -> None:
    """Raise UserError if the output of a run, or of the first of a sweep, cannot be written."""
    if not options.sweep:
        output_path(options, run)
    elif options.output is not None:
        raise UserError("--output names one file, expected one image or --output_dir")
    else:
        results.check_columns(options.cols)


@raise_user_errors()
def read_sweep(folder: str | Path, columns: str | None = None) -> list[dict]:
    """Return the rows of a finished sweep. Raises UserError, for wrong --cols too, and OSError."""
    results.check_columns(columns)
    rows = results.read_rows(Path(folder))
    if not rows:
        raise ValueError(f"{folder} has no finished sweep, expected one with its results.csv")
    return rows


def output_path(options: RunOptions, run: RunSettings) -> Path:
    """Return the path of the image. Raises UserError for a file that --output cannot name."""
    if options.output is None:
        name = "image.png" if options.no_metadata else run.file_name
        path = Path(options.output_dir or "outputs") / name
        path = path if options.overwrite else records.next_free_path(path)
    else:
        path = Path(options.output)
        if path.suffix.lower() != ".png":
            raise UserError(f"--output is {options.output!r}, expected a name ending in .png")
        for target in (path, path.with_suffix(".json")):
            if target.is_dir() or (target.exists() and not options.overwrite):
                raise UserError(f"--output: {target} exists, expected --overwrite or another name")
    return path
