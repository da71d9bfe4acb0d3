"""A --method may be spelled as in results.csv: dy_yarn with DyPE, yarn without."""

from pathlib import Path

import pytest
from conftest import TINY_DEMO, run, table

from dype.cli import flags
from dype.cli.settings import resolve
from dype.rope import METHODS

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def names(line: str) -> list[str]:
    """Return the method names of the images of a command line, as results.csv has them."""
    return [run.config.name for run in resolve(vars(flags.parse(line.split())))[1]]


def file_names(line: str) -> list[str]:
    return [run.file_name for run in resolve(vars(flags.parse(line.split())))[1]]


LINES = {  # a command line -> the methods of its images
    "--method dy_yarn": "dy_yarn",
    "--method yarn": "dy_yarn",
    "--method yarn,base": "dy_yarn base",
    "--method dy_yarn,yarn,base": "dy_yarn yarn base",
    "--method base,ntk,dy_ntk": "base ntk dy_ntk",
    "--dype_method dy_yarn,ntk": "dy_yarn ntk",
    "--dype-method=dy_yarn,ntk": "dy_yarn ntk",
    "--method dy_yarn --method yarn": "dy_yarn",
    "--method dy_yarn --dype on": "dy_yarn",
    "--method dy_yarn,yarn,ntk --dype on": "dy_yarn dy_ntk",
    "--method sega,dy_sega": "sega dy_sega",
    "--method sega,yarn": "sega dy_yarn",
    "--method sega --dype on": "dy_sega",
    "--method sega,yarn --preset 4k": "sega dy_yarn",
    "--method dy_yarn,yarn --seed 1,2": "dy_yarn dy_yarn yarn yarn",
    "--method dy_yarn --preset 4k": "dy_yarn",
    "--method yarn,dy_yarn --preset 4k": "yarn dy_yarn",
    "--method dy_yarn --preset auto --size 1024": "dy_yarn",
    "--model demo --method dy_yarn_paper,yarn_paper": "dy_yarn_paper yarn_paper",
    "--sweep paper-table8 --method dy_yarn": "dy_yarn",
    "--sweep paper-table8 --method dy_yarn,ntk": "dy_yarn ntk",
    "--sweep paper-table8 --method dy_yarn,ntk --dype on": "dy_yarn dy_ntk",
    "--sweep methods --quick --method dy_ntk,base": "dy_ntk base dy_ntk base",
}


@pytest.mark.parametrize("line", LINES)
def test_lists(line):
    """Beside a dy_ name, other names are static unless --dype is on."""
    assert names(line) == LINES[line].split()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "base"])
def test_every_method_has_two_names(method):
    assert names(f"--method dy_{method},{method}") == [f"dy_{method}", method]


def test_the_settings_are_those_of_the_plain_name():
    """The record and the file name do not tell which spelling was used."""
    for spelling, plain in {
        "--method dy_ntk": "--method ntk",
        "--method dy_ntk,ntk": "--method ntk --dype on,off",
    }.items():
        runs, expected = (resolve(vars(flags.parse(line.split())))[1] for line in (spelling, plain))
        assert [run.record for run in runs] == [run.record for run in expected]
        assert [run.file_name for run in runs] == [run.file_name for run in expected]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--method dy_yarn --dype off", "--method is 'dy_yarn', but dype is off, expected on"),
        ("--method dy_yarn --no_dype", "--method is 'dy_yarn', but dype is off, expected on"),
        ("--method base,dy_pi --dype on,off", "--method is 'dy_pi', but dype is on,off, expected"),
        ("--config both.toml", "--config both.toml: method is 'dy_yarn', but dype is off"),
        ("--method yarn,dy_yarn,base --dype on,off", "no dy_: --method yarn,base --dype on,off\n"),
        ("--method dy_base", "--method is 'dy_base', expected one of base, pi"),
        ("--method dy_yarm", "--method is 'dy_yarm', expected one of base, pi"),
        ("--multipass dy_yarn", "--multipass is 'dy_yarn', expected one of single"),
    ],
)
def test_contradictions(line, sentence, capsys):
    """A dy_ name beside --dype off gives one sentence and exit code 2."""
    Path("both.toml").write_text('[default]\nmethod = "dy_yarn"\ndype = false\n')
    assert run(*line.split()) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


TABLES = """
[default.dype]
method = "dy_yarn"
[several]
method = ["dy_ntk", "ntk", "base"]
[several_text.dype]
method = "dy_ntk,ntk,base"
[on]
dype = true
method = "dy_ntk,ntk"
[static]
dype = false
method = "pi"
"""
PROFILES = {  # flags beside the file -> the methods of the images
    "": "dy_yarn",
    "--profile several": "dy_ntk ntk base",
    "--profile several_text": "dy_ntk ntk base",
    "--profile on": "dy_ntk",
    "--profile on --method dy_pi,pi": "dy_pi pi",
    "--profile on --no_dype": "ntk",
    "--profile static --method dy_pi,pi": "dy_pi pi",
    "--profile static --dype on": "dy_pi",
    "--no_dype": "yarn",
    "--profile several --dype on": "dy_ntk base",
    "--method pi": "dy_pi",
    "--method pi --no_dype": "pi",
    "--preset 4k": "dy_vision_yarn",
    "--profile several --preset auto --size 1024": "base",
    "--sweep paper-table8": "base yarn dy_yarn",
    "--sweep params --quick": "yarn" + 9 * " dy_yarn",
    "--profile several --sweep methods --quick": 2 * "dy_vision_yarn dy_yarn dy_ntk base ",
}


@pytest.mark.parametrize("line", PROFILES)
def test_tables_of_a_file(line):
    """A flag wins over a sweep, a sweep over a preset, a preset over the file."""
    Path("a.toml").write_text(TABLES)
    assert names(f"--config a.toml {line}") == PROFILES[line].split()


def test_the_column_of_a_table_comes_back():
    """The methods of results.csv as --method give the same images, and --from one of them too."""
    tiny = [*TINY_DEMO, "--size", "64", "--prompt", "x", "--output_dir", "out"]
    assert run(*tiny, "--method", "base,yarn,ntk", "--dype", "on,off") == 0
    rows = table("out")
    column = ",".join(dict.fromkeys(row["method"] for row in rows))
    assert column == "base,dy_yarn,yarn,dy_ntk,ntk"
    again = file_names(f"{' '.join(tiny)} --method {column}")
    assert sorted(again) == sorted(row["file"] for row in rows)
    static = next(row["file"] for row in rows if row["method"] == "yarn")
    assert names(f"--from out/{static}") == ["yarn"]
    assert names(f"--from out/{static} --method dy_yarn,ntk") == ["dy_yarn", "ntk"]
    dynamic = next(row["file"] for row in rows if row["method"] == "dy_yarn")
    assert names(f"--from out/{dynamic} --method dy_ntk,ntk") == ["dy_ntk", "ntk"]
