"""What the repository as a whole promises: README, pins, CI, benchmark."""

import ast
import csv
import json
import re
from collections import Counter
from pathlib import Path

import diffusers
import pytest
from conftest import FIRST_RELEASE, needs
from packaging.version import Version
from tiny import FAMILIES

from dype.benchmark import __main__ as benchmark
from dype.config import DEFAULT_LAMBDA_S
from dype.demo import evaluate, scores
from dype.families import FAMILIES as CLASSES
from dype.pipelines.catalog import MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    "pip install -r requirements.txt && python run_dype.py --model demo "
    '--prompt "a red ring on teal leaves" --height 512 --width 512',
    "pip install -r requirements-dev.txt && pytest",
]


def test_readme_and_ci_hold_the_two_commands():
    """Each on a line of its own, the same in both."""
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in COMMANDS:
        assert f"    {command}" in README.splitlines()
        assert command in ci


def test_pins_are_exact():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert re.fullmatch(r"[a-z-]+==[0-9.]+|-r requirements\.txt", line), line


def test_oldest_releases():
    """CONTRIBUTING.md has the releases below which tests are skipped; the pins skip none."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    releases = re.findall(r"^\| .+ \| (0\.\d+) \| 2\.\d\.\d \|$", page, re.MULTILINE)
    assert releases == list(dict.fromkeys(FIRST_RELEASE.values()))
    pinned = re.search("diffusers==(.+)", (ROOT / "requirements.txt").read_text())[1]
    for name, release in FIRST_RELEASE.items():
        assert Version(release) <= Version(pinned), name
    for name in CLASSES.keys() - {"Flux"}:  # which is no class of diffusers
        assert hasattr(diffusers, name), name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_there(name):
    """A test skipped here, on the pinned versions, would be one that nobody runs."""
    try:
        FAMILIES[name][0]()
    except pytest.skip.Exception as skipped:
        pytest.fail(str(skipped))


def test_a_class_is_skipped_below_its_first_release(monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", "0.36.0")
    needs("BriaTransformer2DModel")
    with pytest.raises(pytest.skip.Exception, match=r"Krea2.* needs diffusers 0\.39, .* 0\.36\.0"):
        needs("Krea2Transformer2DModel")


def test_links_lead_somewhere():
    """Relative links and images of every page."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "dype" / "demo" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_readme_draws_the_demo_as_the_command_line_does():
    """The Python snippets parse; the demo's holds the settings of models.py."""
    blocks = README.split("```python\n")[1:]
    trees = [ast.parse(block.split("```")[0]) for block in blocks]
    demo = next(t for t, b in zip(trees, blocks, strict=True) if 'load_pipeline("demo")' in b)
    calls = [node for node in ast.walk(demo) if isinstance(node, ast.Call)]
    given = {call.func.id: call for call in calls if isinstance(call.func, ast.Name)}

    def arguments(call):
        return {word.arg: ast.literal_eval(word.value) for word in call.keywords}

    method = {"method": ast.literal_eval(given["DyPEConfig"].args[0])}
    model = MODELS["demo"]
    assert method | arguments(given["DyPEConfig"]) == model.dype_defaults
    assert arguments(given["pipe"]) == {
        "height": model.height,
        "width": model.width,
        "num_inference_steps": model.steps,
        "true_cfg_scale": model.true_cfg,
        "negative_prompt": model.negative_prompt,
        "max_sequence_length": model.max_sequence_length,
    }


def test_numbers_of_the_paper():
    """paper_tables.csv: so many of each table, methods as we spell them."""
    with (ROOT / "docs" / "data" / "paper_tables.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = "table,model,set,size_wxh,method,lambda_s,lambda_t,metric,value"
    assert [*rows[0]] == columns.split(",")
    counts = {"1": 168, "3": 8, "6": 42, "7": 15, "8": 12, "10": 6, "fig18": 3, "sega": 12}
    assert Counter(row["table"] for row in rows) == counts
    assert len({tuple(row.values())[:-1] for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(r"-?\d+\.\d+", row["value"])
        assert row["method"] != "dy_base"
        assert row["method"].removeprefix("dy_") in DEFAULT_LAMBDA_S
        assert re.fullmatch(r"\d+x\d+", row["size_wxh"]) or row["table"] == "8"
        assert bool(row["lambda_s"]) == bool(row["lambda_t"])

    def printed(some):
        return ", ".join(row["value"] for row in some)

    page = (ROOT / "docs" / "reproduce.md").read_text()
    shown = re.findall(r"^\| `(\w+)` \| (-?\d.*) \| (-?\d.*) \|$", page, re.MULTILINE)
    assert len(shown) == 6
    for method, *cells in shown:
        place = {"table": "1", "size_wxh": "4096x4096", "method": method}.items()
        sets = ("drawbench", "aesthetic-4k")
        some = [[row for row in rows if row.items() >= place and row["set"] == s] for s in sets]
        assert cells == [*map(printed, some)]


@pytest.mark.parametrize("name", ["ground_truth", "cutoff", "cutoff_second"])
def test_tables_of_the_benchmark(name):
    """The CSV files are what --save writes beside the JSON."""
    path = ROOT / "docs" / "data" / f"{name}.json"
    saved = json.loads(path.read_text())
    protocol = saved.pop("protocol")
    for file, content in evaluate.files_to_save(path, protocol, saved).items():
        assert file.read_bytes() == content, file


def test_numbers_of_the_demo():
    """demo.md: its rows are those of the JSON, and every interval in its text is one of a row's or
    a pair's."""
    page = (ROOT / "docs" / "demo.md").read_text()
    saved = json.loads((ROOT / "docs" / "data" / "ground_truth.json").read_text())
    rows = re.findall(r"^\| (\d+) \| `(\S+)` \| (.+) \|$", page, re.MULTILINE)
    assert 8 <= len(rows) <= 10
    for size, name, cells in rows:
        [row] = [r for r in saved["rows"] if (str(r["size"]), r["setting"]) == (size, name)]
        numbers = [f"{row[score]['mean']:.2f}" for score in ("spectrum", "joint")]
        assert cells.split(" | ") == [str(row["n"]), scores.shown(row["layout"]), *numbers]
    known = {scores.shown(pair[score], True) for pair in saved["pairs"] for score in scores.SCORES}
    found = re.findall(r"[+-]\d\.\d\d \[[^]]+\]", page)
    assert len(found) > 10
    assert {*found} <= known


def test_benchmark(capsys):
    """The last line is JSON; a few copies at most, and not slower than stock; for busy machines.

    The aim is 1.2 copies at 4096 px. Qwen-Image's stock embedder caches its output.
    """
    assert benchmark.main(["embedder", "--sizes", "4096", "--repeats", "3"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    families = {name: sizes["4096"] for name, sizes in found["families"].items()}
    assert found["device"]
    for name in ("flux", "flux2", "krea2"):
        assert families[name]["ours/stock"] < 0.3
        assert families[name]["ours/copy"] < 2.5
    assert families["z-image"]["ours/stock"] < 0.8
    assert families["z-image"]["ours/copy"] < 2
    assert families["qwen-image"]["ours/stock"] < 2
