"""The command line refuses bad input, resolves settings and writes images with records."""

import errno
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quiet, tiny_components
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import run_dype
from dype.cli import flags
from dype.cli.settings import resolve
from dype.pipelines.catalog import MODELS
from dype.sampling import records
from dype.sampling.settings import RunSettings
from dype.sweep import results

SMALL = ["--height", "64", "--width", "64", "--steps", "2", "--base_resolution", "32"]
SMALL += ["--prompt", "a red sun"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny pipeline in the diffusers folder format."""
    path = tmp_path_factory.mktemp("tiny")
    quiet(FluxPipeline(**tiny_components())).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*argv) -> int:
    return run_dype.main([str(word) for word in argv])


def copy_with_bad_file(folder, tmp_path, file):
    """Return a copy of the pipeline in which one file is not what it should be."""
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    (copy / file).write_bytes(b"spoiled")
    return copy


def list_files():
    return sorted(str(path) for path in Path(".").rglob("*") if path.is_file())


BAD = {
    "height 0": (2, "--height 0"),
    "height negative": (2, "--height -64"),
    "height odd": (2, "--height 1000"),
    "height huge": (2, "--height 1048576"),
    "height of 400 digits": (2, "--height 1" + "0" * 400),
    "seed of 400 digits": (2, "--seed 1" + "0" * 400),
    "longer text than FLUX takes": (2, "--max_sequence_length 600"),
    "prompt of bytes": (2, "--prompt=\udcff"),
    "prompt with a null character": (2, "--prompt=a\0b"),
    "negative prompt of bytes": (2, "--negative_prompt=caf\udce9"),
    "init image of bytes": (2, "--init_image caf\udce9.png"),
    "init image too long": (2, f"--init_image {'a' * 256}"),
    "lora of bytes": (2, "--lora caf\udce9.safetensors"),
    "lora too long": (2, f"--lora {'a' * 256}:0.5"),
    "model of bytes": (2, "--model caf\udce9"),
    "model too long": (2, f"--model {'a' * 256}"),
    "output of bytes": (2, "--output caf\udce9.png"),
    "output too long": (2, f"--output {'a' * 252}.png"),
    "output of long letters": (2, f"--output new/{'城' * 84}.png"),
    "output whose record is too long": (2, f"--output {'a' * 251}.png"),
    "output folder too long": (2, f"--output {'a' * 256}/b.png"),
    "output path too long": (2, f"--output {'a/' * 2100}b.png"),
    "output_dir of bytes": (2, "--output_dir caf\udce9"),
    "output_dir too long": (2, f"--output_dir a/{'a' * 256}/b"),
    "prompts file with a null character": (2, "--prompts_file null.txt"),
    "profile file with a null character": (2, "--config null.toml"),
    "from too long": (2, f"--from {'a' * 256}.png"),
    "grid_from too long": (2, f"--grid_from {'a' * 256}"),
    "output the root": (2, "--output /"),
    "output another format, dry run": (2, "--output a.gif --dry_run"),
    "output empty": (2, "--output="),
    "output_dir empty": (2, "--output_dir="),
    "init image empty": (2, "--init_image="),
    "device empty": (2, "--device="),
    "prompt without letters": (2, "--prompt=\u200b\ufeff"),
    "height a word": (2, "--height tall"),
    "width a fraction": (2, "--width 512.5"),
    "steps 0": (2, "--steps 0"),
    "seed negative": (2, "--seed -1"),
    "guidance nan": (2, "--guidance nan"),
    "true_cfg below 1": (2, "--true_cfg 0.5"),
    "tile_size": (2, "--tile_size 100"),
    "method": (2, "--method yarm"),
    "model": (2, "--model flux-crea"),
    "preset": (2, "--preset 8k"),
    "dtype": (2, "--dtype float8"),
    "device": (2, "--device gpu"),
    "vae_device": (2, "--vae_device gpu"),
    "offload": (2, "--offload all"),
    "shift": (2, "--shift none"),
    "unknown flag": (2, "--heigth 512"),
    "dype word": (2, "--dype maybe"),
    "dype_scale negative": (2, "--dype_scale -1"),
    "dype_scale nan": (2, "--dype_scale nan"),
    "dype_scale a word": (2, "--dype_scale big"),
    "dype_exponent": (2, "--dype_exponent 1001"),
    "cutoff": (2, "--cutoff 0"),
    "attention_scale": (2, "--attention_scale 3"),
    "dype_start_sigma 0": (2, "--dype_start_sigma 0"),
    "dype_start_sigma above 1": (2, "--dype_start_sigma 1.5"),
    "base_resolution": (2, "--base_resolution 100"),
    "base_shift when capped": (2, "--base_shift 0.3"),
    "max_shift when static": (2, "--model flux-schnell --max_shift 2"),
    "preset and base_resolution 0": (2, "--preset auto --base_resolution 0"),
    "lora scale": (2, "--lora a.safetensors:high"),
    "lora scale nan": (2, "--lora a.safetensors:nan"),
    "model empty": (2, "--model="),
    "output's record exists": (2, "--output kept.png"),
    "empty prompt": (2, "--prompt="),
    "blank prompt": (2, "--prompt= "),
    "prompts file missing": (2, "--prompts_file none.txt"),
    "prompts file a folder": (2, "--prompts_file ."),
    "prompts file empty": (2, "--prompts_file empty.txt"),
    "prompts file binary": (2, "--prompts_file binary.txt"),
    "negative prompt ignored": (2, "--negative_prompt fog"),
    "true_cfg ignored": (2, "--true_cfg 3"),
    "guidance ignored": (2, "--model flux-schnell --guidance 3"),
    "from missing": (2, "--from none.png"),
    "from without settings": (2, "--from plain.png"),
    "from no image": (2, "--from binary.txt"),
    "output of another format": (2, "--output image.bmp"),
    "output exists": (2, "--output plain.png"),
    "output a folder": (2, "--overwrite --output hollow.png"),
    "output of two prompts": (2, "--output new.png --prompt a b"),
    "vae_device and offload": (2, "--vae_device cpu --offload model"),
    "output folder not writable": (1, "--model demo --output_dir plain.png/sub"),
    "no GPU": (1, "--model flux-krea"),
    "device absent": (1, "--model demo --device cuda:99"),
    "vae_device absent": (1, "--model demo --vae_device cuda:99"),
    "device of a package": (1, "--model demo --device hpu"),
    "fine-tune without GPU": (1, "--model somebody/flux"),
    "device without memory": (1, "--model demo --device meta"),
    "offload without GPU": (1, "--model demo --offload model"),
    "model folder missing": (2, "--model ./nowhere"),
    "model folder empty": (2, "--model hollow"),
    "model a file": (2, "--model plain.png"),
    "model weights": (2, "--model a/b/flux.gguf"),
    "transformer missing": (2, "--model demo --transformer none.gguf"),
    "transformer unreadable": (1, "--model demo --transformer binary.txt"),
    "variant absent": (2, "--model demo --variant fp16"),
    "hub not reached": (1, "--model nobody/nothing --device cpu"),
    "lora missing": (2, "--model demo --lora none.safetensors"),
    "lora a folder": (2, "--model demo --lora hollow"),
    "lora unreadable": (1, "--model demo --lora binary.txt:0.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, capsys, monkeypatch):
    """One sentence on stderr, the exit code of its kind, no traceback, no file."""
    if torch.cuda.is_available() and "GPU" in name:
        pytest.skip("tests the errors without a GPU")
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("kept.json").write_text("{}")
    with open("binary.txt", "wb") as file:
        file.write(bytes(range(256)))
    open("empty.txt", "w").close()
    Path("null.txt").write_text("a\0b\n")
    Path("null.toml").write_text('[default]\nprompt = "a\\u0000b"\n')
    os.mkdir("hollow")
    os.mkdir("hollow.png")
    code, argv = BAD[name]
    before = list_files()
    argv = ["--prompt= "] if name == "blank prompt" else argv.split()
    assert run(*argv) == code
    err = capsys.readouterr().err
    assert err.startswith("run_dype.py: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert list_files() == before
    if code == 2 and name not in ("unknown flag", "from without settings", "from no image"):
        assert "expected" in err or "choose from" in err or "cannot be read" in err


def test_gated(monkeypatch, capsys):
    """The sentence says that the license must be accepted first."""
    from diffusers import configuration_utils
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args, **kwargs):
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(configuration_utils, "hf_hub_download", refuse)
    assert run("--model", "flux-krea", "--device", "cpu") == 1
    assert "accept its license" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
def test_unreadable_folder(folder, tmp_path, file, capsys):
    assert run("--model", copy_with_bad_file(folder, tmp_path, file), *SMALL) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("run_dype.py: cannot load the")


def test_unreadable_weights(folder, tmp_path, capsys):
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert run("--model", copy_with_bad_file(folder, tmp_path, file), *SMALL) == 1
    assert "cannot load the pipeline" in capsys.readouterr().err


def test_missing_weights(folder, tmp_path, capsys):
    """The file lacks a tensor."""
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("proj_out.bias")
    save_file(tensors, file)
    assert run("--model", copy, *SMALL) == 1
    assert "weights of its transformer are missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "code", "message"),
    [
        ({"use_dynamic_shifting": False}, 2, "schedule is static"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, 1, "expected FlowMatchEuler"),
    ],
)
def test_scheduler_of_a_folder(folder, tmp_path, config, code, message, capsys):
    """The folder's own scheduler configuration counts, not the default of its class."""
    copy = tmp_path / "other"
    shutil.copytree(folder, copy)
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    index = copy / "model_index.json"
    kind = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    index.write_text(index.read_text().replace("FlowMatchEulerDiscreteScheduler", kind))
    assert run("--model", copy, *SMALL, "--max_shift", "1.5") == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0", "0-1"])
def test_unsupported_checkpoint(seeds, folder, monkeypatch, capsys):
    """An error that only the loaded model shows has exit code 2; it is not a failed image."""

    def refuse(pipe, config):
        raise TypeError("OddTransformer is not supported")

    monkeypatch.setattr("dype.sampling.run.apply_dype", refuse)
    assert run("--model", folder, *SMALL, "--seed", seeds) == 2
    assert f"{folder}: OddTransformer is not supported" in capsys.readouterr().err


def test_dry_run_names_assumed_defaults(capsys):
    assert run("--model", "somebody/flux", "--dry_run") == 0
    assert "nothing could be read of somebody/flux" in capsys.readouterr().out


PROMPTS_FILES = {
    "byte order mark": b"\xef\xbb\xbfa red sun\n\xef\xbb\xbfa white moon",
    "lines of Windows": b"a red sun\r\n\r\n  a white moon \r\n",
    "lines of an old Mac": b"a red sun\ra white moon",
    "blank lines": b"\n \t\na red sun\n\n\xe2\x80\x83\na white moon\n\n",
}


@pytest.mark.parametrize("name", PROMPTS_FILES)
def test_prompts_files(name):
    Path("prompts.txt").write_bytes(PROMPTS_FILES[name])
    runs = resolve_all("--prompts_file", "prompts.txt")
    assert [run.prompt for run in runs] == ["a red sun", "a white moon"]


def test_lines_of_a_prompts_file_are_kept_to_the_letter():
    """Only the ends of a line are cut; it ends at its newline alone."""
    lines = ["# 1", "--no-humans, 1", "a\u2028b", "a\x0bb", "a\x85b", "'a  b'", "a\tb"]
    Path("prompts.txt").write_text("\n".join(lines), "utf-8")
    assert [run.prompt for run in resolve_all("--prompts_file", "prompts.txt")] == lines


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be", "latin-1", "cp1252"])
def test_prompts_files_in_another_encoding(encoding, capsys):
    Path("prompts.txt").write_text("Caf\xe9 Caf\xe9\n", encoding)
    assert run("--prompts_file", "prompts.txt") == 2
    assert "save it as UTF-8" in capsys.readouterr().err


def test_disk_full(folder, monkeypatch, capsys):
    """Neither the image nor the record is left, not even in part."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert run("--model", folder, *SMALL) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert os.listdir("outputs") == []


def test_generate_record_and_generate_again(folder):
    """Two runs and --from give the same pixels; the second run leaves the first file alone."""
    flags = ["--model", folder, *SMALL, "--dype-scale", "1.5"]
    assert run(*flags) == 0
    assert run(*flags) == 0
    name = settings(*map(str, flags)).file_name.removesuffix(".png")
    assert name.startswith("seed_42_method_dy_yarn_res_64x64_")
    first, second = (f"outputs/{name}{suffix}.png" for suffix in ("", "_2"))
    assert run("--from", second, "--output", "third.png") == 0
    pixels = [np.asarray(Image.open(path)) for path in (first, second, "third.png")]
    assert (pixels[0] == pixels[1]).all()
    assert (pixels[0] == pixels[2]).all()
    record = records.read_record(first)
    assert record == json.loads(Path(f"outputs/{name}.json").read_text())
    assert record["prompt"] == "a red sun"
    assert record["config"]["dype_scale"] == 1.5
    assert record["mu"] == 1.15
    assert len(record["sigmas"]) == 3
    assert record["kappas"][0] == 1.5
    assert record["seconds"] > 0
    assert {"torch", "diffusers", "transformers"} <= set(record["versions"])
    assert not [name for name in os.listdir("outputs") if "part" in name]


def test_the_record_is_in_place_before_its_image(monkeypatch):
    """A kill between the two writes leaves no image without a record."""
    targets, replace = [], Path.replace

    def note_and_replace(path, target):
        targets.append(target.suffix)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", note_and_replace)
    records.save_image(Image.new("RGB", (8, 8)), {"prompt": "x"}, Path("a.png"))
    assert targets == [".json", ".png"]
    assert records.read_record("a.png") == json.loads(Path("a.json").read_text()) == {"prompt": "x"}


ONCE = "resolve_model resolve_run resolve_pass_sizes check_processes check_run load_pipeline "
ONCE += "apply_dype set_tiling schedule_record noise_schedule generate_with_record save_image"


def test_each_thing_is_computed_once(folder):
    """One image resolves its settings, applies DyPE and describes its schedule once."""
    calls = Counter()

    def count(frame, event, argument):
        if event == "call" and "dype" in frame.f_code.co_filename:
            name = Path(frame.f_code.co_filename).stem + "." + frame.f_code.co_name
            calls.update((name, frame.f_code.co_name))

    sys.setprofile(count)
    try:
        assert run("--model", folder, *SMALL) == 0
    finally:
        sys.setprofile(None)
    assert {name: calls[name] for name in ONCE.split()} == dict.fromkeys(ONCE.split(), 1)


def test_several_prompts(folder):
    runs = resolve_all("--prompt", "a", "--prompt", "b", "c")
    assert [run.prompt for run in runs] == ["a", "b", "c"]
    with open("prompts.txt", "w") as file:
        file.write("a white moon\n\n  a yellow sun  \n")
    assert run("--model", folder, *SMALL[:-2], "--prompts_file", "prompts.txt", "--no_dype") == 0
    rows = results.read_rows(Path("outputs/sweep"))
    assert [row["prompt"] for row in rows] == ["a white moon", "a yellow sun"]
    for row in rows:
        assert records.read_record(Path("outputs/sweep") / row["file"])["prompt"] == row["prompt"]
        assert row["prompt"].replace(" ", "-") in row["file"]


def test_components_on_several_devices(folder):
    """Separate devices for text encoders and autoencoder (here all the CPU) change no pixel."""
    guided = ["--true_cfg", "2", "--negative_prompt", "a white moon"]
    assert run("--model", folder, *SMALL, *guided, "--output", "together.png") == 0
    devices = ["--text_encoder_device", "cpu", "--vae_device", "cpu"]
    assert run("--model", folder, *SMALL, *guided, *devices, "--output", "apart.png") == 0
    together, apart = (np.asarray(Image.open(f"{n}.png")) for n in ("together", "apart"))
    assert (together == apart).all()


def test_lora(folder):
    """A LoRA changes the image at scale 1 and does not at scale 0."""
    pytest.importorskip("peft")
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    components = tiny_components()
    torch.manual_seed(1)
    components["transformer"].add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    FluxPipeline.save_lora_weights(
        "adapter", transformer_lora_layers=get_peft_model_state_dict(components["transformer"])
    )
    file = "adapter/pytorch_lora_weights.safetensors"
    images = {}
    for name, lora in {"none": [], "full": [file], "zero": [f"{file}:0"]}.items():
        adapter = ["--lora", *lora] if lora else []
        assert run("--model", folder, *SMALL, *adapter, "--output", f"{name}.png") == 0
        images[name] = np.asarray(Image.open(f"{name}.png"))
    assert (images["none"] == images["zero"]).all()
    assert (images["none"] != images["full"]).any()


def test_tiled_decoding(folder):
    """Tiles of 128 px change the size of the image not at all, and its pixels little."""
    size = ["--height", "256", "--width", "384", "--steps", "1", "--base_resolution", "32"]
    for mode in ("on", "off"):
        flags = ["--tiled_vae", mode, "--tile_size", "128", "--output", f"{mode}.png"]
        assert run("--model", folder, *size, *flags) == 0
    on, off = (np.asarray(Image.open(f"{mode}.png"), float) for mode in ("on", "off"))
    assert on.shape == off.shape == (256, 384, 3)
    assert (on != off).any()
    assert abs(on - off).mean() < 8


def resolve_all(*argv) -> list[RunSettings]:
    return resolve(vars(flags.parse(list(argv))))[1]


def settings(*argv) -> RunSettings:
    [only] = resolve_all(*argv)
    return only


def test_precedence(folder):
    """A flag wins over the preset, the preset over --from, --from over the model's default."""
    assert settings("--model", "demo").steps == MODELS["demo"].steps
    run("--model", folder, *SMALL, "--method", "ntk", "--dype_scale", "1.5", "--output", "a.png")
    again = settings("--from", "a.png")
    assert (again.config.method, again.config.dype_scale) == ("ntk", 1.5)
    assert (again.steps, again.model) == (2, str(folder))
    preset = settings("--from", "a.png", "--preset", "4k")
    assert (preset.config.method, preset.config.dype_scale) == ("vision_yarn", 2.0)
    explicit = settings("--from", "a.png", "--preset", "4k", "--dype_scale", "3", "--steps", "9")
    assert (explicit.config.method, explicit.config.dype_scale) == ("vision_yarn", 3.0)
    assert explicit.steps == 9
    assert settings("--from", "a.png", "--method", "sega").config.name == "sega"
    assert settings("--from", "a.png", "--method", "yarn").config.name == "dy_yarn"
    dev = settings("--from", "a.png", "--model", "flux-dev")
    assert (dev.config.base_resolution, dev.steps) == (1024, 28)
    assert dev.config.method == "ntk"
    run("--model", folder, *SMALL, "--method", "tide", "--alpha", "2", "--output", "b.png")
    assert settings("--from", "b.png").config.alpha == 2
    assert settings("--from", "b.png", "--method", "yarn_paper").config.alpha == 1


def test_from_an_image_of_the_first_version():
    """--from takes the settings of its record; settings that the record lacks have defaults.

    It is of the first demo, so --model accepts the present one.
    """
    image = Path(__file__).parents[1] / "golden" / "first_version.png"
    record = records.read_record(image)
    run = settings("--from", str(image), "--model", "demo")
    assert {**record["flags"], "tiled_vae": "off"}.items() <= run.record["flags"].items()
    assert record["config"].items() <= run.record["config"].items()
    assert (run.prompt, run.tiled_vae) == ("a blue ring on red leaves", "off")
    assert run.file_name == settings(
        "--model", "demo", "--size", "64", "--steps", "2", "--seed", "7", "--method", "ntk",
        "--dype_scale", "1.5", "--negative_prompt", "a ring", "--true_cfg", "3", "--guidance", "0",
        "--max_sequence_length", "16", "--base_resolution", "256", "--prompt", run.prompt,
    ).file_name  # fmt: skip


def test_from_an_image_of_a_later_version(capsys):
    """A setting that this version lacks has no effect, which a note says."""
    record = settings().record | {"commit": None, "tiled_vae": False}
    record["flags"] = record["flags"] | {"sharpness": 3}
    Path("a.json").write_text(json.dumps(record))
    run = settings("--from", "a.json")
    assert "another version, without effect: sharpness\n" in capsys.readouterr().out
    Path("a.json").write_text(json.dumps(run.record | {"commit": None, "tiled_vae": False}))
    settings("--from", "a.json")
    assert "another version" not in capsys.readouterr().out


def test_a_folder_named_like_a_model_of_the_table():
    """The commit of a --from image counts all the same."""
    record = settings("--model", "flux-dev").record | {"commit": "a" * 40, "tiled_vae": False}
    Path("a.json").write_text(json.dumps(record))
    Path("flux-dev").mkdir()
    assert settings("--from", "a.json").revision == "a" * 40


def test_defaults_are_the_papers():
    run = settings()
    assert run.model == "flux-krea"
    assert (run.config.method, run.config.dype, run.config.lambda_s) == ("yarn", True, 1.0)
    expected = {"height": 4096, "width": 4096, "steps": 28, "seed": 42, "guidance": 4.5}
    assert expected.items() <= run.record["flags"].items()
    assert run.prompt.startswith("A mysterious woman stands confidently in elaborate")
    assert run.file_name == "seed_42_method_dy_yarn_res_4096x4096.png"


def test_spellings():
    assert settings("--no-dype").config.dype is False
    assert settings("--dype", "off").config.dype is False
    assert settings("--dype").config.dype is True
    assert settings("--dype_method", "ntk").config.method == "ntk"
    assert settings("--isotropic").config.anisotropic is False
    assert settings("--dype_scale", "0").config.dype_scale == 0
    assert settings("--lora", "a:0.5", "--lora", "b").lora == ["a:0.5", "b:1.0"]
    Path("c").write_text("")
    assert settings("--lora", "c:2").lora == [f"{Path('c').absolute()}:2.0"]


def test_the_last_word_wins():
    assert settings("--dype", "on", "--no_dype").config.dype is False
    assert settings("--no_dype", "--dype").config.dype is True
    assert settings("--multipass", "single", "--progressive").multipass == "progressive"
    for words, size in {
        "--size 64x96 --height 128": (128, 64),
        "--height 128 --size 64x96": (96, 64),
        "--height 128 --width 256 --size 64": (64, 64),
    }.items():
        run = settings(*words.split())
        assert (run.height, run.width) == size
    both = resolve_all("--size", "64,96x64", "--width", "128")
    assert [(run.height, run.width) for run in both] == [(64, 128)]


def test_another_method_has_its_own_scale():
    default = MODELS["demo"].dype_defaults["method"]
    method = "ntk" if default != "ntk" else "yarn"
    assert settings("--model", "demo", "--method", method).config.dype_scale is None


NAMES = {  # flags -> the end of the name
    "": "dy_yarn_res_4096x4096",
    "--width 2048": "dy_yarn_res_4096x2048",
    "--no_dype --size 64": "yarn_res_64x64",
    "--method base --size 64": "base_res_64x64",
    "--method base --dype_scale 3": "base_res_4096x4096",
    "--dype_scale 1": "dy_yarn_res_4096x4096",
    "--dype_scale 1.5 --steps 9": "dy_yarn_res_4096x4096_steps_9_dype_scale_1.5",
    "--isotropic": "dy_yarn_res_4096x4096_anisotropic_off",
    "--device cpu --offload group --tiled_vae on": "dy_yarn_res_4096x4096",
    "--model z-image": "dy_yarn_res_4096x4096_model_z-image",
    "--model demo": "dy_yarn_paper_res_1024x1024_model_demo",
    "--model demo --alpha 8": "dy_yarn_paper_res_1024x1024_model_demo",  # its default
    "--model demo --alpha 1": "dy_yarn_paper_res_1024x1024_model_demo_alpha_1",
    "--model demo --method tide --alpha 1": "dy_tide_res_1024x1024_model_demo",
    "--alpha 2": "dy_yarn_res_4096x4096",  # no effect on yarn
    "--prompt Cats": "dy_yarn_res_4096x4096_prompt_cats-ec05d70c6f14",
}


def test_file_names():
    """A name has the authors' parts and every setting that differs from its default."""
    for words, name in NAMES.items():
        assert settings(*words.split()).file_name == f"seed_42_method_{name}.png", words


def test_names_tell_any_two_images_apart():
    """Similar values, prompts that differ at their ends, and shortened names stay apart."""
    prompts = [
        "a / b",
        "b",
        "a b",
        "a-b",
        "a_b",
        "x/",
        "A b",
        "a  b",
        "ab",
        "猫",
        "犬",
        "a810bf845a30",  # the hash of the first
        "a-b-a760b0e1e518",  # as the name of "A b" ends
        *("word " * 40 + end for end in "xy"),
    ]
    lists = ["--model", "qwen-image", "--negative_prompt", "n" * 300, "--true_cfg", "2,3"]
    names = [run.file_name for run in resolve_all("--prompt", *prompts, *lists)]
    assert len(set(names)) == 2 * len(prompts)
    assert max(map(len, names)) < 200
    assert all(re.fullmatch(r"[a-zA-Z0-9._-]+", name) for name in names)


def test_dry_run(capsys):
    """It prints time, memory, passes and a verdict, and writes no file.

    All settings and the schedule are in full alone.
    """
    assert run("--dry_run") == 0
    out = capsys.readouterr().out
    assert "flux-krea  4096x4096  dy_yarn  28 steps  shift mu 1.15  seed 42" in out
    lines = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert lines["time"].startswith("unknown until")
    assert lines["memory"].startswith(
        "needs about 38.4 GiB of main memory, plus its text encoders; "
    )
    assert lines["passes"] == "4096x4096 px, 28 steps"
    assert {*lines} - {"refused", "black-forest-labs/FLUX.1-Krea-dev"} == {
        "time", "memory", "passes", "verdict", "the",
    }  # fmt: skip
    assert out.endswith("other settings are at their defaults; --dry_run full lists all\n")
    assert run("--dry_run", "full") == 0
    full = capsys.readouterr().out
    assert "  27  0.1047  0.0110" in full
    names = {line.split()[0] for line in full.splitlines()}
    assert {"strength", "sega_alpha", "method", "prompt", "revision"} <= names
    assert run("--dry_run", "--multipass", "twopass", "--text_repeat", "auto") == 0
    out = capsys.readouterr().out
    assert "2048x2048 px, 28 steps; 4096x4096 px, the last 14 of 28 steps" in out
    assert "  --text_repeat        auto, here 16\n" in out
    assert run("--dry_run", "--progressive") == 0
    assert "4096x4096 px, the last of 28 steps, as the first pass dec" in capsys.readouterr().out
    assert run("--dry_run", "a cat") == 2
    assert "--dry_run is 'a cat', expected one of on, full" in capsys.readouterr().err
    assert run("--dry_run", "--shift", "model") == 0
    assert "mu 11.55" in capsys.readouterr().out
    assert run("--dry_run", "--model", "flux-schnell") == 0
    assert "static shift" in capsys.readouterr().out
    assert list_files() == []


def test_dry_run_lists_what_is_not_at_its_default(capsys):
    """Flags and their values, also of the machine; none that the summary has."""
    words = "--base_resolution 256 --steps 3 --dype_exponent 1.5 --isotropic --vae_device cpu"
    assert run("--model", "demo", *words.split(), "--prompt", "a low red sun", "--dry_run") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:4] == "  --"]
    assert {name: value for name, *value in lines} == {
        "--base_resolution": ["256"],
        "--dype_exponent": ["1.5"],
        "--anisotropic": ["off"],
        "--vae_device": ["cpu"],
        "--prompt": ["a", "low", "red", "sun"],
    }


def test_dry_run_says_what_the_run_refuses(monkeypatch, capsys):
    """The first line after the summary is the run's own sentence; the plan follows."""
    monkeypatch.setattr("dype.pipelines.loading.default_device", lambda: "cpu")
    monkeypatch.setattr("dype.cli.needs.default_device", lambda: "cpu")
    lines = {
        "--size 4096": "flux-krea has 12 billion parameters and no GPU was found",
        "--model demo --offload group": "--offload group needs a GPU to offload from",
        "--model demo --device cuda:99": "this machine has no device cuda:99",
    }
    for line, sentence in lines.items():
        assert run(*line.split(), "--dry_run") == 0
        _, first, *rest = capsys.readouterr().out.splitlines()
        assert first.startswith(f"  refused on this machine: {sentence}")
        assert any(text.startswith("  memory  ") for text in rest)
        assert not any("  fits" in text for text in rest)
        assert run(*line.split()) == 1
        assert sentence in capsys.readouterr().err
        assert run(*line.split(), "--seed", "0-1", "--dry_run") == 0
        assert sentence in capsys.readouterr().out


def test_dry_run_names_files_that_are_not_here(capsys):
    for name, gaps in (("flux-dev", ["black-forest-labs/FLUX.1-dev"]), ("demo", [])):
        assert run("--model", name, "--dry_run") == 0
        sentence = " is not on this machine, so its files were not checked"
        out = capsys.readouterr().out
        assert [x.strip().removesuffix(sentence) for x in out.splitlines() if sentence in x] == gaps


def test_preset_prints_its_settings(capsys):
    settings("--preset", "auto")
    assert "vision_yarn" in capsys.readouterr().out


def test_texts_say_width_x_height(capsys):
    """Only the names of files have the height first."""
    words = ["--model", "demo", "--size", "1280x768", "--multipass", "twopass"]
    words += ["--prompt", "a red sun over mountains"]
    assert run(*words, "--dry_run", "full") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("demo  1280x768  dy_yarn_paper")
    passes = [line.split(":")[0] for line in lines if line.startswith("  pass at")]
    assert passes == ["  pass at 640x384", "  pass at 1280x768"]
    [image] = resolve(vars(flags.parse(words)))[1]
    assert "_res_768x1280_" in image.file_name
    row = results.to_row(image)
    assert [*results.group_by_setting([row])] == ["1280x768, dy_yarn_paper"]
