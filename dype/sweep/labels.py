r"""Wrap and draw labels in any script, with the fonts of the system.

Pillow's own font has little beyond ASCII, so each letter that it lacks is looked for in the fonts
of the system. A letter that no font has is drawn as its escape, `\u57ce`, never as a box.
"""

import os
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate, groupby, takewhile
from operator import itemgetter
from pathlib import Path

from PIL import ImageDraw, ImageFont

DOTS = "..."
MAX_LETTERS = 400  # of a label; beyond it is cut anyway
SUFFIXES = (".ttf", ".otf", ".ttc")
# fonts with many letters come first, and fonts of another style than the regular one last
PREFERRED = ("dejavusans.", "notosans-regular", "notosanscjk", "arialuni", "arial unicode", "msyh.")
STYLES = ("bold", "italic", "oblique", "black", "light", "thin", "mono", "serif", "condensed")
BOXES = ("lastresort", "adobeblank", "notdef")  # fonts whose letters are all alike
MAX_FONTS = 500
FIND_SIZE = 16  # px, at which a letter is compared with the box
NO_LETTER = "\U0010ffff"  # no font has it, so it is drawn as the box of a missing letter
Line = list[tuple[str, str]]  # texts with their font files
FONT_OF: dict[str, str | None] = {}  # letter -> file, "" for Pillow's own font, None for no font


@lru_cache
def font_files() -> list[str]:
    """Return the font files of Linux, macOS or Windows, and those of matplotlib."""
    home, variables = Path(os.path.expanduser("~")), os.environ
    shares = variables.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    folders = [Path(share, "fonts") for share in shares.split(":")]
    folders += [home / ".fonts", home / ".local/share/fonts", home / "Library/Fonts"]
    folders += [Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    folders += [Path(variables.get("WINDIR", "C:/Windows"), "Fonts")]
    if "LOCALAPPDATA" in variables:
        folders.append(Path(variables["LOCALAPPDATA"], "Microsoft/Windows/Fonts"))
    spec = find_spec("matplotlib")
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "mpl-data/fonts/ttf")
    paths = [
        os.path.join(folder, name)
        for root in folders
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(SUFFIXES) and not any(box in name.lower() for box in BOXES)
    ]
    return sorted(paths, key=font_rank)[:MAX_FONTS]


def font_rank(path: str) -> tuple:
    """Return the sort key of a font file."""
    name = os.path.basename(path).lower()
    return not name.startswith(PREFERRED), any(style in name for style in STYLES), name


@lru_cache(16)
def open_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """Open a font; path: "" for Pillow's own. Raises OSError."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def letters_of(path: str, letters: Iterable[str]) -> set[str]:
    """Return the letters that a font has, which are those that it does not draw as a box."""
    try:
        # Raqm, the other engine, sets a dotted circle beside the box of a mark.
        font = open_font(path, FIND_SIZE).font_variant(layout_engine=ImageFont.Layout.BASIC)
        masks = {letter: font.getmask(letter) for letter in (NO_LETTER, *letters)}
    except OSError:  # no font, or one of bitmaps, as of emoji
        return set()
    pixels = {letter: (mask.size, bytes(mask)) for letter, mask in masks.items()}
    return {letter for letter in letters if pixels[letter] != pixels[NO_LETTER]}


@lru_cache(100_000)
def has_letter(path: str, letter: str) -> bool:
    """Return whether a font file has a letter; path: "" for Pillow's own font."""
    return bool(letters_of(path, letter))


def find_fonts(text: str) -> None:
    """Enter the font of each letter of a text in FONT_OF; the files are read once for all."""
    missing = {*text} - FONT_OF.keys()
    for path in ("", *font_files()):
        if not missing:
            return
        present = letters_of(path, missing)
        FONT_OF.update(dict.fromkeys(present, path))
        missing -= present
    FONT_OF.update(dict.fromkeys(missing))


def show_letter(letter: str, is_present: bool) -> str:
    """Return a letter, or its escape if it is missing or a control.

    Missing letters without a form of their own, as joiners, are empty.
    """
    is_joiner = unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f"
    if is_present and (letter.isprintable() or is_joiner):
        return letter
    return "" if is_joiner else letter.encode("unicode_escape", "surrogatepass").decode()


def choose_fonts(text: str) -> Line:
    """Return each letter of a text as it is shown, with its font: one for all, if one has all."""
    text = unicodedata.normalize("NFC", " ".join(text.split()))[:MAX_LETTERS]
    find_fonts(text)
    texts = [show_letter(letter, FONT_OF[letter] is not None) for letter in text]
    letters = {*"".join(texts)}
    find_fonts("".join(letters))
    paths = dict.fromkeys(FONT_OF[text[0]] for text in texts if text)
    whole = (path for path in paths if all(has_letter(path, letter) for letter in letters))
    path = next(whole, None)
    return [(text, FONT_OF[text[0]] if path is None else path) for text in texts if text]


@lru_cache(100_000)
def measure_part(text: str, path: str, size: int) -> float:
    """Return the width of a text in px."""
    return open_font(path, size).getlength(text)


def measure(line: Line, size: int) -> float:
    """Return the width of a line in px."""
    return sum(measure_part(text, path, size) for text, path in line)


def wrap(text: str, size: int, width: float, max_lines: int) -> list[Line]:
    """Wrap a text to lines, at spaces where there are some, and cut it after `max_lines`.

    Args:
        text: in any script.
        size: of the font, px.
        width: of a line, px.
        max_lines: number of lines.
    """
    rest, lines = choose_fonts(text), []
    while rest and len(lines) < max_lines:
        is_last = len(lines) + 1 == max_lines
        end = count_fitting(rest, size, width)
        is_cut = is_last and end < len(rest)
        if is_cut:
            end = count_fitting(rest, size, width - measure([(DOTS, "")], size))
        if end < len(rest):
            # A long word is broken, rather than a line left half empty.
            spaces = [index for index in range(end // 2, end + 1) if rest[index][0] == " "]
            end = spaces[-1] if spaces else end
        line = rest[:end] + [(DOTS, rest[end - 1][1])] * is_cut
        rest = rest[end + (end < len(rest) and rest[end][0] == " ") :]
        parts = groupby(line, itemgetter(1))
        lines.append([("".join(text for text, _ in part), path) for path, part in parts])
    return lines or [[]]


def count_fitting(line: Line, size: int, width: float) -> int:
    """Return how many letters of a line fit in a width, at least one."""
    widths = accumulate(measure_part(text, path, size) for text, path in line)
    return max(1, sum(1 for _ in takewhile(lambda end: end <= width, widths)))


def wrap_all(texts: list[str], size: int, width: float, max_lines: int) -> list[list[Line]]:
    """Wrap several texts as `wrap` does; if two are alike after the cut, each gets a number."""
    find_fonts("".join(texts))
    labels = [wrap(text, size, width, max_lines) for text in texts]
    if len({str(label) for label in labels}) < len({*texts}):
        texts = [f"{number}. {text}" for number, text in enumerate(texts, 1)]
        labels = [wrap(text, size, width, max_lines) for text in texts]
    return labels


def draw(pen: ImageDraw.ImageDraw, corner: tuple, lines: list[Line], size: int, step: int) -> None:
    """Draw lines of text in black.

    Args:
        pen: of the image.
        corner: left and top, px.
        lines: as `wrap` returns them.
        size: of the font, px.
        step: from line to line, px.
    """
    left, top = corner
    baseline = top + open_font("", size).getmetrics()[0]
    for number, line in enumerate(lines):
        x = left
        for text, path in line:
            pen.text((x, baseline + number * step), text, "black", open_font(path, size), "ls")
            x += measure_part(text, path, size)
