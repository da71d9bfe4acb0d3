"""Measure a denoiser step and a whole image with DyPE and without, in turns in one run.

The model is the demo model, or FLUX.1 or Z-Image at real size with random weights. Random weights
take as long as trained weights.
"""

import argparse
import copy
import gc
import math
import statistics
import time
from functools import partial
from types import SimpleNamespace

import torch

from dype.benchmark.embedder import time_call
from dype.config import DyPEConfig
from dype.embedders import make_grid_ids
from dype.families import PIXELS_PER_TOKEN
from dype.patch import apply_dype, remove_dype
from dype.pipelines import acceleration, catalog, memory
from dype.pipelines.devices import DTYPES, fast_dtype
from dype.pipelines.loading import load_pipeline
from dype.sampling import sample

SIGMA = 0.6  # of the step
MODELS = {  # value of --model -> model of the catalog with its defaults
    "demo": catalog.MODELS["demo"],
    "flux": catalog.MODELS["flux-krea"],
    "z-image": catalog.MODELS["z-image-turbo"],
}


def make_pipeline(model: str, device: str):
    """Return the demo's pipeline, or one of real size with random weights and no text encoders.

    FLUX.1 and Z-Image have the same autoencoder.

    Args:
        model: a key of MODELS.
        device: device of the weights.
    """
    if model == "demo":
        pipe = load_pipeline("demo", device=device)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    import diffusers

    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[fast_dtype(device)])
    try:
        with torch.device(device):
            config = MODELS[model].scheduler_config
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
            vae = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                sample_size=1024, use_quant_conv=False, use_post_quant_conv=False,
                shift_factor=0.1159, scaling_factor=0.3611,
            )  # fmt: skip
            if model == "flux":
                transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
                pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, transformer)
            else:
                transformer = diffusers.ZImageTransformer2DModel()
                pipe = diffusers.ZImagePipeline(scheduler, vae, None, None, transformer)
    finally:
        torch.set_default_dtype(default_dtype)
    for parameter in transformer.parameters():
        parameter.data.nan_to_num_(0)  # because diffusers leaves some uninitialized
    memory.place_components(pipe, device, "none", {}, 0)
    return pipe


def random_prompt(transformer, text_tokens: int) -> dict:
    """Return random prompt embeddings of `text_tokens` tokens for `sample.generate`."""
    config = transformer.config
    options = {"device": transformer.device, "dtype": transformer.dtype}
    if "cap_feat_dim" in config:  # Z-Image
        return {"prompt_embeds": [torch.randn(text_tokens, config.cap_feat_dim, **options)]}
    return {
        "prompt_embeds": torch.randn(1, text_tokens, config.joint_attention_dim, **options),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, **options),
    }


def denoiser_call(transformer, text_tokens: int, height: int, width: int) -> dict:
    """Return random arguments of the transformer for one step.

    Args:
        transformer: that of FLUX.1, Z-Image or the demo model.
        text_tokens: number of text tokens.
        height: of the image, px.
        width: of the image, px.
    """
    config, device = transformer.config, transformer.device
    options = {"device": device, "dtype": transformer.dtype}
    prompt = random_prompt(transformer, text_tokens)
    if "cap_feat_dim" in config:  # Z-Image
        latents = torch.randn(config.in_channels, 1, height // 8, width // 8, **options)
        t = torch.full((1,), 1 - SIGMA, **options)
        return {"x": [latents], "t": t, "cap_feats": prompt["prompt_embeds"]}
    grid = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    return {
        "hidden_states": torch.randn(1, math.prod(grid), config.in_channels, **options),
        "encoder_hidden_states": prompt["prompt_embeds"],
        "pooled_projections": prompt["pooled_prompt_embeds"],
        "timestep": torch.full((1,), SIGMA, **options),
        "img_ids": make_grid_ids(0, *grid, device),
        "txt_ids": torch.zeros(text_tokens, 3, device=device),
        "guidance": torch.ones(1, **options) if config.guidance_embeds else None,
    }


def count_flop(transformer, text_tokens: int, height: int, width: int) -> float:
    """Return the operations of a denoiser call, in linear layers and in attention.

    They are 24 blocks D^2 S + 4 blocks D S^2, with S tokens of image (px / 16) and text. The linear
    layers of a block have 12 D^2 parameters per token. All blocks attend over text and image.

    Args:
        transformer: that of FLUX.1, Z-Image or the demo model.
        text_tokens: number of text tokens.
        height: of the image, px.
        width: of the image, px.
    """
    config = transformer.config
    if "dim" in config:  # Z-Image, which has separate refiners of image and text
        dim, blocks = config.dim, config.n_layers + config.n_refiner_layers
    else:
        dim = config.num_attention_heads * config.attention_head_dim
        blocks = config.num_layers + config.num_single_layers
    tokens = height * width / PIXELS_PER_TOKEN**2 + text_tokens
    return 24 * blocks * dim**2 * tokens + 4 * blocks * dim * tokens**2


def copy_sharing_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module but share its weights, so that only the copy gets DyPE."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of one large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / statistics.median(time_call(lambda: a @ b, device) for _ in range(5))


@torch.no_grad()
def time_steps(args: argparse.Namespace) -> dict:
    """Print the cost of a denoiser call per size, and return it."""
    device, model = torch.device(args.device), MODELS[args.model]
    text_tokens = model.max_sequence_length
    rate = measure_matmul_rate(device, DTYPES[args.dtype])
    stock = make_pipeline(args.model, args.device).transformer
    ours = copy_sharing_weights(stock)
    config = DyPEConfig(args.method, True, base_resolution=model.base_resolution, shift="model")
    apply_dype(ours, config)
    for transformer in (stock, ours):
        pipe = SimpleNamespace(transformer=transformer, dype_offload="none")
        acceleration.compile_transformer(pipe, args.compile)
    print("px     ratio  [quartiles]       stock ms    ours ms   extra MiB   share of matrix rate")
    rows = {}
    for size in args.sizes:
        call = denoiser_call(stock, text_tokens, size, size)
        with acceleration.use_attention(args.attention):
            row = time_pairs(stock, ours, call, args.repeats, device)
        flop = count_flop(stock, text_tokens, size, size)
        row |= {"flop": flop, "share": round(flop / row["stock"] * 1000 / rate, 3)}
        rows[str(size)] = row
        print(f"{size:<5} {row['ratio']:6.4f}  [{row['low']:.4f}, {row['high']:.4f}] "
              f"{row['stock']:10.1f} {row['ours']:10.1f} {row['extra_memory'] / 2**20:11.1f} "
              f"{row['share']:13.0%}")  # fmt: skip
    return make_report(args, rate, rows)


def make_report(args: argparse.Namespace, rate: float, rows: dict) -> dict:
    """Return the results as a dict, with the settings of the run.

    Args:
        args: the command line.
        rate: FLOP/s of a large matrix product.
        rows: costs by size.
    """
    names = ("model", "method", "dtype", "attention", "compile", "repeats")
    return {name: getattr(args, name) for name in names} | {"matrix_rate": rate, "sizes": rows}


def time_pairs(stock, ours, call: dict, repeats: int, device: torch.device) -> dict:
    """Time calls of two transformers in pairs; the order alternates.

    Args:
        stock: the transformer without DyPE.
        ours: the transformer with DyPE.
        call: arguments of both.
        repeats: number of pairs.
        device: device of both.

    Returns:
        The median ratio with its quartiles, median milliseconds, and memory at the peak in bytes.
    """
    for transformer in (stock, ours, stock, ours):
        transformer(**call)
    times = {stock: [], ours: []}
    for i in range(repeats):
        for transformer in (stock, ours) if i % 2 else (ours, stock):
            times[transformer].append(time_call(partial(transformer, **call), device))
    ratios = [with_dype / without for without, with_dype in zip(*times.values(), strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if repeats > 1 else 3 * ratios
    peaks = []
    for transformer in (stock, ours):
        gc.collect()
        memory.reset_peak()
        transformer(**call)
        peaks.append(memory.peak_bytes(device) or 0)
    return {
        "ratio": round(median, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "stock": round(1000 * statistics.median(times[stock]), 3),
        "ours": round(1000 * statistics.median(times[ours]), 3),
        "peak_memory": peaks[1],
        "extra_memory": peaks[1] - peaks[0],
    }


def time_images(args: argparse.Namespace) -> dict:
    """Print the cost of whole images without text encoders, and return it.

    The share divides the rate of the transformer's operations by the matrix rate. The time
    includes the decoder.
    """
    device, model = torch.device(args.device), MODELS[args.model]
    rate = measure_matmul_rate(device, DTYPES[args.dtype])
    pipe = make_pipeline(args.model, args.device)
    acceleration.compile_transformer(pipe, args.compile)
    steps = args.steps or model.steps
    calls = steps * (2 if model.true_cfg > 1 else 1)
    print("px     ratio  seconds without, with   peak GiB   tiled   share of matrix rate")
    rows = {}
    for size in args.sizes:
        tiled = memory.set_tiling(pipe, "auto", None, size * size)
        with acceleration.use_attention(args.attention):
            without, with_dype = image_seconds(pipe, args, size, steps)
        flop = calls * count_flop(pipe.transformer, model.max_sequence_length, size, size)
        row = {"ratio": without and round(with_dype / without, 3), "without": without}
        row |= {"with": with_dype, "peak_memory": memory.peak_bytes(device), "tiled": tiled}
        row |= {"flop": flop, "share": round(flop / with_dype / rate, 3), "steps": steps}
        rows[str(size)] = row
        cells = [f"{value:10.3f}" if value else f"{'-':>10}" for value in list(row.values())[:3]]
        gib = (row["peak_memory"] or 0) / memory.GIB
        print(f"{size:<5}", *cells, f"{gib:10.2f} {tiled!s:>8} {row['share']:12.0%}")
    return make_report(args, rate, rows)


def image_seconds(pipe, args, size: int, steps: int) -> list[float | None]:
    """Measure the median seconds of an image without and with DyPE, after one warm-up step each.

    Args:
        pipe: a pipeline of `make_pipeline`.
        args: the command line.
        size: side of the image, px.
        steps: steps per image.

    Returns:
        Seconds without DyPE (None for --alone), and with DyPE.
    """
    model, variants = MODELS[args.model], [True] if args.alone else [False, True]
    prompt = random_prompt(pipe.transformer, model.max_sequence_length)
    call = {"guidance": model.guidance, "true_cfg": model.true_cfg, "height": size, "width": size}
    call["negative_prompt"] = None if model.negative_prompt is None else prompt
    seconds = {with_dype: [] for with_dype in variants}
    for i, num_steps in enumerate([1] + [steps] * args.repeats):
        for with_dype in variants[:: 1 - 2 * (i % 2)]:  # reversed at odd i
            remove_dype(pipe)
            if with_dype:
                config = DyPEConfig(args.method, True, base_resolution=model.base_resolution)
                apply_dype(pipe, config)
            memory.reset_peak()
            start = time.perf_counter()
            sample.generate(pipe, prompt, steps=num_steps, **call)
            seconds[with_dype].append(time.perf_counter() - start)
    medians = {
        with_dype: round(statistics.median(times[1:]), 3) for with_dype, times in seconds.items()
    }
    return [medians.get(False), medians[True]]
