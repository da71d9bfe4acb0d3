"""Rotary embedders that follow sigma, for transformers whose tables are real numbers.

The transformer's forward pre-hook calls `prepare_call` with the arguments of each denoiser call.
That reads sigma and the token grid, and computes the tables that `forward` then returns. A loop
that does not call the transformer as a module calls `set_timestep` and `set_grid` itself, and
`forward` computes; without `set_grid` the encoding is the stock one. The complex formats are in
`embedders_complex`.
"""

import math
import threading
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dype import rope, sega
from dype.config import DyPEConfig
from dype.image_ids import ImageIds, first_sample, make_grid_ids, parse_image_ids, trace_grid

MAX_CONSTANTS = 32  # two per size for FLUX, three with SEGA's m; when full, all are made again
# before torch 2.7 a compiler cannot read what belongs to a thread: it breaks its graph there
break_graph = torch.compiler.disable if torch.__version__ < (2, 7) else lambda method: method


class CallState(threading.local):
    """The denoiser call that an embedder serves. Each thread has its own.

    So threads can share a transformer. A compiler takes the tables as inputs of its graph: one
    graph serves every sigma, and as many sizes as without DyPE.
    """

    def __init__(self):
        self.sigma = torch.ones((), dtype=torch.float64)
        self.grid = (1, 1)  # rows and columns of the generated image
        self.layout = None  # what is known of the tokens' order; each format has its own form
        self.tables = None  # one per embedder call, from the pre-hook; None: there was no hook
        self.latent_scales = {}  # grid -> `sega.attention_scales`, where m follows the latent
        self.num_text = 0  # text tokens of a sample, without copies ...
        self.copies = 1  # ... and how often `text_repeat` has them
        self.last_ids = (None, 0, None)  # ids, their version, and what `parse_image_ids` returns

    def __reduce__(self):
        return CallState, ()  # a copy has no call yet


class DyPEEmbedder:
    """Base class: holds the settings and the call, and computes the frequencies of both axes.

    A subclass has `prepare_call` and `forward`; `apply_dype` sets `family` and `hook`. There are no
    parameters and no buffers.

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
        self.state = CallState()
        self.constants = {}

    @property
    def sigma(self) -> torch.Tensor:
        """Sigma of this thread's call, a 0-dim float64 tensor."""
        return self.state.sigma

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image in this thread's call."""
        return self.state.grid

    @classmethod
    def check_stock(cls, stock) -> None:
        """Raise TypeError if the tables of a stock embedder have another format."""

    def set_timestep(self, sigma: float | torch.Tensor) -> None:
        """Set sigma in [0, 1], 1 is pure noise, for this thread: a float or a 0-dim tensor."""
        if not isinstance(sigma, torch.Tensor):
            sigma = torch.tensor(sigma, dtype=torch.float64)
        self.state.sigma, self.state.tables = to_float64(sigma.detach()), None

    def set_grid(self, height_tokens: int, width_tokens: int) -> None:
        """Set the size of the generated image in tokens, for this thread."""
        state = self.state
        state.grid = (int(height_tokens), int(width_tokens))
        state.layout = state.tables = None
        state.latent_scales, state.num_text, state.copies = {}, 0, 1

    def set_timestep_from(self, call: dict) -> None:
        """Set sigma from the arguments of a denoiser call; it is read from the first sample."""
        time = to_float64(call[self.family.timestep_arg].flatten()[0])
        self.set_timestep(self.family.to_sigma(time))

    def is_extrapolating(self, grid: tuple[int, int]) -> bool:
        """Return whether the encoding of a token grid (height, width) is not the stock one.

        The complex formats then call the stock embedder; FLUX's table has the stock bits by itself.
        """
        return self.config.method != "base" and max(grid) > self.trained_tokens

    def count_copies(self, grid: tuple[int, int]) -> int:
        """Return how often a call has its text, by `text_repeat`; once without a stretch."""
        return count_text_copies(self.config.text_repeat, self.trained_tokens, grid)

    def read_latent(self, module: torch.nn.Module, call: dict, grid: tuple[int, int]) -> None:
        """Compute m from the latent of a denoiser call, if m follows it."""
        if not (self.config.follows_latent and self.is_extrapolating(grid)):
            return
        if torch.compiler.is_compiling():
            raise ValueError("torch.export cannot trace SEGA's attention scale, expected another")
        tokens, embed = self.image_tokens(module, call, grid)
        pairs = tuple(dim // 2 for dim in self.axes_dim[1:3])
        s_max = rope.max_scale(self.trained_tokens, grid)
        with torch.no_grad():
            latent = sega.latent_map(tokens, embed, grid, self.get_constant)
            latent = latent.to(float64_device(latent.device))
            scales = sega.attention_scales(latent, pairs, s_max, self.config, self.get_constant)
        self.state.latent_scales[grid] = scales

    def image_tokens(self, module: torch.nn.Module, call: dict, grid) -> tuple:
        """Return the image tokens of a call, [B, S, C], and the layer that embeds them."""
        return call[self.family.image_arg], getattr(module, self.family.image_layer)

    def scale_table(self, table: torch.Tensor, grid) -> torch.Tensor:
        """Return a table of all axes times the m of `attention_path` "proportional", if it is so.

        Args:
            table: of any format.
            grid: rows and columns of the image; a tensor [2] while `torch.export` traces.
        """
        if self.config.attention_path != "proportional" or self.config.method == "base":
            return table
        num_text, copies = self.state.num_text, self.state.copies
        tokens = grid[0] * grid[1] + copies * num_text
        m = rope.proportional_scale(tokens, self.trained_tokens**2 + num_text)
        s_max = rope.max_scale(self.trained_tokens, grid)
        if isinstance(s_max, torch.Tensor):
            return table * torch.where(s_max > 1, m, 1.0)
        return table * m if s_max > 1 else table

    def frequencies(self, grid, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return f of rows and columns, float64 [2, n], and m of both, [2, 1] or [2, n].

        Where the axes have different numbers of pairs, the shorter rows end with zeros.

        Args:
            grid: rows and columns; a tensor [2] while `torch.export` traces.
            device: of the tokens; the result is on its `float64_device`.
        """
        device, dims = float64_device(device), self.axes_dim[1:3]
        s_max = rope.max_scale(self.trained_tokens, grid)
        if dims[0] == dims[1]:
            batches = [(dims[0], grid)]
        else:
            batches = [(dim, grid[axis : axis + 1]) for axis, dim in enumerate(dims)]
        f, m = [], []
        for dim, tokens in batches:
            arguments = dim, self.theta, self.trained_tokens, tokens, device, self.config, s_max
            make = partial(rope.build_axes, *arguments)
            axis = self.get_constant("axis", dim, tokens, s_max, device, make=make)
            f_axis, m_axis = rope.batched_frequencies(axis, self.sigma.to(device), self.config)
            f.append(f_axis)
            m.append(m_axis)
        if self.state.latent_scales:
            m = [m_axes.to(device) for m_axes in self.state.latent_scales[grid]]
        if len(f) == 1:
            return f[0], m[0]
        m = [m_axis.expand_as(f_axis) for m_axis, f_axis in zip(m, f, strict=True)]
        missing = [(max(dims) - dim) // 2 for dim in dims]
        f, m = ([F.pad(x, (0, n)) for x, n in zip(rows, missing, strict=True)] for rows in (f, m))
        return torch.cat(f), torch.cat(m)

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
        constant = self.constants.get(key)
        if constant is None:
            with torch.inference_mode(False):
                constant = make()
            if len(self.constants) >= MAX_CONSTANTS:
                self.constants.clear()
            self.constants[key] = constant
        return constant


def count_text_copies(text_repeat: int | str, trained: float, grid: tuple[int, int]) -> int:
    """Return how often attention sees the text; once without a stretch.

    Args:
        text_repeat: of `DyPEConfig`.
        trained: trained length in tokens.
        grid: rows and columns of the image in tokens.
    """
    if max(grid) <= trained:
        return 1
    if text_repeat == "auto":
        return round(math.prod(rope.scale(trained, side) for side in grid))
    return text_repeat


def repeat_text(call: dict, arguments: tuple[tuple[str, int], ...], copies: int) -> dict:
    """Return a denoiser call with its text `copies` times, one copy behind the other.

    Attention to k equal keys is attention to one whose logit has ln k more, so this is the bias
    ln k on the text (the text anchoring of TIDE, arXiv 2603.08928), exactly and without a mask.

    Args:
        call: arguments by name.
        arguments: names, and the axis of the text's tokens, which come first there; the first one
            is the text.
        copies: k.
    """
    if copies == 1:
        return call
    for name in ("joint_attention_kwargs", "attention_kwargs"):
        if "attention_mask" in (call.get(name) or {}):
            raise ValueError(f"{name} has an attention_mask, expected none with text_repeat")
    text, axis = arguments[0]
    num_text, call = call[text].shape[axis], dict(call)
    for name, axis in arguments:
        if isinstance(call.get(name), torch.Tensor):
            first, rest = call[name].tensor_split([num_text], axis)
            call[name] = torch.cat([first] * copies + [rest], axis)
    return call


class TextIds(NamedTuple):
    """Ids of the text tokens, [T, A], by the place where a family has them."""

    prefix: torch.Tensor  # in front of the image tokens when the embedder is called
    is_in_image_ids: bool = False  # whether the denoiser's ids argument begins with them
    separate_call: torch.Tensor | None = None  # in a second call of the embedder

    @property
    def count(self) -> int:
        """Return the number of text tokens."""
        return len(self.prefix if self.separate_call is None else self.separate_call)


def flux1_text_ids(module, call: dict) -> TextIds:
    """Return the ids of FLUX.1's text, which the transformer puts in front of `img_ids`."""
    ids = first_sample(call["txt_ids"])
    if getattr(module, "union", False):  # a union controlnet adds a token for its mode
        ids = torch.cat([ids[:1], ids])
    return TextIds(ids)


def flux2_text_ids(module, call: dict) -> TextIds:
    """Return the ids of FLUX.2's text, which has an embedder call after the image's."""
    ids = first_sample(call["txt_ids"])
    return TextIds(ids[:0], separate_call=ids)


def krea2_text_ids(module, call: dict) -> TextIds:
    """Return the ids of Krea 2's text, with which the ids argument begins."""
    count = call["encoder_hidden_states"].shape[1]
    return TextIds(call["position_ids"][:count], is_in_image_ids=True)


TEXT_IDS = {"flux1": flux1_text_ids, "flux2": flux2_text_ids, "krea2": krea2_text_ids}


class DyPEFluxPosEmbed(DyPEEmbedder, torch.nn.Module):
    """FLUX's format: (cos, sin), float32 [S, D], each value repeated for its pair.

    Replaces diffusers' `FluxPosEmbed` and its copies, called with ids [S, A] = (kind, row, column,
    ...). Kind 0 marks text tokens (at the origin) and image tokens; other values mark reference
    images, which keep the stock encoding. Axes beyond height and width are always stock.
    """

    @classmethod
    def check_stock(cls, stock) -> None:
        """Raise TypeError if the tables of a stock embedder have another format."""
        table = stock(torch.zeros(1, len(stock.axes_dim)))
        if not (isinstance(table, tuple) and [part.ndim for part in table] == [2, 2]):
            raise TypeError(
                f"its {type(stock).__name__} returns a table of another format, expected cos and "
                "sin, as from FluxPosEmbed"
            )

    def set_token_layout(self, num_text: int, num_reference: int) -> None:
        """Declare the token order of the next calls, for this thread.

        It is `num_text` text tokens, the grid in row-major order, `num_reference` reference tokens.
        The table is then written by broadcasting one row and one column; the ids of the grid are
        not read.
        """
        self.state.layout, self.state.num_text = (num_text, num_reference), num_text

    def prepare_call(self, module: torch.nn.Module, call: dict) -> dict:
        """Read sigma and grid from a denoiser call, and return the call with exact ids.

        The ids are copied to the host if they are not the tensor of the last call: once per image
        in every pipeline, except FLUX.2 with reference images. In inference mode an in-place change
        of the ids is not seen.

        Raises ValueError if no token belongs to a generated image.
        """
        family, state = self.family, self.state
        self.set_timestep_from(call)
        ids, text = call[family.ids_arg], TEXT_IDS[family.text_ids](module, call)
        start = text.prefix.shape[0] if text.is_in_image_ids else 0
        # Under context parallelism `forward` gets a shard of the ids, and computes from these.
        is_sharded = getattr(module, "_parallel_config", None) is not None
        if torch.compiler.is_compiling() or ids.device.type == "meta":  # no values to read
            exact_ids = first_sample(ids).float()
            state.grid, state.layout, state.copies = trace_grid(exact_ids[start:]), None, 1
            if self.config.follows_latent or self.config.text_repeat != 1:
                raise ValueError(
                    "without values in img_ids, as under torch.export, neither text_repeat nor "
                    "SEGA's attention scale works, expected text_repeat 1 and another scale"
                )
        else:
            last_ids, parsed = state.last_ids[0], self.read_ids(ids, start)
            exact_ids = parsed.ids
            self.set_grid(*parsed.grid)
            if last_ids is not ids and max(parsed.grid) > self.trained_tokens:
                self.check_schedule(self.sigma, has_references=bool(parsed.num_reference))
            if is_sharded and not parsed.has_distinct_kinds:
                raise ValueError(
                    "a reference image has kind 0 in img_ids, as the generated image, expected "
                    "another kind under context parallelism"
                )
            self.read_latent(module, call, parsed.grid)
            state.copies = self.count_copies(parsed.grid)
            if state.copies > 1:
                call = call | {family.ids_arg: exact_ids}
                call = repeat_text(call, family.text_args, state.copies)
                exact_ids, text = call[family.ids_arg], TEXT_IDS[family.text_ids](module, call)
                start = text.prefix.shape[0] if text.is_in_image_ids else 0
            if parsed.num_reference is not None and not is_sharded:
                state.layout = (len(text.prefix), parsed.num_reference)
        state.num_text = text.count // state.copies
        if not is_sharded:
            separate_calls = [] if text.separate_call is None else [text.separate_call]
            table = self.compute_table(text.prefix, exact_ids[start:])
            state.tables = [table, *map(self.table_from_ids, separate_calls)]
        return call | {family.ids_arg: exact_ids.expand(*ids.shape[:-2], -1, -1)}

    def image_tokens(self, module: torch.nn.Module, call: dict, grid) -> tuple:
        """Return the image tokens and their embedder; raise ValueError if no grid comes first."""
        if self.state.last_ids[2].num_reference is None:
            raise ValueError(
                "the image is not the first row-major grid in img_ids, expected it there for "
                "SEGA's attention scale"
            )
        return super().image_tokens(module, call, grid)

    def read_ids(self, ids: torch.Tensor, start: int) -> ImageIds:
        """Return `parse_image_ids(ids, start)`, or its last result in this thread."""
        version = 0 if ids.is_inference() else ids._version
        last_ids, last_version, parsed = self.state.last_ids
        if last_ids is not ids or last_version != version:
            parsed = parse_image_ids(ids, start)
            self.state.last_ids = ids, version, parsed
        return parsed

    @break_graph
    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of ids [S, A], float32 [S, D] each."""
        tables = self.state.tables
        # not `len`, which would make a size of `torch.export` a constant
        is_prepared = tables and tables[0].shape[1] == ids.shape[0]
        if is_prepared:
            table = tables.pop(0)
        else:
            num_text, _ = self.state.layout or (0, 0)
            table = self.compute_table(ids[:num_text], ids[num_text:])
        table = table.to(ids.device)  # hooks may move a call after ours, as those that offload do
        return table[0], table[1]

    def compute_table(self, text_ids: torch.Tensor, image_ids: torch.Tensor) -> torch.Tensor:
        """Return m cos and m sin of text ids [T, A], then of image ids [S, A]: [2, T + S, D]."""
        (height, width), layout = self.grid, self.state.layout
        size = height * width
        if layout is None or (len(text_ids), len(image_ids) - size) != layout:
            # a shard under context parallelism, or irregular ids
            return self.table_from_ids(torch.cat([text_ids, image_ids]))
        return self.table_by_broadcast(text_ids, image_ids[size:])

    def table_from_ids(self, ids: torch.Tensor, num_stretched: int | None = None) -> torch.Tensor:
        """Return m cos and m sin of each token's ids, float32 [2, S, D], each value twice.

        Args:
            ids: [S, A].
            num_stretched: so many tokens, the first ones, follow the method, and the others are
                stock. None: those of kind 0 follow it.
        """
        f_axes, m_axes = self.frequencies(self.grid, ids.device)
        pairs = [dim // 2 for dim in self.axes_dim]
        make = partial(self.stock_frequencies_per_pair, m_axes.device)
        stock, unit_m, axis_of_pair = self.get_constant("stock", m_axes.device, make=make)
        m_axes = m_axes.expand_as(f_axes)
        f_axes, m_axes = (
            [x[:count] for x, count in zip(axes, pairs[1:3], strict=True)]
            for axes in (f_axes, m_axes)
        )
        f = torch.cat([stock[: pairs[0]], *f_axes, stock[sum(pairs[:3]) :]])
        m = torch.cat([unit_m[: pairs[0]], *m_axes, unit_m[sum(pairs[:3]) :]])
        positions = to_float64(ids)
        if num_stretched != ids.shape[0]:
            is_stretched = positions[:, :1] == 0
            if num_stretched is not None:
                is_stretched = torch.arange(len(ids), device=m.device)[:, None] < num_stretched
            f = torch.where(is_stretched, f, stock)
            m = torch.where(is_stretched, m, unit_m)
        angle = positions[:, axis_of_pair] * f
        table = self.scale_table(torch.stack([angle.cos(), angle.sin()]) * m, self.grid)
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
        self, text_ids: torch.Tensor, reference_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return the table of text, grid and references, by trigonometry for one row and column."""
        (height, width), device = self.grid, reference_ids.device
        make = partial(self.first_row_and_column_ids, device)
        lines, row_mask, column_mask = self.get_constant("lines", self.grid, device, make=make)
        num_text, num_reference = len(text_ids), len(reference_ids)
        end = num_text + height * width
        few_ids = torch.cat([text_ids, lines, reference_ids])
        counts = num_text, height, width, num_reference
        tables = self.table_from_ids(few_ids, num_text + height + width).split(counts, dim=1)
        text, rows, columns, references = tables
        rows, columns = (rows * row_mask)[:, :, None], (columns * column_mask)[:, None]
        table = rows.new_empty(2, end + num_reference, rows.shape[-1])
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

    @classmethod
    def check_stock(cls, stock) -> None:
        """Raise TypeError if the tables of a stock embedder have another format."""
        table = stock(torch.zeros(1, 1, len(stock.axes_dim)))
        if not (isinstance(table, torch.Tensor) and table.shape[-2:] == (2, 2)):
            raise TypeError(
                f"its {type(stock).__name__} returns a table of another format, expected matrices "
                "of 2 x 2, as from EmbedND"
            )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rotation matrices of ids [B, S, A]."""
        cos, sin = (values[:, ::2] for values in super().forward(ids[0]))
        matrices = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
        return matrices.expand(len(ids), 1, *matrices.shape)


def add_by_broadcast(rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    """Write rows + columns to `out` in one pass; exact, since one of the two is always 0."""
    if torch.compiler.is_compiling():  # a compiler has no `out`
        out.copy_(rows + columns)
    else:
        torch.add(rows, columns, out=out)


def to_float64(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor as float64, on its `float64_device`.

    A device without float64 cannot even copy to it, so the tensor moves first.
    """
    return x.to(float64_device(x.device)).double()


def float64_device(device: torch.device) -> torch.device:
    """Return where to compute tables for `device`: there, or on the CPU if it lacks float64."""
    device = torch.device(device)
    return device if has_float64(device.type) else torch.device("cpu")


@torch.compiler.assume_constant_result
def has_float64(device_type: str) -> bool:
    """Return whether devices of a type, as "cuda", compute in float64."""
    return try_float64(device_type)


@cache
def try_float64(device_type: str) -> bool:
    """Return whether a computation in float64 succeeds on a type of device."""
    try:
        torch.ones(1, dtype=torch.float64, device=device_type).cos()
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, AssertionError):  # by the backend
        return False
    return True
