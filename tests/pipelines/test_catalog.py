"""Models by name and by folder, from the command line."""

import numpy as np
import pytest
from PIL import Image
from tiny import FAMILIES, qwen3

import run_dype
from dype.families import FAMILIES as CLASSES
from dype.pipelines.catalog import MODELS, resolve_model
from dype.sampling import records


def test_z_image_from_the_command_line(in_tmp_path, capsys):
    """A folder gets its class's defaults; with --guidance a negative prompt has an effect."""
    FAMILIES["z-image"][0](**qwen3()).save_pretrained("tiny")
    size = ["--height", "128", "--width", "64", "--steps", "2", "--base_resolution", "64"]
    text = ["--dtype", "float32", "--prompt", "a red sun", "--max_sequence_length", "16"]
    common = ["--model", "tiny", *size, *text]
    assert run_dype.main([*common, "--output", "a.png"]) == 0
    assert run_dype.main([*common, "--output", "b.png", "--negative_prompt", "leaves"]) == 0
    assert run_dype.main([*common, "--output", "c.png", "--method", "base"]) == 0
    record = records.read_record("b.png")
    assert record["flags"]["guidance"] == 5.0
    assert record["shift"] == "static"
    assert record["sigmas"][:2] == pytest.approx([1.0, 0.75])
    assert run_dype.main(["--from", "b.png", "--output", "again.png"]) == 0
    images = {name: np.asarray(Image.open(f"{name}.png")) for name in ("a", "b", "c", "again")}
    assert images["a"].shape == (128, 64, 3)
    assert (images["b"] == images["again"]).all()
    assert (images["a"] != images["b"]).any()
    assert (images["a"] != images["c"]).any()
    assert run_dype.main([*common, "--true_cfg", "3"]) == 2
    assert "the guidance of" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_every_model_resolves(name, capsys):
    assert run_dype.main(["--model", name, "--dry_run", "full"]) == 0
    out = capsys.readouterr().out
    assert f"base_resolution      {MODELS[name].base_resolution}" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model z-image-turbo --guidance 3", "takes none"),
        ("--model z-image --guidance 0 --negative_prompt fog", "ignored at --guidance 0"),
        ("--model z-image --max_shift 1", "schedule is static"),
        ("--model flux2-dev --negative_prompt fog", "ignored by flux2-dev"),
        ("--model flux2-dev --shift model --max_shift 2", "its own rule"),
        ("--model qwen-image --true_cfg 1 --negative_prompt fog", "ignored at --true_cfg 1"),
        ("--model qwen-image --steps 1", "expected at least 2"),
        ("--model qwen-image --vae_device cpu", "is for FLUX.1 pipelines"),
        ("--model chroma --true_cfg 2", "--guidance"),
        ("--model z-image --magic_suffix", "is for qwen-image"),
    ],
)
def test_refused_flags(line, message, capsys):
    assert run_dype.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_magic_suffix_is_off_by_default(capsys):
    for flags, ending in (([], "birch trees."), (["--magic_suffix"], "cinematic composition.")):
        assert run_dype.main(["--model", "qwen-image", "--dry_run", "full", *flags]) == 0
        prompt = next(li for li in capsys.readouterr().out.splitlines() if "  prompt " in li)
        assert prompt.endswith(ending)


def test_class_of_a_folder(tmp_path):
    """The index decides the defaults, and whether they are the distilled model's."""

    def resolve(index: str):
        (tmp_path / "model_index.json").write_text(index)
        return resolve_model(str(tmp_path))

    assert resolve('{"_class_name": "QwenImagePipeline"}').base_resolution == 1328
    assert resolve('{"_class_name": "Krea2Pipeline"}').steps == 28
    assert resolve('{"_class_name": "Krea2Pipeline", "is_distilled": true}').steps == 8
    assert resolve("spoiled").family is CLASSES["FluxTransformer2DModel"]
    with pytest.raises(ValueError, match="is a FluxFillPipeline, expected FluxPipeline"):
        resolve('{"_class_name": "FluxFillPipeline"}')
    local = tmp_path / "Z-Image-Turbo"
    local.mkdir()
    (local / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    assert resolve_model(str(local)).steps == 9
    (local / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert resolve_model(str(local)).steps == 28
    weights = tmp_path / "weights"  # because the demo's folder has this name
    weights.mkdir()
    (weights / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert resolve_model(str(weights)).base_resolution == 1024
    (weights / "scheduler").mkdir()
    (weights / "scheduler" / "scheduler_config.json").write_text('{"shift": 2.0}')
    assert resolve_model(str(weights)).scheduler_config == {"shift": 2.0}


def test_a_pipeline_that_needs_an_image_is_refused(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPipeline"}')
    for flags in ([], ["--dry_run"]):
        assert run_dype.main(["--model", str(tmp_path), *flags]) == 2
        assert "is a QwenImageEditPipeline, expected" in capsys.readouterr().err
