"""What DyPE costs: `python -m dype.benchmark`.

The embedder is timed against stock `FluxPosEmbed` and against a plain copy of the bytes that both
write, all in one run, in turns, and its output is checked. CPU time of one thread, with a warm
allocator: the first touch of fresh pages would cost several copies and hide all else.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import sys
import time

import torch

from dype.config import DyPEConfig
from dype.embedders import FluxDyPE, grid_ids
from dype.models import TOKEN

TEXT_TOKENS = 512
SIZES = (1024, 2048, 4096, 8192)  # px


def warm_allocator() -> None:
    """Have glibc keep freed memory, as the caching allocators of accelerators do."""
    keep = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if keep is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        keep(m_mmap_max, 0)
        keep(m_trim_threshold, 2**31 - 1)


def cpu_time(function) -> float:
    """Seconds of CPU time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def embedder_costs(size: int, repeats: int, method: str = "yarn") -> dict:
    """Median CPU milliseconds of one call at `size` x `size` px, by what was called."""
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    stock, side = FluxPosEmbed(10000, [16, 56, 56]), size // TOKEN
    ours = FluxDyPE(stock, DyPEConfig(method), 1024 / TOKEN)
    ours.set_grid(side, side)
    ours.set_layout(TEXT_TOKENS, 0)
    ours.set_timestep(0.6)
    ids = torch.cat([torch.zeros(TEXT_TOKENS, 3), grid_ids(0, side, side)])
    table = torch.stack(ours(ids))
    check(ours, ids, table)
    calls = {
        "copy": lambda: table.clone(),
        "ours": lambda: ours(ids),
        "stock": lambda: stock(ids),
    }
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(cpu_time(call))
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def check(embedder: FluxDyPE, ids: torch.Tensor, table: torch.Tensor) -> None:
    """The timed path must give what the token-by-token path gives."""
    rows = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:1000]
    layout, embedder.layout = embedder.layout, None
    assert torch.equal(table[:, rows], torch.stack(embedder(ids[rows])))
    embedder.layout = layout


def embedder(args) -> dict:
    """Print a table of costs per size; returns it with the ratios that matter."""
    torch.set_num_threads(1)
    warm_allocator()
    print("px      copy ms   ours ms  stock ms   ours/copy  stock/copy  ours/stock")
    rows = {}
    for size in args.sizes:
        ms = embedder_costs(size, args.repeats)
        ratios = {
            "ours/copy": ms["ours"] / ms["copy"],
            "stock/copy": ms["stock"] / ms["copy"],
            "ours/stock": ms["ours"] / ms["stock"],
        }
        rows[str(size)] = {name: round(value, 3) for name, value in (ms | ratios).items()}
        print(
            f"{size:<6} {ms['copy']:9.2f} {ms['ours']:9.2f} {ms['stock']:9.2f} "
            + " ".join(f"{value:11.2f}" for value in ratios.values())
        )
        gc.collect()
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dype.benchmark", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("embedder",), default="embedder")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="px (default: all)")
    parser.add_argument("--repeats", type=int, default=9, help="(default: 9)")
    args = parser.parse_args(argv)
    result = {"benchmark": args.what, "device": platform.processor() or platform.machine()}
    result |= {"torch": torch.__version__, "threads": 1, "sizes": embedder(args)}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
