"""Parse lists of values (`0-3`, `1:3:0.5`, `2048x3072`) and prompts files; define named sweeps."""

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import NamedTuple

from dype.config import check_number
from dype.errors import UserError
from dype.sampling.passes import scaled_side
from dype.sampling.settings import SIDE_LIMITS

MAX_IMAGES = 10_000  # without --yes
RANGE = re.compile(r"(\d+)-(\d+)")
DOTS = re.compile(r"(\d+)\.\.+(\d+)")  # a range in other languages

TABLE1_SIZES = "2x:3x,3x:2x,3x,4x"


class Sweep(NamedTuple):
    """A named sweep: lines of flags, each of which adds its images.

    The size 1.5x is 1.5 times the base resolution; 2x:3x is 2 times in width, 3 times in height.
    """

    lines: tuple[str, ...]
    quick: tuple[str, ...] = ()  # the lines with --quick
    note: str = ""  # printed with the flags


# fmt: off
SWEEPS = {
    "methods": Sweep(
        ("--size 1x,1.5x,2x,3x,4x --method vision_yarn,yarn,ntk,base",
         "--size 4x --multipass twopass"),
        quick=("--size 1x,2x --method vision_yarn,yarn,ntk,base",),
    ),
    "params": Sweep(
        ("--dype off", "--dype_scale 1:3:0.5 --dype_exponent 1:3:0.5"),
        quick=("--dype off", "--dype_scale 1:3:1 --dype_exponent 1:3:1"),
    ),
    "paper-table1": Sweep((
        f"--size {TABLE1_SIZES} --method base",
        f"--size {TABLE1_SIZES} --method ntk,yarn --dype off,on",
        f"--size {TABLE1_SIZES} --method tasr --dype on",
    )),
    "paper-table3": Sweep(
        ("--size 2x,4x --method yarn --dype on",),
        note="left out: the other rows of the table, which are not position encodings",
    ),
    "paper-table6": Sweep((
        "--size 3x --method base",
        "--size 3x --method ntk --dype off",
        "--size 3x --method ntk_mult,ntk --dype_scale 1,1.5,2,2.5 --dype_exponent 1",
        "--size 3x --method ntk_mult,ntk --dype_scale 2 --dype_exponent 0.5,2",
    )),
    "paper-table7": Sweep((
        "--size 3x --method base",
        "--size 3x --method yarn --dype off,on",
        "--size 3x --method yarn_ntk_only,yarn_both --dype on",
    )),
    "paper-table8": Sweep(
        ("--size 4096 --method base", "--size 4096 --method yarn --dype off,on"),
        note="the paper's table uses Qwen-Image: add --model qwen-image",
    ),
}
# fmt: on


def expand_named_sweep(name: str, base: int, quick: bool, multipass_only: bool) -> list[str]:
    """Return the lines of a named sweep with its sizes in px.

    Args:
        name: key of `SWEEPS`.
        base: base resolution in px.
        quick: return the lines of --quick.
        multipass_only: return only the lines with --multipass.

    Raises:
        ValueError: the sweep has no such lines.
    """
    sweep = SWEEPS[name]
    if quick and not sweep.quick:
        raise ValueError(f"--quick is for --sweep methods and params, expected none with {name}")
    lines = sweep.quick if quick else sweep.lines
    if multipass_only:
        lines = [line for line in lines if "--multipass" in line]
        if not lines:
            raise ValueError("--multipass_only is for --sweep methods, expected no --quick with it")
    return [
        re.sub(r"(?<=--size )\S+", lambda match: resolve_relative_sizes(match[0], base), line)
        for line in lines
    ]


def resolve_relative_sizes(sizes: str, base: int) -> str:
    """Replace factors as in `1x,2x:3x,4096` by sides in px, rounded to the nearest token."""
    sides = re.sub(r"([\d.]+)x", lambda match: str(scaled_side(base, float(match[1]))), sizes)
    return sides.replace(":", "x")


def parse_list(name: str, text: str, numbers: bool) -> list[str]:
    """Split a list of values, and expand its ranges; equal values stay.

    Args:
        name: name of the flag.
        text: values as in `a,b`; numbers also as in `0-3` and `1:3:0.5`, ends included.
        numbers: the values are numbers, so ranges are allowed.

    Raises:
        ValueError: a value is empty, or a range goes backwards.
    """
    texts = []
    for item in text.split(","):
        item = item.strip()
        if not item:
            raise ValueError(f"--{name} is {text!r}, expected values between the commas")
        if numbers and (match := DOTS.fullmatch(item)):
            raise ValueError(f"--{name} is {item!r}, expected {match[1]}-{match[2]} for a range")
        is_range = numbers and (":" in item or RANGE.fullmatch(item))
        texts += parse_range(name, item) if is_range else [item]
    return texts


def parse_range(name: str, item: str) -> list[str]:
    """Expand a range: `1:3:0.5` -> 1, 1.5, 2, 2.5, 3; the default step is 1. Raises ValueError."""
    text = item.replace("-", ":") if RANGE.fullmatch(item) else item
    try:
        first, last, step = map(Decimal, (text + ":1" if text.count(":") == 1 else text).split(":"))
        upward = first <= last and step > 0 and (last - first).is_finite()
    except (ValueError, InvalidOperation):
        raise ValueError(f"--{name} is {item!r}, expected FIRST:LAST:STEP in numbers") from None
    if not upward:
        raise ValueError(f"--{name} is {item!r}, expected a range and a step that go up")
    if (last - first) / step > 100 * MAX_IMAGES:
        raise ValueError(f"--{name} is {item!r}, expected at most {100 * MAX_IMAGES} values")
    count = (last - first) // step + 1
    return [f"{(first + i * step).normalize():f}" for i in range(int(count))]


def parse_size(size: str) -> tuple[int, int]:
    """Parse a size, width first: `2048x3072` -> (3072, 2048), height first. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9})(?:\s*[xX*\u00d7]\s*(\d{1,9}))?", size)
    if not match:
        raise ValueError(f"--size is {size!r}, expected WIDTHxHEIGHT or one number, in px")
    width, height = int(match[1]), int(match[2] or match[1])
    limits = {"multiple": SIDE_LIMITS["multiple"]}
    for name, side in (("width", width), ("height", height)):
        subject = f"--size is {size!r}, whose {name}" if match[2] else "--size"
        check_number(subject, side, SIDE_LIMITS["low"], SIDE_LIMITS["high"], **limits)
    return height, width


def read_prompts(path: Path, name: str = "--prompts_file") -> list[str]:
    """Read the prompts of a file, one in each line; blank lines are ignored. Raises UserError."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text; save it as UTF-8"
        raise UserError(f"{name} {path} cannot be read: {reason}") from error
    if "\0" in text:
        raise UserError(f"{name} {path} cannot be read: it has NUL bytes; save it as UTF-8")
    # Byte order marks stand also where files were joined. Not `splitlines`, which breaks a line
    # at characters that stand within texts of word processors.
    lines = [line.strip() for line in text.replace("\ufeff", "").split("\n")]
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{name} {path} is empty, expected one prompt per line")
    return prompts
