"""What a denoiser step and a whole image cost with DyPE and without, in turns in one run.

The demo model, or FLUX.1 and Z-Image at their real size with random weights, which take as long as
trained ones.
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
MODELS = {  # --model -> whose defaults it has
    "demo": catalog.MODELS["demo"],
    "flux": catalog.MODELS["flux-krea"],
    "z-image": catalog.MODELS["z-image-turbo"],
}


def make_pipeline(model: str, device: str):
    """The demo's pipeline; else one without text encoders, made on its device with random weights.

    model: a key of MODELS. FLUX.1's autoencoder is Z-Image's too.
    """
    if model == "demo":
        pipe = load_pipeline("demo", device=device)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    import diffusers

    usual = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[fast_dtype(device)])
    try:
        with torch.device(device):
            schedule = MODELS[model].scheduler_config
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(schedule)
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
        torch.set_default_dtype(usual)
    for parameter in transformer.parameters():
        parameter.data.nan_to_num_(0)  # some are left as the memory was
    memory.place_components(pipe, device, "none", {}, 0)
    return pipe


def random_prompt(transformer, text: int) -> dict:
    """Random embeddings of `text` tokens, as `sample.generate` takes them for a prompt."""
    config, like = transformer.config, {"device": transformer.device, "dtype": transformer.dtype}
    if "cap_feat_dim" in config:  # Z-Image
        return {"prompt_embeds": [torch.randn(text, config.cap_feat_dim, **like)]}
    return {
        "prompt_embeds": torch.randn(1, text, config.joint_attention_dim, **like),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, **like),
    }


def denoiser_call(transformer, text: int, height: int, width: int) -> dict:
    """Arguments of the transformer for one step, at `height` x `width` px and `text` tokens."""
    config, device = transformer.config, transformer.device
    like = {"device": device, "dtype": transformer.dtype}
    prompt = random_prompt(transformer, text)
    if "cap_feat_dim" in config:  # Z-Image
        latents = torch.randn(config.in_channels, 1, height // 8, width // 8, **like)
        t = torch.full((1,), 1 - SIGMA, **like)
        return {"x": [latents], "t": t, "cap_feats": prompt["prompt_embeds"]}
    picture = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    return {
        "hidden_states": torch.randn(1, math.prod(picture), config.in_channels, **like),
        "encoder_hidden_states": prompt["prompt_embeds"],
        "pooled_projections": prompt["pooled_prompt_embeds"],
        "timestep": torch.full((1,), SIGMA, **like),
        "img_ids": make_grid_ids(0, *picture, device),
        "txt_ids": torch.zeros(text, 3, device=device),
        "guidance": torch.ones(1, **like) if config.guidance_embeds else None,
    }


def count_flop(transformer, text: int, height: int, width: int) -> float:
    """Operations of a denoiser call at `height` x `width` px, in linear layers and in attention.

    24 blocks D^2 S and 4 blocks D S^2, S the tokens of image (px / 16) and text: a token meets
    12 D^2 parameters of a block's linear layers, and all blocks attend over text and image
    together.
    """
    config = transformer.config
    if "dim" in config:  # Z-Image, whose image and text have refiners of their own
        dim, blocks = config.dim, config.n_layers + config.n_refiner_layers
    else:
        dim = config.num_attention_heads * config.attention_head_dim
        blocks = config.num_layers + config.num_single_layers
    tokens = height * width / PIXELS_PER_TOKEN**2 + text
    return 24 * blocks * dim**2 * tokens + 4 * blocks * dim * tokens**2


def copy_sharing_weights(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares weights, so that one of them can have DyPE."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / statistics.median(time_call(lambda: a @ b, device) for _ in range(5))


@torch.no_grad()
def time_steps(args: argparse.Namespace) -> dict:
    """Print the cost of a denoiser call per size; returns it, ratios first."""
    device, model = torch.device(args.device), MODELS[args.model]
    text = model.max_sequence_length
    rate = matmul_flops(device, DTYPES[args.dtype])
    stock = make_pipeline(args.model, args.device).transformer
    ours = copy_sharing_weights(stock)
    apply_dype(ours, DyPEConfig(args.method, base_resolution=model.base_resolution))
    for transformer in (stock, ours):
        part = SimpleNamespace(transformer=transformer, dype_offload="none")
        acceleration.compile_transformer(part, args.compile)
    print("px     ratio  [quartiles]       stock ms    ours ms   extra MiB   share of matrix rate")
    rows = {}
    for size in args.sizes:
        call = denoiser_call(stock, text, size, size)
        with acceleration.use_attention(args.attention):
            row = time_pairs(stock, ours, call, args.repeats, device)
        flop = count_flop(stock, text, size, size)
        row |= {"flop": flop, "share": round(flop / row["stock"] * 1000 / rate, 3)}
        rows[str(size)] = row
        print(f"{size:<5} {row['ratio']:6.4f}  [{row['low']:.4f}, {row['high']:.4f}] "
              f"{row['stock']:10.1f} {row['ours']:10.1f} {row['extra_memory'] / 2**20:11.1f} "
              f"{row['share']:13.0%}")  # fmt: skip
    return protocol(args, rate, rows)


def protocol(args: argparse.Namespace, rate: float, rows: dict) -> dict:
    """What was run and what it cost, for the record."""
    names = ("model", "method", "dtype", "attention", "compile", "repeats")
    return {name: getattr(args, name) for name in names} | {"matrix_rate": rate, "sizes": rows}


def time_pairs(stock, ours, call: dict, repeats: int, device: torch.device) -> dict:
    """Median ratio of pairs and its quartiles, median milliseconds, bytes at the peak."""
    for transformer in (stock, ours, stock, ours):
        transformer(**call)
    times = {stock: [], ours: []}
    for i in range(repeats):
        for transformer in (stock, ours) if i % 2 else (ours, stock):
            times[transformer].append(time_call(partial(transformer, **call), device))
    ratios = [with_dype / without for without, with_dype in zip(*times.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if repeats > 1 else 3 * ratios
    peaks = []
    for transformer in (stock, ours):
        gc.collect()
        memory.reset_peak()
        transformer(**call)
        peaks.append(memory.peak_bytes(device) or 0)
    return {
        "ratio": round(middle, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "stock": round(1000 * statistics.median(times[stock]), 3),
        "ours": round(1000 * statistics.median(times[ours]), 3),
        "peak_memory": peaks[1],
        "extra_memory": peaks[1] - peaks[0],
    }


def time_images(args: argparse.Namespace) -> dict:
    """Print what whole images cost, text encoders aside; returns it, ratios first.

    The share is of the transformer's operations in the whole time, the decoder's included.
    """
    device, model = torch.device(args.device), MODELS[args.model]
    rate = matmul_flops(device, DTYPES[args.dtype])
    pipe = make_pipeline(args.model, args.device)
    acceleration.compile_transformer(pipe, args.compile)
    count = args.steps or model.steps
    calls = count * (2 if model.true_cfg > 1 else 1)
    print("px     ratio  seconds without, with   peak GiB   tiled   share of matrix rate")
    rows = {}
    for size in args.sizes:
        tiled = memory.set_tiling(pipe, "auto", None, size * size)
        with acceleration.use_attention(args.attention):
            without, with_dype = image_seconds(pipe, args, size, count)
        flop = calls * count_flop(pipe.transformer, model.max_sequence_length, size, size)
        row = {"ratio": without and round(with_dype / without, 3), "without": without}
        row |= {"with": with_dype, "peak_memory": memory.peak_bytes(device), "tiled": tiled}
        row |= {"flop": flop, "share": round(flop / with_dype / rate, 3), "steps": count}
        rows[str(size)] = row
        shown = [f"{value:10.3f}" if value else f"{'-':>10}" for value in list(row.values())[:3]]
        gib = (row["peak_memory"] or 0) / memory.GIB
        print(f"{size:<5}", *shown, f"{gib:10.2f} {tiled!s:>8} {row['share']:12.0%}")
    return protocol(args, rate, rows)


def image_seconds(pipe, args, size: int, count: int) -> list[float | None]:
    """Median seconds of an image without DyPE (None if --alone) and with, after one step each."""
    model, kinds = MODELS[args.model], [True] if args.alone else [False, True]
    prompt = random_prompt(pipe.transformer, model.max_sequence_length)
    call = {"guidance": model.guidance, "true_cfg": model.true_cfg, "height": size, "width": size}
    call["negative_prompt"] = None if model.negative_prompt is None else prompt
    seconds = {kind: [] for kind in kinds}
    for i, steps in enumerate([1] + [count] * args.repeats):
        for kind in kinds[:: 1 - 2 * (i % 2)]:  # in turns
            remove_dype(pipe)
            if kind:
                apply_dype(pipe, DyPEConfig(args.method, base_resolution=model.base_resolution))
            memory.reset_peak()
            start = time.perf_counter()
            sample.generate(pipe, prompt, steps=steps, **call)
            seconds[kind].append(time.perf_counter() - start)
    middle = {kind: round(statistics.median(times[1:]), 3) for kind, times in seconds.items()}
    return [middle.get(False), middle[True]]
