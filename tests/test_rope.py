"""Frequencies of every method: published numbers, a transcription, claims of docs/method.md."""

import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch._dynamo.testing import CompileCounter

from dype import DyPEConfig
from dype.config import DEFAULT_LAMBDA_S, SCALE_PATHS
from dype.rope import (
    METHODS,
    axis_frequencies,
    batched_frequencies,
    build_axes,
    proportional_scale,
    scale,
    stock_frequencies,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "rope_reference.npz")
CASES = json.loads(str(GOLDEN["index"]))
STRETCHED = [name for name in METHODS if name != "base"]
CUTOFF_SETTINGS = {"cutoff": 2.5, "cutoff_width": 1.2, "spectrum_exponent": 1.6}
TAU = 0.1 * np.log(4) + 1  # attention factor m of the YaRN methods at s = 4
FLUX, Z_IMAGE = (56, 10000.0, 64), (48, 256.0, 64)  # dim, theta, trained tokens


def cos_sin(axis, tokens, positions, sigma, config, max_scale=None):
    """Return cos and sin of one axis, each value twice: float64 [2, positions, dim]."""
    f, m = axis_frequencies(*axis, tokens, sigma, config, max_scale)
    angle = torch.outer(torch.as_tensor(positions, dtype=torch.float64), f)
    both = torch.stack([angle.cos(), angle.sin()]) * m
    return both.repeat_interleave(2, -1).numpy()


def test_every_method_has_a_default_lambda_s():
    message = "config.DEFAULT_LAMBDA_S must have the names of rope.METHODS, in the same order"
    assert list(METHODS) == list(DEFAULT_LAMBDA_S), message


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_published_code_agrees(case):
    """The authors' code in both forms and ComfyUI's give our cos and sin (tests/golden/README.md).

    The tolerance is 1e-6.
    """
    method = "yarn_power" if case["form"] == "power" else case["method"]
    config = DyPEConfig(method, dype=bool(case["dype"]) or method == "vision_yarn")
    if case["kind"] == "axis":
        axis = case["dim"], case["theta"], case["base_tokens"]
        ours = cos_sin(axis, case["tokens"], case["positions"], case["sigma"], config)
    else:
        rows, (height, width) = np.array(case["rows"]) - case["text_tokens"], case["grid"]
        positions = [np.where(rows < 0, 0, rows // width), np.where(rows < 0, 0, rows % width)]
        largest = max(scale(64, height), scale(64, width))
        image_axes = [
            cos_sin(FLUX, tokens, axis_positions, case["sigma"], config, largest)
            for tokens, axis_positions in zip(case["grid"], positions, strict=True)
        ]
        first_axis = np.broadcast_to(np.array([1.0, 0.0])[:, None, None], (2, len(rows), 16))
        ours = np.concatenate([first_axis, *image_axes], -1)
    theirs = np.stack([GOLDEN[case["key"] + "_cos"], GOLDEN[case["key"] + "_sin"]])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


FURTHER_METHODS = {  # row of the golden file -> settings; the rows of `tide` have t in their name
    "ratio sega base s^(2D/(D-2))/(1+.1 ln s)": {"method": "sega"},
    "ratio imax: max(ntk 10, 1/s)": {"method": "imax"},
    "ratio rdfc k=7 (paper Eq. 8, N=64)": {"method": "rdfc"},
    "ratio rdfc k=9 (authors FLUX, Eq. 8)": {"method": "rdfc", "rdfc_pairs": "9"},
    "ratio rdfc k=9, 0.85 (authors FLUX code)": {
        "method": "rdfc", "rdfc_pairs": "9", "rdfc_turns": 0.85,
    },
    "ratio riflex k=7, 0.9": {"method": "riflex"},
    "ratio resonance + yarn static": {"method": "resonance"},
}  # fmt: skip


@pytest.mark.parametrize("s", [2, 4])
def test_published_formulas_agree(s):
    """The further methods give the golden ratios and m of a FLUX axis at 2x and 4x.

    The tolerance is 1e-12.
    """
    path = Path(__file__).parent / "golden" / f"methods_flux_{s}x.json"
    golden, theta = json.loads(path.read_text()), stock_frequencies(*FLUX[:2])
    for row, settings in FURTHER_METHODS.items():
        f, _ = axis_frequencies(*FLUX, 64 * s, 0.3, DyPEConfig(dype=False, **settings))
        np.testing.assert_allclose(f / theta, golden[row], rtol=1e-12)
    for t in (1, 0.5, 0.1047):
        f, m = axis_frequencies(*FLUX, 64 * s, t, DyPEConfig("tide"))
        np.testing.assert_allclose(f / theta, golden[f"ratio tide frequencies t={t}"], rtol=1e-12)
        np.testing.assert_allclose(m, golden[f"m tide (raw frequency) t={t}"], rtol=1e-12)
        _, m = axis_frequencies(*FLUX, 64 * s, t, DyPEConfig("pi", attention_path="tide"))
        np.testing.assert_allclose(m, golden[f"m tide (raw frequency) t={t}"], rtol=1e-12)


def test_proportional_attention():
    """Golden numbers of FLUX with 512 text tokens at 2048 and 4096 px."""
    for side, m in ((64, 1.0), (128, 1.0365), (256, 1.0710)):
        assert proportional_scale(side**2 + 512, 4608) == pytest.approx(m, abs=5e-5)


def test_the_dominant_pair():
    """By the rule k is 7 on FLUX, 5 on FLUX.2, 8 on Krea 2, 10 on Z-Image, 8 on Qwen-Image."""
    axes = {FLUX: 7, (32, 2000.0, 64): 5, (48, 1000.0, 64): 8, Z_IMAGE: 10, (56, 10000.0, 83): 8}
    for axis, pair in axes.items():
        config = DyPEConfig("rdfc", dype=False)
        f, _ = axis_frequencies(*axis, 4 * axis[2], 1.0, config)
        assert (f != stock_frequencies(*axis[:2])).nonzero().flatten().tolist() == [pair]


def test_pairs_that_are_slower_already():
    """`rdfc` never speeds a pair up: at 1.5x pair 9 of FLUX makes less than a turn, and stays."""
    config = DyPEConfig("rdfc", dype=False, rdfc_pairs="9,7")
    f, _ = axis_frequencies(*FLUX, 96, 1.0, config)
    theta = stock_frequencies(*FLUX[:2])
    assert (f != theta).nonzero().flatten().tolist() == [7]
    assert f[7].item() == pytest.approx(2 * np.pi / 96, rel=1e-14)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dype", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_transcription_agrees(method, dynamic):
    """The frequencies equal tests/reference.py over axes, scales, sigmas and settings."""
    for axis in (FLUX, Z_IMAGE, (32, 2000.0, 83)):
        for tokens in (axis[2] * 5 // 4, axis[2] * 4, axis[2] * 6 + 1):
            for sigma in (0.0, 0.005, 0.03, 0.105, 0.5, 0.95):
                for scales in ({}, {"dype_scale": 1.5, "dype_exponent": 0.5}, {"dype_scale": 0.0}):
                    config = DyPEConfig(method, dynamic, dype_start_sigma=0.9, **scales)
                    expected, m = reference.frequencies(
                        method,
                        *axis,
                        tokens,
                        sigma,
                        7.0,
                        lambda_s=config.lambda_s,
                        lambda_t=config.dype_exponent,
                        t_start=0.9,
                        dynamic=dynamic,
                    )
                    ours, our_m = axis_frequencies(*axis, tokens, sigma, config, 7.0)
                    np.testing.assert_allclose(ours, expected, rtol=1e-12)
                    np.testing.assert_allclose(our_m, m, rtol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_no_stretch_is_stock(method):
    """At s <= 1 on every axis the frequencies are stock, bit for bit, at every sigma."""
    for tokens in (1, 40, 64):
        for sigma in (0.0, 0.4, 1.0):
            f, m = axis_frequencies(*FLUX, tokens, sigma, DyPEConfig(method))
            assert torch.equal(f, stock_frequencies(56, 10000.0))
            assert m == 1


@pytest.mark.parametrize("method", [m for m in STRETCHED if m not in ("yarn_both", "cutoff")])
def test_kappa_one_is_static(method):
    """At t = 1 and lambda_s = 1 a dynamic method equals its static form, bit for bit.

    There u = 1 and kappa = 1, as in the static form. Two methods are left out. The dynamic form of
    `yarn_both` has twice the kappa in its NTK term, and the static form does not. `cutoff` has no
    kappa, and its static form is that of u = 1/2.
    """
    dynamic, m = axis_frequencies(*FLUX, 256, 1.0, DyPEConfig(method, dype_scale=1.0))
    static, static_m = axis_frequencies(*FLUX, 256, 0.3, DyPEConfig(method, dype=False))
    assert torch.equal(dynamic, static)
    assert torch.equal(m, static_m)


def test_settings_of_the_cutoff_agree():
    """`cutoff` with other constants equals tests/reference.py, dynamic and static."""
    for axis in (FLUX, Z_IMAGE):
        for dynamic, sigma in product((True, False), (0.0, 0.2, 0.9, 0.99)):
            config = DyPEConfig("cutoff", dynamic, dype_exponent=0.7, **CUTOFF_SETTINGS)
            settings = {"lambda_s": 1.0, "lambda_t": 0.7, "dynamic": dynamic}
            settings |= {"c": 2.5, "width": 1.2, "omega": 1.6}
            expected, m = reference.frequencies("cutoff", *axis, 200, sigma, **settings)
            ours, our_m = axis_frequencies(*axis, 200, sigma, config)
            np.testing.assert_allclose(ours, expected, rtol=1e-12)
            assert our_m.item() == pytest.approx(m, rel=1e-14)


def test_a_cutoff_from_end_to_end():
    """`cutoff` is PI at t = 1 and stock at t = 0, bit for bit, and continuous between.

    At t = 1/2 it equals the static method.
    """
    for axis in (FLUX, Z_IMAGE, (56, 10000.0, 16)):
        for settings in ({}, CUTOFF_SETTINGS):
            config = DyPEConfig("cutoff", **settings)
            sigmas = torch.linspace(0, 1, 401, dtype=torch.float64)
            f = [axis_frequencies(*axis, 3 * axis[2], t, config)[0] for t in sigmas]
            theta = stock_frequencies(*axis[:2])
            assert torch.equal(f[-1], theta / 3)
            assert torch.equal(f[0], theta)
            # because a schedule in float32 may round sigma out of [0, 1]
            for end, sigma in ((-1, 1 + 1e-7), (0, -1e-9)):
                outside = axis_frequencies(*axis, 3 * axis[2], sigma, config)[0]
                torch.testing.assert_close(outside, f[end], rtol=1e-6, atol=0)
            static = axis_frequencies(*axis, 3 * axis[2], 0.9, replace(config, dype=False))[0]
            halfway = axis_frequencies(*axis, 3 * axis[2], 0.5, config)[0]
            torch.testing.assert_close(halfway, static, rtol=1e-15, atol=0)
            stretch = (theta / torch.stack(f)).log() / np.log(3)  # w, in [0, 1]
            # at t = 0.05 and 0.95 the slope of w is 2 / (omega delta) / (t (1 - t)), at most 42
            assert stretch.diff(dim=0)[20:-20].abs().max() < 42.2 / 400


@pytest.mark.parametrize("path", SCALE_PATHS)
@pytest.mark.parametrize("method", METHODS)
def test_attention_scale(method, path):
    """attention_scale sets m of every method but `base`, and leaves the frequencies.

    Without a stretch m stays 1.
    """
    for dynamic, tokens, sigma in product((True, False), (64, 96, 256), (0.0, 0.3, 0.9)):
        plain = DyPEConfig(method, dynamic, dype_start_sigma=0.8)
        config = replace(plain, attention_scale=0.4, attention_path=path)
        f, m = axis_frequencies(*FLUX, tokens, sigma, config)
        _, expected = reference.frequencies(
            method,
            *FLUX,
            tokens,
            sigma,
            lambda_s=1.0,
            attention_scale=0.4,
            attention_path=path,
            t_start=0.8,
            dynamic=dynamic,
        )
        np.testing.assert_allclose(m, expected, rtol=1e-14)
        assert torch.equal(f, axis_frequencies(*FLUX, tokens, sigma, plain)[0])


@pytest.mark.parametrize("method", ["pi", "cutoff"])
def test_one_graph_serves_every_sigma(method):
    counter, config = CompileCounter(), DyPEConfig(method)
    axis = build_axes(*FLUX, [128, 256], None, config)
    compiled = torch.compile(partial(batched_frequencies, axis), backend=counter, fullgraph=True)
    for t in (1.0, 0.7, 0.01, 0.0):
        sigma = torch.tensor(t, dtype=torch.float64)
        for result, expected in zip(
            compiled(sigma, config), batched_frequencies(axis, sigma, config), strict=True
        ):
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", METHODS)
def test_sigma_a_little_outside(method):
    """As roundings may leave it: t > 1 is t = 1 and t < 0 is t = 0, bit for bit, at any start."""
    for start, exponent in ((1.0, 2.0), (1.0, 0.5), (0.8, 0.5)):
        plain = DyPEConfig(method, dype_start_sigma=start, dype_exponent=exponent)
        rising = replace(plain, attention_scale=0.4, attention_path="rising")
        for config in (plain, rising):
            for outside, end in ((1.0000001, 1.0), (1.002, 1.0), (-1e-9, 0.0)):
                sigma = torch.tensor(outside, dtype=torch.float64)
                f, m = axis_frequencies(*FLUX, 256, sigma, config)
                f_end, m_end = axis_frequencies(*FLUX, 256, end, config)
                assert torch.equal(f, f_end), (config, outside)
                assert torch.equal(m, m_end), (config, outside)


def test_at_the_end_of_sampling():
    """At t = 0, where kappa = 0, the frequencies are stock, and the YaRN methods keep their m.

    The power forms differ: every threshold r becomes r^0 = 1 turn. Only the 8 pairs that make more
    than one turn over L are stock. The m of `vision_yarn` is 1.
    """
    theta = stock_frequencies(56, 10000.0)
    at_zero = {name: axis_frequencies(*FLUX, 256, 0.0, DyPEConfig(name)) for name in STRETCHED}
    assert all(f.isfinite().all() for f, _ in at_zero.values())
    for name, m in {"pi": 1, "ntk": 1, "ntk_mult": 1, "yarn": TAU, "yarn_both": TAU,
                    "yarn_paper": TAU}.items():  # fmt: skip
        assert torch.equal(at_zero[name][0], theta), name
        assert at_zero[name][1] == m, name
    for name in ("yarn_power", "vision_yarn"):
        assert (at_zero[name][0] == theta).sum() == 8, name
    assert at_zero["vision_yarn"][1] == 1


@pytest.mark.parametrize("axis", [FLUX, Z_IMAGE, (56, 10000.0, 16)])
@pytest.mark.parametrize(
    "method", ["pi", "ntk", "ntk_mult", "tasr", "yarn", "yarn_paper", "cutoff"]
)
def test_frequencies_fall_with_the_noise(method, axis):
    """No frequency rises with t, even at small t, where the authors' ramp reverses."""
    sigmas = torch.linspace(0, 1, 401, dtype=torch.float64)
    config = DyPEConfig(method)
    f = torch.stack([axis_frequencies(*axis, 4 * axis[2], t, config)[0] for t in sigmas])
    assert (f.diff(dim=0) <= 1e-15).all()
    assert (f[0] > f[-1]).any()


def test_last_pair_of_dynamic_ntk():
    """The last pair of `ntk` has the frequency theta_{n-1} / s^kappa (Eq. 15)."""
    theta = stock_frequencies(56, 10000.0)
    for sigma in (0.1, 0.5, 1.0):
        f, _ = axis_frequencies(*FLUX, 256, sigma, DyPEConfig("ntk"))
        assert f[-1].item() == pytest.approx(theta[-1].item() / 4 ** (2 * sigma**2), rel=1e-14)
        assert f[0] == theta[0]


def test_ntk_between_the_bands():
    """Pair 6 at s = 4, t = 0.5 follows the NTK variants of Table 7.

    The static pair has theta / 4^(12/54). With dynamic NTK alone, kappa = 2 t^2 = 1/2 gives
    theta / 4^(6/54), because the bands stay. In `yarn_both` the bands move too, and pair 6 lies
    halfway on the ramp to stock.
    """
    ratio = {
        name: axis_frequencies(*FLUX, 256, 0.5, DyPEConfig(name))[0][6]
        / stock_frequencies(56, 10000.0)[6]
        for name in ("yarn_ntk_only", "yarn_both")
    }
    assert ratio["yarn_ntk_only"].item() == pytest.approx(4 ** (-6 / 54), rel=1e-12)
    half = 1 - (6 - 2) / (10 - 2)  # the thresholds (16, 2) kappa have the edges 2 and 10
    both = 4 ** (-6 / 54) * (1 - half) + half
    assert ratio["yarn_both"].item() == pytest.approx(both, rel=1e-12)


def test_ends_of_the_time_aware_baseline():
    """TASR is PI at t = 1, except for pair 0, and NTK with base theta s at t = 0."""
    theta = stock_frequencies(56, 10000.0)
    noise, image = (axis_frequencies(*FLUX, 256, t, DyPEConfig("tasr"))[0] for t in (1.0, 0.0))
    np.testing.assert_allclose(noise[1:], theta[1:] / 4, rtol=1e-14)
    np.testing.assert_allclose(image, stock_frequencies(56, 40000.0), rtol=1e-13)


def test_cutoffs_of_the_authors():
    """The edges of both bands equal the authors' at s = 4, where their ramps are well-formed."""
    theta = stock_frequencies(56, 10000.0)
    for sigma, gamma_low, beta_high in ((1.0, 0, 8), (0.5, 2, 13), (0.1047, 12, 22)):
        f, _ = axis_frequencies(*FLUX, 256, sigma, DyPEConfig("yarn"))
        ratio = f / theta
        assert (ratio == 1).nonzero().max() == gamma_low
        assert (ratio[beta_high:] - 0.25).abs().max() < 1e-12
        assert ratio[beta_high - 1] > 0.25 + 1e-6


def test_scales_of_a_non_square_image():
    """Each axis has its own s; with anisotropic=False all axes have the largest."""
    shorter = axis_frequencies(*FLUX, 128, 0.5, DyPEConfig("ntk"), max_scale=4.0)[0]
    alone = axis_frequencies(*FLUX, 128, 0.5, DyPEConfig("ntk"))[0]
    largest = axis_frequencies(*FLUX, 128, 0.5, DyPEConfig("ntk", anisotropic=False), 4.0)[0]
    assert torch.equal(shorter, alone)
    assert torch.equal(largest, axis_frequencies(*FLUX, 256, 0.5, DyPEConfig("ntk"))[0])
    sigma = torch.tensor(0.5, dtype=torch.float64)
    config = DyPEConfig("yarn", anisotropic=False)
    both, m = batched_frequencies(build_axes(*FLUX, [128, 256], None, config), sigma, config)
    f, scale = axis_frequencies(*FLUX, 256, 0.5, DyPEConfig("yarn"))
    assert torch.equal(both, f.expand(2, -1))
    assert torch.equal(m, scale.expand(2, 1))
    f, m = axis_frequencies(*FLUX, 64, 0.5, DyPEConfig("vision_yarn"), max_scale=4.0)
    assert not torch.equal(f, stock_frequencies(56, 10000.0))
    assert m > 1


def test_sigma_may_be_a_tensor():
    for sigma in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        f, m = axis_frequencies(*FLUX, 256, sigma, DyPEConfig("yarn"))
        assert f.dtype == m.dtype == torch.float64
        assert (f.shape, m.shape) == ((28,), ())
    assert torch.equal(f, axis_frequencies(*FLUX, 256, 0.3, DyPEConfig("yarn"))[0])


@pytest.mark.parametrize("method", METHODS)
def test_finite_at_the_ends_of_every_setting(method):
    """Frequencies are finite where both edges of a band meet, at pair 0 or at pair n."""
    for lambda_s in (0, 1, 8) if DEFAULT_LAMBDA_S[method] else (None,):
        for t in (0.0, 1e-6, 0.3, 1.0):
            f, m = axis_frequencies(*FLUX, 256, t, DyPEConfig(method, dype_scale=lambda_s))
            assert f.isfinite().all()
            assert m.isfinite().all()
