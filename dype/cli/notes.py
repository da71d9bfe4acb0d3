"""Say what a run will not do: flags without effect, two squares, words unknown to the demo."""

import json
import re
from pathlib import Path

from dype.cli.flags import spell_flag
from dype.config import CONFIG_FLAGS, Flag
from dype.families import DEMO_WEIGHTS
from dype.sampling.settings import FLAGS, RunSettings

# flags that stretch the encoding, so that none has an effect up to the base resolution
STRETCH_FLAGS = {row.name for row in CONFIG_FLAGS if row.group == CONFIG_FLAGS[0].group}
STRETCH_FLAGS -= {"base_resolution"}
JOINING_WORDS = {"a", "and", "at", "over", "under", "with"}  # of the demo's sentences


def find_notes(explicit: dict, words: dict, runs: list[RunSettings]) -> list[str]:
    """Return sentences on what the user may not expect.

    These are flags without effect, two squares that may be one size, and words of prompts that the
    model cannot understand.

    Args:
        explicit: the flags of the command line and of the profile, not those of presets or records.
        words: flag name -> text, of the command line.
        runs: settings of all images, with their prompts.
    """
    notes: dict[str, list[str]] = {}
    settings = [run.record["flags"] | run.record["config"] for run in runs]
    changed = [row for row in FLAGS if row.name in explicit]
    changed = [row for row in changed if explicit[row.name] not in (row.default, [row.default])]
    for row in changed:
        if reason := describe_lack(row, settings):
            notes.setdefault(reason, []).append(spell_flag(row.name, words.get(row.name)))
    sentences = [
        f"{', '.join(names)} {'have' if names[1:] else 'has'} no effect {reason}"
        for reason, names in notes.items()
    ]
    return sentences + describe_squares(words) + describe_unknown_words(runs)


def describe_lack(row: Flag, settings: list[dict]) -> str:
    """Return why a flag has no effect on any image, "" if it has one or asks for what is so.

    Args:
        row: the flag.
        settings: of every image, by name.
    """
    is_base = all(values["method"] == "base" for values in settings)
    if row.name == "dype" and is_base and not any(values["dype"] for values in settings):
        return ""
    if row.name == "attention_path" and all(x["method"] == x["attention_path"] for x in settings):
        return ""
    effective = [values for values in settings if row.has_effect(values)]
    if not effective or (row.name == "dype" and is_base):
        return f"without {row.needs or 'another --method than base'}"
    sides = [(x["base_resolution"], max(x["height"], x["width"])) for x in effective]
    if row.name in STRETCH_FLAGS and all(side <= trained for trained, side in sides):
        return f"up to the base resolution, {sides[0][0]} px"
    return ""


def describe_squares(words: dict) -> list[str]:
    """Return a sentence if --size has two numbers, which may be the sides of one image."""
    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", words.get("size", ""))
    if not match or match[1] == match[2]:
        return []
    width, height = match.groups()
    return [f"--size {width},{height} is two square images; {width}x{height} is one image"]


def describe_unknown_words(runs: list[RunSettings]) -> list[str]:
    """Return a sentence on the words of the prompts that the demo does not know, or nothing."""
    prompts = {run.prompt for run in runs if Path(run.entry.repo).resolve() == DEMO_WEIGHTS}
    if not prompts:
        return []
    tokenizer = json.loads((DEMO_WEIGHTS / "tokenizer_2" / "tokenizer.json").read_text("utf-8"))
    vocabulary = [word for word in tokenizer["model"]["vocab"] if word.isalpha()]
    words = dict.fromkeys(re.findall(r"\w+", " ".join(sorted(prompts)).lower()))
    unknown = [word for word in words if word not in vocabulary]
    if not unknown:
        return []
    rest = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return [
        f"the demo does not know {', '.join(unknown[:8])}{rest}; it knows "
        f"{', '.join(word for word in vocabulary if word not in JOINING_WORDS)}; "
        "see dype/demo/README.md"
    ]
