"""Weights that another file replaces under their name: a sweep and `--from` notice it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_DEMO, quiet, run, table, tiny_components
from diffusers import FluxPipeline
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

import dype
import run_dype
from dype.pipelines import fingerprint
from dype.sampling import records
from dype.sampling import run as sampling_run
from dype.sweep import run as sweep_run

pytestmark = pytest.mark.usefixtures("in_tmp_path")
DEMO = Path(dype.__file__).parent / "demo" / "weights"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LINE = [*TINY_DEMO, "--size", "64", "--prompt", "a sun", "--output_dir", "out"]


def write_lora(path, seed):
    """Write a LoRA for the demo's first block."""
    generator = torch.Generator().manual_seed(seed)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    width = load_file(DEMO / "transformer" / "diffusion_pytorch_model.safetensors")[
        layer.removeprefix("transformer.") + ".weight"
    ].shape[1]
    save_file(
        {
            f"{layer}.lora_A.weight": torch.randn(2, width, generator=generator),
            f"{layer}.lora_B.weight": torch.randn(width, 2, generator=generator),
        },
        path,
    )


def retrain(folder, component):
    """Change every number in the weights of a component a little, as a training does."""
    [path] = Path(folder, component).glob("*.safetensors")
    scale(path)


def scale(path):
    """Multiply every number in a file by 1.01."""
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path)


def change_config(folder):
    """Change the configuration of the autoencoder, which the image depends on."""
    path = Path(folder, "vae", "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.5}))


def write_lora_folder(seed):
    Path("lora").mkdir(exist_ok=True)
    write_lora("lora/pytorch_lora_weights.safetensors", seed)


SOURCES = {  # the flags of the source, what writes it, what changes it
    "a LoRA file": (
        ["--lora", "m.safetensors"],
        lambda: write_lora("m.safetensors", 1),
        lambda: write_lora("m.safetensors", 2),
    ),
    "a LoRA folder": (
        ["--lora", "lora:0.7"],
        lambda: write_lora_folder(1),
        lambda: write_lora_folder(2),
    ),
    "a file of a transformer": (
        ["--transformer", "t.safetensors"],
        lambda: shutil.copy(DEMO / WEIGHTS, "t.safetensors"),
        lambda: scale("t.safetensors"),
    ),
    "the transformer": (
        ["--model", "copy"],
        lambda: shutil.copytree(DEMO, "copy"),
        lambda: retrain("copy", "transformer"),
    ),
    "a text encoder": (
        ["--model", "copy"],
        lambda: shutil.copytree(DEMO, "copy"),
        lambda: retrain("copy", "text_encoder_2"),
    ),
    "a configuration": (
        ["--model", "copy"],
        lambda: shutil.copytree(DEMO, "copy"),
        lambda: change_config("copy"),
    ),
}
FOLDER_FLAGS = ["--max_sequence_length", "16", "--dtype", "float32"]


@pytest.mark.parametrize("name", SOURCES)
def test_replaced_weights(name, capsys):
    """A sweep and --from refuse them with exit code 2, and write nothing."""
    flags, write, change = SOURCES[name]
    if "--lora" in flags:
        pytest.importorskip("peft")
    write()
    line = [*LINE, *flags, *(FOLDER_FLAGS if "--model" in flags else [])]
    assert run(*line, "--seed", "0-1") == 0
    image = next(Path("out").glob("seed_0*.png"))
    change()
    before = {path: path.read_bytes() for path in Path("out").glob("*.*")}
    source = str(Path(flags[1].partition(":")[0]).absolute())
    # new seeds alone would stand beside images of the old weights on the contact sheet
    for seeds in ("0-2", "2-3"):
        for words in ([], ["--dry_run"]):
            capsys.readouterr()
            assert run(*line, "--seed", seeds, *words) == 2
            error = capsys.readouterr().err
            assert f"{flags[0]} {source} has other weights than when {image}" in error
            assert "expected the same, --overwrite, or another --output_dir" in error
    for words in ([], ["--dry_run"]):
        assert run("--from", image, "--output", "other.png", *words) == 2
        error = capsys.readouterr().err
        assert f"{flags[0]} {source} has other weights than when the --from image" in error
        assert f"or the flag {flags[0]} for the new ones" in error
    assert {path: path.read_bytes() for path in Path("out").glob("*.*")} == before
    assert not Path("other.png").exists()


def test_ways_on_after_a_change():
    """The flag with --from, and --overwrite with a sweep, take the new weights."""
    pytest.importorskip("peft")
    write_lora("m.safetensors", 1)
    line = [*LINE, "--lora", "m.safetensors"]
    assert run(*line, "--seed", "0-1") == 0
    image = next(Path("out").glob("seed_0*.png"))
    old = np.asarray(Image.open(image))
    write_lora("m.safetensors", 2)
    assert run("--from", image, "--lora", "m.safetensors", "--output", "new.png") == 0
    new = np.asarray(Image.open("new.png"))
    assert (new != old).any()
    assert run(*line, "--seed", "0-1", "--overwrite") == 0
    assert (np.asarray(Image.open(image)) == new).all()
    assert run(*line, "--seed", "0-2") == 0
    values = [records.read_record(path)["weights"] for path in Path("out").glob("seed_*.png")]
    assert values == [values[0]] * 3


def test_weights_that_are_the_same():
    """A touched file, a README and another scale of a LoRA stop nothing."""
    pytest.importorskip("peft")
    write_lora("m.safetensors", 1)
    line = [*LINE, "--lora", "m.safetensors", "--seed", "0-1"]
    assert run(*line) == 0
    content = Path("m.safetensors").read_bytes()
    Path("m.safetensors").write_bytes(content)
    Path("README.md").write_text("new")
    assert run(*line) == 0
    assert run(*LINE, "--lora", "m.safetensors:0.5", "--seed", "0-1") == 0
    assert len(table()) == 4


def test_weights_that_another_file_replaces(capsys):
    """With --transformer those of the folder have no effect, so a change of them stops nothing."""
    shutil.copytree(DEMO, "copy")
    shutil.copy(DEMO / WEIGHTS, "t.safetensors")
    line = [*LINE, "--model", "copy", *FOLDER_FLAGS, "--transformer", "t.safetensors"]
    assert run(*line, "--seed", "0-1") == 0
    retrain("copy", "transformer")
    assert run(*line, "--seed", "0-1") == 0
    assert "2 images, 2 finished" in capsys.readouterr().out


def test_records_of_earlier_versions():
    """They have no fingerprint, so their images count as finished, and --from draws them."""
    shutil.copytree(DEMO, "copy")
    line = [*LINE, "--model", "copy", *FOLDER_FLAGS, "--seed", "0-1"]
    assert run(*line) == 0
    for path in Path("out").glob("seed_*.png"):
        record = records.read_record(path)
        assert len(record.pop("weights")["model"]) == 16
        records.save_image(records.open_image(path), record, path)
    retrain("copy", "transformer")
    assert run(*line) == 0
    assert run("--from", path, "--output", "again.png", "--dry_run") == 0


def test_records_of_the_first_demo(monkeypatch, capsys):
    """Without a fingerprint they count as its own: refused, unless the weights are still those."""
    assert run(*LINE, "--seed", "0-1") == 0
    images = sorted(Path("out").glob("seed_*.png"))
    for path in images:
        record = records.read_record(path)
        weights = record.pop("weights")
        record["flags"] |= {"guidance": 0.0, "true_cfg": 5.0, "negative_prompt": ""}
        records.save_image(records.open_image(path), record, path)
    sentence = "--model demo has other weights than when"
    for words in (["--seed", "0-1"], ["--seed", "2-3"], ["--seed", "0-1", "--dry_run"]):
        capsys.readouterr()
        assert run(*LINE, *words) == 2
        [error] = capsys.readouterr().err.splitlines()
        assert f"{sentence} {images[0]} was generated" in error
    assert run("--from", path, "--output", "again.png") == 2
    [error] = capsys.readouterr().err.splitlines()
    assert f"{sentence} the --from image was generated" in error
    assert run("--from", path, "--model", "demo", "--output", "again.png", "--dry_run") == 0
    monkeypatch.setattr(fingerprint, "FIRST_DEMO", weights["model"])
    assert run("--from", path, "--output", "again.png", "--dry_run") == 0


def test_a_repository_whose_branch_moved(monkeypatch, tmp_path, capsys):
    """The commit of a hub id is compared too; --from takes the commit of the record."""
    repo = tmp_path / "models--owner--tiny"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commits = "a" * 40, "b" * 40
    for commit in commits:
        quiet(FluxPipeline(**tiny_components())).save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()

    def download(name, file, revision=None, local_files_only=False):
        path = repo / "snapshots" / (revision or (repo / "refs" / "main").read_text()) / file
        if name != "owner/tiny" or not path.is_file():
            raise FileNotFoundError(file)
        return str(path)

    def load(*args, entry, revision, **settings):
        commit = revision or (repo / "refs" / "main").read_text()
        folder = str(repo / "snapshots" / commit)
        entry = entry.__class__(**vars(entry) | {"repo": folder})
        return load_pipeline(folder, entry=entry, revision=None, **settings)

    load_pipeline = sampling_run.load_pipeline
    monkeypatch.setattr(sampling_run, "load_pipeline", load)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    line = [*LINE, "--model", "owner/tiny", *FOLDER_FLAGS, "--device", "cpu"]
    for commit, code in zip((commits[0], commits[0], commits[1]), (0, 0, 2), strict=True):
        (repo / "refs" / "main").write_text(commit)
        assert run(*line, "--seed", "0-1") == code
    assert "--model owner/tiny has other weights than" in capsys.readouterr().err
    image = next(Path("out").glob("seed_0*.png"))
    assert records.read_record(image)["commit"] == commits[0]
    assert run("--from", image, "--output", "again.png") == 0
    assert records.read_record("again.png")["commit"] == commits[0]


def test_a_lora_of_the_hub(monkeypatch, capsys):
    """Its commit is in the record, and compared."""
    pytest.importorskip("peft")
    write_lora("m.safetensors", 1)
    load_pipeline, commit = sampling_run.load_pipeline, "a" * 40

    def load(*args, loras, **settings):
        return load_pipeline(*args, loras=[("m.safetensors", 1.0)], **settings)

    monkeypatch.setattr(sampling_run, "load_pipeline", load)
    monkeypatch.setattr(run_dype, "check_reached", lambda *_: None)  # because the file has no hub
    monkeypatch.setattr(fingerprint, "hub_commit", lambda repo, revision: commit)
    line = [*LINE, "--lora", "owner/lora", "--seed", "0-1"]
    assert run(*line) == 0
    image = next(Path("out").glob("seed_0*.png"))
    assert records.read_record(image)["weights"]["lora 1"] == commit
    assert run(*line) == 0
    commit = "b" * 40
    assert run(*line) == 2
    assert "--lora owner/lora has other weights" in capsys.readouterr().err
    assert run("--from", image, "--output", "again.png") == 2
    assert run("--from", image, "--lora", "owner/lora", "--output", "again.png") == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of maps")
def test_weights_that_change_while_a_sweep_runs(monkeypatch, capsys):
    """A file that is written in place ends the sweep; one that replaces another does not."""
    shutil.copytree(DEMO, "copy")
    weights = Path("copy/transformer/diffusion_pytorch_model.safetensors")
    tensors = {name: value.float() for name, value in load_file(weights).items()}
    save_file(tensors, weights)  # in the format of --dtype, so that no copy is made
    old, generate = weights.read_bytes(), sampling_run.multipass.run_passes

    def replace():
        save_file({name: value * 2 for name, value in tensors.items()}, "new")
        Path("new").replace(weights)

    def write_in_place():
        with weights.open("r+b") as file:
            file.seek(len(old) // 2)
            file.write(b"\0" * 100)

    for change, code in ((replace, 0), (write_in_place, 1)):
        weights.write_bytes(old)
        changes = iter([change])

        def spy(*args, changes=changes, **settings):
            next(changes, lambda: None)()
            return generate(*args, **settings)

        monkeypatch.setattr(sampling_run.multipass, "run_passes", spy)
        folder = change.__name__
        line = [*LINE[:-1], folder, "--model", "copy", *FOLDER_FLAGS]
        assert run(*line, "--seed", "0-1") == code
        images = [*Path(folder).glob("seed_*.png")]
        assert len(images) == (0 if code else 2)
        values = {records.read_record(path)["weights"]["model"] for path in images}
        assert values <= {fingerprint.fingerprint("copy")} or change is replace
        assert len(values) == len(images[:1])
    assert "was changed while its weights were in use" in capsys.readouterr().err


def test_weights_that_change_while_they_are_loaded(monkeypatch, capsys):
    shutil.copytree(DEMO, "copy")
    load_pipeline = sampling_run.load_pipeline

    def load(*args, **settings):
        pipe = load_pipeline(*args, **settings)
        retrain("copy", "vae")
        return pipe

    monkeypatch.setattr(sampling_run, "load_pipeline", load)
    assert run(*LINE, "--model", "copy", *FOLDER_FLAGS) == 1
    assert "was changed while its weights were in use" in capsys.readouterr().err
    assert not [*Path("out").glob("*.png")]


def test_a_broken_image_beside_a_sweep():
    """Images that are not of the sweep may be anything, as long as no weights differ."""
    assert run(*LINE, "--seed", "0-1") == 0
    first, second = sorted(Path("out").glob("seed_*.png"))
    first.write_bytes(b"spoiled")
    record = records.read_record(second)
    records.save_image(
        Image.new("RGB", (8, 8)), record | {"flags": {"model": "demo", "lora": [1]}}, second
    )
    assert run(*LINE, "--seed", "2-3") == 0
    assert sweep_run.read_folder([], Path("out"), overwrite=True)
