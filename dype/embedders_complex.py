"""Rotary embedders that follow sigma, for transformers whose tables are complex numbers.

A table holds m exp(i position f) per token and pair. Without a stretch the stock embedder answers;
beyond the length of its tables `stock_table` does, with float32 angles and so with the stock bits.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dype import rope
from dype.embedders import DyPEEmbedder, add_by_broadcast, break_graph, float64_device, repeat_text


class DyPEQwenEmbedRope(DyPEEmbedder, torch.nn.Module):
    """Qwen-Image's format: complex64 tables of the images [S, D / 2] and of the text.

    Replaces diffusers' `QwenEmbedRope` and its copies. Rows and columns are counted from the middle
    of the image. The first image is the generated one; the others are references and keep the stock
    encoding, as the text does. No table that depends on sigma is cached.
    """

    def prepare_call(self, module: torch.nn.Module, call: dict) -> dict:
        """Read sigma and grid from a denoiser call. All samples of a batch share them."""
        self.set_timestep_from(call)
        self.set_grid(*image_shapes(call["img_shapes"])[0][1:])
        last_shapes, self.state.last_ids = self.state.last_ids[0], (call["img_shapes"], 0, None)
        if last_shapes is not call["img_shapes"] and max(self.grid) > self.trained_tokens:
            self.check_schedule(self.sigma)  # the pipeline makes a new list for every image
        text, state = call.get("encoder_hidden_states"), self.state
        self.read_latent(module, call, self.grid)
        state.copies = self.count_copies(self.grid)
        if text is not None:
            state.num_text = text.shape[1]
            call = repeat_text(call, self.family.text_args, state.copies)
            text = call["encoder_hidden_states"]
            tables = self.compute_tables(call["img_shapes"], text.device, text.shape[1])
            self.state.tables = [tables]
        return call

    @break_graph
    def forward(self, video_fhw, device=None, max_txt_seq_len=None):
        """Return the tables of the images and of the text; arguments as of the stock embedder."""
        tables = self.state.tables
        if tables and len(tables[0][1]) == max_txt_seq_len:
            # hooks may move a call after ours, as those that offload do
            return tuple(table.to(device=device) for table in tables.pop())
        return self.compute_tables(video_fhw, device, max_txt_seq_len)

    def compute_tables(self, video_fhw, device, max_txt_seq_len):
        """Return what `forward` returns, computed from sigma and grid."""
        shapes = image_shapes(video_fhw)
        frames, *grid = shapes[0]
        copies = self.state.copies
        num_text = int(max_txt_seq_len) // copies  # at the positions of one copy
        if not self.is_extrapolating(self.grid):
            image, text = self.stock(video_fhw, device=device, max_txt_seq_len=num_text)
            return image, text if copies == 1 else text.repeat(copies, 1)
        device = device or self.stock.pos_freqs.device
        references = [
            self.stock._compute_video_freqs(*shape, index, device)
            for index, shape in enumerate(shapes[1:], 1)
        ]
        image = self.image_table(frames, *grid, device)
        start = max(side // 2 for shape in shapes for side in shape[1:])
        get_freqs = getattr(self.stock, "_get_device_freqs", None)  # Nucleus' copy has none
        table = get_freqs(device)[0] if get_freqs else self.stock.pos_freqs.to(device)
        text = table[start : start + num_text].repeat(copies, 1)
        image = torch.cat([image, *references]) if references else image
        return self.scale_table(image, grid), self.scale_table(text, grid)

    def image_table(self, frames: int, height: int, width: int, device) -> torch.Tensor:
        """Return the generated image's table, complex64 [frames * height * width, D / 2].

        The tokens are in row-major order.

        Args:
            frames: length of the first axis.
            height: rows.
            width: columns.
            device: of the table.
        """
        f, m = self.frequencies(self.grid, device)
        longest = max(height, width)
        middle = longest - longest // 2
        positions = self.positions(-middle, longest - middle, m.device)
        both = polar_table(positions, f, m)
        first_pairs, *pairs = (dim // 2 for dim in self.axes_dim)
        rows, columns = (
            both[middle - (n - n // 2) :, axis, : pairs[axis]][:n].to(device)  # n around position 0
            for axis, n in enumerate((height, width))
        )
        make = partial(self.frame_table, frames, device)
        first_axis = self.get_constant("frames", frames, device, make=make)
        rows = F.pad(rows, (first_pairs, pairs[1]))
        columns = F.pad(columns, (first_pairs + pairs[0], 0)) + first_axis
        return (rows[:, None] + columns[:, None]).flatten(0, 2)  # one pass, since x + 0 is x

    def frame_table(self, frames: int, device) -> torch.Tensor:
        """Return the stock first axis, and 0 for the others: complex64 [frames, 1, D / 2]."""
        table = stock_table(self, 0, frames, device, exact=True)
        return F.pad(table, (0, sum(self.axes_dim[1:]) // 2))[:, None]


class Batch(NamedTuple):
    """The samples of a Z-Image call."""

    grids: list[tuple[int, int]]  # rows and columns of each image
    sequence_length: int  # limit of the ids on the first axis
    tokens_per_sample: tuple[list, list] | None = None  # of each image, and of each caption
    is_row_major: bool = False  # whether the ids of an image go row by row

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Return the different grids, in their order."""
        return list(dict.fromkeys(self.grids))


class DyPEZImageRopeEmbedder(DyPEEmbedder):
    """Z-Image's format: ids int [S, 3] = (sequence index, row, column) -> complex64 [S, D / 2].

    Replaces diffusers' `RopeEmbedder`, a plain callable. It is called with the image tokens of all
    samples, each padded to a multiple of 32 with zeros, and then with their captions. Captions are
    at row and column 0, where they carry their image's attention scale. Rows and columns have no
    upper limit.
    """

    def set_grid(self, height_tokens, width_tokens=None, captions=None, row_major=False) -> None:
        """Set the size of the generated image, in tokens; or of every image of a batch.

        Args:
            height_tokens: rows; or a list of pairs (rows, columns), one per image.
            width_tokens: columns; None with a list.
            captions: tokens of each caption, needed where the sizes differ.
            row_major: whether the ids of an image go row by row, so that nobody needs to read them.
        """
        pairs = [(height_tokens, width_tokens)] if width_tokens is not None else height_tokens
        grids = [(int(height), int(width)) for height, width in pairs]
        super().set_grid(*grids[0])
        batch = Batch(grids, self.stock.axes_lens[0])
        if captions is not None:
            # diffusers appends padding ids to a caption, and as many zeros: 20 tokens become 44
            texts = [2 * pad_to_32(count) - count for count in captions]
            images = [pad_to_32(height * width) for height, width in grids]
            batch = Batch(grids, max(texts) + 2, (images, texts), row_major)
            self.state.num_text = pad_to_32(captions[0])
        self.state.layout = batch

    def prepare_call(self, module: torch.nn.Module, call: dict) -> dict:
        """Read sigma and grids from a denoiser call, whose latents are [C, F, H, W] per sample."""
        if isinstance(call["x"][0], (list, tuple)):
            raise ValueError("x holds lists of images, expected one image per sample")
        self.set_timestep_from(call)
        patch = call.get("patch_size", 2)
        sizes = [(x.shape[-2] // patch, x.shape[-1] // patch) for x in call["x"]]
        captions = [len(caption) for caption in call["cap_feats"]]
        self.set_grid(sizes, captions=captions, row_major=True)  # as diffusers makes the ids
        for grid in self.batch.sizes:
            self.read_latent(module, call, grid)
        self.state.tables = self.axis_tables(call["x"][0].device)
        return call

    def image_tokens(self, module: torch.nn.Module, call: dict, grid) -> tuple:
        """Return the tokens of the images of a size, [B, S, C], and the layer that embeds them."""
        patch = call.get("patch_size", 2)
        images = zip(call["x"], self.batch.grids, strict=True)
        images = torch.stack([x for x, image_grid in images if image_grid == grid])
        return patches(images, patch), module.all_x_embedder[
            f"{patch}-{call.get('f_patch_size', 1)}"
        ]

    @break_graph
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the table of ids int [S, 3], complex64 [S, D / 2]."""
        tables = self.state.tables
        if tables is None or (tables and tables[0][0].device != ids.device):
            tables = self.axis_tables(ids.device)
        if not tables:
            return self.stock(ids)
        is_compiling = torch.compiler.is_compiling()  # then the numbers would be part of the graph
        if not is_compiling and self.batch.is_row_major:
            num_image, num_caption = map(sum, self.batch.tokens_per_sample)
            if num_image == len(ids) != num_caption:  # the images' call, not the captions'
                return self.table_by_broadcast(ids, tables)
        sample_ids, samples = [ids], tables
        if len(tables) > 1:
            sample_ids, samples = self.split_samples(ids, tables)
        parts = []
        for (index, row, column), (sequence, rows, columns) in zip(
            (x.unbind(1) for x in sample_ids), samples, strict=True
        ):
            parts.append(torch.cat([sequence[index], rows[row], columns[column]], -1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @property
    def batch(self) -> Batch:
        """Return the samples of this thread's call."""
        return self.state.layout or Batch([self.grid], self.stock.axes_lens[0])

    def axis_tables(self, device) -> list:
        """Return the tables (first axis, rows, columns) of each size.

        The list is empty if the stock embedder serves the call.
        """
        sizes, count = self.batch.sizes, self.batch.sequence_length
        is_extrapolating = any(map(self.is_extrapolating, sizes))
        longest = [max(side) for side in zip(*sizes, strict=True)]
        lengths = zip((count, *longest), self.stock.axes_lens, strict=True)
        if not is_extrapolating and all(length <= limit for length, limit in lengths):
            return []
        make = partial(stock_table, self, 0, count, device, exact=is_extrapolating)
        sequence = self.get_constant("sequence", count, is_extrapolating, device, make=make)
        tables = []
        for size in sizes:
            lines = [sequence, *self.row_and_column_tables(size, device)]
            tables.append([self.scale_table(table, size) for table in lines])
        return tables

    def table_by_broadcast(self, ids: torch.Tensor, size_tables: list) -> torch.Tensor:
        """Return the images' tables, each by one broadcast sum over its rows and columns.

        Args:
            ids: of all image tokens, [S, 3]. The tokens of an image share the sequence index of its
                first token; padding is at the origin.
            size_tables: `axis_tables` of each size of the batch.
        """
        batch = self.batch
        table = size_tables[0][0].new_empty(len(ids), sum(self.axes_dim) // 2)
        start, (first, second, _) = 0, (dim // 2 for dim in self.axes_dim)
        axis_tables = dict(zip(batch.sizes, size_tables, strict=True))
        for grid, length in zip(batch.grids, batch.tokens_per_sample[0], strict=True):
            end, (sequence, rows, columns) = start + grid[0] * grid[1], axis_tables[grid]
            if end < start + length:
                table[end : start + length] = torch.cat([sequence[0], rows[0], columns[0]])
            both = table.new_zeros(2, max(grid), table.shape[1])  # entries of rows, of columns
            both[0, : grid[0], first : first + second] = rows
            both[1, : grid[1], first + second :] = columns
            both[1, :, :first] = sequence[ids[start : start + 1, 0]]
            # as real numbers, which torch adds in one pass
            both, target = (torch.view_as_real(x).flatten(-2) for x in (both, table[start:end]))
            out = target.view(*grid, -1)
            add_by_broadcast(both[0, : grid[0], None], both[1, None, : grid[1]], out)
            start += length
        return table

    def row_and_column_tables(self, grid: tuple[int, int], device) -> list[torch.Tensor]:
        """Return the tables of the rows and of the columns of one image, complex64 [side, n]."""
        pairs = [dim // 2 for dim in self.axes_dim[1:]]
        if self.is_extrapolating(grid):
            f, m = self.frequencies(grid, device)
            positions = self.positions(0, max(grid), m.device)
            both = polar_table(positions, f, m).to(device)
            return [both[:side, axis, : pairs[axis]] for axis, side in enumerate(grid)]
        if pairs[0] != pairs[1]:
            return [
                stock_table(self, axis, side, device, exact=False)
                for axis, side in enumerate(grid, 1)
            ]
        table = stock_table(self, 1, max(grid), device, exact=False)
        return [table[:side] for side in grid]

    def split_samples(self, ids: torch.Tensor, size_tables: list) -> tuple[list, list]:
        """Return the ids of each image, or of each caption, and the tables of its size."""
        if self.batch.tokens_per_sample is None:
            raise ValueError("images of several sizes, expected set_grid(sizes, captions=...)")
        images, captions = self.batch.tokens_per_sample
        counts = images if len(ids) == sum(images) else captions
        if sum(images) == sum(captions) and not ids[:, 1:].any():
            counts = captions
        axis_tables = dict(zip(self.batch.sizes, size_tables, strict=True))
        return ids.split(counts), [axis_tables[grid] for grid in self.batch.grids]


def patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """Return Z-Image's tokens of latents [B, C, F, H, W]: [B, F H W / size^2, size^2 C]."""
    x = images.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # [B, C, F, h, size, w, size]
    return x.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


def pad_to_32(count: int) -> int:
    """Return the number of tokens after Z-Image's padding: the next multiple of 32."""
    return -(-count // 32) * 32


def image_shapes(shapes) -> list[tuple[int, int, int]]:
    """Return (frames, height, width) of each image of the first sample, from `img_shapes`."""
    first = shapes[0] if isinstance(shapes, list) else shapes
    return first if isinstance(first, list) else [first]


def stock_table(embedder: DyPEEmbedder, axis: int, count: int, device, exact: bool) -> torch.Tensor:
    """Return the table of a stock axis, complex64 [count, n].

    Args:
        embedder: has the axes and theta.
        axis: index of the axis.
        count: positions from 0.
        device: of the table.
        exact: compute angles in float64; else in float32, for the bits of the stock embedder.
    """
    f = rope.stock_frequencies(embedder.axes_dim[axis], embedder.theta, float64_device(device))
    m = torch.ones_like(f) if exact else None
    return polar_table(embedder.positions(0, count, f.device), f, m).to(device)


def polar_table(
    positions: torch.Tensor, inv_freq: torch.Tensor, m: torch.Tensor | None = None
) -> torch.Tensor:
    """Return m exp(i position f), complex64 [positions, *f.shape].

    Args:
        positions: float64 [P].
        inv_freq: f, float64.
        m: attention scale, broadcast over f; None: 1, with float32 angles as in the stock code.
    """
    angle = positions.view(-1, *[1] * inv_freq.ndim) * inv_freq
    if m is None:
        angle = angle.float()
        return torch.polar(torch.ones_like(angle), angle)
    return torch.polar(m, angle).to(torch.complex64)
