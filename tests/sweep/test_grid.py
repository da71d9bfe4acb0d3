"""Lists of values, named sweeps, and the runs that they give."""

import shlex
from pathlib import Path

import pytest
from conftest import run as run_command
from PIL import Image

from dype import DyPEConfig
from dype.cli import flags
from dype.cli.settings import resolve
from dype.sampling.settings import RunSettings, image_settings
from dype.sweep import grid
from dype.sweep.contact_sheet import arrange_grid
from dype.sweep.results import to_row

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def resolve_runs(*argv) -> list[RunSettings]:
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
        ("dype_scale", "1,1,2", "1 1 2"),
        ("size", "1024,2048x3072", "1024 2048x3072"),
    ],
)
def test_lists(name, text, expected):
    numbers = name not in ("method", "size")
    assert grid.parse_list(name, text, numbers) == expected.split()


TABLE_HEAD = "file,height,width,seconds,peak_memory,error"
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
    "a foreign table": "--grid_from other",
    "a foreign table before generating": "--model demo --seed 0-1 --output_dir other",
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
    "cols of one image": "--cols hue",
    "output of a sweep": "--seed 0-1 --output a.png",
    "output and output_dir": "--output a.png --output_dir b",
    "grid_from and other flags": "--grid_from done --dry_run --seed 1 --no_dype",
    "a table whose memory is text": "--grid_from text",
    "another program's page": "--grid_from page",
    "a range with dots": "--seed 0..3",
    "grid_from nothing": "--grid_from nowhere",
    "quantize unknown": "--quantize int3",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, capsys):
    """Bad input gives one sentence and exit code 2; nothing is loaded or written."""
    Image.new("RGB", (64, 64)).save("square.png")
    Path("cut.png").write_bytes(Path("square.png").read_bytes()[:60])
    Path("text.txt").write_text("words")
    Path("odd").mkdir()
    Path("odd/results.csv").write_bytes(b"\xff\n\xff\n")
    for folder, memory in (("done", "1"), ("page", "1"), ("text", "1.2 GiB")):
        Path(folder).mkdir()
        row = f"a.png,64,64,1,{memory},"
        Path(folder, "results.csv").write_text(f"{TABLE_HEAD}\n{row}\n")
    Path("page/index.html").write_text("mine")
    Path("other").mkdir()
    Path("other/results.csv").write_text("file,model\na,b\n")
    before = sorted(map(str, Path().rglob("*")))
    assert run_command(*BAD[name].split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("run_dype.py: ")
    assert err.count("\n") == 1
    assert any(
        word in err for word in ("expected", "choose from", "cannot be read", "is of a", "move it")
    )
    assert sorted(map(str, Path().rglob("*"))) == before


def test_only_cols_goes_with_grid_from(capsys):
    """The sentence names the flags as they were written."""
    assert run_command("--grid_from", "x", "--cols", "2", "--yes", "--no_dype", "--size=64") == 2
    assert capsys.readouterr().err.endswith("takes --cols alone, expected no --no_dype, --size\n")


def test_several_random_seeds():
    """Each is a number of its own."""
    runs = resolve_runs("--seed", "random,Random,random,3")
    assert len({run.seed for run in runs}) == 4
    assert runs[-1].seed == 3


SIZES = ("1024X768", "1024\u00d7768", "1024*768", "1024 x 768", "1024x768")


@pytest.mark.parametrize("text", SIZES)
def test_spellings_of_a_size(text):
    assert [(run.width, run.height) for run in resolve_runs("--size", text)] == [(1024, 768)]


@pytest.mark.parametrize(
    ("size", "example"),
    [((1, 2000), ""), ((2000, 1), ""), ((64, 48), ""), ((60, 50), ", for example --size 96x80")],
)
def test_the_example_of_another_aspect_is_possible(size, example, capsys):
    """Without one where no size of this program has the shape."""
    Image.new("RGB", size).save("a.png")
    assert run_command("--init_image", "a.png", "--size", "96") == 2
    assert capsys.readouterr().err.endswith(f"expected the same aspect ratio{example}\n")


def test_yes_allows_more_images():
    assert len(resolve_runs("--seed", "0-10000", "--yes")) == 10_001


def test_the_product_has_equal_images_once():
    """Static methods and `base` do not depend on lambda, so they are generated once for all."""
    lists = "--method base,ntk --dype on,off --dype_scale 1,2 --seed 0-1 --prompt a b"
    runs = resolve_runs(*shlex.split(lists))
    names = [run.file_name for run in runs]
    assert len(set(names)) == len(names) == 2 * 2 * 4  # base, ntk, ntk with 1 and with 2
    assert names[0].startswith("seed_0_method_base_res_4096x4096_prompt_a")
    assert sum("dy_ntk_res_4096x4096_dype_scale_1_" in name for name in names) == 4
    # The names lack scale 2, which is the default.
    assert sum("dy_ntk_res_4096x4096_prompt_" in name for name in names) == 4
    assert runs[0].prompt == "a"
    assert runs[-1].prompt == "b"


def test_the_time_aware_baseline_has_no_lambdas():
    """TASR follows t itself: lambda_s and lambda_t have no effect, the start has one."""
    lists = "--method tasr --dype_scale 1,2 --dype_exponent 1,2 --dype_start_sigma 0.5,1"
    names = [run.file_name for run in resolve_runs(*lists.split())]
    assert names == [
        f"seed_42_method_dy_tasr_res_4096x4096{start}.png"
        for start in ("_dype_start_sigma_0.5", "")
    ]


def test_settings_without_effect_on_a_method():
    """--cutoff has an effect on `cutoff` only, --attention_scale on all methods but `base`."""
    lists = "--method base,pi,cutoff --no_dype --cutoff 1,2 --attention_scale 0,0.3"
    names = [run.file_name for run in resolve_runs(*lists.split())]
    assert names == ["seed_42_method_base_res_4096x4096.png"] + [
        f"seed_42_method_{method}_res_4096x4096{cut}_attention_scale_{scale}.png"
        for method, cuts in (("pi", [""]), ("cutoff", ["", "_cutoff_2"]))
        for cut in cuts
        for scale in ("0", "0.3")
    ]


def test_attention_path_without_effect():
    """`base` and static methods give the same image with a constant and a rising path."""

    def is_same_image(*settings):
        record = resolve_runs()[0].record
        config = DyPEConfig(*settings, attention_scale=0.3).to_dict()
        paths = ("constant", "rising")
        pair = [record | {"config": config | {"attention_path": path}} for path in paths]
        return image_settings(pair[0]) == image_settings(pair[1])

    assert is_same_image("base")
    assert is_same_image("yarn", False)
    assert not is_same_image("yarn")


def test_names_of_later_methods():
    """`base` has one image whatever m is, and `sega` one with its own m."""
    lists = "--method base,yarn,sega --attention_path constant,tide,sega --dype off"
    start, end = "seed_42_method_", "_res_4096x4096"
    names = [run.file_name for run in resolve_runs(*lists.split())]
    assert names == [f"{start}base{end}.png"] + [
        f"{start}{method}{end}{path}.png"
        for method, paths in (("yarn", ["", "tide", "sega"]), ("sega", ["", "tide"]))
        for path in (f"_attention_path_{path}" if path else "" for path in paths)
    ]
    lists = "--method sega --sega_alpha 0,0.3 --text_repeat 1,auto --shift log"
    names = [run.file_name for run in resolve_runs(*lists.split())]
    assert names == [
        f"{start}sega{end}_sega_alpha_{alpha}{text}_shift_log.png"
        for alpha in ("0", "0.3")
        for text in ("", "_text_repeat_auto")
    ]


@pytest.mark.parametrize(
    "lists",
    [
        "--method sega --attention_path constant,proportional --text_repeat 1,auto",
        "--method ntk,yarn --attention_path constant,tide,sega",
        "--method yarn --attention_scale 0.1,0.3",
        "--method base,yarn --dype on,off --attention_scale 0.3 --attention_path rising",
    ],
)
def test_contact_sheets_show_every_attention_scale(lists):
    """No image hides another one on the sheet."""
    runs = resolve_runs(*lists.split())
    _, _, columns = arrange_grid([to_row(run) for run in runs], None)
    files = [row["file"] for column in columns for row in column if row]
    assert {*files} == {run.file_name for run in runs}


def test_older_records_lack_settings():
    """A setting that an older record lacks has its default value."""
    record = resolve_runs("--method", "yarn")[0].record
    expected = image_settings(record)
    later = ("ntk_factor", "rdfc_pairs", "rdfc_turns", "text_repeat", "sega_alpha", "sega_beta")
    for name in ("cutoff", "cutoff_width", "attention_scale", "attention_path", *later):
        del record["config"][name]
    for name in ("cache", "attention", "init_sha256"):
        del record["flags"][name]
    assert image_settings(record) == expected


def test_sizes_are_width_first_and_names_height_first():
    runs = resolve_runs("--size", "1024,2048x3072")
    assert [run.file_name[-13:-4] for run in runs] == ["1024x1024", "3072x2048"]


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
    """A sweep has the expected number of images, and the printed flags give the same images."""
    model = ["--model", model]
    runs = resolve_runs(*line.split(), *model)
    assert len(runs) == COUNTS[line]
    output = capsys.readouterr().out.splitlines()
    assert output[0] == f"--sweep {line.split()[1]} stands for"
    lines = [text for text in output[1:] if text.startswith("  --")]
    printed_runs = [run for text in lines for run in resolve_runs(*shlex.split(text), *model)]
    assert sorted(r.file_name for r in printed_runs) == sorted(r.file_name for r in runs)
    assert ("left out" in " ".join(output)) == ("table3" in line)
    assert ("--model qwen-image" in " ".join(output)) == ("table8" in line)


def test_sizes_of_a_named_sweep_are_whole_tokens():
    """Sizes are rounded to the nearest 16 px: 1.5 x 1328 is 1992, so 2000."""
    runs = resolve_runs("--sweep", "methods", "--model", "qwen-image")
    sizes = dict.fromkeys(run.height for run in runs)
    assert list(sizes) == [1328, 2000, 2656, 3984, 5312]


def methods(name: str) -> set[str]:
    """Return the methods of a named sweep as in its file names, the rows of the paper's table."""
    return {run.file_name.split("_res_")[0][15:] for run in resolve_runs("--sweep", name)}


def test_paper_tables_hold_the_papers_settings():
    """Sweeps have the rows of Tables 1, 7 and 8, and the lambdas and the size of Table 6."""
    assert methods("paper-table1") == {"base", "ntk", "dy_tasr", "dy_ntk", "yarn", "dy_yarn"}
    sizes = [(run.width, run.height) for run in resolve_runs("--sweep", "paper-table1")]
    assert list(dict.fromkeys(sizes)) == [(2048, 3072), (3072, 2048), (3072, 3072), (4096, 4096)]
    table7 = {"base", "yarn", "dy_yarn", "dy_yarn_ntk_only", "dy_yarn_both"}
    assert methods("paper-table7") == table7
    assert methods("paper-table8") == {"base", "yarn", "dy_yarn"}
    runs = resolve_runs("--sweep", "paper-table6")
    assert {run.height for run in runs} == {3072}
    for method in ("ntk", "ntk_mult"):
        pairs = [
            (run.config.dype_scale, run.config.dype_exponent)
            for run in runs
            if run.config.dype and run.config.method == method
        ]
        assert sorted(pairs) == [(1, 1), (1.5, 1), (2, 0.5), (2, 1), (2, 2), (2.5, 1)]


def test_a_flag_wins_over_the_named_sweep():
    flags = "--method ntk --size 2048 --seed 1,2"
    runs = resolve_runs("--sweep", "methods", *flags.split())
    assert {run.config.method for run in runs} == {"ntk"}
    assert len(runs) == 2 * 2  # one and two passes


def test_a_list_of_one_image_is_a_sweep():
    """A list is a sweep also if its values have no effect or are equal."""
    for line in ("--method base --dype_scale 1,2", "--prompt a a"):
        options, runs = resolve(vars(flags.parse(line.split())))
        assert (options.sweep, len(runs)) == ("sweep", 1)
    assert resolve(vars(flags.parse(["--seed", "3"])))[0].sweep is None


def test_a_repeated_prompt_is_generated_once():
    runs = resolve_runs("--prompt", "a", "b", "a")
    assert [run.prompt for run in runs] == ["a", "b"]
