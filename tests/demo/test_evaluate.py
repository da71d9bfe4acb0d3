"""The ground-truth table: its scores, intervals and pairs, and how its images are drawn."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
from PIL import Image, ImageFilter

from dype.config import DyPEConfig
from dype.demo import evaluate, experiments, report, scores
from dype.demo.experiments import Cell, setting
from dype.demo.layout_check import check
from dype.demo.scenes import render, sample_scene
from dype.demo.scores import log_spectrum, patch_features
from dype.metrics import intervals
from dype.rope import METHODS, axis_frequencies


def scenes(count, seed=7):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def blurred(picture):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(2)))


def alike(values):
    """A set whose images have nothing but these numbers, whatever is asked of them."""
    return scores.Judged(*[values] * 5)


def test_spectrum():
    """White noise is flat, a wave is in its own band, and twice the contrast is ln 4 everywhere."""
    noise = np.random.default_rng(0).normal(128, 20, (128, 128, 1)).repeat(3, 2)
    flat = log_spectrum(noise)
    assert len(flat) == 16  # 4 octaves, from 4 to 64 cycles per image
    assert np.ptp(flat[4:]) < 0.5
    wave = 128 + 50 * np.cos(2 * np.pi * 17 * np.arange(128) / 128)
    wave = np.broadcast_to(wave[:, None, None], noise.shape)
    assert log_spectrum(wave).argmax() == 8  # [16, 19) cycles
    assert scores.spectrum(alike(flat[None]), alike(flat[None])) == 0
    doubled = log_spectrum(2 * noise - noise.mean())
    found = scores.spectrum(alike(doubled[None]), alike(flat[None]))
    assert found == pytest.approx(np.log(4))


def test_patch_distance_is_frechets(monkeypatch):
    """Against scipy's matrix root of the product; |shift|^2 for a moved set, 0 for the same."""

    def picture_of(features):
        monkeypatch.setattr(scores, "patch_features", lambda picture: features)
        [scene] = scenes(1)
        return scores.judged([render(scene, 64)], [scene])

    rng = np.random.default_rng(0)
    some, others = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)), rng.normal(1, 2, (400, 6))
    picture, truth = picture_of(some), picture_of(others)
    root = scipy.linalg.sqrtm(np.cov(some.T, bias=True) @ np.cov(others.T, bias=True)).real
    traces = np.trace(np.cov(some.T, bias=True)) + np.trace(np.cov(others.T, bias=True))
    expected = np.sum((some.mean(0) - others.mean(0)) ** 2) + traces - 2 * np.trace(root)
    assert scores.patches(picture, truth) == pytest.approx(1000 * expected, rel=1e-9)
    assert scores.patches(picture, picture) == pytest.approx(0, abs=1e-6)
    assert scores.patches(picture, picture_of(some + 2)) == pytest.approx(24_000)


def test_patch_features():
    """None on one color; as strong on a dark ground as on a light one; 32 px patches."""
    flat = np.full((64, 96, 3), 90, np.uint8)
    assert patch_features(flat).shape == (6, 32)
    assert abs(patch_features(flat)).max() < 1e-5
    texture = np.random.default_rng(0).integers(100, 200, (64, 64, 1), np.uint8).repeat(3, 2)
    light, dark = patch_features(texture), patch_features(texture // 2)
    np.testing.assert_allclose(light, dark, rtol=0.05)


def test_scores_of_truth_and_of_what_is_wrong():
    """Other leaves are as good as the truth, blur spoils the texture, other shapes the layout."""
    some = scenes(6)
    truth = scores.judged([render(scene, 256) for scene in some], some)
    pictures = [render(replace(scene, seed=scene.seed + 1), 256) for scene in some]
    other = scores.judged(pictures, some)
    blur = scores.judged([blurred(picture) for picture in pictures], some)
    shapes = {
        "disk": "cross",
        "square": "ring",
        "triangle": "disk",
        "ring": "cross",
        "cross": "disk",
    }
    wrong = [replace(scene, shape=shapes[scene.shape]) for scene in some]
    wrong = scores.judged([render(scene, 256) for scene in wrong], some)
    assert scores.layout(other, truth) == scores.layout(blur, truth) == 1
    assert scores.layout(wrong, truth) == scores.joint(wrong, truth) == 0
    assert scores.overlap(other, truth) > 0.85 > scores.overlap(wrong, truth)
    for score in (scores.spectrum, scores.patches):
        assert score(truth, truth) == pytest.approx(0, abs=1e-6)
        assert score(blur, truth) > 5 * score(other, truth)
    expected = np.exp(-scores.spectrum(blur, truth))
    assert scores.joint(blur, truth) == pytest.approx(expected)


def test_bootstrap_covers_the_mean(monkeypatch):
    """About 95 of 100 intervals hold the true mean; the width is that of theory."""
    monkeypatch.setattr(scores, "DRAWS", 300)
    rng, covered, widths = np.random.default_rng(1), 0, []
    for _ in range(200):
        sample = rng.normal(3, 2, 60)
        found = scores.bootstrap(lambda of: of.overlap.mean(), alike(sample))
        low, high = found["interval"]
        covered += low < 3 < high
        widths.append(high - low)
        assert found["mean"] == sample.mean()
    assert 180 <= covered <= 198
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / 60**0.5, rel=0.05)


def test_differences_are_paired():
    """0 between equals; a constant gap has no width, however far the images differ."""
    some = scenes(4)
    truth = scores.judged([render(scene, 128) for scene in some], some)
    same = scores.difference(truth, truth, truth)
    layout = same.pop("layout")
    assert all(found == {"mean": 0, "interval": [0, 0]} for found in same.values())
    assert layout["mean"] == 0
    assert layout["interval"] == pytest.approx([-1.96 / 6, 1.96 / 6])  # n + 2 = 6
    worse = truth._replace(overlap=truth.overlap - 0.25)
    found = scores.difference(worse, truth, truth)["overlap"]
    assert [found["mean"], *found["interval"]] == pytest.approx([-0.25] * 3)


def test_intervals_of_distances_hold_the_value(monkeypatch):
    """A set drawn with replacement is farther off: percentiles would lie beside a small distance.

    Two sets of one law, and sets 0.5 apart: the intervals hold the value always, and the distance
    that many images would have in 85 of 100 and more.
    """
    monkeypatch.setattr(scores, "DRAWS", 200)
    rng, held = np.random.default_rng(2), 0
    for _ in range(100):
        some, others = rng.normal(0.5, 1, (32, 16)), rng.normal(0, 1, (32, 16))
        for these, true in ((some, 0.5), (rng.normal(0, 1, (32, 16)), 0)):
            found = scores.bootstrap(scores.spectrum, alike(these), alike(others), distance=True)
            low, high = found["interval"]
            assert low <= found["mean"] <= high
            held += true == 0.5 and low < np.hypot(0.5, (2 / 32) ** 0.5) < high
    assert held >= 85


def test_shares_of_the_same_pictures(monkeypatch):
    """The paired interval covers the true gain, also where few images differ."""
    rng, covered = np.random.default_rng(3), 0
    for _ in range(400):
        other = rng.random(32) < 0.9
        right = np.where(rng.random(32) < 0.1, True, other)  # mends a tenth of what is wrong
        low, high = intervals.paired_shares(right.astype(float), other.astype(float))
        covered += low < 0.1 * 0.1 < high
    assert covered >= 380


def test_wilson():
    right, texture = np.array([1.0] * 90 + [0.0] * 10), np.ones((100, 2, 2))
    of = scores.Judged(right, right, texture[:, 0], texture[:, 0], texture)
    found = scores.score(of, of)["layout"]
    assert [found["mean"], *found["interval"]] == pytest.approx([0.9, 0.826, 0.945], abs=5e-4)
    assert scores.shown(found) == "0.90 [0.83, 0.94]"


NAMES = {  # what is asked for -> its name, None: the same
    "base": None,
    "base:model": None,
    "yarn": None,
    "dy_yarn": None,
    "dy_yarn:1:2": "dy_yarn",
    "dy_ntk:2": "dy_ntk",
    "dy_ntk:1": None,
    "dy_pi:2:0.5": None,
    "dy_pi:0:1:base_resolution=128": None,
    "dy_pi:1:1:reversed": None,
    "dy_tasr": None,
    "yarn:model": None,
    "yarn_paper:alpha=2.0": "yarn_paper:alpha=2",
    "dy_cutoff:cutoff=1": "dy_cutoff",
    "dy_cutoff:cutoff=0.5:attention_scale=0.3:attention_path=rising:model": None,
    "dy_yarn:dype_start_sigma=0.123456789:progressive": None,
}


@pytest.mark.parametrize("text", NAMES)
def test_settings(text):
    """A name is read again as what it names, and begins with the config's own name."""
    found = setting(text)
    assert found.name == (NAMES[text] or text)
    again = setting(found.name)
    assert (again.name, again.control, again.more) == (found.name, found.control, found.more)
    same = [replace(one.config, dype_scale=one.config.lambda_s) for one in (again, found)]
    assert same[0] == same[1]
    assert found.name.split(":")[0] == found.config.name
    assert found.config.dype == text.startswith("dy_")
    assert found.config.shift == ("model" if text.endswith(":model") else None)


def test_numbers_of_settings():
    config = setting("dy_pi:1:0.5").config
    assert (config.lambda_s, config.dype_exponent) == (1, 0.5)
    config = setting("dy_cutoff:cutoff=0.5:attention_scale=0.3:attention_path=rising").config
    assert (config.cutoff, config.attention_scale, config.attention_path) == (0.5, 0.3, "rising")
    assert setting("yarn_paper:alpha=2.0").config.alpha == 2


FOLDERS = {
    "base:model": "base_model",
    "yarn_paper": "yarn_paper_static",
    "dy_yarn_paper": "yarn_paper_1_2",
    "dy_pi:1:1:reversed": "pi_1_1_reversed",
    "dy_tasr": "tasr",
    "dy_cutoff:attention_scale=1.2:attention_path=rising": (
        "cutoff_attention_scale=1.2_attention_path=rising"
    ),
}


def test_images_of_before_are_found():
    """Folders have the settings' older names, of which none is another setting's."""
    assert {text: setting(text).folder for text in FOLDERS} == FOLDERS
    settings = {cell.setting.name: cell.setting.folder for cell in experiments.plan("cutoff")}
    assert len({*settings.values()}) == len(settings)


def test_static_forms():
    """Of every method the first whose static frequencies and m are the same."""

    def table(name):
        f, m = axis_frequencies(56, 10000.0, 16, 64, 1.0, DyPEConfig(name, dype=False))
        return [*f.tolist(), m.item()]

    for method in METHODS:
        first = next(name for name in METHODS if table(name) == table(method))
        assert experiments.STATIC[method] == first


def test_the_table_holds_every_method():
    """At 2x all methods, dynamic and static; at 4x base and three methods in both forms."""
    cells = experiments.plan("default")
    at = {s: [cell for cell in cells if cell.size == (s, s)] for s in (256, 512, 1024)}
    assert [cell.setting.name for cell in at[256]] == ["base"]
    twice = {(cell.setting.config.method, cell.setting.config.dype) for cell in at[512]}
    assert {method for method, dynamic in twice if dynamic} == METHODS.keys() - {"base"}
    static = experiments.STATIC
    assert {(static[method], False) for method in METHODS if method != "base"} <= twice
    assert {cell.count for cell in at[512]} == {64}
    assert len(at[1024]) == 1 + 3 * 2
    names = {cell.setting.name: cell for cell in at[512]}
    pairs = experiments.compared(names)
    assert ("dy_yarn_power", "yarn") in pairs
    assert ("dy_tasr", "tasr") in pairs
    assert ("pi", "base") in pairs
    assert {name for name, _ in pairs} == names.keys() - {"base"}


def test_the_table_of_the_cutoffs():
    """All methods at 2x; the chosen and their rivals at every size, square and 2:1."""
    cells = experiments.plan("cutoff")
    at = {}
    for cell in cells:
        at.setdefault(cell.size, []).append(cell.setting.name)
    assert [*at] == [(512, 512), (1024, 1024), (256, 512), (512, 1024)]
    rivals = {setting(one).name for one in experiments.RIVALS}
    assert len(rivals) == 5
    assert all(rivals <= {*names} and len({*names}) == len(names) for names in at.values())
    assert {cell.setting.config.method for cell in cells if cell.size == (512, 512)} == {*METHODS}
    held, named = experiments.couples([], [], cutoff=True), {cell.setting.name for cell in cells}
    assert {name for pair in held for name in pair} <= named
    assert ("dy_cutoff:model", "dy_cutoff") in held
    assert ("dy_cutoff:model", "dy_yarn_paper:model") in held
    assert ("dy_cutoff", "dy_yarn_paper") in held


def test_a_size_that_is_not_square(tmp_path, short):
    """Width first, in the flag, the folder and the table; all others are held against one."""
    words = "pi base --against base --size 128x64 --steps 1 --count 1 --processes 1"
    out = ["--out", str(tmp_path), "--save", str(tmp_path / "saved.json")]
    assert evaluate.main([*words.split(), *out]) == 0
    with Image.open(tmp_path / "seed_0" / "128x64" / "pi_static" / "000.png") as picture:
        assert picture.size == (128, 64)
    found = json.loads((tmp_path / "saved.json").read_text())
    assert {row["size"] for row in found["rows"]} == {"128x64"}
    [pair] = found["pairs"]
    assert (pair["setting"], pair["against"]) == ("pi", "base")


def test_truth_that_is_not_square():
    """The layout of the square scene, stretched; the leaves and their spectrum are those of it."""
    for scene in scenes(4):
        square, wide = render(scene, 256), render(scene, 128, 256)
        assert wide.shape == (128, 256, 3)
        assert (render(scene, 256, 256) == square).all()
        verdict = check(wide, scene.color, scene.ground)
        assert verdict.layout
        assert verdict.shape == scene.shape
        # ground in the corner, the same leaves under another light
        corner = wide[:16, :16].astype(float) / square[:16, :16]
        assert corner.std((0, 1)).max() < 0.05
    halves = np.mean([np.exp(log_spectrum(half)) for half in (wide[:, :128], wide[:, 128:])], 0)
    np.testing.assert_allclose(log_spectrum(wide), np.log(halves))


def test_controls_are_held_against_what_they_control():
    some = ["dy_yarn", "dy_yarn:reversed", "yarn", "dy_yarn:model", "yarn:model", "base"]
    some += ["dy_yarn:attention_scale=0.3", "yarn:attention_scale=0.3"]
    names = {setting(text).name: Cell((64, 64), setting(text), 1) for text in some}
    pairs = experiments.compared(names)
    assert ("dy_yarn:reversed", "dy_yarn") in pairs
    assert ("dy_yarn:reversed", "yarn") in pairs
    assert ("dy_yarn:model", "dy_yarn") in pairs
    assert ("dy_yarn:model", "yarn:model") in pairs
    assert ("dy_yarn:model", "yarn") not in pairs
    assert ("dy_yarn:attention_scale=0.3", "yarn:attention_scale=0.3") in pairs
    assert ("dy_yarn:attention_scale=0.3", "yarn") not in pairs


SMALL = ["--size", "64", "--steps", "2", "--count", "3", "--processes", "1"]


@pytest.fixture(autouse=True)
def fresh():
    """A pipeline that no other test has had, as a process has."""
    evaluate.pipeline.cache_clear()


@pytest.fixture
def short(monkeypatch):
    """Settings at the demo's base resolution would be stock at 64 px: here it is 32 px."""
    monkeypatch.setattr(experiments, "BASE", 32)
    monkeypatch.setattr(scores, "DRAWS", 20)


def drawn(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}


def test_table_of_a_run_that_was_interrupted(tmp_path, monkeypatch, capsys, short):
    """What is there stays, what is missing is drawn, and both are as in one go."""
    words = [*SMALL, "base", "dy_pi", "pi", "dy_pi:reversed"]
    assert evaluate.main([*words, "--out", str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    write, left = evaluate.records.write_atomically, [5]

    def killed(contents):
        if any(path.suffix == ".png" for path in contents):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        write(contents)

    monkeypatch.setattr(evaluate.records, "write_atomically", killed)
    parts = [*words, "--out", str(tmp_path / "parts")]
    assert evaluate.main(parts) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command draws the rest\n")
    assert len(drawn(tmp_path / "parts")) == 4
    evaluate.pipeline.cache_clear()
    assert evaluate.main([*parts, "--drawn"]) == 0
    out = capsys.readouterr().out
    assert "| 64 | `base` | 3 |" in out
    assert "| 64 | `dy_pi` | 1 |" in out
    assert "not all drawn: dy_pi 64 px 1, pi 64 px 0, dy_pi:reversed 64 px 0" in out
    assert "| `pi` |" not in out
    assert evaluate.main([*parts, "--save", str(tmp_path / "saved.json")]) == 0
    assert left[0] == -8  # images that the second run drew: 12 less the 4 of the first
    assert drawn(tmp_path / "parts") == drawn(tmp_path / "whole")
    files = [tmp_path / name for name in ("saved.json", "saved.csv", "saved_pairs.csv")]
    assert capsys.readouterr().out == printed + "".join(f"{path}\n" for path in files)
    found = json.loads((tmp_path / "saved.json").read_text())
    names = [row["setting"] for row in found["rows"]]
    assert names == ["truth", "truth_vae", "vae", "base", "dy_pi", "pi", "dy_pi:reversed"]
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert [row["setting"] for row in rows] == names
    assert rows[4]["lambda_s"] == "2.0"
    spans = zip(found["rows"][4]["overlap"]["interval"], ("low", "high"), strict=True)
    for value, end in spans:
        assert float(rows[4][f"overlap_{end}"]) == pytest.approx(value, rel=1e-5)
    pairs = list(csv.DictReader(files[2].read_text().splitlines()))
    held = [[(row["setting"], row["against"]) for row in some] for some in (pairs, found["pairs"])]
    assert held[0] == held[1]
    assert found["rows"][1]["layout"]["mean"] == 1
    assert found["rows"][1]["spectrum"]["mean"] > 0.01  # other leaves, not the same
    assert found["protocol"]["steps"] == 2
    pictures = drawn(tmp_path / "whole").values()
    assert len(set(pictures)) == 12


def test_two_processes_draw_what_one_does(tmp_path):
    words = ["base", "dy_pi", "--size", "64", "--steps", "1", "--count", "2", "--out"]
    assert evaluate.main([*words, str(tmp_path / "one"), "--processes", "1"]) == 0
    assert evaluate.main([*words, str(tmp_path / "two"), "--processes", "2"]) == 0
    assert len(drawn(tmp_path / "two")) == 4
    pairs = zip(*(sorted((tmp_path / name).rglob("*.png")) for name in ("one", "two")), strict=True)
    for first, second in pairs:
        gap = abs(report.opened(first).astype(int) - report.opened(second))
        assert gap.max() <= 2  # of 255: another number of threads rounds otherwise


BAD = {
    "yarm": "method is 'yarm', expected one of base",
    "dy_base": "'dy_base', expected base or",
    "dy_yarn:1:2:3": "'dy_yarn:1:2:3', expected base or",
    "dy_yarn:one": "'dy_yarn:one', expected base or",
    "dy_yarn:": "'dy_yarn:', expected base or",
    "dy_yarn:cutoff=1:2": "'dy_yarn:cutoff=1:2', expected base or",
    "dy_yarn:cutoff=one": "'dy_yarn:cutoff=one', expected base or",
    "dy_yarn:cutof=1": "unknown setting 'cutof'",
    "dy_yarn:1:2:dype_scale=3": "'dy_yarn:1:2:dype_scale=3', expected base or",
    "base:cutoff=2": "'base:cutoff=2', expected base or",
    "dy_yarn:cutoff=2": "'dy_yarn:cutoff=2', expected no cutoff: it has no effect there",
    "dy_yarn:attention_path=up": "attention_path is 'up', expected one of",
    "dy_yarn:attention_path=rising": "attention_path is 'rising', expected an attention_scale",
    # as they were spelled before
    "yarn_paper:static": "'yarn_paper:static' is an old spelling, expected 'yarn_paper'",
    "yarn:static:model": "'yarn:static:model' is an old spelling, expected 'yarn:model'",
    "pi:1:1": "'pi:1:1' is static and ignores a part, expected 'dy_pi:1:1'",
    "yarn:reversed": "is static and ignores a part, expected 'dy_yarn:reversed'",
    "cutoff:attention_scale=1.2:attention_path=rising": (
        "expected 'dy_cutoff:attention_scale=1.2:attention_path=rising'"
    ),
    "--quick --size 64x": "--size is '64x', expected WIDTHxHEIGHT",
    "base --size 64x": "--size is '64x', expected WIDTHxHEIGHT",
    "base --weights there": "--weights is there, expected the folder of a trained pipeline",
    "base --against dy_yarn:1:2": "--against is 'dy_yarn', expected one of base",
    "--cutoff base": "expected at most one",
    "--quick --against base": "--against, expected SETTINGS with it",
    "dy_yarn:9": "dype_scale is 9.0",
    "base:1": "'base:1', expected base or",
    "base:reversed": "'base:reversed', expected base or",
    "dy_tasr:1:2": "'dy_tasr:1:2', expected base or",
    "--quick --full": "expected at most one",
    "--quick base": "expected at most one",
    "base --size 100": "--size is 100, expected a multiple of 16",
    "base --count 0": "--count is 0, expected a whole number at least 1",
    "base --steps 0": "--steps is 0, expected",
    "base --processes 0": "--processes is 0, expected",
    "base --seed -1": "--seed is -1, expected a whole number at least 0",
    "base --out there/protocol.json": "--out is there/protocol.json, expected a folder",
    "base --strip a.xyz": "--strip is a.xyz, expected",
    "base --save a.csv": "--save is a.csv, expected a name in .json",
    "base --size 64 --steps 3 --out there": "steps is 3, but there was drawn with 20",
    "base --out odd": "odd/protocol.json is not of this program",
    "base --out bare": "steps is 20, but bare was drawn with None",
    "base --out other": "dtype is ",
    "--sizes 64": "unrecognized arguments",
    "--drawn --out nowhere": "nowhere has none of these images",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words, tmp_path, monkeypatch, capsys):
    """One sentence, exit code 2, before anything is loaded or written."""
    monkeypatch.chdir(tmp_path)
    weights = evaluate.weights_hash(Path(evaluate.DEMO.repo))
    other = json.dumps({"steps": 20, "true_cfg": 5.0, "dtype": ["x"], "weights": weights})
    texts = {"there": '{"steps": 20}', "odd": "[1]", "bare": "{}", "other": other}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "protocol.json").write_text(text)
    monkeypatch.setattr(evaluate, "pipeline", None)
    assert evaluate.main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("dype.demo.evaluate: ")
    assert BAD[words] in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "odd", "other", "there"]


def test_a_picture_that_is_cut_off(tmp_path, capsys, short):
    """Named, exit code 1; deleted, it is drawn again."""
    words = ["base", *SMALL, "--count", "1", "--out", str(tmp_path)]
    assert evaluate.main(words) == 0
    [path] = tmp_path.rglob("*.png")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert evaluate.main(words) == 1
    assert f"{path} cannot be read; delete it" in capsys.readouterr().err
    path.unlink()
    assert evaluate.main(words) == 0
    assert path.read_bytes() == whole


def test_each_prompt_has_its_noise(tmp_path, monkeypatch):
    """Seed 10000 of the prompts' seed + i: halves of different prompts share none."""
    seen = []

    def note(pipe, caption, passes, seed, **more):
        seen.append((caption, seed, passes))
        return Image.new("RGB", (64, 64))

    monkeypatch.setattr(evaluate, "pipeline", lambda weights: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(evaluate, "apply_dype", lambda *_: None)
    monkeypatch.setattr(evaluate.multipass, "run_passes", note)
    args = evaluate.parser().parse_args(["base", "--seed", "3"])
    scenes = evaluate.sampled(args)
    cell = Cell((64, 64), setting("base"), 2)
    for i in range(2):
        evaluate.draw(cell, i, tmp_path / f"{i}.png", scenes[i].caption, args)
    whole = [{"height": 64, "width": 64, "steps": 20}]
    assert seen == [(scenes[0].caption, 30_000, whole), (scenes[1].caption, 30_001, whole)]


@pytest.mark.parametrize("control", ["", ":reversed"])
def test_reversed_time(control, tmp_path, short):
    """The control hands the encoding 1 - sigma at every call."""
    args = evaluate.parser().parse_args([*SMALL, "base"])
    pipe = evaluate.pipeline(args.weights)
    seen = []

    def note(transformer, inputs, kwargs):
        sigma = float(kwargs["timestep"][0])
        seen.append((1 - sigma if control else sigma, float(transformer.pos_embed.sigma)))

    cell = Cell((64, 64), setting("dy_pi" + control), 1)
    pipe.transformer.register_forward_hook(lambda m, a, k, out: note(m, a, k), with_kwargs=True)
    evaluate.draw(cell, 0, tmp_path / "0.png", evaluate.sampled(args)[0].caption, args)
    assert len(seen) == 2 * 2  # steps, with and without the prompt
    for expected, sigma in seen:
        assert sigma == pytest.approx(expected, abs=1e-6)
