"""Images to latents, by the parts of the text-to-image pipelines; and the latents' spectra."""

import math

import numpy as np
import torch
from PIL import Image

VISIBLE_POWER_RATIO = (
    0.15  # of the noise's power: so little of the image's is not seen in it (docs/log)
)


@torch.no_grad()
def encode_image(pipe, picture: Image.Image, device: torch.device) -> torch.Tensor:
    """The latents that an image decodes from, as the transformer knows them: [1, C, h, w].

    C, h, w are those of the pipeline's noise before it is packed into tokens. Takes the mode of the
    autoencoder's distribution, so nothing is random. Raises TypeError for an autoencoder that is
    none of FLUX.1's, FLUX.2's or Qwen-Image's.
    """
    kind = type(pipe.vae).__name__
    if kind not in VAE_ENCODERS:
        raise TypeError(f"{kind} is not supported, expected one of {', '.join(VAE_ENCODERS)}")
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).to(device)
    pixels = pixels.permute(2, 0, 1)[None].to(pipe.vae.dtype) / 127.5 - 1
    return VAE_ENCODERS[kind](pipe, pixels)


def encode_kl(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """FLUX.1, Chroma, Z-Image."""
    config = pipe.vae.config
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    return (latents - config.shift_factor) * config.scaling_factor


def encode_qwen(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """Qwen-Image, Krea 2: a video autoencoder with one frame, each channel by its own numbers."""
    config = pipe.vae.config
    latents = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    numbers = latents.new_tensor([config.latents_mean, config.latents_std])
    mean, deviation = numbers[:, :, None, None]
    return (latents - mean) / deviation


VAE_ENCODERS = {
    "AutoencoderKL": encode_kl,
    "AutoencoderKLQwenImage": encode_qwen,
    # FLUX.2's pipelines encode reference images themselves
    "AutoencoderKLFlux2": lambda pipe, pixels: pipe._encode_vae_image(pixels, None),
}


def unpatchify(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Latents with a row per row: FLUX.2's hold 2 x 2 of them in their channels."""
    unpatchify = getattr(pipe, "_unpatchify_latents", None)
    return unpatchify(latents) if unpatchify else latents


def radial_frequency(height: int, width: int) -> torch.Tensor:
    """f of every entry of `torch.fft.fft2`, in shares of Nyquist: float64 [height, width]."""
    sides = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    return 2 * torch.hypot(*torch.meshgrid(*sides, indexing="ij"))


def radial_bins(height: int, width: int) -> torch.Tensor:
    """The ring of every frequency, whole numbers; the n-th, n = min(sides) // 2, is Nyquist."""
    return (radial_frequency(height, width) * (min(height, width) // 2)).round().long()


def mean_power_by_bin(power: torch.Tensor, bins: torch.Tensor, count: int) -> torch.Tensor:
    """Average power over the entries of each bin 0 .. count - 1: [..., h, w] -> [..., count].

    bins: the bin of every entry, int [h, w]; entries of other bins are left out.
    """
    bins = torch.where((bins >= 0) & (bins < count), bins, count).flatten()
    total = power.new_zeros(*power.shape[:-2], count + 1)
    total.index_add_(-1, bins, power.flatten(-2))
    return (total / bins.bincount(minlength=count + 1))[..., :count]


def power_spectrum(x: torch.Tensor) -> torch.Tensor:
    """Mean power over rings 1 .. Nyquist of each channel, [C, height, width] -> float64 [C, n].

    Scaled so that white noise of variance 1 has power 1. On the CPU: not every device has float64,
    and every process is to find the same.
    """
    height, width = x.shape[-2:]
    power = torch.fft.fft2(x.cpu().double()).abs().square() / (height * width)
    return mean_power_by_bin(power, radial_bins(height, width) - 1, min(height, width) // 2)


def fit_power_law(power: torch.Tensor, least: float = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """C and omega of C / f^omega, by least squares over ln f: float64 [..., n] -> [...] each.

    least: the f from which on it is to hold.
    """
    n = power.shape[-1]
    first = min(max(math.ceil(least * n), 1), n)
    at = torch.arange(first, n + 1, dtype=torch.float64).div(n).log()
    off, power = at - at.mean(), power[..., first - 1 :]
    logs = power.clamp(min=1e-12).log()  # a flat image has none
    slope = (logs * off).sum(-1) / off.square().sum().clamp(min=1e-12)  # one ring: white
    return (logs.mean(-1) - slope * at.mean()).exp(), -slope


def switch_sigma(c: float, omega: float, s: float) -> float:
    """The noise level above which nothing finer than an image smaller by s can be seen.

    At frequency 1/s of the large image's Nyquist, the first that the small one lacks, Eq. 11 has
    (1 - t)^2 C s^omega of the image and t^2 of the noise; this is where the first is OPEN times
    the second.
    """
    ratio = math.sqrt(c * s**omega / VISIBLE_POWER_RATIO)
    return ratio / (1 + ratio)


def missing_power(large: torch.Tensor, small: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """What an image lacks that was enlarged: C and omega of its own latents, and power.

    large, small: the latents of the enlarged and of the first one, [C, h, w] each. At equal shares
    of their Nyquist frequencies images of two sizes have equal texture; so beyond 1/s, where the
    large one has nothing, the small one's law over the same f >= 1/s is what it should have,
    channel by channel, and the third is by how much it falls short, [C, h, w].
    """
    height, width = large.shape[-2:]
    s, power = math.sqrt(height * width / small[0].numel()), power_spectrum(small)
    c, omega = (part[:, None, None] for part in fit_power_law(power, 1 / s))
    f, ring = radial_frequency(height, width), radial_bins(height, width)
    has = power_spectrum(large)[:, ring.clamp(1, min(height, width) // 2) - 1]
    short = (c / f.clamp(min=1 / s) ** omega - has).clamp(min=0) * (f > 1 / s)
    whole = fit_power_law(power.mean(0), 1 / s)
    return float(whole[0]), float(whole[1]), short


def color_noise(noise: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """White noise of variance 1 with that much power more at each frequency: [..., h, w] each."""
    spectrum = torch.fft.fft2(noise.double()) * (1 + power).sqrt()
    return torch.fft.ifft2(spectrum).real.to(noise.dtype)


def add_noise(
    pipe, latents: torch.Tensor, sigma: float, seed: int, dtype, more: torch.Tensor | None = None
) -> torch.Tensor:
    """x_t = (1 - t) x + t eps (paper Eq. 1), in the shape of the pipeline's `latents` argument.

    eps is what the pipeline itself would draw for this seed and size, so that at sigma = 1 its
    own start comes out. dtype: of the prompt's embeddings, in which most pipelines draw. more:
    power that x is to have beside its own, [C, h, w], of `unpatchify` latents: Eq. 11 says how much
    of it is in x_t, and its phases are the noise's.
    """
    packs = hasattr(pipe, "_pack_latents")  # Z-Image keeps rows and columns, and float32
    patches = hasattr(pipe, "_patchify_latents")  # FLUX.2 packs what it is given
    dtype = dtype if packs else torch.float32
    generator = torch.Generator("cpu").manual_seed(seed)
    eps = torch.randn(latents.shape, generator=generator, dtype=dtype).float()
    if more is not None:
        eps = color_noise(unpatchify(pipe, eps), ((1 - sigma) / sigma) ** 2 * more)
        eps = pipe._patchify_latents(eps) if patches else eps
    mixed = ((1 - sigma) * latents.float() + sigma * eps.to(latents.device)).to(dtype)
    return pipe._pack_latents(mixed, *mixed.shape) if packs and not patches else mixed
