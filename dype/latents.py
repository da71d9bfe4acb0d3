"""Pictures to latents, by the parts of the text-to-image pipelines."""

import numpy as np
import torch
from PIL import Image


@torch.no_grad()
def encode_picture(pipe, picture: Image.Image, device: torch.device) -> torch.Tensor:
    """The latents that a picture decodes from, as the transformer knows them: [1, C, h, w].

    C, h, w are those of the pipeline's noise before it is packed into tokens. Takes the mode of the
    autoencoder's distribution, so nothing is random. Raises TypeError for an autoencoder that is
    none of FLUX.1's, FLUX.2's or Qwen-Image's.
    """
    kind = type(pipe.vae).__name__
    if kind not in NORMALIZED:
        raise TypeError(f"{kind} is not supported, expected one of {', '.join(NORMALIZED)}")
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).to(device)
    pixels = pixels.permute(2, 0, 1)[None].to(pipe.vae.dtype) / 127.5 - 1
    return NORMALIZED[kind](pipe, pixels)


def scaled(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """FLUX.1, Chroma, Z-Image."""
    config = pipe.vae.config
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    return (latents - config.shift_factor) * config.scaling_factor


def by_channel(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """Qwen-Image, Krea 2: a video autoencoder with one frame, each channel by its own numbers."""
    config = pipe.vae.config
    latents = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, deviation = (
        torch.tensor(numbers, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1)
        for numbers in (config.latents_mean, config.latents_std)
    )
    return (latents - mean) / deviation


def patchified(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """FLUX.2, whose pipelines encode reference pictures themselves."""
    return pipe._encode_vae_image(pixels, None)


NORMALIZED = {
    "AutoencoderKL": scaled,
    "AutoencoderKLQwenImage": by_channel,
    "AutoencoderKLFlux2": patchified,
}


def noised(pipe, latents: torch.Tensor, sigma: float, seed: int, dtype) -> torch.Tensor:
    """x_t = (1 - t) x + t eps (paper Eq. 1), in the shape of the pipeline's `latents` argument.

    eps is what the pipeline itself would draw for this seed and size, so that at sigma = 1 its
    own start comes out. dtype: of the prompt's embeddings, in which most pipelines draw.
    """
    packs = hasattr(pipe, "_pack_latents")  # Z-Image keeps rows and columns, and float32
    noise = torch.randn(
        latents.shape,
        generator=torch.Generator("cpu").manual_seed(seed),
        dtype=dtype if packs else torch.float32,
    )
    mixed = (1 - sigma) * latents.float() + sigma * noise.to(latents.device).float()
    mixed = mixed.to(noise.dtype)
    if not packs or hasattr(pipe, "_patchify_latents"):  # FLUX.2 packs what it is given
        return mixed
    return pipe._pack_latents(mixed, *mixed.shape)
