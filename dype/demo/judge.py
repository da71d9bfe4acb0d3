"""What a sweep of the demo model drew: `python -m dype.demo.judge FOLDER`.

Every picture is judged by `layout_check` against its own prompt: per setting, the shares with the
right layout and shape with their Wilson 95 % intervals; the overlap (intersection over union)
of the object with the asked shape at its best place, and seconds, as mean and standard deviation;
and what the overlap gains over the first setting, picture by picture.
Needs the packages of requirements-dev.txt.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from dype.demo.scenes import COLOURS, SHAPES
from dype.sampling import records
from dype.sweep import results
from dype.sweep.results import read_rows

try:
    from dype.demo.layout_check import check
    from dype.demo.scores import shares, shown
except ModuleNotFoundError as error:
    sys.exit(f"there is no {error.name}; pip install -r requirements-dev.txt")

CAPTION = re.compile(
    f"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) on ({'|'.join(COLOURS)}) leaves"
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m dype.demo.judge", description=__doc__)
    made.add_argument("folder", type=Path, help="of a sweep, with its results.csv")
    return made


def judge(row: dict, folder: Path) -> tuple[bool, bool, float]:
    """Whether layout and shape are right, and the overlap. Raises ValueError for other prompts."""
    asked = CAPTION.match(row["prompt"])
    if asked is None:
        raise ValueError(f"{row['prompt']!r} is no caption of the demo model")
    colour, shape, ground = asked.groups()
    verdict = check(np.asarray(records.open_picture(folder / row["file"])), colour, ground)
    return verdict.layout, verdict.shape == shape, verdict.overlaps[shape]


def main(argv: list[str] | None = None) -> int:
    folder = parser().parse_args(argv).folder
    try:
        rows = [row for row in read_rows(folder) if not row["error"]]
        if not rows:
            raise ValueError(f"{folder} has no finished sweep, expected one of the demo model")
        verdicts = {row["file"]: judge(row, folder) for row in rows}
    except (OSError, ValueError) as error:
        parser().error(str(error))
    first = None
    for name, some in results.by_setting(rows).items():
        layouts, shapes, overlaps = zip(*(verdicts[row["file"]] for row in some), strict=True)
        rates = [shown(shares(passed)) for passed in (layouts, shapes)]
        seconds = results.spread([float(row["seconds"]) for row in some], 1)
        print(
            f"n {len(some)}  layout {rates[0]}  shape {rates[1]}  "
            f"overlap {results.spread(overlaps, 2)}  seconds {seconds}  {name}"
        )
        samples = {(row["seed"], row["prompt"]): verdicts[row["file"]][2] for row in some}
        first = first or samples
        if samples is not first and samples.keys() == first.keys():
            gains = [samples[sample] - first[sample] for sample in samples]
            print(f"      overlap against the first, paired: {results.spread(gains, 3)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
