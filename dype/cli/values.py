"""Turn the texts of flags into checked values."""

import secrets

from dype.cli.flags import ALL_FLAGS
from dype.config import DYNAMIC_NAMES, Flag, find_choice
from dype.pipelines.choices import DEVICE
from dype.pipelines.processes import rank_and_world_size
from dype.sweep.grid import parse_list, parse_size


def parse_method(row: Flag, text: str) -> str:
    """Return the method of a text, also of one as `dy_yarn`. Raises ValueError."""
    name = find_choice(text, [*row.choices, *DYNAMIC_NAMES])
    return name if name in DYNAMIC_NAMES else row.parse(name)


def parse_seed(row: Flag, text: str) -> int:
    """Return the seed of a text; of "random" a random number, and print it. Raises ValueError."""
    if text.lower() == "random":
        _, count = rank_and_world_size()
        if count > 1:
            raise ValueError(
                f"--seed is {text!r}, but each of the {count} processes would take another, "
                "expected a number"
            )
        text = str(secrets.randbelow(2**32))
        print(f"--seed random: {text}")
    try:
        return row.parse(text)
    except ValueError as error:
        raise ValueError(f"{error}, or random") from error


def parse_device(row: Flag, text: str) -> str:
    """Return the device of a text in any case; another text as it is. Raises ValueError."""
    return row.parse(text.lower() if DEVICE.fullmatch(text.lower()) else text)


PARSE_ITEM = {"method": parse_method, "seed": parse_seed}
PARSE_ITEM |= dict.fromkeys(("device", "text_encoder_device", "vae_device"), parse_device)


def to_values(words: dict) -> dict:
    """Return the values of flags; of a flag that takes a list, the list of its values.

    words: flag name -> text, as `vars` of what `parse` returns. Raises ValueError, naming the flag.
    """
    values = dict(words)
    if "size" in values:
        sizes = [parse_size(text) for text in parse_list("size", values.pop("size"), False)]
        heights, widths = map(list, zip(*dict.fromkeys(sizes), strict=True))
        values = {"height": heights, "width": widths} | values
    for row in ALL_FLAGS:
        text = values.get(row.name)
        if isinstance(text, str) and row.label is None:
            values[row.name] = PARSE_ITEM.get(row.name, Flag.parse)(row, text)
        elif isinstance(text, str):
            texts = parse_list(row.name, text, row.type in (int, float))
            parse_item = PARSE_ITEM.get(row.name, Flag.parse)
            # without equal values only here, because each "random" is another number
            values[row.name] = [*dict.fromkeys(parse_item(row, item) for item in texts)]
        elif row.parser_options and row.name in values:  # a list, because the flag may be repeated
            values[row.name] = [row.parse(item) for item in text]
    return values
