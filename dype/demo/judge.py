"""What a sweep of the demo model drew: `python -m dype.demo.judge FOLDER`.

Every picture is judged by `dype.demo.check` against its own prompt: per setting, the shares with
the right layout and shape with their Wilson 95 % intervals; the overlap (intersection over union)
of the object with the asked shape at its best place, and seconds, as mean and standard deviation.
Needs the packages of requirements-dev.txt.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from dype import records, sheets
from dype.ablation import read_rows
from dype.demo.evaluate import check, share
from dype.demo.scenes import COLOURS, SHAPES

CAPTION = re.compile(
    f"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) on ({'|'.join(COLOURS)}) leaves"
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m dype.demo.judge", description=__doc__)
    made.add_argument("folder", type=Path, help="of a sweep, with its results.csv")
    return made


def main(argv: list[str] | None = None) -> int:
    folder = parser().parse_args(argv).folder
    found = [row for row in read_rows(folder) if not row["error"]]
    if not found:
        parser().error(f"{folder} has no finished sweep, expected one of the demo model")
    for name, rows in sheets.by_setting(found).items():
        layouts, shapes, overlaps = [], [], []
        for row in rows:
            asked = CAPTION.match(row["prompt"])
            if asked is None:
                parser().error(f"{row['prompt']!r} is no caption of the demo model")
            colour, shape, ground = asked.groups()
            picture = np.asarray(records.open_picture(folder / row["file"]))
            verdict = check(picture, colour, ground)
            layouts.append(verdict.layout)
            shapes.append(verdict.shape == shape)
            overlaps.append(verdict.overlaps[shape])
        shares = []
        for passed in (layouts, shapes):
            (low, high), part = share(passed)["interval"], share(passed)["share"]
            shares.append(f"{part:.2f} [{low:.2f}, {high:.2f}]")
        seconds = sheets.spread([float(row["seconds"]) for row in rows], 1)
        print(
            f"n {len(rows)}  layout {shares[0]}  shape {shares[1]}  "
            f"overlap {sheets.spread(overlaps, 2)}  seconds {seconds}  {name}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
