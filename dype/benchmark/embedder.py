"""Measure DyPE's embedder, the stock one, the formula token by token, and a plain copy.

All four write the same number of bytes. One run times them in turns. On a CPU the time is the CPU
time of one thread, with a warm allocator: the first touch of fresh pages costs several copies and
would hide everything else. On a GPU it is the time between two events, and the profiler counts the
launches.
"""

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dype import rope
from dype.config import DyPEConfig
from dype.embedders import DyPEFluxPosEmbed
from dype.embedders_complex import DyPEQwenEmbedRope, DyPEZImageRopeEmbedder
from dype.families import PIXELS_PER_TOKEN
from dype.image_ids import make_grid_ids
from dype.sweep.results import write_table

TEXT_TOKENS = 512
TRAINED_TOKENS = 64  # per axis
RATIOS = ("ours/copy", "stock/copy", "ours/stock", "literal/ours")


def use_single_thread(device: torch.device) -> None:
    """Use one thread on a CPU, and make glibc keep freed memory.

    The CPU time of one thread does not depend on other processes. The caching allocators of
    accelerators keep freed memory too.
    """
    if device.type != "cpu":
        return
    torch.set_num_threads(1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def time_call(call: Callable, device: torch.device) -> float:
    """Return the seconds of one call: CPU time of this thread, or GPU time between two events."""
    if device.type == "cpu":
        start = time.thread_time()
        call()
        return time.thread_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


class LaunchCounter(TorchDispatchMode):
    """Counts, on any device, the operations that would launch a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if not (function.is_view or name in ("aten::empty", "aten::new_empty", "aten::detach")):
            self.count += 2 if name == "aten::constant_pad_nd" else 1  # pad fills, then copies
        return function(*args, **(kwargs or {}))


def count_launches(call: Callable, device: torch.device) -> int:
    """Return the number of kernels that one call launches on a GPU.

    The profiler counts them on a GPU, and LaunchCounter on a CPU.
    """
    if device.type == "cpu":
        with LaunchCounter() as counter:
            call()
        return counter.count
    with torch.profiler.profile() as profile:
        call()
    return sum("Launch" in event.name for event in profile.events())


def cos_sin_family(
    module: str,
    class_name: str,
    theta: float,
    axes_dim: list[int],
    text_tokens: int,
    side: int,
    config: DyPEConfig,
) -> tuple:
    """Return the embedders of a family that returns cos and sin, with the arguments of a call.

    Args:
        module: last part of the name of the transformer's module in diffusers.
        class_name: the stock embedder.
        theta: base of the frequencies.
        axes_dim: channels per axis.
        text_tokens: number of text tokens in front of the image tokens.
        side: tokens per side of the image.
        config: settings of DyPE.

    Returns:
        The stock embedder, DyPE's, and the arguments of a call.
    """
    module = import_module(f"diffusers.models.transformers.transformer_{module}")
    stock = getattr(module, class_name)(theta, axes_dim)
    ids = torch.cat([torch.zeros(text_tokens, 3), make_grid_ids(0, side, side)])
    ours = DyPEFluxPosEmbed(stock, config, TRAINED_TOKENS)
    ours.set_grid(side, side)
    ours.set_token_layout(text_tokens, 0)
    return stock, ours, (F.pad(ids, (0, len(axes_dim) - 3)),)


def z_image_family(side: int, config: DyPEConfig) -> tuple:
    """Return Z-Image's stock embedder, DyPE's, and the arguments of a call."""
    from diffusers.models.transformers.transformer_z_image import RopeEmbedder

    stock = RopeEmbedder(256.0, [32, 48, 48], [1536, 512, 512])
    ours = DyPEZImageRopeEmbedder(stock, config, TRAINED_TOKENS)
    ours.set_grid([(side, side)], captions=[TEXT_TOKENS], row_major=True)
    return stock, ours, (make_grid_ids(TEXT_TOKENS + 1, side, side).int(),)


def qwen_image_family(side: int, config: DyPEConfig) -> tuple:
    """Return Qwen-Image's stock embedder, DyPE's, and the arguments of a call."""
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    stock = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)
    ours = DyPEQwenEmbedRope(stock, config, 83)
    ours.set_grid(side, side)
    return stock, ours, ([[(1, side, side)]], torch.get_default_device(), TEXT_TOKENS)


FAMILIES = {  # functions: (tokens per side, config) -> stock embedder, DyPE's, call arguments
    # FLUX.1, Chroma, Bria
    "flux": partial(cos_sin_family, "flux", "FluxPosEmbed", 10000, [16, 56, 56], TEXT_TOKENS),
    # only the call for the image, because that for the text has just 512 tokens
    "flux2": partial(cos_sin_family, "flux2", "Flux2PosEmbed", 2000, [32, 32, 32, 32], 0),
    "krea2": partial(
        cos_sin_family, "krea2", "Krea2RotaryPosEmbed", 1000, [32, 48, 48], TEXT_TOKENS
    ),
    "z-image": z_image_family,
    "qwen-image": qwen_image_family,
}


def measure_costs(family: str, size: int, repeats: int, device: torch.device, method: str) -> dict:
    """Measure one embedder call at `size` x `size` px.

    Args:
        family: a key of FAMILIES.
        size: side of the image, px.
        repeats: number of timed calls.
        device: device of the tables.
        method: a method of DyPEConfig.

    Returns:
        "launches", the median milliseconds of "copy", "ours", "stock" and "literal", and RATIOS.
    """
    with torch.device(device):
        config = DyPEConfig(method, dype=True)
        stock, ours, args = FAMILIES[family](size // PIXELS_PER_TOKEN, config)
    ours.set_timestep(torch.tensor(0.6, device=device))
    tables = ours(*args)
    tables = tables if isinstance(tables, tuple) else (tables,)
    # because a timing counts only if the fast path equals the formula at every token
    table = tables[0] if tables[0].is_complex() else torch.complex(*tables)[:, ::2]
    # 1e-4 at the trained size, because stock angles may be float32
    tolerance = 1e-6 if ours.is_extrapolating(ours.grid) else 1e-4
    assert (table - reference_table(ours, args)).abs().max() < tolerance
    calls = {
        "copy": lambda: [table.clone() for table in tables],
        "ours": lambda: ours(*args),
        "stock": lambda: stock(*args),
        "literal": lambda: reference_table(ours, args),
    }
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(time_call(call, device))
    row = {"launches": count_launches(calls["ours"], device)}
    row |= {name: 1000 * statistics.median(values) for name, values in times.items()}
    for ratio in RATIOS:
        numerator, denominator = ratio.split("/")
        row[ratio] = row[numerator] / row[denominator]
    return row


def reference_table(embedder, args: tuple) -> torch.Tensor:
    """Compute the formula m exp(i position f) at every token and pair, complex128 [S, D / 2].

    The frequencies f of height and width come from `axis_frequencies`; other axes are stock.
    """
    axis_tables, positions = [], args[0]  # positions of all tokens of the call, [S, A]
    if isinstance(embedder, DyPEQwenEmbedRope):
        # because a Qwen-Image call passes sizes, and its positions start at the middle
        positions, grid = make_grid_ids(0, *embedder.grid, args[1]), torch.tensor(embedder.grid)
        positions[:, 1:] -= (grid - grid // 2).to(args[1])
    for axis, dim in enumerate(embedder.axes_dim):
        f = rope.stock_frequencies(dim, embedder.theta)
        m = torch.ones_like(f)
        if axis in (1, 2):
            axis_args = dim, embedder.theta, embedder.trained_tokens, embedder.grid[axis - 1]
            largest = max(embedder.grid) / embedder.trained_tokens
            f, m = rope.axis_frequencies(
                *axis_args, float(embedder.sigma), embedder.config, largest
            )
        angle = positions[:, axis, None].double() * f.to(positions.device)
        axis_tables.append(torch.polar(m.to(angle).expand_as(angle), angle))
    return torch.cat(axis_tables, -1)


def run(args: argparse.Namespace) -> dict:
    """Print a table of costs and ratios per family and size, and return it; --save may write it."""
    names = ("copy", "ours", "stock", "literal")
    headers = [f"{name + ' ms':>10}" for name in names] + [f"{name:>12}" for name in RATIOS]
    print("family      px   ", *headers, " launches")
    rows = {family: {} for family in args.families}
    for family in args.families:
        for size in args.sizes:
            row = measure_costs(family, size, args.repeats, torch.device(args.device), args.method)
            cells = [f"{row[name]:10.2f}" for name in names]
            cells += [f"{row[name]:12.2f}" for name in RATIOS]
            print(f"{family:11} {size:<5}", *cells, f"{row['launches']:9}")
            rows[family][str(size)] = {name: round(value, 3) for name, value in row.items()}
            gc.collect()
    if args.save is not None and args.save.suffix == ".csv":
        columns = ["family", "px", *RATIOS, "ours", "launches"]
        table = [
            {"family": family, "px": size} | row
            for family, sizes in rows.items()
            for size, row in sizes.items()
        ]
        write_table(args.save, columns, table)
    return {"families": rows}
