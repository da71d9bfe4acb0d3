"""Encode images with the autoencoders of the pipelines, and analyze the spectra of latents."""

import math
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from dype.errors import UnavailableError
from dype.families import family_of
from dype.patch import transformer_and_controlnets
from dype.sampling.passes import AUTOENCODERS, check_autoencoder

# Image power below this fraction of the noise power counts as invisible (docs/log).
VISIBLE_POWER_RATIO = 0.15
NOT_FINITE = (
    "the {} has values that are NaN or infinite, so no image is saved; causes may be float16 (try "
    "--dtype bfloat16 or float32), broken weights (try without --lora, or another --model), or an "
    "attention backend (try --attention native)"
)


@contextmanager
def check_finite_decoding(vae):
    """Raise UnavailableError after a `with` block that decodes to NaN or infinity, or from it.

    It looks at what enters and leaves the decoder, before the autoencoder or the conversion to 8
    bits clamps it. The host waits for the device only at the end of the block.

    vae: autoencoder with a `decoder`, which is called once, or once for each tile.
    """
    latents, pixels = [], []

    def check(decoder, args, output):
        latents.append(torch.isfinite(args[0]).all())
        pixels.append(torch.isfinite(output).all())

    hook = vae.decoder.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()
    for name, flags in (("generated latent", latents), ("decoded image", pixels)):
        check_finite(name, *flags)


def check_finite(name: str, *flags: torch.Tensor) -> None:
    """Raise UnavailableError unless all flags are true; the host waits for the device once.

    Args:
        name: of what is not finite.
        flags: results of `torch.isfinite(tensor).all()`.
    """
    if flags and not torch.stack(flags).all():
        raise UnavailableError(NOT_FINITE.format(name))


@torch.no_grad()
def encode_latents(pipe, image: Image.Image, device: torch.device) -> torch.Tensor:
    """Encode an image to latents in the normalization of the transformer.

    The latents are the mode of the autoencoder's distribution, so the result is deterministic.

    Args:
        pipe: text-to-image pipeline.
        image: image of the final size.
        device: device of the autoencoder.

    Returns:
        Latents [1, C, h, w], the shape of the pipeline's noise before it is packed into tokens.

    Raises:
        TypeError: `check_autoencoder` refuses the autoencoder.
        UnavailableError: the latents are not finite.
    """
    kind = type(pipe.vae).__name__
    check_autoencoder(type(pipe).__name__, kind)
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).to(device)
    pixels = pixels.permute(2, 0, 1)[None].to(pipe.vae.dtype) / 127.5 - 1
    latents = VAE_ENCODERS[kind](pipe, pixels)
    check_finite("latent of the image to refine", torch.isfinite(latents).all())
    return latents


def encode_kl(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels [1, 3, H, W] in [-1, 1] for FLUX.1, Chroma and Z-Image."""
    config = pipe.vae.config
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    return (latents - config.shift_factor) * config.scaling_factor


def encode_tiny(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels [1, 3, H, W] in [-1, 1] with the tiny autoencoders of FLUX.1 and others.

    Not in tiles, because diffusers' tiled encoder allocates 4 channels whatever the autoencoder.
    """
    vae = pipe.vae
    is_tiled, vae.use_tiling = vae.use_tiling, False
    try:
        latents = vae.encode(pixels).latents
    finally:
        vae.use_tiling = is_tiled
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def encode_qwen(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels [1, 3, H, W] in [-1, 1] for Qwen-Image and Krea 2.

    Their video autoencoder gets one frame, and each channel has its own mean and deviation.
    """
    config = pipe.vae.config
    latents = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    statistics = latents.new_tensor([config.latents_mean, config.latents_std])
    mean, deviation = statistics[:, :, None, None]
    return (latents - mean) / deviation


def encode_flux2(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pixels [1, 3, H, W] in [-1, 1] as FLUX.2's pipelines encode reference images.

    They are in the normalization of the transformer already.
    """
    return pipe._encode_vae_image(pixels, None)


VAE_ENCODERS = dict(
    zip(AUTOENCODERS, (encode_kl, encode_tiny, encode_qwen, encode_flux2), strict=True)
)


def check_refining(pipe) -> None:
    """Raise TypeError if a loaded pipeline cannot encode an image and refine it."""
    check_autoencoder(type(pipe).__name__, type(pipe.vae).__name__)
    family = family_of(transformer_and_controlnets(pipe)[0])
    if family.scheduler_makes_sigmas and pipe.scheduler.config.get("use_flow_sigmas"):
        raise TypeError(
            f"{type(pipe).__name__} ignores sigmas with a {type(pipe.scheduler).__name__}, "
            "expected FlowMatchEulerDiscreteScheduler for --multipass, --progressive and "
            "--init_image"
        )


def unpatchify(pipe, latents: torch.Tensor) -> torch.Tensor:
    """Return latents in full resolution: FLUX.2 keeps 2 x 2 positions in the channels of one."""
    method = getattr(pipe, "_unpatchify_latents", None)
    return method(latents) if method else latents


def radial_frequency(height: int, width: int) -> torch.Tensor:
    """Return f of every entry of `torch.fft.fft2`, in units of Nyquist: float64 [height, width]."""
    sides = (torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    return 2 * torch.hypot(*torch.meshgrid(*sides, indexing="ij"))


def radial_bins(height: int, width: int) -> torch.Tensor:
    """Return the bin of every frequency: int64 [height, width]; min(sides) // 2 is Nyquist."""
    return (radial_frequency(height, width) * (min(height, width) // 2)).round().long()


def mean_power_by_bin(power: torch.Tensor, bins: torch.Tensor, count: int) -> torch.Tensor:
    """Average power over the entries of each bin 0 .. count - 1.

    Args:
        power: power of every frequency, [..., h, w].
        bins: bin of every frequency, int64 [h, w]; entries of bins outside the range are ignored.
        count: number of bins.

    Returns:
        Mean power of each bin, [..., count].
    """
    bins = torch.where((bins >= 0) & (bins < count), bins, count).flatten()
    total = power.new_zeros(*power.shape[:-2], count + 1)
    total.index_add_(-1, bins, power.flatten(-2))
    return (total / bins.bincount(minlength=count + 1))[..., :count]


def power_spectrum(x: torch.Tensor) -> torch.Tensor:
    """Return the mean power in bins 1 .. Nyquist: [C, height, width] -> float64 [C, n].

    White noise of variance 1 has power 1. The transform runs on the CPU because some devices have
    no float64, and because every process must get the same values.
    """
    height, width = x.shape[-2:]
    power = torch.fft.fft2(x.cpu().double()).abs().square() / (height * width)
    return mean_power_by_bin(power, radial_bins(height, width) - 1, min(height, width) // 2)


def fit_power_law(
    power: torch.Tensor, min_frequency: float = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit C / f^omega by least squares over ln f; return C and omega: float64 [..., n] -> [...].

    Frequencies below `min_frequency`, in units of Nyquist, are ignored.
    """
    n = power.shape[-1]
    first = min(max(math.ceil(min_frequency * n), 1), n)
    log_f = torch.arange(first, n + 1, dtype=torch.float64).div(n).log()
    centered, power = log_f - log_f.mean(), power[..., first - 1 :]
    log_power = power.clamp(min=1e-12).log()  # because a constant image has power 0
    # The clamp gives slope 0 for a single bin.
    slope = (log_power * centered).sum(-1) / centered.square().sum().clamp(min=1e-12)
    return (log_power.mean(-1) - slope * log_f.mean()).exp(), -slope


def switch_sigma(c: float, omega: float, s: float) -> float:
    """Return the sigma above which noise hides every frequency that an image s times smaller lacks.

    The smaller image lacks frequencies from 1/s of the large image's Nyquist frequency on. At 1/s
    Eq. 11 has power (1 - t)^2 C s^omega of the image and t^2 of the noise. The returned t makes
    the first `VISIBLE_POWER_RATIO` times the second.

    Args:
        c: C of the image's power law C / f^omega.
        omega: exponent of the power law.
        s: ratio of the sides, above 1.
    """
    ratio = math.sqrt(c * s**omega / VISIBLE_POWER_RATIO)
    return ratio / (1 + ratio)


def missing_power(large: torch.Tensor, small: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Estimate the power that an upscaled image lacks at high frequencies.

    Images of two sizes have equal texture at equal fractions of their Nyquist frequencies. So
    beyond f = 1/s, where the upscaled image is empty, it should follow the power law that fits the
    small image over f >= 1/s. Each channel has its own law.

    Args:
        large: latents of the upscaled image, [C, h, w].
        small: latents of the image before upscaling by s, [C, h / s, w / s].

    Returns:
        C and omega of the law over all channels, and the missing power, [C, h, w].
    """
    height, width = large.shape[-2:]
    s, power = math.sqrt(height * width / small[0].numel()), power_spectrum(small)
    c, omega = (coefficient[:, None, None] for coefficient in fit_power_law(power, 1 / s))
    f, bins = radial_frequency(height, width), radial_bins(height, width)
    present = power_spectrum(large)[:, bins.clamp(1, min(height, width) // 2) - 1]
    missing = (c / f.clamp(min=1 / s) ** omega - present).clamp(min=0) * (f > 1 / s)
    mean_c, mean_omega = fit_power_law(power.mean(0), 1 / s)
    return float(mean_c), float(mean_omega), missing


def color_noise(noise: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """Add power at each frequency to white noise of variance 1: [..., h, w] each."""
    spectrum = torch.fft.fft2(noise.double()) * (1 + power).sqrt()
    return torch.fft.ifft2(spectrum).real.to(noise.dtype)


def noisy_latents(
    pipe,
    latents: torch.Tensor,
    sigma: float,
    seed: int,
    dtype: torch.dtype,
    extra_power: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x_t = (1 - t) x + t eps (paper Eq. 1), packed as the pipeline's `latents` argument.

    eps is the noise that the pipeline itself samples for this seed and size. So sigma = 1 gives the
    pipeline's own initial noise.

    Args:
        pipe: text-to-image pipeline.
        latents: x as `encode_latents` returns it, [1, C, h, w].
        sigma: t in [0, 1].
        seed: seed of the noise.
        dtype: dtype of the prompt embeddings, in which most pipelines sample noise.
        extra_power: power to add to x, [C, h, w] of `unpatchify` latents. Eq. 11 says how much of
            it x_t contains. It gets the phases of the noise.
    """
    packs = hasattr(pipe, "_pack_latents")  # Z-Image does not pack, and samples in float32
    patches = hasattr(pipe, "_patchify_latents")  # FLUX.2 packs its `latents` argument itself
    dtype = dtype if packs else torch.float32
    generator = torch.Generator("cpu").manual_seed(seed)
    eps = torch.randn(latents.shape, generator=generator, dtype=dtype).float()
    if extra_power is not None:
        eps = color_noise(unpatchify(pipe, eps), ((1 - sigma) / sigma) ** 2 * extra_power)
        eps = pipe._patchify_latents(eps) if patches else eps
    mixed = ((1 - sigma) * latents.float() + sigma * eps.to(latents.device)).to(dtype)
    return pipe._pack_latents(mixed, *mixed.shape) if packs and not patches else mixed
