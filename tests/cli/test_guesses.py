"""What people guess: flags of other programs, spellings of names, seeds, endings of files."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import TINY_DEMO, run
from PIL import ExifTags, Image

import dype
from dype.cli import flags
from dype.cli.guesses import GUESSES
from dype.cli.settings import resolve
from dype.sampling import records
from dype.sampling.settings import image_settings

TINY = [*TINY_DEMO, "--size", "64"]


@pytest.fixture(autouse=True)
def empty_folder(in_tmp_path):
    pass


def settings(*words):
    """Return the settings of the images of a command line."""
    return resolve(vars(flags.parse([*words])))[1]


ANSWERS = {  # words -> end of the sentence
    "--prompt-file a.txt": "there is no --prompt-file, expected --prompts_file",
    "--negative x": "there is no --negative, expected --negative_prompt",
    "--out x": "there is no --out, expected --output or --output_dir",
    "--stepss=3": "there is no --stepss, expected --steps",
    "--CFG 3": "there is no --CFG, expected --guidance or --true_cfg",
    "-n 4": "there is no -n, expected --num_images",
    "--zzz 4": "there is no --zzz, expected a flag that --help lists, or FLAG=VALUE for a value "
    "that begins with a hyphen",
    "--ntk_factor 3": "there is no --ntk_factor: it is a field of DyPEConfig, for Python alone",
    "a red fox": "'a red fox' has no flag, expected --prompt \"a red fox\"",
    "--steps 3 a": 'unrecognized arguments: a; a prompt needs --prompt "a", a value of several '
    "words needs quotes, a value that begins with a hyphen needs FLAG=VALUE",
    "--model demo a red sun": "unrecognized arguments: a red sun; a prompt needs --prompt "
    '"a red sun", a value of several words needs quotes, a value that begins with a hyphen needs '
    "FLAG=VALUE",
    "--prompt x --steps 3 a": "unrecognized arguments: a; a value of several words needs quotes, "
    "a value that begins with a hyphen needs FLAG=VALUE",
    "--fp8": "there is no --fp8, expected --quantize fp8",
    "--cuda": "there is no --cuda, expected --device cuda",
    "-s 3": "there is no -s, expected --seed or --steps",
    "--quiet": "there is no --quiet, expected output to a file, which has no bar",
    "--list-models": "there is no --list-models, expected --help with the models, or --model NAME",
    "--device gpu": "--device is 'gpu', expected cpu, cuda, cuda:1, mps, ...",
    "--seed 0..3": "--seed is '0..3', expected 0-3 for a range",
    "--model flux-crea": "--model is 'flux-crea', expected flux-krea, flux-dev, flux2-dev, another "
    "name that --help lists, a diffusers folder or a hub id",
}


@pytest.mark.parametrize("words", ANSWERS)
def test_an_unknown_flag_gets_the_nearest(words, capsys):
    assert run(*words.split()) == 2
    assert capsys.readouterr().err == f"run_dype.py: {ANSWERS[words]}\n"


def test_a_prompt_without_a_flag(capsys):
    assert run("--steps", "3", "a red fox") == 2
    assert 'expected --prompt "a red fox"\n' in capsys.readouterr().err


def test_every_guess_names_flags_that_exist():
    names = {"--" + name for name in flags.FLAG_NAMES} | {"--version", "--help"}
    for word, guess in GUESSES.items():
        assert word not in flags.FLAG_NAMES, word
        assert {part for part in guess.split() if part.startswith("--")} <= names, guess


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("prompt-file = 'a'", "there is no prompt-file, expected prompts_file"),
        ("xyzzy = 1", "there is no xyzzy, expected a flag that --help lists"),
        ("ntk_factor = 4", "there is no ntk_factor: it is a field of DyPEConfig, for Python alone"),
    ],
)
def test_keys_of_toml_are_guessed_too(line, sentence, capsys):
    Path("a.toml").write_text(f"[default]\n{line}\n")
    assert run("--config", "a.toml") == 2
    assert capsys.readouterr().err == f"run_dype.py: --config a.toml [default]: {sentence}\n"


def test_names_of_diffusers():
    """As flags, and as keys of a TOML file."""
    values = {"num_inference_steps": 7, "guidance_scale": 2.5, "num_images_per_prompt": 2}
    values |= {"max_sequence_length": 99}
    words = [f"--{name}={value}" for name, value in values.items()]
    Path("a.toml").write_text("\n".join(["[default]", *(word[2:] for word in words)]))
    for runs in (settings(*words), settings("--config", "a.toml")):
        assert [run.seed for run in runs] == [42, 43]
        assert (runs[0].steps, runs[0].guidance, runs[0].max_sequence_length) == (7, 2.5, 99)
    [image] = settings("--true_cfg_scale", "3", "--negative_prompt", "x")
    assert image.true_cfg == 3


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--dtype bf16", "dtype", "bfloat16"),
        ("--dtype FP16", "dtype", "float16"),
        ("--dtype half", "dtype", "float16"),
        ("--torch-dtype torch.float32", "dtype", "float32"),
        ("--device CUDA:1", "device", "cuda:1"),
        ("--multipass Two-Pass", "multipass", "twopass"),
        ("--model FLUX-Krea", "model", "flux-krea"),
        ("--model flux_dev", "model", "flux-dev"),
        ("--model FLUX.1-Krea-dev", "model", "flux-krea"),
        ("--model Qwen-Image", "model", "qwen-image"),
    ],
)
def test_spellings_of_names(words, name, value):
    [image] = settings(*words.split())
    assert getattr(image, name) == value


@pytest.mark.parametrize(
    ("words", "value"), [("on", True), ("True", True), ("yes", True), ("no", False), ("false", 0)]
)
def test_spellings_of_on_and_off(words, value):
    assert settings("--dype", words)[0].config.dype == value
    assert settings("--anisotropic", words)[0].config.anisotropic == value


def test_spellings_of_methods():
    assert [run.config.name for run in settings("--method", "YaRN,vision-yarn")] == [
        "dy_yarn",
        "dy_vision_yarn",
    ]
    assert [run.config.name for run in settings("--method", "DY-YaRN,NTK")] == ["dy_yarn", "ntk"]


def test_a_folder_wins_over_a_spelling(capsys):
    Path("FLUX-dev").mkdir()
    assert run("--model", "FLUX-dev") == 2
    assert "an empty folder" in capsys.readouterr().err


def test_num_images_are_consecutive_seeds():
    expected = settings("--seed", "5-7", "--method", "base,yarn")
    assert settings("--seed", "5", "--num_images", "3", "--method", "base,yarn") == expected
    assert [run.seed for run in settings("--num_images", "2")] == [42, 43]
    assert len(settings("--num_images", "1")) == 1
    for words, sentence in (
        ("--num_images 2 --seed 1,2", "--num_images is 2, but --seed has several values"),
        ("--num_images 0", "--num_images is 0, expected a whole number at least 1"),
        (f"--num_images 2 --seed {2**63 - 1}", f"--seed is {2**63}, expected"),
    ):
        with pytest.raises(ValueError, match=sentence):
            settings(*words.split())


def test_a_random_seed_is_printed_and_recorded(capsys, monkeypatch):
    seeds = [settings("--seed", "random")[0].seed for _ in range(3)]
    assert len({*seeds}) == 3
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"--seed random: {seed}" for seed in seeds]
    first, second = (run.seed for run in settings("--seed", "random", "--num_images", "2"))
    assert second == first + 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each of the 2 processes would take another"):
        settings("--seed", "random")


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        run("--version")
    assert end.value.code == 0
    words = f"DyPE {dype.__version__}, torch {version('torch')}, diffusers {version('diffusers')}, "
    assert capsys.readouterr().out.startswith(words)


@pytest.mark.parametrize("ending", [".jpg", ".JPEG", ".webp"])
def test_formats_keep_the_record(ending, capsys):
    """It is in the file and beside it, and --from reads the file alone."""
    path = Path("a" + ending)
    assert run(*TINY, "--prompt", "a caf\u00e9", "--output", path) == 0
    record = json.loads(path.with_suffix(".json").read_text("utf-8"))
    path.with_suffix(".json").unlink()
    with Image.open(path) as image:
        assert (image.format, image.size) == ("WEBP" if ending == ".webp" else "JPEG", (64, 64))
        description = image.getexif()[ExifTags.Base.ImageDescription]
        assert description.encode("latin-1").decode() == "a caf\u00e9"
    assert records.read_record(path) == record
    [again] = settings("--from", str(path))
    assert again.identity == image_settings(record)
    assert run(*TINY, "--output", path, "--overwrite", "--no_metadata") == 0
    with Image.open(path) as image:
        assert not image.getexif()
    assert not path.with_suffix(".json").exists()


def test_webp_has_the_pixels_of_a_png():
    noise = Image.effect_noise((48, 32), 80).convert("RGB")
    path = records.save_image(noise, {"prompt": ""}, Path("a.webp"))
    with Image.open(path) as image:
        assert image.convert("RGB").tobytes() == noise.tobytes()


def test_a_record_beyond_the_limit_of_exif_is_beside_the_image():
    record = {"prompt": "x" * 100_000}
    path = records.save_image(Image.new("RGB", (8, 8)), record, Path("a.jpg"))
    assert records.find_record(path) == (record, Path("a.json"))


@pytest.mark.parametrize("data", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM", b"x", b""])
def test_broken_exif_is_no_record(data):
    Image.new("RGB", (8, 8)).save("a.jpg", exif=data)
    with pytest.raises(ValueError, match="it carries no settings"):
        records.read_record("a.jpg")


def test_comments_of_other_programs_are_no_record(capsys):
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: b"UNICODE\0a\0sun"}
    Image.new("RGB", (8, 8)).save("a.jpg", exif=exif)
    assert run("--from", "a.jpg") == 2
    assert "it carries no settings of this program" in capsys.readouterr().err


def test_formats_that_cannot_be_written(capsys):
    for words, sentence in (
        ("--output a.webp --size 16384x64", "WebP has at most 16383 px a side, and the image"),
        ("--output a.gif", "expected a name in .png, .jpg, .jpeg, .webp"),
    ):
        assert run("--model", "demo", *words.split()) == 2
        assert sentence in capsys.readouterr().err
