"""What the repository as a whole promises: README, pins, CI, benchmark."""

import ast
import csv
import re
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import FIRST_RELEASE, needs
from packaging.version import Version
from PIL import Image
from tiny import FAMILIES

import dype
from dype.benchmark import __main__ as benchmark
from dype.benchmark import embedder
from dype.families import DEMO_WEIGHTS
from dype.families import FAMILIES as CLASSES
from dype.pipelines.catalog import MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    "pip install -r requirements.txt && python run_dype.py --model demo "
    f'--prompt "{MODELS["demo"].prompt}" --height 1024 --width 1024',
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
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+|-r requirements\.txt", line), line


def test_version_and_date():
    """CITATION.cff, the changelog and the package agree."""
    citation = (ROOT / "CITATION.cff").read_text()
    version, date = re.search(
        r"^version: (.+)\ndate-released: (.+)$", citation, re.MULTILINE
    ).groups()
    assert version == dype.__version__
    assert f"## {version}, {date}" in (ROOT / "CHANGELOG.md").read_text().splitlines()


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


def python_blocks(page: str) -> list[str]:
    """Return the Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    """It runs as printed, but for the checkpoint (the demo), the device and the size."""
    [code] = python_blocks("README.md")
    pipe = diffusers.FluxPipeline.from_pretrained(DEMO_WEIGHTS)
    monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", lambda *args, **kwargs: pipe)
    monkeypatch.chdir(tmp_path)
    small = {'"cuda"': '"cpu"', "use_stream=True": "use_stream=False", "4096": "64", ": 28": ": 2"}
    for text, replacement in small.items():
        assert text in code
        code = code.replace(text, replacement)
    exec(code, {})
    [path] = tmp_path.glob("*.png")
    with Image.open(path) as image:
        assert image.size == (64, 64)


def test_the_model_cards_example_is_the_command_lines():
    """The model card calls the demo with the settings of the catalog."""
    [code] = python_blocks("dype/demo/README.md")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    by_name = {call.func.id: call for call in calls if isinstance(call.func, ast.Name)}
    model = MODELS["demo"]
    [method] = by_name["DyPEConfig"].args
    fields = {word.arg: ast.literal_eval(word.value) for word in by_name["DyPEConfig"].keywords}
    assert fields | {"method": ast.literal_eval(method)} == model.dype_defaults
    words = {word.arg: word.value for word in by_name["pipe"].keywords}
    assert ast.unparse(words.pop("generator")) == "torch.Generator().manual_seed(42)"
    arguments = {name: ast.literal_eval(value) for name, value in words.items()}
    assert arguments == {
        "height": model.height,
        "width": model.width,
        "num_inference_steps": model.steps,
        "guidance_scale": model.guidance,
        "max_sequence_length": model.max_sequence_length,
    }


def test_benchmark(capsys, tmp_path):
    """The CSV has all ratios; a few copies at most, and not slower than stock; for busy machines.

    The aim is 1.2 copies at 4096 px. Qwen-Image's stock embedder caches its output.
    """
    table = tmp_path / "cost.csv"
    words = ["--sizes", "4096", "--repeats", "3", "--save", str(table)]
    assert benchmark.main(["embedder", *words]) == 0
    assert f", torch {torch.__version__}" in capsys.readouterr().out.splitlines()[0]
    head, *rows = table.read_text().splitlines()
    assert head == (ROOT / "docs/data/embedder_cost.csv").read_text().splitlines()[0]
    assert {row.split(",")[1] for row in rows} == {"4096"}
    families = {}
    for row in csv.DictReader([head, *rows]):
        families[row["family"]] = {name: float(row[name]) for name in ("ours/stock", "ours/copy")}
    assert [*families] == [*embedder.FAMILIES]
    for name in ("flux", "flux2", "krea2"):
        assert families[name]["ours/stock"] < 0.3
        assert families[name]["ours/copy"] < 2.5
    assert families["z-image"]["ours/stock"] < 0.8
    assert families["z-image"]["ours/copy"] < 2
    assert families["qwen-image"]["ours/stock"] < 2
