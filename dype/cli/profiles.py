"""Read the flags of a TOML file, for --config and --profile."""

import tomllib
from pathlib import Path

from dype.cli.flags import (
    ALIASES,
    BOOLEAN_FLAGS,
    ENCODING_FLAGS,
    FLAG_NAMES,
    SWITCHES,
    parse,
)
from dype.cli.guesses import describe_unknown
from dype.cli.values import to_values

CONFIG_FILE_FLAGS = FLAG_NAMES - {"config", "profile", "from", "grid_from", "dry_run", "yes"}


def load_profile(file: str, name: str | None) -> dict:
    """Return the flags of a TOML file, parsed like words of the command line.

    Args:
        file: the path. A table `[NAME.dype]` may hold the flags of the position encoding.
        name: a table whose flags win over those of `[default]`; None: `[default]` alone.

    Raises:
        ValueError: with the line of a syntax error, the flags nearest to an unknown one, or the
            names of the tables.
    """
    try:
        tables = tomllib.loads(Path(file).read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"--config {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {file} cannot be read: it is not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {file} is not TOML: {error}, expected KEY = VALUE") from error
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"--config {file}: {key!r} stands in no table, expected [default]")
    if name is not None and name not in tables:
        raise ValueError(f"--profile is {name!r}, expected one of {', '.join(tables) or 'none'}")
    values: dict = {}
    for table in dict.fromkeys(("default", name)):
        words = []
        for key, value in tables.get(table, {}).items():
            nested = key == "dype" and isinstance(value, dict)
            label = f"[{table}.dype]" if nested else f"[{table}]"
            accepted = CONFIG_FILE_FLAGS & ENCODING_FLAGS if nested else CONFIG_FILE_FLAGS
            for flag, setting in value.items() if nested else [(key, value)]:
                name = flag.replace("-", "_")
                name = ALIASES.get(name, name)
                if name not in accepted:
                    answer = describe_unknown(flag, accepted, "")
                    if name in CONFIG_FILE_FLAGS:
                        answer = f"{flag} is not of the position encoding, expected in [{table}]"
                    elif name in FLAG_NAMES:
                        answer = f"{flag} is for the command line, expected none"
                    raise ValueError(f"--config {file} {label}: {answer}")
                if setting is False and name in SWITCHES:  # because [default] may switch it on
                    values.pop(SWITCHES[name], None)
                words += toml_to_words(file, name, setting)
        values |= to_values(vars(parse(words)))
    return values


def toml_to_words(file: str, flag: str, value) -> list[str]:
    """Return a TOML value as words of the command line. Raises ValueError."""
    if flag in SWITCHES and isinstance(value, bool):
        return [f"--{flag}"] * value
    kinds, expected = (int, float, str), "a number, text or a list of them"
    if flag in SWITCHES:
        kinds, expected = (), "true or false"
    elif flag in ("prompt", "lora"):
        kinds, expected = (str,), "text or a list of texts"
    items = value if isinstance(value, list) else [value]
    if flag in BOOLEAN_FLAGS:
        items = [("off", "on")[item] if isinstance(item, bool) else item for item in items]
    if not items or any(isinstance(x, bool) or not isinstance(x, kinds) for x in items):
        raise ValueError(f"--config {file}: {flag} is {value!r}, expected {expected}")
    texts = [str(item) for item in items]
    texts = texts if flag in ("prompt", "lora") else [",".join(texts)]
    return [f"--{flag}={text}" for text in texts]
