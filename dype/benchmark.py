"""What DyPE costs: `python -m dype.benchmark`.

Each family's embedder is timed against the stock one and against a plain copy of the bytes that
both write, all in one run, in turns, and its output is checked. CPU time of one thread, with a warm
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
import torch.nn.functional as F

from dype.complex_embedders import QwenDyPE, ZImageDyPE
from dype.config import DyPEConfig
from dype.embedders import FluxDyPE, grid_ids
from dype.models import TOKEN

TEXT_TOKENS = 512
TRAINED = 64  # tokens
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


def real(stock, texts: int, side: int, config: DyPEConfig) -> tuple:
    """A format of cos and sin, called with `texts` tokens of text in front of the picture's."""
    ids = torch.cat([torch.zeros(texts, 3), grid_ids(0, side, side)])
    ours = FluxDyPE(stock, config, TRAINED)
    ours.set_grid(side, side)
    ours.set_layout(texts, 0)
    return stock, ours, (F.pad(ids, (0, len(stock.axes_dim) - 3)),)


def flux(side: int, config: DyPEConfig) -> tuple:
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    return real(FluxPosEmbed(10000, [16, 56, 56]), TEXT_TOKENS, side, config)


def flux2(side: int, config: DyPEConfig) -> tuple:
    """The call for the picture; the other, for the text, has 512 tokens."""
    from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed

    return real(Flux2PosEmbed(2000, [32, 32, 32, 32]), 0, side, config)


def krea2(side: int, config: DyPEConfig) -> tuple:
    from diffusers.models.transformers.transformer_krea2 import Krea2RotaryPosEmbed

    return real(Krea2RotaryPosEmbed(1000, [32, 48, 48]), TEXT_TOKENS, side, config)


def z_image(side: int, config: DyPEConfig) -> tuple:
    from diffusers.models.transformers.transformer_z_image import RopeEmbedder

    stock = RopeEmbedder(256.0, [32, 48, 48], [1536, 512, 512])
    ours = ZImageDyPE(stock, config, TRAINED)
    ours.set_grid(side, side)
    ours.places = TEXT_TOKENS + 2  # as a denoiser call with 512 tokens of text sets it
    ids = grid_ids(TEXT_TOKENS + 1, side, side).int()
    return stock, ours, (ids,)


def qwen_image(side: int, config: DyPEConfig) -> tuple:
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    stock = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)
    ours = QwenDyPE(stock, config, 83)
    ours.set_grid(side, side)
    return stock, ours, ([[(1, side, side)]], torch.device("cpu"), TEXT_TOKENS)


FAMILIES = {
    "flux": flux,  # FLUX.1, Chroma, Bria
    "flux2": flux2,
    "krea2": krea2,
    "z-image": z_image,
    "qwen-image": qwen_image,
}


def embedder_costs(family: str, size: int, repeats: int, method: str = "yarn") -> dict:
    """Median CPU milliseconds of one call at `size` x `size` px, by what was called."""
    stock, ours, args = FAMILIES[family](size // TOKEN, DyPEConfig(method))
    ours.set_timestep(0.6)
    tables = ours(*args)
    tables = tables if isinstance(tables, tuple) else (tables,)
    check(ours, args, tables)
    calls = {
        "copy": lambda: [table.clone() for table in tables],
        "ours": lambda: ours(*args),
        "stock": lambda: stock(*args),
    }
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(cpu_time(call))
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def check(embedder, args: tuple, tables: tuple) -> None:
    """The timed path must give what the formula gives, token by token, at 1000 tokens."""
    if isinstance(embedder, QwenDyPE):
        places = grid_ids(0, *embedder.grid)
        places[:, 1:] -= torch.tensor(embedder.grid) - torch.tensor(embedder.grid) // 2
    else:
        places = args[0]
    rows = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:1000]
    inv_freq, m = embedder.frequencies(embedder.grid, places.device)
    first, *_ = dims = embedder.axes_dim
    for axis, start in ((1, first), (2, first + dims[1])):
        angle = places[rows, axis, None].double() * inv_freq[axis - 1]
        expected = torch.polar(m[axis - 1].expand_as(angle), angle)
        if len(tables) == 2 and not isinstance(embedder, QwenDyPE):
            found = torch.complex(
                *(table[rows, start : start + dims[axis] : 2] for table in tables)
            )
        else:
            found = tables[0][rows, start // 2 : (start + dims[axis]) // 2]
        exact = 1e-6 if embedder.active(embedder.grid) else 1e-4  # stock's angles may be float32
        assert (found - expected).abs().max() < exact


def embedder(args) -> dict:
    """Print a table of costs per family and size; returns it with the ratios that matter."""
    torch.set_num_threads(1)
    warm_allocator()
    print("family       px    copy ms   ours ms  stock ms   ours/copy  stock/copy  ours/stock")
    rows = {}
    for family in args.families:
        for size in args.sizes:
            ms = embedder_costs(family, size, args.repeats)
            ratios = {
                "ours/copy": ms["ours"] / ms["copy"],
                "stock/copy": ms["stock"] / ms["copy"],
                "ours/stock": ms["ours"] / ms["stock"],
            }
            kept = {name: round(value, 3) for name, value in (ms | ratios).items()}
            rows.setdefault(family, {})[str(size)] = kept
            print(
                f"{family:11} {size:<6} {ms['copy']:7.2f} {ms['ours']:9.2f} {ms['stock']:9.2f} "
                + " ".join(f"{value:11.2f}" for value in ratios.values())
            )
            gc.collect()
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m dype.benchmark", description=__doc__)
    made.add_argument("what", nargs="?", choices=("embedder",), default="embedder")
    made.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="px (default: all)")
    made.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    made.add_argument("--repeats", type=int, default=9, help="(default: 9)")
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.repeats < 1 or any(size < TOKEN or size % TOKEN for size in args.sizes):
        parser().error(f"--repeats is at least 1, --sizes are multiples of {TOKEN}")
    result = {"benchmark": args.what, "device": platform.processor() or platform.machine()}
    result |= {"torch": torch.__version__, "threads": 1, "families": embedder(args)}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
