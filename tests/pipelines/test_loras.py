"""LoRAs by file, folder, hub id and file of a repository, and files that are none."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import quiet, run, tiny_components
from diffusers import FluxPipeline
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from dype.cli.validation import normalize_lora
from dype.errors import UserError
from dype.pipelines.hub import load_hub_json, repository_info
from dype.pipelines.loras import find_lora

SMALL = ["--size", "64", "--steps", "1", "--base_resolution", "32", "--prompt", "ring"]
SMALL += ["--max_sequence_length", "16"]
DEFAULT = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tiny pipeline `flux` and a LoRA for it, `lora.safetensors`."""
    peft = pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("models")
    pipe = quiet(FluxPipeline(**tiny_components()))
    pipe.save_pretrained(path / "flux")
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v"]
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    weights = peft.utils.get_peft_model_state_dict(pipe.transformer)
    FluxPipeline.save_lora_weights(path, transformer_lora_layers=weights)
    (path / DEFAULT).rename(path / "lora.safetensors")
    return path


@pytest.fixture(autouse=True)
def files(folder, tmp_path, monkeypatch):
    """Change to a folder with LoRAs as people have them."""
    monkeypatch.chdir(tmp_path)
    for name in ("single/mine", "epochs/epoch_1", "epochs/epoch_2", "default/pytorch_lora_weights",
                 "default/epoch_1", "deep/sub/a", "local/repo/a"):  # fmt: skip
        file = Path(f"{name}.safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "lora.safetensors", file)
    Path("single/._mine.safetensors").write_text("of macOS")
    Path("capital").mkdir()
    shutil.copy(folder / "lora.safetensors", "capital/A.SAFETENSORS")
    Path("bin").mkdir()
    torch.save({}, "bin/a.bin")


@pytest.fixture
def hub(folder, monkeypatch):
    """Stand in for the hub with two repositories; returns the downloaded files."""
    repositories = {
        "owner/many": ["README.md", "anime.safetensors", "sub/fur.safetensors"],
        "owner/single": ["only.safetensors", "checkpoint-500/only.safetensors"],
        "owner/bin": ["a.bin"],
    }
    downloads = []

    def repo_info(api, repo, *, revision, timeout):
        if repo not in repositories:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        files = [SimpleNamespace(rfilename=name) for name in repositories[repo]]
        return SimpleNamespace(siblings=files, sha="a" * 40)

    def hf_hub_download(repo, file, *, revision=None, local_files_only=False):
        if local_files_only or file not in repositories.get(repo, []):
            raise LocalEntryNotFoundError("not here")
        downloads.append((repo, file))
        return str(folder / "lora.safetensors")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    repository_info.cache_clear()
    yield downloads
    repository_info.cache_clear()


def both(capsys, folder, code: int, lora) -> str:
    """Return the one sentence that a run and a dry run end with."""
    sentences = set()
    for dry in ([], ["--dry_run"]):
        assert run("--model", folder / "flux", "--lora", lora, *SMALL, *dry) == code
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        sentences.add(err)
    assert not Path("outputs").exists()
    [sentence] = sentences
    return sentence


def test_forms_of_the_flag():
    """A number after the last colon is the scale, a path after it is a part of the name."""
    forms = {
        "a.safetensors": "a.safetensors:1.0",
        "a.safetensors:0.5": "a.safetensors:0.5",
        "C:\\loras\\a.safetensors": "C:\\loras\\a.safetensors:1.0",
        "C:\\loras\\a.safetensors:0.8": "C:\\loras\\a.safetensors:0.8",
        "C:/loras/a.safetensors:-1": "C:/loras/a.safetensors:-1.0",
        "owner/repo/sub/a.safetensors:2": "owner/repo/sub/a.safetensors:2.0",
        "single/mine.safetensors:2": f"{Path('single/mine.safetensors').absolute()}:2.0",
        "https://huggingface.co/owner/repo": "https://huggingface.co/owner/repo:1.0",
    }
    assert {text: normalize_lora(text) for text in forms} == forms
    Path("odd:0.5").touch()  # a path that exists wins
    assert normalize_lora("odd:0.5") == f"{Path('odd:0.5').absolute()}:1.0"
    for text in ("a.safetensors:", "a.safetensors:high", "a:nan", "a:101"):
        with pytest.raises(UserError, match="expected PATH or PATH:SCALE"):
            normalize_lora(text)


def test_the_file_of_a_path(hub):
    """A folder with one file, or with diffusers' name, is that file; a local path wins."""
    for path, file in {
        "single": "single/mine.safetensors",
        "single/": "single/mine.safetensors",
        "capital": "capital/A.SAFETENSORS",
        "default": f"default/{DEFAULT}",
        "epochs/epoch_1.safetensors": "epochs/epoch_1.safetensors",
        "local/repo": "local/repo/a.safetensors",
        "local/repo/a.safetensors": "local/repo/a.safetensors",
    }.items():
        assert find_lora(path, download=True) == file
    assert not hub
    for path, file in {
        "owner/single": ("owner/single", "only.safetensors"),
        "owner/many/anime.safetensors": ("owner/many", "anime.safetensors"),
        "owner/many/sub/fur.safetensors": ("owner/many", "sub/fur.safetensors"),
    }.items():
        assert find_lora(path, download=False) is None
        assert not hub
        assert Path(find_lora(path, download=True)).name == "lora.safetensors"
        assert hub == [file]
        hub.clear()


def test_without_a_network_the_copy_on_this_machine_counts(folder, monkeypatch):
    """Of a repository; the tests run offline."""
    cache = Path("cache")
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(cache))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file, **_: str(cache / file)
    )
    shutil.copy(folder / "lora.safetensors", cache / "a.safetensors")
    assert find_lora("owner/repo", download=True) == str(cache / "a.safetensors")
    shutil.copy(folder / "lora.safetensors", cache / "b.safetensors")
    with pytest.raises(UserError, match="2 files: a"):
        find_lora("owner/repo", download=False)


NO_LORA = {  # value of --lora -> part of the sentence
    "epochs": "has 2 files: epoch_1.safetensors, epoch_2.safetensors; expected one of them, as",
    "epochs:0.5": "has 2 files: epoch_1.safetensors, epoch_2.safetensors; expected one of them, as",
    "deep": "a folder without .safetensors files, expected one; it has",
    "bin": "a folder without .safetensors files, expected one; it has a.bin",
    "owner/many": "2 files: anime.safetensors, sub/fur.safetensors; expected one of them",
    "owner/many/none.safetensors": "has no none.safetensors, expected one of anime.safetensors, ",
    "owner/bin": "has no .safetensors file",
    "owner/many/sub": "there is no such file or folder",
    "owner/many@main/anime.safetensors": "there is no such file or folder",
    "none.safetensors": "there is no such file or folder",
    "nowhere/none.safetensors": "there is no such file or folder",
    "./nowhere": "there is no such file or folder",
    "C:\\loras\\a.safetensors:0.8": "there is no such file or folder",
    "https://huggingface.co/owner/many": "revision), as --lora owner/many",
    "https://huggingface.co/owner/many/blob/main/anime.safetensors:0.8": (
        "revision), as --lora owner/many/anime.safetensors"
    ),
    "https://civitai.com/api/download/models/1": "FILE.safetensors (its newest revision)\n",
    "owner/many@v2": "revision), as --lora owner/many\n",
    "owner/many/": "revision), as --lora owner/many\n",
    "owner/many/x.gguf": "there is no such file or folder",
}


@pytest.mark.parametrize("text", NO_LORA)
def test_names_that_lead_to_no_lora(text, folder, hub, capsys):
    """One sentence before anything is loaded; a dry run says the same."""
    assert NO_LORA[text] in both(capsys, folder, 2, text)


@pytest.mark.parametrize("text", ["owner/many", "owner/many/anime.safetensors"])
def test_without_a_network_the_hub_is_asked_once(text, folder, hub, monkeypatch, capsys):
    """The HTTP client's error, which is no OSError, ends in a sentence."""
    questions = []

    def refuse(api, repo, **arguments):
        questions.append(repo)
        raise HTTPError("Name or service not known")

    def miss(repo, file, *, local_files_only, revision=None):
        assert local_files_only  # because a download repeats its question for 23 s
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", miss)
    assert run("--model", folder / "flux", "--lora", text, *SMALL, "--dry_run") == 0
    assert f"the LoRA {text} is not on this machine" in capsys.readouterr().out
    assert run("--model", folder / "flux", "--lora", text, *SMALL) == 1
    assert "the hub cannot be reached" in capsys.readouterr().err
    assert load_hub_json("owner/many", "config.json") == {}
    assert questions == ["owner/many"]


def test_a_repository_that_does_not_exist(folder, hub, capsys):
    assert "nobody/nothing is not on the hub" in both(capsys, folder, 1, "nobody/nothing")


def change_lora(folder, rename=lambda name: name, change=lambda tensor: tensor) -> dict:
    """Return the tensors of the LoRA by other names or with other values."""
    weights = load_file(folder / "lora.safetensors")
    return {rename(name): change(tensor).contiguous() for name, tensor in weights.items()}


KOHYA = "lora_unet_down_blocks_0_attentions_0_proj_in"  # of Stable Diffusion
FILES = {  # name -> (part of the sentence, function of the folder -> tensors)
    "LoKr": ("a LoKr of LyCORIS", lambda folder: {"double_blocks_0.lokr_w1": torch.ones(2, 2)}),
    "LoHa": ("a LoHa of LyCORIS", lambda folder: {"double_blocks_0.hada_w1_a": torch.ones(2, 2)}),
    "Stable Diffusion": (
        "does not fit",
        lambda folder: {f"{KOHYA}.lora_{x}.weight": torch.ones(2, 2) for x in ("down", "up")},
    ),
    "textual inversion": ("a textual inversion", lambda folder: {"emb_params": torch.ones(2, 2)}),
    "embedding": ("a textual inversion", lambda folder: {"clip_l": torch.ones(2, 2)}),
    "transformer": (
        "or --transformer FILE",
        lambda folder: load_file(folder / "flux/transformer/diffusion_pytorch_model.safetensors"),
    ),
    "autoencoder": (
        "an autoencoder, expected a LoRA",
        lambda folder: load_file(folder / "flux/vae/diffusion_pytorch_model.safetensors"),
    ),
    "text encoder's": (
        "none of its layers is in the FluxTransformer2DModel",
        lambda folder: change_lora(folder, lambda name: f"text_encoder.{name[12:]}"),
    ),
    "other layers": (
        "none of its layers is in the FluxTransformer2DModel",
        lambda folder: change_lora(folder, lambda name: name.replace("blocks", "layers")),
    ),
    "other sizes": (
        "is 32x32, not as in the LoRA",
        lambda folder: change_lora(folder, change=lambda x: x[:, :1] if x.shape[0] == 2 else x),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_lora_of_this_model(name, folder, capsys):
    """One sentence before anything is loaded; a dry run says the same."""
    text, tensors = FILES[name]
    save_file(tensors(folder), "x.safetensors")
    assert text in both(capsys, folder, 2, "x.safetensors")


def test_files_of_other_formats(folder, capsys):
    assert "a file of torch.save, convert it" in both(capsys, folder, 1, "bin/a.bin")
    whole = (folder / "lora.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-100])
    assert "not a readable safetensors file" in both(capsys, folder, 1, "cut.safetensors:0.5")
    assert "a whole pipeline, expected --model" in both(capsys, folder, 2, folder / "flux")


def test_a_file_of_a_repository_changes_the_image(folder, hub):
    """As the same file on this machine does; the record has the name on the hub."""
    images = {}
    for name, lora in {
        "file": folder / "lora.safetensors",
        "folder": "single",
        "hub": "owner/many/sub/fur.safetensors:1",
        "half": "owner/many/anime.safetensors:0.5",
    }.items():
        words = ["--model", folder / "flux", *SMALL, "--lora", lora, "--output", f"{name}.png"]
        assert run(*words) == 0
        images[name] = np.asarray(Image.open(f"{name}.png"))
    assert (images["file"] == images["folder"]).all()
    assert (images["file"] == images["hub"]).all()
    assert (images["file"] != images["half"]).any()
    assert run("--from", "hub.png", "--output", "again.png") == 0
    assert (images["hub"] == np.asarray(Image.open("again.png"))).all()
    assert hub[-1] == ("owner/many", "sub/fur.safetensors")


def test_without_peft(folder, monkeypatch, capsys):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "peft" else find_spec(name, *a),
    )
    assert "pip install peft" in both(capsys, folder, 1, folder / "lora.safetensors")
