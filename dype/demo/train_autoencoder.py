"""Stage 1 of the demo's training: the autoencoder, on crops of rendered scenes."""

from copy import deepcopy
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn import ModuleDict
from tqdm import tqdm

from dype.demo import model as demo_model
from dype.demo.drawing import render
from dype.demo.scenes import TRAINED, sample_scene
from dype.demo.train_stage import train_stage
from dype.pipelines.catalog import MODELS
from dype.pipelines.devices import autocast

BASE = MODELS["demo"].base_resolution  # px
VAE_IMAGES = {256: 800, 512: 600, 1024: 100}  # images per size for the autoencoder
WINDOW = 16  # px, of the decoder's texture error
TEXTURE = 0.04  # weight of the texture error
BORDER = 32  # px, of images for the encoder's training


def to_tensor(images: np.ndarray, device) -> torch.Tensor:
    """Convert uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1], in channels-last memory."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


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


def crop_sampler(args):
    """Return a function from a step to crops [B, 3, h, w] of rendered scenes.

    Three quarters of the steps have 16 crops of 64 px, which train faster per pixel. A quarter have
    one of `large` px, so that GroupNorm sees the statistics of whole images.
    """

    @cache  # rendered late, so that a finished stage renders nothing
    def rendered_images(size):
        rng = np.random.default_rng([args.seed, size])
        scenes = [sample_scene(rng, TRAINED) for _ in range(VAE_IMAGES[size])]
        return [render(scene, size) for scene in tqdm(scenes, f"rendering {size} px")]

    def sample(step, large=256):
        rng = np.random.default_rng([args.seed, 1, step])
        crop, count = (large, 1) if step % 4 == 3 else (64, 16)
        crops, sizes = [], [size for size in VAE_IMAGES if size >= crop]
        shares = np.array([2, 1, 1][-len(sizes) :])
        for size in rng.choice(sizes, count, p=shares / shares.sum()):
            image = rendered_images(size)[rng.integers(VAE_IMAGES[size])]
            y, x = rng.integers(size - crop + 1, size=2)
            crops.append(image[y : y + crop, x : x + crop])
        return to_tensor(np.stack(crops), args.device)

    return sample


def texture_error(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return the relative error of the amplitudes of gray windows' spectra, mean over frequencies.

    Phases do not count, so fine texture need not be in its place, only as strong as it is.

    Args:
        decoded: [B, 3, h, w].
        images: [B, 3, h, w].
    """
    window = torch.hann_window(WINDOW, device=images.device)
    ours, true = (
        x.mean(1).unfold(1, WINDOW, WINDOW // 2).unfold(2, WINDOW, WINDOW // 2)
        for x in (decoded, images)
    )
    ours, true = (
        torch.fft.rfft2(x * window * window[:, None]).abs().flatten(0, 2) for x in (ours, true)
    )
    return ((ours - true).abs().mean(0) / true.mean(0).clamp(min=1e-3)).mean()


def encode_with_border(vae, images: torch.Tensor) -> torch.Tensor:
    """Return the latents [B, C, h, w] of images [B, 3, 8 h, 8 w] within larger ones.

    The encoder pads the right and the bottom with zeros, which make outliers of the last row and
    column. A reflected border keeps the zeros away from them.
    """
    padded = F.pad(images, (0, BORDER, 0, BORDER), mode="reflect")
    return vae.encode(padded).latent_dist.mode()[..., : -BORDER // 8, : -BORDER // 8]


def train_autoencoder(args) -> torch.nn.Module:
    """Train the autoencoder, then its encoder alone, then its decoder alone, and return it.

    The autoencoder minimizes L1, squared error and a small KL term. In a quarter of the steps the
    decoder gets latents of half the size and has to return the image at half its size (EQ-VAE,
    Kouzelis et al. 2025): such latents are easier to generate.

    The encoder alone then learns to return what it returned for images with a border, because a
    transformer repeats outliers of the last column within larger images. The decoder alone learns
    the strength of fine texture, which is blurred because the phase is lost.
    """
    torch.manual_seed(args.seed)
    vae = init_vae(demo_model.vae())
    vae = vae.to(args.device, memory_format=torch.channels_last)
    crops = crop_sampler(args)

    def vae_loss(step):
        x = crops(step)
        with autocast(args.device, args.dtype):
            latents = vae.encode(x).latent_dist
            sample = latents.sample()
            if step % 4 == 1:
                x, sample = F.avg_pool2d(x, 2), F.avg_pool2d(sample, 2)
            error = vae.decode(sample).sample.float() - x
        kl = latents.kl().mean() / latents.mean[0].numel()
        return error.abs().mean() + 5 * error.square().mean() + 1e-4 * kl

    def encoder_loss(step, teacher):
        x = crops(4 * step + 3)  # a large one
        with autocast(args.device, args.dtype):
            with torch.no_grad():
                target = encode_with_border(teacher, x)
            latents = vae.encode(x).latent_dist.mode()
        return F.mse_loss(latents.float(), target.float())

    def decoder_loss(step):
        x = crops(step, large=BASE)
        with autocast(args.device, args.dtype):
            with torch.no_grad():
                latents = vae.encode(x).latent_dist.mode()
            decoded = vae.decode(latents).sample.float()
        error = decoded - x
        pixels = error.abs().mean() + 5 * error.square().mean()
        return pixels + TEXTURE * texture_error(decoded, x)

    modules, steps = ModuleDict({"vae": vae}), args.vae_steps
    train_stage("vae", modules, vae_loss, (2e-3, 0.03), steps, steps, args)
    modules, steps = ModuleDict({"encoder": vae.encoder}), args.encoder_steps
    loss_at = partial(encoder_loss, teacher=deepcopy(vae).requires_grad_(False))
    train_stage("encoder", modules, loss_at, (1e-3, 0.01), steps, steps, args)
    modules, steps = ModuleDict({"decoder": vae.decoder}), args.decoder_steps
    train_stage("decoder", modules, decoder_loss, (1e-3, 0.01), steps, steps, args)
    return vae
