"""Commands of the README and of docs/: all parse, and some of the demo model's run."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

import run_dype
from dype.benchmark import __main__ as benchmark
from dype.cli import flags
from dype.cli.settings import resolve
from dype.demo import evaluate, train, trajectories
from dype.demo.experiments import parse_setting
from dype.figures import __main__ as figures
from dype.metrics import __main__ as metrics
from dype.sweep import viewer

ROOT = Path(__file__).parent.parent
FIRST_DEMO = "2026-11-23"  # older pages of the log keep the commands of their day
LOG = [path for path in (ROOT / "docs" / "log").glob("*.md") if path.name > FIRST_DEMO]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "dype" / "demo" / "README.md",
    *sorted([*(ROOT / "docs").glob("*.md"), *LOG]),
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
    "dype.sweep.viewer": viewer.parser,
}


def commands(text: str) -> list[str]:
    """Return the commands `python run_dype.py ...` and `python -m dype...` of a page.

    They stand in code spans, in fenced blocks and on indented lines; a backslash continues a line.
    """
    text = re.sub(r"\s*\\\n\s*", " ", text)
    spans = re.findall(r"`+([^`]+)`+", text)
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    snippets = [" ".join(span.split()) for span in spans] + lines
    programs = [words.strip() for snippet in snippets for words in re.split(r"&&|\|\|?", snippet)]
    matches = [words for words in programs if re.match(r"python (-m dype|run_dype)", words)]
    return list(dict.fromkeys(matches))


COMMANDS = [
    pytest.param(command, id=f"{page.name}-{i}")
    for page in PAGES
    for i, command in enumerate(commands(page.read_text()))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command, monkeypatch):
    """Every command parses; its settings are valid, unless it needs a file of the reader."""
    monkeypatch.chdir(ROOT)
    _, *words = shlex.split(command)
    program, *words = words[1:] if words[0] == "-m" else words
    if "--help" in words or "..." in words:
        return
    parser = PARSERS[program]()
    args = parser.parse_args(words)
    if program == "run_dype.py" and not re.search("FILE|FOLDER", command):
        assert resolve(vars(args))[1]


def output_folder(command: str) -> str | None:
    """Return the folder of a sweep's command; None for another command or for one image."""
    words = shlex.split(command)
    if "run_dype.py" not in words[:2]:
        return None
    text = " ".join(words[2:]).replace(
        "--prompts_file FILE", "--prompts_file docs/demo_prompts.txt"
    )
    if re.search("FILE|FOLDER|--help", text) or "--prompt " in text:
        return None
    options, _ = resolve(vars(flags.parser().parse_args(text.split())))
    return options.sweep and (options.output_dir or f"outputs/{options.sweep}")


def test_each_sweep_has_its_own_folder(monkeypatch):
    """No two commands of the pages write into the same folder; one image has a name of its own."""
    monkeypatch.chdir(ROOT)
    pages = [page for page in PAGES if page not in LOG and page.suffix == ".md"]
    lines = dict.fromkeys(line for page in pages for line in commands(page.read_text()))
    folders: dict[str, str] = {}
    for command in lines:
        if folder := output_folder(command):
            assert folder not in folders, f"{command}, {folders.get(folder)}"
            folders[folder] = command
    assert len(folders) >= 12
    first = "python run_dype.py --model demo --seed 0-1"
    assert output_folder(first) == output_folder(f"{first} --steps 2") == "outputs/sweep"


def test_each_file_has_its_own_command():
    """No two commands of the pages write the same --strip, --save or --out."""
    pages = [page for page in PAGES if page not in LOG and page.suffix == ".md"]
    lines = dict.fromkeys(line for page in pages for line in commands(page.read_text()))
    files = [
        file for line in lines for file in re.findall(r"--(?:strip|save|out) (\S+\.\w+)", line)
    ]
    assert len(files) == len({*files}) > 4


def test_the_documents_have_commands():
    assert len(COMMANDS) > 20
    pages = {parameter.id.rpartition("-")[0] for parameter in COMMANDS}
    assert {"README.md", "usage.md", "CONTRIBUTING.md"} <= pages


def test_commands_over_several_lines():
    text = "    python run_dype.py --size 64 \\\n        --seed 0\n    python -m dype.figures fig6"
    assert commands(text) == [
        "python run_dype.py --size 64 --seed 0",
        "python -m dype.figures fig6",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_of_the_benchmark(page):
    """The pages spell every setting of the benchmark as its tables print it; SETTING is any."""
    for command in commands(page.read_text()):
        _, _, program, *words = shlex.split(command)
        if program == "dype.demo.evaluate" and "--help" not in words:
            for text in evaluate.parser().parse_args(words).settings:
                assert text.removeprefix("dy_").isupper() or parse_setting(text).name == text


@pytest.mark.parametrize(
    "program", [run_dype, benchmark, evaluate, train, trajectories, figures, metrics]
)
def test_every_program_escapes_letters_that_an_encoding_lacks(program, monkeypatch):
    """The streams are set before a program prints its first line, which is that of --help."""
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as exit_:
        program.main(["--help"])
    assert (exit_.value.code, stream.errors) == (0, "backslashreplace")


RUN = {  # page -> words of the command to run; the space makes a second key for one page
    "README.md": 'and a lake at dusk" --height 1024',
    "usage.md": "--multipass single,twopass",
    "README.md ": "--method base,yarn",
}


@pytest.mark.parametrize("page", RUN)
def test_commands_of_the_demo_run(page, tmp_path, monkeypatch):
    """A command for one image and two sweeps run, at a small size with few steps and seeds."""
    path = next(path for path in PAGES if path.name == page.strip())
    demo_commands = [command for command in commands(path.read_text()) if "demo" in command]
    command = next(command for command in demo_commands if RUN[page] in command)
    words = shlex.split(command)[2:]
    words = [str(ROOT / word) if word.startswith("docs/") else word for word in words]
    monkeypatch.chdir(tmp_path)
    small = ["--size", "64"] if "--size" in words else ["--height", "64", "--width", "64"]
    small += ["--seed", "0"] if "--seed" in words else []
    assert run_dype.main([*words, *small, "--steps", "2", "--base_resolution", "32"]) == 0
    assert list(tmp_path.rglob("seed_*.png"))
