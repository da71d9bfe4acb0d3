"""Rotary embedders that follow the noise level, for the transformers with complex tables.

A table holds m exp(i position f) per token and pair. While nothing is stretched the stock embedder
answers, or its own arithmetic (float32 angles), so that the bits are the stock model's.
"""

from functools import partial

import torch
import torch.nn.functional as F

from dype import rope
from dype.embedders import DyPEEmbedder, add_by_broadcast, float64_device


class DyPEQwenEmbedRope(DyPEEmbedder, torch.nn.Module):
    """Qwen-Image's format: complex64 tables of the images [S, D / 2] and of the text.

    Stands in for diffusers' `QwenEmbedRope` and its copies. Rows and columns are counted from the
    image's middle. The first image is the one that is drawn; others are references, and get
    the stock encoding, as the text does. Nothing is cached.
    """

    def prepare_call(self, module: torch.nn.Module, call: dict) -> dict:
        """Read noise level and grid from a denoiser call. All samples of a batch share them."""
        self.set_timestep(self.family.to_sigma(call[self.family.timestep_arg].flatten()[0]))
        self.set_grid(*image_shapes(call["img_shapes"])[0][1:])
        return call

    def forward(self, video_fhw, device=None, max_txt_seq_len=None):
        shapes = image_shapes(video_fhw)
        frames, *grid = shapes[0]
        if not self.is_extrapolating(self.grid):
            return self.stock(video_fhw, device=device, max_txt_seq_len=max_txt_seq_len)
        device = device or self.stock.pos_freqs.device
        others = [
            self.stock._compute_video_freqs(*shape, index, device)
            for index, shape in enumerate(shapes[1:], 1)
        ]
        picture = self.image_table(frames, *grid, device)
        start = max(side // 2 for shape in shapes for side in shape[1:])
        cached = getattr(self.stock, "_get_device_freqs", None)  # Nucleus' copy has none
        table = cached(device)[0] if cached else self.stock.pos_freqs.to(device)
        text = table[start : start + int(max_txt_seq_len)]
        return torch.cat([picture, *others]) if others else picture, text

    def image_table(self, frames: int, height: int, width: int, device) -> torch.Tensor:
        """complex64 [frames * height * width, D / 2], row by row, by broadcasts alone."""
        inv_freq, m = self.frequencies(self.grid, device)
        longest = max(height, width)
        middle = longest - longest // 2
        both = polar_table(
            self.positions(-middle, longest - middle, m.device), inv_freq, m[:, None]
        )
        rows, columns = (
            both[middle - (n - n // 2) :, axis][:n].to(device)
            for axis, n in enumerate((height, width))
        )
        first = self.cached("frames", frames, device, make=lambda: self.frame_table(frames, device))
        pairs, others = rows.shape[1], self.axes_dim[0] // 2
        rows = F.pad(rows, (others, pairs))
        columns = F.pad(columns, (others + pairs, 0)) + first
        return (rows[:, None] + columns[:, None]).flatten(0, 2)  # one pass: x + 0 is x

    def frame_table(self, frames: int, device) -> torch.Tensor:
        """The first axis, which is stock, and 0 on the two others: complex64 [frames, 1, D / 2]."""
        table = stock_table(self, 0, frames, device, exact=True)
        return F.pad(table, (0, self.axes_dim[1]))[:, None]


class DyPEZImageRopeEmbedder(DyPEEmbedder):
    """Z-Image's format: ids int [S, 3] = (place, row, column) -> complex64 [S, D / 2].

    Stands in for diffusers' `RopeEmbedder`: a plain callable, called with the image tokens of all
    samples in a row, padded to multiples of 32 with zeros, and then with their captions'. Captions
    are at row and column 0, where they carry their image's attention scale. Rows and columns may
    be as many as one likes.
    """

    def set_grid(self, height_tokens, width_tokens=None, captions=None) -> None:
        """Set the size of the image being drawn, in tokens; or a list of pairs, one per image.

        captions: the tokens of each caption, needed where the sizes differ.
        """
        pairs = [(height_tokens, width_tokens)] if width_tokens is not None else height_tokens
        self.grids = [(int(height), int(width)) for height, width in pairs]
        self.grid, self.tokens_per_sample, self.regular = self.grids[0], None, False
        self.sequence_length = self.stock.axes_lens[0]  # how far ids may count on the first axis
        if captions is not None:
            # a caption's padding counts on; as many zeros follow, which diffusers cuts off later
            texts = [2 * pad_to_32(count) - count for count in captions]
            self.tokens_per_sample = (
                [pad_to_32(height * width) for height, width in self.grids],
                texts,
            )
            self.sequence_length = max(texts) + 2

    def prepare_call(self, module: torch.nn.Module, call: dict) -> dict:
        """Read noise level and grids from a denoiser call; its latents are [C, F, H, W] each."""
        if isinstance(call["x"][0], (list, tuple)):
            raise ValueError("x holds lists of images, expected one image per sample")
        self.set_timestep(self.family.to_sigma(call[self.family.timestep_arg].flatten()[0]))
        patch = call.get("patch_size", 2)
        sizes = [(x.shape[-2] // patch, x.shape[-1] // patch) for x in call["x"]]
        self.set_grid(sizes, captions=[len(caption) for caption in call["cap_feats"]])
        self.regular = True  # diffusers counts every image row by row: no need to look
        return call

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        sizes = list(dict.fromkeys(self.grids))
        active = any(map(self.is_extrapolating, sizes))
        longest = [max(side) for side in zip(*sizes, strict=True)]
        needed = zip((self.sequence_length, *longest), self.stock.axes_lens, strict=True)
        if not active and all(count <= limit for count, limit in needed):
            return self.stock(ids)
        make = partial(stock_table, self, 0, self.sequence_length, ids.device, exact=active)
        places = self.cached("places", self.sequence_length, active, ids.device, make=make)
        lines = {size: self.row_and_column_tables(size, ids.device) for size in sizes}
        if self.regular:
            pictures, captions = map(sum, self.tokens_per_sample)
            if pictures == len(ids) != captions:
                return self.table_by_broadcast(ids, places, lines)
        samples = [(ids, sizes[0])] if len(sizes) == 1 else self.split_samples(ids)
        tables = []
        for at, grid in samples:
            rows, columns = lines[grid]
            tables.append(torch.cat([places[at[:, 0]], rows[at[:, 1]], columns[at[:, 2]]], -1))
        return torch.cat(tables) if len(tables) > 1 else tables[0]

    def table_by_broadcast(
        self, ids: torch.Tensor, places: torch.Tensor, lines: dict
    ) -> torch.Tensor:
        """The images' tables, each by one broadcast sum over its rows and columns.

        An image's tokens share the place that the first of them has; padding is at the origin.
        """
        table = places.new_empty(len(ids), sum(self.axes_dim) // 2)
        begin, (first, second, _) = 0, (dim // 2 for dim in self.axes_dim)
        for grid, length in zip(self.grids, self.tokens_per_sample[0], strict=True):
            end, (rows, columns) = begin + grid[0] * grid[1], lines[grid]
            if end < begin + length:
                table[end : begin + length] = torch.cat([places[0], rows[0], columns[0]])
            both = table.new_zeros(2, max(grid), table.shape[1])  # the parts of rows, of columns
            both[0, : grid[0], first : first + second] = rows
            both[1, : grid[1], first + second :] = columns
            both[1, :, :first] = places[ids[begin : begin + 1, 0]]
            # real numbers, which are added in one pass
            both, drawn = (torch.view_as_real(x).flatten(-2) for x in (both, table[begin:end]))
            add_by_broadcast(
                both[0, : grid[0], None], both[1, None, : grid[1]], drawn.view(*grid, -1)
            )
            begin += length
        return table

    def row_and_column_tables(self, grid: tuple[int, int], device) -> list[torch.Tensor]:
        """Rows' and columns' tables of one image, complex64 [side, n] each."""
        if self.is_extrapolating(grid):
            inv_freq, m = self.frequencies(grid, device)
            both = polar_table(self.positions(0, max(grid), m.device), inv_freq, m[:, None]).to(
                device
            )
            return [both[:side, axis] for axis, side in enumerate(grid)]
        table = stock_table(self, 1, max(grid), device, exact=False)
        return [table[:side] for side in grid]

    def split_samples(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, tuple[int, int]]]:
        """The ids of each image, or of each caption, and the image's grid."""
        if self.tokens_per_sample is None:
            raise ValueError("images of several sizes, expected set_grid(sizes, captions=...)")
        pictures, captions = self.tokens_per_sample
        counts = pictures if len(ids) == sum(pictures) else captions
        if sum(pictures) == sum(captions) and not ids[:, 1:].any():
            counts = captions
        return list(zip(ids.split(counts), self.grids, strict=True))


def pad_to_32(count: int) -> int:
    """Tokens after Z-Image's padding: the next multiple of 32."""
    return -(-count // 32) * 32


def image_shapes(shapes) -> list[tuple[int, int, int]]:
    """(frames, height, width) of every image of the first sample, from Qwen's `img_shapes`."""
    first = shapes[0] if isinstance(shapes, list) else shapes
    return first if isinstance(first, list) else [first]


def stock_table(embedder: DyPEEmbedder, axis: int, count: int, device, exact: bool) -> torch.Tensor:
    """A stock axis, complex64 [count, n]: exact, or with stock's own bits."""
    f = rope.stock_frequencies(embedder.axes_dim[axis], embedder.theta, float64_device(device))
    m = torch.ones_like(f) if exact else None
    return polar_table(embedder.positions(0, count, f.device), f, m).to(device)


def polar_table(
    at: torch.Tensor, inv_freq: torch.Tensor, m: torch.Tensor | None = None
) -> torch.Tensor:
    """m exp(i at f), complex64 [positions, *f.shape]; m None: in stock's float32, with its bits.

    at: float64 positions; m: broadcast over f.
    """
    angle = at.view(-1, *[1] * inv_freq.ndim) * inv_freq
    if m is None:
        angle = angle.float()
        return torch.polar(torch.ones_like(angle), angle)
    return torch.polar(m, angle).to(torch.complex64)
