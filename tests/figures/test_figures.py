"""The figures: each renders, and what is plotted is right, read off the lines and maps."""

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
from dype.figures import __main__ as figures
from dype.figures import formulas, image_rows, style
from dype.figures import saved_numbers as sampled
from dype.sampling import records
from dype.sampling.latents import power_spectrum
from dype.sweep import results

ROOT = Path(__file__).parents[2]
SAVED = ROOT / sampled.TRAJECTORIES
SIGMAS = """1 .9884 .9762 .9634 .9499 .9356 .9205 .9045 .8876 .8696 .8504 .8300 .8081 .7847 .7595
    .7324 .7031 .6714 .6370 .5994 .5582 .5128 .4627 .4071 .3448 .2748 .1955 .1047"""


def panel():
    return Figure().subplots()


def values(mesh) -> np.ma.MaskedArray:
    """What a heat map shows, [rows, columns]."""
    rows, columns, _ = (n - 1 for n in mesh.get_coordinates().shape)
    return mesh.get_array().reshape(rows, columns)


def lines(axes) -> dict:
    """label -> (x, y)."""
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
    """Eq. 12 in the generic panel of fig2b, whose lowest and highest rows are 100 and 0.01."""
    mesh = sampled.fig2b(SAVED).axes[0].collections[0]
    x, y = mesh.get_coordinates()[..., 0][0], mesh.get_coordinates()[..., 1][:, 0]
    t, f = (x[1:] + x[:-1]) / 2, np.sqrt(y[1:] * y[:-1])
    for power, row in ((1e2, 0), (1e-2, -1)):
        assert f[row] == pytest.approx(math.sqrt(0.01 / power))
        for level, expected in zip((0.25, 0.5, 0.75), ANCHORS[power], strict=True):
            column = abs(t - level).argmin()
            assert t[column] == pytest.approx(level)
            assert values(mesh)[row, column] == pytest.approx(expected, abs=5e-4)


def test_progress_at_the_other_anchors():
    power, t = np.array([*ANCHORS])[:, None], np.array([0.25, 0.5, 0.75])
    gamma = formulas.progress(formulas.noisy_power(power, t), power, 1.0)
    mesh = formulas.progress_panel(panel(), power[:, 0], t, gamma)
    assert np.abs(values(mesh) - np.array([*ANCHORS.values()])).max() < 6e-4


def test_singular_row_is_masked():
    """Where signal and noise are within a factor of 1.5, and nowhere else."""
    mesh = sampled.fig2b(SAVED).axes[0].collections[0]
    y = mesh.get_coordinates()[..., 1][:, 0]
    power = 0.01 / (y[1:] * y[:-1])
    hidden = np.ma.getmaskarray(values(mesh))
    near = (power < 1.5) & (power > 1 / 1.5)
    assert near.sum() > 5
    assert (hidden == near[:, None]).all()
    assert np.isnan(formulas.progress(0.5, 1.0, 1.0))


def test_spectra_against_a_transcription():
    """Eq. 11 line by line, and the sampled panel against the saved numbers."""
    made = sampled.fig2a(SAVED)
    pictures = [p for p in json.loads(SAVED.read_text())["pictures"] if p["size"] == 256]
    t = pictures[0]["sigmas"]
    mean = [
        [sum(p["spectra"][i][k] for p in pictures) / len(pictures) for k in range(16)]
        for i in range(len(t))
    ]
    for axes in made.axes[:3]:
        assert len(axes.lines) == len(t) + 1
    for i, level in enumerate(t):
        f, power = made.axes[0].lines[i].get_data()
        expected = [(1 - level) ** 2 * 0.01 / x**2 + level**2 for x in f]
        assert np.allclose(power, expected, rtol=1e-12)
        eq11 = [(1 - level) ** 2 * x + level**2 for x in mean[-1]]
        assert np.allclose(made.axes[1].lines[i].get_ydata(), eq11, rtol=1e-12)
        assert np.allclose(made.axes[2].lines[i].get_ydata(), mean[i], rtol=1e-12)
    f, guide = made.axes[2].lines[-1].get_data()
    slope, at, *_ = stats.linregress(np.log(f), np.log(mean[-1]))
    assert np.allclose(np.log(guide), at + slope * np.log(f))
    assert f[-1] == 1


def test_sampled_map():
    """Eq. 12 of the saved spectra; t runs from 1 on the left to 0 on the right."""
    axes = sampled.fig2b(SAVED).axes[2]
    shown = values(axes.collections[0])
    _, _, mean = sampled.mean_spectra(SAVED)
    expected = np.log(mean[10] / mean[-1]) / np.log(mean[0] / mean[-1])
    keep = ~np.ma.getmaskarray(shown)[:, 10]
    assert keep.sum() > 8
    assert np.allclose(shown[keep, 10], expected[keep])
    assert (shown[keep, 0] == 1).all()
    assert (shown[keep, -1] == 0).all()
    assert axes.get_xlim() == (1, 0)


def test_departure_from_eq_11():
    """eq11: the saved spectra over (1 - t)^2 S(0) + t^2 S(1); guidance makes the difference."""
    made = sampled.eq11(ROOT / sampled.TRAJECTORIES, ROOT / sampled.UNGUIDED)
    peaks = []
    for axes, path in zip(made.axes, (sampled.TRAJECTORIES, sampled.UNGUIDED), strict=True):
        _, t, mean = sampled.mean_spectra(ROOT / path)
        lowest = lines(axes)["1/16"][1]
        for i, level in enumerate(t):
            eq11 = (1 - level) ** 2 * mean[-1, 0] + level**2 * mean[0, 0]
            assert lowest[i] == pytest.approx(mean[i, 0] / eq11)
        peaks.append(max(np.abs(np.subtract(line.get_ydata(), 1)).max() for line in axes.lines))
    assert [axes.get_title() for axes in made.axes] == ["true CFG 5", "true CFG 1"]
    assert peaks == pytest.approx([0.55, 0.08], abs=0.005)  # as docs/method.md has it


def ratios(axis, name, t) -> np.ndarray:
    """f_i / theta_i as a panel of `ratios` shows them at one noise level."""
    edges = np.array([math.sqrt(t) - 1e-9, math.sqrt(t) + 1e-9])
    return values(formulas.ratio_panel(panel(), axis, name, edges))[:, 0]


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
    """FLUX at s = 4: both published forms of dynamic YaRN."""
    found, expected = ratios(formulas.FLUX, *case), RATIOS[case]
    assert np.abs(found[: len(expected)] - expected).max() < 6e-4
    assert np.abs(found[len(expected) :] - QUARTER).max() < 1e-12


def test_ratios_of_the_printed_yarn():
    start, end = (ratios(formulas.FLUX, "yarn_paper", t) for t in (1.0, 0.1047))
    assert start[0] == pytest.approx(0.472, abs=5e-4)
    assert (abs(start - QUARTER) < 1e-9).sum() == 20
    assert (end == 1).sum() == 11
    assert (abs(end - QUARTER) < 1e-9).sum() == 7


@pytest.mark.parametrize(
    ("t", "beta", "gamma"),
    [(1, (6, 8), (0, 5)), (0.5, (10, 13), (2, 10)), (0.1047, (20, 22), (12, 19))],
)
def test_cutoffs(t, beta, gamma):
    """Of the kappa form: the last pair where a mask is 1 and the first where it is 0."""
    one = rope.build_axes(*formulas.FLUX, [256], None, DyPEConfig())
    masks = 1 - rope.ramp_weights(one, lambda r: r * t**2)
    for mask, (low, high) in zip(masks, (beta, gamma), strict=True):
        assert (mask == 1).nonzero().max() == low
        assert (mask == 0).nonzero().min() == high


@pytest.mark.parametrize(("axis", "last"), [(formulas.FLUX, 0.0068), (formulas.Z_IMAGE, 0.044)])
def test_unclamped_ramp_collapses(axis, last):
    """Every pair becomes PI where GAMMA's edges cross; far above, all is as in `yarn`.

    BETA's edges cross earlier: tests/test_method_page.py.
    """
    for t in (1e-3, last / 2, last - 5e-4):
        assert np.abs(ratios(axis, "yarn, unclamped", t) - QUARTER).max() < 1e-12
    assert np.abs(ratios(axis, "yarn", 1e-3) - 1).max() < 1e-12
    assert (ratios(axis, "yarn, unclamped", last + 5e-4) > 0.9).any()
    for t in (0.1, 0.5, 1.0) if axis == formulas.FLUX else (0.2, 0.5, 1.0):
        assert np.abs(ratios(axis, "yarn, unclamped", t) - ratios(axis, "yarn", t)).max() < 1e-12


def test_ratios_show_every_method_and_the_steps(monkeypatch, tmp_path):
    """For both models; FLUX's panels carry the 28 steps of an image at mu = 1.15."""
    asked = []
    monkeypatch.setattr(
        formulas,
        "ratio_panel",
        lambda axes, axis, name, edges, real=formulas.ratio_panel: (
            asked.append((axis, name)) or real(axes, axis, name, edges[::40])
        ),
    )
    made = formulas.ratios()
    names = [*rope.METHODS, "yarn, unclamped"]
    models = formulas.FLUX, formulas.Z_IMAGE
    assert asked == [(axis, name) for axis in models for name in names]
    expected = [float(word) for word in SIGMAS.split()]
    for axes in made.subfigs[0].axes[: len(names)]:
        marks = axes.lines[0].get_xdata() ** 2
        assert np.abs(marks - expected).max() < 5.1e-5
    assert not made.subfigs[1].axes[0].lines
    style.save(made, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 10_000
    assert made.subfigs[0].axes[0].get_xlim() == (1, 0)


def test_wavelengths():
    """fig7: tokens on the left, times RoPE's on the right; s = 4, dynamic forms at t = 0.5."""
    made = formulas.fig7()
    left, right = map(lines, made.axes[:2])
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
    """fig6: a wave of period P is cos(2 pi x / P), its marks lie on it, hollow beyond 4096."""
    last = 2 * 0.04, 2 * 0.64  # kappa at t = 0.2 and 0.8
    periods = [(512, 4096), (1024, 8192), (512, 8192)]
    periods += [(512, 4096 * 2**kappa) for kappa in last]
    for axes, (fast, slow) in zip(formulas.fig6().axes, periods, strict=True):
        for line, period in zip(axes.lines, (fast, slow, slow, slow), strict=True):
            x, y = line.get_data()
            assert np.allclose(y, np.cos(2 * np.pi * x / period), atol=1e-9)
        assert axes.lines[2].get_xdata().max() == 4096
        assert axes.lines[3].get_xdata().min() > 4096
        assert axes.lines[3].get_markerfacecolor() == "white"


def test_entropy():
    """1 for uniform attention, 0 for a single key, else as scipy has it."""
    key = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    assert trajectories.normalized_entropy(torch.zeros_like(key), key) == pytest.approx(1)
    alone = torch.eye(8)[None, None]
    assert trajectories.normalized_entropy(1e4 * alone, alone) == pytest.approx(0, abs=1e-6)
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
    [found] = power_spectrum(wave)
    assert found.shape == (16,)
    assert found.argmax() == 4  # rings count from 1
    assert found[4] / found.sum() > 1 - 1e-9


def test_watch_sees_each_step_once(pipe):
    """The first of true CFG's two calls, as attention has it, in every block; then it is gone."""
    with trajectories.Watch(pipe.transformer) as alone:
        generate_latents(pipe, 64, 64, 1)
    with trajectories.Watch(pipe.transformer) as seen:
        last = generate_latents(pipe, 64, 64, 3, negative_prompt="", true_cfg_scale=2.0)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks
    assert seen.entropies[1.0] == alone.entropies[1.0]
    assert torch.equal(
        last, generate_latents(pipe, 64, 64, 3, negative_prompt="", true_cfg_scale=2.0)
    )
    assert list(seen.states) == pytest.approx(pipe.scheduler.sigmas[:-1].tolist(), abs=1e-6)
    assert [len(one) for one in seen.entropies.values()] == [2, 2, 2]  # two blocks
    assert all(0 < value < 1 for one in seen.entropies.values() for value in one)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    first = pipe._unpack_latents(seen.states[1.0], 64, 64, pipe.vae_scale_factor)
    assert torch.equal(first, noise)


def test_trajectories_go_on_where_they_were(tmp_path, monkeypatch, capsys):
    """And are what the figures read; another protocol is refused."""
    out = tmp_path / "t.json"
    few = ["--out", str(out), "--steps", "2", "--dtype", "float32"]
    both = [*few, "--sizes", "256", "272", "--counts", "1", "1"]
    assert trajectories.main([*few, "--sizes", "256", "--counts", "1"]) == 0
    first = json.loads(out.read_text())["pictures"]
    assert trajectories.main(both) == 0
    found = json.loads(out.read_text())["pictures"]
    assert found[:1] == first
    assert [one["setting"] for one in found] == ["base", *trajectories.SETTINGS]
    assert [len(first[0][name]) for name in ("sigmas", "spectra", "entropy")] == [3, 3, 2]
    monkeypatch.setattr(trajectories, "load_pipeline", None)
    assert trajectories.main(both) == 0
    assert len(sampled.fig18(out).axes) == 1
    capsys.readouterr()
    assert trajectories.main([*few[:2], "--steps", "3"]) == 2
    assert "steps is 3, but" in capsys.readouterr().err
    saved = json.loads(out.read_text())
    for dtype in ("foo", None):  # no format of ours: not taken for one
        out.write_text(json.dumps(saved | {"protocol": saved["protocol"] | {"dtype": dtype}}))
        assert trajectories.main(both) == 2
        assert f"was drawn with {dtype!r}" in capsys.readouterr().err


def test_entropy_deviation(tmp_path):
    """fig18: the mean over prompts of the difference to the same prompt at the base resolution."""

    def row(size, setting, seed, entropy):
        one = {"size": size, "setting": setting, "prompt": "a", "seed": seed, "entropy": entropy}
        return one | {"sigmas": [1.0, 0.5, 0.0]}

    rows = [row(256, "base", 0, [0.5, 0.4]), row(256, "base", 1, [0.7, 0.6])]
    for i, setting in enumerate(sampled.FORMS):
        rows += [row(512, setting, 0, [0.6, 0.4 + i]), row(512, setting, 1, [0.7, 0.9])]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"protocol": {}, "pictures": rows}))
    axes = sampled.fig18(path).axes[0]
    assert axes.get_title() == "512 px (2x), 2 prompts"
    for i, label in enumerate(sampled.FORMS):
        name = next(name for name in lines(axes) if name.startswith(f"{label}: "))
        t, mean = lines(axes)[name]
        assert list(t) == [1.0, 0.5]
        assert np.allclose(mean, [0.05, (i + 0.3) / 2])
        assert name.endswith(f"{(0.05 + (i + 0.3) / 2) / 2:.4f}")


def scored(path: Path) -> Path:
    """An invented ground-truth table."""

    def row(size, setting, method, layout, spectrum, control=""):
        values = {"layout": layout, "spectrum": spectrum, "joint": layout / 2}
        values["overlap"] = 0.9 * layout
        cells = {n: {"mean": v, "interval": [v - 0.1, v + 0.2]} for n, v in values.items()}
        one = {"size": size, "setting": setting, "method": method, "n": 2, "control": control}
        return one | {"dype": setting.startswith("dy_")} | cells

    rows = [row(256, "base", "base", 0.9, 0.8), row(512, "base", "base", 0.1, 0.7)]
    rows += [row(512, "truth_vae", None, 1.0, 0.0), row(512, "vae", None, 1.0, 0.1)]
    rows += [row(512, "yarn_paper", "yarn_paper", 0.8, 0.3)]
    rows += [row(512, "dy_yarn_paper", "yarn_paper", 0.9, 0.5)]
    rows += [row(512, "dy_yarn_paper:reversed", "yarn_paper", 0.0, 0.0, "reversed")]
    path.write_text(json.dumps({"protocol": {}, "rows": rows, "pairs": []}))
    return path


def test_scaling_curve(tmp_path):
    """fig5: means over the size with their intervals."""
    axes = sampled.fig5(scored(tmp_path / "t.json"), "spectrum").axes[0]
    found = {label: (list(x), list(y)) for label, (x, y) in lines(axes).items()}
    assert found == {
        "truth, by the VAE": ([2], [0.0]),
        "base": ([1, 2], [0.8, 0.7]),
        "yarn_paper": ([1, 2], [0.8, 0.3]),  # at 1x it is base
        "dy_yarn_paper": ([1, 2], [0.8, 0.5]),
    }
    bars = [np.array(bar.get_segments()) for bar in axes.collections]
    assert np.allclose(bars[1], [[[1, 0.7], [1, 1.0]], [[2, 0.6], [2, 0.9]]])
    assert list(axes.get_xticks()) == [1, 2]


def test_frontier(tmp_path):
    """A point per setting at its overlap and texture, intervals of the marked ones, a ring around
    the chosen one; a line joins settings that differ by their attention scale, a dotted one leads
    from static to dynamic, open to filled; no controls."""
    path = scored(tmp_path / "t.json")
    whole = json.loads(path.read_text())
    template = whole["rows"][-2]
    chosen = sampled.SELECTED
    more = [("dy_cutoff", 0.8, 512), (chosen, 0.9, 512), ("dy_cutoff:cutoff=2", 0.4, 512)]
    for name, layout, size in [*more, ("dy_cutoff", 0.7, "512x256")]:
        row = dict(template, setting=name, method="cutoff", size=size)
        row["overlap"] = {"mean": layout, "interval": [layout - 0.2, layout + 0.1]}
        whole["rows"].append(row)
    path.write_text(json.dumps(whole))
    [axes] = sampled.frontier(path).axes
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    lengths = [(line.get_linestyle(), line.get_xydata()) for line in axes.lines]
    joined = {style: points for style, points in lengths if len(points) > 1}
    assert joined.keys() == {"-", ":"}
    assert np.allclose(joined["-"], [[0.8, 0.5], [0.9, 0.5]])
    assert np.allclose(joined[":"], [[0.72, 0.3], [0.81, 0.5]])
    assert [line.get_markerfacecolor() for line in axes.lines].count("white") == 1
    assert drawn.count([[0.9, 0.5]]) == 2  # the point and its ring
    points = [line for line in drawn if len(line) == 1]
    assert len(points) == 8  # base, truth, static and dynamic, three cutoffs, the ring
    spans = [segment.tolist() for c in axes.collections for segment in c.get_segments()]
    assert len(spans) == 2 * 4
    assert any(np.allclose(span, [[0.7, 0.5], [1.0, 0.5]]) for span in spans)
    assert axes.yaxis_inverted()


def swept(folder: Path, methods=("base", "ntk", "dy_ntk", "dy_tasr", "yarn", "dy_yarn"), **more):
    """A finished sweep: images of a color each, whose columns darken, with their records."""
    folder.mkdir(exist_ok=True)
    rows = results.read_rows(folder)
    for prompt in ("a ring", "a cross"):
        for i, name in enumerate(methods):
            method, dynamic = name.removeprefix("dy_"), name.startswith("dy_")
            pixels = np.full((48, 64, 3), 40 * i, np.uint8)
            pixels[..., 1] = np.arange(64) + 64 * (prompt == "a cross")
            config = DyPEConfig(method, dype=dynamic).to_dict()
            path = folder / f"{prompt[2:]}_{name}{''.join(more.values())}.png"
            records.save_image(Image.fromarray(pixels), {"config": config}, path)
            row = dict.fromkeys(results.COLUMNS, "") | {"file": path.name, "method": name}
            row |= {"height": "48", "width": "64", "seed": "0", "prompt": prompt, "seconds": "1"}
            rows.append(row | more)
    results.write_table(folder / "results.csv", results.COLUMNS, rows)
    return folder


def test_rows_of_pictures(tmp_path):
    """fig3: methods across, prompts down, crops where they are said to be."""
    made = image_rows.FIGURES["fig3"](swept(tmp_path / "out"), crops=["0.5,0.25,0.5"])
    assert [text.get_text() for text in made.texts] == [
        "a ring, seed 0, 64x48",
        "yarn",
        r"dy_yarn, $\lambda_s$ 1, $\lambda_t$ 2",
        "a cross, seed 0, 64x48",
    ]
    shown = [axes.images[0].get_array() for axes in made.axes]
    assert [image.shape for image in shown] == [(48, 64, 3), (24, 24, 3)] * 4
    assert [int(image[0, 0, 0]) for image in shown[::2]] == [160, 200, 160, 200]
    assert [int(image[0, 0, 1]) for image in shown] == [0, 32, 0, 32, 64, 96, 64, 96]
    square = made.axes[0].patches[0]
    assert (*square.get_xy(), square.get_width(), square.get_height()) == (32, 12, 24, 24)


def test_rows_of_pictures_choose(tmp_path):
    """--where picks among settings; without it several are a mistake; the largest size counts."""
    folder = swept(swept(tmp_path / "out"), ("dy_yarn",), dype_exponent="1")
    swept(folder, ("dy_yarn",), height="32", width="32", dype_exponent="3")
    rows = results.read_rows(folder)
    with pytest.raises(ValueError, match="dy_yarn with dype_exponent , 1; expected one of them"):
        image_rows.select_grid(image_rows.filter_rows(rows, []), ["yarn", "dy_yarn"], 1)
    some = [row for row in rows if row["dype_exponent"] or row["method"] == "yarn"]
    found = image_rows.select_grid(
        image_rows.filter_rows(some, ["dype_exponent=1"]), ["yarn", "dy_yarn"], 2
    )
    assert [[one["dype_exponent"] for one in line] for line in found] == [["", "1"]] * 2
    assert {one["height"] for line in found for one in line} == {"48"}


SWEPT = ("fig3", "out")
BAD = [
    (("fig99",), "fig99"),
    (("fig6", "--out", "x.bmp"), "--out is x.bmp, expected a name in .png"),
    (("fig6", "out"), "FOLDER is for fig1, fig3"),
    (("fig7", "--crops", "0,0,1"), "--crops is for fig1, fig3"),
    (("fig3",), "expected the FOLDER of a finished sweep"),
    (("fig3", "nowhere"), "nowhere has no finished sweep"),
    (("fig8", "out", "--methods", "pi"), "out has no image of pi, which fig8 shows"),
    ((*SWEPT, "--crops", "0.9,0,0.2"), "--crops is '0.9,0,0.2', expected X,Y,SIZE"),
    ((*SWEPT, "--crops", "a"), "--crops is 'a', expected X,Y,SIZE"),
    ((*SWEPT, "--crops", "nan,0,1"), "--crops is 'nan,0,1', expected X,Y,SIZE"),
    ((*SWEPT, "--where", "seed=7"), "--where is 'seed=7', expected one of 0"),
    ((*SWEPT, "--where", "color=7"), "--where is 'color=7', expected model, height"),
    (("fig1", "broken"), "ring_base.png cannot be shown"),
    (("fig2a", "--trajectories", "none.json"), "there is no none.json"),
    (("fig2a", "--trajectories", "scores.json"), "scores.json is not what"),
    (("fig5", "--ground_truth", "broken/ring_base.png"), "is not what"),
    (("fig5", "--ground_truth", "scores.json", "--score", "x"), "--score is 'x', expected one of"),
    (("frontier", "--ground_truth", "scores.json", "--score", "joint"), "expected one of spectrum"),
    (("fig5", "--ground_truth", "scores.json", "--settings", "pi"), "--settings is 'pi', expected"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    swept(Path("out"))
    (swept(Path("broken")) / "ring_base.png").write_bytes(b"no image")
    scored(Path("scores.json"))
    assert figures.main(list(argv)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--counts", "1"], "--counts has 1 numbers, expected 3"),
        (["--sizes", "100", "--counts", "1"], "--sizes is 100, expected a multiple of 16"),
        (["--sizes", "256", "--counts", "0"], "--counts is 0, expected a whole number"),
        (["--steps", "0"], "--steps is 0, expected a whole number"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bad_input_of_trajectories(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(trajectories, "load_pipeline", None)
    assert trajectories.main(argv) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name != "ratios"])
def test_every_figure_renders(name, tmp_path, monkeypatch, capsys):
    """By its command, into a PNG that is not empty; matplotlib's settings stay as they were."""
    monkeypatch.chdir(tmp_path)
    before = matplotlib.rcParams.copy()
    more = []
    if name in image_rows.FIGURES:
        more = [str(swept(Path("out")))]
    elif name in ("fig5", "frontier"):
        more = ["--ground_truth", str(scored(Path("scores.json")))]
    elif name in ("fig2a", "fig2b", "fig18", "eq11"):
        more = ["--trajectories", str(SAVED)]
        more += ["--unguided", str(ROOT / sampled.UNGUIDED)] if name == "eq11" else []
    assert figures.main([name, *more]) == 0
    path = Path("outputs/figures") / f"{name}.png"
    assert capsys.readouterr().out.strip() == str(path)
    with Image.open(path) as picture:
        assert picture.width >= 2 * 3.3 * 100
        assert len(picture.convert("RGB").getcolors(2**24)) > 10
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_other_formats(tmp_path):
    for suffix in style.FORMATS:
        out = tmp_path / "new" / f"a{suffix}"
        assert figures.main(["fig7", "--out", str(out)]) == 0
        assert out.stat().st_size > 5_000


def test_without_matplotlib(monkeypatch):
    """One sentence that says what to install."""
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [n for n in sys.modules if n.startswith("dype.figures.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match="no matplotlib; pip install matplotlib"):
        importlib.import_module("dype.figures.__main__")
