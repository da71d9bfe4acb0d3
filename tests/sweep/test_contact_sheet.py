"""Contact sheets and the summary."""

import os
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, run
from PIL import Image, ImageDraw

from dype.pipelines import memory
from dype.sweep import contact_sheet, results

pytestmark = pytest.mark.usefixtures("own_folder")


COLORS = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250), "s": (200, 200, 0)}


def rows_of(*given: dict) -> list[dict]:
    """Rows of results.csv, and plain images of a color each for them."""
    os.makedirs("out", exist_ok=True)
    empty = dict.fromkeys(results.COLUMNS, "")
    usual = {"height": "64", "width": "96", "method": "dy_yarn", "seed": "0", "prompt": "a ring"}
    usual |= {"seconds": "2.0", "peak_memory": str(memory.GIB)}
    rows = []
    for one in given:
        name = one.pop("color")
        Image.new("RGB", (96, 64), COLORS[name]).save(f"out/{name}.png")
        rows.append(empty | usual | {"file": f"{name}.png"} | one)
    return rows


def colors(sheet: Image.Image) -> list[list[str]]:
    """The images on a sheet, row by row, by their colors; '?' is a gray box."""
    found = np.asarray(sheet).astype(int)
    width = 320
    height = round(320 * 64 / 96)
    names = {value: name for name, value in COLORS.items()} | {(211, 211, 211): "?"}
    grid = []
    for y in range(found.shape[0] - height + 1):
        row = []
        for x in range(found.shape[1] - width + 1):
            corners = [
                tuple(found[y + dy, x + dx]) for dy in (0, height - 1) for dx in (0, width - 1)
            ]
            outside = y == 0 or tuple(found[y - 1, x]) not in names
            before = x == 0 or tuple(found[y, x - 1]) not in names
            if outside and before and len(set(corners)) == 1 and corners[0] in names:
                row.append(names[corners[0]])
        if row:
            grid.append(row)
    return grid


def test_contact_sheet():
    """Scales down, exponents across; the static image, which has neither, in every column."""
    rows = rows_of(
        {"color": "s", "method": "yarn"},
        {"color": "a", "dype_scale": "1", "dype_exponent": "1"},
        {"color": "b", "dype_scale": "1", "dype_exponent": "2"},
        {"color": "c", "dype_scale": "2", "dype_exponent": "1"},
        {"color": "a", "dype_scale": "2", "dype_exponent": "2", "error": "out of memory"},
    )

    def shown(columns):
        sheets = contact_sheet.contact_sheets(rows, Path("out"), (64, 96), columns)
        return [colors(sheet) for sheet in sheets]

    assert shown(None) == [[["s", "s"], ["a", "b"], ["c", "?"]]]
    assert shown("dype_scale") == [[["s", "s"], ["a", "c"], ["b", "?"]]]
    assert shown("1") == [[["s"], ["a"], ["c"]], [["s"], ["b"], ["?"]]]


def test_labels_name_what_varies(monkeypatch):
    """And nothing else: a scale that each method has of its own is no axis."""
    written = []
    text = ImageDraw.ImageDraw.text

    def noted(self, at, words, *args, **kwargs):
        written.append(words)
        with monkeypatch.context() as plain:  # older Pillows draw line by line by the same method
            plain.setattr(ImageDraw.ImageDraw, "text", text)
            return text(self, at, words, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    rows = rows_of(
        {"color": "a", "method": "dy_yarn", "dype_scale": "1"},
        {"color": "b", "method": "dy_ntk", "dype_scale": "2"},
        {"color": "c", "method": "dy_ntk", "dype_scale": "2", "seed": "1"},
    )
    contact_sheet.contact_sheets(rows, Path("out"), (64, 96), None)
    assert sorted(set(written)) == ["dy_ntk", "dy_yarn", "seed 0", "seed 1"]
    written.clear()
    lit = [f"a yellow cross on teal leaves, lit from {side}" for side in ("above", "below")]
    rows = rows_of(*({"color": "a", "prompt": one, "seed": seed} for one in lit for seed in "01"))
    contact_sheet.contact_sheets(rows, Path("out"), (96, 96), None)
    heads = {label.replace("\n", " ") for label in written if "seed" in label}
    assert heads == {f"seed {seed}, {one}" for one in lit for seed in "01"}


def test_summary():
    """Mean and deviation over seeds, per setting; failures are counted, not averaged."""
    rows = rows_of(
        {"color": "a", "seed": "0", "seconds": "1.0"},
        {"color": "b", "seed": "1", "seconds": "3.0"},
        {"color": "c", "seed": "2", "error": "out of memory", "seconds": "", "peak_memory": ""},
        {"color": "s", "method": "base"},
    )
    lines = contact_sheet.summarize_rows(rows).splitlines()
    assert " ".join(lines[1].split()) == "2 1 2.0 (1.4) 1.00 (0.00) 64x96, dy_yarn"
    assert " ".join(lines[2].split()) == "1 0 2.0 1.00 64x96, base"


def test_the_summary_has_the_metrics():
    """Those of metrics.csv, which results.csv is joined with; an image without one is left out."""
    rows = rows_of(*({"color": "a", "seed": seed, "file": f"{seed}.png"} for seed in "012"))
    results.write_table(Path("out/results.csv"), results.COLUMNS, rows)
    entry = {"metric": "glcm", "protocol": "so"}
    values = [entry | {"file": f"{seed}.png", "value": str(seed)} for seed in (0, 2)]
    results.write_table(Path("out/metrics.csv"), results.METRIC_COLUMNS, values)
    head, line, *_ = contact_sheet.summarize_rows(results.read_rows(Path("out"))).splitlines()
    assert "glcm" in head
    assert " ".join(line.split()).endswith("1.000 (1.414) 64x96, dy_yarn")


def test_grid_from_a_finished_folder(capsys):
    """The same sheets again, without a model."""
    assert run(*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 0
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


def test_narrow_pictures_and_long_prompts():
    """Labels are shortened to what there is room for."""
    rows = rows_of({"color": "a", "prompt": "a ring " * 100}, {"color": "b", "seed": "1"})
    for size, columns in (((1024, 64), None), ((64, 96), "seed")):
        [sheet] = contact_sheet.contact_sheets(rows, Path("out"), size, columns)
        assert max(sheet.size) < 1400


def test_a_table_without_its_last_newline_keeps_its_last_row():
    """As an editor may leave it; only results.csv of an earlier version was ever cut by a kill."""
    entry = dict.fromkeys(results.METRIC_COLUMNS, "x") | {"value": "1"}
    rows_of()
    for name, columns, row in (
        (results.METRICS, results.METRIC_COLUMNS, entry),
        (results.RESULTS, results.COLUMNS, dict.fromkeys(results.COLUMNS, "1")),
    ):
        path = Path("out", name)
        results.write_table(path, columns, [row])
        path.write_text(path.read_text().rstrip("\n"))
        assert len(results.read_table(path, columns)) == 1
