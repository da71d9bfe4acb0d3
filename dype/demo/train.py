"""Train the demo model: `python -m dype.demo.train`.

On an H100 stages 2 and 3 took nine minutes. On two cores with fast bfloat16 (AVX-512), by estimate,
stage 1 takes 40 minutes, and the others a day; `--batch 4 --steps 9000` three hours in all.

Stage 1 trains the autoencoder on rendered scenes, then its encoder and its decoder alone. Stage 2
trains the transformer and the text encoders on latents of half the size, stage 3 on whole ones.
Stage 4 distills classifier-free guidance into the guidance that the transformer embeds. Every stage
writes checkpoints to --work and continues from them. Other settings need another --work. The
pipeline is saved to --out.
"""

import argparse
import math
import sys
from copy import deepcopy
from functools import partial
from itertools import islice
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from torch.nn import ModuleDict
from tqdm import tqdm

from dype.config import check_number
from dype.demo import model as demo_model
from dype.demo.drawing import render
from dype.demo.scenes import ATTRIBUTES, TRAINED, Scene, sample_scene
from dype.demo.train_autoencoder import BASE, to_tensor, train_autoencoder
from dype.demo.train_stage import save_checkpoint, train_stage
from dype.errors import Parser, UserError, raise_user_errors, run_command
from dype.pipelines.devices import DTYPES, autocast, check_device, fast_dtype

NUM_SCENES = 16000  # for the transformer, cached as latents
SHIFT = math.exp(1.4)  # of training sigmas; a larger image's sampler shifts more
CAPTION_DROPOUT = 0.1  # for classifier-free guidance
ATTRIBUTE_DROPOUT = 0.15  # of each attribute of a caption
DILUTION = 16  # of the text, at most; an image at 4x has 16 times the tokens
GUIDANCE = 6  # largest embedded guidance
WEIGHTS = Path(__file__).parent / "weights"
EXAMPLES = """examples:
  python -m dype.demo.train
  python -m dype.demo.train --seed 1 --vae dype/demo/weights --batch 4 --steps 9000
"""


def cached_latents(vae, args) -> tuple[torch.Tensor, list[Scene]]:
    """Return latents [N, C, 64, 64] of N rendered scenes in float16, and the scenes."""
    rng = np.random.default_rng([args.seed, BASE])
    scenes = [sample_scene(rng, TRAINED) for _ in range(NUM_SCENES)]
    path = args.work / "latents.pt"
    encoder = torch.nn.utils.get_total_norm(vae.encoder.parameters()).item()
    if path.exists():
        state = torch.load(path)
        is_whole = len(state["latents"]) == NUM_SCENES
        if not is_whole or not math.isclose(encoder, state["encoder"], rel_tol=1e-5):
            raise UserError(f"{path} is of another autoencoder, expected another --work")
        return state["latents"], scenes
    latents = []
    with Pool() as pool:
        images = pool.imap(partial(render, height=BASE), scenes, chunksize=4)
        for _ in tqdm(range(0, NUM_SCENES, 16), "latents"):
            x = to_tensor(np.stack([*islice(images, 16)]), args.device)
            with torch.no_grad(), autocast(args.device, args.dtype):
                latents.append(vae.encode(x).latent_dist.mode().half().cpu())
    latents = torch.cat(latents)
    save_checkpoint(path, latents=latents, encoder=encoder)
    return latents, scenes


def normalize(vae, latents: torch.Tensor) -> torch.Tensor:
    """Scale every channel of latents, in place, to deviation 1 by the autoencoder's convolutions.

    This is exact because the decoder's first convolution pads with zeros. Only the mean of all
    channels moves, by `shift_factor`, because another mean per channel would change the meaning of
    that padding.
    """
    channels = demo_model.LATENT_CHANNELS
    deviation = torch.stack([channel.float().std() for channel in latents.unbind(1)])
    latents /= deviation[:, None, None]
    shift = sum(channel.float().mean().item() for channel in latents.unbind(1)) / channels
    latents -= shift
    deviation = deviation.to(vae.device)
    encoder, decoder = vae.encoder.conv_out, vae.decoder.conv_in
    encoder.weight.data[:channels] /= deviation[:, None, None, None]
    encoder.bias.data[:channels] /= deviation
    encoder.bias.data[channels:] -= 2 * deviation.log()  # these are log variances
    decoder.weight.data *= deviation[:, None, None]
    vae.register_to_config(shift_factor=shift)
    return latents


def zero_modulation(transformer: torch.nn.Module) -> torch.nn.Module:
    """Set modulation and output to zero (adaLN-zero, Peebles and Xie 2023); return the module."""
    for name, weight in transformer.named_parameters():
        if (".norm" in name and ".linear." in name) or name.startswith(("norm_out", "proj_out")):
            torch.nn.init.zeros_(weight)
    return transformer


def train_transformer(vae, args) -> FluxPipeline:
    """Train the transformer and the text encoders in stages 2 to 4; return the pipeline."""
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
    half = F.avg_pool2d(latents, 2)  # of images of half the size, by the autoencoder's training
    loss_at = partial(flow_matching_loss, pipe, half, scenes, args, batch=4 * args.batch)
    train_stage("half", modules, loss_at, (1e-3, 0.02), args.half_steps, 2 * args.half_steps, args)
    loss_at = partial(flow_matching_loss, pipe, latents, scenes, args, batch=args.batch)
    train_stage("full", modules, loss_at, (1e-3, 0.02), args.steps, args.steps, args)
    loss_at = partial(loss_at, teacher=deepcopy(modules))
    steps = args.guidance_steps
    train_stage("guidance", modules, loss_at, (3e-4, 0.005), steps, steps, args)
    return pipe


def sample_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return the caption of a scene, with some of its attributes left out."""
    left_out = [name for name in ATTRIBUTES if rng.random() < ATTRIBUTE_DROPOUT]
    return scene.caption_without(left_out)


def tokenize(pipe, captions: list[str]) -> list[torch.Tensor]:
    """Return the ids [B, text tokens] of B captions, by CLIP's and by T5's tokenizer."""
    tokenizers = pipe.tokenizer, pipe.tokenizer_2
    options = {"padding": "max_length", "return_tensors": "pt"}
    return [tokenizer(captions, **options).input_ids for tokenizer in tokenizers]


def predict(pipe, modules, ids, noisy, sigma, guidance, bias) -> torch.Tensor:
    """Return the transformer's output, [B, tokens, C].

    Args:
        pipe: pipeline, for its position ids.
        modules: transformer and text encoders, by name.
        ids: ids of B captions, by `tokenize`, on the device.
        noisy: [B, tokens, C] packed latents.
        sigma: [B] noise levels.
        guidance: [B] embedded guidance.
        bias: [B, 1, 1, text tokens + tokens] added to the attention's logits.
    """
    clip_ids, t5_ids = ids
    side = math.isqrt(noisy.shape[1])
    img_ids = pipe._prepare_latent_image_ids(1, side, side, noisy.device, torch.float32)
    stretch = BASE // 16 // side  # half-sized images lie at the positions of full-sized ones
    img_ids[:, 1:] = stretch * img_ids[:, 1:] + (stretch - 1) / 2
    return modules["transformer"](
        hidden_states=noisy,
        timestep=sigma,
        guidance=guidance,
        pooled_projections=modules["text_encoder"](clip_ids).pooler_output,
        encoder_hidden_states=modules["text_encoder_2"](t5_ids)[0],
        img_ids=img_ids,
        txt_ids=torch.zeros(demo_model.MAX_TOKENS, 3, device=noisy.device),
        joint_attention_kwargs={"attention_mask": bias},
    ).sample


def flow_matching_loss(pipe, latents, scenes, args, step, batch, teacher=None) -> torch.Tensor:
    """Return the loss of a batch at a step; its target is noise - latent (Eq. 1).

    The attention logits of the text are lowered by ln r, the effect of r times as many image
    tokens, as in larger images. r is log-uniform in 1 to DILUTION, per sample. With a teacher the
    target is its classifier-free guidance by the embedded scale (Meng et al. 2023).

    Args:
        pipe: pipeline to train.
        latents: [N, C, h, w] of the scenes.
        scenes: N scenes.
        args: parsed flags.
        step: number of the step.
        batch: number of latents.
        teacher: modules of the trained model without guidance, or None.
    """
    rng = np.random.default_rng([args.seed, 2, step])
    index = rng.choice(len(latents), batch, replace=False)
    captions = [sample_caption(scenes[i], rng) for i in index]
    u = (rng.permutation(batch) + rng.random(batch)) / batch  # stratified
    if teacher:
        captions += [""] * batch
    else:
        dropped = rng.random(batch) < CAPTION_DROPOUT
        captions = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
    ids = [tensor.to(args.device) for tensor in tokenize(pipe, captions)]
    sigma = torch.from_numpy(SHIFT * u / (1 + (SHIFT - 1) * u)).float().to(args.device)
    x = latents[torch.from_numpy(index)].float()
    x = pipe._pack_latents(x, *x.shape)
    noise = torch.randn_like(x)
    noisy, target = torch.lerp(x, noise, sigma[:, None, None]), noise - x
    bias = torch.zeros(batch, 1, 1, demo_model.MAX_TOKENS + x.shape[1], device=args.device)
    dilution = torch.rand(batch, 1, 1, 1, device=args.device)
    bias[..., : demo_model.MAX_TOKENS] -= math.log(DILUTION) * dilution
    bias = bias.to(DTYPES[args.dtype])
    guidance = torch.ones(batch, device=args.device)
    with autocast(args.device, args.dtype):
        if teacher:
            guidance = GUIDANCE ** torch.rand(batch, device=args.device)
            with torch.no_grad():
                inputs = noisy, sigma, torch.ones_like(sigma), bias
                inputs = [tensor.repeat(2, *[1] * (tensor.ndim - 1)) for tensor in inputs]
                both = predict(pipe, teacher, ids, *inputs).float()
            with_text, without = both.chunk(2)
            target = torch.lerp(without, with_text, guidance[:, None, None])
        modules = {name: getattr(pipe, name) for name in pipe.components}
        out = predict(
            pipe, modules, [tensor[:batch] for tensor in ids], noisy, sigma, guidance, bias
        )
    return F.mse_loss(out.float(), target)


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
    flag("--vae_steps", type=int, default=4000, metavar="N", help="steps of stage 1 "
         "(default: %(default)s)")  # fmt: skip
    flag("--encoder_steps", type=int, default=2000, metavar="N", help="steps of the encoder alone "
         "(default: %(default)s)")  # fmt: skip
    flag("--decoder_steps", type=int, default=4000, metavar="N", help="steps of the decoder alone, "
         "the end of stage 1 (default: %(default)s)")  # fmt: skip
    flag("--half_steps", type=int, default=1200, metavar="N", help="steps of stage 2 "
         "(default: %(default)s)")  # fmt: skip
    flag("--steps", type=int, default=4600, metavar="N", help="steps of stage 3 "
         "(default: %(default)s)")  # fmt: skip
    flag("--guidance_steps", type=int, default=500, metavar="N", help="steps of stage 4 "
         "(default: %(default)s)")  # fmt: skip
    flag("--batch", type=int, default=64, metavar="N", help="batch of stages 3 and 4; stage 2 has "
         "four times as many (default: %(default)s)")  # fmt: skip
    return argument_parser


def resolve_dtype(args: argparse.Namespace) -> str:
    """Return the number format of the checkpoints, else --dtype, else the device's faster one."""
    for stage in ("vae", "half"):  # the first one; with --vae there is no vae.pt
        path = args.work / f"{stage}.pt"
        if path.exists():
            dtype = torch.load(path, map_location="cpu")["dtype"]
            if args.dtype not in (None, dtype):
                raise UserError(
                    f"--dtype is {args.dtype}, but {path} was trained in {dtype}, expected the "
                    "same, or another --work"
                )
            return dtype
    return args.dtype or fast_dtype(args.device)


@raise_user_errors()
def train(args: argparse.Namespace) -> None:
    """Train all stages and save the pipeline. Raises UserError, UnavailableError and OSError."""
    check_number("--seed", args.seed, 0, math.inf, integer=True)
    check_number("--batch", args.batch, 1, NUM_SCENES // 4, integer=True)
    args.work = args.work or Path(f"outputs/demo_training_{args.seed}")
    args.out = args.out or (args.work / "pipeline" if args.seed else WEIGHTS)
    check_device(args.device, "none")
    args.dtype = resolve_dtype(args)
    if args.vae and not (args.vae / "vae").is_dir():
        raise UserError(f"--vae is {args.vae}, expected the folder of a pipeline")
    torch.backends.cuda.enable_cudnn_sdp(False)  # in torch 2.11 its backward fails with our mask
    print(f"training on {args.device} in {args.dtype}")
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae, subfolder="vae", local_files_only=True)
        vae = vae.to(args.device, memory_format=torch.channels_last)
    else:
        vae = train_autoencoder(args)
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
