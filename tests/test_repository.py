"""What the repository as a whole promises: README, pins, CI, benchmark."""

import json
import re
from pathlib import Path

from dype import benchmark

ROOT = Path(__file__).parent.parent
COMMANDS = [
    "pip install -r requirements.txt && python run_dype.py --model demo "
    '--prompt "a red ring on teal leaves" --height 512 --width 512',
    "pip install -r requirements-dev.txt && pytest",
]


def test_readme_and_ci_hold_the_two_commands():
    """Each on a line of its own, the same in both."""
    readme = (ROOT / "README.md").read_text().splitlines()
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in COMMANDS:
        assert f"    {command}" in readme
        assert command in ci


def test_pins_are_exact():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert re.fullmatch(r"[a-z-]+==[0-9.]+|-r requirements\.txt", line), line


def test_links_lead_somewhere():
    """Relative links and pictures of every page."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_benchmark(capsys):
    """The last line is JSON; the embedder beats stock and is a few copies at most."""
    assert benchmark.main(["--sizes", "1024", "2048", "--repeats", "3"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for size in ("1024", "2048"):
        assert result["sizes"][size]["ours/stock"] < 1
    assert result["sizes"]["2048"]["ours/copy"] < 6
