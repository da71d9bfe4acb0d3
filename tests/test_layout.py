"""Layout of the package: its imports, dependencies and files."""

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dype

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dype"
CORE = {"config", "rope", "image_ids", "embedders", "embedders_complex", "families"}
CORE |= {"noise_schedule", "patch", "sega", "errors", "__init__"}


def module_name(path: Path) -> str:
    """Return the dotted name of a module or package."""
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


MODULES = {module_name(path): path for path in [*PACKAGE.rglob("*.py"), ROOT / "run_dype.py"]}


def imports(name: str, top_level_only: bool = False) -> set[str]:
    """Return the modules of this repository that a module imports, within functions too."""
    tree = ast.parse(MODULES[name].read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    targets = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            targets |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return (targets & MODULES.keys()) - {name, "dype"}


def test_core_does_not_import_folders():
    flat = {path.stem for path in PACKAGE.glob("*.py")}
    assert flat == CORE
    for stem in CORE - {"__init__"}:
        assert {target.count(".") for target in imports(f"dype.{stem}")} <= {1}, stem


def test_no_circular_imports():
    """Neither files nor folders import each other in a circle; for files, functions count too."""
    list(TopologicalSorter({name: imports(name) for name in MODULES}).static_order())

    def folder(name):
        return name.split(".")[1] if name.count(".") > 1 else name if name == "run_dype" else "core"

    graph: dict[str, set] = {}
    for name in MODULES:
        packages = {f"dype.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
        targets = {folder(target) for target in imports(name, True) if target not in packages}
        if name not in packages:
            graph.setdefault(folder(name), set()).update(targets - {folder(name)})
    list(TopologicalSorter(graph).static_order())


def packages_after(statement: str) -> set[str]:
    """Return the top-level packages that a new interpreter has imported after a statement."""
    report = "import sys; print(*{name.split('.')[0] for name in sys.modules})"
    words = [sys.executable, "-c", f"{statement}\n{report}"]
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_core_needs_only_torch():
    names = ", ".join(f"dype.{stem}" for stem in sorted(CORE - {"__init__"}))
    packages = packages_after(
        "import os, dype; dype.rope.axis_frequencies, dype.patch.dype_applied; "  # on access
        f"import {names}; from dype import DyPEConfig, apply_dype, remove_dype; "
        "assert 'OMP_WAIT_POLICY' not in os.environ"  # because only programs may set it
    )
    assert "torch" in packages
    optional = {"diffusers", "transformers", "huggingface_hub", "safetensors", "yaml", "PIL"}
    assert not packages & optional


@pytest.mark.parametrize("user_policy", [None, "ACTIVE"])
def test_programs_wait_passively(user_policy, tmp_path):
    """Programs set OMP_WAIT_POLICY before torch's import, unless the user did; imports do not."""
    report = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"
    (tmp_path / "torch.py").write_text(f"{report}\n1 / 0\n")
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    env |= {"OMP_WAIT_POLICY": user_policy} if user_policy else {}
    programs = [["-m", f"dype.{name}"] for name in ("metrics", "benchmark", "demo.train")]
    for words in [["run_dype.py"], *programs, ["-c", "import dype.rope"]]:
        result = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
        assert "ZeroDivisionError" in result.stderr
        default = None if words[0] == "-c" else "PASSIVE"
        assert result.stdout.strip() == str(user_policy or default), words


MISTAKES = (  # of every kind; the folder is empty
    "--stepss 3",
    "--size 1000x500",
    "--method yarm",
    "--device gpu",
    "--prompts_file no.txt",
    "--config no.toml",
    "--from no.png",
    "--grid_from no",
    "--model no/such/folder",
    "--model word",
    "--model flux-crea",
    "--output a.png --output_dir b",
    "--grid_from no --seed 3",
    "--model demo --output a.bmp",
    "--model demo --transformer no.safetensors",
    "--model demo --lora ./no.safetensors",
    "--model demo --seed 0,1 --cols 0",
)


def test_mistakes_do_not_wait_for_torch(tmp_path):
    """The program understands its flags before it imports what takes seconds."""
    calls = [["--help"], *map(str.split, MISTAKES)]
    statement = (
        f"import contextlib, os, run_dype; os.chdir({str(tmp_path)!r})\n"
        "with contextlib.redirect_stdout(None):\n"
        f"  for words in {calls}:\n"
        "    try: code = run_dype.main(words)\n"
        "    except SystemExit as end: code = 2 * (end.code == 0)\n"
        "    assert code == 2, (words, code)\n"
    )
    packages = packages_after(statement)
    assert "dype" in packages
    assert not packages & {"torch", "diffusers", "transformers", "accelerate", "numpy"}


def test_no_argparse_below_the_commands():
    """The modules that load pipelines, generate and plan sweeps do not parse arguments."""
    for folder in ("pipelines", "sampling", "sweep"):
        for path in (PACKAGE / folder).glob("*.py"):
            assert "argparse" not in path.read_text(), path


def test_public_names_are_lazy():
    assert dype.__version__
    assert callable(dype.load_pipeline)
    with pytest.raises(AttributeError, match="has no attribute 'draw'"):
        dype.draw  # noqa: B018
    assert all(getattr(dype, name) for name in dype.__all__)
    assert {*dype.__all__} <= {*dir(dype)}
    names = {}
    exec("from dype import *", names)
    assert {*dype.__all__} <= names.keys()


def test_package_includes_every_folder_and_the_weights():
    """`pip install .` copies every folder and the demo's weights; `.ci/run` tests a real one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert all((path / "__init__.py").exists() for path in PACKAGE.iterdir()
               if path.is_dir() and path.name != "__pycache__")  # fmt: skip
    patterns = project["tool"]["setuptools"]["package-data"]["dype.demo"]
    [pattern] = [pattern for pattern in patterns if "*" in pattern]
    files = {path for path in (PACKAGE / "demo").glob(pattern) if path.is_file()}
    assert files == {path for path in (PACKAGE / "demo" / "weights").rglob("*") if path.is_file()}


def test_package_includes_no_other_folder():
    """Images in `outputs/`, or a folder of the user, do not end `pip install .`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = project["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} | {"outputs", "runs"}
    assert [name for name in folders for pattern in include if fnmatch(name, pattern)] == ["dype"]


def test_pins_are_within_the_ranges():
    """Every dependency of the package is pinned in requirements.txt, within its range."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    requirements = map(Requirement, project["dependencies"])
    ranges = {requirement.name: requirement.specifier for requirement in requirements}
    assert ranges.keys() == pins.keys()
    assert all(pins[name] in ranges[name] for name in pins)


def test_every_module_imports():
    """Every module imports without an error."""
    for name in MODULES:
        importlib.import_module(name)
