"""What --model names is checked before the hub is asked, by a dry run too."""

import json
import os
from pathlib import Path

import huggingface_hub
import pytest
from conftest import run
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

SINGLE, MISSING = "a single file, expected", "a single file that does not exist, expected"
NO_FOLDER = "but there is no such folder"
NAMES = {  # value of --model -> part of the sentence
    "./f.gguf": f"{SINGLE} the model that it belongs to, for example --model flux-dev --transf",
    "f.gguf": SINGLE,
    "models/flux1-dev.safetensors": SINGLE,
    "pipe/transformer/weights.safetensors": SINGLE,
    "models/missing.safetensors": MISSING,
    "missing.gguf": MISSING,
    "MISSING.CKPT": MISSING,
    "owner/repo/flux1-dev.safetensors": MISSING,
    "./nowhere": NO_FOLDER,
    "../nowhere": NO_FOLDER,
    "/nowhere": NO_FOLDER,
    "~/nowhere": NO_FOLDER,
    "owner/repo/folder": NO_FOLDER,
    "owner/repo/": NO_FOLDER,
    "C:\\models\\flux": NO_FOLDER,
    "C:/models": NO_FOLDER,
    "owner/two words": NO_FOLDER,
    "https://huggingface.co/owner/repo": (
        "an address, expected a diffusers folder or a hub id such as owner/repo\n"
    ),
    "https://huggingface.co/owner/repo/tree/v2": "such as owner/repo --revision v2\n",
    "https://huggingface.co/owner/repo/blob/v2/sub/x.safetensors": (
        "--transformer FILE; if it is on the hub, get it by `hf download owner/repo sub/x.saf"
        "etensors --revision v2`"
    ),
    "https://civitai.com/api/download/models/1": "such as black-forest-labs/FLUX.1-dev\n",
    "hf://owner/repo": "an address, expected a diffusers folder or a hub id such as owner/repo\n",
    "huggingface.co/owner/repo": "such as owner/repo\n",
    "owner/repo@v2": f"{NO_FOLDER}, expected a diffusers folder or a hub id such as owner/repo --r",
    "owner/repo:v2": "such as owner/repo --revision v2\n",
    "owner/repo@main": "such as owner/repo\n",
    "pipe/model_index.json": "a file of a pipeline, expected its folder: --model pipe",
    "pipe/transformer/config.json": "a file, expected a diffusers folder",
    "pipe/transformer": "a part of the pipeline in",
    "around": "a folder around a pipeline",
    "models--a--b": "a folder around a pipeline",
    "models--c--d": "around 2 pipelines, expected one of them: snapshots/123, snapshots/456",
    "models": "expected a diffusers folder, or a file for its transformer: --model flux-dev --tr",
    "comfy": "a folder of single files",
    "adapter": "a LoRA, expected --lora",
    "encoder": "a model of transformers",
    "alone": "a FluxTransformer2DModel alone",
    "hollow": "an empty folder",
    "notes": "a folder without model_index.json",
    "notes/read.me": "a file, expected a diffusers folder",
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Change to a folder with what people have; the hub must not be asked."""

    def fail(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    contents = {
        "f.gguf": "",
        "models/flux1-dev.safetensors": "",
        "comfy/diffusion_models/flux.gguf": "",
        "pipe/model_index.json": "{}",
        "pipe/transformer/config.json": "{}",
        "pipe/transformer/weights.safetensors": "",
        "around/pipe/model_index.json": "{}",
        "models--a--b/snapshots/123/model_index.json": "{}",
        "models--c--d/snapshots/123/model_index.json": "{}",
        "models--c--d/snapshots/456/model_index.json": "{}",
        "adapter/adapter_config.json": "{}",
        "encoder/config.json": json.dumps({"architectures": ["T5EncoderModel"]}),
        "alone/config.json": json.dumps({"_class_name": "FluxTransformer2DModel"}),
        "notes/read.me": "",
    }
    for name, text in contents.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    os.mkdir("hollow")


def test_a_folder_has_no_revision(files, capsys):
    """A value without an effect would be in the record."""
    Path("pipe/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    real, dry = errors(capsys, "--model", "pipe", "--revision", "v2")
    assert real == dry
    assert "--revision is 'v2', but " in real


def errors(capsys, *words) -> list[str]:
    """Return what a run and a dry run print on stderr; both end with 2."""
    result = []
    for dry in ([], ["--dry_run"]):
        assert run(*words, "--device", "cpu", *dry) == 2
        result.append(capsys.readouterr().err)
    return result


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_pipeline(name, files, capsys):
    """One sentence names what it is and what to do; a dry run says the same."""
    real, dry = errors(capsys, "--model", name)
    assert real == dry
    assert real.count("\n") == 1
    assert NAMES[name] in real
    assert "network" not in real


def test_an_index_that_cannot_be_read(files, capsys):
    Path("pipe/model_index.json").write_text("spoiled")
    for dry in ([], ["--dry_run"]):
        assert run("--model", "pipe", "--device", "cpu", *dry) == 1
        assert "its model_index.json cannot be read" in capsys.readouterr().err


ANSWERS = {  # error of the hub -> exit code and part of the sentence
    RemoteEntryNotFoundError: (2, "a repository without model_index.json"),
    RepositoryNotFoundError: (1, "is not on the hub"),
    RevisionNotFoundError: (1, "check --revision"),
    GatedRepoError: (1, "accept its license"),
    LocalEntryNotFoundError: (0, "nothing could be read of owner/repo"),
}


@pytest.mark.parametrize("error", ANSWERS, ids=lambda error: error.__name__)
def test_what_the_hub_answers_counts_for_a_dry_run(error, monkeypatch, capsys):
    """A repository of single files, for example, gets no plan of FLUX.1-dev."""

    def refuse(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr("dype.pipelines.hub.is_local", lambda *_: False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    code, text = ANSWERS[error]
    assert run("--model", "owner/repo", "--dry_run") == code
    output = capsys.readouterr()
    assert text in output.err + output.out
    assert code == 0 or not output.out
