"""Single files for --transformer, and variants of a folder's weights."""

import importlib.util
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import quiet, run, tiny_components
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, qwen3

from dype.cli import flags
from dype.cli.settings import resolve
from dype.pipelines import checkpoints, headers, loading
from dype.sampling import records

SMALL = ["--size", "64", "--steps", "1", "--base_resolution", "32", "--prompt", "ring"]
SMALL += ["--max_sequence_length", "16"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the tiny pipelines `flux` and `zimage`, and `other`: FLUX of other weights."""
    folder = tmp_path_factory.mktemp("models")
    pipe = quiet(FluxPipeline(**tiny_components()))
    pipe.save_pretrained(folder / "flux")
    FAMILIES["z-image"][0](**qwen3()).save_pretrained(folder / "zimage")
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    pipe.save_pretrained(folder / "other")
    return folder


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pixels(*words) -> np.ndarray:
    """Run the command line and return the pixels of its image."""
    assert run(*words, *SMALL, "--overwrite", "--output", "a.png") == 0
    return np.asarray(Image.open("a.png"))


def both(capsys, code: int, *words) -> str:
    """Return the one sentence that a run and a dry run end with."""
    sentences = set()
    for dry in ([], ["--dry_run"]):
        assert run(*words, *SMALL, *dry) == code
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        sentences.add(err)
    assert not Path("outputs").exists()
    [sentence] = sentences
    return sentence


def to_comfyui(weights: dict) -> dict:
    """Return the weights of an all-in-one checkpoint."""
    renamed = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    return renamed | {"text_encoders.t5xxl.shared.weight": torch.ones(2, 2), "vae.a": torch.ones(2)}


def to_original_zimage(weights: dict) -> dict:
    """Return the weights of a Z-Image transformer in the layout of its authors."""
    original = {}
    renames = {
        "all_final_layer.2-1.": "final_layer.",
        "all_x_embedder.2-1.": "x_embedder.",
        "to_out.0.": "out.",
        "norm_q.": "q_norm.",
        "norm_k.": "k_norm.",
    }
    for name, tensor in weights.items():
        if ".to_q." in name:
            parts = [weights[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            name, tensor = name.replace("to_q", "qkv"), torch.cat(parts)
        if ".to_k." not in name and ".to_v." not in name:
            for new, old in renames.items():
                name = name.replace(new, old)
            original[name] = tensor
    return original


def test_a_single_file_draws_as_its_folder(models, capsys):
    """In the layouts of diffusers and ComfyUI; `--from` takes the file from the record."""
    expected = pixels("--model", models / "other")
    assert (expected != pixels("--model", models / "flux")).any()
    weights = load_file(models / "other" / WEIGHTS)
    for name, tensors in {"plain.safetensors": weights, "all.sft": to_comfyui(weights)}.items():
        save_file(tensors, name)
        words = ["--model", models / "flux", "--transformer", name]
        assert (pixels(*words) == expected).all()
        assert run(*words, *SMALL, "--dry_run") == 0
        assert str(Path(name).absolute()) in capsys.readouterr().out
    flags = records.read_record("a.png")["flags"]
    assert flags["transformer"] == str(Path("all.sft").absolute())
    assert run("--from", "a.png", "--output", "again.png") == 0
    assert (np.asarray(Image.open("again.png")) == expected).all()
    Path("all.sft").unlink()
    assert run("--from", "a.png", "--output", "third.png") == 2
    assert "but there is no such file" in capsys.readouterr().err


def test_the_authors_layout(models):
    """Diffusers converts it; here for Z-Image, whose conversion takes any width."""
    expected = pixels("--model", models / "zimage", "--dtype", "float32")
    save_file(to_original_zimage(load_file(models / "zimage" / WEIGHTS)), "z.safetensors")
    words = ["--model", models / "zimage", "--dtype", "float32", "--transformer", "z.safetensors"]
    assert (pixels(*words) == expected).all()


def test_names_tell_files_apart_and_belong_to_their_model(models):
    """Another --model than that of the record leaves out its file and its variant."""

    def settings(*words):
        [result] = resolve(vars(flags.parse([str(word) for word in [*words, *SMALL]])))[1]
        return result

    names = set()
    for name in ("a.gguf", "b.gguf"):
        Path(name).touch()
        names.add(settings("--model", models / "flux", "--transformer", name).file_name)
    names.add(settings("--model", models / "flux", "--variant", "bf16").file_name)
    assert len(names) == 3
    save_file(load_file(models / "other" / WEIGHTS), "c.safetensors")
    pixels("--model", models / "flux", "--transformer", "c.safetensors")
    assert settings("--from", "a.png").transformer == str(Path("c.safetensors").absolute())
    assert settings("--from", "a.png", "--model", models / "other").transformer is None


FLOAT8 = torch.float8_e4m3fn


def scale_weights(weights: dict, end: str) -> tuple[dict, dict]:
    """Return weights in float8 with scales, as ComfyUI stores them, and what they stand for."""
    stored, expected = {"scaled_fp8": torch.zeros(2).to(FLOAT8)}, {}
    for name, tensor in weights.items():
        stored[name] = expected[name] = tensor
        if tensor.ndim == 2:
            stem = name.removesuffix(".weight")
            scale = tensor.abs().amax(1 if "ff" in name else None) / 448
            column = scale.reshape(-1, 1)
            stored[name] = (tensor / column).to(FLOAT8)
            stored |= {stem + end: scale, f"{stem}.scale_input": torch.tensor(1.0)}
            expected[name] = stored[name].float() * column
    return stored, expected


@pytest.mark.parametrize("kind", ["plain", ".scale_weight", ".weight_scale"])
def test_float8_becomes_the_dtype(kind, models):
    """Weights are multiplied by their scales, of the tensor or of its rows."""
    weights = load_file(models / "other" / WEIGHTS)
    if kind == "plain":
        stored = {name: tensor.to(FLOAT8) for name, tensor in weights.items()}
        expected = {name: tensor.float() for name, tensor in stored.items()}
    else:
        stored, expected = scale_weights(weights, kind)
    save_file(stored, "f8.safetensors")
    folder = str(models / "flux")
    pipe = loading.load_pipeline(folder, transformer="f8.safetensors", dtype="float32")
    for name, tensor in pipe.transformer.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name])


def flux_header(guidance: bool, channels: int = 64) -> dict:
    """Return the header of FLUX.1's file in the layout of Black Forest Labs."""
    width = 3072
    linear = {"img_in": (width, channels), "txt_in": (width, 4096)}
    for name, size in {"time_in": 256, "vector_in": 768, "guidance_in": 256}.items():
        if guidance or name != "guidance_in":
            linear |= {f"{name}.in_layer": (width, size), f"{name}.out_layer": (width, width)}
    norms = []
    for i in range(19):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            linear |= {f"{block}_mod.lin": (6 * width, width)}
            linear |= {f"{block}_attn.qkv": (3 * width, width)}
            linear |= {f"{block}_attn.proj": (width, width)}
            linear |= {f"{block}_mlp.0": (4 * width, width), f"{block}_mlp.2": (width, 4 * width)}
            norms += [f"{block}_attn.norm.{name}_norm.scale" for name in ("query", "key")]
    for i in range(38):
        block = f"single_blocks.{i}"
        linear |= {f"{block}.linear1": (7 * width, width), f"{block}.linear2": (width, 5 * width)}
        linear |= {f"{block}.modulation.lin": (3 * width, width)}
        norms += [f"{block}.norm.{name}_norm.scale" for name in ("query", "key")]
    linear |= {
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    shapes |= dict.fromkeys(norms, (128,))
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def test_the_files_of_flux_fit_their_own_model_alone():
    """By the header, in the authors' layout: dev, schnell and Fill, a pruned file, a LLM."""
    with torch.device("meta"):
        dev, schnell = (FluxTransformer2DModel(guidance_embeds=x) for x in (True, False))
    find = checkpoints.find_mismatch
    assert find(flux_header(True), dev) is None
    assert find(flux_header(False), schnell) is None
    prefixed = {f"model.diffusion_model.{name}": x for name, x in flux_header(True).items()}
    assert find(prefixed, dev) is None
    assert find(flux_header(False), dev).startswith("it lacks time_text_embed.guidance_embedder")
    assert find(flux_header(True), schnell).startswith("the model has no time_text_embed.guidance")
    assert find(flux_header(True, 384), dev) == "x_embedder.weight is 3072x384, not 3072x64"
    pruned = {k: x for k, x in flux_header(True).items() if not k.startswith("single_blocks.37")}
    assert find(pruned, dev).startswith("it lacks single_transformer_blocks.37.")
    assert find({"model.layers.0.a.weight": ("BF16", (2, 2))}, dev)


def test_the_files_of_a_family_fit_it_alone():
    """Also in diffusers' layout, of which parts are the same in several families."""
    transformers = {name: build().transformer for name, (build, _) in FAMILIES.items()}
    transformers["flux"] = tiny_components()["transformer"]
    for name, transformer in transformers.items():
        header = {part: ("F32", x.shape) for part, x in transformer.state_dict().items()}
        assert headers.describe_kind(header) is None
        fits = [x for x, y in transformers.items() if not checkpoints.find_mismatch(header, y)]
        assert fits == [name]


def gguf_bytes(header: dict, data: bytes = b"\0" * 64) -> bytes:
    """Return a GGUF file with these tensors, all of them at the start of the data."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(header), 3)
    out += text("general.architecture") + struct.pack("<I", 8) + text("flux")
    out += text("a.list") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("y")
    out += text("numbers") + struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 1, 2)
    for name, shape in header.items():
        out += text(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", 8, 0)
    return out + data


def test_header_of_gguf(models):
    """Names and shapes as PyTorch has them, without the gguf package."""
    weights = load_file(models / "flux" / WEIGHTS)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    Path("a.gguf").write_bytes(gguf_bytes(shapes))
    header = headers.read_header("a.gguf")
    assert {name: shape for name, (_, shape) in header.items()} == shapes
    transformer = tiny_components()["transformer"]
    assert checkpoints.find_mismatch(header, transformer) is None


def test_gguf_needs_its_package(models, monkeypatch, capsys):
    """Also for a dry run; --quantize with it is refused."""
    weights = load_file(models / "flux" / WEIGHTS)
    Path("a.gguf").write_bytes(gguf_bytes({name: x.shape for name, x in weights.items()}))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "gguf" else find_spec(name, *a),
    )
    words = ["--model", models / "flux", "--transformer", "a.gguf"]
    assert "pip install gguf" in both(capsys, 1, *words)
    assert "is quantized already" in both(capsys, 2, *words, "--quantize", "int8")


def test_gguf_with_a_stand_in_of_its_package(models, monkeypatch):
    """Weights of linear layers stay quantized; others become the type of the computation."""
    weights = load_file(models / "flux" / WEIGHTS)
    Path("a.gguf").write_bytes(gguf_bytes({name: x.shape for name, x in weights.items()}))
    utils = SimpleNamespace(dequantize_gguf_tensor=lambda tensor: 2 * tensor)
    monkeypatch.setitem(sys.modules, "diffusers.quantizers.gguf.utils", utils)
    monkeypatch.setattr(
        diffusers.models.model_loading_utils,
        "load_gguf_checkpoint",
        lambda path: to_comfyui(weights),
    )
    calls = []

    def from_single_file(tensors, **arguments):
        calls.append((tensors, arguments))
        return tiny_components()["transformer"]

    monkeypatch.setattr(FluxTransformer2DModel, "from_single_file", from_single_file)
    entry = SimpleNamespace(pipeline="FluxPipeline", repo=str(models / "flux"))
    checkpoints.load_transformer("a.gguf", entry, None, torch.bfloat16, None)
    [(tensors, arguments)] = calls
    assert arguments["quantization_config"].compute_dtype == torch.bfloat16
    assert arguments["subfolder"] == "transformer"
    assert torch.equal(tensors["proj_out.weight"], weights["proj_out.weight"])
    assert torch.equal(tensors["proj_out.bias"], (2 * weights["proj_out.bias"]).bfloat16())


def test_gguf_draws_nearly_the_same(models):
    """Needs the gguf package: with 8 bits the image differs by a few levels."""
    gguf = pytest.importorskip("gguf")
    weights = load_file(models / "other" / WEIGHTS)
    writer = gguf.GGUFWriter("a.gguf", "flux")
    for name, tensor in weights.items():
        array, kind = tensor.float().numpy(), gguf.GGMLQuantizationType.Q8_0
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = pixels("--model", models / "other").astype(int)
    image = pixels("--model", models / "flux", "--transformer", "a.gguf")
    assert abs(image - expected).mean() < 2


def ones(*names, dtype=torch.float32) -> dict:
    """Return small tensors of these names."""
    return {name: torch.ones(4, 4).to(dtype) for name in names}


WRONG = {  # name -> (exit code, part of the sentence, file: tensors, bytes, a path or None)
    "missing": (2, "there is no such file, expected a .safetensors or .gguf file\n", None),
    "LoRA": (2, "a LoRA, expected --lora FILE", ones("transformer.a.lora_A.weight")),
    "LoKr": (2, "a LoRA, expected --lora FILE", ones("lycoris_a.lokr_w1")),
    "T5": (2, "a text encoder", ones("encoder.block.0.layer.0.SelfAttention.q.weight")),
    "CLIP": (2, "a text encoder", ones("text_model.encoder.layers.0.mlp.fc1.weight")),
    "LLM": (2, "a text encoder", ones("model.layers.0.mlp.up_proj.weight")),
    "GGUF of an LLM": (2, "a text encoder", gguf_bytes({"blk.0.attn_q.weight": (2, 2)})),
    "autoencoder": (2, "an autoencoder", "flux/vae/diffusion_pytorch_model.safetensors"),
    "text encoder": (2, "a text encoder", "flux/text_encoder/model.safetensors"),
    "UNet": (2, "a UNet", ones("model.diffusion_model.input_blocks.0.0.weight", "vae.x")),
    "inversion": (2, "a textual inversion", ones("emb_params")),
    "controlnet": (2, "a controlnet", ones("controlnet_blocks.0.weight")),
    "nf4": (2, "by bitsandbytes", ones("double_blocks.0.img_mlp.0.weight.absmax")),
    "Nunchaku": (2, "for Nunchaku", ones("transformer_blocks.0.qkv_proj.qweight")),
    "integers": (2, "is I8 in blocks or integers", ones("a.weight", dtype=torch.int8)),
    "scales of blocks": (
        2,
        "in blocks or integers",
        {"a.weight": torch.ones(4, 64).to(FLOAT8), "a.weight_scale": torch.ones(4, 2)},
    ),
    "another family": (2, "does not fit the FluxTransformer2DModel", "zimage/" + WEIGHTS),
    "unknown": (2, "diffusers cannot convert its layout", ones("a.weight", "b.weight")),
    "pipeline": (2, "a whole pipeline, expected --model", "flux"),
    "folder": (2, "a folder, expected one file: diffusion_pytorch_model", "flux/transformer"),
    "pickle": (1, "a file of torch.save", b"PK\x03\x04"),
    "empty": (1, "it is empty", b""),
    "text": (1, "not a readable safetensors file", b"<html>"),
    "pointer": (1, "a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\n"),
    "cut GGUF": (1, "an incomplete GGUF file", gguf_bytes({"a.weight": (2, 2)})[:90]),
    "GGUF without data": (1, "an incomplete GGUF file", gguf_bytes({"a.weight": (2, 2)}, b"")),
    "broken GGUF": (1, "an incomplete GGUF file", b"GGUF" + b"\xff" * 200),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_no_transformer(name, models, capsys):
    """One sentence before anything is loaded; a dry run says the same."""
    code, text, content = WRONG[name]
    path = "x.safetensors"
    if isinstance(content, dict):
        save_file(content, path)
    elif isinstance(content, bytes):
        Path(path).write_bytes(content)
    elif content:
        path = models / content
    assert text in both(capsys, code, "--model", models / "flux", "--transformer", path)


def test_files_of_another_size_or_incomplete(models, capsys):
    weights = load_file(models / "flux" / WEIGHTS)
    words = ["--model", models / "flux", "--transformer", "x.safetensors"]
    save_file({k: x for k, x in weights.items() if k != "proj_out.bias"}, "x.safetensors")
    assert "it lacks proj_out.bias, expected" in both(capsys, 2, *words)
    save_file(weights | {"x_embedder.weight": torch.ones(32, 8)}, "x.safetensors")
    assert "x_embedder.weight is 32x8, not 32x16" in both(capsys, 2, *words)
    save_file(weights, "x.safetensors")
    whole = Path("x.safetensors").read_bytes()
    Path("x.safetensors").write_bytes(whole[:-1000])
    assert "not a readable safetensors file" in both(capsys, 1, *words)
    address = "https://huggingface.co/owner/repo/resolve/main/sub/x.gguf?download=true"
    for name in ("owner/repo/sub/x.gguf", address, "hf://owner/repo/sub/x.gguf"):
        words = ["--model", models / "flux", "--transformer", name]
        assert "`hf download owner/repo sub/x.gguf`" in both(capsys, 2, *words)


def test_a_class_without_single_files(models, monkeypatch, capsys):
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    save_file(ones("a.weight"), "x.safetensors")
    monkeypatch.delitem(SINGLE_FILE_LOADABLE_CLASSES, "FluxTransformer2DModel")
    sentence = both(capsys, 2, "--model", models / "flux", "--transformer", "x.safetensors")
    assert "FluxTransformer2DModel is none" in sentence


def test_variants_of_a_folder(models, capsys):
    """A folder of one variant alone names it; a variant that no component has is refused."""
    pipe = quiet(FluxPipeline.from_pretrained(models / "other"))
    pipe.save_pretrained("half", variant="bf16")
    assert (
        pixels("--model", "half", "--variant", "bf16") == pixels("--model", models / "other")
    ).all()
    capsys.readouterr()
    assert "as the variant bf16 alone, expected --variant bf16" in both(
        capsys, 2, "--model", "half"
    )
    sentence = both(capsys, 2, "--model", "half", "--variant", "fp16")
    assert "has no such files, expected one of bf16" in sentence
    sentence = both(capsys, 2, "--model", models / "flux", "--variant", "bf16")
    assert "has no such files, expected none" in sentence
    sentence = both(capsys, 2, "--model", models / "flux", "--variant", "fp 16")
    assert "expected a name such as fp16" in sentence
    for name in ("vae", "text_encoder", "text_encoder_2"):  # other components may lack the variant
        for file in Path("half", name).glob("*.bf16.*"):
            file.rename(file.with_name(file.name.replace(".bf16", "")))
    pixels("--model", "half", "--variant", "bf16")
    save_file(load_file(models / "other" / WEIGHTS), "x.safetensors")
    pixels("--model", "half", "--transformer", "x.safetensors")
    [weights] = Path("half/transformer").glob("*.safetensors")
    weights.unlink()  # because those of the file are enough
    pixels("--model", "half", "--transformer", "x.safetensors")


def test_a_variant_that_the_hub_lacks():
    """The sentence names the flag, not the network."""
    for text in ("the `variant=fp16`, but no such modeling files", "no file named model.bin found"):
        sentence = loading.explain_load_error("owner/repo", "owner/repo", ValueError(text))
        assert "try another --variant" in sentence
        assert "network" not in sentence


def test_names_of_shards():
    """Names of both conventions, of diffusers and of transformers."""
    names = {
        "diffusion_pytorch_model.safetensors": None,
        "model-00001-of-00002.safetensors": None,
        "diffusion_pytorch_model.fp16.safetensors": "fp16",
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors": "fp16",
        "diffusion_pytorch_model-00001-of-00002.fp16.safetensors": "fp16",
        "pytorch_model.non_ema.bin": "non_ema",
    }
    for name, variant in names.items():
        assert headers.WEIGHT_FILE.fullmatch(name)["variant"] == variant
    assert not headers.WEIGHT_FILE.fullmatch("model.safetensors.index.json")
