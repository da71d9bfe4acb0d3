"""What an embedder costs: ours, the stock one, the formula token by token, and a plain copy.

All four write the same bytes, and are timed in one run, in turns. On a CPU it is the CPU time of
one thread, with a warm allocator (the first touch of fresh pages would cost several copies and hide
all else); on a GPU the time between two events, with launches counted by the profiler.
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
from dype.embedders import DyPEFluxPosEmbed, make_grid_ids
from dype.embedders_complex import DyPEQwenEmbedRope, DyPEZImageRopeEmbedder
from dype.families import PIXELS_PER_TOKEN

TEXT_TOKENS = 512
TRAINED = 64  # tokens
RATIOS = ("ours/copy", "stock/copy", "ours/stock", "literal/ours")


def single_thread(device: torch.device) -> None:
    """On a CPU one thread, whose time does not depend on what else runs, and a glibc that keeps
    freed memory, as the caching allocators of accelerators do."""
    if device.type != "cpu":
        return
    torch.set_num_threads(1)
    keep = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if keep is not None:
        keep(-4, 0)  # M_MMAP_MAX
        keep(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def time_call(call: Callable, device: torch.device) -> float:
    """Seconds of one call: of this thread's CPU time, or on a GPU between two events."""
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


class Launches(TorchDispatchMode):
    """Counts the operations that would launch a kernel on a GPU, on any device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if not (function.is_view or name in ("aten::empty", "aten::new_empty", "aten::detach")):
            self.count += 2 if name == "aten::constant_pad_nd" else 1  # it fills, then copies
        return function(*args, **(kwargs or {}))


def count_launches(call: Callable, device: torch.device) -> int:
    """Kernels that one call launches: as a GPU's profiler has seen, or by the operations."""
    if device.type == "cpu":
        with Launches() as seen:
            call()
        return seen.count
    with torch.profiler.profile() as profile:
        call()
    return sum("Launch" in event.name for event in profile.events())


def cos_sin_family(
    module: str, name: str, theta: float, axes: list[int], texts: int, side: int, config: DyPEConfig
) -> tuple:
    """A format of cos and sin, called with `texts` tokens of text in front of the image's."""
    module = import_module(f"diffusers.models.transformers.transformer_{module}")
    stock = getattr(module, name)(theta, axes)
    ids = torch.cat([torch.zeros(texts, 3), make_grid_ids(0, side, side)])
    ours = DyPEFluxPosEmbed(stock, config, TRAINED)
    ours.set_grid(side, side)
    ours.set_token_layout(texts, 0)
    return stock, ours, (F.pad(ids, (0, len(axes) - 3)),)


def z_image(side: int, config: DyPEConfig) -> tuple:
    from diffusers.models.transformers.transformer_z_image import RopeEmbedder

    stock = RopeEmbedder(256.0, [32, 48, 48], [1536, 512, 512])
    ours = DyPEZImageRopeEmbedder(stock, config, TRAINED)
    ours.set_grid([(side, side)], captions=[TEXT_TOKENS])
    ours.regular = True  # as the pre-hook says of diffusers' own calls
    return stock, ours, (make_grid_ids(TEXT_TOKENS + 1, side, side).int(),)


def qwen_image(side: int, config: DyPEConfig) -> tuple:
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    stock = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)
    ours = DyPEQwenEmbedRope(stock, config, 83)
    ours.set_grid(side, side)
    return stock, ours, ([[(1, side, side)]], torch.get_default_device(), TEXT_TOKENS)


FAMILIES = {  # (tokens of a side, config) -> the stock embedder, ours, the arguments of a call
    # FLUX.1, Chroma, Bria
    "flux": partial(cos_sin_family, "flux", "FluxPosEmbed", 10000, [16, 56, 56], TEXT_TOKENS),
    # the call for the image; the other, for the text, has 512 tokens
    "flux2": partial(cos_sin_family, "flux2", "Flux2PosEmbed", 2000, [32, 32, 32, 32], 0),
    "krea2": partial(
        cos_sin_family, "krea2", "Krea2RotaryPosEmbed", 1000, [32, 48, 48], TEXT_TOKENS
    ),
    "z-image": z_image,
    "qwen-image": qwen_image,
}


def measure_costs(family: str, size: int, repeats: int, device: torch.device, method: str) -> dict:
    """Of one call at `size` x `size` px: launches, median milliseconds by what was called, and
    RATIOS."""
    with torch.device(device):
        stock, ours, args = FAMILIES[family](size // PIXELS_PER_TOKEN, DyPEConfig(method))
    ours.set_timestep(torch.tensor(0.6, device=device))
    tables = ours(*args)
    tables = tables if isinstance(tables, tuple) else (tables,)
    # the timed path must give what the formula gives, at every token
    table = tables[0] if tables[0].is_complex() else torch.complex(*tables)[:, ::2]
    exact = 1e-6 if ours.is_extrapolating(ours.grid) else 1e-4  # stock's angles may be float32
    assert (table - reference_table(ours, args)).abs().max() < exact
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
        name, other = ratio.split("/")
        row[ratio] = row[name] / row[other]
    return row


def reference_table(embedder, args: tuple) -> torch.Tensor:
    """The formula as it is written, m exp(i position f) at every token and pair.

    complex128 [S, D / 2]. Frequencies as `axis_frequencies` gives them, stock on other axes.
    """
    parts, places = [], args[0]  # the position of every token that a call is for, [S, A]
    if isinstance(
        embedder, DyPEQwenEmbedRope
    ):  # which is called with sizes, and counts from the middle
        places, grid = make_grid_ids(0, *embedder.grid, args[1]), torch.tensor(embedder.grid)
        places[:, 1:] -= (grid - grid // 2).to(args[1])
    for axis, dim in enumerate(embedder.axes_dim):
        f, m = rope.stock_frequencies(dim, embedder.theta), 1.0
        if axis in (1, 2):
            known = dim, embedder.theta, embedder.trained_tokens, embedder.grid[axis - 1]
            largest = max(embedder.grid) / embedder.trained_tokens
            f, m = rope.axis_frequencies(*known, float(embedder.sigma), embedder.config, largest)
        angle = places[:, axis, None].double() * f.to(places.device)
        parts.append(torch.polar(torch.full_like(angle, float(m)), angle))
    return torch.cat(parts, -1)


def run(args: argparse.Namespace) -> dict:
    """Print a table of costs per family and size; returns it with the ratios that matter."""
    names = ("copy", "ours", "stock", "literal")
    heads = [f"{name + ' ms':>10}" for name in names] + [f"{name:>12}" for name in RATIOS]
    print("family      px   ", *heads, " launches")
    rows = {family: {} for family in args.families}
    for family in args.families:
        for size in args.sizes:
            row = measure_costs(family, size, args.repeats, torch.device(args.device), args.method)
            cells = [f"{row[name]:10.2f}" for name in names]
            cells += [f"{row[name]:12.2f}" for name in RATIOS]
            print(f"{family:11} {size:<5}", *cells, f"{row['launches']:9}")
            rows[family][str(size)] = {name: round(value, 3) for name, value in row.items()}
            gc.collect()
    return {"families": rows}
