"""Train the demo model: `python -m dype.demo.train`, under two hours on two CPU cores.

Three stages: the autoencoder on rendered scenes; the transformer and the text encoders on its
latents; then these again with the text weighted as if among more image tokens, as it is in
larger images (docs/log). Each stage writes checkpoints under `--work` and goes on from the
last one when started again; another setting needs another `--work`. At the end the pipeline is
saved under `--out` in the diffusers folder format.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from torch.nn import ModuleDict
from tqdm import tqdm

from dype.demo import model as demo_model
from dype.demo.scenes import HELD_OUT, TRIPLES, Scene, render, sample_scene
from dype.errors import Parser, UserError, run_command
from dype.pipelines.devices import DTYPES, autocast, check_device, fast_dtype

BASE = 256  # px, the only size that the transformer ever sees
SEEN = tuple(t for t in TRIPLES if t not in HELD_OUT)
POOL = {256: 1500, 512: 160, 1024: 40}  # images per size for the autoencoder, equal in pixels
LATENTS = 6_000  # cached scenes for the transformer
SHIFT = math.exp(1.6)  # of training times: above the sampler's 1.15, as shapes settle early
CAPTION_DROPOUT = 0.1  # for classifier-free guidance
DILUTION = 16  # of the text in the last stage, at most: as at four times the base's sides
COLOR_DROPOUT = 0.25  # of either color word: a shape must not hang on the company it keeps
EMA = 0.999
EVERY = 250  # steps between checkpoints
WEIGHTS = Path(__file__).parent / "weights"


def to_tensor(pictures: np.ndarray, device) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1], channels last in memory as they were."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine to zero, as a factor of the peak."""
    done = min(step / steps, 1)
    return min((step + 1) / warmup, 1) * (0.5 + 0.5 * math.cos(math.pi * done))


def save(path: Path, **state) -> None:
    """Write a checkpoint so that a killed run leaves the old one or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def run(name: str, modules: ModuleDict, loss_at, rate: float, steps: int, decay: int, args) -> None:
    """The loop of all stages: `loss_at(step)` -> scalar; every draw depends on the step alone.

    The learning rate falls from `rate` to zero over `decay` steps; `steps` of them are made. The
    modules end with the moving average of their weights.
    """
    path = args.work / f"{name}.pt"
    modules.train()
    params = list(modules.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    first, smooth = 0, None
    if path.exists():
        state = torch.load(path, map_location=args.device)
        first, smooth, average = state["step"], state["loss"], state["average"]
        optimizer.load_state_dict(state["optimizer"])
        for key, module in modules.items():
            module.load_state_dict(state[key])
    progress = tqdm(range(first, steps), name, initial=first, total=steps)
    for step in progress:
        torch.manual_seed(1_000_000 * args.seed + step)
        optimizer.param_groups[0]["lr"] = rate * learning_rate(step, decay)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pace = 1 - min(EMA, step / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in params], pace)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        progress.set_postfix(loss=f"{smooth:.4f}")
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            saved = {"optimizer": optimizer.state_dict(), "dtype": args.dtype}
            saved |= {key: module.state_dict() for key, module in modules.items()}
            save(path, step=step + 1, loss=smooth, average=average, **saved)
    for param, mean in zip(params, average, strict=True):
        param.data.copy_(mean)
    modules.eval()


def well_conditioned(vae: torch.nn.Module) -> torch.nn.Module:
    """Orthogonal convolutions, and residual branches that start at zero.

    The default initialization shrinks the signal at every level: its loss after 250 steps is twice
    this one's (docs/log/2026-11-20-autoencoder-initialization.md).
    """
    for name, weight in vae.named_parameters():
        if weight.ndim == 4:
            torch.nn.init.orthogonal_(weight)
            if "conv2" in name:
                torch.nn.init.zeros_(weight)
    log_variances = vae.encoder.conv_out.bias[demo_model.LATENT_CHANNELS :]
    torch.nn.init.constant_(log_variances, -6.0)
    return vae


def train_vae(args) -> torch.nn.Module:
    """L1 reconstruction with a light KL term, of small crops and every fourth step of large ones.

    Small crops train faster per pixel; large ones keep GroupNorm's statistics those of images.
    """
    torch.manual_seed(args.seed)
    vae = well_conditioned(demo_model.vae())
    vae = vae.to(args.device, memory_format=torch.channels_last)

    @cache  # when a step first asks for the size: not at all, if no step is left
    def pool(size):
        rng = np.random.default_rng([args.seed, size])
        scenes = [sample_scene(rng, SEEN) for _ in range(POOL[size])]
        return [render(scene, size) for scene in tqdm(scenes, f"rendering {size} px")]

    def loss_at(step):
        rng = np.random.default_rng([args.seed, 1, step])
        crop, count = (BASE, 2) if step % 4 == 3 else (64, 16)
        crops = []
        for size in rng.choice(list(POOL), count, p=(0.5, 0.25, 0.25)):
            picture = pool(size)[rng.integers(POOL[size])]
            y, x = rng.integers(size - crop + 1, size=2)
            crops.append(picture[y : y + crop, x : x + crop])
        x = to_tensor(np.stack(crops), args.device)
        with autocast(args.device, args.dtype):
            latents = vae.encode(x).latent_dist
            out = vae.decode(latents.sample()).sample
        return F.l1_loss(out.float(), x) + 1e-4 * latents.kl().mean() / latents.mean[0].numel()

    run("vae", ModuleDict({"vae": vae}), loss_at, 2e-3, args.vae_steps, args.vae_steps, args)
    return vae


def cached_latents(vae, args) -> tuple[torch.Tensor, list[Scene]]:
    """Latents [N, C, 32, 32] of N rendered scenes, and the scenes."""
    rng = np.random.default_rng([args.seed, BASE])
    scenes = [sample_scene(rng, SEEN) for _ in range(LATENTS)]
    path = args.work / "latents.pt"
    if not path.exists():
        latents = []
        with Pool() as pool:
            for start in tqdm(range(0, LATENTS, 32), "latents"):
                pictures = pool.map(partial(render, height=BASE), scenes[start : start + 32])
                x = to_tensor(np.stack(pictures), args.device)
                with torch.no_grad(), autocast(args.device, args.dtype):
                    latents.append(vae.encode(x).latent_dist.mode().half().cpu())
        save(path, latents=torch.cat(latents))
    return torch.load(path)["latents"].float(), scenes


def wordings(scene: Scene) -> list[str]:
    """The caption without either color, without the object's, without the ground's, in full."""
    return [
        " ".join(replace(scene, color=color, ground=ground).caption.split())
        for color in ("", scene.color)
        for ground in ("", scene.ground)
    ]


def normalize(vae, latents: torch.Tensor) -> torch.Tensor:
    """Give every latent channel unit deviation, within the autoencoder's own convolutions.

    Exact, since the padding of the decoder's first convolution is zero. The means stay, but for
    the common one in `shift_factor`: moving a mean would change what the padding stands for.
    """
    deviation, channels = latents.std((0, 2, 3)), demo_model.LATENT_CHANNELS
    latents = latents / deviation[:, None, None]
    deviation = deviation.to(vae.device)
    encoder, decoder = vae.encoder.conv_out, vae.decoder.conv_in
    encoder.weight.data[:channels] /= deviation[:, None, None, None]
    encoder.bias.data[:channels] /= deviation
    encoder.bias.data[channels:] -= 2 * deviation.log()  # these are log variances
    decoder.weight.data *= deviation[:, None, None]
    shift = latents.mean().item()
    vae.register_to_config(shift_factor=shift)
    return latents - shift


def zero_modulation(transformer: torch.nn.Module) -> torch.nn.Module:
    """adaLN-zero (Peebles and Xie 2023): every block starts as the identity, the output at 0."""
    for name, weight in transformer.named_parameters():
        if (".norm" in name and ".linear." in name) or name.startswith(("norm_out", "proj_out")):
            torch.nn.init.zeros_(weight)
    return transformer


def train_transformer(vae, args) -> FluxPipeline:
    """The transformer and the text encoders, in two stages, the second with diluted text."""
    torch.manual_seed(args.seed)
    latents, scenes = cached_latents(vae, args)
    latents = normalize(vae, latents).to(args.device)
    pipe = FluxPipeline(
        **demo_model.text_encoders(),
        scheduler=demo_model.scheduler(),
        vae=vae,
        transformer=zero_modulation(demo_model.transformer()),
    ).to(args.device)
    names = ("transformer", "text_encoder", "text_encoder_2")
    modules = ModuleDict({name: getattr(pipe, name) for name in names})
    loss_at = flow_matching(pipe, latents, scenes, args)
    run("transformer", modules, loss_at, 1.2e-3, args.steps, 8000, args)
    diluted, steps = partial(loss_at, dilution=DILUTION), args.diluted_steps
    run("diluted", modules, diluted, 6e-4, steps, steps, args)
    return pipe


def flow_matching(pipe, latents: torch.Tensor, scenes: list[Scene], args) -> Callable:
    """The loss at a step, on cached latents: the target is noise - latent (Eq. 1).

    The text's attention logits are lowered by ln r, which is what r times as many image tokens do
    to it, with r log-uniform in 1 to `dilution`, drawn per sample. All stages make the same draws.
    """
    captions = ["", *(wording for scene in scenes for wording in wordings(scene))]
    clip_ids, t5_ids = (
        tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(args.device)
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    )
    side = latents.shape[-1] // 2
    img_ids = pipe._prepare_latent_image_ids(1, side, side, args.device, torch.float32)
    txt_ids = torch.zeros(demo_model.MAX_TOKENS, 3, device=args.device)

    def loss_at(step, dilution=1):
        rng = np.random.default_rng([args.seed, 2, step])
        chosen = rng.choice(len(latents), args.batch, replace=False)
        kept = rng.random(args.batch) >= CAPTION_DROPOUT
        color, ground = rng.random((2, args.batch)) >= COLOR_DROPOUT
        rows = np.where(kept, 1 + 4 * chosen + 2 * color + ground, 0)
        rows = torch.from_numpy(rows).to(args.device)
        u = (rng.permutation(args.batch) + rng.random(args.batch)) / args.batch  # stratified
        sigma = torch.from_numpy(SHIFT * u / (1 + (SHIFT - 1) * u)).float().to(args.device)
        x = latents[torch.from_numpy(chosen).to(args.device)]
        x = pipe._pack_latents(x, *x.shape)
        noise = torch.randn_like(x)
        noisy = torch.lerp(x, noise, sigma[:, None, None])
        bias = torch.zeros(args.batch, 1, 1, len(txt_ids) + x.shape[1])
        bias[..., : len(txt_ids)] -= math.log(dilution) * torch.rand(args.batch, 1, 1, 1)
        with autocast(args.device, args.dtype):
            out = pipe.transformer(
                hidden_states=noisy,
                timestep=sigma,
                pooled_projections=pipe.text_encoder(clip_ids[rows]).pooler_output,
                encoder_hidden_states=pipe.text_encoder_2(t5_ids[rows])[0],
                img_ids=img_ids,
                txt_ids=txt_ids,
                joint_attention_kwargs={"attention_mask": bias.to(args.device, DTYPES[args.dtype])},
            ).sample
        return F.mse_loss(out.float(), noise - x)

    return loss_at


def parser() -> Parser:
    made = Parser(
        prog="python -m dype.demo.train",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--out", type=Path, help=f"folder of the pipeline (with seed 0: {WEIGHTS})")
    made.add_argument("--work", type=Path, help="(with seed N: outputs/demo_training_N)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), help="of matrix products "
                      "(None: bfloat16 where the device has it)")  # fmt: skip
    made.add_argument("--seed", type=int, default=0, help="of weights, scenes and noise")
    made.add_argument("--vae", type=Path, help="folder of a pipeline whose autoencoder to take")
    made.add_argument("--vae_steps", type=int, default=3200)
    made.add_argument("--steps", type=int, default=3750, help="of a cosine over 8000")
    made.add_argument("--diluted_steps", type=int, default=2000, help="with diluted text")
    made.add_argument("--batch", type=int, default=16, help="of the transformer")
    return made


def settled_dtype(args: argparse.Namespace) -> str:
    """The number format of a training that goes on, else --dtype or what the device is fast in."""
    for stage in ("diluted", "transformer", "vae"):
        path = args.work / f"{stage}.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu")
            before = state.get("dtype", "bfloat16")  # as older checkpoints had
            if args.dtype not in (None, before):
                raise UserError(
                    f"--dtype is {args.dtype}, but {path} was trained in {before}, expected the "
                    "same, or another --work"
                )
            return before
    return args.dtype or fast_dtype(args.device)


def train(args: argparse.Namespace) -> None:
    """All stages, then the pipeline's folder. Raises UserError, UnavailableError, OSError."""
    args.work = args.work or Path(f"outputs/demo_training_{args.seed}")
    args.out = args.out or (args.work / "pipeline" if args.seed else WEIGHTS)
    check_device(args.device, "none")
    args.dtype = settled_dtype(args)
    if args.vae and not (args.vae / "vae").is_dir():
        raise UserError(f"--vae is {args.vae}, expected the folder of a pipeline")
    print(f"training on {args.device} in {args.dtype}")
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, subfolder="vae", local_files_only=True)
        vae = vae.to(args.device, memory_format=torch.channels_last)
    else:
        vae = train_vae(args)
    pipe = train_transformer(vae.requires_grad_(False), args)
    pipe.transformer.half()  # the text encoders are small: as they are
    pipe.vae.half().to(memory_format=torch.contiguous_format)
    pipe.save_pretrained(args.out)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 1 for the rest."""
    rest = "the same command goes on from the last checkpoint"
    return run_command(
        "dype.demo.train", lambda: train(parser().parse_args(argv)), interrupted=rest
    )


if __name__ == "__main__":
    sys.exit(main())
