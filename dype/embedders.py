"""Rotary embedders that follow the noise level, for the transformers with real tables.

Each has `set_timestep` and `set_grid`, and `prepare_call`, which the transformer's forward pre-hook calls
with the arguments of every denoiser call to read both from them. The complex formats are in
`embedders_complex`.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dype import rope
from dype.config import DyPEConfig

CACHE_SIZE = 16  # an embedder remembers so many constants: those of a few sizes


class DyPEEmbedder:
    """What every format shares: the noise level, the grid, and the mathematics of its two axes.

    stock: the embedder that is replaced, kept untouched; trained_tokens: L, the same for rows and
    columns. No parameters, no buffers. Under a compiler one graph serves every noise level, since
    sigma is a 0-dim tensor; another grid is another graph.
    """

    def __init__(self, stock, config: DyPEConfig, trained_tokens: float):
        super().__init__()
        vars(self)["stock"] = stock  # past nn.Module, of which it would become a submodule
        self.config = config
        self.theta = float(stock.theta)
        self.axes_dim = tuple(getattr(stock, "axes_dim", None) or stock.axes_dims)
        self.trained_tokens = trained_tokens
        self.sigma = make_sigma()
        self.cache = {}
        self.set_grid(1, 1)

    def set_timestep(self, sigma: float | torch.Tensor) -> None:
        """Set the noise level: in [0, 1], 1 is pure noise; a float or a 0-dim tensor."""
        if not isinstance(sigma, torch.Tensor):
            self.sigma.fill_(sigma)
            return
        device = float64_device(sigma.device)
        if device != self.sigma.device or self.sigma.is_inference():
            self.sigma = make_sigma(device)
        self.sigma.copy_(sigma)

    def set_grid(self, height_tokens: int, width_tokens: int) -> None:
        """Set the size of the image being drawn, in tokens."""
        self.grid = (int(height_tokens), int(width_tokens))

    def is_extrapolating(self, grid: tuple[int, int]) -> bool:
        """Whether an image of this size is encoded other than by the stock embedder."""
        return self.config.method != "base" and max(grid) > self.trained_tokens

    def frequencies(self, grid, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows' and columns' frequencies, float64 [2, n], and their attention scales [2]."""
        device = float64_device(device)
        of_axis = self.axes_dim[1], self.theta, self.trained_tokens, grid, device, self.config
        axis = self.cached("axis", grid, device, make=lambda: rope.build_axes(*of_axis))
        return rope.batched_frequencies(axis, self.sigma.to(device), self.config)

    def positions(self, start: int, end: int, device) -> torch.Tensor:
        """Positions from start to end - 1, float64."""
        make = partial(torch.arange, start, end, dtype=torch.float64, device=device)
        return self.cached("steps", start, end, device, make=make)

    def cached(self, *key, make):
        """What `make` returns: made once per key, as no noise level changes it.

        A compiler sees it made anew, and folds it away.
        """
        if torch.compiler.is_compiling():
            return make()
        if key not in self.cache:
            if len(self.cache) >= CACHE_SIZE:
                self.cache.clear()
            with torch.inference_mode(False):
                self.cache[key] = make()
        return self.cache[key]


def sigma_from_timestep(time: torch.Tensor) -> torch.Tensor:
    return time


def sigma_from_thousandths(time: torch.Tensor) -> torch.Tensor:
    return time.double() / 1000


def sigma_from_complement(time: torch.Tensor) -> torch.Tensor:
    return 1 - time.double()


class TextTokens(NamedTuple):
    """Where a family's text tokens are, in numbers of them."""

    prefix: int = 0  # in front of the image's, in what the embedder is called with
    in_image_ids: int = 0  # of those, how many are in the call's own ids
    separate_call: int = -1  # in a call of the embedder by themselves


def flux1_text_tokens(module, call: dict) -> TextTokens:
    """FLUX.1: the transformer puts `txt_ids` in front of `img_ids`."""
    mode_token = bool(getattr(module, "union", False))  # a union controlnet adds one
    return TextTokens(prefix=call["txt_ids"].shape[-2] + mode_token)


def flux2_text_tokens(module, call: dict) -> TextTokens:
    """FLUX.2: one call for the images, one for the text."""
    return TextTokens(separate_call=call["txt_ids"].shape[-2])


def krea2_text_tokens(module, call: dict) -> TextTokens:
    """Krea 2: one tensor of ids for all."""
    text = call["encoder_hidden_states"].shape[1]
    return TextTokens(prefix=text, in_image_ids=text)


class DyPEFluxPosEmbed(DyPEEmbedder, torch.nn.Module):
    """FLUX's format: (cos, sin), float32 [S, D], each value repeated for its pair.

    Stands in for diffusers' `FluxPosEmbed` and its copies, called with ids [S, A] = (kind, row,
    column, ...). Tokens of kind 0 are the text's, all at the origin, and the image's; other kinds
    are reference images and get the stock encoding, as every further axis does.
    """

    _last_ids = (None, 0)  # the ids that were read last, their version, what was read

    def set_grid(self, height_tokens: int, width_tokens: int) -> None:
        super().set_grid(height_tokens, width_tokens)
        self.token_layout = None

    def set_token_layout(self, num_text: int, num_reference: int) -> None:
        """The ids to come are `num_text` of text (kind 0), the grid row by row, and `num_reference` of
        references.

        Rows and columns are then written by one broadcast, and the grid's ids are not looked at.
        """
        self.token_layout = (num_text, num_reference)

    def prepare_call(self, module: torch.nn.Module, call: dict) -> dict:
        """Read noise level and grid from a denoiser call and return it with exact ids.

        The ids are copied to the host once per image, since the pipelines hand the same tensor to
        every step (but FLUX.2's with reference images, which make a new one each time). All
        samples of a batch share the noise level and the ids.
        """
        family = self.family
        self.set_timestep(family.to_sigma(call[family.timestep_arg].flatten()[0]))
        ids, texts = call[family.ids_arg], family.text_tokens(module, call)
        version = 0 if ids.is_inference() else ids._version
        if self._last_ids[0] is not ids or self._last_ids[1] != version:
            self._last_ids = (ids, version, *parse_image_ids(ids, texts.in_image_ids))
        _, _, exact, grid, after = self._last_ids
        self.set_grid(*grid)
        # a separate call for as many text tokens as the image has could not be told from its own,
        # nor a shard of them where tokens are split between processes
        split = getattr(module, "_parallel_config", None) is not None
        if after is not None and not split and texts.separate_call != grid[0] * grid[1] + after:
            self.set_token_layout(texts.prefix, after)
        return call | {family.ids_arg: exact}

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.grid[0] * self.grid[1]
        if self.token_layout is None or len(ids) != size + sum(self.token_layout):
            table = self.table_from_ids(ids)  # a shard under context parallelism, or odd ids
        else:
            table = self.table_by_broadcast(ids, *self.token_layout)
        return table[0], table[1]

    def table_from_ids(self, ids: torch.Tensor, references: bool = True) -> torch.Tensor:
        """Scaled cos and sin of any ids, each twice, token by token: float32 [2, S, D].

        references: whether there may be tokens of a kind other than 0.
        """
        inv_freq, m = self.frequencies(self.grid, ids.device)
        pairs = [dim // 2 for dim in self.axes_dim]
        stock, one, axis_of = self.cached(
            "stock", m.device, make=lambda: self.stock_frequencies_per_pair(m.device)
        )
        f = torch.cat([stock[: pairs[0]], inv_freq.flatten(), stock[sum(pairs[:3]) :]])
        of_axes = [scale.expand(count) for scale, count in zip(m, pairs[1:3], strict=True)]
        scale = torch.cat([one[: pairs[0]], *of_axes, one[sum(pairs[:3]) :]])
        at = ids.to(m.device, torch.float64)
        if references:
            drawn = at[:, :1] == 0
            f, scale = torch.where(drawn, f, stock), torch.where(drawn, scale, one)
        angle = at[:, axis_of] * f
        table = torch.stack([angle.cos(), angle.sin()]) * scale
        return table.float().repeat_interleave(2, dim=-1).to(ids.device)

    def stock_frequencies_per_pair(self, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of every pair of all axes, [D / 2]: the stock frequency, the scale 1, and its axis."""
        stock = [rope.stock_frequencies(dim, self.theta, device) for dim in self.axes_dim]
        axes = [torch.full(part.shape, axis, device=device) for axis, part in enumerate(stock)]
        stock = torch.cat(stock)
        return stock, torch.ones_like(stock), torch.cat(axes)

    def table_by_broadcast(
        self, ids: torch.Tensor, num_text: int, num_reference: int
    ) -> torch.Tensor:
        """Return what `table_from_ids` does, with trigonometry for one row and one column alone."""
        (height, width), device = self.grid, ids.device
        make = partial(self.first_row_and_column_ids, device)
        lines, of_rows, of_columns = self.cached("lines", self.grid, device, make=make)
        end = num_text + height * width
        few = torch.cat([ids[:num_text], lines, ids[end:]])
        counts = num_text, height, width, num_reference
        parts = self.table_from_ids(few, num_reference > 0).split(counts, dim=1)
        text, rows, columns, references = parts
        rows, columns = (rows * of_rows)[:, :, None], (columns * of_columns)[:, None]
        table = rows.new_empty(2, len(ids), rows.shape[-1])
        add_by_broadcast(rows, columns, table[:, num_text:end].view(2, height, width, -1))
        table[:, :num_text] = text
        if num_reference:
            table[:, end:] = references
        return table

    def first_row_and_column_ids(self, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids of the first column's rows and the first row's columns [H + W, A]; which of a
        token's entries come from its row (1, else 0), and which from its column: [D]."""
        height, width = self.grid
        more, first = len(self.axes_dim) - 3, self.axes_dim[0]
        ids = torch.cat([make_grid_ids(0, height, 1, device), make_grid_ids(0, 1, width, device)])
        of_rows = torch.zeros(sum(self.axes_dim), device=device)
        of_rows[first : first + self.axes_dim[1]] = 1
        return F.pad(ids, (0, more)), of_rows, 1 - of_rows


class DyPEEmbedND(DyPEFluxPosEmbed):
    """The format of Black Forest Labs' own `EmbedND`: float32 [B, 1, S, D / 2, 2, 2].

    Called with ids [B, S, A]. Each pair is the rotation matrix ((cos, -sin), (sin, cos)). All
    samples share the first's ids.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        cos, sin = (part[:, ::2] for part in super().forward(ids[0]))
        turns = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
        return turns.expand(len(ids), 1, *turns.shape)


def make_sigma(device=None) -> torch.Tensor:
    """A 0-dim float64 tensor that may be written to in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.ones((), dtype=torch.float64, device=device)


def parse_image_ids(ids: torch.Tensor, texts: int = 0) -> tuple[torch.Tensor, tuple, int | None]:
    """What FLUX's img_ids [S, A] say: exact float32 ids, the image's grid, tokens after it.

    texts: how many of them, at the beginning, are the text's; those are left out of it all.

    In bfloat16 rows beyond 256 collide, but the length of the first row, until the row changes, is
    still right; each kind's grid is counted again from that. Where the ids are not a grid they are
    taken as they stand, and the tokens after the image are None.
    """
    given = ids if ids.ndim == 2 else ids[0]  # [B, S, 3] is deprecated in diffusers
    host = given[texts:].float().cpu()
    kinds = host[:, 0]
    starts = [0, *((kinds[1:] != kinds[:-1]).nonzero().flatten() + 1).tolist(), len(host)]
    exact, grid, after = [], None, None
    for start, end in pairwise(starts):
        part, kind = host[start:end], int(kinds[start])
        changes = (part[:, 1] != part[0, 1]).nonzero()
        width = int(changes[0]) if len(changes) else len(part)
        counted = make_grid_ids(kind, len(part) // width, width)
        counted = F.pad(counted, (0, part.shape[1] - 3))
        regular = counted.shape == part.shape and torch.equal(counted.to(ids.dtype).float(), part)
        exact.append(counted if regular else part)
        if kind == 0 and grid is None:
            grid = (len(part) // width, width)
            after = len(host) - end if regular and start == 0 else None
    exact = torch.cat([given[:texts].float(), torch.cat(exact).to(ids.device)])
    return exact.expand(ids.shape), grid or (1, 1), after


def make_grid_ids(kind: int, height: int, width: int, device=None) -> torch.Tensor:
    """Positions (kind, row, column) row by row, float32 [height * width, 3]."""
    steps = [torch.arange(side, device=device) for side in (height, width)]
    axes = torch.meshgrid(*steps, indexing="ij")
    return torch.stack([torch.full_like(axes[0], kind), *axes], -1).flatten(0, 1).float()


def add_by_broadcast(rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """out = rows + columns by broadcast, in one pass; exact, as one of them is 0."""
    if torch.compiler.is_compiling():  # which does without `out`
        out.copy_(rows + columns)
    else:
        torch.add(rows, columns, out=out)


def float64_device(device: torch.device) -> torch.device:
    """Where tables for `device` are computed: there, or on the CPU where it has no float64."""
    return torch.device("cpu") if device.type in ("mps", "npu") else device
