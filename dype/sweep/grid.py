"""Lists of settings: what `--seed 0-3 --method yarn,ntk` stands for, and sweeps with a name."""

import math
import re
from decimal import Decimal, InvalidOperation
from itertools import product
from pathlib import Path

from dype.config import number
from dype.errors import UserError

# Flags that take a list, in the order in which a sweep goes through them, the last the fastest.
WORDS = ("size", "multipass", "method", "dype")
NUMBERS = ("dype_scale", "dype_exponent", "dype_start_sigma", "cutoff", "attention_scale")
NUMBERS += ("steps", "guidance", "true_cfg", "pass2_strength", "pass3_strength")
LISTS = (*WORDS, *NUMBERS, "seed")
SIDE = (64, 16384, 16)  # px: the least, the most, and of what a multiple
MOST = 10_000  # pictures without --yes
RANGE = re.compile(r"(\d+)-(\d+)")

TABLE1_SIZES = "2x:3x,3x:2x,3x,4x"

# name -> (its lines, those with --quick, what to know of the paper's table). A line is flags; a
# size of 1.5x is that many times the base resolution, of 2x:3x that many in width and height.
SWEEPS = {
    "methods": (
        [
            {"size": "1x,1.5x,2x,3x,4x", "method": "vision_yarn,yarn,ntk,base"},
            {"size": "4x", "multipass": "twopass"},
        ],
        [{"size": "1x,2x", "method": "vision_yarn,yarn,ntk,base"}],
        None,
    ),
    "params": (
        [{"dype": "off"}, {"dype_scale": "1:3:0.5", "dype_exponent": "1:3:0.5"}],
        [{"dype": "off"}, {"dype_scale": "1:3:1", "dype_exponent": "1:3:1"}],
        None,
    ),
    "paper-table1": (
        [
            {"size": TABLE1_SIZES, "method": "base"},
            {"size": TABLE1_SIZES, "method": "ntk,yarn", "dype": "off,on"},
            {"size": TABLE1_SIZES, "method": "tasr", "dype": "on"},
        ],
        None,
        None,
    ),
    "paper-table3": (
        [{"size": "2x,4x", "method": "yarn", "dype": "on"}],
        None,
        "left out: every other row of the table, none of which is a position encoding",
    ),
    "paper-table6": (
        [
            {"size": "3x", "method": "base"},
            {"size": "3x", "method": "ntk", "dype": "off"},
            {
                "size": "3x",
                "method": "ntk_mult,ntk",
                "dype_scale": "1,1.5,2,2.5",
                "dype_exponent": "1",
            },
            {"size": "3x", "method": "ntk_mult,ntk", "dype_scale": "2", "dype_exponent": "0.5,2"},
        ],
        None,
        None,
    ),
    "paper-table7": (
        [
            {"size": "3x", "method": "base"},
            {"size": "3x", "method": "yarn", "dype": "off,on"},
            {"size": "3x", "method": "yarn_ntk_only,yarn_both", "dype": "on"},
        ],
        None,
        None,
    ),
    "paper-table8": (
        [
            {"size": "4096", "method": "base"},
            {"size": "4096", "method": "yarn", "dype": "off,on"},
        ],
        None,
        "the paper's table is of Qwen-Image: --model qwen-image",
    ),
}


def named(name: str, base: int, quick: bool, multipass_only: bool) -> list[dict]:
    """The lines of a sweep, with sizes for a base resolution in px. Raises ValueError."""
    full, short, _ = SWEEPS[name]
    if quick and short is None:
        raise ValueError(f"--quick is for --sweep methods and params, expected none with {name}")
    lines = short if quick else full
    if multipass_only:
        lines = [line for line in lines if "multipass" in line]
        if not lines:
            raise ValueError("--multipass_only is for --sweep methods, expected no --quick with it")
    sized = [{"size": pixels(line["size"], base)} if "size" in line else {} for line in lines]
    return [line | size for line, size in zip(lines, sized, strict=True)]


def pixels(sizes: str, base: int) -> str:
    """`1x,2x:3x,4096` -> the sides in px, those with an x to the nearest token."""

    def side(text: str) -> str:
        if not text.endswith("x"):
            return text
        return str(math.floor(float(text.removesuffix("x")) * base / 16 + 0.5) * 16)

    return ",".join("x".join(map(side, one.split(":"))) for one in sizes.split(","))


def spelled(line: dict) -> str:
    """A line as one would type it."""
    return " ".join(f"--{name} {value}" for name, value in line.items())


def values(name: str, text: str) -> list[str]:
    """The values of a list: `a,b`, of numbers also `0-3` and `1:3:0.5`, ends included.

    Raises ValueError for an empty one or a range that goes backwards.
    """
    found = []
    for item in str(text).split(","):
        item = item.strip()
        if not item:
            raise ValueError(f"--{name} is {text!r}, expected values between the commas")
        spans = name not in WORDS and (":" in item or RANGE.fullmatch(item))
        found += steps(name, item) if spans else [item]
    return list(dict.fromkeys(found))


def steps(name: str, item: str) -> list[str]:
    """`1:3:0.5` -> 1, 1.5, 2, 2.5, 3; the step is 1 where none is given."""
    text = item.replace("-", ":") if RANGE.fullmatch(item) else item
    try:
        first, last, step = map(Decimal, (text + ":1" if text.count(":") == 1 else text).split(":"))
        upward = first <= last and step > 0 and (last - first).is_finite()
    except (ValueError, InvalidOperation):
        raise ValueError(f"--{name} is {item!r}, expected FIRST:LAST:STEP in numbers") from None
    if not upward:
        raise ValueError(f"--{name} is {item!r}, expected a range and a step that go up")
    if (last - first) / step > 100 * MOST:
        raise ValueError(f"--{name} is {item!r}, expected at most {100 * MOST} values")
    count = (last - first) // step + 1
    return [f"{(first + i * step).normalize():f}" for i in range(int(count))]


def cells(settings: dict) -> tuple[int, list[tuple[str, list[str]]]]:
    """How many cells the lists of a line span, and the lists."""
    lists = [(name, values(name, settings[name])) for name in LISTS if name in settings]
    return math.prod(len(found) for _, found in lists), lists


def each(settings: dict):
    """Every cell of a line: the settings with one value from each list."""
    _, lists = cells(settings)
    for chosen in product(*(found for _, found in lists)):
        yield settings | dict(zip((name for name, _ in lists), chosen, strict=True))


def sides(size: str) -> tuple[int, int]:
    """`2048x3072`, width first, -> (3072, 2048): height, width. Raises ValueError."""
    low, high, multiple = SIDE
    found = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", size)
    if not found:
        raise ValueError(f"--size is {size!r}, expected WIDTHxHEIGHT or one number, in px")
    width, height = int(found[1]), int(found[2] or found[1])
    for side in (width, height):
        number("--size", side, low, high, multiple=multiple)
    return height, width


def read_prompts(given: dict) -> list[str]:
    """The prompts of --prompt, then those of --prompts_file. Raises UserError."""
    prompts = list(given.get("prompt", []))
    if "prompts_file" in given:
        path = Path(given["prompts_file"])
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"--prompts_file {path} cannot be read: {reason}") from error
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompts_file {path} is empty, expected one prompt per line")
    for text in prompts:
        check_prompt(text)
    return prompts


def check_prompt(text) -> None:
    """Raise UserError for a prompt without words, or with bytes that are no text."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"--prompt is {text!r}, expected some words")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt is {text!r}, expected UTF-8 text") from None
