"""Rotary embedders that follow sigma, for transformers whose tables are real numbers.

The transformer's forward pre-hook calls `prepare_call` with the arguments of each denoiser call.
That stores sigma and the token grid in the embedder, and `forward` reads them. A loop that does not
call the transformer as a module calls `set_timestep` and `set_grid` itself; without `set_grid` the
encoding is the stock one. The complex formats are in `embedders_complex`.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dype import rope
from dype.config import DyPEConfig

MAX_CONSTANTS = 16  # two per size for FLUX; when full, all are made again


class DyPEEmbedder:
    """Base class: stores sigma and the token grid, and computes the frequencies of both axes.

    A subclass has `prepare_call` and `forward`; `apply_dype` sets `family` and `hook`. There are no
    parameters and no buffers. Under a compiler one graph serves every sigma, which is an input of
    the graph, a 0-dim tensor that the hook writes; another grid is another graph.

    Args:
        stock: the embedder to replace, kept untouched.
        config: settings of the encoding.
        trained_tokens: L, for rows and columns alike.
    """

    def __init__(self, stock, config: DyPEConfig, trained_tokens: float):
        super().__init__()
        vars(self)["stock"] = stock  # not by setattr, which would make it a submodule
        self.config = config
        self.theta = float(stock.theta)
        self.axes_dim = tuple(getattr(stock, "axes_dim", None) or stock.axes_dims)
        self.trained_tokens = trained_tokens
        self.sigma = make_sigma()
        self.constants = {}
        self.set_grid(1, 1)

    def set_timestep(self, sigma: float | torch.Tensor) -> None:
        """Set sigma in [0, 1], 1 is pure noise: a float or a 0-dim tensor."""
        if not isinstance(sigma, torch.Tensor):
            self.sigma.fill_(sigma)
            return
        device = float64_device(sigma.device)
        if device != self.sigma.device or self.sigma.is_inference():
            self.sigma = make_sigma(device)
        self.sigma.copy_(sigma)

    def set_grid(self, height_tokens: int, width_tokens: int) -> None:
        """Set the size of the generated image, in tokens."""
        self.grid = (int(height_tokens), int(width_tokens))

    def is_extrapolating(self, grid: tuple[int, int]) -> bool:
        """Return whether the encoding of a token grid (height, width) is not the stock one.

        The complex formats then call the stock embedder; FLUX's table has the stock bits by itself.
        """
        return self.config.method != "base" and max(grid) > self.trained_tokens

    def frequencies(self, grid, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return f of rows and columns, float64 [2, n], and m of both, [2]."""
        device = float64_device(device)
        dim = self.axes_dim[1]  # rows and columns have as many dimensions in every family
        arguments = dim, self.theta, self.trained_tokens, grid, device, self.config
        axis = self.get_constant("axis", grid, device, make=lambda: rope.build_axes(*arguments))
        return rope.batched_frequencies(axis, self.sigma.to(device), self.config)

    def positions(self, start: int, end: int, device) -> torch.Tensor:
        """Return the positions from start to end - 1, float64."""
        make = partial(torch.arange, start, end, dtype=torch.float64, device=device)
        return self.get_constant("positions", start, end, device, make=make)

    def get_constant(self, *key, make):
        """Return `make()`, a tensor that does not depend on sigma; made once per key.

        Under a compiler `make` is traced into the graph.
        """
        if torch.compiler.is_compiling():
            return make()
        if key not in self.constants:
            if len(self.constants) >= MAX_CONSTANTS:
                self.constants.clear()
            with torch.inference_mode(False):
                self.constants[key] = make()
        return self.constants[key]


def sigma_from_timestep(time: torch.Tensor) -> torch.Tensor:
    """Return sigma from a timestep in [0, 1]."""
    return time


def sigma_from_thousandths(time: torch.Tensor) -> torch.Tensor:
    """Return sigma from a timestep in [0, 1000]."""
    return time.double() / 1000


def sigma_from_complement(time: torch.Tensor) -> torch.Tensor:
    """Return sigma from 1 - sigma."""
    return 1 - time.double()


class TextTokens(NamedTuple):
    """Number of text tokens, by the place where a family has them."""

    prefix: int = 0  # in front of the image tokens when the embedder is called
    in_image_ids: int = 0  # how many of these the denoiser's ids argument already holds
    separate_call: int = -1  # in an embedder call of their own; -1: there is none


def flux1_text_tokens(module, call: dict) -> TextTokens:
    """Count the text tokens of FLUX.1, which puts `txt_ids` in front of `img_ids`."""
    mode_token = bool(getattr(module, "union", False))  # a union controlnet adds one
    return TextTokens(prefix=call["txt_ids"].shape[-2] + mode_token)


def flux2_text_tokens(module, call: dict) -> TextTokens:
    """Count the text tokens of FLUX.2, which embeds images and text in two calls."""
    return TextTokens(separate_call=call["txt_ids"].shape[-2])


def krea2_text_tokens(module, call: dict) -> TextTokens:
    """Count the text tokens of Krea 2, whose ids argument holds text and image."""
    count = call["encoder_hidden_states"].shape[1]
    return TextTokens(prefix=count, in_image_ids=count)


class DyPEFluxPosEmbed(DyPEEmbedder, torch.nn.Module):
    """FLUX's format: (cos, sin), float32 [S, D], each value repeated for its pair.

    Replaces diffusers' `FluxPosEmbed` and its copies, called with ids [S, A] = (kind, row, column,
    ...). Kind 0 marks text tokens (at the origin) and image tokens; other values mark reference
    images, which keep the stock encoding. Axes beyond height and width are always stock.
    """

    _last_ids = (None, 0)  # ids of the last call and their version, then `parse_image_ids` of them

    def set_grid(self, height_tokens: int, width_tokens: int) -> None:
        """Set the size of the generated image, in tokens."""
        super().set_grid(height_tokens, width_tokens)
        self.token_layout = None

    def set_token_layout(self, num_text: int, num_reference: int) -> None:
        """Declare the token order of the next calls.

        It is `num_text` text tokens, the grid in row-major order, `num_reference` reference tokens.
        The table is then written by broadcasting one row and one column; the ids of the grid are
        not read.
        """
        self.token_layout = (num_text, num_reference)

    def prepare_call(self, module: torch.nn.Module, call: dict) -> dict:
        """Read sigma and grid from a denoiser call, and return the call with exact ids.

        Sigma is read from the first sample alone. The ids are copied to the host if they are not
        the tensor of the last call: once per image in every pipeline, except FLUX.2 with reference
        images. In inference mode an in-place change of the ids is not seen.
        """
        family = self.family
        self.set_timestep(family.to_sigma(call[family.timestep_arg].flatten()[0]))
        ids, text = call[family.ids_arg], family.text_tokens(module, call)
        version = 0 if ids.is_inference() else ids._version
        if self._last_ids[0] is not ids or self._last_ids[1] != version:
            self._last_ids = (ids, version, *parse_image_ids(ids, text.in_image_ids))
        _, _, exact_ids, grid, num_reference = self._last_ids
        self.set_grid(*grid)
        # `forward` recognizes the image's call by its number of tokens. FLUX.2's text call may have
        # as many, and so may a shard under context parallelism: these get no layout.
        sharded = getattr(module, "_parallel_config", None) is not None
        has_layout = num_reference is not None and not sharded
        if has_layout and text.separate_call != grid[0] * grid[1] + num_reference:
            self.set_token_layout(text.prefix, num_reference)
        return call | {family.ids_arg: exact_ids}

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of ids [S, A], float32 [S, D] each."""
        size = self.grid[0] * self.grid[1]
        if self.token_layout is None or len(ids) != size + sum(self.token_layout):
            table = self.table_from_ids(ids)  # a shard under context parallelism, or irregular ids
        else:
            table = self.table_by_broadcast(ids, *self.token_layout)
        return table[0], table[1]

    def table_from_ids(self, ids: torch.Tensor, references: bool = True) -> torch.Tensor:
        """Return m cos and m sin of each token's ids, float32 [2, S, D], each value twice.

        references: whether some tokens may have a kind other than 0.
        """
        f_axes, m_axes = self.frequencies(self.grid, ids.device)
        pairs = [dim // 2 for dim in self.axes_dim]
        make = partial(self.stock_frequencies_per_pair, m_axes.device)
        stock, unit_m, axis_of_pair = self.get_constant("stock", m_axes.device, make=make)
        f = torch.cat([stock[: pairs[0]], f_axes.flatten(), stock[sum(pairs[:3]) :]])
        m_pairs = [m.expand(count) for m, count in zip(m_axes, pairs[1:3], strict=True)]
        m = torch.cat([unit_m[: pairs[0]], *m_pairs, unit_m[sum(pairs[:3]) :]])
        positions = ids.to(m.device, torch.float64)
        if references:
            is_stretched = positions[:, :1] == 0
            f = torch.where(is_stretched, f, stock)
            m = torch.where(is_stretched, m, unit_m)
        angle = positions[:, axis_of_pair] * f
        table = torch.stack([angle.cos(), angle.sin()]) * m
        return table.float().repeat_interleave(2, dim=-1).to(ids.device)

    def stock_frequencies_per_pair(self, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the stock frequencies of all axes, scales of 1, and each pair's axis; all [D / 2].

        The axis is the entry of a token's ids by which the pair rotates.
        """
        stock = [rope.stock_frequencies(dim, self.theta, device) for dim in self.axes_dim]
        axes = [torch.full(f.shape, axis, device=device) for axis, f in enumerate(stock)]
        stock = torch.cat(stock)
        return stock, torch.ones_like(stock), torch.cat(axes)

    def table_by_broadcast(
        self, ids: torch.Tensor, num_text: int, num_reference: int
    ) -> torch.Tensor:
        """Return the table of `table_from_ids`, with trigonometry for one row and one column."""
        (height, width), device = self.grid, ids.device
        make = partial(self.first_row_and_column_ids, device)
        lines, row_mask, column_mask = self.get_constant("lines", self.grid, device, make=make)
        end = num_text + height * width
        few_ids = torch.cat([ids[:num_text], lines, ids[end:]])
        counts = num_text, height, width, num_reference
        tables = self.table_from_ids(few_ids, num_reference > 0).split(counts, dim=1)
        text, rows, columns, references = tables
        rows, columns = (rows * row_mask)[:, :, None], (columns * column_mask)[:, None]
        table = rows.new_empty(2, len(ids), rows.shape[-1])
        add_by_broadcast(rows, columns, table[:, num_text:end].view(2, height, width, -1))
        table[:, :num_text] = text
        if num_reference:
            table[:, end:] = references
        return table

    def first_row_and_column_ids(self, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the ids of the first column and of the first row, [H + W, A], and two masks [D].

        The masks are 1 where an entry of a token's table comes from its row, or from its column.
        """
        height, width = self.grid
        further_axes, first = len(self.axes_dim) - 3, self.axes_dim[0]
        ids = torch.cat([make_grid_ids(0, height, 1, device), make_grid_ids(0, 1, width, device)])
        row_mask = torch.zeros(sum(self.axes_dim), device=device)
        row_mask[first : first + self.axes_dim[1]] = 1
        return F.pad(ids, (0, further_axes)), row_mask, 1 - row_mask


class DyPEEmbedND(DyPEFluxPosEmbed):
    """The format of Black Forest Labs' own `EmbedND`: float32 [B, 1, S, D / 2, 2, 2].

    Called with ids [B, S, A]; all samples share those of the first. Each pair is the rotation
    matrix ((cos, -sin), (sin, cos)).
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rotation matrices of ids [B, S, A]."""
        cos, sin = (values[:, ::2] for values in super().forward(ids[0]))
        matrices = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
        return matrices.expand(len(ids), 1, *matrices.shape)


def make_sigma(device=None) -> torch.Tensor:
    """Return a 0-dim float64 tensor that can be written in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.ones((), dtype=torch.float64, device=device)


def parse_image_ids(
    ids: torch.Tensor, num_text: int = 0
) -> tuple[torch.Tensor, tuple[int, int], int | None]:
    """Return exact ids, the token grid of the generated image, and the number of reference tokens.

    In bfloat16 rows beyond 256 merge, but the length of the first row is still right; the ids of
    each kind are counted again from it. Ids that are no grid are returned as they are: the grid is
    then a guess from their first row, and the number of reference tokens None.

    Args:
        ids: `img_ids` of a FLUX transformer, [S, A] or [B, S, A].
        num_text: text tokens at the beginning, which are not parsed.
    """
    ids_2d = ids if ids.ndim == 2 else ids[0]  # [B, S, 3] is deprecated in diffusers
    host = ids_2d[num_text:].float().cpu()
    kinds = host[:, 0]
    starts = [0, *((kinds[1:] != kinds[:-1]).nonzero().flatten() + 1).tolist(), len(host)]
    exact, grid, num_reference = [], None, None
    for start, end in pairwise(starts):
        block, kind = host[start:end], int(kinds[start])
        row_changes = (block[:, 1] != block[0, 1]).nonzero()
        width = int(row_changes[0]) if len(row_changes) else len(block)
        counted = make_grid_ids(kind, len(block) // width, width)
        counted = F.pad(counted, (0, block.shape[1] - 3))
        is_grid = counted.shape == block.shape
        is_grid = is_grid and torch.equal(counted.to(ids.dtype).float(), block)
        exact.append(counted if is_grid else block)
        if kind == 0 and grid is None:
            grid = (len(block) // width, width)
            num_reference = len(host) - end if is_grid and start == 0 else None
    exact = torch.cat([ids_2d[:num_text].float(), torch.cat(exact).to(ids.device)])
    return exact.expand(ids.shape), grid or (1, 1), num_reference


def make_grid_ids(kind: int, height: int, width: int, device=None) -> torch.Tensor:
    """Return ids (kind, row, column) in row-major order, float32 [height * width, 3]."""
    sides = [torch.arange(side, device=device) for side in (height, width)]
    axes = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.full_like(axes[0], kind), *axes], -1).flatten(0, 1).float()


def add_by_broadcast(rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """Write rows + columns to `out` in one pass; exact, since one of the two is always 0."""
    if torch.compiler.is_compiling():  # a compiler has no `out`
        out.copy_(rows + columns)
    else:
        torch.add(rows, columns, out=out)


def float64_device(device: torch.device) -> torch.device:
    """Return where to compute tables for `device`: there, or on the CPU if it lacks float64."""
    return torch.device("cpu") if device.type in ("mps", "npu") else device
