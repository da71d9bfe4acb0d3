"""Positions, thetas and guidance of every family, written down independently of the package."""

from typing import NamedTuple

import torch
from tiny import TEXT

from dype import DyPEConfig
from dype.embedders_complex import pad_to_32

GRID = (8, 12)  # rows and columns of tokens at 128 x 192 px
CONFIG = DyPEConfig("yarn", base_resolution=64, shift="model")  # L = 4 tokens


class Format(NamedTuple):
    """Expected encoding and guidance of one family."""

    theta: float
    axes: tuple  # dimensions per axis
    calls: tuple  # positions of each embedder call within one denoiser call
    cfg: float  # a guidance scale at which the negative prompt has an effect
    calls_per_step: int  # denoiser calls per step at that scale


def grid(*leading, zeros=0, centered=False):
    """Return the positions (*leading, row, column, *zeros) of GRID in row-major order."""
    rows, columns = (range(n) for n in GRID)
    if centered:
        rows, columns = (range(-(n - n // 2), n // 2) for n in GRID)
    return [(*leading, r, c, *[0] * zeros) for r in rows for c in columns]


ORIGIN = [(0, 0, 0)] * TEXT
CAPTION = pad_to_32(TEXT)  # Z-Image pads its caption to a multiple of 32 tokens
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
        2000.0, (4, 4, 4, 4), (grid(0, zeros=1), [(0, 0, 0, i) for i in range(TEXT)]), 3.0, 2
    ),
    "chroma": Format(10000.0, (4, 6, 6), (ORIGIN + grid(0),), 3.0, 2),
}


def assert_table(table, expected):
    """Assert that both complex tables agree within 1e-6."""
    expected = torch.tensor(expected, dtype=torch.complex128)
    assert (table - expected).abs().max() <= 1e-6
