"""The page of a sweep or of any images: what is in it, and what is refused."""

import json
import os
import re
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import pytest
from conftest import TINY_DEMO, run
from PIL import Image
from test_contact_sheet import make_rows

from dype.sampling import records
from dype.sweep import results, viewer

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def read_data(path="out/index.html") -> dict:
    """Return the data of a page as a browser parses it."""
    text = Path(path).read_text("utf-8")
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(data)


def write_images(*names: str, size=(64, 32)) -> None:
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (40 * number, 90, 120)).save(name)


def test_page_of_a_sweep(capsys):
    """Every sweep has a page, with its settings, seconds, memory and metrics."""
    sweep = [*TINY_DEMO, "--method", "dy_yarn,base", "--seed", "0-1", "--size", "64x96"]
    assert run(*sweep, "--output_dir", "out", "--prompt", "a <b>sun</b></script>") == 0
    assert "out/index.html" in capsys.readouterr().out
    data = read_data()
    assert data["title"] == "out"
    assert data["prompt"] == "a <b>sun</b></script>"
    assert [setting for setting in data["settings"] if setting["isAxis"]] == [
        {"name": "method", "format": "{}", "isAxis": True},
        {"name": "seed", "format": "seed {}", "isAxis": True},
    ]
    assert data["columns"] == "seed"
    values = [image["values"] for image in data["images"]]
    expected = [(method, seed) for method in ("dy_yarn", "base") for seed in "01"]
    assert [(value["method"], value["seed"]) for value in values] == expected
    assert [value.get("dype_exponent") for value in values] == ["2", "2", None, None]
    assert "dype_exponent" not in data["common"]  # because base has none
    assert [score["title"] for score in data["scores"]] == ["seconds", "peak GiB"]
    for image in data["images"]:
        assert image["error"] == ""
        assert (image["width"], image["height"]) == (64, 96)
        assert records.read_size(Path("out", unquote(image["file"]))) == (64, 96)
        with Image.open(Path("out", unquote(image["thumb"]))) as thumbnail:
            assert thumbnail.format == "JPEG"

    [row, *_] = results.read_table(Path("out/results.csv"), [])
    value = {"file": row["file"], "metric": "lite0", "value": "1.25", "protocol": "p"}
    results.write_table(Path("out/metrics.csv"), results.METRIC_COLUMNS, [value])
    Path("out/index.html").unlink()
    assert run("--grid_from", "out") == 0
    data = read_data()
    assert data["scores"][-1] == {"name": "lite0", "title": "lite0", "digits": 3}
    assert ["lite0" in image["scores"] for image in data["images"]] == [True] + 3 * [False]
    assert data["images"][0]["scores"]["lite0"] == 1.25


def test_settings_and_errors_of_rows():
    rows = make_rows(
        {"color": "s", "method": "yarn"},
        {"color": "a", "dype_scale": "1"},
        {"color": "b", "dype_scale": "2", "error": "out of memory"},
        {"color": "c", "dype_scale": "3"},
    )
    Path("out/c.png").unlink()
    viewer.write_sweep_page(rows, Path("out"))
    data = read_data()
    errors = [image["error"] for image in data["images"]]
    assert errors == ["", "", "out of memory", "c.png is missing"]
    assert [image["values"].get("dype_scale") for image in data["images"]] == [None, *"123"]
    assert data["images"][2]["scores"] == {}
    assert sorted(os.listdir("out/thumbs")) == ["a.jpg", "s.jpg"]


def test_thumbnails_follow_their_images():
    """A thumbnail is written again if its image changes, and only then."""
    rows = make_rows({"color": "a"}, {"color": "b"})
    viewer.write_sweep_page(rows, Path("out"))
    before = {path: path.stat().st_ino for path in Path("out/thumbs").iterdir()}
    image, thumbnail = Path("out/a.png"), Path("out/thumbs/a.jpg")
    Image.new("RGB", (2000, 1000), (0, 0, 250)).save(image)
    viewer.write_sweep_page(rows, Path("out"))
    changed = [path for path in before if path.stat().st_ino != before[path]]
    assert changed == [thumbnail]
    with Image.open(thumbnail) as small:
        assert small.size == (viewer.THUMBNAIL_SIDE, viewer.THUMBNAIL_SIDE // 2)
        assert small.getpixel((9, 9))[2] > 200


def test_any_images(capsys):
    """Images without a record have their folder and their name as settings."""
    write_images("runs/#1 a&b/0.png", "runs/#1 a&b/1.png", "runs/\u57ce/0.png", "runs/plain/0.webp")
    paths = ["runs/#1 a&b/0.png", "runs/#1 a&b/1.png", "runs/\u57ce/0.png", "runs/plain/0.webp"]
    assert viewer.main([*paths, "--out", "pages/x.html"]) == 0
    assert capsys.readouterr().out == "pages/x.html\n"
    data = read_data("pages/x.html")
    assert data["title"] == "x"
    names = [(image["values"]["folder"], image["values"]["name"]) for image in data["images"]]
    assert names == [("#1 a&b", "0"), ("#1 a&b", "1"), ("\u57ce", "0"), ("plain", "0")]
    assert (data["columns"], data["rows"]) == ("name", "")
    for image, path in zip(data["images"], paths, strict=True):
        assert "#" not in image["file"]
        assert os.path.samefile(Path("pages", unquote(image["file"])), path)
        assert Path("pages", unquote(image["thumb"])).exists()
    assert len({image["id"] for image in data["images"]}) == 4

    assert viewer.main(["runs"]) == 0  # a folder without a sweep
    assert len(read_data("runs/index.html")["images"]) == 4
    assert viewer.main(["runs"]) == 0  # thumbnails are no images of it
    assert len(read_data("runs/index.html")["images"]) == 4


def test_images_with_records():
    """An image of this program has the settings of its record, a copy its folder too."""
    for method, switch in (("dy_yarn", "on"), ("yarn", "off")):
        line = [*TINY_DEMO, "--size", "64", "--method", "yarn", "--dype", switch, "--seed", "0"]
        assert run(*line, "--output", f"{method}.png") == 0
    Path("copies").mkdir()
    for path in (Path("yarn.png"), Path("yarn.json")):
        Path("copies", path.name).write_bytes(path.read_bytes())
    assert viewer.main(["dy_yarn.png", "yarn.png", "copies/yarn.png", "--out", "page.html"]) == 0
    data = read_data("page.html")
    assert {"folder", "method"} <= {setting["name"] for setting in data["settings"]}
    values = [(image["values"]["folder"], image["values"]["method"]) for image in data["images"]]
    assert values == [(".", "dy_yarn"), (".", "yarn"), ("copies", "yarn")]
    assert data["common"]["seed"] == "0"
    assert all("seconds" in image["scores"] for image in data["images"])

    record = json.loads(Path("yarn.json").read_text())
    del record["flags"]["lora"]  # as in an earlier version
    Path("old.json").write_text(json.dumps(record))
    write_images("old.png")
    assert viewer.main(["old.png", "dy_yarn.png", "--out", "page.html"]) == 0
    methods = [image["values"]["method"] for image in read_data("page.html")["images"]]
    assert methods == ["yarn", "dy_yarn"]


def test_what_is_the_same_in_all():
    """A setting that some images lack is not the same in all; such images have their names."""
    line = [*TINY_DEMO, "--size", "64", "--seed", "0", "--prompt", "a sun"]
    assert run(*line, "--output", "plain.png") == 0
    assert run(*line, "--attention_scale", "0.5", "--output", "scaled.png") == 0
    assert viewer.main(["plain.png", "scaled.png", "--out", "page.html"]) == 0
    data = read_data("page.html")
    assert "attention_scale" not in data["common"]
    assert data["common"]["seed"] == "0"
    values = [image["values"]["attention_scale"] for image in data["images"]]
    assert values == ["own", "0.5"]
    write_images("photo.jpg")
    assert viewer.main(["plain.png", "photo.jpg", "--out", "page.html"]) == 0
    data = read_data("page.html")
    assert (data["common"], data["prompt"]) == ({}, "")
    assert [image["values"]["name"] for image in data["images"]] == ["plain", "photo"]


def test_odd_names():
    """Marks of the template, bytes that are no text, and two paths of one image."""
    write_images("@DATA@/a.png", "@DATA@/x\udcff.png")
    os.symlink("a.png", "@DATA@/link.png")
    assert viewer.main(["@DATA@/a.png", "@DATA@/link.png", "@DATA@", "--out", "@DATA@.html"]) == 0
    data = read_data("@DATA@.html")
    assert data["title"] == "@DATA@"
    assert len(data["images"]) == 2
    for image in data["images"]:
        assert Path(os.fsdecode(unquote_to_bytes(image["file"]))).exists()
        assert Path(os.fsdecode(unquote_to_bytes(image["thumb"]))).exists()


def test_sizes_of_images():
    """The sizes are those that a viewer shows, and width comes first."""
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (64, 32)).save("side.jpg", exif=exif)
    write_images("wide.png")
    assert [records.read_size(Path(name)) for name in ("side.jpg", "wide.png")] == [
        (32, 64),
        (64, 32),
    ]
    assert viewer.main(["side.jpg", "wide.png", "--out", "page.html"]) == 0
    sizes = [image["values"]["size"] for image in read_data("page.html")["images"]]
    assert sizes == ["32x64", "64x32"]


def test_broken_images(capsys):
    write_images("good.png")
    Path("broken.png").write_bytes(Path("good.png").read_bytes()[:60])
    Path("text.png").write_text("no image")
    assert viewer.main(["good.png", "broken.png", "text.png", "--out", "page.html"]) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("not shown: broken.png cannot be read: ")
    assert second.startswith("not shown: text.png cannot be read: ")
    errors = [image["error"] for image in read_data("page.html")["images"]]
    assert errors[0] == ""
    assert errors[2] == "text.png cannot be read: it is no image of a format that Pillow reads"
    assert viewer.main(["text.png", "--out", "page.html"]) == 0  # a page of broken ones alone


def test_a_folder_that_cannot_be_written(capsys):
    write_images("a.png")
    assert viewer.main(["a.png", "--out", "/proc/x.html"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dype.sweep.viewer: cannot write /proc/thumbs/a-")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["missing.png"], "'missing.png' is no file, expected an image or a folder of images"),
        ([""], "'' is no file, expected an image or a folder of images"),
        (["pipe.png"], "'pipe.png' is no file, expected an image or a folder of images"),
        (["n" * 300], f"{'n' * 300!r} is no file, expected an image or a folder of images"),
        (
            ["a.png", "--out", "blocked/x.html"],
            "blocked/thumbs is in the way of the folder of thumbnails; move it away",
        ),
        (["empty"], "empty has no images, expected some"),
        (["a.png", "--out", "page.txt"], "--out is page.txt, expected a name in .html"),
        (["a.png", "--out", "mine.html"], "mine.html is no page of this program; move it away"),
        (["a.png", "--out", "empty.html"], "empty.html is no page of this program; move it away"),
        ([], "the following arguments are required: IMAGE"),
    ],
)
def test_mistakes(words, sentence, capsys):
    write_images("a.png")
    Path("empty").mkdir()
    Path("empty.html").mkdir()
    Path("blocked").mkdir()
    Path("blocked/thumbs").touch()
    os.mkfifo("pipe.png")
    Path("mine.html").write_text("<html>my own page</html>")
    assert viewer.main(words) == 2
    assert capsys.readouterr().err == f"dype.sweep.viewer: {sentence}\n"
    assert Path("mine.html").read_text() == "<html>my own page</html>"
