"""Rotary embedders that follow the noise level, for the transformers with complex tables.

A table holds m exp(i position f) per token and pair. While nothing is stretched the stock embedder
answers, or its own arithmetic (float32 angles), so that the bits are the stock model's.
"""

from functools import partial

import torch
import torch.nn.functional as F

from dype import rope
from dype.embedders import DyPE, float64_device


class QwenDyPE(DyPE, torch.nn.Module):
    """Qwen-Image's format: complex64 tables of the pictures [S, D / 2] and of the text.

    Stands in for diffusers' `QwenEmbedRope` and its copies. Rows and columns are counted from the
    picture's middle. The first picture is the one that is drawn; others are references, and get
    the stock encoding, as the text does. Nothing is cached.
    """

    def before(self, module: torch.nn.Module, call: dict) -> dict:
        """Read noise level and grid from a denoiser call. All samples of a batch share them."""
        self.set_timestep(self.family.sigma(call[self.family.time].flatten()[0]))
        self.set_grid(*pictures(call["img_shapes"])[0][1:])
        return call

    def forward(self, video_fhw, device=None, max_txt_seq_len=None):
        shapes = pictures(video_fhw)
        frames, *grid = shapes[0]
        if not self.active(self.grid):
            return self.stock(video_fhw, device=device, max_txt_seq_len=max_txt_seq_len)
        device = device or self.stock.pos_freqs.device
        others = [
            self.stock._compute_video_freqs(*shape, index, device)
            for index, shape in enumerate(shapes[1:], 1)
        ]
        picture = self.picture(frames, *grid, device)
        start = max(side // 2 for shape in shapes for side in shape[1:])
        cached = getattr(self.stock, "_get_device_freqs", None)  # Nucleus' copy has none
        table = cached(device)[0] if cached else self.stock.pos_freqs.to(device)
        text = table[start : start + int(max_txt_seq_len)]
        return torch.cat([picture, *others]) if others else picture, text

    def picture(self, frames: int, height: int, width: int, device) -> torch.Tensor:
        """complex64 [frames * height * width, D / 2], row by row, by broadcasts alone."""
        inv_freq, m = self.frequencies(self.grid, device)
        longest = max(height, width)
        middle = longest - longest // 2
        both = turns(self.steps(-middle, longest - middle, m.device), inv_freq, m[:, None])
        rows, columns = (
            both[middle - (n - n // 2) :, axis][:n].to(device)
            for axis, n in enumerate((height, width))
        )
        first = self.once("frames", frames, device, make=lambda: self.frames(frames, device))
        pairs, others = rows.shape[1], self.axes_dim[0] // 2
        rows = F.pad(rows, (others, pairs))
        columns = F.pad(columns, (others + pairs, 0)) + first
        return (rows[:, None] + columns[:, None]).flatten(0, 2)  # one pass: x + 0 is x

    def frames(self, frames: int, device) -> torch.Tensor:
        """The first axis, which is stock, and 0 on the two others: complex64 [frames, 1, D / 2]."""
        stock = rope.stock_frequencies(self.axes_dim[0], self.theta, float64_device(device))
        table = turns(self.steps(0, frames, stock.device), stock, torch.ones_like(stock))
        return F.pad(table.to(device), (0, self.axes_dim[1]))[:, None]


class ZImageDyPE(DyPE):
    """Z-Image's format: ids int [S, 3] = (place, row, column) -> complex64 [S, D / 2].

    Stands in for diffusers' `RopeEmbedder`: a plain callable, called with the image tokens of all
    samples in a row, padded to multiples of 32 with zeros, and then with their captions'. Captions
    are at row and column 0, where they carry their picture's attention scale. Rows and columns may
    be as many as one likes.
    """

    def set_grid(self, height_tokens, width_tokens=None, captions=None) -> None:
        """Set the size of the picture being drawn, in tokens; or a list of pairs, one per picture.

        captions: the tokens of each caption, needed where the sizes differ.
        """
        pairs = [(height_tokens, width_tokens)] if width_tokens is not None else height_tokens
        self.grids = [(int(height), int(width)) for height, width in pairs]
        self.grid, self.lengths, self.regular = self.grids[0], None, False
        self.places = self.stock.axes_lens[0]  # how far ids may count on the first axis
        if captions is not None:
            # a caption's padding counts on; as many zeros follow, which diffusers cuts off later
            texts = [2 * padded(count) - count for count in captions]
            self.lengths = [padded(height * width) for height, width in self.grids], texts
            self.places = max(texts) + 2

    def before(self, module: torch.nn.Module, call: dict) -> dict:
        """Read noise level and grids from a denoiser call; its latents are [C, F, H, W] each."""
        if isinstance(call["x"][0], (list, tuple)):
            raise ValueError("x holds lists of pictures, expected one picture per sample")
        self.set_timestep(self.family.sigma(call[self.family.time].flatten()[0]))
        patch = call.get("patch_size", 2)
        sizes = [(x.shape[-2] // patch, x.shape[-1] // patch) for x in call["x"]]
        self.set_grid(sizes, captions=[len(caption) for caption in call["cap_feats"]])
        self.regular = True  # diffusers counts every picture row by row: no need to look
        return call

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        sizes = list(dict.fromkeys(self.grids))
        active = any(map(self.active, sizes))
        longest = [max(side) for side in zip(*sizes, strict=True)]
        limits = self.stock.axes_lens
        needed = (self.places, *longest)
        if not active and all(n <= limit for n, limit in zip(needed, limits, strict=True)):
            return self.stock(ids)
        make = partial(self.places_table, active, ids.device)
        places = self.once("places", self.places, active, ids.device, make=make)
        lines = {size: self.lines(size, ids.device) for size in sizes}
        if self.regular:
            pictures, captions = map(sum, self.lengths)
            if pictures == len(ids) != captions:
                return self.fill(ids, places, lines)
        at = ids if len(sizes) == 1 else self.shifted(ids, sizes)
        tables = [places, *map(torch.cat, zip(*lines.values(), strict=True))]
        return torch.cat([table[at[:, axis]] for axis, table in enumerate(tables)], -1)

    def fill(self, ids: torch.Tensor, places: torch.Tensor, lines: dict) -> torch.Tensor:
        """The pictures' tables, each by one broadcast sum over its rows and columns.

        A picture's tokens share the place that the first of them has; padding is at the origin.
        """
        table = places.new_empty(len(ids), sum(self.axes_dim) // 2)
        begin, (first, second, _) = 0, (dim // 2 for dim in self.axes_dim)
        for grid, length in zip(self.grids, self.lengths[0], strict=True):
            end, (rows, columns) = begin + grid[0] * grid[1], lines[grid]
            if end < begin + length:
                table[end : begin + length] = torch.cat([places[0], rows[0], columns[0]])
            both = table.new_zeros(2, max(grid), table.shape[1])  # the parts of rows, of columns
            both[0, : grid[0], first : first + second] = rows
            both[1, : grid[1], first + second :] = columns
            both[1, :, :first] = places[ids[begin : begin + 1, 0]]
            rows, columns = both[0, : grid[0], None], both[1, None, : grid[1]]
            add(rows, columns, table[begin:end].view(*grid, -1))
            begin += length
        return table

    def places_table(self, active: bool, device) -> torch.Tensor:
        """The first axis, which is stock, complex64 [places, n]; with stock's bits if all is."""
        stock = rope.stock_frequencies(self.axes_dim[0], self.theta, float64_device(device))
        m = torch.ones_like(stock) if active else None
        return turns(self.steps(0, self.places, stock.device), stock, m).to(device)

    def lines(self, grid: tuple[int, int], device) -> list[torch.Tensor]:
        """Rows' and columns' tables of one picture, complex64 [side, n] each."""
        if self.active(grid):
            inv_freq, m = self.frequencies(grid, device)
            if grid[0] == grid[1]:  # so are their frequencies
                return 2 * [turns(self.steps(0, grid[0], m.device), inv_freq[0], m[:1]).to(device)]
            both = turns(self.steps(0, max(grid), m.device), inv_freq, m[:, None]).to(device)
            return [both[:side, axis] for axis, side in enumerate(grid)]
        stock = rope.stock_frequencies(self.axes_dim[1], self.theta, float64_device(device))
        return [turns(self.steps(0, side, stock.device), stock).to(device) for side in grid]

    def shifted(self, ids: torch.Tensor, sizes: list) -> torch.Tensor:
        """The ids with rows and columns moved to where their picture's tables begin."""
        if self.lengths is None:
            raise ValueError("pictures of several sizes, expected set_grid(sizes, captions=...)")
        pictures, captions = self.lengths
        counts = pictures if len(ids) == sum(pictures) else captions
        if sum(pictures) == sum(captions) and not ids[:, 1:].any():
            counts = captions
        begins, heights, widths = {}, 0, 0
        for height, width in sizes:
            begins[height, width] = (0, heights, widths)
            heights, widths = heights + height, widths + width
        begin = torch.tensor([begins[grid] for grid in self.grids], device=ids.device)
        counts = torch.tensor(counts, device=ids.device)
        return ids + begin.repeat_interleave(counts, 0, output_size=len(ids))


def add(rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """out = rows + columns, complex64, in one pass of real numbers; exact, as one of them is 0."""
    parts = [torch.view_as_real(part).flatten(-2) for part in (rows, columns, out)]
    if torch.compiler.is_compiling():  # which does without `out`
        parts[2].copy_(parts[0] + parts[1])
    else:
        torch.add(parts[0], parts[1], out=parts[2])


def padded(count: int) -> int:
    """Tokens after Z-Image's padding: the next multiple of 32."""
    return -(-count // 32) * 32


def pictures(shapes) -> list[tuple[int, int, int]]:
    """(frames, height, width) of every picture of the first sample, from Qwen's `img_shapes`."""
    first = shapes[0] if isinstance(shapes, list) else shapes
    return first if isinstance(first, list) else [first]


def turns(at: torch.Tensor, inv_freq: torch.Tensor, m: torch.Tensor | None = None) -> torch.Tensor:
    """m exp(i at f), complex64 [positions, *f.shape]; m None: in stock's float32, with its bits.

    at: float64 positions; m: broadcast over f.
    """
    angle = at.view(-1, *[1] * inv_freq.ndim) * inv_freq
    if m is None:
        angle = angle.float()
        return torch.polar(torch.ones_like(angle), angle)
    return torch.polar(m, angle).to(torch.complex64)
