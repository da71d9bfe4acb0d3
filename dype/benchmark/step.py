"""What a denoiser step and a whole picture cost with DyPE and without, in turns in one run.

The demo model, or FLUX.1 and Z-Image at their real size with random weights, which take as long as
trained ones.
"""

import argparse
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch

from dype.benchmark.embedder import timed, warm_allocator
from dype.benchmark.flops import ARCHITECTURES, Architecture
from dype.config import DyPEConfig
from dype.embedders import grid_ids
from dype.families import TOKEN
from dype.patch import apply_dype, remove_dype
from dype.pipelines import acceleration, memory
from dype.pipelines.catalog import MODELS as NAMED
from dype.pipelines.devices import DTYPES, fast_dtype
from dype.pipelines.loading import load_pipeline
from dype.pipelines.memory import place, set_tiling
from dype.sampling import sample

SIGMA, TEXT = 0.6, 512  # of the step; tokens


def demo(device: str):
    pipe = load_pipeline("demo", device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_vae():
    """FLUX.1's autoencoder, which Z-Image has too."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        sample_size=1024, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.1159, scaling_factor=0.3611,
    )  # fmt: skip


def placed(make: Callable, model: str, device: str):
    """A pipeline without text encoders, made on its device with random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    usual = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[fast_dtype(device)])
    try:
        with torch.device(device):
            pipe = make(FlowMatchEulerDiscreteScheduler.from_config(NAMED[model].schedule))
    finally:
        torch.set_default_dtype(usual)
    for parameter in pipe.transformer.parameters():
        parameter.data.nan_to_num_(0)  # some are left as the memory was
    place(pipe, device, "none", {}, 0)
    return pipe


def flux(device: str):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    def make(scheduler):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        return FluxPipeline(scheduler, random_vae(), None, None, None, None, transformer)

    return placed(make, "flux-krea", device)


def z_image(device: str):
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    def make(scheduler):
        return ZImagePipeline(scheduler, random_vae(), None, None, ZImageTransformer2DModel())

    return placed(make, "z-image-turbo", device)


def flux_call(transformer, height: int, width: int, text: int = TEXT) -> dict:
    """A denoiser call of FLUX.1, at `height` x `width` px."""
    config, device = transformer.config, transformer.device
    picture = height // TOKEN, width // TOKEN
    like = {"device": device, "dtype": transformer.dtype}
    call = {
        "hidden_states": torch.randn(1, math.prod(picture), config.in_channels, **like),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, **like),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, **like),
        "timestep": torch.full((1,), SIGMA, **like),
        "img_ids": grid_ids(0, *picture, device),
        "txt_ids": torch.zeros(text, 3, device=device),
    }
    return call | ({"guidance": torch.ones(1, **like)} if config.guidance_embeds else {})


def demo_call(transformer, height: int, width: int) -> dict:
    return flux_call(transformer, height, width, NAMED["demo"].max_sequence_length)


def z_image_call(transformer, height: int, width: int) -> dict:
    config, like = transformer.config, {"device": transformer.device, "dtype": transformer.dtype}
    latents = torch.randn(config.in_channels, 1, height // 8, width // 8, **like)
    text = torch.randn(TEXT, config.cap_feat_dim, **like)
    return {"x": [latents], "t": torch.full((1,), 1 - SIGMA, **like), "cap_feats": [text]}


def demo_prompt(pipe) -> dict:
    known = NAMED["demo"]
    return sample.encode(pipe, known.prompt, known.max_sequence_length)


def flux_prompt(pipe) -> dict:
    like = {"device": pipe.device, "dtype": pipe.dtype}
    texts = torch.randn(1, TEXT, 4096, **like), torch.randn(1, 768, **like)
    return dict(zip(("prompt_embeds", "pooled_prompt_embeds"), texts, strict=True))


def z_image_prompt(pipe) -> dict:
    return {"prompt_embeds": [torch.randn(TEXT, 2560, device=pipe.device, dtype=pipe.dtype)]}


class Benched(NamedTuple):
    """A model that is timed."""

    model: str  # of catalog.MODELS, whose defaults it has
    pipeline: Callable
    call: Callable
    dtype: str | None = None  # None: `fast_dtype` of the device
    shape: Architecture | None = None
    prompt: Callable = demo_prompt  # pipeline -> what `sample.draw` takes for a prompt


MODELS = {
    "demo": Benched("demo", demo, demo_call, "float32"),
    "flux": Benched(
        "flux-krea", flux, flux_call, shape=ARCHITECTURES["flux-krea"], prompt=flux_prompt
    ),
    "z-image": Benched(
        "z-image-turbo", z_image, z_image_call,
        shape=ARCHITECTURES["z-image-turbo"], prompt=z_image_prompt,
    ),
}  # fmt: skip


def shape_of(benched: Benched, transformer) -> Architecture:
    """The real-size one's, or that of a small FLUX.1."""
    if benched.shape:
        return benched.shape
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    text = NAMED[benched.model].max_sequence_length
    return Architecture(width, config.num_layers + config.num_single_layers, 12, text)


def twin(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares weights, so that one of them can have DyPE."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(5))


def encoding(args: argparse.Namespace, benched: Benched) -> DyPEConfig:
    return DyPEConfig(args.method, base_resolution=NAMED[benched.model].base_resolution)


def prepare(device: torch.device) -> None:
    """On a CPU one thread, whose time does not depend on what else runs."""
    if device.type == "cpu":
        torch.set_num_threads(1)
        warm_allocator()


@torch.no_grad()
def steps(args: argparse.Namespace) -> dict:
    """Print the cost of a denoiser call per size; returns it, ratios first."""
    device, benched = torch.device(args.device), MODELS[args.model]
    prepare(device)
    rate = matrix_rate(device, DTYPES[args.dtype])
    stock = benched.pipeline(args.device).transformer
    ours = twin(stock)
    apply_dype(ours, encoding(args, benched))
    for transformer in (stock, ours):
        part = SimpleNamespace(transformer=transformer, dype_offload="none")
        acceleration.compile_steps(part, args.compile)
    print("px     ratio  [quartiles]       stock ms    ours ms   extra MiB   share of matrix rate")
    rows = {}
    for size in args.sizes:
        call = benched.call(stock, size, size)
        with acceleration.attending(args.attention):
            row = pair_costs(lambda one, call=call: one(**call), stock, ours, args.repeats, device)
        flop = shape_of(benched, stock).flop(size, size)
        row |= {"flop": flop, "share": round(flop / row["stock"] * 1000 / rate, 3)}
        rows[str(size)] = row
        print(f"{size:<5} {row['ratio']:6.4f}  [{row['low']:.4f}, {row['high']:.4f}] "
              f"{row['stock']:10.1f} {row['ours']:10.1f} {row['extra_memory'] / 2**20:11.1f} "
              f"{row['share']:13.0%}")  # fmt: skip
    return described(args, rate) | {"sizes": rows}


def described(args: argparse.Namespace, rate: float) -> dict:
    """What was run, for the record."""
    names = ("model", "method", "dtype", "attention", "compile", "repeats")
    return {name: getattr(args, name) for name in names} | {"matrix_rate": rate}


def pair_costs(call: Callable, stock, ours, repeats: int, device: torch.device) -> dict:
    """Median ratio of pairs and its quartiles, median milliseconds, bytes at the peak."""
    for one in (stock, ours, stock, ours):
        call(one)
    pairs = []
    for i in range(repeats):
        order = (stock, ours) if i % 2 else (ours, stock)
        times = {id(one): timed(lambda one=one: call(one), device) for one in order}
        pairs.append((times[id(stock)], times[id(ours)]))
    ratios = [with_dype / without for without, with_dype in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4) if repeats > 1 else 3 * ratios
    peaks = []
    for one in (stock, ours):
        gc.collect()
        memory.reset_peak()
        call(one)
        peaks.append(memory.peak(device) or 0)
    found = {"ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}
    for name, times in zip(("stock", "ours"), zip(*pairs, strict=True), strict=True):
        found[name] = round(1000 * statistics.median(times), 3)
    return found | {"peak_memory": peaks[1], "extra_memory": peaks[1] - peaks[0]}


def pictures(args: argparse.Namespace) -> dict:
    """Print what whole pictures cost, text encoders aside; returns it, ratios first.

    The share is of the transformer's operations in the whole time, the decoder's included.
    """
    device, benched = torch.device(args.device), MODELS[args.model]
    prepare(device)
    rate, pipe = matrix_rate(device, DTYPES[args.dtype]), benched.pipeline(args.device)
    known = NAMED[benched.model]
    acceleration.compile_steps(pipe, args.compile)
    count = args.steps or known.steps
    calls = count * (2 if known.true_cfg > 1 else 1)
    print("px     ratio  seconds without, with   peak GiB   tiled   share of matrix rate")
    rows = {}
    for size in args.sizes:
        tiled = set_tiling(pipe, "auto", None, size * size)
        with acceleration.attending(args.attention):
            without, with_dype = picture_seconds(pipe, args, benched, size, count)
        flop = calls * shape_of(benched, pipe.transformer).flop(size, size)
        row = {"ratio": without and round(with_dype / without, 3), "without": without}
        row |= {"with": with_dype, "peak_memory": memory.peak(device), "tiled": tiled}
        row |= {"flop": flop, "share": round(flop / with_dype / rate, 3), "steps": count}
        rows[str(size)] = row
        shown = [f"{value:10.3f}" if value else f"{'-':>10}" for value in list(row.values())[:3]]
        gib = (row["peak_memory"] or 0) / memory.GIB
        print(f"{size:<5}", *shown, f"{gib:10.2f} {tiled!s:>8} {row['share']:12.0%}")
    return described(args, rate) | {"sizes": rows}


def picture_seconds(pipe, args, benched: Benched, size: int, count: int) -> list[float | None]:
    """Median seconds of a picture without DyPE (None if --alone) and with, after one step each."""
    known, kinds = NAMED[benched.model], [True] if args.alone else [False, True]
    call = {"guidance": known.guidance, "true_cfg": known.true_cfg, "height": size, "width": size}
    names = ("negative_prompt", "max_sequence_length")
    call |= {name: getattr(known, name) for name in names}
    seconds = {kind: [] for kind in kinds}
    prompt = benched.prompt(pipe)
    if call["negative_prompt"] is not None:
        text = call["negative_prompt"]
        call["negative_prompt"] = sample.encode(pipe, text, known.max_sequence_length)
    for i, steps in enumerate([1] + [count] * args.repeats):
        for kind in kinds[:: 1 - 2 * (i % 2)]:  # in turns
            remove_dype(pipe)
            if kind:
                apply_dype(pipe, encoding(args, benched))
            memory.reset_peak()
            start = time.perf_counter()
            sample.draw(pipe, prompt, steps=steps, **call)
            seconds[kind].append(time.perf_counter() - start)
    middle = {kind: round(statistics.median(some[1:]), 3) for kind, some in seconds.items()}
    return [middle.get(False), middle[True]]
