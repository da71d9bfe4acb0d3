"""An image is saved with its record under any name, or else in the temporary folder."""

import errno
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import TINY_DEMO, run, table
from PIL import Image

from dype.sampling import multipass, records
from dype.sampling import run as sampling_run
from dype.sweep import results

SMALL = [*TINY_DEMO, "--size", "64"]
FOLDER = Path("out")


@pytest.fixture(autouse=True)
def temporary_folder(in_tmp_path, monkeypatch):
    """Make `temporary` the folder for temporary files."""
    os.mkdir("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(Path("temporary").absolute()))


def list_names(folder="temporary") -> list[str]:
    return sorted(os.listdir(folder))


@contextmanager
def failing_writes(pattern: str, number=errno.ENOSPC):
    """Let every write of a file fail whose path matches a pattern; the file is left empty."""
    open_path = Path.open

    def refuse(path, mode="r", *args, **kwargs):
        file = open_path(path, mode, *args, **kwargs)
        if mode == "wb" and re.search(pattern, str(path)):
            file.close()
            raise OSError(number, os.strerror(number), str(path))
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        yield


@pytest.fixture
def after_the_image(monkeypatch):
    """Return a function that sets what happens between the last step and saving."""
    run_passes = multipass.run_passes

    def set_event(event):
        def run_then_event(*args, **kwargs):
            image = run_passes(*args, **kwargs)
            event()
            return image

        monkeypatch.setattr(multipass, "run_passes", run_then_event)

    return set_event


@pytest.mark.parametrize("name", ["a" * 250, "城" * 80, "城" * 83, "a"])
def test_every_name_that_the_file_system_takes(name):
    """The temporary name is short, so that the longest name can be written."""
    path = Path("new", f"{name}.png")
    assert run(*SMALL, "--output", path) == 0
    assert list_names("new") == sorted([path.name, path.with_suffix(".json").name])
    assert records.read_record(path) == json.loads(path.with_suffix(".json").read_text("utf-8"))


def test_temporary_names_are_short_and_apart():
    names = [f"{'a' * 200}{n}.{suffix}" for n in range(2) for suffix in ("png", "json")]
    temporary = {records.temporary_path(Path(name)).name for name in names}
    assert len(temporary) == 4
    assert max(map(len, temporary)) < 40
    assert records.temporary_path(Path("a.png")).name == f".a.png.{os.getpid()}.part"


def test_an_image_with_another_ending_keeps_its_record(capsys):
    """Both would have the same JSON, so no flag lets one take that of the other."""
    image = Image.new("RGB", (8, 8))
    records.save_image(image, {"prompt": "x"}, Path("a.png"))
    for words in ("", "--overwrite", "--no_metadata", "--no_metadata --overwrite"):
        assert run(*SMALL, "--output", "a.jpg", *words.split(), "--dry_run") == 2
        sentence = "a.png exists, whose record would have the name of that of a.jpg, expected anoth"
        assert sentence in capsys.readouterr().err
    records.save_image(image, None, Path("a.jpg"))
    assert json.loads(Path("a.json").read_text()) == {"prompt": "x"}
    records.save_image(image, None, Path("b.JPG"))
    assert records.next_free_path(Path("b.png")) == Path("b_2.png")
    assert run(*SMALL, "--output", "a.png", "--overwrite", "--dry_run") == 2  # a.jpg is there now


EVENTS = {
    "the folder is removed": lambda: shutil.rmtree(FOLDER),
    "the folder is a file": lambda: (shutil.rmtree(FOLDER), FOLDER.write_text("")),
    "the name is a folder": lambda: (FOLDER / "a.png").mkdir(),
}


@pytest.mark.parametrize("name", EVENTS)
def test_an_image_that_cannot_be_saved_is_in_the_temporary_folder(name, after_the_image, capsys):
    after_the_image(EVENTS[name])
    assert run(*SMALL, "--output", FOLDER / "a.png", "--overwrite") == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("run_dype.py: cannot write out/a.")
    assert err.endswith(f"the image is in {Path('temporary/a.png').absolute()}")
    assert list_names() == ["a.json", "a.png"]
    assert not Path(FOLDER, "a.json").exists()
    assert records.read_record("temporary/a.png")["flags"]["model"] == "demo"
    assert records.open_image("temporary/a.png").size == (64, 64)


@pytest.mark.parametrize("pattern", [r"out/\.a\.json", r"out/\.a\.png"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_full_disk(pattern, number):
    """Neither file is left in the folder, and a file of the temporary folder is not replaced."""
    FOLDER.mkdir()
    Path("temporary/a.png").write_text("mine")
    with (
        failing_writes(pattern, number),
        pytest.raises(OSError, match=r"the image is in .*temporary/a_2\.png$") as raised,
    ):
        records.save_image(Image.new("RGB", (8, 8)), {"prompt": "x"}, FOLDER / "a.png")
    assert os.strerror(number) in str(raised.value)
    assert list_names(FOLDER) == []
    assert list_names() == ["a.png", "a_2.json", "a_2.png"]
    assert records.read_record("temporary/a_2.png") == {"prompt": "x"}


def test_a_disk_that_is_gone(monkeypatch):
    """Even the question whether a file exists fails."""
    exists = Path.exists

    def refuse(path, **options):
        if path.parent == FOLDER:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", refuse)
    for overwrite in (False, True):
        with pytest.raises(OSError, match=r"cannot write out/a.*; the image is in"):
            records.save_image(Image.new("RGB", (8, 8)), {}, FOLDER / "a.png", overwrite)
    assert list_names() == ["a.json", "a.png", "a_2.json", "a_2.png"]


@pytest.mark.parametrize("reason", ["full", "missing"])
def test_a_temporary_folder_that_fails_too(reason):
    """The sentence says that the image is lost, and nothing is half-written."""
    FOLDER.mkdir()
    if reason == "missing":
        os.rmdir("temporary")
    sentence = (
        r"cannot write out/a.png: No space.*; the image is lost, because cannot write .*temporary"
    )
    with failing_writes(r"\.a\.png"), pytest.raises(OSError, match=sentence):
        records.save_image(Image.new("RGB", (8, 8)), {}, FOLDER / "a.png")
    assert list_names(FOLDER) == []
    assert reason == "missing" or list_names() == []


def test_a_long_name_in_the_temporary_folder():
    FOLDER.write_text("a file")
    with pytest.raises(OSError, match=r"the image is in .*/temporary/[0-9a-f]{12}\.png$"):
        records.save_image(Image.new("RGB", (8, 8)), {}, FOLDER / f"{'城' * 80}.png")


def test_a_sweep_whose_disk_is_full(capsys):
    """It ends; the row of the image says where it is, and the same command generates it again."""
    line = [*SMALL, "--seed", "0-1", "--output_dir", FOLDER]
    with failing_writes(r"out/.*\.png\."):
        assert run(*line) == 1
    _, name = list_names()
    sentence = f"the image is in {Path('temporary', name).absolute()}"
    assert sentence in capsys.readouterr().err
    [row] = table(FOLDER)
    assert row["file"] == name
    assert row["error"].endswith(sentence)
    assert list_names(FOLDER) == ["results.csv"]
    assert run(*line) == 0
    assert [row["error"] for row in table(FOLDER)] == ["", ""]


def test_a_sweep_whose_folder_is_removed(after_the_image, capsys):
    after_the_image(lambda: shutil.rmtree(FOLDER))
    assert run(*SMALL, "--seed", "0-1", "--output_dir", FOLDER) == 1
    assert "the image is in" in capsys.readouterr().err
    assert [Path(name).suffix for name in list_names()] == [".json", ".png"]


def test_a_working_folder_of_other_bytes(capsys):
    """Its name is part of the record where a relative path is; elsewhere it does not matter."""
    os.mkdir(b"caf\xe9")
    os.chdir(b"caf\xe9")
    Image.new("RGB", (64, 64)).save("a.png")
    Path("a.safetensors").write_text("")
    for flags in ("--init_image a.png", "--lora a.safetensors"):
        assert run(*SMALL, *flags.split()) == 2
        assert "caf\\udce9" in capsys.readouterr().err
    assert list_names(".") == ["a.png", "a.safetensors"]
    assert run(*SMALL, "--output", "b.png") == 0


def test_a_folder_of_short_names(monkeypatch, capsys):
    """Some file systems take 143 bytes, here 60: a run says so before it loads a model."""
    lstat = os.lstat

    def refuse(path):
        if len(os.fsencode(Path(path).name)) > 60:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
        return lstat(path)

    monkeypatch.setattr(os, "lstat", refuse)
    monkeypatch.setattr(sampling_run, "load_pipeline", None)  # a call would be a TypeError
    for seeds in ("0", "0-1"):
        line = ["--seed", seeds, "--output_dir", FOLDER]
        assert run(*SMALL, *line) == 1
        err = capsys.readouterr().err
        assert err == "run_dype.py: cannot write to out: File name too long; try --output_dir\n"


def test_other_bytes_in_a_record_do_not_lose_the_image():
    """JSON has escapes for them."""
    record = {"device": "caf\udce9"}
    assert records.save_image(Image.new("RGB", (8, 8)), record, Path("a.png")) == Path("a.png")
    assert records.read_record("a.png") == json.loads(Path("a.json").read_text()) == record


def test_an_error_with_other_bytes_is_a_row(monkeypatch):
    """results.csv keeps the bytes as escapes."""

    def fail(*args, **kwargs):
        raise ValueError("caf\udce9 is missing")

    monkeypatch.setattr(multipass, "run_passes", fail)
    assert run(*SMALL, "--seed", "0-1", "--output_dir", FOLDER) == 1
    assert {row["error"] for row in table(FOLDER)} == {"ValueError: caf\\udce9 is missing"}


def test_a_prompt_beyond_the_limit_of_the_csv_module():
    """The table can be read again, so that the sweep can be resumed."""
    assert run(*SMALL, "--seed", "0-1", "--output_dir", FOLDER) == 0
    rows = [row | {"prompt": "a sun " * 20000} for row in table(FOLDER)]
    results.write_table(FOLDER / results.RESULTS, list(rows[0]), rows)
    assert [row["prompt"] for row in results.read_rows(FOLDER)] == ["a sun " * 20000] * 2
