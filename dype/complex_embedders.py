"""Rotary embedders that follow the noise level, for the transformers with complex tables.

A table holds m exp(i position f) per token and pair. While nothing is stretched the stock embedder
answers, or its own arithmetic (float32 angles), so that the bits are the stock model's.
"""

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

    def before(self, module: torch.nn.Module, call: dict, family) -> dict:
        """Read noise level and grid from a denoiser call. All samples of a batch share them."""
        self.set_timestep(family.sigma(call[family.time].flatten()[0]))
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
        at = torch.arange(-middle, longest - middle, device=m.device)
        both = turns(at, inv_freq, m[:, None]).to(device)
        rows, columns = (
            both[middle - (n - n // 2) :, axis][:n] for axis, n in enumerate((height, width))
        )
        first = rope.stock_frequencies(self.axes_dim[0], self.theta, m.device)
        first = turns(frames, first, torch.ones_like(m[0])).to(device)
        pairs, others = rows.shape[1], first.shape[1]
        rows = F.pad(rows, (others, pairs))
        columns = F.pad(columns, (others + pairs, 0)) + F.pad(first, (0, 2 * pairs))[:, None]
        return (rows[:, None] + columns[:, None]).flatten(0, 2)  # one pass: x + 0 is x


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
        self.grid, self.lengths = self.grids[0], None
        self.places = self.stock.axes_lens[0]  # how far ids may count on the first axis
        if captions is not None:
            # a caption's padding counts on; as many zeros follow, which diffusers cuts off later
            texts = [2 * padded(count) - count for count in captions]
            self.lengths = [padded(height * width) for height, width in self.grids], texts
            self.places = max(texts) + 2

    def before(self, module: torch.nn.Module, call: dict, family) -> dict:
        """Read noise level and grids from a denoiser call; its latents are [C, F, H, W] each."""
        if isinstance(call["x"][0], (list, tuple)):
            raise ValueError("x holds lists of pictures, expected one picture per sample")
        self.set_timestep(family.sigma(call[family.time].flatten()[0]))
        patch = call.get("patch_size", 2)
        sizes = [(x.shape[-2] // patch, x.shape[-1] // patch) for x in call["x"]]
        self.set_grid(sizes, captions=[len(caption) for caption in call["cap_feats"]])
        return call

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        sizes = list(dict.fromkeys(self.grids))
        active = any(map(self.active, sizes))
        longest = [max(side) for side in zip(*sizes, strict=True)]
        limits = self.stock.axes_lens
        needed = (self.places, *longest)
        if not active and all(n <= limit for n, limit in zip(needed, limits, strict=True)):
            return self.stock(ids)
        device = float64_device(ids.device)
        place = rope.stock_frequencies(self.axes_dim[0], self.theta, device)
        one = torch.ones((), dtype=torch.float64, device=device) if active else None
        tables = [[turns(self.places, place, one)], [], []]
        for size in sizes:
            for table, *axis in zip(tables[1:], size, *self.axes(size, device), strict=True):
                table.append(turns(*axis))
        at = ids if len(sizes) == 1 else self.shifted(ids, sizes)
        found = [torch.cat(t).to(ids.device)[at[:, axis]] for axis, t in enumerate(tables)]
        return torch.cat(found, -1)

    def axes(self, grid, device):
        """Frequencies and scales of one picture's two axes; scales None: the stock encoding."""
        if self.active(grid):
            return self.frequencies(grid, device)
        stock = rope.stock_frequencies(self.axes_dim[1], self.theta, device)
        return (stock, stock), (None, None)

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


def padded(count: int) -> int:
    """Tokens after Z-Image's padding: the next multiple of 32."""
    return -(-count // 32) * 32


def pictures(shapes) -> list[tuple[int, int, int]]:
    """(frames, height, width) of every picture of the first sample, from Qwen's `img_shapes`."""
    first = shapes[0] if isinstance(shapes, list) else shapes
    return first if isinstance(first, list) else [first]


def turns(at, inv_freq: torch.Tensor, m: torch.Tensor | None = None) -> torch.Tensor:
    """m exp(i at f), complex64 [positions, *f.shape]; m None: in stock's float32, with its bits.

    at: positions, or how many of them from 0; m: broadcast over f.
    """
    if isinstance(at, int):
        at = torch.arange(at, device=inv_freq.device)
    angle = at.double().view(-1, *[1] * inv_freq.ndim) * inv_freq
    if m is None:
        angle = angle.float()
        return torch.polar(torch.ones_like(angle), angle)
    return torch.complex((m * angle.cos()).float(), (m * angle.sin()).float())
