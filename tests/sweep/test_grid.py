"""Lists of settings, sweeps with a name, and the cells that they make."""

import os
import shlex
from pathlib import Path

import pytest
from conftest import run
from PIL import Image

from dype import DyPEConfig
from dype.cli import flags
from dype.cli.settings import resolve
from dype.sampling.settings import RunSettings, image_settings
from dype.sweep import grid
from dype.sweep.run import estimate_work

pytestmark = pytest.mark.usefixtures("own_folder")


def planned(*argv) -> list[RunSettings]:
    return resolve(vars(flags.parse([*argv])))[1]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("seed", "0-3", "0 1 2 3"),
        ("seed", "7", "7"),
        ("seed", "0-2,9", "0 1 2 9"),
        ("seed", "0:8:4", "0 4 8"),
        ("method", "base,ntk, yarn", "base ntk yarn"),
        ("dype_scale", "1:3:0.5", "1 1.5 2 2.5 3"),
        ("dype_scale", "0:1:0.1", "0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1"),
        ("dype_exponent", "1:2.9", "1 2"),
        ("dype_scale", "1,1,2", "1 2"),
        ("size", "1024,2048x3072", "1024 2048x3072"),
    ],
)
def test_lists(name, text, expected):
    numbers = name not in ("method", "size")
    assert grid.parse_list(name, text, numbers) == expected.split()


BAD = {
    "empty": "--seed=",
    "only a comma": "--seed ,",
    "nothing between commas": "--method yarn,,ntk",
    "empty method": "--method=",
    "backwards": "--seed 3-0",
    "backwards with a step": "--dype_scale 3:1:0.5",
    "no step": "--dype_scale 1:3:0",
    "step backwards": "--dype_scale 1:3:-1",
    "endless": "--dype_scale 1:inf:1",
    "not a number": "--dype_scale nan:2:1",
    "three colons": "--dype_scale 1:2:3:4",
    "words in a range": "--seed a:b:c",
    "31 digits of values": "--seed 0-9999999999999999999999999999999",
    "a step of nothing": "--dype_scale 1:2:1e-30",
    "no table of a sweep": "--grid_from odd",
    "somebody else's table": "--grid_from other",
    "somebody else's table before drawing": "--model demo --seed 0-1 --output_dir other",
    "one of the list out of range": "--dype_scale 1,9",
    "one of the list unknown": "--method yarn,yarm",
    "dype maybe": "--dype on,maybe",
    "too many": "--seed 0-10000",
    "far too many": "--seed 0-99999999999",
    "size a word": "--size tall",
    "size of three": "--size 64x64x64",
    "size odd": "--size 1000",
    "multipass unknown": "--multipass fourpass",
    "pass2_strength 0": "--multipass twopass --pass2_strength 0",
    "pass2_strength above 1": "--multipass twopass --pass2_strength 1.5",
    "pass3_strength of two": "--multipass twopass --pass3_strength 0.4",
    "pass2_strength of one": "--pass2_strength 0.4",
    "strength alone": "--strength 0.4",
    "strength 0": "--init_image square.png --strength 0",
    "strength above 1": "--init_image square.png --strength 1.1",
    "init image no image": "--init_image text.txt",
    "init image cut off": "--init_image cut.png",
    "init image missing": "--init_image none.png",
    "init image a folder": "--init_image .",
    "init image of another aspect": "--init_image square.png --size 1024x512",
    "init image and passes": "--init_image square.png --multipass twopass",
    "sweep unknown": "--sweep everything",
    "quick alone": "--quick",
    "quick of a table": "--sweep paper-table6 --quick",
    "multipass_only alone": "--multipass_only",
    "multipass_only of params": "--sweep params --multipass_only",
    "cols": "--seed 0-1 --cols hue",
    "cols 0": "--seed 0-1 --cols 0",
    "output of a sweep": "--seed 0-1 --output a.png",
    "grid_from nothing": "--grid_from nowhere",
    "quantize unknown": "--quantize int3",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, capsys):
    """One sentence, exit code 2, nothing loaded and nothing written."""
    Image.new("RGB", (64, 64)).save("square.png")
    Path("cut.png").write_bytes(Path("square.png").read_bytes()[:60])
    Path("text.txt").write_text("words")
    Path("odd").mkdir()
    Path("odd/results.csv").write_bytes(b"\xff\n\xff\n")
    Path("other").mkdir()
    Path("other/results.csv").write_text("file,model\na,b\n")
    before = sorted(os.listdir())
    assert run(*BAD[name].split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("run_dype.py: ")
    assert err.count("\n") == 1
    assert any(
        word in err for word in ("expected", "choose from", "cannot be read", "is of a", "move it")
    )
    assert sorted(os.listdir()) == before


def test_yes_means_it():
    assert len(planned("--seed", "0-10000", "--yes")) == 10_001


def test_the_product_and_what_draws_the_same_once():
    """Static and `base` don't depend on lambda, so they are drawn once for all of them."""
    found = planned(
        *shlex.split("--method base,ntk --dype on,off --dype_scale 1,2 --seed 0-1 --prompt a b")
    )
    names = [cell.file_name for cell in found]
    assert len(set(names)) == len(names) == 2 * 2 * 4  # base, ntk, ntk with 1 and with 2
    assert names[0].startswith("seed_0_method_base_res_4096x4096_prompt_a")
    assert sum("dy_ntk_res_4096x4096_dype_scale_1_" in name for name in names) == 4
    assert sum("dy_ntk_res_4096x4096_prompt_" in name for name in names) == 4  # 2, its own
    assert found[0].prompt == "a"
    assert found[-1].prompt == "b"


def test_the_time_aware_baseline_has_no_lambdas():
    """TASR follows t itself: lambda_s and lambda_t change nothing, the start does."""
    lists = "--method tasr --dype_scale 1,2 --dype_exponent 1,2 --dype_start_sigma 0.5,1"
    names = [cell.file_name for cell in planned(*lists.split())]
    assert names == [
        f"seed_42_method_dy_tasr_res_4096x4096{start}.png"
        for start in ("_dype_start_sigma_0.5", "")
    ]


def test_settings_that_a_method_does_not_feel():
    """The cut moves the cutoffs alone, dynamic and static; the attention scale all but `base`."""
    lists = "--method base,pi,cutoff --no_dype --cutoff 1,2 --attention_scale 0,0.3"
    names = [cell.file_name for cell in planned(*lists.split())]
    assert names == ["seed_42_method_base_res_4096x4096.png"] + [
        f"seed_42_method_{method}_res_4096x4096{cut}_attention_scale_{scale}.png"
        for method, cuts in (("pi", [""]), ("cutoff", ["", "_cutoff_2"]))
        for cut in cuts
        for scale in ("0", "0.3")
    ]


def test_the_path_of_an_attention_scale_that_is_not_felt():
    """The same image as with a constant one: where there is no a, no method, no noise level."""

    def same(*settings, **more):
        flags = planned()[0].record
        config = DyPEConfig(*settings, attention_scale=0.3, **more).to_dict()
        pair = [flags | {"config": config | {"attention_path": p}} for p in ("constant", "rising")]
        return image_settings(pair[0]) == image_settings(pair[1])

    assert same("base")
    assert same("yarn", False)
    assert not same("yarn")


def test_older_records_lack_settings():
    """What they lack was at its default."""
    record = planned("--method", "yarn")[0].record
    known = image_settings(record)
    for name in ("cutoff", "cutoff_width", "attention_scale", "attention_path"):
        del record["config"][name]
    for name in ("cache", "attention", "init_sha256"):
        del record["flags"][name]
    assert image_settings(record) == known


def test_sizes_are_width_first_and_names_height_first():
    found = planned("--size", "1024,2048x3072")
    assert [cell.file_name[-13:-4] for cell in found] == ["1024x1024", "3072x2048"]


COUNTS = {
    "--sweep methods": 5 * 4 + 1,
    "--sweep methods --quick": 2 * 4,
    "--sweep methods --multipass_only": 1,
    "--sweep params": 25 + 1,
    "--sweep params --quick": 9 + 1,
    "--sweep paper-table1": 4 * 6,
    "--sweep paper-table3": 2,
    "--sweep paper-table6": 2 + 2 * 6,
    "--sweep paper-table7": 5,
    "--sweep paper-table8": 3,
}


@pytest.mark.parametrize("model", ["flux-krea", "demo", "qwen-image"])
@pytest.mark.parametrize("line", COUNTS)
def test_named_sweeps_are_presets_of_the_list_flags(line, model, capsys):
    """As many images as said; the flags that are printed make the same ones."""
    model = ["--model", model]
    found = planned(*line.split(), *model)
    assert len(found) == COUNTS[line]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"--sweep {line.split()[1]} stands for"
    lines = [text for text in printed[1:] if text.startswith("  --")]
    again = [cell for text in lines for cell in planned(*shlex.split(text), *model)]

    names = [sorted(run.file_name for run in runs) for runs in (again, found)]
    assert names[0] == names[1]
    assert ("left out" in " ".join(printed)) == ("table3" in line)
    assert ("--model qwen-image" in " ".join(printed)) == ("table8" in line)


def test_sizes_of_a_named_sweep_are_whole_tokens():
    """Multiples of the base resolution to the nearest 16 px: 1.5 x 1328 is 1992, so 2000."""
    found = planned("--sweep", "methods", "--model", "qwen-image")
    sizes = dict.fromkeys(cell.height for cell in found)
    assert list(sizes) == [1328, 2000, 2656, 3984, 5312]


def rows(name: str) -> set[str]:
    """The rows of a named sweep, as its file names have them."""
    return {cell.file_name.split("_res_")[0][15:] for cell in planned("--sweep", name)}


def test_paper_tables_hold_the_papers_settings():
    """Rows of Tables 1, 7 and 8; lambdas and size of both schedulers of Table 6."""
    assert rows("paper-table1") == {"base", "ntk", "dy_tasr", "dy_ntk", "yarn", "dy_yarn"}
    sizes = [(c.width, c.height) for c in planned("--sweep", "paper-table1")]
    assert list(dict.fromkeys(sizes)) == [(2048, 3072), (3072, 2048), (3072, 3072), (4096, 4096)]
    assert rows("paper-table7") == {"base", "yarn", "dy_yarn", "dy_yarn_ntk_only", "dy_yarn_both"}
    assert rows("paper-table8") == {"base", "yarn", "dy_yarn"}
    found = planned("--sweep", "paper-table6")
    assert {cell.height for cell in found} == {3072}
    for method in ("ntk", "ntk_mult"):
        pairs = [
            (cell.config.dype_scale, cell.config.dype_exponent)
            for cell in found
            if cell.config.dype and cell.config.method == method
        ]
        assert sorted(pairs) == [(1, 1), (1.5, 1), (2, 0.5), (2, 1), (2, 2), (2.5, 1)]


def test_a_flag_wins_over_the_named_sweep():
    found = planned("--sweep", "methods", "--method", "ntk", "--size", "2048", "--seed", "1,2")
    assert {cell.config.method for cell in found} == {"ntk"}
    assert len(found) == 2 * 2  # one and two passes


def test_a_list_of_one_image_is_a_sweep():
    """Also where its values have no effect, or two of them are the same."""
    for words in ("--method base --dype_scale 1,2", "--prompt a a"):
        options, runs = resolve(vars(flags.parse(words.split())))
        assert (options.sweep, len(runs)) == ("sweep", 1)
    assert resolve(vars(flags.parse(["--seed", "3"])))[0].sweep is None


def test_a_prompt_twice_is_drawn_once():
    found = planned("--prompt", "a", "b", "a")
    assert [cell.prompt for cell in found] == ["a", "b"]


def test_the_time_left_is_by_steps_and_pixels():
    [small], [large] = (planned("--size", size) for size in ("1024", "2048"))
    assert estimate_work(large) == 4 * estimate_work(small) == 28 * 2048**2
