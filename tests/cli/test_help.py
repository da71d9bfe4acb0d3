"""The help of run_dype.py is complete, its examples are valid, and docs/cli.txt holds it."""

import shlex
from pathlib import Path

import pytest
from PIL import Image

from dype.cli import flags
from dype.cli.settings import resolve
from dype.rope import METHODS
from dype.sampling import records

HELP = flags.parser().format_help()


def test_every_flag_has_a_default():
    """Only another spelling of a flag, like --no_dype, has none."""
    for group in flags.parser()._action_groups[2:]:
        assert f"\n{group.title}:\n" in HELP
        for action in group._group_actions:
            is_spelling = action.nargs == 0 and action.const is not True
            assert is_spelling or "Default: " in action.help, action.option_strings


def test_lines_fit_98_columns():
    assert max(map(len, HELP.splitlines())) <= 98


def test_words_are_whole():
    """No name is broken at its hyphen, and a flag with two names has one metavar."""
    assert not [line for line in HELP.splitlines() if line.endswith("-")]
    assert "\n  --method, --dype_method NAME,...\n" in HELP


def test_defaults_per_model():
    """At most two exceptions are listed; docs/models.md has more."""
    rows = {row.name: row for row in flags.ALL_FLAGS}
    for name, default in {
        "steps": "per model (docs/models.md)",
        "base_resolution": "1024 (qwen-image 1328, demo 512)",
        "method": "yarn (demo yarn_paper)",
        "seed": "42",
        "sweep": "none",
    }.items():
        assert flags.default_text(rows[name]) == default


def test_every_method_has_a_line():
    for name in METHODS:
        assert name in flags.METHOD_HELP, f"METHOD_HELP of dype/cli/flags.py lacks {name}"
    for name in flags.METHOD_HELP:
        message = f"METHOD_HELP of dype/cli/flags.py has {name}, but rope.py has no method {name}"
        assert name in METHODS, message
    for name, text in flags.METHOD_HELP.items():
        assert len(text.split()) <= 10, name
        assert f"\n  {name:13}  {text}\n" in HELP


@pytest.mark.parametrize("command", flags.EXAMPLES)
def test_examples_resolve(command, tmp_path, monkeypatch):
    """Each example is in the help, on one line, and its settings are valid."""
    monkeypatch.chdir(tmp_path)
    assert f"  # {flags.EXAMPLES[command]}\n  {command}\n" in HELP
    [run] = resolve({"prompt": ["x"]})[1]
    record = run.record | {"commit": None, "tiled_vae": False}
    records.save_image(Image.new("RGB", (8, 8)), record, tmp_path / "image.png")
    program, script, *words = shlex.split(command)
    assert (program, script) == ("python", "run_dype.py")
    _, runs = resolve(vars(flags.parse(words)))
    assert len(runs) == (12 if "--seed 0-3" in command else 1)
    if "--from" in words:
        assert (runs[0].prompt, runs[0].config) == ("x", run.config)


def test_the_golden_help():
    """docs/cli.txt is what --help prints."""
    golden = Path(__file__).parents[2] / "docs" / "cli.txt"
    message = "docs/cli.txt is out of date: python run_dype.py --help > docs/cli.txt"
    assert golden.read_text("utf-8") == HELP, message
