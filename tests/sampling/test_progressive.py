"""Progressive passes: the sigma at which the full size begins, and its initial noise."""

import math

import pytest
import torch
from conftest import run, table
from test_multipass import BUILDS, SETTINGS, denoiser_calls, pipe, pixels, prompt_of  # noqa: F401

from dype import families, noise_schedule
from dype.sampling import latents, multipass, records, sample
from dype.sampling.latents import (
    color_noise,
    fit_power_law,
    missing_power,
    noisy_latents,
    power_spectrum,
    switch_sigma,
)
from dype.sampling.passes import progressive_passes, resolve_pass_sizes, scaled_side


def white_noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def power_law_noise(size, c: float, omega: float, cut: float = 9.0, seed=0) -> torch.Tensor:
    """Return noise with power C / f^omega up to f = cut and 0 beyond it, float64 [1, h, w]."""
    height, width = size
    f = latents.radial_frequency(height, width)
    amplitude = (c / f.clamp(min=1e-3) ** omega).sqrt() * (f <= cut) * (f > 0)
    spectrum = torch.fft.fft2(white_noise(1, height, width, seed=seed))
    return torch.fft.ifft2(spectrum * amplitude).real


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_spectrum_and_its_law(size):
    """White noise has power 1 in every bin; the fit recovers C and omega of colored noise."""
    assert (power_spectrum(white_noise(16, *size)).mean(0) - 1).abs()[4:].max() < 0.15
    samples = [power_law_noise(size, 0.2, 1.6, seed=seed) for seed in range(64)]
    power = power_spectrum(torch.cat(samples))
    c, omega = fit_power_law(power.mean(0))
    assert c == pytest.approx(0.2, rel=0.1)
    assert omega == pytest.approx(1.6, abs=0.1)
    exact = 0.3 / (torch.arange(1, 33, dtype=torch.float64) / 32) ** 1.25
    assert [float(value) for value in fit_power_law(exact)] == pytest.approx([0.3, 1.25])


def test_a_wave_is_in_its_bin():
    """Bins count cycles per token, so a wave has the same bin on both axes of a wide image."""
    x = torch.zeros(1, 32, 64, dtype=torch.float64)
    x[0] = torch.cos(2 * math.pi * 8 * torch.arange(64) / 64)  # 8 of 32 to Nyquist
    assert power_spectrum(x)[0].argmax() + 1 == 4  # of 16 bins
    x[0] = torch.cos(2 * math.pi * 4 * torch.arange(32) / 32)[:, None]
    assert power_spectrum(x)[0].argmax() + 1 == 4


def test_switch_sigma():
    """At 1/s Eq. 11 has VISIBLE_POWER_RATIO times the noise power; a larger s switches earlier."""
    for c, omega, s in ((0.2, 1.6, 4.0), (0.05, 2.0, 2.0)):
        t = switch_sigma(c, omega, s)
        image_power = (1 - t) ** 2 * c / (1 / s) ** omega
        assert image_power == pytest.approx(latents.VISIBLE_POWER_RATIO * t**2)
    assert switch_sigma(0.2, 1.6, 2.0) < switch_sigma(0.2, 1.6, 4.0) < 1


def test_missing_power():
    """Up to the small image's Nyquist no power is missing; beyond it, its law minus the power."""
    small, s = power_law_noise((32, 32), 0.2, 1.6).repeat(2, 1, 1), 4
    upscaled = power_law_noise((128, 128), 0.2, 1.6, cut=1 / s)
    large = torch.cat([upscaled, power_law_noise((128, 128), 0.2, 1.6)])
    c, omega, missing = missing_power(large, small)
    f = latents.radial_frequency(128, 128)
    assert (missing >= 0).all()
    assert not missing[:, f <= 1 / s].any()
    law = c / f.clamp(min=1 / s) ** omega
    high = (f > 1.1 / s) & (f < 1)
    assert (missing[0] / law)[high].mean() == pytest.approx(1, abs=0.05)
    assert (missing[1] / law)[high].mean() < 0.5  # because channel 1 has the power already


def test_color_noise():
    """The noise has power 1 plus the added power; without any it does not change."""
    noise, added = white_noise(32, 64, 64), latents.radial_frequency(64, 64).clamp(max=1) * 3
    assert torch.allclose(color_noise(noise, torch.zeros(64, 64)), noise)
    ratio = power_spectrum(color_noise(noise, added)) / power_spectrum(noise)
    expected = 1 + 3 * torch.arange(1, 33) / 32
    assert (ratio.mean(0) / expected - 1).abs().max() < 0.1


def test_noisy_latents_follow_eq_11():
    """x_t has power (1 - t)^2 (power of x + extra power) + t^2 in every bin."""
    z_image, t = BUILDS["z-image"](), 0.6  # because its latents keep rows and columns
    x, extra = torch.zeros(1, 16, 64, 64), torch.full((16, 64, 64), 2.0)
    power = power_spectrum(noisy_latents(z_image, x, t, 7, torch.float32, extra)[0]).mean(0)
    assert power[4:].mean() == pytest.approx((1 - t) ** 2 * 2 + t**2, rel=0.05)


def test_passes_in_a_pipeline(pipe, denoiser_calls, monkeypatch):  # noqa: F811
    """All steps run at 64 px; at full size only those with sigmas below the switch."""
    laws, family = [], families.family_of(pipe.transformer)
    family = families.family_of_pipeline(pipe, family)
    _, sigmas = noise_schedule.noise_schedule(pipe.scheduler, 128, 192, 6, family)
    switch = (sigmas[2] + sigmas[3]) / 2
    monkeypatch.setattr(sample, "switch_sigma", lambda *law: laws.append(law) or switch)
    passes = progressive_passes(128, 192, 64, steps=6)
    image = multipass.multipass(pipe, prompt_of(pipe), 128, 192, passes, **SETTINGS)
    assert image.size == (192, 128)
    scale = 64 / math.sqrt(128 * 192)
    small = tuple(scaled_side(side, scale) // 16 for side in (128, 192))
    assert [grid for _, grid in denoiser_calls] == [small] * 6 + [(8, 12)] * 3
    assert [sigma for sigma, _ in denoiser_calls[6:]] == pytest.approx(sigmas[3:6], abs=1e-5)
    [(c, _, s)] = laws
    assert c > 0
    assert s == pytest.approx(math.sqrt(8 * 12 / math.prod(small)))


def test_progressive_passes_need_a_larger_image():
    with pytest.raises(ValueError, match="progressive passes begin at 256x256 px, expected a larg"):
        progressive_passes(256, 256, 256, 20)
    [small, large] = progressive_passes(512, 1024, 256, 20)
    passes = resolve_pass_sizes([small, large], 512, 1024)
    assert (passes[0]["height"], passes[0]["width"]) == (176, 368)  # 256 x 256 px, to a token
    assert (passes[1]["height"], passes[1]["width"]) == (512, 1024)


SMALL = ["--model", "demo", "--size", "128", "--steps", "4", "--base_resolution", "64"]


def test_command_line(in_tmp_path, capsys, monkeypatch):
    """Name and record say the passes and their sigmas; --from generates the same pixels."""
    monkeypatch.setattr(sample, "switch_sigma", lambda *law: 0.7)
    assert run(*SMALL, "--progressive") == 0
    [name] = [line.split()[0] for line in capsys.readouterr().out.splitlines() if ".png" in line]
    assert "_multipass_progressive" in name
    record = records.read_record(name)
    first, second = record["passes"]
    assert (first["height"], len(first["sigmas"])) == (64, 5)
    assert (second["height"], second["strength"]) == (128, None)
    assert second["sigmas"] == pytest.approx([s for s in record["sigmas"] if s <= 0.7], abs=1e-6)
    assert run("--from", name, "--output", "again.png") == 0
    again = records.open_image("again.png")
    assert (pixels(again) == pixels(records.open_image(name))).all()


def test_in_a_sweep(in_tmp_path):
    arguments = ["--multipass", "single,progressive", "--seed", "0", "--output_dir", "out"]
    assert run(*SMALL, *arguments) == 0
    assert [row["multipass"] for row in table()] == ["single", "progressive"]


MISTAKES = {
    "--progressive --size 64": "progressive passes begin at 64x64 px, expected a larger image",
    "--progressive --init_image a.png": "--multipass is progressive, but --init_image is the first",
    "--progressive --pass2_strength 0.5": "--pass2_strength is for a --multipass of 2 passes",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes(flags, in_tmp_path, capsys):
    assert run(*SMALL, *flags.split()) == 2
    assert MISTAKES[flags] in capsys.readouterr().err
