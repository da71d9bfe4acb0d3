"""Read the token grid and exact positions of the generated image from FLUX's ids.

Ids are (kind, row, column, ...) of each token: kind 0 is text and the generated image.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F


class ImageIds(NamedTuple):
    """Parsed ids of a denoiser call."""

    ids: torch.Tensor  # exact, float32 [S, A]
    grid: tuple[int, int]  # rows and columns of the generated image
    num_reference: int | None  # tokens behind it; None: it does not come first, or is no grid
    has_distinct_kinds: bool  # whether no reference has kind 0


def parse_image_ids(ids: torch.Tensor, num_text: int = 0) -> ImageIds:
    """Parse the ids of a denoiser call on the host.

    The generated image is the first grid of kind 0; further grids are references. In bfloat16 rows
    beyond 256 merge, but the length of the first row is still right; the ids of each grid are
    counted again from it. Ids in another order stay as they are; the grid is then their extent.

    Args:
        ids: `img_ids` of a FLUX transformer, [S, A] or [B, S, A].
        num_text: text tokens at the beginning, which are not parsed.

    Raises:
        ValueError: no token has kind 0.
    """
    ids = first_sample(ids)  # [B, S, 3] is deprecated in diffusers
    host = ids[num_text:].float().cpu()
    kinds = host[:, 0]
    starts = [0, *((kinds[1:] != kinds[:-1]).nonzero().flatten() + 1).tolist(), len(host)]
    exact, grid, num_reference, size = [], None, None, 0
    for start, end in pairwise(starts):
        block = host[start:end]
        counted, height, width = count_grid(block, ids.dtype)
        references, are_grids = count_grids(block[len(counted) :], ids.dtype)
        exact += [counted, references]
        if kinds[start] == 0 and grid is None:
            size = len(counted) if are_grids and not block[0].any() else 0
            grid = (height, width) if size else extent(block)
            num_reference = len(host) - size if size and start == 0 else None
    if grid is None:
        found_kinds = ", ".join(f"{kind:g}" for kind in kinds.unique().tolist())
        raise ValueError(
            f"the kinds in img_ids are {found_kinds}, expected 0 for the generated image; DyPE "
            "does not support in-context pipelines that count from 1"
        )
    exact = torch.cat([ids[:num_text].float(), torch.cat(exact).to(ids.device)])
    return ImageIds(exact, grid, num_reference, not (kinds[size:] == 0).any())


def count_grid(block: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int, int]:
    """Return exact ids of the row-major grid at the beginning of a block, its rows and columns.

    They are counted from the first token's ids.

    Args:
        block: ids of one kind, float32 [S, A].
        dtype: of the ids before; it may have rounded them.
    """
    begins_row = (block[1:, 1] != block[0, 1]) | (block[1:, 2] < block[:-1, 2])
    width = int(begins_row.nonzero()[0]) + 1 if begins_row.any() else len(block)
    counted = make_grid_ids(0, -(-len(block) // width), width)[: len(block)]
    counted = F.pad(counted, (0, block.shape[1] - 3)) + block[0]
    is_equal = (counted.to(dtype).float() == block).all(1)
    height = int(is_equal.long().cumprod(0).sum()) // width
    return counted[: height * width], height, width


def count_grids(block: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    """Return exact ids of row-major grids, of any origins and at least 2 x 2 tokens.

    Ids behind them stay as they are. The second value is whether there are none.

    Args:
        block: ids, float32 [S, A].
        dtype: of the ids before; it may have rounded them.
    """
    exact = []
    while len(block):
        counted, height, width = count_grid(block, dtype)
        if min(height, width) < 2:
            break
        exact.append(counted)
        block = block[len(counted) :]
    return torch.cat([*exact, block]), not len(block)


def extent(block: torch.Tensor) -> tuple[int, int]:
    """Return how many rows and columns ids [S, A] span."""
    spans = block[:, 1:3].amax(0) - block[:, 1:3].amin(0)
    rows, columns = (math.ceil(span) + 1 for span in spans.tolist())
    return rows, columns


def trace_grid(ids: torch.Tensor) -> torch.Tensor:
    """Return rows and columns of row-major ids [S, A], float64 [2], without reading them.

    The generated image comes first, and no reference has kind 0.
    """
    is_target = ids[:, 0] == 0
    size, width = (
        mask.long().cumprod(0).sum() for mask in (is_target, is_target & (ids[:, 1] == ids[0, 1]))
    )
    return torch.stack([size / width, width]).double()


def make_grid_ids(kind: int, height: int, width: int, device=None) -> torch.Tensor:
    """Return ids (kind, row, column) in row-major order, float32 [height * width, 3]."""
    sides = [torch.arange(side, device=device) for side in (height, width)]
    axes = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.full_like(axes[0], kind), *axes], -1).flatten(0, 1).float()


def first_sample(ids: torch.Tensor) -> torch.Tensor:
    """Return ids [S, A] of ids [S, A] or [B, S, A], which are the same for all samples."""
    return ids if ids.ndim == 2 else ids[0]
