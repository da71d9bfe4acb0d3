"""Lists of settings, sweeps with a name, the cells they make, and what is written of them."""

import csv
import json
import multiprocessing
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import run_dype
from dype import ablation, cells, flags, generate, memory, records, sheets, sweeps
from dype.settings import resolve

TINY = shlex.split("--model demo --steps 1 --base_resolution 32")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*argv) -> int:
    return run_dype.main([str(word) for word in argv])


def planned(*argv) -> list[cells.Cell]:
    return cells.plan(resolve(vars(flags.parse([*argv])))[1], Path("out"))


def table(folder="out") -> list[dict]:
    with (Path(folder) / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


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
    assert sweeps.values(name, text) == expected.split()


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
    "dype list and no_dype": "--dype on,off --no_dype",
    "too many": "--seed 0-10000",
    "far too many": "--seed 0-99999999999",
    "size a word": "--size tall",
    "size of three": "--size 64x64x64",
    "size odd": "--size 1000",
    "size and height": "--size 1024 --height 1024",
    "multipass unknown": "--multipass fourpass",
    "pass2_strength 0": "--multipass twopass --pass2_strength 0",
    "pass2_strength above 1": "--multipass twopass --pass2_strength 1.5",
    "pass3_strength of two": "--multipass twopass --pass3_strength 0.4",
    "pass2_strength of one": "--pass2_strength 0.4",
    "strength alone": "--strength 0.4",
    "strength 0": "--init_image square.png --strength 0",
    "strength above 1": "--init_image square.png --strength 1.1",
    "init image no picture": "--init_image text.txt",
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
    names = [cell.path.name for cell in found]
    assert len(set(names)) == len(names) == 2 * 2 * 4  # base, ntk, ntk with 1 and with 2
    assert "seed_0_method_base_res_4096x4096.png" in names
    assert "seed_1_method_dy_ntk_res_4096x4096_scale_1_prompt_2.png" in names
    assert "seed_0_method_ntk_res_4096x4096_prompt_2.png" in names
    assert found[0].prompt == "a"
    assert found[-1].prompt == "b"


def test_sizes_are_width_first_and_names_height_first():
    found = planned("--size", "1024,2048x3072")
    assert [cell.path.name[-13:-4] for cell in found] == ["1024x1024", "3072x2048"]


COUNTS = {
    "--sweep methods": 5 * 4 + 1,
    "--sweep methods --quick": 2 * 4,
    "--sweep methods --multipass_only": 1,
    "--sweep params": 25 + 1,
    "--sweep params --quick": 9 + 1,
    "--sweep paper-table6": 2 + 6,
    "--sweep paper-table7": 3,
}


@pytest.mark.parametrize("model", ["flux-krea", "demo", "qwen-image"])
@pytest.mark.parametrize("line", COUNTS)
def test_named_sweeps_are_presets_of_the_list_flags(line, model, capsys):
    """As many pictures as said; the flags that are printed make the same ones."""
    model = ["--model", model]
    found = planned(*line.split(), *model)
    assert len(found) == COUNTS[line]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"--sweep {line.split()[1]} stands for"
    lines = [text for text in printed[1:] if text.startswith("  --")]
    again = [cell for text in lines for cell in planned(*shlex.split(text), *model)]

    def key(cell):
        own = cells.identity(cell.settings.flags, cell.settings.config.to_dict(), cell.prompt)
        return json.dumps(own, sort_keys=True)

    assert sorted(map(key, again)) == sorted(map(key, found))
    assert ("left out" in " ".join(printed)) == ("table" in line)


def test_sizes_of_a_named_sweep_are_whole_tokens():
    """Multiples of the base resolution to the nearest 16 px: 1.5 x 1328 is 1992, so 2000."""
    found = planned("--sweep", "methods", "--model", "qwen-image")
    sizes = dict.fromkeys(cell.settings.flags["height"] for cell in found)
    assert list(sizes) == [1328, 2000, 2656, 3984, 5312]


def test_paper_tables_hold_the_papers_settings():
    """Table 6's exponential rows, Table 7's three, at 3072 x 3072."""
    found = planned("--sweep", "paper-table6")
    assert {cell.settings.flags["height"] for cell in found} == {3072}
    pairs = [
        (cell.settings.config.dype_scale, cell.settings.config.dype_exponent)
        for cell in found
        if cell.settings.config.dype and cell.settings.config.method == "ntk"
    ]
    assert sorted(pairs) == [(1, 1), (1.5, 1), (2, 0.5), (2, 1), (2, 2), (2.5, 1)]
    named = {cell.path.name.split("_res_")[0][15:] for cell in planned("--sweep", "paper-table7")}
    assert named == {"base", "yarn", "dy_yarn"}


def test_a_flag_wins_over_the_named_sweep():
    found = planned("--sweep", "methods", "--method", "ntk", "--size", "2048", "--seed", "1,2")
    assert {cell.settings.config.method for cell in found} == {"ntk"}
    assert len(found) == 2 * 2  # one and two passes


def test_a_sweep_from_one_command(capsys, monkeypatch):
    """Pictures, records, table, sheets and summary; a second time nothing is drawn or loaded."""
    loads = []
    load = run_dype.load_pipeline
    monkeypatch.setattr(run_dype, "load_pipeline", lambda *a, **k: loads.append(k) or load(*a, **k))
    line = [*TINY, *shlex.split("--method yarn,base --seed 0-1 --size 64,64x96 --output_dir out")]
    assert run(*line) == 0
    rows = table()
    assert len(rows) == 8
    assert {row["method"] for row in rows} == {"dy_yarn", "base"}
    assert {(row["height"], row["width"]) for row in rows} == {("64", "64"), ("96", "64")}
    for row in rows:
        record = records.load(Path("out") / row["file"])
        assert record["flags"]["seed"] == int(row["seed"])
        assert record["seconds"] == float(row["seconds"])
        picture = records.open_picture(Path("out") / row["file"])
        assert picture.size == (int(row["width"]), int(row["height"]))
    assert (Path("out") / "comparison_96x64.png").exists()
    text = Path("out/summary.txt").read_text()
    assert text.count("dy_yarn") == 2
    before = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("seed_*")}
    capsys.readouterr()
    assert run(*line) == 0
    assert "out: pictures 8, there already 8" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in Path("out").glob("seed_*")} == before
    assert table() == rows
    assert [call["pixels"] for call in loads] == [64 * 96]


def test_more_of_the_same_is_added(monkeypatch):
    """A longer list draws what is new; columns that others added to the table stay."""
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed"]
    assert run(*line, "0-1") == 0
    path = Path("out/results.csv")
    scored = [
        f"{text},{'clip' if i == 0 else f'0.{i}'}"
        for i, text in enumerate(path.read_text().splitlines())
    ]
    path.write_text("\n".join(scored) + "\n")
    draws = []
    draw = generate.draw
    monkeypatch.setattr(generate, "draw", lambda *a, **k: draws.append(k["seed"]) or draw(*a, **k))
    assert run(*line, "0-3") == 0
    assert draws == [2, 3]
    assert [row["clip"] for row in table()] == ["0.1", "0.2", "", ""]
    assert [row["seed"] for row in table()] == ["0", "1", "2", "3"]


def test_another_axis_finds_what_is_there(monkeypatch):
    """File names depend on what varies; what was drawn under another name is not drawn again."""
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line, "--dype_scale", "1") == 0
    draws = []
    draw = generate.draw
    monkeypatch.setattr(generate, "draw", lambda *a, **k: draws.append(k["seed"]) or draw(*a, **k))
    assert run(*line, "--dype_scale", "1,2") == 0
    assert draws == [0, 1]
    assert sorted((row["dype_scale"], row["seed"]) for row in table()) == [
        ("1", "0"),
        ("1", "1"),
        ("2", "0"),
        ("2", "1"),
    ]


def test_a_deleted_picture_is_drawn_again_under_its_name():
    """Its record, left alone, is no reason for another name."""
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    before = sorted(os.listdir("out"))
    gone = next(Path("out").glob("seed_0*.png"))
    pixels = gone.read_bytes()[:200]
    gone.unlink()
    assert run(*line) == 0
    assert sorted(os.listdir("out")) == before
    assert len(table()) == 2
    assert gone.read_bytes()[:30] == pixels[:30]


def test_a_record_of_before_an_overwrite_is_mended():
    """As a kill between picture and record leaves it."""
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line) == 0
    beside = next(Path("out").glob("seed_0*.json"))
    right = beside.read_bytes()
    beside.write_text('{"prompt": "of before"}')
    assert run(*line) == 0
    assert beside.read_bytes() == right


def test_one_picture_of_a_named_sweep_is_a_sweep(capsys):
    """In its own folder, with a table."""
    line = ["--model", "demo", "--steps", "1", "--sweep", "methods", "--multipass_only"]
    assert run(*line, "--base_resolution", "32") == 0
    assert len(table("outputs/methods")) == 1
    capsys.readouterr()
    assert run(*line, "--base_resolution", "32") == 0
    assert "there already 1" in capsys.readouterr().out


def test_a_changed_flag_is_noticed(capsys):
    """And named; --overwrite draws again what was drawn with other settings, and only that."""
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed"]
    assert run(*line, "0-1") == 0
    capsys.readouterr()
    assert run(*line, "0-1", "--true_cfg", "2") == 2
    err = capsys.readouterr().err
    assert "--true_cfg is 2.0" in err
    assert "drawn with 5.0" in err
    assert run(*line, "0-1", "--true_cfg", "2", "--overwrite") == 0
    assert [row["true_cfg"] for row in table()] == ["2", "2"]
    capsys.readouterr()
    assert run(*line, "0-1", "--true_cfg", "2", "--overwrite") == 0
    assert "there already 2" in capsys.readouterr().out


def test_somebody_elses_picture_stays(capsys):
    os.mkdir("out")
    name = Path("out/seed_0_method_dy_yarn_paper_res_64x64.png")
    Image.new("RGB", (8, 8)).save(name)
    before = name.read_bytes()
    assert run(*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 2
    assert "is in the way" in capsys.readouterr().err
    assert name.read_bytes() == before
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1", "--overwrite"]
    assert run(*line) == 0
    assert records.load(name)["flags"]["seed"] == 0


def test_a_prompt_twice_is_drawn_once():
    found = planned("--prompt", "a", "b", "a")
    assert [cell.prompt for cell in found] == ["a", "b"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError(),
        ValueError("no such thing"),
        IndexError("no such thing"),
    ],
)
def test_a_cell_that_fails_is_written_down_and_the_rest_go_on(error, monkeypatch, capsys):
    line = [*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-2"]
    draw = generate.draw

    def fails(*args, **kwargs):
        if kwargs["seed"] == 1:
            raise error
        return draw(*args, **kwargs)

    monkeypatch.setattr(generate, "draw", fails)
    assert run(*line) == 1
    assert "1 of 3 pictures failed" in capsys.readouterr().err
    rows = table()
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    wanted = "no such thing" if "such" in str(error) else "out of memory at a peak of"
    assert wanted in rows[1]["error"]
    assert not (Path("out") / rows[1]["file"]).exists()
    assert Path("out/summary.txt").read_text().splitlines()[1].split()[:2] == ["2", "1"]
    monkeypatch.setattr(generate, "draw", draw)
    assert run(*line) == 0
    assert [(row["seed"], row["error"]) for row in table()] == [("0", ""), ("2", ""), ("1", "")]


def test_out_of_memory_alone_says_what_is_cheaper(monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(generate, "draw", fails)
    assert run(*TINY, "--size", "64") == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"run_dype.py: out of memory at a peak of .* GiB; try --tiled_vae on", err)


def test_dry_run_prints_the_plan(capsys):
    """The number of pictures and an estimate; with a picture there, hours; nothing is written."""
    line = [*TINY, "--size", "64,128", "--output_dir", "out", "--seed", "0-1"]
    assert run(*line, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "pictures 4, there already 0" in out
    assert "FLOP" in out
    assert not Path("out").exists()
    assert run(*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 0
    capsys.readouterr()
    assert run(*line, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "pictures 4, there already 2" in out
    assert "at the pace of those" in out


def test_the_estimate_is_the_cost_model():
    """FLUX at 4096: 3 PFLOP of attention and 1.6 of the rest per call; guidance doubles it."""
    [plain] = resolve({"model": "flux-dev"})[1]
    per_call = cells.work(plain) / 28
    assert per_call == pytest.approx(4.6e15, rel=0.05)
    [guided] = resolve({"model": "flux-dev", "true_cfg": "3", "negative_prompt": "fog"})[1]
    assert cells.work(guided) == pytest.approx(2 * cells.work(plain))
    [two] = resolve({"model": "flux-dev", "multipass": "twopass"})[1]
    assert 0.5 < cells.work(two) / cells.work(plain) < 0.7


def test_two_sweeps_in_one_folder(capsys):
    """The second is told to wait."""
    os.mkdir("out")
    with ablation.locked(Path("out")):
        other = multiprocessing.get_context("spawn").Process(target=lock, args=(os.getcwd(),))
        other.start()
        other.join()
    assert other.exitcode == 7
    assert run(*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 0


def lock(folder: str) -> None:
    try:
        with ablation.locked(Path(folder) / "out"):
            pass
    except OSError:
        os._exit(7)


COLOURS = {"a": (250, 0, 0), "b": (0, 250, 0), "c": (0, 0, 250), "s": (200, 200, 0)}


def rows_of(*given: dict) -> list[dict]:
    """Rows of results.csv, and plain pictures of a colour each for them."""
    os.makedirs("out", exist_ok=True)
    empty = dict.fromkeys(ablation.COLUMNS, "")
    usual = {"height": "64", "width": "96", "method": "dy_yarn", "seed": "0", "prompt": "a ring"}
    usual |= {"seconds": "2.0", "peak_memory": str(memory.GIB)}
    rows = []
    for one in given:
        name = one.pop("colour")
        Image.new("RGB", (96, 64), COLOURS[name]).save(f"out/{name}.png")
        rows.append(empty | usual | {"file": f"{name}.png"} | one)
    return rows


def colours(sheet: Image.Image) -> list[list[str]]:
    """The pictures on a sheet, row by row, by their colours; '?' is a grey box."""
    found = np.asarray(sheet).astype(int)
    width = 320
    height = round(320 * 64 / 96)
    names = {value: name for name, value in COLOURS.items()} | {(211, 211, 211): "?"}
    grid = []
    for y in range(found.shape[0] - height + 1):
        row = []
        for x in range(found.shape[1] - width + 1):
            corners = [
                tuple(found[y + dy, x + dx]) for dy in (0, height - 1) for dx in (0, width - 1)
            ]
            outside = y == 0 or tuple(found[y - 1, x]) not in names
            before = x == 0 or tuple(found[y, x - 1]) not in names
            if outside and before and len(set(corners)) == 1 and corners[0] in names:
                row.append(names[corners[0]])
        if row:
            grid.append(row)
    return grid


def test_contact_sheet():
    """Scales down, exponents across; the static picture, which has neither, in every column."""
    rows = rows_of(
        {"colour": "s", "method": "yarn"},
        {"colour": "a", "dype_scale": "1", "dype_exponent": "1"},
        {"colour": "b", "dype_scale": "1", "dype_exponent": "2"},
        {"colour": "c", "dype_scale": "2", "dype_exponent": "1"},
        {"colour": "a", "dype_scale": "2", "dype_exponent": "2", "error": "out of memory"},
    )
    sheet = sheets.contact_sheet(rows, Path("out"), (64, 96), None)
    assert colours(sheet) == [["s", "s"], ["a", "b"], ["c", "?"]]
    across = sheets.contact_sheet(rows, Path("out"), (64, 96), "dype_scale")
    assert colours(across) == [["s", "s"], ["a", "c"], ["b", "?"]]
    wrapped = sheets.contact_sheet(rows, Path("out"), (64, 96), "1")
    assert colours(wrapped) == [["s"], ["a"], ["c"], ["s"], ["b"], ["?"]]


def test_labels_name_what_varies(monkeypatch):
    """And nothing else: a scale that each method has of its own is no axis."""
    written = []
    text = ImageDraw.ImageDraw.multiline_text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "multiline_text",
        lambda self, at, words, *more: written.append(words) or text(self, at, words, *more),
    )
    rows = rows_of(
        {"colour": "a", "method": "dy_yarn", "dype_scale": "1"},
        {"colour": "b", "method": "dy_ntk", "dype_scale": "2"},
        {"colour": "c", "method": "dy_ntk", "dype_scale": "2", "seed": "1"},
    )
    sheets.contact_sheet(rows, Path("out"), (64, 96), None)
    assert sorted(set(written)) == ["dy_ntk", "dy_yarn", "seed 0", "seed 1"]


def test_summary():
    """Mean and deviation over seeds, per setting; failures are counted, not averaged."""
    rows = rows_of(
        {"colour": "a", "seed": "0", "seconds": "1.0"},
        {"colour": "b", "seed": "1", "seconds": "3.0"},
        {"colour": "c", "seed": "2", "error": "out of memory", "seconds": "", "peak_memory": ""},
        {"colour": "s", "method": "base"},
    )
    lines = sheets.summary(rows).splitlines()
    assert lines[1].split() == shlex.split("2 1 2.0 (1.4) 1.00 (0.00) 64x96, dy_yarn")
    assert lines[2].split() == shlex.split("1 0 2.0 1.00 64x96, base")


def test_grid_from_a_finished_folder(capsys):
    """The same sheets again, without a model."""
    assert run(*TINY, "--size", "64", "--output_dir", "out", "--seed", "0-1") == 0
    path = Path("out/comparison_64x64.png")
    before = path.read_bytes()
    path.unlink()
    capsys.readouterr()
    assert run("--grid_from", "out") == 0
    assert path.read_bytes() == before
    assert "comparison_64x64.png" in capsys.readouterr().out
    assert run("--grid_from", "out", "--cols", "1") == 0
    assert path.read_bytes() != before


def test_multipass_and_init_image_by_the_command_line():
    """Two passes are a small picture and one from it; the record says what each pass ran."""
    line = [*TINY[:2], "--base_resolution", "32", "--steps", "4"]
    assert (
        run(*line, "--size", "192x128", "--dype_multipass", "twopass", "--output", "two.png") == 0
    )
    assert run(*line, "--size", "96x64", "--output", "small.png") == 0
    from_small = ["--init_image", "small.png", "--strength", "0.5"]
    assert run(*line, "--size", "192x128", *from_small, "--output", "one.png") == 0
    two, one = (np.asarray(Image.open(name)) for name in ("two.png", "one.png"))
    assert (two == one).all()
    passes = records.load("two.png")["passes"]
    assert [(p["height"], p["width"], len(p["sigmas"])) for p in passes] == [
        (64, 96, 5),
        (128, 192, 3),
    ]
    assert records.load("one.png")["passes"][0]["sigmas"] == passes[1]["sigmas"]
    assert run("--from", "two.png", "--output", "again.png") == 0
    assert (np.asarray(Image.open("again.png")) == two).all()
    weaker = ["--strength", "0.25", "--output", "weaker.png"]
    assert run("--from", "one.png", *weaker) == 0
    assert len(records.load("weaker.png")["passes"][0]["sigmas"]) == 2
    assert run("--from", "one.png", "--output", "again2.png") == 0
    assert (np.asarray(Image.open("again2.png")) == two).all()


def test_generation_and_sweeping_know_no_argparse():
    root = Path(run_dype.__file__).parent / "dype"
    for name in (
        "generate",
        "latents",
        "cells",
        "ablation",
        "sweeps",
        "records",
        "sheets",
        "memory",
    ):
        assert "argparse" not in (root / f"{name}.py").read_text()
