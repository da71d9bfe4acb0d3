"""The figures: each one renders, and the lines and maps have the right values."""

import importlib
import json
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import generate_latents
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from dype import rope
from dype.config import DyPEConfig
from dype.demo import trajectories
from dype.demo.experiments import SCALING_SETTINGS
from dype.figures import __main__ as figures
from dype.figures import formulas, image_rows, saved_numbers, style
from dype.sampling import records
from dype.sampling.latents import power_spectrum
from dype.sweep import results

ROOT = Path(__file__).parents[2]
SAVED = ROOT / saved_numbers.TRAJECTORIES
SIGMAS = """1 .9884 .9762 .9634 .9499 .9356 .9205 .9045 .8876 .8696 .8504 .8300 .8081 .7847 .7595
    .7324 .7031 .6714 .6370 .5994 .5582 .5128 .4627 .4071 .3448 .2748 .1955 .1047"""


def make_axes():
    return Figure().subplots()


def mesh_values(mesh) -> np.ma.MaskedArray:
    """Return the values of a heat map, [rows, columns]."""
    rows, columns, _ = (n - 1 for n in mesh.get_coordinates().shape)
    return mesh.get_array().reshape(rows, columns)


def lines_by_label(axes) -> dict:
    """Return x and y of the lines by label."""
    return {line.get_label(): line.get_data() for line in axes.lines}


# S(f, 0) over the noise -> gamma at t = 0.25, 0.5, 0.75
ANCHORS = {
    1e4: (0.062, 0.151, 0.301),
    1e3: (0.083, 0.201, 0.400),
    1e2: (0.125, 0.299, 0.583),
    1e-2: (0.417, 0.701, 0.875),
    1e-3: (0.600, 0.799, 0.917),
}


def test_progress_map_at_the_anchors():
    """Eq. 12 in the first panel of fig2b, whose power falls from 100 to 0.01."""
    mesh = saved_numbers.fig2b(SAVED).axes[0].collections[0]
    x, y = mesh.get_coordinates()[..., 0][0], mesh.get_coordinates()[..., 1][:, 0]
    t, f = (x[1:] + x[:-1]) / 2, np.sqrt(y[1:] * y[:-1])
    for power, row in ((1e2, 0), (1e-2, -1)):
        assert f[row] == pytest.approx(math.sqrt(0.01 / power))
        for sigma, expected in zip((0.25, 0.5, 0.75), ANCHORS[power], strict=True):
            column = abs(t - sigma).argmin()
            assert t[column] == pytest.approx(sigma)
            assert mesh_values(mesh)[row, column] == pytest.approx(expected, abs=5e-4)


def test_progress_at_all_anchors():
    power, t = np.array([*ANCHORS])[:, None], np.array([0.25, 0.5, 0.75])
    gamma = formulas.progress(formulas.noisy_power(power, t), power, 1.0)
    mesh = formulas.draw_progress(make_axes(), power[:, 0], t, gamma)
    assert np.abs(mesh_values(mesh) - np.array([*ANCHORS.values()])).max() < 6e-4


def test_singular_row_is_masked():
    """Exactly where signal and noise are within a factor of 1.5."""
    mesh = saved_numbers.fig2b(SAVED).axes[0].collections[0]
    y = mesh.get_coordinates()[..., 1][:, 0]
    power = 0.01 / (y[1:] * y[:-1])
    hidden = np.ma.getmaskarray(mesh_values(mesh))
    near = (power < 1.5) & (power > 1 / 1.5)
    assert near.sum() > 5
    assert (hidden == near[:, None]).all()
    assert np.isnan(formulas.progress(0.5, 1.0, 1.0))


def test_spectra_against_a_transcription():
    """The lines are those of Eq. 11, and in the last panel those of the saved numbers."""
    figure = saved_numbers.fig2a(SAVED)
    images = [image for image in json.loads(SAVED.read_text())["pictures"] if image["size"] == 512]
    t = images[0]["sigmas"]
    mean = [
        [sum(image["spectra"][i][k] for image in images) / len(images) for k in range(32)]
        for i in range(len(t))
    ]
    for axes in figure.axes[:3]:
        assert len(axes.lines) == len(t) + 1
    for i, sigma in enumerate(t):
        f, power = figure.axes[0].lines[i].get_data()
        expected = [(1 - sigma) ** 2 * 0.01 / x**2 + sigma**2 for x in f]
        assert np.allclose(power, expected, rtol=1e-12)
        eq11 = [(1 - sigma) ** 2 * x + sigma**2 for x in mean[-1]]
        assert np.allclose(figure.axes[1].lines[i].get_ydata(), eq11, rtol=1e-12)
        assert np.allclose(figure.axes[2].lines[i].get_ydata(), mean[i], rtol=1e-12)
    f, guide = figure.axes[2].lines[-1].get_data()
    slope, intercept, *_ = stats.linregress(np.log(f), np.log(mean[-1]))
    assert np.allclose(np.log(guide), intercept + slope * np.log(f))
    assert f[-1] == 1


def test_sampled_map():
    """Eq. 12 of the saved spectra; t runs from 1 on the left to 0 on the right."""
    axes = saved_numbers.fig2b(SAVED).axes[2]
    gamma = mesh_values(axes.collections[0])
    _, _, mean = saved_numbers.mean_spectra(SAVED)
    expected = np.log(mean[10] / mean[-1]) / np.log(mean[0] / mean[-1])
    keep = ~np.ma.getmaskarray(gamma)[:, 10]
    assert keep.sum() > 8
    assert np.allclose(gamma[keep, 10], expected[keep])
    assert (gamma[keep, 0] == 1).all()
    assert (gamma[keep, -1] == 0).all()
    assert axes.get_xlim() == (1, 0)


def test_departure_from_eq_11():
    """eq11: the saved spectra over (1 - t)^2 S(0) + t^2 S(1) depart from 1 under guidance."""
    figure = saved_numbers.eq11(ROOT / saved_numbers.TRAJECTORIES, ROOT / saved_numbers.UNGUIDED)
    peaks = []
    for axes, path in zip(
        figure.axes, (saved_numbers.TRAJECTORIES, saved_numbers.UNGUIDED), strict=True
    ):
        _, t, mean = saved_numbers.mean_spectra(ROOT / path)
        lowest = lines_by_label(axes)["1/32"][1]
        for i, sigma in enumerate(t):
            eq11 = (1 - sigma) ** 2 * mean[-1, 0] + sigma**2 * mean[0, 0]
            assert lowest[i] == pytest.approx(mean[i, 0] / eq11)
        peaks.append(max(np.abs(np.subtract(line.get_ydata(), 1)).max() for line in axes.lines))
    assert [axes.get_title() for axes in figure.axes] == ["guidance 2.5", "guidance 1"]
    assert peaks == pytest.approx([0.20, 0.053], abs=0.003)  # as docs/reproduce.md has it


def panel_ratios(axis, name, t) -> np.ndarray:
    """Return f_i / theta_i at one sigma, as a panel of `ratios` has them."""
    edges = np.array([math.sqrt(t) - 1e-9, math.sqrt(t) + 1e-9])
    return mesh_values(formulas.draw_ratios(make_axes(), axis, name, edges))[:, 0]


QUARTER = 0.25
YARN_STATIC = (1, 0.99, 0.961, 0.914, 0.851, 0.774, 0.735, 0.474)
RATIOS = {  # method, t -> the ratios of the first pairs, to 3 digits; 1/4 from there on
    ("yarn", 1.0): YARN_STATIC,
    ("yarn", 0.5): (1, 1, 1, 0.982, 0.954, 0.915, 0.867, 0.811, 0.747, 0.676, 0.598, 0.462, 0.347),
    ("yarn", 0.1047): (*[1] * 13, 0.93, 0.854, 0.77, 0.68, 0.584, 0.483, 0.377, 0.358, 0.295),
    ("yarn_power", 1.0): (1, 0.983, 0.935, 0.857, 0.814, 0.774, 0.614, 0.474, 0.353),
    ("yarn_power", math.sqrt(0.5)): YARN_STATIC,
    ("yarn_power", 0.1047): (*[1] * 7, 0.849),
}


@pytest.mark.parametrize("case", RATIOS, ids=str)
def test_ratios_at_the_anchors(case):
    """Both published forms of dynamic YaRN have these ratios on FLUX at s = 4."""
    ratios, expected = panel_ratios(formulas.FLUX, *case), RATIOS[case]
    assert np.abs(ratios[: len(expected)] - expected).max() < 6e-4
    assert np.abs(ratios[len(expected) :] - QUARTER).max() < 1e-12


def test_ratios_of_the_printed_yarn():
    start, end = (panel_ratios(formulas.FLUX, "yarn_paper", t) for t in (1.0, 0.1047))
    assert start[0] == pytest.approx(0.472, abs=5e-4)
    assert (abs(start - QUARTER) < 1e-9).sum() == 20
    assert (end == 1).sum() == 11
    assert (abs(end - QUARTER) < 1e-9).sum() == 7


@pytest.mark.parametrize(
    ("t", "beta", "gamma"),
    [(1, (6, 8), (0, 5)), (0.5, (10, 13), (2, 10)), (0.1047, (20, 22), (12, 19))],
)
def test_cutoffs(t, beta, gamma):
    """The last pair where a mask of the kappa form is 1, and the first pair where it is 0."""
    axis = rope.build_axes(*formulas.FLUX, [256], None, DyPEConfig())
    masks = 1 - rope.ramp_weights(axis, axis.ramp_turns * t**2)
    for mask, (low, high) in zip(masks, (beta, gamma), strict=True):
        assert (mask == 1).nonzero().max() == low
        assert (mask == 0).nonzero().min() == high


@pytest.mark.parametrize(("axis", "last"), [(formulas.FLUX, 0.0068), (formulas.Z_IMAGE, 0.044)])
def test_unclamped_ramp_collapses(axis, last):
    """Every pair becomes PI once GAMMA's edges have crossed; at larger t all ratios are `yarn`'s.

    BETA's edges cross at a larger t (tests/test_method_page.py).
    """
    for t in (1e-3, last / 2, last - 5e-4):
        assert np.abs(panel_ratios(axis, "yarn, unclamped", t) - QUARTER).max() < 1e-12
    assert np.abs(panel_ratios(axis, "yarn", 1e-3) - 1).max() < 1e-12
    assert (panel_ratios(axis, "yarn, unclamped", last + 5e-4) > 0.9).any()
    for t in (0.1, 0.5, 1.0) if axis == formulas.FLUX else (0.2, 0.5, 1.0):
        unclamped, clamped = (panel_ratios(axis, name, t) for name in ("yarn, unclamped", "yarn"))
        assert np.abs(unclamped - clamped).max() < 1e-12


def test_ratios_show_every_method_and_the_steps(monkeypatch, tmp_path):
    """Both models have all panels; FLUX's have the 28 steps of an image at mu = 1.15."""
    panels, draw_ratios = [], formulas.draw_ratios

    def draw_coarse_ratios(axes, axis, name, edges):
        panels.append((axis, name))
        return draw_ratios(axes, axis, name, edges[::40])

    monkeypatch.setattr(formulas, "draw_ratios", draw_coarse_ratios)
    figure = formulas.ratios()
    names = [*rope.METHODS, "yarn, unclamped"]
    models = formulas.FLUX, formulas.Z_IMAGE
    assert panels == [(axis, name) for axis in models for name in names]
    expected = [float(word) for word in SIGMAS.split()]
    for axes in figure.subfigs[0].axes[: len(names)]:
        marks = axes.lines[0].get_xdata() ** 2
        assert np.abs(marks - expected).max() < 5.1e-5
    assert not figure.subfigs[1].axes[0].lines
    style.save(figure, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 10_000
    assert figure.subfigs[0].axes[0].get_xlim() == (1, 0)


def test_wavelengths():
    """fig7: tokens on the left, ratio to RoPE's on the right; s = 4, dynamic forms at t = 0.5."""
    figure = formulas.fig7()
    left, right = map(lines_by_label, figure.axes[:2])
    rope_waves = np.array([2 * math.pi * 10000 ** (2 * i / 56) for i in range(28)])
    expected = {
        "RoPE": rope_waves,
        "PI": 4 * rope_waves,
        "NTK": [wave * 4 ** (2 * i / 54) for i, wave in enumerate(rope_waves)],
        "dynamic PI, t = 0.5": 2 * rope_waves,
        "dynamic NTK, t = 0.5": [wave * 2 ** (2 * i / 54) for i, wave in enumerate(rope_waves)],
        "time-aware (TASR), t = 0.5": [
            wave / max(4 ** (-2 * i / 28.5), 0.25) for i, wave in enumerate(rope_waves)
        ],
    }
    for label, waves in expected.items():
        assert np.allclose(left[label][1], waves, rtol=1e-12), label
        assert np.allclose(right[label][1], waves / rope_waves, rtol=1e-12), label
    yarn = 1 / right["dynamic YaRN, t = 0.5"][1]
    assert np.abs(yarn[:13] - RATIOS["yarn", 0.5]).max() < 6e-4


def test_sinusoids():
    """fig6: a wave of period P is cos(2 pi x / P); its marks lie on it, hollow beyond 4096."""
    kappas = 2 * 0.04, 2 * 0.64  # at t = 0.2 and 0.8
    periods = [(512, 4096), (1024, 8192), (512, 8192)]
    periods += [(512, 4096 * 2**kappa) for kappa in kappas]
    for axes, (fast, slow) in zip(formulas.fig6().axes, periods, strict=True):
        for line, period in zip(axes.lines, (fast, slow, slow, slow), strict=True):
            x, y = line.get_data()
            assert np.allclose(y, np.cos(2 * np.pi * x / period), atol=1e-9)
        assert axes.lines[2].get_xdata().max() == 4096
        assert axes.lines[3].get_xdata().min() > 4096
        assert axes.lines[3].get_markerfacecolor() == "white"


def test_entropy():
    """1 for uniform attention, 0 for attention to one key, else the value of scipy."""
    key = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    assert trajectories.normalized_entropy(torch.zeros_like(key), key) == pytest.approx(1)
    distinct = torch.eye(8)[None, None]
    assert trajectories.normalized_entropy(1e4 * distinct, distinct) == pytest.approx(0, abs=1e-6)
    p = (key[0] @ key[0].mT / 8**0.5).exp().numpy()
    expected = stats.entropy(p / p.sum(-1, keepdims=True), axis=-1).mean() / math.log(50)
    assert trajectories.normalized_entropy(key, key) == pytest.approx(expected, rel=1e-5)
    many = torch.zeros(1, 1, trajectories.QUERIES + 1, 8)
    assert trajectories.normalized_entropy(many, many) == pytest.approx(1)


def test_power_spectrum():
    """White noise has power 1 in every ring; a wave of k cycles lies in ring k."""
    noise = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0))
    assert (power_spectrum(noise).mean(0) - 1).abs()[8:].max() < 0.2
    assert power_spectrum(3 * noise).mean() == pytest.approx(9, rel=0.03)
    x = torch.arange(32.0)
    wave = torch.cos(2 * torch.pi * 5 * x / 32).expand(1, 32, 32)
    [spectrum] = power_spectrum(wave)
    assert spectrum.shape == (16,)
    assert spectrum.argmax() == 4  # rings count from 1
    assert spectrum[4] / spectrum.sum() > 1 - 1e-9


def test_recorder_sees_each_step_once(pipe):
    """It records the first of true CFG's two calls, in every block, and leaves no hook."""
    with trajectories.TrajectoryRecorder(pipe.transformer) as unguided:
        generate_latents(pipe, 64, 64, 1)
    with trajectories.TrajectoryRecorder(pipe.transformer) as recorder:
        last = generate_latents(pipe, 64, 64, 3, negative_prompt="", true_cfg_scale=2.0)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks
    assert recorder.entropies[1.0] == unguided.entropies[1.0]
    assert torch.equal(
        last, generate_latents(pipe, 64, 64, 3, negative_prompt="", true_cfg_scale=2.0)
    )
    assert list(recorder.states) == pytest.approx(pipe.scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert [len(step) for step in recorder.entropies.values()] == [2, 2, 2]  # two blocks
    assert all(0 < value < 1 for step in recorder.entropies.values() for value in step)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    first = pipe._unpack_latents(recorder.states[1.0], 64, 64, pipe.vae_scale_factor)
    assert torch.equal(first, noise)


def test_trajectories_continue(tmp_path, monkeypatch, capsys):
    """A second run keeps finished images; the figures read them; another protocol is refused."""
    monkeypatch.setattr(trajectories, "BASE", 64)
    out = tmp_path / "t.json"
    flags = ["--out", str(out), "--steps", "2", "--dtype", "float32"]
    both = [*flags, "--sizes", "64", "96", "--counts", "1", "1"]
    assert trajectories.main([*flags, "--sizes", "64", "--counts", "1"]) == 0
    first = json.loads(out.read_text())["pictures"]
    assert trajectories.main(both) == 0
    second = json.loads(out.read_text())["pictures"]
    assert second[:1] == first
    assert [image["setting"] for image in second] == ["base", *trajectories.CONFIGS]
    assert [len(first[0][name]) for name in ("sigmas", "spectra", "entropy")] == [3, 3, 2]
    monkeypatch.setattr(trajectories, "load_pipeline", None)
    assert trajectories.main(both) == 0
    assert len(saved_numbers.fig18(out).axes) == 1
    titles = [axes.get_title() for axes in saved_numbers.eq11(out, SAVED).axes]
    assert titles == ["guidance 2.5", "guidance 2.5"]
    protocol = json.loads(out.read_text())["protocol"]
    first_demo = tmp_path / "first.json"
    del protocol["guidance"]
    first_demo.write_text(json.dumps({"protocol": protocol, "pictures": second}))
    with pytest.raises(ValueError, match=r"first.json is of the first demo, expected"):
        saved_numbers.eq11(out, first_demo)
    capsys.readouterr()
    assert trajectories.main([*flags[:2], "--steps", "3"]) == 2
    assert "steps is 3, but" in capsys.readouterr().err
    saved = json.loads(out.read_text())
    for dtype in ("foo", None):  # formats of no version
        out.write_text(json.dumps(saved | {"protocol": saved["protocol"] | {"dtype": dtype}}))
        assert trajectories.main(both) == 2
        assert f"was generated with {dtype!r}" in capsys.readouterr().err
    saved["pictures"][-1]["setting"] = "yarn_paper_1_2"
    out.write_text(json.dumps(saved))
    assert trajectories.main(both) == 2
    assert f"{out} was written by an earlier version" in capsys.readouterr().err


def test_entropy_deviation(tmp_path):
    """fig18: the mean over prompts of the difference to the same prompt at the base resolution."""

    def make_row(size, setting, seed, entropy):
        row = {"size": size, "setting": setting, "prompt": "a", "seed": seed, "entropy": entropy}
        return row | {"sigmas": [1.0, 0.5, 0.0]}

    rows = [make_row(512, "base", 0, [0.5, 0.4]), make_row(512, "base", 1, [0.7, 0.6])]
    for i, setting in enumerate(saved_numbers.SCALING_SETTINGS):
        rows += [make_row(1024, setting, 0, [0.6, 0.4 + i]), make_row(1024, setting, 1, [0.7, 0.9])]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"protocol": {"base_resolution": 512}, "pictures": rows}))
    axes = saved_numbers.fig18(path).axes[0]
    assert axes.get_title() == "1024 px (2x), 2 prompts"
    for i, label in enumerate(saved_numbers.SCALING_SETTINGS):
        name = next(name for name in lines_by_label(axes) if name.startswith(f"{label}: "))
        t, mean = lines_by_label(axes)[name]
        assert list(t) == [1.0, 0.5]
        assert np.allclose(mean, [0.05, (i + 0.3) / 2])
        assert name.endswith(f"{(0.05 + (i + 0.3) / 2) / 2:.4f}")


def write_table(path: Path) -> Path:
    """Write a small ground-truth table and return its path."""

    def make_row(size, setting, method, layout, spectrum, control=""):
        values = {"layout": layout, "spectrum": spectrum, "joint": layout / 2}
        values["overlap"] = 0.9 * layout
        cells = {n: {"mean": v, "interval": [v - 0.1, v + 0.2]} for n, v in values.items()}
        row = {"size": size, "setting": setting, "method": method, "n": 2, "control": control}
        return row | {"dype": setting.startswith("dy_")} | cells

    rows = [make_row(512, "base", "base", 0.9, 0.8), make_row(1024, "base", "base", 0.1, 0.7)]
    rows += [make_row(1024, "truth_vae", None, 1.0, 0.0), make_row(1024, "vae", None, 1.0, 0.1)]
    rows += [make_row(1024, "yarn_paper", "yarn_paper", 0.8, 0.3)]
    rows += [make_row(1024, "dy_yarn_paper", "yarn_paper", 0.9, 0.5)]
    rows += [make_row(1024, "dy_yarn_paper:reversed", "yarn_paper", 0.0, 0.0, "reversed")]
    path.write_text(json.dumps({"protocol": {"base_resolution": 512}, "rows": rows, "pairs": []}))
    return path


def test_scaling_curve(tmp_path):
    """fig5: means over the size with their intervals."""
    path, names = write_table(tmp_path / "t.json"), SCALING_SETTINGS
    axes = saved_numbers.fig5(path, "spectrum", names).axes[0]
    lines = {label: (list(x), list(y)) for label, (x, y) in lines_by_label(axes).items()}
    assert lines == {
        "truth through the VAE": ([2], [0.0]),
        "base": ([1, 2], [0.8, 0.7]),
        "yarn_paper": ([1, 2], [0.8, 0.3]),  # at 1x the stock model
        "dy_yarn_paper": ([1, 2], [0.8, 0.5]),
    }
    bars = [np.array(bar.get_segments()) for bar in axes.collections]
    assert np.allclose(bars[1], [[[1, 0.7], [1, 1.0]], [[2, 0.6], [2, 0.9]]])
    assert list(axes.get_xticks()) == [1, 2]


def test_frontier(tmp_path):
    """Every setting but the controls has a point at its overlap and texture.

    Some have intervals, and the chosen one a ring. A line joins settings that differ in their
    attention scale; a dotted line leads from an open static point to a filled dynamic one.
    """
    path = write_table(tmp_path / "t.json")
    table = json.loads(path.read_text())
    template = table["rows"][-2]
    selected = "dy_cutoff:attention_scale=1.2:attention_path=rising"
    square = [("dy_cutoff", 0.8, 1024), (selected, 0.9, 1024), (saved_numbers.CHOSEN, 0.4, 1024)]
    for name, layout, size in [*square, ("dy_cutoff", 0.7, "1024x512")]:
        row = dict(template, setting=name, method="cutoff", size=size)
        row["overlap"] = {"mean": layout, "interval": [layout - 0.2, layout + 0.1]}
        table["rows"].append(row)
    path.write_text(json.dumps(table))
    settings = ["yarn_paper", "dy_yarn_paper", "dy_cutoff", selected]
    figure = saved_numbers.frontier(path, settings=settings)
    [axes] = figure.axes
    lines = [line.get_xydata().tolist() for line in axes.lines]
    styles = [line.get_linestyle() for line in axes.lines]
    joined = {style: line for style, line in zip(styles, lines, strict=True) if len(line) > 1}
    assert joined.keys() == {"-", ":"}
    assert np.allclose(joined["-"], [[0.8, 0.5], [0.9, 0.5]])
    assert np.allclose(joined[":"], [[0.72, 0.3], [0.81, 0.5]])
    assert [line.get_markerfacecolor() for line in axes.lines].count("white") == 1
    assert lines.count([[0.4, 0.5]]) == 2  # the point and its ring
    points = [line for line in lines if len(line) == 1]
    assert len(points) == 8  # base, truth, static and dynamic, three cutoffs, the ring
    spans = [segment.tolist() for c in axes.collections for segment in c.get_segments()]
    assert len(spans) == 2 * 4
    assert any(np.allclose(span, [[0.7, 0.5], [1.0, 0.5]]) for span in spans)
    assert not axes.yaxis_inverted()
    assert axes.get_ylim()[0] == 0
    styles = [tuple(style.values()) for style in saved_numbers.METHOD_STYLES.values()]
    assert len({*styles}) == len(styles) == len(rope.METHODS)
    [legend] = figure.legends
    labels = [
        "base",
        "truth through the VAE",
        "dy_yarn_paper",
        "dy_cutoff",
        saved_numbers.CHOSEN,
    ]
    assert [text.get_text() for text in legend.get_texts()] == [*labels, "chosen on other prompts"]
    title = legend.get_title().get_text()
    assert title.startswith("filled: with DyPE; open: the same method, static")


def test_one_color_per_method():
    """Every method has its color and marker; static and with DyPE differ in the line alone."""
    assert list(style.METHOD_COLORS) == list(style.METHOD_MARKERS) == list(rope.METHODS)
    assert len({*style.METHOD_COLORS.values()}) == len(rope.METHODS)
    pairs = {*zip(style.METHOD_COLORS.values(), style.METHOD_MARKERS.values(), strict=True)}
    assert len(pairs) == len(rope.METHODS)
    for method in list(rope.METHODS)[1:]:
        static, dynamic = style.method_style(method), style.method_style(f"dy_{method}:1:2")
        assert (static.pop("linestyle"), dynamic.pop("linestyle")) == ("--", "-")
        assert static == dynamic
    assert style.method_style("base")["linestyle"] == "-"


def test_all_figures_have_the_colors_of_the_methods(tmp_path):
    """fig5, fig7, fig18 and frontier draw a method in the same color."""
    color = style.METHOD_COLORS
    table = write_table(tmp_path / "t.json")
    fig5 = saved_numbers.fig5(table, "spectrum", SCALING_SETTINGS).axes[0].lines
    fig7 = formulas.fig7().axes[1].lines
    fig18 = saved_numbers.fig18(SAVED).axes[0].lines
    frontier = saved_numbers.frontier(table).axes[0].lines
    labels = {"yarn_paper": "yarn_paper", "dy_yarn_paper": "yarn_paper", "PI": "pi"}
    labels |= {"dynamic PI, t = 0.5": "pi", "dynamic NTK, t = 0.5": "ntk", "base": "base"}
    seen = set()
    for line in (*fig5, *fig7, *fig18, *frontier):
        label = line.get_label().partition(":")[0]
        if label in labels:
            seen.add(label)
            assert line.get_color() == color[labels[label]], label
    assert seen == labels.keys()


@pytest.mark.parametrize("name", ["fig2a", "fig2b", "fig5", "fig6", "fig7", "fig18", "frontier"])
def test_the_figure_says_what_its_colors_mean(name, tmp_path):
    """A legend, a bar or the label of an axis explains the colors of lines and maps."""
    words = {
        "fig2a": "t = sigma",
        "fig2b": "undefined: signal and noise within a factor of 1.5",
        "fig5": "color: method",
        "fig6": "blue ground",
        "fig7": "color: method",
        "fig18": "thin: single prompts",
        "frontier": "filled: with DyPE",
    }
    path = write_table(tmp_path / "t.json")
    arguments = {"fig5": [path], "frontier": [path], "fig6": [], "fig7": []}
    figure = figures.FIGURES[name](*arguments.get(name, [SAVED]))
    texts = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    assert any(words[name] in text for text in texts)


def test_nothing_is_cut_off(tmp_path, monkeypatch):
    """A text beyond the edge of a figure widens the picture, and there is a margin around all."""
    figure, axes = style.subplots(2, 1)
    figure.text(0.98, 0.5, "a long text that leaves the figure")
    axes.plot([0, 1])
    style.save(figure, tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert pixels.shape[1] > 2 * 200
    frame = np.concatenate([pixels[:3].ravel(), pixels[-3:].ravel(), pixels[:, :3].ravel()])
    assert (np.append(frame, pixels[:, -3:]) == 255).all()


OLD_NAMES = [  # setting, method, whether with DyPE; as files of earlier versions have them
    ("cutoff", "cutoff", True),
    ("yarn_static", "yarn", False),
    ("yarn:static", "yarn", False),
    ("pi_1_1", "pi", True),
    ("base_model", "base", True),
    ("dy_yarn:1:2", "yarn", True),
    ("cutoff_free_1_0.7_cutoff=12.5", "cutoff_free", True),
]


@pytest.mark.parametrize("figure", ["fig5", "frontier"])
@pytest.mark.parametrize(("setting", "method", "dype"), OLD_NAMES)
def test_tables_of_earlier_versions(figure, setting, method, dype, tmp_path, capsys):
    """Another name of a setting than this version's is refused, and nothing is written."""
    path, out = write_table(tmp_path / "t.json"), tmp_path / "out.png"
    table = json.loads(path.read_text())
    table["rows"].append(table["rows"][-2] | {"setting": setting, "method": method, "dype": dype})
    path.write_text(json.dumps(table))
    assert figures.main([figure, "--ground_truth", str(path), "--out", str(out)]) == 2
    sentence = capsys.readouterr().err
    assert f"{path} was written by an earlier version; run python -m dype.demo.eval" in sentence
    assert sentence.count("\n") == 1
    assert not out.exists()


def test_tables_of_docs_are_current():
    """Also those with a method that has left METHODS."""
    methods = set()
    for path in (ROOT / "docs" / "data").glob("*.json"):
        rows = json.loads(path.read_text()).get("rows", [])
        assert all(map(saved_numbers.has_current_name, rows)), path
        methods |= {row["method"] for row in rows}
    assert methods - {None} - rope.METHODS.keys() == {"cutoff_free"}


METHODS = ("base", "ntk", "dy_ntk", "dy_tasr", "yarn", "dy_yarn")


def write_sweep(folder: Path, methods=METHODS, **settings) -> Path:
    """Write a finished sweep of images with different colors and return the folder."""
    folder.mkdir(exist_ok=True)
    rows = results.read_rows(folder)
    for prompt in ("a sun", "a cross"):
        for i, name in enumerate(methods):
            method, dynamic = name.removeprefix("dy_"), name.startswith("dy_")
            pixels = np.full((48, 64, 3), 40 * i, np.uint8)
            pixels[..., 1] = np.arange(64) + 64 * (prompt == "a cross")
            config = DyPEConfig(method, dype=dynamic)
            path = folder / f"{prompt[2:]}_{name}{''.join(settings.values())}.png"
            records.save_image(Image.fromarray(pixels), {"config": config.to_dict()}, path)
            row = dict.fromkeys(results.COLUMNS, "") | {"file": path.name, "method": name}
            row |= {"height": "48", "width": "64", "seed": "0", "prompt": prompt, "seconds": "1"}
            rows.append(row | settings)
    results.write_table(folder / "results.csv", results.COLUMNS, rows)
    return folder


def test_image_rows(tmp_path):
    """fig3 has a column per method, a block per prompt, and the crops of --crops."""
    figure = image_rows.FIGURES["fig3"](write_sweep(tmp_path / "out"), crops=["0.5,0.25,0.5"])
    assert [text.get_text() for text in figure.texts] == [
        "a sun, seed 0, 64x48",
        *("static", "yarn"),
        *("with DyPE", "dy_yarn"),
        "a cross, seed 0, 64x48",
    ]
    images = [axes.images[0].get_array() for axes in figure.axes]
    assert [image.shape for image in images] == [(48, 64, 3), (24, 24, 3)] * 4
    assert [int(image[0, 0, 0]) for image in images[::2]] == [160, 200, 160, 200]
    assert [int(image[0, 0, 1]) for image in images] == [0, 32, 0, 32, 64, 96, 64, 96]
    square = figure.axes[0].patches[0]
    assert (*square.get_xy(), square.get_width(), square.get_height()) == (32, 12, 24, 24)


def test_crops_are_pixel_for_pixel_where_edges_are(tmp_path):
    """Without --crops all images of a prompt have one part in common, at the figure's pixels."""
    folder = write_sweep(tmp_path / "out", ("yarn", "dy_yarn"))
    rows = results.read_rows(folder)
    for row in rows:
        pixels = np.full((1200, 1600, 3), 200, np.uint8)
        pixels[900:1000, 1300:1400] = 20  # the rest is a bare sky
        config = DyPEConfig("yarn").to_dict()
        records.save_image(Image.fromarray(pixels), {"config": config}, folder / row["file"])
    rows = [row | {"height": "1200", "width": "1600"} for row in rows]
    results.write_table(folder / "results.csv", results.COLUMNS, rows)
    figure = image_rows.FIGURES["fig3"](folder)
    boxes = [(*patch.get_xy(), patch.get_width()) for patch in figure.axes[0].patches]
    x, y, side = boxes[0]
    assert x < 1300 < 1400 < x + side
    assert y < 900 < 1000 < y + side
    crop = figure.axes[1]
    assert crop.images[0].get_array().shape == (side, side, 3)
    width = crop.get_position().width * figure.get_size_inches()[0] * style.DPI
    assert width == pytest.approx(side, abs=1)
    assert len(image_rows.FIGURES["fig17"](folder).axes[0].patches) == 2 * 3


CAPTIONS = {  # prompt -> begin and end of its caption
    "a caf\xe9 for $\\frac{1$": ("a caf\xe9 for $\\frac{1$, seed", "48"),
    "\u57ce": (r"\u57ce, seed", "48"),
    "word " * 50: ("word word", " ..."),
    "a" * 200: ("aaaa", "aaaa ..."),
    "\u57ce" * 100: (r"\u57ce\u57ce", r"\u57ce ..."),
}


@pytest.mark.parametrize("prompt", CAPTIONS)
def test_captions(prompt, tmp_path):
    """Captions are kept to the letter; missing letters are escapes; long ones are cut."""
    folder = write_sweep(tmp_path / "out")
    rows = [row | {"prompt": prompt} for row in results.read_rows(folder)[:6]]
    results.write_table(folder / "results.csv", results.COLUMNS, rows)
    figure = image_rows.FIGURES["fig1"](folder)
    caption = figure.texts[0].get_text()
    begin, end = CAPTIONS[prompt]
    assert caption.startswith(begin)
    assert caption.endswith(end)
    assert len(caption) <= 110
    style.save(figure, tmp_path / "a.png")


TITLES = {  # settings -> lines above a column
    ("base", True): ("stock", "base"),
    ("yarn", False): ("static", "yarn"),
    ("pi", True, 2.0, 2.0): ("with DyPE", "dy_pi"),
    ("pi", True, 1.0, 2.0): ("with DyPE", r"dy_pi, $\lambda_s$ 1"),
    ("pi", True, 1.0, 0.5): ("with DyPE", r"dy_pi, $\lambda_s$ 1, $\lambda_t$ 0.5"),
    ("tasr", True, 1.0, 4.0): ("with DyPE", "dy_tasr"),
}


@pytest.mark.parametrize("settings", TITLES)
def test_column_titles(settings):
    """They have lambda_s and lambda_t where these have an effect and are not the default."""
    assert image_rows.column_title(DyPEConfig(*settings)) == TITLES[settings]


def test_image_rows_of_several_settings(tmp_path):
    """--where selects one; without it they are a mistake; the largest size counts."""
    folder = write_sweep(write_sweep(tmp_path / "out"), ("dy_yarn",), dype_exponent="1")
    write_sweep(folder, ("dy_yarn",), height="32", width="32", dype_exponent="3")
    rows = results.read_rows(folder)
    with pytest.raises(ValueError, match="dy_yarn with dype_exponent , 1; expected one of them"):
        image_rows.select_grid(image_rows.filter_rows(rows, []), ["yarn", "dy_yarn"], 1)
    rows = [row for row in rows if row["dype_exponent"] or row["method"] == "yarn"]
    rows = image_rows.filter_rows(rows, ["dype_exponent=1"])
    grid = image_rows.select_grid(rows, ["yarn", "dy_yarn"], 2)
    assert [[row["dype_exponent"] for row in line] for line in grid] == [["", "1"]] * 2
    assert {row["height"] for line in grid for row in line} == {"48"}


SWEPT = ("fig3", "out")
BAD = [
    (("fig99",), "fig99"),
    (("fig6", "--out", "x.bmp"), "--out is x.bmp, expected a name in .png"),
    (("fig6", "out"), "FOLDER is for fig1, fig3"),
    (("fig7", "--crops", "0,0,1"), "--crops is for fig1, fig3"),
    (("fig7", "--where", "seed=1"), "--where is for fig1, fig3"),
    (("fig3",), "expected the FOLDER of a finished sweep"),
    (("fig3", "nowhere"), "nowhere has no finished sweep"),
    (("fig8", "out", "--methods", "pi"), "out has no image of pi, which fig8 shows"),
    ((*SWEPT, "--crops", "0.9,0,0.2"), "--crops is '0.9,0,0.2', expected X,Y,SIZE"),
    ((*SWEPT, "--crops", "a"), "--crops is 'a', expected X,Y,SIZE"),
    ((*SWEPT, "--crops", "nan,0,1"), "--crops is 'nan,0,1', expected X,Y,SIZE"),
    ((*SWEPT, "--where", "seed=7"), "--where is 'seed=7', expected one of 0"),
    ((*SWEPT, "--where", "color=7"), "--where is 'color=7', expected model, height"),
    (("fig1", "broken"), "sun_base.png cannot be shown"),
    (("fig2a", "--trajectories", "none.json"), "there is no none.json"),
    (("fig2a", "--trajectories", "scores.json"), "scores.json is not what"),
    (("fig5", "--ground_truth", "broken/sun_base.png"), "is not what"),
    (("fig5", "--ground_truth", "scores.json", "--score", "x"), "--score is 'x', expected one of"),
    (("frontier", "--ground_truth", "scores.json", "--score", "joint"), "expected one of spectrum"),
    (
        ("frontier", "--ground_truth", "scores.json", "--score", "lite0"),
        "joint, layout, overlap, s",
    ),
    (("fig5", "--ground_truth", "scores.json", "--score", "directions"), "with scores.json, is 'd"),
    (("fig5", "--ground_truth", "scores.json", "--settings", "pi"), "--settings is 'pi', expected"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_sweep(Path("out"))
    (write_sweep(Path("broken")) / "sun_base.png").write_bytes(b"no image")
    write_table(Path("scores.json"))
    assert figures.main(list(argv)) == 2
    sentence = capsys.readouterr().err
    assert message in sentence
    assert len(sentence.splitlines()) == 1
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--counts", "1"], "--counts has 1 numbers, expected 3"),
        (["--sizes", "100", "--counts", "1"], "--sizes is 100, expected a multiple of 16"),
        (["--sizes", "512", "--counts", "0"], "--counts is 0, expected a whole number"),
        (["--steps", "0"], "--steps is 0, expected a whole number"),
        (["--guidance", "101"], "--guidance is 101.0, expected"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bad_input_of_trajectories(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(trajectories, "load_pipeline", None)
    assert trajectories.main(argv) == 2
    sentence = capsys.readouterr().err
    assert message in sentence
    assert len(sentence.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name != "ratios"])
def test_every_figure_renders(name, tmp_path, monkeypatch, capsys):
    """Its command writes a PNG that is not empty, and leaves matplotlib's settings alone."""
    monkeypatch.chdir(tmp_path)
    before = matplotlib.rcParams.copy()
    arguments = []
    if name in image_rows.FIGURES:
        arguments = [str(write_sweep(Path("out")))]
    elif name in ("fig5", "frontier"):
        arguments = ["--ground_truth", str(write_table(Path("scores.json")))]
    elif name in ("fig2a", "fig2b", "fig18", "eq11"):
        arguments = ["--trajectories", str(SAVED)]
        arguments += ["--unguided", str(ROOT / saved_numbers.UNGUIDED)] if name == "eq11" else []
    assert figures.main([name, *arguments]) == 0
    path = Path("outputs/figures") / f"{name}.png"
    assert capsys.readouterr().out.strip() == str(path)
    with Image.open(path) as image:
        assert image.width >= 2 * 3.1 * 100
        assert len(image.convert("RGB").getcolors(2**24)) > 10
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_other_formats(tmp_path):
    for suffix in style.FORMATS:
        out = tmp_path / "new" / f"a{suffix}"
        assert figures.main(["fig7", "--out", str(out)]) == 0
        assert out.stat().st_size > 5_000


def test_without_matplotlib(monkeypatch):
    """One sentence says what to install."""
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n.startswith("dype.figures.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match="it needs matplotlib; pip install"):
        importlib.import_module("dype.figures.__main__")
