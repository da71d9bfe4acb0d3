"""Labels in any script: fonts of the system, escapes where no font has a letter, wrapping."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dype.sweep import contact_sheet, labels, results


@pytest.fixture(autouse=True)
def fonts(tmp_path, monkeypatch):
    """A folder of fonts that is the only one of the system; the path of its only font."""
    folder = tmp_path / "share" / "fonts"
    folder.mkdir(parents=True)
    for name in ("HOME", "XDG_DATA_DIRS", "WINDIR", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "share"))
    monkeypatch.setattr(labels, "find_spec", lambda name: None)
    monkeypatch.setattr(labels, "FONT_OF", {})
    for cache in (labels.font_files, labels.open_font, labels.has_letter, labels.measure_part):
        cache.cache_clear()
    yield folder
    for cache in (labels.font_files, labels.open_font, labels.has_letter, labels.measure_part):
        cache.cache_clear()


def write_font(path: Path, letters: str) -> None:
    """Write a font of solid letters of different widths, and a box for missing letters."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000, isTTF=True)
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    glyphs, widths = {}, {}
    for number, name in enumerate([".notdef", *(f"u{ord(letter):04X}" for letter in letters)]):
        pen = TTGlyphPen(None)
        right = 700 if name == ".notdef" else 300 + 20 * number
        for left, top in ((0, 900), (100, 100)) if name == ".notdef" else ((0, 800),):
            pen.moveTo((left, 0))
            for point in ((left, top), (right, top), (right, 0)):
                pen.lineTo(point)
            pen.closePath()
        glyphs[name], widths[name] = pen.glyph(), (right, 0)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(letter): f"u{ord(letter):04X}" for letter in letters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(widths)
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def wrap(text: str, width=10_000, max_lines=3) -> list[str]:
    """Return the lines of a label as texts."""
    lines = labels.wrap(text, 16, width, max_lines)
    return ["".join(part for part, _ in line) for line in lines]


def test_a_font_of_the_system_has_the_letters(fonts):
    """Letters that Pillow's font lacks come from the first font that has them."""
    write_font(fonts / "a-serif.ttf", "\u57ce\u732b")
    write_font(fonts / "regular.ttf", "\u57ce")
    (fonts / "broken.ttf").write_bytes(b"no font")
    write_font(fonts / "lastresort.ttf", "\u72ac\u57ce")
    serif, regular = str(fonts / "a-serif.ttf"), str(fonts / "regular.ttf")
    assert labels.wrap("\u57ce", 16, 999, 1) == [[("\u57ce", regular)]]
    assert labels.wrap("a \u57ce", 16, 999, 1) == [[("a ", ""), ("\u57ce", regular)]]
    assert labels.wrap("\u57ce\u732b", 16, 999, 1) == [[("\u57ce\u732b", serif)]]
    assert labels.wrap("\u72ac", 16, 999, 1) == [[(r"\u72ac", "")]]


def test_a_font_that_has_all_letters_is_taken_for_all(fonts):
    write_font(fonts / "all.ttf", "caf\xe9 \u57ce")
    assert labels.wrap("caf\xe9 \u57ce", 16, 999, 1) == [
        [("caf\xe9 \u57ce", str(fonts / "all.ttf"))]
    ]
    assert labels.wrap("cafe", 16, 999, 1) == [[("cafe", "")]]


ESCAPES = {  # text -> its line where the system has no font
    "seed 0, a red sun": "seed 0, a red sun",
    "caf\xe9": r"caf\xe9",
    "\u57ce \U0001f98a": r"\u57ce \U0001f98a",
    "a\x07b": r"a\x07b",
    "a\nb \t c": "a b c",
    "a\u200bb\ufe0fc": "abc",
    "x\udce9y": r"x\udce9y",
    "": "",
}


@pytest.mark.parametrize("text", ESCAPES)
def test_letters_that_no_font_has_are_escaped(text):
    assert wrap(text) == [ESCAPES[text]]


def test_a_mark_that_no_font_has_is_escaped(fonts):
    """Beside a mark that it lacks, a font may draw a dotted circle."""
    write_font(fonts / "circle.ttf", "\u25cc")
    assert wrap("\u0928\u0947") == [r"\u0928\u0947"]


def test_composed_and_decomposed_letters_are_alike(fonts):
    write_font(fonts / "latin.ttf", "\xe9")
    assert wrap("e\u0301") == wrap("\xe9") == ["\xe9"]


def test_a_text_without_spaces_is_cut_not_dropped():
    """Lines fit the width; a long word is broken; dots stand after a cut."""
    for text in ("a" * 300, "\u57ce" * 300, "seed 0, " + "a" * 300, "word " * 100):
        lines = wrap(text, 320)
        assert len(lines) == 3
        assert lines[2].endswith("...")
        assert all(len(line) > 15 for line in lines)
        widths = [labels.measure(line, 16) for line in labels.wrap(text, 16, 320, 3)]
        assert max(widths) <= 320
    assert wrap("seed 0, a red sun over blue mountains", 105) == [
        "seed 0, a red",
        "sun over blue",
        "mountains",
    ]
    assert wrap("abc", 1, 2) == ["a", "b..."]


def test_labels_that_are_alike_after_the_cut_get_numbers():
    texts = [f"{'a red sun ' * 40}{end}" for end in "xy"]
    first, second = labels.wrap_all(texts, 16, 320, 3)
    assert first[0][0][0].startswith("1. a red")
    assert second[0][0][0].startswith("2. a red")
    equal = labels.wrap_all(["a cat", "a cat", "a dog"], 16, 320, 3)
    assert equal[0] == equal[1] == labels.wrap("a cat", 16, 320, 3)


def test_a_sheet_tells_scripts_apart(tmp_path, monkeypatch):
    """Labels of two prompts differ in pixels, with a font of the letters and without."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("out")
    Image.new("RGB", (8, 8)).save("out/a.png")
    empty = dict.fromkeys(results.COLUMNS, "") | {"file": "a.png", "height": "8", "width": "8"}
    rows = [empty | {"prompt": text} for text in ("\u57ce" * 4, "\u732b" * 4, "\xe9\xfc")]
    for letters in ("", "\u57ce\u732b\xe9\xfc"):
        if letters:
            write_font(tmp_path / "share" / "fonts" / "all.ttf", letters)
            labels.font_files.cache_clear()
            labels.FONT_OF.clear()
        [sheet] = contact_sheet.contact_sheets(rows, Path("out"), (8, 8), None)
        top = sheet.height - 320 - contact_sheet.GAP
        pixels = np.asarray(sheet.convert("L"))[:top, contact_sheet.GAP :]
        heads = [pixels[:, x : x + 328] for x in (0, 328, 656)]
        assert all((head < 128).any() for head in heads)
        assert (heads[0] != heads[1]).any()
        assert (heads[1][:, :300] != heads[2][:, :300]).any()


def test_baselines_agree(fonts):
    """Parts of two fonts stand on one line."""
    write_font(fonts / "all.ttf", "\u57ce")
    image = Image.new("L", (100, 40), "white")
    lines = labels.wrap("ll \u57ce", 16, 999, 1)
    labels.draw(ImageDraw.Draw(image), (0, 4), lines, 16, 20)
    pixels = np.asarray(image) < 128
    bottoms = [max(np.flatnonzero(column)) for column in pixels.T if column.any()]
    assert len({*bottoms}) == 1
