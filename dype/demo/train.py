"""Train the demo model: `python -m dype.demo.train`. It takes under two hours on two CPU cores.

Stage 1 trains the autoencoder on rendered scenes. Stage 2 trains the transformer and the text
encoders on its latents. Stage 3 continues stage 2 with less attention to the text, as in larger
images (docs/log/2026-11-21-text-attention.md). Every stage writes checkpoints to --work and
continues from them. Other settings need another --work. The pipeline is saved to --out.
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

BASE = 256  # px, the only size of the transformer's training images
TRAIN_TRIPLES = tuple(t for t in TRIPLES if t not in HELD_OUT)
VAE_IMAGES = {256: 1500, 512: 160, 1024: 40}  # images per size for the autoencoder, equal in pixels
NUM_SCENES = 6_000  # for the transformer, cached as latents
SHIFT = math.exp(1.6)  # of training sigmas; above the sampler's 1.15, because shapes form early
CAPTION_DROPOUT = 0.1  # for classifier-free guidance
DILUTION = 16  # of the text in stage 3, at most; an image at 4x has 16 times the tokens
COLOR_DROPOUT = 0.25  # of either color word, so that a shape does not depend on its colors
EMA = 0.999
CHECKPOINT_EVERY = 250  # steps
WEIGHTS = Path(__file__).parent / "weights"
EXAMPLES = """examples:
  python -m dype.demo.train
  python -m dype.demo.train --seed 1 --vae dype/demo/weights --steps 3000 --diluted_steps 1000
"""


def to_tensor(images: np.ndarray, device) -> torch.Tensor:
    """Convert uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1], in channels-last memory."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Return the factor of the peak rate: a linear warm-up, then half a cosine to zero.

    Args:
        step: number of finished steps.
        steps: length of the cosine.
        warmup: length of the warm-up, steps.
    """
    done = min(step / steps, 1)
    return min((step + 1) / warmup, 1) * (0.5 + 0.5 * math.cos(math.pi * done))


def save(path: Path, **state) -> None:
    """Write a checkpoint; a killed run leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train_stage(
    name: str, modules: ModuleDict, loss_at, rate: float, steps: int, decay: int, args
) -> None:
    """Train modules, from the last checkpoint if there is one, and set their averaged weights.

    Args:
        name: name of the stage and of its checkpoint.
        modules: modules to train, by name.
        loss_at: takes a step, returns its loss; its random numbers depend on the step alone.
        rate: peak learning rate.
        steps: steps of the training.
        decay: steps after which the learning rate is zero.
        args: parsed flags.
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
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            saved = {"optimizer": optimizer.state_dict(), "dtype": args.dtype}
            saved |= {key: module.state_dict() for key, module in modules.items()}
            save(path, step=step + 1, loss=smooth, average=average, **saved)
    for param, mean in zip(params, average, strict=True):
        param.data.copy_(mean)
    modules.eval()


def init_vae(vae: torch.nn.Module) -> torch.nn.Module:
    """Make convolutions orthogonal, and residual branches zero.

    In two short runs the loss was 0.18 after 350 steps with the default initialization, and 0.109
    after 230 steps with this one (docs/log/2026-11-20-autoencoder-initialization.md).
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
    """Train the autoencoder with an L1 loss and a small KL term, and return it.

    Three of four steps have small crops, which train faster per pixel. The fourth has large crops,
    so that GroupNorm sees the statistics of whole images.
    """
    torch.manual_seed(args.seed)
    vae = init_vae(demo_model.vae())
    vae = vae.to(args.device, memory_format=torch.channels_last)

    @cache  # rendered late, so that a finished stage renders nothing
    def rendered_images(size):
        rng = np.random.default_rng([args.seed, size])
        scenes = [sample_scene(rng, TRAIN_TRIPLES) for _ in range(VAE_IMAGES[size])]
        return [render(scene, size) for scene in tqdm(scenes, f"rendering {size} px")]

    def loss_at(step):
        """Return the loss of a batch of crops."""
        rng = np.random.default_rng([args.seed, 1, step])
        crop, count = (BASE, 2) if step % 4 == 3 else (64, 16)
        crops = []
        for size in rng.choice(list(VAE_IMAGES), count, p=(0.5, 0.25, 0.25)):
            image = rendered_images(size)[rng.integers(VAE_IMAGES[size])]
            y, x = rng.integers(size - crop + 1, size=2)
            crops.append(image[y : y + crop, x : x + crop])
        x = to_tensor(np.stack(crops), args.device)
        with autocast(args.device, args.dtype):
            latents = vae.encode(x).latent_dist
            out = vae.decode(latents.sample()).sample
        return F.l1_loss(out.float(), x) + 1e-4 * latents.kl().mean() / latents.mean[0].numel()

    train_stage(
        "vae", ModuleDict({"vae": vae}), loss_at, 2e-3, args.vae_steps, args.vae_steps, args
    )
    return vae


def cached_latents(vae, args) -> tuple[torch.Tensor, list[Scene]]:
    """Return latents [N, C, 32, 32] of N rendered scenes, and the scenes."""
    rng = np.random.default_rng([args.seed, BASE])
    scenes = [sample_scene(rng, TRAIN_TRIPLES) for _ in range(NUM_SCENES)]
    path = args.work / "latents.pt"
    if not path.exists():
        latents = []
        with Pool() as pool:
            for start in tqdm(range(0, NUM_SCENES, 32), "latents"):
                images = pool.map(partial(render, height=BASE), scenes[start : start + 32])
                x = to_tensor(np.stack(images), args.device)
                with torch.no_grad(), autocast(args.device, args.dtype):
                    latents.append(vae.encode(x).latent_dist.mode().half().cpu())
        save(path, latents=torch.cat(latents))
    return torch.load(path)["latents"].float(), scenes


def caption_variants(scene: Scene) -> list[str]:
    """Return captions without colors, with the ground's color, with the object's, with both."""
    return [
        " ".join(replace(scene, color=color, ground=ground).caption.split())
        for color in ("", scene.color)
        for ground in ("", scene.ground)
    ]


def normalize(vae, latents: torch.Tensor) -> torch.Tensor:
    """Scale every latent channel to deviation 1 by the autoencoder's convolutions.

    This is exact because the decoder's first convolution pads with zeros. Only the mean of all
    channels moves, by `shift_factor`, because another mean per channel would change the meaning of
    that padding.
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
    """Set modulation and output to zero (adaLN-zero, Peebles and Xie 2023); return the module."""
    for name, weight in transformer.named_parameters():
        if (".norm" in name and ".linear." in name) or name.startswith(("norm_out", "proj_out")):
            torch.nn.init.zeros_(weight)
    return transformer


def train_transformer(vae, args) -> FluxPipeline:
    """Train the transformer and the text encoders in stages 2 and 3; return the pipeline."""
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
    loss_at = make_flow_matching_loss(pipe, latents, scenes, args)
    train_stage("transformer", modules, loss_at, 1.2e-3, args.steps, 8000, args)
    diluted, steps = partial(loss_at, dilution=DILUTION), args.diluted_steps
    train_stage("diluted", modules, diluted, 6e-4, steps, steps, args)
    return pipe


def make_flow_matching_loss(pipe, latents: torch.Tensor, scenes: list[Scene], args) -> Callable:
    """Return the loss as a function of the step; its target is noise - latent (Eq. 1).

    The attention logits of the text are lowered by ln r, the effect of r times as many image
    tokens. r is log-uniform in 1 to `dilution`, per sample. Both stages sample the same numbers.

    Args:
        pipe: pipeline to train.
        latents: [N, C, h, w] of the scenes.
        scenes: N scenes.
        args: parsed flags.
    """
    captions = ["", *(caption for scene in scenes for caption in caption_variants(scene))]
    clip_ids, t5_ids = (
        tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(args.device)
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    )
    side = latents.shape[-1] // 2
    img_ids = pipe._prepare_latent_image_ids(1, side, side, args.device, torch.float32)
    txt_ids = torch.zeros(demo_model.MAX_TOKENS, 3, device=args.device)

    def loss_at(step, dilution=1):
        """Return the loss of a batch of latents."""
        rng = np.random.default_rng([args.seed, 2, step])
        index = rng.choice(len(latents), args.batch, replace=False)
        has_caption = rng.random(args.batch) >= CAPTION_DROPOUT
        color, ground = rng.random((2, args.batch)) >= COLOR_DROPOUT
        rows = np.where(has_caption, 1 + 4 * index + 2 * color + ground, 0)
        rows = torch.from_numpy(rows).to(args.device)
        u = (rng.permutation(args.batch) + rng.random(args.batch)) / args.batch  # stratified
        sigma = torch.from_numpy(SHIFT * u / (1 + (SHIFT - 1) * u)).float().to(args.device)
        x = latents[torch.from_numpy(index).to(args.device)]
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
    """Return the parser of the command line."""
    argument_parser = Parser(prog="python -m dype.demo.train", description=__doc__, epilog=EXAMPLES)
    flag = argument_parser.add_argument
    flag("--out", type=Path, metavar="FOLDER", help="folder of the pipeline (default: dype/demo/"
         "weights for seed 0, else a folder in --work)")  # fmt: skip
    flag("--work", type=Path, metavar="FOLDER", help="folder of checkpoints (default: "
         "outputs/demo_training_SEED)")  # fmt: skip
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME",
         help="device to train on (default: cuda if there is one, else cpu)")  # fmt: skip
    flag("--dtype", choices=("bfloat16", "float32"), metavar="DTYPE", help="number format of "
         "matrix products; bfloat16, float32 (default: as in --work, else the faster "
         "one)")  # fmt: skip
    flag("--seed", type=int, default=0, metavar="N", help="seed of weights, scenes and noise "
         "(default: %(default)s)")  # fmt: skip
    flag("--vae", type=Path, metavar="FOLDER", help="pipeline whose autoencoder replaces stage 1 "
         "(default: none)")  # fmt: skip
    flag("--vae_steps", type=int, default=3200, metavar="N", help="steps of stage 1 "
         "(default: %(default)s)")  # fmt: skip
    flag("--steps", type=int, default=3750, metavar="N", help="steps of stage 2, of a cosine over "
         "8000 (default: %(default)s)")  # fmt: skip
    flag("--diluted_steps", type=int, default=2000, metavar="N", help="steps of stage 3 "
         "(default: %(default)s)")  # fmt: skip
    flag("--batch", type=int, default=16, metavar="N", help="batch of stages 2 and 3 "
         "(default: %(default)s)")  # fmt: skip
    return argument_parser


def resolve_dtype(args: argparse.Namespace) -> str:
    """Return the number format of the checkpoints, else --dtype, else the device's faster one."""
    for stage in ("diluted", "transformer", "vae"):
        path = args.work / f"{stage}.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu")
            dtype = state.get("dtype", "bfloat16")  # older checkpoints do not name it
            if args.dtype not in (None, dtype):
                raise UserError(
                    f"--dtype is {args.dtype}, but {path} was trained in {dtype}, expected the "
                    "same, or another --work"
                )
            return dtype
    return args.dtype or fast_dtype(args.device)


def train(args: argparse.Namespace) -> None:
    """Train all stages and save the pipeline. Raises UserError, UnavailableError and OSError."""
    args.work = args.work or Path(f"outputs/demo_training_{args.seed}")
    args.out = args.out or (args.work / "pipeline" if args.seed else WEIGHTS)
    check_device(args.device, "none")
    args.dtype = resolve_dtype(args)
    if args.vae and not (args.vae / "vae").is_dir():
        raise UserError(f"--vae is {args.vae}, expected the folder of a pipeline")
    print(f"training on {args.device} in {args.dtype}")
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, subfolder="vae", local_files_only=True)
        vae = vae.to(args.device, memory_format=torch.channels_last)
    else:
        vae = train_vae(args)
    pipe = train_transformer(vae.requires_grad_(False), args)
    pipe.transformer.half()  # not the text encoders, because they are small
    pipe.vae.half().to(memory_format=torch.contiguous_format)
    pipe.save_pretrained(args.out)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Exit codes: 0, 2 for a mistake of the user, 1 for other failures, 130 after Ctrl-C.
    """
    next_step = "the same command continues from the last checkpoint"
    return run_command(
        "dype.demo.train", lambda: train(parser().parse_args(argv)), interrupted=next_step
    )


if __name__ == "__main__":
    sys.exit(main())
