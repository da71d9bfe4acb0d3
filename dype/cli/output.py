"""Check the output of a run, before anything is loaded."""

from pathlib import Path

from dype.cli.flags import RunOptions, spell_flag
from dype.errors import UserError, raise_user_errors
from dype.sampling import records
from dype.sampling.settings import RunSettings
from dype.sweep import results

MAX_WEBP_SIDE = 16383  # px; JPEG has 65535, more than any image of this program


def check_words(words: dict) -> None:
    """Raise UserError for flags of a command line that another one would leave without effect.

    words: flag name -> text; not of --config, whose flags a command line may replace.
    """
    if {"output", "output_dir"} <= words.keys():
        raise UserError(
            f"--output is {words['output']!r}, which names the folder too, expected no --output_dir"
        )
    if "grid_from" in words:
        names = [name for name in words if name not in ("grid_from", "cols", "yes")]
        if names:
            flags = ", ".join(spell_flag(name, words[name]) for name in names)
            raise UserError(f"--grid_from takes --cols alone, expected no {flags}")


@raise_user_errors()
def check_output(options: RunOptions, run: RunSettings) -> None:
    """Raise UserError if the output of a run, or of the first of a sweep, cannot be written."""
    results.check_columns(options.cols)
    if not options.sweep:
        output_path(options, run)
    elif options.output is not None:
        raise UserError("--output names one file, expected one image or --output_dir")


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
        check_neighbors(path)
    else:
        path = Path(options.output)
        if path.suffix.lower() not in records.FORMATS:
            endings = ", ".join(records.FORMATS)
            raise UserError(f"--output is {options.output!r}, expected a name in {endings}")
        if path.suffix.lower() == ".webp" and max(run.height, run.width) > MAX_WEBP_SIDE:
            raise UserError(
                f"--output is {options.output!r}, but WebP has at most {MAX_WEBP_SIDE} px a side, "
                f"and the image {run.width}x{run.height}, expected .png or .jpg"
            )
        check_neighbors(path)
        for target in (path, path.with_suffix(".json")):
            if target.is_dir() or (target.exists() and not options.overwrite):
                raise UserError(f"--output: {target} exists, expected --overwrite or another name")
    return path


def check_neighbors(path: Path) -> None:
    """Raise UserError if an image with another ending would lose its record to this one."""
    if neighbors := records.find_neighbors(path):
        raise UserError(
            f"--output: {neighbors[0]} exists, whose record would have the name of that of "
            f"{path}, expected another name"
        )
