"""The ground-truth table: its scores, intervals and pairs, and the generation of its images."""

import csv
import json
import re
import shutil
import signal
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dype.config import DyPEConfig
from dype.demo import evaluate, experiments, report, scores
from dype.demo.experiments import TABLES, Cell, image_paths, parse_setting
from dype.demo.measurements import Measurements
from dype.rope import METHODS, axis_frequencies

NAMES = {  # text -> name of the setting, None: the text
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
    "dy_yarn:base_resolution=512": "dy_yarn",
    "dy_cutoff:cutoff_width=1:spectrum_exponent=2": "dy_cutoff:cutoff_width=1",
}


@pytest.mark.parametrize("text", NAMES)
def test_settings(text):
    """A name is the text of the same setting, and begins with the name of the config."""
    setting = parse_setting(text)
    assert setting.name == (NAMES[text] or text)
    again = parse_setting(setting.name)
    assert again._replace(config=None) == setting._replace(config=None)
    configs = [replace(s.config, dype_scale=s.config.lambda_s) for s in (again, setting)]
    assert configs[0] == configs[1]
    assert setting.name.split(":")[0] == setting.config.name
    assert setting.config.dype == text.startswith("dy_")
    assert setting.config.shift == ("model" if text.endswith(":model") else None)


def test_numbers_of_settings():
    config = parse_setting("dy_pi:1:0.5").config
    assert (config.lambda_s, config.dype_exponent) == (1, 0.5)
    config = parse_setting("dy_cutoff:cutoff=0.5:attention_scale=0.3:attention_path=rising").config
    assert (config.cutoff, config.attention_scale, config.attention_path) == (0.5, 0.3, "rising")
    assert parse_setting("yarn_paper:alpha=2.0").config.alpha == 2


def test_settings_without_effect():
    """SETTING_METHODS has the methods whose frequencies follow a field."""

    def frequencies(method, **fields):
        config = DyPEConfig(method, **fields)
        return axis_frequencies(56, 10000.0, 64, 256, 0.7, config)[0].tolist()

    for name, methods in experiments.SETTING_METHODS.items():
        value = getattr(DyPEConfig(), name) / 8
        changed = [m for m in METHODS if frequencies(m, **{name: value}) != frequencies(m)]
        assert {*changed} == {*methods}


def test_help_has_the_grammar():
    assert f"\nSETTING is {experiments.GRAMMAR}\n" in evaluate.parser().format_help()


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


def test_images_of_older_versions_are_found():
    """Folders have the settings' older names, and no two settings share a folder."""
    assert {text: parse_setting(text).folder for text in FOLDERS} == FOLDERS
    cells = [cell for table in TABLES.values() for cell in experiments.plan_cells(table)]
    settings = {cell.setting.name: cell.setting.folder for cell in cells}
    assert len({*settings.values()}) == len(settings)


def test_static_forms():
    """STATIC_FORMS has the first method with the same static frequencies and m."""

    def static_table(name):
        f, m = axis_frequencies(56, 10000.0, 16, 64, 1.0, DyPEConfig(name, dype=False))
        return torch.cat([f, m.expand_as(f)]).tolist()

    for method in METHODS:
        first = next(name for name in METHODS if static_table(name) == static_table(method))
        message = f'STATIC_FORMS of dype/demo/experiments.py needs the entry "{method}": "{first}"'
        assert experiments.STATIC_FORMS[method] == first, message


def test_the_table_of_the_methods():
    """All methods at 2x, dynamic and static, on twelve prompts, each with its static form."""
    cells = experiments.plan_cells(TABLES["methods"])
    forms = {(cell.setting.config.method, cell.setting.config.dype) for cell in cells}
    assert {method for method, dynamic in forms if dynamic} == METHODS.keys() - {"base"}
    static = experiments.STATIC_FORMS
    assert {(static[method], False) for method in METHODS if method != "base"} <= forms
    assert {(cell.size, cell.count) for cell in cells} == {((1024, 1024), 12)}
    names = {cell.setting.name: cell for cell in cells}
    pairs = experiments.default_pairs(names)
    assert {("dy_yarn_power", "yarn"), ("dy_tasr", "tasr"), ("pi", "base")} <= {*pairs}
    assert {name for name, _ in pairs} == names.keys() - {"base"}


def test_no_setting_is_chosen_on_reported_prompts():
    """The prompts of "choice" are of a seed that no other table has, and it holds the choice."""
    choice = TABLES["choice"]
    assert choice.seed not in {table.seed for table in TABLES.values() if table is not choice}
    assert experiments.CHOSEN in [cell.setting.name for cell in experiments.plan_cells(choice)]


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    """No cell is planned twice; every baseline is in the table; --count limits the prompts."""
    table = TABLES[name]
    cells = experiments.plan_cells(table)
    keys = [(cell.size, cell.setting.name) for cell in cells]
    assert len({*keys}) == len(keys)
    assert {*table.baselines} <= {cell.setting.name for cell in cells}
    limited = experiments.plan_cells(table, 5)
    assert [cell.count for cell in limited] == [min(cell.count, 5) for cell in cells]


def test_tables_of_the_paper(tmp_path, monkeypatch, capsys, small_base):
    """One after another, each with its prompts, limited by --count, and in files of its name."""
    tables = {
        "one": experiments.Table("what?", ((2, ["base", "dy_pi"], 9),), baselines=("base",)),
        "two": experiments.Table("and?", ((2, ["base"], 1),), seed=3),
    }
    monkeypatch.setattr(evaluate, "TABLES", tables)
    monkeypatch.setattr(evaluate, "PAPER", list(tables))
    words = ["--paper", *tables, "--count", "2", "--steps", "1", "--processes", "1"]
    words += ["--out", str(tmp_path), "--save", str(tmp_path / "t.json")]
    assert evaluate.main(words) == 0
    out = capsys.readouterr().out
    assert out.index("one: what?") < out.index("| 64 | `dy_pi` | 2 |") < out.index("two: and?")
    folders = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert folders == {"seed_0/64/base", "seed_0/64/pi_2_2", "seed_3/64/base"}
    names = {path.name for path in tmp_path.glob("t*")}
    assert names == {f"t_{name}{end}" for name in tables for end in (".json", ".csv", "_pairs.csv")}
    assert json.loads((tmp_path / "t_two.json").read_text())["protocol"]["seed"] == 3
    shutil.rmtree(tmp_path / "seed_3")
    (tmp_path / "measurements.npz").unlink()
    (tmp_path / "seed_0/64/pi_2_2/001.png").unlink()
    assert evaluate.main([*words, "--drawn"]) == 0
    out = capsys.readouterr().out
    assert out.index("one: what?") < out.index("incomplete: dy_pi 64 px 1")
    assert out.index("two: and?") < out.index("incomplete: base 64 px 0")


def test_passes():
    """One, or half the size first: `twopass` at strength 0.3, `progressive` at its own."""
    first, last = ({"height": side, "width": side, "steps": 20} for side in (512, 1024))
    passes = {
        "": [last],
        ":twopass": [first, last | {"strength": 0.3}],
        ":progressive": [first, last | {"strength": None}],
    }
    for control, expected in passes.items():
        cell = Cell((1024, 1024), parse_setting(f"dy_yarn{control}"), 1)
        assert evaluate.resolve_cell_passes(cell, 20) == expected


def test_baselines_of_a_table():
    """Every setting is compared with them, beside its own."""
    names = ("base", "pi", "dy_pi", "dy_yarn")
    cells = {name: Cell((64, 64), parse_setting(name), 1) for name in names}
    defaults = [("pi", "base"), ("dy_pi", "pi"), ("dy_pi", "base"), ("dy_yarn", "base")]
    assert experiments.default_pairs(cells) == defaults
    added = [("base", "pi"), ("dy_yarn", "pi")]
    assert sorted(experiments.default_pairs(cells, ["pi"])) == sorted(defaults + added)
    against = experiments.pairs_against(["dy_pi:2", "yarn"], cells)
    assert against == [("base", "dy_pi"), ("pi", "dy_pi"), ("dy_yarn", "dy_pi")]


def test_size_not_square(tmp_path, small_base):
    """Width is first in the flag, the folder and the table; --against names the baseline.

    --save accepts its suffix in any case.
    """
    words = "pi base --against base --size 128x64 --steps 1 --count 1 --processes 1"
    out = ["--out", str(tmp_path), "--save", str(tmp_path / "saved.JSON")]
    assert evaluate.main([*words.split(), *out]) == 0
    with Image.open(tmp_path / "seed_0" / "128x64" / "pi_static" / "000.png") as image:
        assert image.size == (128, 64)
    saved = json.loads((tmp_path / "saved.JSON").read_text())
    assert {row["size"] for row in saved["rows"]} == {"128x64"}
    [pair] = saved["pairs"]
    assert (pair["setting"], pair["against"]) == ("pi", "base")


def test_controls_are_compared_with_their_settings():
    texts = ["dy_yarn", "dy_yarn:reversed", "yarn", "dy_yarn:model", "yarn:model", "base"]
    texts += ["dy_yarn:attention_scale=0.3", "yarn:attention_scale=0.3", "dy_yarn:1:1"]
    texts += ["dy_cutoff:cutoff=2", "dy_cutoff:cutoff=2:attention_path=sega"]
    settings = [parse_setting(text) for text in texts]
    pairs = experiments.default_pairs({s.name: Cell((64, 64), s, 1) for s in settings})
    assert ("dy_yarn:reversed", "dy_yarn") in pairs
    assert ("dy_yarn:reversed", "yarn") in pairs
    assert ("dy_yarn:model", "dy_yarn") in pairs
    assert ("dy_yarn:model", "yarn:model") in pairs
    assert ("dy_yarn:model", "yarn") not in pairs
    assert ("dy_yarn:attention_scale=0.3", "yarn:attention_scale=0.3") in pairs
    assert ("dy_yarn:attention_scale=0.3", "dy_yarn") in pairs
    assert ("yarn:attention_scale=0.3", "yarn") in pairs
    assert ("dy_yarn:1:1", "dy_yarn") in pairs
    assert ("dy_cutoff:cutoff=2:attention_path=sega", "dy_cutoff:cutoff=2") in pairs
    assert ("dy_yarn:attention_scale=0.3", "yarn") not in pairs


@pytest.mark.parametrize(
    ("dynamic", "static"),
    [
        ("dy_yarn:dype_start_sigma=0.8", "yarn"),
        (
            "dy_yarn_both:attention_scale=1.2:attention_path=rising:model",
            "yarn:attention_scale=1.2:model",
        ),
    ],
)
def test_static_form_of_settings_that_need_dype(dynamic, static):
    """The static form has the other settings alone."""
    settings = [parse_setting(text) for text in (dynamic, static)]
    cells = {setting.name: Cell((64, 64), setting, 1) for setting in settings}
    assert experiments.default_pairs(cells) == [(dynamic, static)]


SMALL = ["--size", "64", "--steps", "2", "--count", "3", "--processes", "1"]


@pytest.fixture(autouse=True)
def new_pipeline():
    """Load a pipeline in each test, as a process does."""
    evaluate.cached_pipeline.cache_clear()


@pytest.fixture
def small_base(monkeypatch):
    """Set a base resolution of 32 px, because at the demo's every image of 64 px is stock."""
    monkeypatch.setattr(experiments, "BASE", 32)
    monkeypatch.setattr(scores, "RESAMPLES", 20)


def read_pngs(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}


def test_interrupted_run(tmp_path, monkeypatch, capsys, small_base):
    """Existing images stay, missing ones are generated, and all are those of a single run."""
    words = [*SMALL, "base", "dy_pi", "pi", "dy_pi:reversed"]
    assert evaluate.main([*words, "--out", str(tmp_path / "whole")]) == 0
    whole_output = capsys.readouterr().out
    write, left = evaluate.records.write_atomically, [5]

    def write_or_interrupt(contents):
        if any(path.suffix == ".png" for path in contents):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        write(contents)

    monkeypatch.setattr(evaluate.records, "write_atomically", write_or_interrupt)
    parts = [*words, "--out", str(tmp_path / "parts")]
    assert evaluate.main(parts) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command generates the rest\n")
    assert len(read_pngs(tmp_path / "parts")) == 4
    evaluate.cached_pipeline.cache_clear()
    assert evaluate.main([*parts, "--drawn"]) == 0
    out = capsys.readouterr().out
    assert "| 64 | `base` | 3 |" in out
    assert "| 64 | `dy_pi` | 1 |" in out
    assert "incomplete: dy_pi 64 px 1, pi 64 px 0, dy_pi:reversed 64 px 0" in out
    assert "| `pi` |" not in out
    strip = ["--strip", str(tmp_path / "strip.jpg")]
    assert evaluate.main([*parts, "--save", str(tmp_path / "saved.json"), *strip]) == 0
    assert left[0] == -8  # images of the second run: 12 less the 4 of the first
    assert read_pngs(tmp_path / "parts") == read_pngs(tmp_path / "whole")
    names = ("saved.json", "saved.csv", "saved_pairs.csv", "strip.jpg")
    files = [tmp_path / name for name in names]
    with Image.open(files[3]) as image:  # three images of 160 px for each of four settings
        assert image.size == (3 * 160 + 2 * 6, 4 * (34 + 160 + 6 + 64) + 34)
    assert capsys.readouterr().out == whole_output + "".join(f"{path}\n" for path in files)
    saved = json.loads((tmp_path / "saved.json").read_text())
    names = [row["setting"] for row in saved["rows"]]
    assert names == ["truth", "truth_vae", "vae", "base", "dy_pi", "pi", "dy_pi:reversed"]
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    assert [row["setting"] for row in rows] == names
    assert rows[4]["lambda_s"] == "2.0"
    spans = zip(saved["rows"][4]["overlap"]["interval"], ("low", "high"), strict=True)
    for value, end in spans:
        assert float(rows[4][f"overlap_{end}"]) == pytest.approx(value, rel=1e-5)
    pairs = list(csv.DictReader(files[2].read_text().splitlines()))
    csv_pairs = [(row["setting"], row["against"]) for row in pairs]
    assert csv_pairs == [(row["setting"], row["against"]) for row in saved["pairs"]]
    assert saved["rows"][0]["overlap"]["mean"] > 0.7
    assert saved["rows"][1]["spectrum"]["mean"] > 0.01  # because the ridges differ
    assert (saved["protocol"]["steps"], saved["protocol"]["base_resolution"]) == (2, 512)
    assert len(set(read_pngs(tmp_path / "whole").values())) == 12


def test_two_processes_generate_the_same_images(tmp_path):
    words = ["base", "dy_pi", "--size", "64", "--steps", "1", "--count", "2", "--out"]
    assert evaluate.main([*words, str(tmp_path / "one"), "--processes", "1"]) == 0
    assert evaluate.main([*words, str(tmp_path / "two"), "--processes", "2"]) == 0
    assert len(read_pngs(tmp_path / "two")) == 4
    pairs = zip(*(sorted((tmp_path / name).rglob("*.png")) for name in ("one", "two")), strict=True)
    for first, second in pairs:
        gap = abs(report.read_image(first).astype(int) - report.read_image(second))
        assert gap.max() <= 2  # of 255, because rounding depends on the number of threads


def test_workers_end_with_their_parent():
    """A worker ends when the parent is killed, for the pipe that it holds is closed."""
    fork = get_context("fork")
    reader, writer = fork.Pipe(duplex=False)

    def work():
        evaluate.init_worker()
        signal.alarm(60)  # in case that the test fails
        writer.send("ready")
        signal.pause()

    def start_worker():
        fork.Process(target=work).start()
        signal.pause()

    parent = fork.Process(target=start_worker)
    parent.start()
    writer.close()
    assert reader.recv() == "ready"
    assert not reader.poll(0.5)
    parent.kill()
    assert reader.poll(30)
    with pytest.raises(EOFError):
        reader.recv()


BAD = {
    "yarm": "method is 'yarm', expected one of base",
    "dy_base": "'dy_base', expected base or [dy_]METHOD[:LA",
    "dy_yarn:1:2:3": "'dy_yarn:1:2:3', expected base or [dy_]METHOD[:LA",
    "dy_yarn:one": "'dy_yarn:one', expected base or [dy_]METHOD[:LA",
    "dy_yarn:": "'dy_yarn:', expected base or [dy_]METHOD[:LA",
    "dy_yarn:cutoff=1:2": "'dy_yarn:cutoff=1:2', expected base or [dy_]METHOD[:LA",
    "dy_yarn:cutoff=one": "'dy_yarn:cutoff=one', expected base or [dy_]METHOD[:LA",
    "dy_yarn:cutof=1": "'dy_yarn:cutof=1', expected base or [dy_]METHOD[:LA",
    "dy_yarn:shift=1": "'dy_yarn:shift=1', expected base or [dy_]METHOD[:LA",
    "dy_dy_yarn": "method is 'dy_yarn', expected one of base",
    "foo:static": "method is 'foo', expected one of base",
    "dy_yarn:1:2:dype_scale=3": "'dy_yarn:1:2:dype_scale=3', expected base or [dy_]METHOD[:LA",
    "base:cutoff=2": "'base:cutoff=2', expected no cutoff: it has no effect there",
    "base:attention_path=sega": "expected no attention_path: it has no effect there",
    "sega:attention_path=tide:sega_floor=2": "expected no sega_floor: it has no effect there",
    "yarn:attention_path=tide:alpha=2": "expected no alpha: it has no effect there",
    "yarn:sega_beta=2": "expected no sega_beta: it has no effect there",
    "yarn:attention_path=rising:attention_scale=1": "is static and ignores attention_path=rising",
    "yarn:text_repeat=x": "'yarn:text_repeat=x', expected base or [dy_]METHOD[:LA",
    "rdfc:rdfc_pairs=a": "rdfc_pairs is 'a', expected numbers as 8 or 8,9",
    "dy_yarn:cutoff=2": "'dy_yarn:cutoff=2', expected no cutoff: it has no effect there",
    "dy_yarn:alpha=2": "'dy_yarn:alpha=2', expected no alpha: it has no effect there",
    "vision_yarn:beta=9": "'vision_yarn:beta=9', expected no beta: it has no effect there",
    "dy_pi:cutoff_width=1": "expected no cutoff_width: it has no effect there",
    "dy_pi:spectrum_exponent=1": "expected no spectrum_exponent: it has no effect there",
    "dy_yarn:attention_path=up": "attention_path is 'up', expected one of",
    "dy_yarn:attention_path=rising": "attention_path is 'rising', expected an attention_scale",
    # spellings of older versions
    "yarn_paper:static": "'yarn_paper:static' is an old spelling, expected 'yarn_paper'",
    "yarn:static:model": "'yarn:static:model' is an old spelling, expected 'yarn:model'",
    "yarn:static:1": "'yarn:static:1' is an old spelling, expected 'yarn'",
    "dy_yarn:static:attention_scale=1.2:attention_path=rising": (
        "is an old spelling, expected 'yarn:attention_scale=1.2'"
    ),
    "yarn:static:cutoff=2": "'yarn:cutoff=2', expected no cutoff",
    "pi:1:1": "'pi:1:1' is static and ignores 1:1, expected 'dy_pi:1:1'",
    "yarn:reversed": "is static and ignores reversed, expected 'dy_yarn:reversed'",
    "yarn:1:cutoff=2": "'yarn:1:cutoff=2', expected no cutoff",
    "cutoff:attention_scale=1.2:attention_path=rising": (
        "is static and ignores attention_path=rising, "
        "expected 'dy_cutoff:attention_scale=1.2:attention_path=rising'"
    ),
    "base --size 64x": "--size is '64x', expected WIDTHxHEIGHT",
    "base --weights there": "--weights is there, expected the folder of a trained pipeline",
    "base --against dy_yarn:1:2": "--against is 'dy_yarn', expected one of base",
    "--paper main --quick": "expected at most one",
    "--paper mein": "--paper: invalid choice: 'mein'",
    "--paper --strip a.png": "--strip, expected one table with it",
    "--paper main --seed 1": "--seed, expected SETTINGS with it",
    "--quick --size 64": "--size, expected SETTINGS with it",
    "--quick --against base": "--against, expected SETTINGS with it",
    "dy_yarn:9": "dype_scale is 9.0",
    "base:1": "'base:1', expected base or [dy_]METHOD[:LA",
    "base:reversed": "'base:reversed', expected base or [dy_]METHOD[:LA",
    "dy_tasr:1:2": "'dy_tasr:1:2', expected base or [dy_]METHOD[:LA",
    "--quick base": "expected at most one",
    "base --size 100": "--size is 100, expected a multiple of 16",
    "base --count 0": "--count is 0, expected a whole number at least 1",
    "base --steps 0": "--steps is 0, expected",
    "base --guidance -1": "--guidance is -1.0, expected",
    "base --processes 0": "--processes is 0, expected",
    "base --seed -1": "--seed is -1, expected a whole number at least 0",
    "base --out there/protocol.json": "--out is there/protocol.json, expected a folder",
    "base --strip a.xyz": "--strip is a.xyz, expected",
    "base --save a.csv": "--save is a.csv, expected a name in .json",
    "base --size 64 --steps 3 --out there": "steps is 3, but there was generated with 20",
    "base --out odd": "odd/protocol.json is not a file of this program",
    "base --out bare": "steps is 20, but bare was generated with None",
    "base --out other": "dtype is ",
    "--sizes 64": "unrecognized arguments",
    "--drawn --out nowhere": "nowhere has none of these images",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words, tmp_path, monkeypatch, capsys):
    """Wrong input gives one sentence and exit code 2, before anything is loaded or written."""
    monkeypatch.chdir(tmp_path)
    weights = evaluate.weights_hash(Path(evaluate.DEMO.repo))
    no_dtype = json.dumps({"steps": 20, "guidance": 2.5, "dtype": ["x"], "weights": weights})
    texts = {"there": '{"steps": 20}', "odd": "[1]", "bare": "{}", "other": no_dtype}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "protocol.json").write_text(text)
    monkeypatch.setattr(evaluate, "cached_pipeline", None)
    assert evaluate.main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("dype.demo.evaluate: ")
    assert BAD[words] in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "odd", "other", "there"]


def test_truncated_image(tmp_path, capsys, small_base):
    """It gives a sentence with its name and exit code 1; after its deletion it is generated."""
    words = ["base", *SMALL, "--count", "1", "--out", str(tmp_path)]
    assert evaluate.main(words) == 0
    [path] = tmp_path.rglob("*.png")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    (tmp_path / "measurements.npz").unlink()
    assert evaluate.main(words) == 1
    assert f"{path} cannot be read; delete it" in capsys.readouterr().err
    path.unlink()
    assert evaluate.main(words) == 0
    assert path.read_bytes() == whole


def test_each_prompt_has_its_noise(tmp_path, monkeypatch):
    """The seed is 10000 times --seed, plus i, so that no two prompts share noise."""
    calls = []

    def record_call(pipe, caption, passes, seed, **settings):
        calls.append((caption, seed, passes))
        return Image.new("RGB", (64, 64))

    monkeypatch.setattr(evaluate, "cached_pipeline", lambda weights: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(evaluate, "apply_dype", lambda *_: None)
    monkeypatch.setattr(evaluate.multipass, "run_passes", record_call)
    args = evaluate.parser().parse_args(["base", "--out", str(tmp_path)])
    scenes = evaluate.sample_scenes(3, 2)
    captions = [scene.caption for scene in scenes]
    cells = [Cell((64, 64), parse_setting("base"), 2)]
    for job in evaluate.missing_images(3, cells, scenes, Measurements(tmp_path / "none"), args):
        evaluate.generate_image(*job)
    passes = [{"height": 64, "width": 64, "steps": 20}]
    assert calls == [(captions[0], 30_000, passes), (captions[1], 30_001, passes)]


@pytest.mark.parametrize("control", ["", ":reversed"])
def test_reversed_time(control, tmp_path, small_base):
    """The control sets the encoding to 1 - sigma at every call."""
    args = evaluate.parser().parse_args([*SMALL, "base"])
    pipe = evaluate.cached_pipeline(args.weights)
    sigmas = []

    def record_sigma(transformer, inputs, kwargs, output):
        sigma = float(kwargs["timestep"][0])
        sigmas.append((1 - sigma if control else sigma, float(transformer.pos_embed.sigma)))

    cell = Cell((64, 64), parse_setting("dy_pi" + control), 1)
    pipe.transformer.register_forward_hook(record_sigma, with_kwargs=True)
    [caption] = [scene.caption for scene in evaluate.sample_scenes(0, 1)]
    evaluate.generate_image(cell, 0, tmp_path / "0.png", caption, args)
    assert len(sigmas) == 2  # steps
    for expected, sigma in sigmas:
        assert sigma == pytest.approx(expected, abs=1e-6)


def save_pictures(folder: Path, size: tuple[int, int], names: list[str], count: int) -> list[Cell]:
    """Write images of a dark and a bright half, and return their cells; size: height, width."""
    cells = [Cell(size, parse_setting(name), count) for name in names]
    for cell in cells:
        for path in image_paths(cell, folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((*size, 3), 220, np.uint8)
            pixels[: size[0] // 2] = 30
            Image.fromarray(pixels).save(path)
    return cells


def test_a_strip_has_no_empty_cells(tmp_path):
    """All rows have as many images as the shortest; labels stand apart; crops are not resized."""
    wide = save_pictures(tmp_path, (256, 512), ["base"], 2)
    square = save_pictures(tmp_path, (512, 512), ["dy_pi"], 5)
    path = tmp_path / "strip.png"
    path.write_bytes(report.draw_image_strips([*wide, *square], tmp_path, path))
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    label, gap, side = 34, 6, 160
    assert pixels.shape == ((label + 80 + gap + side) + (label + side + gap + side) + label, 326)
    tops = [0, label + 80 + gap + side]
    for top, height in zip(tops, (80, 160), strict=True):
        assert (pixels[top : top + 4] == 255).all()  # space above the label, and below it
        assert (pixels[top + label - 3 : top + label] == 255).all()
        assert (pixels[top : top + label] < 100).any()
        bottom = top + label + height
        assert (pixels[bottom - 8, [80, 246]] > 200).all()
        crops = pixels[bottom + gap : bottom + gap + side]
        for left in (0, side + gap):
            column = crops[:, left + 80]
            assert ((column == 30) | (column == 220)).all()
            assert 0 < (column == 30).sum() < side


def test_an_image_of_another_size_is_no_pair(tmp_path, monkeypatch):
    """It is refused rather than resized, in the scores and in the strip."""
    cells = save_pictures(tmp_path, (64, 64), ["base"], 2)
    path = image_paths(cells[0], tmp_path)[1]
    Image.new("RGB", (64, 128)).save(path)
    sentence = f"{path} is 64x128 px, so it cannot be compared with truth of 64x64 px; delete it"
    with pytest.raises(OSError, match=re.escape(sentence)):
        report.draw_image_strips(cells, tmp_path, tmp_path / "a.png")
    monkeypatch.setattr(report, "truth_baselines", lambda *args: (None, {}))
    scenes, measurements = evaluate.sample_scenes(0, 2), Measurements(tmp_path / "none")
    with pytest.raises(OSError, match=re.escape(sentence)):
        report.score_cells(None, "float32", cells, scenes, tmp_path, measurements)
