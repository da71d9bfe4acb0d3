"""Fingerprints of weights: what changes them, and what does not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from dype.families import DEMO_WEIGHTS
from dype.pipelines import fingerprint as module
from dype.pipelines.fingerprint import find_changed_weights, fingerprint, is_mapped

COMMIT, NEW_COMMIT = "a" * 40, "b" * 40


def write_weights(path, seed=0, count=3, size=4000, **changes):
    """Write a safetensors file of `count` random tensors; `changes` replace some of them."""
    tensors = {
        f"t{i}": torch.randn(size, generator=torch.Generator().manual_seed(10 * seed + i))
        for i in range(count)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | changes, path)


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder with a sharded transformer, and files that nothing loads."""
    path = tmp_path / "pipeline"
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "image_encoder": [None, None]}
    for i in (1, 2):
        name = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        write_weights(path / "transformer" / name, i)
    write_weights(path / "flux1-dev.safetensors")
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "merges.txt").write_text("a b")
    (path / "transformer" / "config.json").write_text('{"guidance_embeds": true}')
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "README.md").write_text("A model.")
    return path


CHANGES = {
    "a shard": ("transformer/diffusion_pytorch_model-00002-of-00002.safetensors", True),
    "a further shard": ("transformer/diffusion_pytorch_model-00003-of-00003.safetensors", True),
    "a configuration": ("transformer/config.json", True),
    "a tokenizer": ("tokenizer/merges.txt", True),
    "the index": ("model_index.json", True),
    "the README": ("README.md", False),
    "a single file beside the folders": ("flux1-dev.safetensors", False),
    "a note": ("transformer/NOTES.md", False),
    "a variant": ("transformer/diffusion_pytorch_model.fp16.safetensors", False),
    "another format": ("transformer/diffusion_pytorch_model.bin", False),
    "an index of shards": ("transformer/diffusion_pytorch_model.safetensors.index.json", False),
    "a folder of no component": ("image_encoder/model.safetensors", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_folder_is_loaded_from_counts(folder, name):
    file, counts = CHANGES[name]
    before = fingerprint(str(folder))
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    if path.name == "model_index.json":
        path.write_text(content.decode().replace("CLIPTokenizer", "CLIPTokenizerFast"))
    else:
        path.write_bytes(content + b" ")
    assert (fingerprint(str(folder)) != before) == counts


def test_the_weights_of_a_replaced_transformer_do_not_count(folder):
    """As with --transformer; its configuration does."""
    before = fingerprint(str(folder), None, None, "transformer")
    assert before != fingerprint(str(folder))
    name = "diffusion_pytorch_model-00001-of-00002.safetensors"
    write_weights(folder / "transformer" / name, 5)
    assert fingerprint(str(folder), None, None, "transformer") == before
    (folder / "transformer" / "config.json").write_text("{}")
    assert fingerprint(str(folder), None, None, "transformer") != before


def test_names_above_dates_and_links_do_not_count(folder, tmp_path):
    """A moved, copied, touched or linked folder has the same weights; so has a moved file."""
    before = fingerprint(str(folder))
    copy = shutil.copytree(folder, tmp_path / "copy")
    for file in copy.rglob("*"):
        os.utime(file, (1, 1))
    links = tmp_path / "snapshot"  # as in the hub's cache
    for file in folder.rglob("*"):
        if file.is_file():
            link = links / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    assert fingerprint(str(copy)) == fingerprint(str(links)) == before
    write_weights(tmp_path / "a.safetensors")
    before = fingerprint(str(tmp_path / "a.safetensors"))
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert fingerprint(str(tmp_path / "b.safetensors")) == before


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".gguf"])
def test_samples_of_a_large_file(tmp_path, monkeypatch, suffix):
    """A change of every tensor, of one tensor or of the header is noticed without a full read."""
    monkeypatch.setattr(module, "WHOLE", 1000)
    path = tmp_path / f"a{suffix}"
    sizes = {"count": 50, "size": 20_000}
    write_weights(path, **sizes)
    before, size = fingerprint(str(path)), path.stat().st_size
    with path.open("rb") as file:
        read = sum(end - begin for begin, end in module.list_blocks(file, size))
    assert suffix != ".safetensors" or read < size / 5
    write_weights(path, seed=1, **sizes)
    assert path.stat().st_size == size
    assert fingerprint(str(path)) != before
    write_weights(path, **sizes, t31=torch.zeros(20_000))
    assert path.stat().st_size == size
    assert fingerprint(str(path)) != before
    write_weights(path, **sizes)
    assert fingerprint(str(path)) == before
    content = path.read_bytes()
    path.write_bytes(content[:-40_000] + b"\0" * 40_000)  # half of the last tensor
    assert fingerprint(str(path)) != before
    path.write_bytes(content.replace(b'"t31"', b'"u31"', 1))
    assert fingerprint(str(path)) != before


def test_a_change_with_the_same_size_and_date(tmp_path):
    path = tmp_path / "a.safetensors"
    write_weights(path, 1)
    status, before = path.stat(), fingerprint(str(path))
    write_weights(path, 2)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(str(path)) != before


NO_WEIGHTS = [b"", b"x", b"\0" * 7, b"\xff" * 9, b"\2" + b"\0" * 7 + b"[]"]
NO_WEIGHTS += [b"\x1f" + b"\0" * 7 + b'{"t": {"data_offsets": [-99,7]}}']


@pytest.mark.parametrize("content", NO_WEIGHTS)
def test_files_that_are_no_weights(tmp_path, monkeypatch, content):
    """They get a fingerprint too; the loader says what is wrong with them."""
    monkeypatch.setattr(module, "WHOLE", -1)
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert len(fingerprint(str(path))) == 16


def test_a_folder_that_is_no_pipeline(tmp_path):
    """Its weights count, as those of a folder with a LoRA; a broken index is no error."""
    assert len(fingerprint(str(tmp_path))) == 16
    write_weights(tmp_path / "pytorch_lora_weights.safetensors", 1)
    before = fingerprint(str(tmp_path))
    write_weights(tmp_path / "pytorch_lora_weights.safetensors", 2)
    assert fingerprint(str(tmp_path)) != before
    before = fingerprint(str(tmp_path))
    write_weights(tmp_path / "epoch_2.safetensors", 3)  # diffusers' default is loaded
    assert fingerprint(str(tmp_path)) == before
    (tmp_path / "upper").mkdir()
    hashes = set()
    for seed in (1, 2):
        write_weights(tmp_path / "upper" / "A.SAFETENSORS", seed)
        hashes.add(fingerprint(str(tmp_path / "upper")))
    assert len(hashes) == 2
    (tmp_path / "model_index.json").write_text("spoiled")
    assert len(fingerprint(str(tmp_path))) == 16
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    assert fingerprint(str(tmp_path / "broken")) is None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub, without a network; returns a function that sets a repository's commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def set_commit(repo, commit, revision="main"):
        path = tmp_path / f"models--{repo.replace('/', '--')}" / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)

    return set_commit


def test_the_commit_of_a_repository(hub):
    """It is known without a network if the repository is in the cache."""
    assert fingerprint("owner/lora") is None
    hub("owner/lora", COMMIT)
    hub("owner/lora", NEW_COMMIT, "v2")
    assert fingerprint("owner/lora") == COMMIT
    assert fingerprint("owner/lora/file.safetensors") == COMMIT
    assert fingerprint("owner/lora", "v2") == NEW_COMMIT
    assert fingerprint("owner/lora", "c" * 40) == "c" * 40
    for source in ("lora", "/no/where.safetensors", "./lora", "../lora", "~/lora", "a//b"):
        assert fingerprint(source) is None


def test_weights_of_a_record(hub, tmp_path):
    """Each part is compared; earlier records, and sources that nobody can read, count as equal."""
    path = tmp_path / "a.safetensors"
    write_weights(path, 1)
    value = fingerprint(str(path))
    sources = {"model": ("owner/model", None), "lora 1": (str(path), None)}
    hub("owner/model", COMMIT)
    for record in (
        {},
        {"commit": None, "weights": None},
        {"commit": COMMIT, "weights": {"lora 1": value}},
        {"commit": COMMIT, "weights": {"lora 1": None, "lora 2": "x"}},
        {"commit": COMMIT, "weights": ["x"]},
    ):
        assert find_changed_weights(record, sources) is None
    assert find_changed_weights({"weights": {"lora 1": "0" * 16}}, sources) == f"--lora {path}"
    assert find_changed_weights({"commit": NEW_COMMIT}, sources) == "--model owner/model"
    hub("owner/model", NEW_COMMIT)
    assert find_changed_weights({"commit": COMMIT}, sources) == "--model owner/model"
    assert find_changed_weights({"commit": COMMIT}, {"model": ("owner/model", COMMIT)}) is None
    # earlier versions recorded the commit of a folder in the hub's cache, and no fingerprint
    assert find_changed_weights({"commit": COMMIT}, {"model": (str(tmp_path), None)}) is None
    demo = {"model": (str(DEMO_WEIGHTS), None, None)}
    for record in ({}, {"commit": None, "weights": {"lora 1": value}}):
        assert find_changed_weights(record, demo) == "--model demo"
    assert find_changed_weights({"weights": {"model": fingerprint(*demo["model"])}}, demo) is None
    path.unlink()
    assert find_changed_weights({"weights": {"lora 1": value}}, sources) is None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of maps")
def test_a_mapped_file(tmp_path):
    """A file that is written in place is still the mapped one, a file that replaces it is not."""
    path = tmp_path / "a b.safetensors"
    write_weights(path)
    assert not is_mapped(path)
    weights = torch.from_file(str(path), shared=False, size=100, dtype=torch.uint8)
    assert is_mapped(path)
    with path.open("r+b") as file:
        file.write(b"x")
    assert is_mapped(path)
    write_weights(tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert not is_mapped(path)
    assert len(weights) == 100
