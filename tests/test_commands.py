"""Every command of the README and the documents parses; some of the demo model's are run."""

import re
import shlex
from pathlib import Path

import pytest

import run_dype
from dype.benchmark import __main__ as benchmark
from dype.cli import flags
from dype.cli.settings import resolve
from dype.demo import evaluate, train, trajectories
from dype.demo.experiments import setting
from dype.figures import __main__ as figures
from dype.metrics import __main__ as metrics

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "dype" / "demo" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "docs" / "example.toml",
]
PARSERS = {
    "run_dype.py": flags.parser,
    "dype.benchmark": benchmark.parser,
    "dype.demo.evaluate": evaluate.parser,
    "dype.demo.train": train.parser,
    "dype.demo.trajectories": trajectories.parser,
    "dype.figures": figures.parser,
    "dype.metrics": metrics.parser,
}


def commands(text: str) -> list[str]:
    """`python run_dype.py ...` and `python -m dype...`: in spans of code, and on lines of it, which
    a backslash continues."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    spans = re.findall(r"`+([^`]+)`+", text)
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    code = [" ".join(span.split()) for span in spans] + lines
    parts = [part.strip() for one in code for part in re.split(r"&&|\|\|?", one)]
    found = [part for part in parts if re.match(r"python (-m dype|run_dype)", part)]
    return list(dict.fromkeys(found))


FOUND = [
    pytest.param(command, id=f"{page.name}-{i}")
    for page in PAGES
    for i, command in enumerate(commands(page.read_text()))
]


@pytest.mark.parametrize("command", FOUND)
def test_command_parses(command, monkeypatch):
    """And, where no file of the reader's is named, asks for images that can be drawn."""
    monkeypatch.chdir(ROOT)
    _, *words = shlex.split(command)
    program, *words = words[1:] if words[0] == "-m" else words
    if "--help" in words or "..." in words:
        return
    parser = PARSERS[program]()
    args = parser.parse_args(words)
    if program == "run_dype.py" and not re.search("FILE|FOLDER", command):
        assert resolve(vars(args))[1]


def test_the_documents_have_commands():
    assert len(FOUND) > 20
    assert {"README.md", "usage.md", "CONTRIBUTING.md"} <= {p.id.rpartition("-")[0] for p in FOUND}


def test_commands_over_several_lines():
    text = "    python run_dype.py --size 64 \\\n        --seed 0\n    python -m dype.figures fig6"
    assert commands(text) == [
        "python run_dype.py --size 64 --seed 0",
        "python -m dype.figures fig6",
    ]


@pytest.mark.parametrize("page", ["demo.md", "reproduce.md"])
def test_settings_of_the_benchmark(page):
    """That evaluate's own parser takes as any text."""
    for command in commands((ROOT / "docs" / page).read_text()):
        _, _, program, *words = shlex.split(command)
        if program == "dype.demo.evaluate":
            for text in evaluate.parser().parse_args(words).settings:
                assert setting(text).name == text


RUN = {
    "README.md": '--prompt "a red ring on teal leaves" --height 512',
    "usage.md": "--multipass single,twopass",
    "README.md ": "--method base,yarn,yarn_paper",
}


@pytest.mark.parametrize("page", RUN)
def test_commands_of_the_demo_run(page, tmp_path, monkeypatch):
    """At a small size, with few steps and seeds; one of one image, two sweeps."""
    path = next(path for path in PAGES if path.name == page.strip())
    command = next(c for c in commands(path.read_text()) if "demo" in c and RUN[page] in c)
    words = shlex.split(command)[2:]
    words = [str(ROOT / w) if w.startswith("docs/") else w for w in words]
    monkeypatch.chdir(tmp_path)
    small = ["--size", "64"] if "--size" in words else ["--height", "64", "--width", "64"]
    small += ["--seed", "0"] if "--seed" in words else []
    assert run_dype.main([*words, *small, "--steps", "2", "--base_resolution", "32"]) == 0
    assert list(tmp_path.rglob("seed_*.png"))
