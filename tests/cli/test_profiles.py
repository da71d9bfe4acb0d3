"""Settings from a TOML file."""

from pathlib import Path

import pytest

import run_dype
from dype.cli import flags
from dype.cli.settings import resolve
from dype.pipelines.memory import OFFLOADS, choose_offload
from dype.sampling.settings import RunSettings

ROOT = Path(__file__).parents[2]
FILE = """
[default]
model = "demo"
steps = 9
seed = "0-1"
prompt = ["a red sun", "a white moon"]

[default.dype]
method = "ntk"
dype_scale = 1.5

[small]
size = "64x96"
seed = 5

[small.dype]
dype = false

[preset]
preset = "4k"
"""


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text(FILE)


def settings(*argv) -> list[RunSettings]:
    return resolve(vars(flags.parse(["--config", "a.toml", *argv])))[1]


def test_default_table():
    runs = settings()
    pairs = [(run.prompt, run.seed) for run in runs]
    assert pairs == [(prompt, seed) for prompt in ("a red sun", "a white moon") for seed in (0, 1)]
    assert (runs[0].model, runs[0].steps) == ("demo", 9)
    assert (runs[0].config.method, runs[0].config.dype_scale) == ("ntk", 1.5)


def test_a_profile_inherits():
    run, _ = settings("--profile", "small")
    assert (run.height, run.width) == (96, 64)
    assert (run.steps, run.seed) == (9, 5)
    assert (run.config.method, run.config.dype) == ("ntk", False)


def test_a_profile_may_spell_a_setting_differently():
    """Its height and width win over [default]'s size, its dype over [default]'s no_dype."""
    Path("a.toml").write_text(
        "[default]\nsize = 4096\nno_dype = true\n[mine]\nheight = 64\nwidth = 96\ndype = true\n"
    )
    [run] = settings("--profile", "mine")
    assert (run.height, run.width, run.config.dype) == (64, 96, True)


@pytest.mark.parametrize(
    ("switch", "setting"),
    [
        ("isotropic", lambda run: run.config.anisotropic),
        ("no_dype", lambda run: run.config.dype),
        ("progressive", lambda run: run.multipass == "single"),
    ],
)
def test_a_profile_may_switch_off_a_switch_of_the_default(switch, setting):
    Path("a.toml").write_text(f"[default]\n{switch} = true\n[mine]\n{switch} = false\n")
    assert not setting(settings()[0])
    assert setting(settings("--profile", "mine")[0])


def test_precedence():
    """A flag wins over a preset, a preset over the file; a flag may change one side of a size."""
    run, _ = settings("--profile", "small", "--height", "128", "--method", "pi", "--dype", "on")
    assert (run.height, run.width) == (128, 64)
    assert (run.config.method, run.config.dype, run.config.dype_scale) == ("pi", True, 1.5)
    run, _ = settings("--profile", "small", "--preset", "4k")
    assert (run.config.method, run.config.dype_scale, run.config.dype) == (
        "vision_yarn",
        2.0,
        True,
    )
    assert settings("--profile", "preset", "--seed", "1")[0].config.method == "vision_yarn"


BAD = {
    "missing": ("--config none.toml", "", "cannot be read"),
    "profile without a file": ("--profile small", None, "--config"),
    "no such profile": ("--config b.toml --profile big", "[small]\n", "expected one of small"),
    "syntax": ("--config b.toml", "[default]\nsteps 9\n", "line 2"),
    "not text": ("--config b.toml", b"\xff\xfe", "UTF-8"),
    "unknown key": ("--config b.toml", "[default]\nstep = 9\n", "there is no step, expected steps"),
    "unknown key of dype": (
        "--config b.toml",
        "[default.dype]\nscale = 9\n",
        "expected dype_scale",
    ),
    "flag in the wrong table": (
        "--config b.toml",
        "[default.dype]\nsteps = 9\n",
        "expected in [default]",
    ),
    "text a switch": (
        "--config b.toml",
        "[default]\nnegative_prompt = false\n",
        "expected a number",
    ),
    "a prompt of digits": ("--config b.toml", "[default]\nprompt = 5\n", "expected text"),
    "a date": ("--config b.toml", "[default]\nseed = 07:32:00\n", "expected a number, text"),
    "an empty list": ("--config b.toml", "[default]\nseed = []\n", "expected a number, text"),
    "no prompt": ("--config b.toml", "[default]\nprompt = []\n", "expected text"),
    "outside": ("--config b.toml", "steps = 9\n", "stands in no table"),
    "value out of range": ("--config b.toml", "[default]\nsteps = 0\n", "--steps is 0"),
    "value a table": ("--config b.toml", "[default.steps]\na = 1\n", "expected a number, text"),
    "switch a word": ("--config b.toml", '[default]\nisotropic = "yes"\n', "true or false"),
    "number a switch": ("--config b.toml", "[default]\nsteps = true\n", "expected a number"),
    "with --from": ("--config b.toml --from a.png", "", "no --config"),
    "not for a file": (
        "--config b.toml",
        '[default]\nconfig = "a.toml"\n',
        "config is for the command line",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, capsys):
    """One sentence, exit code 2."""
    argv, text, message = BAD[name]
    if isinstance(text, bytes):
        Path("b.toml").write_bytes(text)
    elif text is not None:
        Path("b.toml").write_text(text)
    assert run_dype.main(argv.split()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("profile", "side"), [("12gb", 3072), ("24gb", 4096), ("48gb", 4096), ("80gb", 4096)]
)
def test_the_shipped_profiles(profile, side):
    """They resolve for the default model, and fit by the estimates of --offload auto."""
    file = str(ROOT / "docs" / "example.toml")
    [run] = resolve(vars(flags.parse(["--config", file, "--profile", profile])))[1]
    assert (run.model, run.height) == ("flux-krea", side)
    sizes = {"transformer": 24 * 10**9, "vae": 2 * 10**8}
    if run.text_encoder_device is None:
        sizes["text_encoder_2"] = int(9.5 * 10**9)
    free = int(0.95 * int(profile[:2]) * 2**30)
    auto, _ = choose_offload("cuda", free, sizes, side * side)
    assert OFFLOADS.index(auto) <= OFFLOADS.index(run.offload)
    assert auto != "group" or free > 1024 * side * side


def test_output_folder_from_the_file(monkeypatch):
    Path("a.toml").write_text('[default]\nmodel = "demo"\nsteps = 1\noutput_dir = "mine"\n')
    assert run_dype.main(["--config", "a.toml", "--size", "64"]) == 0
    assert list(Path("mine").glob("*.png"))
