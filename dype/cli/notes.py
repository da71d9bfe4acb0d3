"""Say what a run will not do: flags without effect, words that the demo does not know."""

import json
import re
from pathlib import Path

from dype.config import CONFIG_FLAGS
from dype.families import DEMO_WEIGHTS
from dype.sampling.settings import FLAGS, RunSettings

# flags that stretch the encoding, so that none has an effect up to the base resolution
STRETCH_FLAGS = {row.name for row in CONFIG_FLAGS if row.group == CONFIG_FLAGS[0].group}
STRETCH_FLAGS -= {"base_resolution"}
JOINING_WORDS = {"a", "and", "at", "over", "under", "with"}  # of the demo's sentences


def find_notes(explicit: dict, runs: list[RunSettings]) -> list[str]:
    """Return sentences on flags without effect and on prompts that the model cannot understand.

    Args:
        explicit: the flags of the command line and of the profile, not those of presets or records.
        runs: settings of all images, with their prompts.
    """
    notes: dict[str, list[str]] = {}
    for row in FLAGS:
        if row.name in explicit and explicit[row.name] not in (row.default, [row.default]):
            reason = describe_lack(row, runs)
            if reason:
                notes.setdefault(reason, []).append(f"--{row.option}")
    sentences = []
    for reason, names in notes.items():
        sentences.append(f"{', '.join(names)} {'have' if names[1:] else 'has'} no effect {reason}")
    return sentences + describe_unknown_words(runs)


def describe_lack(row, runs: list[RunSettings]) -> str:
    """Return why a flag has no effect on any image, "" if it has one; row: its `Flag`."""
    settings = [run.record["flags"] | run.record["config"] for run in runs]
    effective = [run for run, x in zip(runs, settings, strict=True) if row.has_effect(x)]
    if not effective or (row.name == "dype" and all(x["method"] == "base" for x in settings)):
        return f"without {row.needs or 'another --method than base'}"
    sizes = [(run.config.base_resolution, max(run.height, run.width)) for run in effective]
    if row.name in STRETCH_FLAGS and all(side <= base for base, side in sizes):
        return f"up to the base resolution, {sizes[0][0]} px"
    return ""


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
