"""Contact sheets and the summary."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_DEMO, run
from PIL import Image

from dype.pipelines import memory
from dype.sweep import contact_sheet, labels, results

pytestmark = pytest.mark.usefixtures("in_tmp_path")


COLORS = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250), "s": (200, 200, 0)}


def make_rows(*changes: dict) -> list[dict]:
    """Return rows of results.csv, and write an image of one color for each."""
    os.makedirs("out", exist_ok=True)
    empty = dict.fromkeys(results.COLUMNS, "")
    defaults = {"height": "64", "width": "96", "method": "dy_yarn", "seed": "0"}
    defaults |= {"prompt": "a sun", "seconds": "2.0", "peak_memory": str(memory.GIB)}
    rows = []
    for row in changes:
        name = row.pop("color")
        Image.new("RGB", (96, 64), COLORS[name]).save(f"out/{name}.png")
        rows.append(empty | defaults | {"file": f"{name}.png"} | row)
    return rows


def read_colors(sheet: Image.Image) -> list[list[str]]:
    """Return the colors of the images on a sheet, line by line; '?' is a gray box."""
    colors = COLORS | {"?": (211, 211, 211)}
    width, height = 320, round(320 * 64 / 96)
    numbers = np.zeros((sheet.height + 1, sheet.width + 1), int)  # with an edge above and at left
    for number, color in enumerate(colors.values(), 1):
        numbers[1:, 1:][(np.asarray(sheet) == color).all(-1)] = number
    is_corner = (numbers[1:, 1:] > 0) & (numbers[:-1, 1:] == 0) & (numbers[1:, :-1] == 0)
    grid: dict[int, list[str]] = {}
    for y, x in np.argwhere(is_corner[: 1 - height, : 1 - width]) + 1:
        corners = {numbers[y + dy, x + dx] for dy in (0, height - 1) for dx in (0, width - 1)}
        if len(corners) == 1:
            grid.setdefault(y, []).append([*colors][corners.pop() - 1])
    return [*grid.values()]


def test_contact_sheet():
    """Scales are lines, exponents columns; the static image has neither and is in every column."""
    rows = make_rows(
        {"color": "s", "method": "yarn"},
        {"color": "a", "dype_scale": "1", "dype_exponent": "1"},
        {"color": "b", "dype_scale": "1", "dype_exponent": "2"},
        {"color": "c", "dype_scale": "2", "dype_exponent": "1"},
        {"color": "a", "dype_scale": "2", "dype_exponent": "2", "error": "out of memory"},
    )

    def sheet_colors(columns):
        sheets = contact_sheet.contact_sheets(rows, Path("out"), (64, 96), columns)
        return [read_colors(sheet) for sheet in sheets]

    assert sheet_colors(None) == [[["s", "s"], ["a", "b"], ["c", "?"]]]
    assert sheet_colors("dype_scale") == [[["s", "s"], ["a", "c"], ["b", "?"]]]
    assert sheet_colors("1") == [[["s"], ["a"], ["c"]], [["s"], ["b"], ["?"]]]


def test_labels_name_the_varying_settings(monkeypatch):
    """Labels name only settings that vary; a scale that differs by method alone does not count."""
    texts = []

    def spy(pen, corner, lines, *args):
        texts.append(" ".join("".join(text for text, _ in line) for line in lines))

    monkeypatch.setattr(labels, "draw", spy)
    rows = make_rows(
        {"color": "a", "method": "dy_yarn", "dype_scale": "1"},
        {"color": "b", "method": "dy_ntk", "dype_scale": "2"},
        {"color": "c", "method": "dy_ntk", "dype_scale": "2", "seed": "1"},
    )
    contact_sheet.contact_sheets(rows, Path("out"), (64, 96), None)
    assert sorted(set(texts)) == ["dy_ntk", "dy_yarn", "seed 0", "seed 1"]
    texts.clear()
    prompts = [f"a yellow sun over blue mountains at {time}" for time in ("dawn", "dusk")]
    pairs = [(prompt, seed) for prompt in prompts for seed in "01"]
    rows = make_rows(*({"color": "a", "prompt": prompt, "seed": seed} for prompt, seed in pairs))
    contact_sheet.contact_sheets(rows, Path("out"), (96, 96), None)
    assert {text for text in texts if "seed" in text} == {
        f"seed {seed}, {prompt}" for prompt, seed in pairs
    }


def test_summary():
    """The summary has mean and deviation over seeds; failures are counted but not averaged."""
    rows = make_rows(
        {"color": "a", "seed": "0", "seconds": "1.0"},
        {"color": "b", "seed": "1", "seconds": "3.0"},
        {"color": "c", "seed": "2", "error": "out of memory", "seconds": "", "peak_memory": ""},
        {"color": "s", "method": "base"},
    )
    lines = contact_sheet.summarize_rows(rows).splitlines()
    assert lines[0].split()[:2] == ["images", "failed"]
    assert " ".join(lines[1].split()) == "2 1 2.0 (1.4) 1.00 (0.00) 96x64, dy_yarn"
    assert " ".join(lines[2].split()) == "1 0 2.0 1.00 96x64, base"


def test_the_summary_has_the_metrics():
    """The summary averages the values of metrics.csv, and ignores images without a value."""
    rows = make_rows(*({"color": "a", "seed": seed, "file": f"{seed}.png"} for seed in "012"))
    results.write_table(Path("out/results.csv"), results.COLUMNS, rows)
    entry = {"metric": "glcm", "protocol": "so"}
    values = [entry | {"file": f"{seed}.png", "value": str(seed)} for seed in (0, 2)]
    results.write_table(Path("out/metrics.csv"), results.METRIC_COLUMNS, values)
    header, line, *_ = contact_sheet.summarize_rows(results.read_rows(Path("out"))).splitlines()
    assert "glcm" in header
    assert " ".join(line.split()).endswith("1.000 (1.414) 96x64, dy_yarn")


def test_grid_from_a_finished_folder(capsys):
    """--grid_from draws the same sheets again, without a model."""
    assert run(*TINY_DEMO, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 0
    path = Path("out/comparison_64x64.png")
    before = path.read_bytes()
    path.unlink()
    capsys.readouterr()
    assert run("--grid_from", "out") == 0
    assert path.read_bytes() == before
    assert "comparison_64x64.png" in capsys.readouterr().out
    assert run("--grid_from", "out", "--cols", "1") == 0
    assert path.read_bytes() != before
    assert Path("out/comparison_64x64_2.png").exists()
    assert run("--grid_from", "out") == 0
    assert path.read_bytes() == before
    assert not Path("out/comparison_64x64_2.png").exists()


def test_narrow_images_and_long_prompts():
    """Labels are cut to the width of the sheet."""
    rows = make_rows({"color": "a", "prompt": "a sun " * 100}, {"color": "b", "seed": "1"})
    for size, columns in (((1024, 64), None), ((64, 96), "seed")):
        [sheet] = contact_sheet.contact_sheets(rows, Path("out"), size, columns)
        assert max(sheet.size) < 1400


def test_a_table_without_its_last_newline_keeps_its_last_row():
    """An editor may remove the newline; only tables of earlier versions have cut last lines."""
    entry = dict.fromkeys(results.METRIC_COLUMNS, "x") | {"value": "1"}
    make_rows()
    for name, columns, row in (
        (results.METRICS, results.METRIC_COLUMNS, entry),
        (results.RESULTS, results.COLUMNS, dict.fromkeys(results.COLUMNS, "1")),
    ):
        path = Path("out", name)
        results.write_table(path, columns, [row])
        path.write_text(path.read_text().rstrip("\n"))
        assert len(results.read_table(path, columns)) == 1
