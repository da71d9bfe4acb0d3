"""A flag without effect is said, and so are words that the demo does not know."""

from pathlib import Path

import pytest
from conftest import run

from dype.cli import flags
from dype.cli.settings import resolve
from dype.sampling.settings import FLAGS

PROMPT = ["--prompt", "a red sun over blue mountains"]


@pytest.fixture(autouse=True)
def empty_folder(in_tmp_path):
    pass


def notes_of(capsys, *words):
    """Return what is printed when a command line is resolved."""
    resolve(vars(flags.parse([*PROMPT, *words])))
    return capsys.readouterr().out.splitlines()


KAPPA = "without DyPE, nor with the methods base, tasr, cutoff"
NOTES = {  # words -> the note
    "--no_dype --dype_scale 3": f"--dype_scale has no effect {KAPPA}",
    "--method sega --dype_exponent 1": f"--dype_exponent has no effect {KAPPA}",
    "--no_dype --dype_scale 3 --dype_exponent 1": "--dype_scale, --dype_exponent have no effect "
    f"{KAPPA}",
    "--sega_alpha 0.3": "--sega_alpha has no effect without SEGA's m, by --method sega or "
    "--attention_path sega",
    "--alpha 2": "--alpha has no effect without --method yarn_paper or tide",
    "--rdfc_pairs 8": "--rdfc_pairs has no effect without --method rdfc or riflex",
    "--method base --attention_path sega": "--attention_path has no effect without another "
    "--method, or DyPE for falling and rising",
    "--method base --attention_scale 0.2": "--attention_scale has no effect without another "
    "--method than base",
    "--method base --dype": "--dype has no effect without another --method than base",
    "--method dy_yarn,ntk --size 1024": "--method has no effect up to the base resolution, 1024 px",
    "--text_repeat 4 --size 1024": "--text_repeat has no effect up to the base resolution, 1024 px",
    "--method ntk --isotropic --size 1024x512": "--method, --isotropic have no effect up to the "
    "base resolution, 1024 px",
    "--anisotropic off --size 1024": "--anisotropic has no effect up to the base resolution, 1024 "
    "px",
    "--no_dype --size 1024": "--no_dype has no effect up to the base resolution, 1024 px",
    "--size 1024,768": "--size 1024,768 is two square images; 1024x768 is one image",
    "--tiled_vae off --tile_size 512": "--tile_size has no effect without tiles",
}


@pytest.mark.parametrize("words", NOTES)
def test_a_flag_without_effect_is_said(words, capsys):
    assert notes_of(capsys, *words.split()) == [NOTES[words]]


@pytest.mark.parametrize(
    "words",
    [
        "--method base,yarn --dype_scale 3",  # it has one on an image of the sweep
        "--text_repeat 4 --size 1024,2048,4096",
        "--size 2048x1024,1024",
        "--size 2048,2048",
        "--method base --no_dype",  # the static form is what there is
        "--method tide --attention_path tide",  # the rule is the method's own
        "--no_dype --dype_exponent 2",  # the default
        "--method sega --sega_alpha 0.3",
        "--attention_path sega --sega_alpha 0.3",
        "--base_resolution 512 --size 1024 --method ntk",
        "--tile_size 512",
        "--method base",
    ],
)
def test_a_flag_with_an_effect_is_not(words, capsys):
    assert notes_of(capsys, *words.split()) == []


def test_every_condition_is_put_in_words():
    default = next(row for row in FLAGS if row.name == "seed").has_effect
    for row in FLAGS:
        is_checked_as_error = row.name in ("pass2_strength", "pass3_strength")
        assert bool(row.needs) == (row.has_effect.__code__ is not default.__code__
                                   and not is_checked_as_error), row.name  # fmt: skip


def test_only_explicit_flags_count(capsys):
    """A preset or a record sets values that nobody asked about; a profile counts as flags do."""
    assert notes_of(capsys, "--preset", "auto", "--size", "1024")[1:] == []
    Path("a.toml").write_text("[default]\ndype_scale = 3\ndype = false\n")
    [note] = notes_of(capsys, "--config", "a.toml")
    assert note.startswith("--dype_scale has no effect")


def test_the_demo_names_the_words_that_it_does_not_know(capsys):
    assert notes_of(capsys, "--model", "demo") == []
    [note] = notes_of(capsys, "--model", "demo", "--prompt", "A castle, under the red SUN!")
    assert note.startswith("the demo does not know castle, the; it knows bare, birds, blue,")
    assert note.endswith("; see dype/demo/README.md")
    [note] = notes_of(capsys, "--model", "demo", "--prompt", " ".join(f"w{n}" for n in range(20)))
    assert "w7 and 12 more; it knows" in note
    assert notes_of(capsys, "--model", "flux-dev", "--prompt", "a castle") == []


ERRORS = {  # words -> begin of the sentence
    "--attention_path falling": "--attention_path is 'falling', expected an --attention_scale with",
    "--rdfc_pairs x": "--rdfc_pairs is 'x', expected numbers as 8 or 8,9",
    "--rdfc_pairs 28 --method rdfc": "--rdfc_pairs is '28', expected numbers from 0 to 27",
    "--rdfc_pairs 16 --method rdfc --model flux2-dev": "--rdfc_pairs is '16', expected numbers fro",
    "--text_repeat 2 --model z-image": "--text_repeat is 2, but this model adds to its text",
    "--shift log --model flux-schnell": "--shift is log, but this model's schedule is static",
    "--base_shift 1": "--base_shift is 1.0, but mu does not depend on it; expected shift model",
    "--size 1000x512": "--size is '1000x512', whose width is 1000, expected a multiple of 16",
    "--size 1000": "--size is 1000, expected a multiple of 16",
    "--size 512x1000": "--size is '512x1000', whose height is 1000, expected a multiple of 16",
    "--model ./no/folder": "--model is './no/folder', but there is no such folder",
    "--model here/typo": "--model is 'here/typo', but there is no such folder, expected one",
    "--model owner/a--b": "--model is 'owner/a--b', but there is no such folder",
    "--model owner/name": "--model is 'owner/name', no folder here, and the hub cannot be reached",
    "--model demo --lora owner/name": "--lora is 'owner/name', no file or folder here, and the hub "
    "cannot be reached",
    "--model demo --lora owner/name/a.safetensors:2": "--lora is 'owner/name/a.safetensors', no fi",
    "--lora owner/a..b": "--lora is 'owner/a..b', but there is no such file or folder",
}


@pytest.mark.parametrize("words", ERRORS)
def test_true_errors(words, capsys):
    """Flags are named as flags, what is no folder is not called a model, all in one sentence."""
    Path("here").mkdir()
    assert run(*PROMPT, *words.split()) == 1 + ("owner/name" not in words)
    assert capsys.readouterr().err.startswith(f"run_dype.py: {ERRORS[words]}")


def test_every_pair_of_a_family_can_be_named(capsys):
    assert notes_of(capsys, "--rdfc_pairs", "27", "--method", "rdfc") == []
