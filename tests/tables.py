"""The positions, frequencies and guidance of every family, written down without the package."""

from typing import NamedTuple

import torch
from tiny import TEXT

from dype import DyPEConfig
from dype.embedders_complex import pad_to_32

GRID = (8, 12)  # tokens of 128 x 192 px
CONFIG = DyPEConfig("yarn", base_resolution=64, shift="model")  # L = 4 tokens


class Format(NamedTuple):
    """What the tests know of a family by themselves."""

    theta: float
    axes: tuple
    calls: tuple  # the positions of every call of the embedder in a denoiser call
    cfg: float  # a guidance that makes negative prompts count
    calls_per_step: int  # of the denoiser, then


def grid(*before, behind=0, centered=False):
    rows, columns = (range(n) for n in GRID)
    if centered:
        rows, columns = (range(-(n - n // 2), n // 2) for n in GRID)
    return [(*before, r, c, *[0] * behind) for r in rows for c in columns]


ORIGIN = [(0, 0, 0)] * TEXT
CAPTION = pad_to_32(TEXT)
FORMATS = {
    "z-image": Format(
        256.0,
        (4, 6, 6),
        (grid(CAPTION + 1), [(1 + i, 0, 0) for i in range(CAPTION)]),
        3.0,
        1,
    ),
    "qwen-image": Format(10000.0, (4, 6, 6), (grid(0, centered=True),), 3.0, 2),
    "krea2": Format(1000.0, (4, 6, 6), (ORIGIN + grid(0),), 3.0, 2),
    "flux2": Format(
        2000.0, (4, 4, 4, 4), (grid(0, behind=1), [(0, 0, 0, i) for i in range(TEXT)]), 3.0, 2
    ),
    "chroma": Format(10000.0, (4, 6, 6), (ORIGIN + grid(0),), 3.0, 2),
}


def assert_table(table, expected):
    expected = torch.tensor(expected, dtype=torch.complex128)
    assert (table - expected).abs().max() <= 1e-6
