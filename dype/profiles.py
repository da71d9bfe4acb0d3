"""Settings from a TOML file: a `[default]` table, and named ones that inherit from it."""

import difflib
import tomllib
from pathlib import Path

from dype.flags import ENCODING, PROFILED, SWITCHES


def load_profile(file: str, name: str | None) -> dict:
    """The settings of a profile of a file, spelled as on the command line.

    name: of a table, None for `[default]` alone; a `[NAME.dype]` table may hold the position
    encoding's flags. Raises ValueError with the line of a syntax error, the flag nearest to an
    unknown one, or the profiles that there are.
    """
    try:
        tables = tomllib.loads(Path(file).read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"--config {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {file} cannot be read: it is not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {file} is no TOML: {error}, expected KEY = VALUE") from error
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"--config {file}: {key!r} stands in no table, expected [default]")
    if name is not None and name not in tables:
        raise ValueError(f"--profile is {name!r}, expected one of {', '.join(tables) or 'none'}")
    found = {}
    for table in ("default", name):
        level = {}
        for key, value in tables.get(table, {}).items():
            inner = value if key == "dype" and isinstance(value, dict) else {key: value}
            for flag, given in inner.items():
                near = PROFILED if inner is not value else PROFILED & ENCODING
                if flag not in near:
                    meant = difflib.get_close_matches(flag, sorted(near), 1, 0)[0]
                    where = f"[{table}.dype]" if inner is value else f"[{table}]"
                    raise ValueError(
                        f"--config {file} {where}: there is no {flag!r}, expected {meant!r}"
                    )
                level[flag] = spelled(file, flag, given)
        found = over(found, level)
    return {flag: given for flag, given in found.items() if given is not False}


def over(lower: dict, upper: dict) -> dict:
    """Two levels of flags: the upper wins, whichever way it says it."""
    hidden = set()
    for one, other in ({"size"}, {"height", "width"}), ({"dype"}, {"no_dype"}):
        hidden |= one if upper.keys() & other else set()
        hidden |= other if upper.keys() & one else set()
    return {name: value for name, value in lower.items() if name not in hidden} | upper


def spelled(file: str, flag: str, value):
    """A TOML value as the command line's: text, a list of texts, or whether a switch is on."""
    several = flag in ("prompt", "lora")
    if isinstance(value, bool) and flag == "dype":
        return "on" if value else "off"
    if isinstance(value, bool) or flag in SWITCHES:
        if isinstance(value, bool) and flag in SWITCHES:
            return value
    elif isinstance(value, list) and value and not any(isinstance(one, dict) for one in value):
        texts = [spelled(file, flag, one) for one in value]
        return [text for one in texts for text in one] if several else ",".join(texts)
    elif isinstance(value, int | float | str):
        return [value] if several else str(value)
    wanted = "true or false" if flag in SWITCHES else "a number, text or a list of them"
    raise ValueError(f"--config {file}: {flag} is {value!r}, expected {wanted}")
