"""docs/method.md: its Python prints what the comments say, and its numbers follow from formulas."""

import importlib
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from test_rope import CASES

from dype import DyPEConfig, apply_dype, remove_dype
from dype.families import DEMO_WEIGHTS, FAMILIES
from dype.figures import formulas
from dype.rope import (
    BETA,
    GAMMA,
    METHODS,
    axis_frequencies,
    build_axes,
    pair_index_of_turns,
    ramp_weights,
    stock_frequencies,
)

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "method.md").read_text()
AXES = {  # D, theta, L of the axes of an image
    "FLUX.1": formulas.FLUX,
    "Qwen-Image": (56, 10000.0, 83),
    "FLUX.2": (32, 2000.0, 64),
    "Z-Image": formulas.Z_IMAGE,
}
FLUX, QWEN = AXES["FLUX.1"], AXES["Qwen-Image"]
STEPS = 1 / (1 + (1 / np.linspace(1, 1 / 28, 28) - 1) / math.exp(1.15))  # sigmas at mu = 1.15


def says(text: str) -> None:
    assert text in " ".join(PAGE.split()), text


def table(first: str) -> list[list[str]]:
    """The rows of the table whose first heading is `first`, without their backticks."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |")) + 2
    end = lines.index("", start)
    return [[c.strip(" `") for c in line.strip("|").split("|")] for line in lines[start:end]]


def last_digit(text: str) -> float:
    """Half a unit of the last printed digit."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


def one_sided(axis: tuple, s: float, thresholds: tuple) -> np.ndarray:
    """f_i / theta_i of two ramps whose edges are clamped at one end only, for any thresholds."""
    dim, theta, trained = axis
    i = np.arange(dim // 2)

    def mask(r_hi, r_lo):
        pair = lambda r: dim * math.log(trained / (2 * math.pi * r)) / (2 * math.log(theta))  # noqa: E731
        low, high = max(0, math.floor(pair(r_hi))), min(dim // 2, math.ceil(pair(r_lo)))
        return 1 - np.clip((i - low) / (high - low + 0.001 * (high == low)), 0, 1)

    beta, gamma = mask(*thresholds[:2]), mask(*thresholds[2:])
    f = (1 - beta) / s + beta * s ** (-2 * i / (dim - 2))
    return f * (1 - gamma) + gamma


def ratios(name: str, t: float, axis: tuple = FLUX, s: float = 4, **settings) -> np.ndarray:
    """f_i / theta_i of a method, named as on the page."""
    config = DyPEConfig(name.removeprefix("dy_"), name.startswith("dy_"), **settings)
    return formulas.frequency_ratios(axis, t, config, s)


def test_python_prints_its_comments(capsys):
    """All blocks in one namespace, as a reader would run them; each method is in one."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    methods = {
        name for block in blocks for name in re.findall(r'^show\("(?:dy_)?(\w+)"', block, re.M)
    }
    for method in METHODS:
        assert method in methods, f"docs/method.md has no show(...) block for {method}"
    namespace = {}
    for block in blocks:
        exec(block, namespace)
        assert capsys.readouterr().out.splitlines() == re.findall(r"  # (.+)", block)


def test_tables_name_functions_and_tests():
    """Of `dype.rope` and test_rope.py, unless the row names another module or file.

    Every method and every embedder has a row.
    """
    tests = (ROOT / "tests" / "test_rope.py").read_text()
    says("193 rows of published code")
    assert len(CASES) == 193
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    methods = [[row[0], row[-1]] for row in table("function")]
    names = {name for functions, _ in methods for name in functions.split("`, `")}
    for method in METHODS:
        assert method in names, f"no row in the table Methods for {method}"
    start = PAGE.index("Embedders:")
    pattern = r"\| `(embedders\S+)` \| .+ \| `(\S+)` \|"
    rows_of_embedders = re.findall(pattern, PAGE[start:])
    names = {name.rpartition(".")[2] for name, _ in rows_of_embedders}
    for embedder in {family.embedder for family in FAMILIES.values()}:
        assert embedder in names, f"no row in the table Embedders for {embedder}"
    for functions, test in [*(row[-2:] for row in table("what")), *methods, *rows_of_embedders]:
        for function in functions.split("`, `"):
            module, _, name = (
                f"dype.{function if '.' in function else 'rope.' + function}".rpartition(".")
            )
            assert hasattr(importlib.import_module(module), name), function
        assert test in files or f"def {test}(" in tests, test


@pytest.mark.parametrize("row", table("model"), ids=lambda row: row[0])
def test_edges_of_the_authors_code_cross(row):
    """Where c(r t^2) passes n + 1: BETA's at first, GAMMA's at last; above, theirs is ours."""
    model, *printed = row
    dim, theta, trained = AXES[model]
    last = theta ** (-2 * (dim // 2 + 1) / dim)
    beta, gamma = (math.sqrt(trained / (2 * math.pi * r) * last) for r in (BETA[0], GAMMA[0]))
    between = np.linspace(gamma, beta, 202)[1:-1]
    off = [
        abs(formulas.authors_unclamped_yarn(AXES[model], t) / ratios("dy_yarn", t, AXES[model]) - 1)
        for t in between
    ]
    for value, text in zip((beta, 100 * np.max(off), gamma), printed, strict=True):
        text = text.removesuffix(" %")
        assert value == pytest.approx(float(text), abs=last_digit(text))
    for t in np.geomspace(beta * 1.0001, 1, 50):
        theirs = formulas.authors_unclamped_yarn(AXES[model], t)
        np.testing.assert_allclose(theirs, ratios("dy_yarn", t, AXES[model]), rtol=1e-12)
        thresholds = [r * t**2 for r in BETA + GAMMA]
        np.testing.assert_allclose(theirs, one_sided(AXES[model], 4, thresholds), rtol=1e-12)
    below = formulas.authors_unclamped_yarn(AXES[model], gamma * 0.9999)
    np.testing.assert_allclose(below, 1 / 4, rtol=1e-12)


def test_numbers():
    """How many pairs are stock, and how many at 1/4; the static forms; what never moves."""
    for name, *cells in table("method"):
        for t, cell in zip((1, 0.5, 0.1047), cells, strict=True):
            ratio = ratios(name, t)
            counts = [(abs(ratio - value) < 1e-12).sum() for value in (1, 1 / 4)]
            assert cell == f"{counts[0]}, {counts[1]}", (name, t)
    for name in ("yarn", "yarn_paper"):
        np.testing.assert_array_equal(ratios(name, 0.5), ratios(f"dy_{name}", 1))
    assert STEPS[-1] == pytest.approx(0.1047, abs=5e-5)
    for t in STEPS:
        np.testing.assert_allclose(ratios("dy_yarn_power", t)[9:], 1 / 4)


def test_power_forms_collapse():
    """With one-sided clamps to stock, from kappa = 3.823 on; ours keep stretching."""
    says("from kappa = 3.823 (FLUX), every pair is stock")
    for kappa, collapsed in ((3.8225, False), (3.8235, True), (8, True)):
        theirs = one_sided(FLUX, 4, [r**kappa for r in BETA + GAMMA])
        assert (theirs == 1).all() == collapsed
        ours = ratios("dy_yarn_power", 1.0, dype_scale=kappa)
        assert ours[-1] == 1 / 4
        if not collapsed:
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_start_sigma_of_the_ports():
    """ComfyUI's moves m alone: below it, lambda_s start^lambda_t gives their frequencies."""
    start, exponent = 0.6, 1.5
    for t in (0.05, 0.3, 0.6):
        config = DyPEConfig(
            "vision_yarn",
            dype_scale=2 * start**exponent,
            dype_exponent=exponent,
            dype_start_sigma=start,
        )
        f, m = axis_frequencies(*FLUX, 256, t, config)
        ours = (f / stock_frequencies(*FLUX[:2])).numpy()
        theirs = one_sided(FLUX, 4, [r ** (2 * t**exponent) for r in BETA + GAMMA])
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        assert m.item() == pytest.approx(1 + 0.1 * math.log(4) * (t / start) ** exponent)


def test_settings_of_the_ports():
    """ComfyUI's `yarn`: m = 1 + 0.1 ln s / sqrt(s); InvokeAI: the base times s^(kappa D/(D-2))."""
    a = 0.1 / math.sqrt(4)
    config = DyPEConfig("yarn_power", anisotropic=False, attention_scale=a)
    f, m = axis_frequencies(*FLUX, 128, 0.5, config, max_scale=4)
    theirs = one_sided(FLUX, 4, [r**0.5 for r in BETA + GAMMA])
    np.testing.assert_allclose(f / stock_frequencies(*FLUX[:2]), theirs, rtol=1e-12)
    assert m.item() == pytest.approx(1 + 0.1 * math.log(4) / math.sqrt(4))
    config = DyPEConfig("ntk", anisotropic=False)
    f, m = axis_frequencies(*FLUX, 128, 0.5, config, max_scale=4)
    scaled = 10000.0 * 4 ** (0.5 * 56 / 54)
    np.testing.assert_allclose(f, scaled ** -(torch.arange(0, 56, 2).double() / 56), rtol=1e-12)
    assert m == 1


def test_scripts_of_the_authors_for_qwen_image():
    """Whatever t is, they see 1 - t / 1000: now static, before February 2026 kappa = 2."""
    says("kappa stays above 0.998")
    for t in (1.0, 0.5, 0.02):
        seen = 1 - t / 1000
        assert 0.998 < seen**2 < 1
        for script, setting in (
            (DyPEConfig("yarn"), DyPEConfig("yarn", False)),
            (DyPEConfig("yarn_power"), DyPEConfig("yarn_power", dype_exponent=0)),
        ):
            theirs = axis_frequencies(*QWEN, 192, seen, script)
            ours = axis_frequencies(*QWEN, 192, t, setting)
            assert torch.equal(theirs[0], ours[0])
            assert torch.equal(theirs[1], ours[1])


def test_tables_in_bfloat16():
    """Of the ports on CUDA, for FLUX at row 255, over kappa = 2 t^2: every step rounded."""
    says("At row 255 (4096 px), angles of `yarn` and `vision_yarn` are off by up to 0.80 rad")

    def angles(dtype):
        exponent = torch.arange(0, 56, 2, dtype=dtype) / 56
        base, ntk = 1 / 10000.0**exponent, 1 / (10000.0 * 4 ** (56 / 54)) ** exponent
        flux = build_axes(*FLUX, [256], None, DyPEConfig())
        for kappa in 2 * np.linspace(0, 1, 41) ** 2:
            beta, gamma = (1 - ramp_weights(flux, flux.ramp_turns**kappa)).to(dtype)
            f = base / 4 * (1 - beta) + ntk * beta
            yield 255 * (f * (1 - gamma) + base * gamma).double()

    off = [
        abs(a - b).max() for a, b in zip(angles(torch.bfloat16), angles(torch.float64), strict=True)
    ]
    assert max(off).item() == pytest.approx(0.80, abs=0.005)


def test_ids_in_bfloat16():
    """320 rows become 289; 257 (4112 px) are exact, and from 258 on `base` is not stock."""
    says("320 become 289")
    says("by 1 % at 4128 px (one demo call)")
    assert len(torch.arange(320).bfloat16().unique()) == 289
    transformer = FluxTransformer2DModel.from_pretrained(
        DEMO_WEIGHTS, subfolder="transformer"
    ).eval()
    torch.manual_seed(0)
    text, pooled = torch.randn(1, 4, 128), torch.randn(1, 128)
    for rows, expected in ((257, 0.0), (258, 0.01)):
        ids = torch.zeros(rows, 8, 3)
        ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(8)
        call = {
            "hidden_states": torch.randn(1, rows * 8, transformer.config.in_channels),
            "guidance": torch.ones(1),
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": torch.tensor([0.5]),
            "img_ids": ids.view(-1, 3).bfloat16(),
            "txt_ids": torch.zeros(4, 3).bfloat16(),
            "return_dict": False,
        }
        with torch.no_grad():
            stock = transformer(**call)[0]
            apply_dype(transformer, DyPEConfig("base", shift="model"))
            ours = transformer(**call)[0]
        remove_dype(transformer)
        off = ((ours - stock).norm() / stock.norm()).item()
        assert off == pytest.approx(expected, abs=0.005 if expected else 1e-6)


def test_mu_of_the_authors_and_of_diffusers():
    says("3.23, 6.70 and 11.55 at 2048, 3072 and 4096 px")
    mu = [calculate_shift((side // 16) ** 2) for side in (2048, 3072, 4096)]
    assert mu == pytest.approx([3.23, 6.70, 11.55], abs=0.005)
    assert calculate_shift(65536, max_seq_len=65536) == pytest.approx(1.15)  # theirs, any size
    with pytest.raises(ZeroDivisionError):
        calculate_shift(256, max_seq_len=256)


def test_the_cost_of_copies_of_the_text():
    """For FLUX with 512 text tokens: at 4096 px 16 copies, at 2048 px 4."""
    says("16 copies are 12 % more tokens and 25 % more attention")
    says("at 2048 px 4 copies are 9 % and 19 %")
    for side, copies, tokens, attention in ((256, 16, 12, 25), (128, 4, 9, 19)):
        ratio = (side**2 + copies * 512) / (side**2 + 512)
        assert [round(100 * (x - 1)) for x in (ratio, ratio**2)] == [tokens, attention]


def test_the_factors_of_sega_and_its_ports():
    says("have k = s^(D/(D-2)), 4.21 at s = 4, where the authors have 15.57")
    assert round(4 ** (56 / 54), 2) == 4.21
    assert round(4 ** (112 / 54) / (1 + 0.1 * math.log(4)), 2) == 15.57
    says("they slow the last pair 4 times, not 14")
    assert round(1 / ratios("ntk", 1)[-1]) == 4
    assert round(1 / ratios("sega", 1)[-1]) == 14


def test_bins_of_sega_in_float32():
    says("6 of 96 at 192 tokens per side (3072 px), none at 128 and 256")
    for tokens, skipped in ((192, 6), (128, 0), (256, 0)):
        count = tokens // 2
        bins = (torch.linspace(0, 1, count + 1) * count).long().clamp(max=count - 1)
        assert count - len(bins.unique()) == skipped


def test_the_ramp_of_yarn_on_flux_and_on_the_demo():
    """docs/demo.md and the log's page on lambda have its beginning for 64, 32 and 16 tokens."""
    demo = (ROOT / "docs" / "demo.md").read_text()
    log = " ".join((ROOT / "docs" / "log" / "2026-11-22-lambda.md").read_text().split())
    begins = []
    for trained_tokens in (64, 32, 16):
        axis = build_axes(56, 10000.0, trained_tokens, [2 * trained_tokens], None, DyPEConfig())
        begins.append(pair_index_of_turns(axis, axis.ramp_turns)[0, 0].item())
        pi_share = ramp_weights(axis, axis.ramp_turns)[0]
        assert pi_share[int(begins[-1])] == 0
        assert pi_share[int(begins[-1]) + 1] > 0
    assert "begins at number 6 with FLUX's 64 tokens, at 4 with our 32" in demo
    assert [int(pair) for pair in begins] == [6, 4, 2]
    assert "pair 2.2 of 28 for L = 16 and pair 6.4 for 64" in log
    assert [f"{pair:.1f}" for pair in begins[::2]] == ["6.4", "2.2"]
    assert 1 / BETA[0] == 0.8  # of L, the wavelength
