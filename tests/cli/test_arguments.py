"""The command line passes its settings to the loader, the pipeline and the autoencoder."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import quiet, tiny_components
from diffusers import FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, PngImagePlugin
from tiny import qwen_vae

import run_dype
from dype.cli import flags, generate
from dype.cli.settings import resolve
from dype.pipelines import acceleration, loading, memory
from dype.pipelines.catalog import MODELS
from dype.pipelines.memory import decode_bytes, set_tiling
from dype.sampling import records, sample
from dype.sampling import run as sampling_run

LINE = """--model demo --revision abc --dtype bfloat16 --device cpu --vae_device cpu
 --text_encoder_device cpu --tiled_vae on --tile_size 128 --true_cfg 3 --negative_prompt fog
 --guidance 5 --seed 7 --steps 3 --max_sequence_length 12 --height 64 --width 96 --lora a/b:0.5
 --prompt x --variant fp16 --transformer a.gguf
 --method ntk --dype_scale 1.5 --dype_exponent 0.5 --dype_start_sigma 0.9 --base_resolution 32
 --alpha 2 --cutoff 0.7 --attention_scale 0.2 --attention_path rising --rdfc_pairs 8,9
 --sega_alpha 0.3 --text_repeat 2
 --isotropic --shift model --base_shift 0.25 --max_shift 2 --attention native
 --compile blocks"""
FLAGS = LINE.split()


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Records the arguments of the loader, `apply_dype`, the tiling and `sample.generate`."""
    monkeypatch.chdir(tmp_path)
    arguments = {}
    pipe = quiet(FluxPipeline(**tiny_components(guidance_embeds=True)))
    pipe.dype_device_overrides, pipe.dype_offload, pipe.dype_decode_budget = {}, "none", 1

    def record(name, result):
        def call(*args, **kwargs):
            takes_pipe = name in ("tiling", "apply", "generate")
            kwargs.pop("on_step", None)  # of the bar, which is another one in every run
            arguments[name] = (args[takes_pipe:], kwargs)
            return result

        return call

    for name in ("check_sources", "check_reached"):  # no files are there
        monkeypatch.setattr(run_dype, name, lambda *_, **__: None)
    monkeypatch.setattr(generate, "check_checkpoint", lambda run: None)
    monkeypatch.setattr(sampling_run, "load_pipeline", record("load", pipe))
    monkeypatch.setattr(sampling_run, "set_tiling", record("tiling", True))
    monkeypatch.setattr(sampling_run, "apply_dype", record("apply", None))
    monkeypatch.setattr(acceleration, "compile_transformer", record("compile", None))
    monkeypatch.setattr(sample, "encode_prompt", lambda pipe, text, length: text)
    monkeypatch.setattr(sample, "generate", record("generate", Image.new("RGB", (96, 64))))
    return arguments


def test_every_flag_arrives_and_comes_back(calls):
    """Every value differs from its default, and `--from` the image passes on the same values."""
    assert run_dype.main([*FLAGS, "--output", "a.png"]) == 0
    first = dict(calls)
    args, keywords = first["load"]
    assert args == ("demo",)
    assert keywords == {
        "revision": "abc",
        "variant": "fp16",
        "transformer": "a.gguf",
        "dtype": "bfloat16",
        "device": "cpu",
        "text_encoder_device": "cpu",
        "vae_device": "cpu",
        "offload": "auto",
        "quantize": "none",
        "loras": [("a/b", 0.5)],
        "pixels": 64 * 96,
        "entry": MODELS["demo"],
    }
    assert first["tiling"][0] == ("on", 128, 64 * 96)
    ((config,), _) = first["apply"]
    assert config.to_dict() == {
        "method": "ntk",
        "dype": True,
        "dype_scale": 1.5,
        "dype_exponent": 0.5,
        "dype_start_sigma": 0.9,
        "alpha": 2.0,
        "beta": 32.0,
        "cutoff": 0.7,
        "cutoff_width": 0.5,
        "spectrum_exponent": 2.0,
        "attention_scale": 0.2,
        "attention_path": "rising",
        "ntk_factor": 10.0,
        "rdfc_pairs": "8,9",
        "rdfc_turns": 1.0,
        "sega_alpha": 0.3,
        "sega_beta": 1.5,
        "sega_floor": 1.0,
        "sega_reference": 0.08,
        "text_repeat": 2,
        "base_resolution": 32,
        "anisotropic": False,
        "shift": "model",
        "base_shift": 0.25,
        "max_shift": 2.0,
    }
    args, keywords = first["generate"]
    assert args == ("x",)
    assert keywords == {
        "height": 64,
        "width": 96,
        "steps": 3,
        "guidance": 5.0,
        "seed": 7,
        "max_sequence_length": 12,
        "negative_prompt": "fog",
        "true_cfg": 3.0,
        "image": None,
        "cache": "off",
    }
    assert first["compile"][0][1:] == ("blocks",)
    calls.clear()
    assert run_dype.main(["--from", "a.png", "--output", "b.png"]) == 0
    assert calls == first


def test_from_repeats_the_tiling(calls):
    """--tiled_vae auto depends on free memory, so --from takes the result from the record."""
    assert run_dype.main([*FLAGS, "--tiled_vae", "auto", "--output", "a.png"]) == 0
    assert calls["tiling"][0][0] == "auto"
    assert run_dype.main(["--from", "a.png", "--output", "b.png"]) == 0
    assert calls["tiling"][0][0] == "on"


def test_two_runs_at_once_overwrite_nothing(calls, monkeypatch):
    """A file that appears during generation stays; --overwrite replaces it."""
    [run] = resolve(vars(flags.parse(FLAGS)))[1]
    name = f"outputs/{run.file_name.removesuffix('.png')}"
    generate = sample.generate

    def slow(*args, **kwargs):
        Path(f"{name}.png").write_text("another run's")
        return generate(*args, **kwargs)

    monkeypatch.setattr(sample, "generate", slow)
    assert run_dype.main(FLAGS) == 0
    assert Path(f"{name}.png").read_text() == "another run's"
    assert records.read_record(f"{name}_2.png")["prompt"] == "x"
    assert run_dype.main([*FLAGS, "--overwrite"]) == 0
    assert records.read_record(f"{name}.png")["prompt"] == "x"


def png_chunks(path) -> list[str]:
    """Return the types of a PNG's chunks."""
    data, types, start = Path(path).read_bytes(), [], 8
    while start < len(data):
        types.append(data[start + 4 : start + 8].decode())
        start += 12 + int.from_bytes(data[start : start + 4])
    return types


def test_no_metadata(calls):
    """Neither PNG, name nor further files tell the prompt, the settings or a path."""
    line = [*FLAGS, "--no_metadata"]
    for name in ("image.png", "image_2.png"):
        assert run_dype.main(line) == 0
        assert {*png_chunks(f"outputs/{name}")} == {"IHDR", "IDAT", "IEND"}
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["image.png", "image_2.png"]
    assert run_dype.main([*FLAGS, "--output", "a.png"]) == 0
    assert "iTXt" in png_chunks("a.png")
    assert run_dype.main([*line, "--output", "a.png"]) == 2
    assert Path("a.json").exists()
    assert run_dype.main([*line, "--output", "a.png", "--overwrite"]) == 0
    assert "iTXt" not in png_chunks("a.png")
    assert not Path("a.json").exists()  # because it is the record of the earlier image


@pytest.mark.parametrize("words", ["--seed 1,2", "--sweep methods", "--prompts_file two.txt"])
def test_no_metadata_of_a_sweep(words, calls, capsys):
    Path("two.txt").write_text("a\nb")
    assert run_dype.main(["--model", "demo", "--no_metadata", *words.split()]) == 2
    assert "--no_metadata is for one image" in capsys.readouterr().err
    assert not calls
    assert [path.name for path in Path().iterdir()] == ["two.txt"]
    Path("two.txt").write_text("a")
    assert run_dype.main(["--model", "demo", "--no_metadata", "--prompts_file", "two.txt"]) == 0


BROKEN = {
    "empty": lambda record: {},
    "no list": lambda record: [record],
    "no model": lambda record: record["flags"].pop("model"),
    "model null": lambda record: record["flags"].update(model=None),
    "lora null": lambda record: record["flags"].update(lora=None),
    "half a step": lambda record: record["flags"].update(steps=2.5),
    "seed a fraction": lambda record: record["flags"].update(seed=2.0),
    "negative prompt a number": lambda record: record["flags"].update(negative_prompt=3),
    "prompt null": lambda record: record.update(prompt=None),
    "prompt empty": lambda record: record.update(prompt=""),
    "offload unknown": lambda record: record["flags"].update(offload="bogus"),
    "tiled_vae unknown": lambda record: record["flags"].update(tiled_vae="bogus"),
    "dtype unknown": lambda record: record["flags"].update(dtype="float8"),
    "device a number": lambda record: record["flags"].update(device=[0]),
    "setting unknown": lambda record: record["config"].update(kappa=1),
    "lora a text": lambda record: record["flags"].update(lora="abc"),
    "flags a text": lambda record: record.update(flags="ab"),
    "alpha of 400 digits": lambda record: record["config"].update(alpha=10**400),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records(name, calls, capsys):
    """A record with invalid settings gives one sentence, and nothing is loaded."""
    assert run_dype.main([*FLAGS, "--output", "a.png"]) == 0
    record = records.read_record("a.png")
    changed = BROKEN[name](record)
    record = changed if name in ("empty", "no list") else record
    info = PngImagePlugin.PngInfo()
    info.add_itxt(records.PNG_CHUNK, json.dumps(record))
    Image.new("RGB", (8, 8)).save("spoiled.png", pnginfo=info)
    Path("alone.json").write_text(json.dumps(record))
    calls.clear()
    for file in ("spoiled.png", "alone.json"):
        capsys.readouterr()
        assert run_dype.main(["--from", file, "--output", "b.png"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not calls


COPIES = {  # file -> what to do with the image "a.png" so that it is a copy without settings
    "a.json": lambda image: None,
    "a.png": lambda image: image.save("a.png"),
    "a.jpg": lambda image: image.save("a.jpg"),
    "a.webp": lambda image: image.save("a.webp"),
}


@pytest.mark.parametrize("file", COPIES)
def test_from_the_record_beside_a_copy(file, calls, capsys):
    """A JSON, a PNG without its text, and other formats have the settings of the JSON."""
    assert run_dype.main([*FLAGS, "--output", "a.png"]) == 0
    first = dict(calls)
    with Image.open("a.png") as image:
        copy = Image.new("RGB", image.size)
    COPIES[file](copy)
    calls.clear()
    capsys.readouterr()
    assert run_dype.main(["--from", file, "--output", "b.png"]) == 0
    assert calls == first
    assert ("those of a.json apply" in capsys.readouterr().out) == (file != "a.json")


def save_with_text(path, **texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


WITHOUT_SETTINGS = {  # file -> how to write it, words of the sentence
    "a1111.png": (lambda path: save_with_text(path, parameters="a cat"), "is no a1111.json"),
    "comfy.png": (lambda path: save_with_text(path, prompt="{}", workflow="{}"), "no comfy.json"),
    "photo.jpg": (lambda path: Image.new("RGB", (8, 8)).save(path), "is no photo.json"),
    "cut.png": (lambda path: Path(path).write_bytes(b"\x89PNG\r\n\x1a\n"), "cut.png"),
    "comfy.json": (lambda path: Path(path).write_text('{"nodes": []}'), "no complete settings"),
    "list.json": (lambda path: Path(path).write_text("[]"), "no complete settings"),
    "cut.json": (lambda path: Path(path).write_text('{"flags": {'), "not JSON"),
    "deep.json": (lambda path: Path(path).write_text("[" * 200_000), "not JSON"),
    "empty.json": (lambda path: Path(path).write_text(""), "not JSON"),
    "bytes.json": (lambda path: Path(path).write_bytes(bytes(range(256))), "not JSON"),
    "folder.json": (lambda path: Path(path).mkdir(), "cannot be read"),
}


@pytest.mark.parametrize("file", WITHOUT_SETTINGS)
def test_from_a_file_without_settings(file, calls, capsys):
    write, words = WITHOUT_SETTINGS[file]
    write(file)
    assert run_dype.main(["--from", file, "--output", "b.png"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"run_dype.py: --from {file}")
    assert words in err
    assert err.count("\n") == 1
    assert not calls


def test_the_pipeline_gets_every_argument():
    class Recorder:
        _execution_device = "cpu"
        vae = SimpleNamespace(decoder=torch.nn.Identity())
        image_processor = VaeImageProcessor()

        def __call__(self, prompt=None, negative_prompt=None, height=0, width=0,
                     num_inference_steps=0, guidance_scale=3.5, true_cfg_scale=1.0,
                     max_sequence_length=512, generator=None, output_type=None):  # fmt: skip
            self.arguments = locals()
            return SimpleNamespace(images=torch.ones(1, 3, 8, 8))

    pipe = Recorder()
    image = sample.generate(
        pipe, "x", height=64, width=96, steps=3, guidance=2.5, seed=7, max_sequence_length=12,
        negative_prompt="fog", true_cfg=3.0,
    )  # fmt: skip
    assert image.getpixel((7, 7)) == (255, 255, 255)
    assert pipe.arguments.pop("generator").initial_seed() == 7
    del pipe.arguments["self"]
    assert pipe.arguments == {
        "prompt": "x",
        "negative_prompt": "fog",
        "height": 64,
        "width": 96,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "true_cfg_scale": 3.0,
        "max_sequence_length": 12,
        "output_type": "pt",
    }


def test_tiling(monkeypatch):
    """Auto tiles only an image that would not fit; tiles of --tile_size overlap by a quarter.

    The device that the autoencoder computes on counts, not the one that holds its weights.
    """
    pipe = quiet(FluxPipeline(**tiny_components()))
    pipe.dype_device_overrides, pipe.dype_decode_budget = (
        {},
        decode_bytes(pipe.vae, 512 * 512, "cpu"),
    )
    vae = pipe.vae
    assert not set_tiling(pipe, "auto", None, 512 * 512)
    assert not vae.use_tiling
    assert set_tiling(pipe, "auto", None, 512 * 528)
    assert vae.use_tiling
    assert set_tiling(pipe, "on", 256, 1)
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (256, 32)
    assert not set_tiling(pipe, "off", None, 4096 * 4096)
    vae.register_to_config(mid_block_add_attention=True)
    assert not set_tiling(pipe, "auto", None, 512 * 512)
    monkeypatch.setattr(memory, "execution_device", lambda pipe: torch.device("cuda"))
    assert set_tiling(pipe, "auto", None, 512 * 512)
    pipe.vae, pipe.dype_decode_budget = qwen_vae(), 0
    assert set_tiling(pipe, "auto", None, 4096 * 4096)
    assert (pipe.vae.tile_sample_min_height, pipe.vae.tile_sample_stride_width) == (1024, 768)


def test_models_have_the_published_defaults():
    """The numbers come from the authors' scripts and the model cards (docs/models.md)."""
    krea, qwen, turbo = (MODELS[name] for name in ("flux-krea", "qwen-image", "z-image-turbo"))
    assert krea.repo == "black-forest-labs/FLUX.1-Krea-dev"
    assert (krea.steps, krea.guidance, krea.dtype) == (28, 4.5, "bfloat16")
    assert (qwen.steps, qwen.true_cfg, qwen.negative_prompt) == (40, 4.0, " ")
    assert (turbo.steps, turbo.guidance) == (9, 0.0)
    base_resolutions = [
        MODELS[name].base_resolution for name in ("flux-krea", "z-image", "qwen-image")
    ]
    assert base_resolutions == [1024, 1024, 1328]


@pytest.mark.parametrize(
    "setting", [{"offload": "bogus"}, {"dtype": "float8"}, {"quantize": "int3"}]
)
def test_load_pipeline_checks_choices(setting):
    with pytest.raises(ValueError, match="expected one of"):
        loading.load_pipeline("demo", **setting)
