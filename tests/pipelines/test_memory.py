"""What fits: the estimates and choices, as pure functions; number formats; quantized pipelines."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import quiet, tiny_components, tiny_vae
from diffusers import FluxPipeline
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from tiny import qwen_vae

import run_dype
from dype.pipelines import devices, loading, memory
from dype.pipelines.memory import (
    GIB,
    choose_offload,
    decode_budget,
    decode_bytes,
    place_components,
    suggest_cheaper,
)
from dype.sampling import sample

ROOT = Path(__file__).parents[2]
SETTINGS = {"guidance": 0.0, "seed": 7, "max_sequence_length": 16}


def test_offloading_takes_the_fastest_that_fits():
    """Models of 40 and 80 bytes on a card with so much free, 1 KiB a pixel for the rest."""
    for free, expected in ((121, "none"), (120, "model"), (81, "model"), (80, "group")):
        how, why = choose_offload("cuda", 1024 + free, {"a": 40, "b": 80}, pixels=1)
        assert how == expected
        assert "the models take" in why
    assert choose_offload("cpu", 10, {"a": 40}, pixels=1) == ("none", "")


def test_offloading_of_flux_on_common_cards():
    """24 GB of transformer and 9.5 of encoder, at 4096 x 4096 and at 2048 x 2048."""
    parts = {"transformer": 24 * 10**9, "text_encoder_2": int(9.5 * 10**9), "vae": 2 * 10**8}
    chosen = {
        (card, side): choose_offload("cuda", int(0.95 * card * GIB), parts, side * side)[0]
        for card in (12, 24, 48, 80)
        for side in (2048, 4096)
    }
    assert [chosen[card, 4096] for card in (12, 24, 48, 80)] == ["group", "group", "model", "none"]
    assert [chosen[card, 2048] for card in (12, 24, 48, 80)] == ["group", "group", "none", "none"]


def test_what_auto_chose_is_said(monkeypatch, capsys):
    pipe = quiet(FluxPipeline(**tiny_components()))
    monkeypatch.setattr(memory, "choose_offload", lambda *args: ("none", "plenty is free"))
    place_components(pipe, "cpu", "auto", {}, 64 * 64)
    assert capsys.readouterr().out == "offload none: plenty is free\n"
    assert pipe.dype_offload == "none"


def flux_vae(**changes) -> SimpleNamespace:
    """What the estimate reads of FLUX.1's autoencoder."""
    config = {"block_out_channels": (128, 256, 512, 512), "mid_block_add_attention": True} | changes
    weights = [torch.zeros(1, dtype=torch.bfloat16)]
    return SimpleNamespace(config=FrozenDict(config), parameters=lambda: iter(weights))


def test_decoding_estimate():
    """FLUX.1 in bfloat16: 2 KiB a pixel as measured, and on a GPU twice the scores of attention."""
    assert decode_bytes(flux_vae(), 1024**2, "cpu") == 2048 * 1024**2
    scores = 2 * (1024**2 // 64) ** 2 * 2
    assert decode_bytes(flux_vae(), 1024**2, "cuda") == 2048 * 1024**2 + scores
    assert decode_bytes(flux_vae(mid_block_add_attention=False), 1024**2, "cuda") == 2048 * 1024**2
    sizes = [decode_bytes(flux_vae(), side**2, "cuda") / GIB for side in (1024, 2048, 4096)]
    assert sizes == pytest.approx([3, 24, 288])


def test_decoding_room():
    parts = {"transformer": 100, "vae": 10}
    assert decode_budget(200, parts, "none") == 90
    assert decode_budget(200, parts, "model") == 190
    assert decode_budget(200, parts, "group") == 190


MEASURE = """
import torch
from diffusers import AutoencoderKL
from dype.pipelines import memory
cpu = torch.device("cpu")
memory.reset_peak()
large = bytearray(400_000_000)
before = memory.peak_bytes(cpu)
del large
memory.reset_peak()
print(before - memory.peak_bytes(cpu))
vae = AutoencoderKL.from_pretrained("dype/demo/weights/vae", torch_dtype=torch.float32)
side = 768
with torch.no_grad():
    vae.decode(torch.zeros(1, 8, 8, 8))
    memory.reset_peak()
    before = memory.peak_bytes(cpu)
    vae.decode(torch.zeros(1, 8, side // 8, side // 8))
taken = memory.peak_bytes(cpu) - before
print(taken / memory.decode_bytes(vae, side * side, "cpu"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")
def test_peaks_in_a_process_of_its_own():
    """The peak is that of one image, not of the largest so far; and the estimate of a decode is
    within a factor of 1.5, for the demo's autoencoder at 768 px."""
    words = [sys.executable, "-c", MEASURE]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    forgotten, ratio = map(float, done.stdout.split())
    assert forgotten > 300_000_000
    assert 1 / 1.5 < ratio < 1.5


def test_the_next_cheaper_setting():
    """Down a ladder that ends at a smaller image; bfloat16 where the CPU has it."""
    run = SimpleNamespace(dtype="bfloat16", text_encoder_device=None, tile_size=None)
    assert suggest_cheaper(run, "none", False, None) == "--tiled_vae on"
    assert suggest_cheaper(run, "none", True, None) == "--text_encoder_device cpu"
    run.text_encoder_device = "cpu"
    assert suggest_cheaper(run, "none", True, None) == "--offload model"
    assert suggest_cheaper(run, "model", True, None) == "--offload group"
    assert suggest_cheaper(run, "group", True, None) == "--tile_size 512"
    run.tile_size = 512
    assert suggest_cheaper(run, "group", True, None) == "a smaller --size"
    in_full = SimpleNamespace(**{**vars(run), "dtype": "float32"})
    assert suggest_cheaper(in_full, "none", True, "bfloat16") == "--dtype bfloat16"
    assert suggest_cheaper(in_full, "none", True, "float32") == "a smaller --size"
    assert suggest_cheaper(run, "none", True, "bfloat16") == "a smaller --size"


def test_gib():
    sizes = {0: "0.00 GiB", 7e7: "0.07 GiB", GIB: "1.0 GiB", 33.8e9: "31.5 GiB"}
    assert {size: memory.format_gib(size) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("cost", "expected"), [(0.2, "bfloat16"), (1.5, "bfloat16"), (3, "float32"), (90, "float32")]
)
def test_fast_dtype(cost, expected, monkeypatch):
    """By the time of a product on one thread; cost: bfloat16's, in that of float32."""
    clock, threads, used = [0.0], torch.get_num_threads(), set()

    def multiply(a, b):
        used.add(torch.get_num_threads())
        clock[0] += cost if a.dtype == torch.bfloat16 else 1

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    monkeypatch.setattr(devices.timeit, "default_timer", lambda: clock[0])
    assert devices.fast_dtype.__wrapped__("cpu") == expected
    assert used == {1}
    assert torch.get_num_threads() == threads
    clock.clear()  # nothing is timed for a GPU
    assert devices.fast_dtype.__wrapped__("cuda") == "bfloat16"


@pytest.mark.parametrize("offload", ["none", "group"])
def test_encoders_apart_are_used_once_and_go(offload):
    """With other parts offloaded or not: the same pixels, and no encoder left while drawing."""
    plain = quiet(FluxPipeline(**tiny_components()))
    place_components(plain, "cpu", "none", {}, 64 * 64)
    size = {"height": 64, "width": 96, "steps": 2}
    wanted = sample.generate(plain, "a red ring", **size, **SETTINGS)
    pipe = quiet(FluxPipeline(**tiny_components()))
    place_components(
        pipe, "cpu", offload, dict.fromkeys(("text_encoder", "text_encoder_2"), "cpu"), 64 * 64
    )
    calls = []
    pipe.text_encoder_2.register_forward_hook(lambda *args: calls.append(1))
    drawn = sample.generate(pipe, "a red ring", **size, **SETTINGS)
    assert (np.asarray(drawn) == np.asarray(wanted)).all()
    settings = {"guidance": 0.0, "negative_prompt": None, "max_sequence_length": 16}
    runs = [SimpleNamespace(prompt=text, **settings) for text in ("a red ring", "b")]
    calls.clear()
    encode = sample.prompt_encoder(pipe, runs)
    assert len(calls) == 2
    assert pipe.text_encoder is None
    assert pipe.text_encoder_2 is None
    for _ in range(2):
        drawn = sample.generate(pipe, encode("a red ring"), **size, **SETTINGS)
        assert (np.asarray(drawn) == np.asarray(wanted)).all()
    assert len(calls) == 2


def test_a_text_encoder_device_by_the_command_line(own_folder):
    """Two cells with guidance: the same pixels as with everything in one place."""
    line = ["--model", "demo", "--size", "64", "--steps", "1", "--base_resolution", "32"]
    line += ["--seed", "0-1"]
    assert run_dype.main([*line, "--output_dir", "together"]) == 0
    assert run_dype.main([*line, "--text_encoder_device", "cpu", "--output_dir", "apart"]) == 0
    for path in Path("together").glob("*.png"):
        other = np.asarray(Image.open(Path("apart") / path.name))
        assert (np.asarray(Image.open(path)) == other).all()


@pytest.mark.parametrize("quantize", ["int8", "fp8", "nf4"])
def test_quantize_without_its_package(quantize, monkeypatch, capsys):
    """One sentence, before anything is loaded."""
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    assert run_dype.main(["--model", "demo", "--quantize", quantize]) == 1
    package = "bitsandbytes" if quantize == "nf4" else "torchao"
    assert f"pip install {package}" in capsys.readouterr().err


def test_nf4_needs_a_gpu(monkeypatch, capsys):
    """Before anything is loaded."""
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: True)
    line = ["--model", "demo", "--device", "cpu", "--quantize", "nf4"]
    assert run_dype.main(line) == 1
    assert "try --quantize int8" in capsys.readouterr().err


NF4 = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes quantizes on a GPU"),
]


@pytest.mark.parametrize("quantize", ["int8", "fp8", pytest.param("nf4", marks=NF4)])
def test_quantized_demo(quantize):
    """The linear layers shrink, are counted so, and the image stays near.

    nf4 would show the same of bitsandbytes. torchao is not in requirements-dev.txt: where it is
    installed, diffusers warns of it at every import.
    """
    pytest.importorskip(loading.QUANTIZER_PACKAGES[quantize])
    device = "cuda" if quantize == "nf4" else "cpu"
    plain, less = (
        quiet(loading.load_pipeline("demo", quantize=how, device=device))
        for how in ("none", quantize)
    )
    for part in (less.transformer, less.text_encoder_2):
        kinds = {type(weight).__name__ for weight in part.parameters()}
        assert len(kinds) > 1, kinds
    usual, small = (map(memory.tensor_bytes, p.transformer.parameters()) for p in (plain, less))
    assert sum(small) < 0.4 * sum(usual)
    settings = {**SETTINGS, "height": 128, "width": 128, "steps": 4}
    near, far = (
        np.asarray(sample.generate(pipe, text, **settings), float)
        for pipe, text in (
            (less, "a red ring on teal leaves"),
            (plain, "a blue disk on red leaves"),
        )
    )
    wanted = np.asarray(sample.generate(plain, "a red ring on teal leaves", **settings), float)
    assert 0 < np.abs(near - wanted).mean() < np.abs(far - wanted).mean() / 2


def test_estimates_read_every_family():
    assert decode_bytes(tiny_vae(), 64 * 64, "cpu") > 0
    assert decode_bytes(qwen_vae(), 64 * 64, "cuda") > decode_bytes(qwen_vae(), 64 * 64, "cpu") > 0
