"""Guidance and negative prompts without an effect on a checkpoint are refused before it loads."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import quiet, run, table, tiny_components
from diffusers import FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dype.pipelines import catalog
from dype.pipelines.catalog import resolve_model
from dype.sampling import records, sample

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def write_folder(name, pipeline, config=None, **index):
    """Write the JSON files of a pipeline's folder that say what guidance it takes."""
    folder = Path(name)
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline} | index))
    if config is not None:
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder


FOLDERS = {  # name of the folder, class, configuration of the transformer, index -> guidance
    "as schnell": ("a", "FluxPipeline", {"guidance_embeds": False}, {}, 0.0),
    "as dev": ("a", "FluxPipeline", {"guidance_embeds": True}, {}, 3.5),
    "by the class's default": ("a", "FluxPipeline", {"num_layers": 1}, {}, 0.0),
    "unknown": ("a", "FluxPipeline", None, {}, 3.5),
    "de-distilled, with the name of dev": (
        "FLUX.1-dev", "FluxPipeline", {"guidance_embeds": False}, {}, 0.0
    ),
    "with guidance, and the name of schnell": (
        "FLUX.1-schnell", "FluxPipeline", {"guidance_embeds": True}, {}, 3.5
    ),
    "flux2 dev": ("a", "Flux2Pipeline", {"num_layers": 1}, {}, 2.5),
    "flux2 without guidance": ("a", "Flux2Pipeline", {"guidance_embeds": False}, {}, 0.0),
    "klein base": ("a", "Flux2KleinPipeline", {"guidance_embeds": False}, {}, 4.0),
    "klein": ("a", "Flux2KleinPipeline", {}, {"is_distilled": True}, 0.0),
    "klein, with the name of its base": (
        "FLUX.2-klein-base-9B", "Flux2KleinPipeline", {}, {"is_distilled": True}, 0.0
    ),
    "klein base, with the name of klein": ("FLUX.2-klein-4B", "Flux2KleinPipeline", {}, {}, 4.0),
    "krea 2, with the name of turbo": ("Krea-2-Turbo", "Krea2Pipeline", {}, {}, 4.5),
    "krea 2 turbo": ("Krea-2-Raw", "Krea2Pipeline", {}, {"is_distilled": True}, 0.0),
    "qwen": ("a", "QwenImagePipeline", {"guidance_embeds": False}, {}, 0.0),
    "qwen with guidance": ("a", "QwenImagePipeline", {"guidance_embeds": True}, {}, 3.5),
    "z-image": ("a", "ZImagePipeline", {}, {}, 5.0),
    "chroma": ("a", "ChromaPipeline", {"guidance_embeds": False}, {}, 5.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_decides_its_guidance(name, capsys):
    """The table decides only what the folder leaves open; other values are refused at once."""
    folder, pipeline, config, index, guidance = FOLDERS[name]
    write_folder(folder, pipeline, config, **index)
    model = resolve_model(str(Path(folder).absolute()))
    assert model.guidance == guidance
    words = ["--model", f"./{folder}", "--dry_run"]
    assert run(*words, "full") == 0
    assert f"  {'guidance':20} {guidance}\n" in capsys.readouterr().out
    assert run(*words, "--guidance", "1.5,3.5,7") == (0 if guidance else 2)
    assert ("takes none, expected 0" in capsys.readouterr().err) == (not guidance)
    assert run(*words, "--guidance", "0") == 0


def test_a_repository_decides_its_guidance(monkeypatch, capsys):
    folder = write_folder("repo", "FluxPipeline", {"guidance_embeds": False})
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repo, file, **arguments: folder / file
    )
    monkeypatch.setattr("dype.pipelines.hub.is_local", lambda *_: False)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert run("--model", "somebody/tuned", "--guidance", "1,3.5", "--dry_run") == 2
    assert "--guidance is 1, but somebody/tuned takes none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model z-image-turbo --negative_prompt fog", "ignored by z-image-turbo, expected none"),
        ("--model krea-2-turbo --negative_prompt fog", "ignored by krea-2-turbo, expected none"),
        ("--model flux2-klein --negative_prompt fog", "ignored by flux2-klein, expected none"),
        ("--model flux-schnell --negative_prompt fog", "ignored at --true_cfg 1"),
        ("--model flux-schnell --true_cfg 3", "does nothing without --negative_prompt"),
        ("--model flux-schnell --guidance 0,3", "flux-schnell takes none"),
        ("--model chroma --guidance 0.5 --negative_prompt fog", "ignored at --guidance 0"),
    ],
)
def test_refused_flags(line, message, capsys):
    assert run(*line.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chroma", "flux2-klein-base"])
def test_guidance_that_is_off(name, capsys):
    """Scales of classifier-free guidance up to 1 mean the same image, so there is one of them."""
    assert run("--model", name, "--guidance", "0,0.5,1,2", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "2 images, 0 finished" in out
    assert f"--guidance 0.5 is off, as 0: {name} needs more than 1" in out
    assert f"--guidance 1 is off, as 0: {name} needs more than 1" in out
    assert run("--model", name, "--guidance", "1", "--dry_run", "full") == 0
    assert f"  {'guidance':20} 0.0\n" in capsys.readouterr().out


def test_records_of_earlier_versions(capsys):
    """They have a guidance without effect; --from and a sweep accept them."""
    quiet(FluxPipeline(**tiny_components())).save_pretrained("tiny")
    line = ["--model", "tiny", "--steps", "1", "--base_resolution", "32", "--size", "64"]
    line += ["--max_sequence_length", "16", "--prompt", "a sun", "--dtype", "float32"]
    sweep = [*line, "--seed", "0-1", "--output_dir", "out"]
    assert run(*sweep) == 0
    assert {row["guidance"] for row in table()} == {"0"}
    for path in Path("out").glob("seed_*.png"):
        record = records.read_record(path)
        record["flags"]["guidance"] = 3.5
        records.save_image(records.open_image(path), record, path)
    capsys.readouterr()
    assert run(*sweep) == 0
    assert "2 images, 2 finished" in capsys.readouterr().out
    assert run("--from", path, "--output", "again.png") == 0
    assert records.read_record("again.png")["flags"]["guidance"] == 0
    assert (np.asarray(Image.open("again.png")) == np.asarray(Image.open(path))).all()
    assert run("--from", path, "--guidance", "3.5", "--output", "other.png") == 2


def test_a_configuration_that_only_the_pipeline_shows(monkeypatch, capsys):
    """If it cannot be read before loading, the loaded transformer decides."""
    quiet(FluxPipeline(**tiny_components())).save_pretrained("tiny")
    load_json = catalog.load_hub_json

    def load(repo, file, revision=None):
        return {} if file.startswith("transformer") else load_json(repo, file, revision)

    monkeypatch.setattr(catalog, "load_hub_json", load)
    line = ["--model", "tiny", "--steps", "1", "--base_resolution", "32", "--size", "64"]
    line += ["--max_sequence_length", "16", "--dtype", "float32", "--output_dir", "out"]
    assert run(*line, "--guidance", "1,3.5,7") == 2
    assert "tiny takes none, expected 0" in capsys.readouterr().err
    assert not [*Path("out").glob("*.png")]
    assert run(*line, "--guidance", "0") == 0


@pytest.mark.parametrize("embeds", [False, True])
def test_a_distilled_qwen_image_gets_its_guidance(embeds):
    """Its pipeline needs a number if the transformer embeds the guidance, and else none."""

    class Recorder:
        _execution_device = "cpu"
        vae = SimpleNamespace(decoder=torch.nn.Identity())
        image_processor = VaeImageProcessor()
        transformer = SimpleNamespace(config=SimpleNamespace(guidance_embeds=embeds))

        def __call__(self, prompt=None, guidance_scale=None, output_type=None):
            self.guidance = guidance_scale
            return SimpleNamespace(images=torch.ones(1, 3, 8, 8))

    pipe = Recorder()
    sample.generate(pipe, "x", height=64, width=64, steps=2, guidance=0.0)
    assert pipe.guidance == (0.0 if embeds else None)
