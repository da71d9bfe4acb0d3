"""Memory estimates and choices, peaks, dtypes, device overrides, and quantized pipelines."""

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
from dype.pipelines import choices, devices, loading, memory
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
    """Models of 40 and 80 bytes, on a GPU with `free` bytes beside 1 KiB for one pixel."""
    for free, expected in ((121, "none"), (120, "model"), (81, "model"), (80, "group")):
        mode, reason = choose_offload("cuda", 1024 + free, {"a": 40, "b": 80}, pixels=1)
        assert mode == expected
        assert "the models take" in reason
    assert choose_offload("cpu", 10, {"a": 40}, pixels=1) == ("none", "")


def test_offloading_of_flux_on_common_gpus():
    """A transformer of 24 GB and an encoder of 9.5, at 4096 x 4096 and at 2048 x 2048."""
    sizes = {"transformer": 24 * 10**9, "text_encoder_2": int(9.5 * 10**9), "vae": 2 * 10**8}
    modes = {
        (gpu, side): choose_offload("cuda", int(0.95 * gpu * GIB), sizes, side * side)[0]
        for gpu in (12, 24, 48, 80)
        for side in (2048, 4096)
    }
    assert [modes[gpu, 4096] for gpu in (12, 24, 48, 80)] == ["group", "group", "model", "none"]
    assert [modes[gpu, 2048] for gpu in (12, 24, 48, 80)] == ["group", "group", "none", "none"]


def test_auto_prints_its_choice(monkeypatch, capsys):
    pipe = quiet(FluxPipeline(**tiny_components()))
    monkeypatch.setattr(memory, "choose_offload", lambda *args: ("none", "plenty is free"))
    place_components(pipe, "cpu", "auto", {}, 64 * 64)
    assert capsys.readouterr().out == "offload none: plenty is free\n"
    assert pipe.dype_offload == "none"


def flux_vae(**changes) -> SimpleNamespace:
    """Return the fields of FLUX.1's autoencoder that the estimate reads."""
    config = {"block_out_channels": (128, 256, 512, 512), "mid_block_add_attention": True} | changes
    weights = [torch.zeros(1, dtype=torch.bfloat16)]
    return SimpleNamespace(config=FrozenDict(config), parameters=lambda: iter(weights))


def test_decoding_estimate():
    """FLUX.1 in bfloat16: 2 KiB per pixel as measured, plus twice the scores on a GPU."""
    assert decode_bytes(flux_vae(), 1024**2, "cpu") == 2048 * 1024**2
    scores = 2 * (1024**2 // 64) ** 2 * 2
    assert decode_bytes(flux_vae(), 1024**2, "cuda") == 2048 * 1024**2 + scores
    assert decode_bytes(flux_vae(mid_block_add_attention=False), 1024**2, "cuda") == 2048 * 1024**2
    sizes = [decode_bytes(flux_vae(), side**2, "cuda") / GIB for side in (1024, 2048, 4096)]
    assert sizes == pytest.approx([3, 24, 288])


CONTAINERS = {  # line of /proc/self/cgroup, files below the mount, free GiB
    "version 2": (
        "0::/",
        {"memory.max": 8, "memory.current": 5, "memory.stat": "anon 9\ninactive_file {}\n"},
        4,
    ),
    "version 2, a limit of the group above": (
        "0::/pod/task",
        {
            "pod/task/memory.max": "max",
            "pod/memory.max": 8,
            "pod/memory.current": 5,
            "pod/memory.stat": "",
        },
        3,
    ),
    "version 1, seen from within": (
        "4:cpu,memory:/docker/1234",
        {
            "memory/memory.limit_in_bytes": 8,
            "memory/memory.usage_in_bytes": 5,
            "memory/memory.stat": "inactive_file 0\ntotal_inactive_file {}\n",
        },
        4,
    ),
    "over its limit": (
        "0::/",
        {"memory.max": 8, "memory.current": 9, "memory.stat": "inactive_file 0\n"},
        0,
    ),
    "another controller": ("3:cpu:/", {"memory/memory.limit_in_bytes": 8}, 30),
    "no limit": ("0::/", {"memory.max": "max"}, 30),
    "a limit beyond the memory": (
        "0::/",
        {"memory.max": 64, "memory.current": 5, "memory.stat": ""},
        30,
    ),
    "no control groups": (None, {}, 30),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_free_memory_in_a_container(name, tmp_path, monkeypatch):
    """The limit of the container counts if it leaves less than the 30 GiB of the machine."""
    line, files, free = CONTAINERS[name]
    for file, content in files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content * GIB) if isinstance(content, int) else content.format(GIB))
    if line:
        (tmp_path / "self").write_text(f"{line}\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "PROCESS_CGROUPS", tmp_path / "self")
    machine = SimpleNamespace(available=30 * GIB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: machine)
    assert memory.available_bytes("cpu") == free * GIB


def test_a_small_container_decodes_in_tiles(monkeypatch, capsys):
    """`--tiled_vae auto` goes by the limit of the container."""
    pipe = quiet(FluxPipeline(**tiny_components()))
    monkeypatch.setattr(memory, "cgroup_available_bytes", lambda: 1000)
    place_components(pipe, "cpu", "auto", {}, 64 * 64)
    assert memory.set_tiling(pipe, "auto", None, 64 * 64)
    assert "tiled decoding: untiled it takes" in capsys.readouterr().out


def test_decode_budget():
    sizes = {"transformer": 100, "vae": 10}
    assert decode_budget(200, sizes, "none") == 90
    assert decode_budget(200, sizes, "model") == 190
    assert decode_budget(200, sizes, "group") == 190


PEAK_SCRIPT = """
import torch
from diffusers import AutoencoderKL
from dype.pipelines import memory
cpu = torch.device("cpu")
memory.reset_peak()
large = bytearray(400_000_000)
peak = memory.peak_bytes(cpu)
del large
memory.reset_peak()
print(peak - memory.peak_bytes(cpu))
vae = AutoencoderKL.from_pretrained("dype/demo/weights/vae", torch_dtype=torch.float32)
side = 768
with torch.no_grad():
    channels = vae.config.latent_channels
    vae.decode(torch.zeros(1, channels, 8, 8))
    memory.reset_peak()
    peak = memory.peak_bytes(cpu)
    vae.decode(torch.zeros(1, channels, side // 8, side // 8))
used = memory.peak_bytes(cpu) - peak
print(used / memory.decode_bytes(vae, side * side, "cpu"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")
def test_peaks_in_a_separate_process():
    """`reset_peak` forgets a larger peak, and the estimate of a decode is within a factor of 1.5.

    The decode is the demo's autoencoder at 768 px.
    """
    command = [sys.executable, "-c", PEAK_SCRIPT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    decrease, ratio = map(float, result.stdout.split())
    assert decrease > 300_000_000
    assert 1 / 1.5 < ratio < 1.5


def test_the_next_cheaper_setting():
    """The suggestions end at a smaller image; a CPU with fast bfloat16 gets that first."""
    run = SimpleNamespace(dtype="bfloat16", text_encoder_device=None, tile_size=None)
    assert suggest_cheaper(run, "none", False, None) == "--tiled_vae on"
    assert suggest_cheaper(run, "none", True, None) == "--text_encoder_device cpu"
    run.text_encoder_device = "cpu"
    assert suggest_cheaper(run, "none", True, None) == "--offload model"
    assert suggest_cheaper(run, "model", True, None) == "--offload group"
    assert suggest_cheaper(run, "group", True, None) == "--tile_size 512"
    run.tile_size = 512
    assert suggest_cheaper(run, "group", True, None) == "a smaller --size"
    float32_run = SimpleNamespace(**{**vars(run), "dtype": "float32"})
    assert suggest_cheaper(float32_run, "none", True, "bfloat16") == "--dtype bfloat16"
    assert suggest_cheaper(float32_run, "none", True, "float32") == "a smaller --size"
    assert suggest_cheaper(run, "none", True, "bfloat16") == "a smaller --size"


def test_format_gib():
    sizes = {0: "0.00 GiB", 7e7: "0.07 GiB", GIB: "1.0 GiB", 33.8e9: "31.5 GiB"}
    assert {size: memory.format_gib(size) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("cost", "expected"), [(0.2, "bfloat16"), (1.5, "bfloat16"), (3, "float32"), (90, "float32")]
)
def test_fast_dtype(cost, expected, monkeypatch):
    """The time of a product on one thread decides; cost is bfloat16's time over float32's."""
    clock, threads, threads_used = [0.0], torch.get_num_threads(), set()

    def multiply(a, b):
        threads_used.add(torch.get_num_threads())
        clock[0] += cost if a.dtype == torch.bfloat16 else 1

    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    monkeypatch.setattr(devices.timeit, "default_timer", lambda: clock[0])
    assert devices.fast_dtype.__wrapped__("cpu") == expected
    assert threads_used == {1}
    assert torch.get_num_threads() == threads
    clock.clear()  # reading it now raises an error, and a GPU needs no measurement
    assert devices.fast_dtype.__wrapped__("cuda") == "bfloat16"


@pytest.mark.parametrize("offload", ["none", "group"])
def test_encoders_with_a_device_override_run_once(offload):
    """With or without offloading: the same pixels, and no encoder left during the steps."""
    plain = quiet(FluxPipeline(**tiny_components()))
    place_components(plain, "cpu", "none", {}, 64 * 64)
    size = {"height": 64, "width": 96, "steps": 2}
    expected = np.asarray(sample.generate(plain, "a red sun", **size, **SETTINGS))
    pipe = quiet(FluxPipeline(**tiny_components()))
    overrides = dict.fromkeys(("text_encoder", "text_encoder_2"), "cpu")
    place_components(pipe, "cpu", offload, overrides, 64 * 64)
    calls = []
    pipe.text_encoder_2.register_forward_hook(lambda *args: calls.append(1))
    image = sample.generate(pipe, "a red sun", **size, **SETTINGS)
    assert (np.asarray(image) == expected).all()
    settings = {"guidance": 0.0, "negative_prompt": None, "max_sequence_length": 16}
    settings["entry"] = SimpleNamespace(max_text_tokens=512)
    runs = [SimpleNamespace(prompt=text, **settings) for text in ("a red sun", "b")]
    calls.clear()
    encode = sample.prompt_encoder(pipe, runs)
    assert len(calls) == 2
    assert pipe.text_encoder is None
    assert pipe.text_encoder_2 is None
    for _ in range(2):
        image = sample.generate(pipe, encode("a red sun"), **size, **SETTINGS)
        assert (np.asarray(image) == expected).all()
    assert len(calls) == 2


def test_text_encoder_device_from_the_command_line(in_tmp_path):
    """--text_encoder_device changes no pixel of a sweep of two images with guidance."""
    line = ["--model", "demo", "--size", "64", "--steps", "1", "--base_resolution", "32"]
    line += ["--seed", "0-1"]
    assert run_dype.main([*line, "--output_dir", "default"]) == 0
    assert run_dype.main([*line, "--text_encoder_device", "cpu", "--output_dir", "override"]) == 0
    for path in Path("default").glob("*.png"):
        expected, image = (np.asarray(Image.open(p)) for p in (path, Path("override") / path.name))
        assert (image == expected).all()


@pytest.mark.parametrize("quantize", ["int8", "fp8", "nf4"])
def test_quantize_without_its_package(quantize, monkeypatch, capsys):
    """The error is one sentence, before anything is loaded."""
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    assert run_dype.main(["--model", "demo", "--quantize", quantize]) == 1
    package = "bitsandbytes" if quantize == "nf4" else "torchao"
    assert f"pip install {package}" in capsys.readouterr().err


def test_nf4_needs_a_gpu(monkeypatch, capsys):
    """The error comes before anything is loaded."""
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
    """The linear layers shrink, `tensor_bytes` counts them so, and the image stays near.

    nf4 would show the same for bitsandbytes. requirements-dev.txt does not have torchao, because
    diffusers warns at every import if it is installed.
    """
    pytest.importorskip(choices.QUANTIZER_PACKAGES[quantize])
    device = "cuda" if quantize == "nf4" else "cpu"
    plain, quantized = (
        quiet(loading.load_pipeline("demo", quantize=choice, device=device))
        for choice in ("none", quantize)
    )
    for module in (quantized.transformer, quantized.text_encoder_2):
        classes = {type(weight).__name__ for weight in module.parameters()}
        assert len(classes) > 1, classes
    plain_bytes, quantized_bytes = (
        sum(map(memory.tensor_bytes, pipe.transformer.parameters())) for pipe in (plain, quantized)
    )
    assert quantized_bytes < 0.4 * plain_bytes
    settings = {**SETTINGS, "height": 128, "width": 128, "steps": 4}
    expected, near, far = (
        np.asarray(sample.generate(pipe, text, **settings), float)
        for pipe, text in (
            (plain, "a red sun over blue mountains"),
            (quantized, "a red sun over blue mountains"),
            (plain, "a white moon over green mountains"),
        )
    )
    assert 0 < np.abs(near - expected).mean() < np.abs(far - expected).mean() / 2


def test_estimates_read_every_family():
    assert decode_bytes(tiny_vae(), 64 * 64, "cpu") > 0
    assert decode_bytes(qwen_vae(), 64 * 64, "cuda") > decode_bytes(qwen_vae(), 64 * 64, "cpu") > 0
