"""Compilers, attention backends and caches with DyPE, in tiny pipelines; what a step waits for."""

from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import Spy, latents, quiet, run, tiny_components
from diffusers import FirstBlockCacheConfig, FluxPipeline
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from dype import DyPEConfig, apply_dype, embedders, remove_dype
from dype.benchmark import embedder as benchmark_embedder
from dype.errors import UnavailableError
from dype.pipelines import acceleration
from dype.rope import METHODS
from dype.sampling import records

ROOT = Path(__file__).parents[2]
CONFIG = DyPEConfig("yarn", base_resolution=64)
CPU = torch.device("cpu")


def GPU(test):  # noqa: N802
    """Marks a test that needs a GPU."""
    needed = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    return pytest.mark.gpu(needed(test))


def flux() -> FluxPipeline:
    return quiet(FluxPipeline(**tiny_components(num_layers=2, num_single_layers=2)))


FAMILIES = {"flux": (flux, latents)} | tiny.FAMILIES
CACHED = {"flux": "FluxPipeline", "flux2": "Flux2KleinPipeline", "qwen-image": "QwenImagePipeline"}
PAIRS = [
    (family, cache)
    for family, kind in CACHED.items()
    for cache, kinds in acceleration.CACHES.items()
    if kind in kinds
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", benchmark_embedder.FAMILIES)
def test_launches(family, method):
    """At most 40 kernels per call once an image's first call is over, above the base size."""
    _, ours, args = benchmark_embedder.FAMILIES[family](200, DyPEConfig(method))
    ours.set_timestep(0.6)
    ours(*args)
    assert 0 < benchmark_embedder.count_launches(lambda: ours(*args), CPU) <= 40


def test_a_cutoff_costs_what_pi_does():
    """Four operations more, each on one number per pair and axis."""
    counts = {}
    for method in ("pi", "cutoff"):
        _, ours, args = benchmark_embedder.FAMILIES["flux"](200, DyPEConfig(method))
        ours(*args)
        counts[method] = benchmark_embedder.count_launches(partial(ours, *args), CPU)
    assert 0 < counts["cutoff"] <= counts["pi"] + 4


def test_launches_are_counted():
    """Views and empty tensors launch nothing; padding fills and copies."""
    x = torch.ones(4, 4)
    cases = {lambda: x.t()[1:]: 0, lambda: torch.empty(3): 0, lambda: x.sin() + 1: 2}
    cases |= {lambda: F.pad(x, (1, 1)): 2, lambda: x.clone(): 1}
    for call, count in cases.items():
        assert benchmark_embedder.count_launches(call, CPU) == count


def compiled_frames(family: str, how: str, config: DyPEConfig | None) -> int:
    """How many graphs an image of two steps, then one of three take; the same as uncompiled."""
    build, draw = FAMILIES[family]
    torch._dynamo.reset()
    pipe = build()
    pipe.dype_offload = "none"
    if config:
        apply_dype(pipe, config)
    expected = {steps: draw(pipe, 128, 192, steps=steps) for steps in (2, 3)}
    counter = CompileCounter()
    acceleration.compile_transformer(pipe, how, backend=counter)
    for steps, wanted in expected.items():
        found = draw(pipe, 128, 192, steps=steps)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    return counter.frame_count


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_serves_every_step(family):
    assert compiled_frames(family, "full", CONFIG) == 1


@pytest.mark.parametrize("family", ["flux", "z-image"])
def test_blocks_take_as_many_graphs_as_stock(family):
    """One per kind of block; z-image's embedder is no module, flux's is."""
    counts = [compiled_frames(family, "blocks", config) for config in (None, CONFIG)]
    assert 1 <= counts[0] == counts[1]


class Waits(TorchDispatchMode):
    """Counts, in a transformer's forward, the operations for which a host waits for its device."""

    NAMES = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique")

    def __init__(self, transformer):
        super().__init__()
        self.inside, self.steps = False, []
        transformer.register_forward_pre_hook(self.enter, prepend=True)  # before DyPE's own
        transformer.register_forward_hook(self.leave)

    def enter(self, *args):
        self.inside = True
        self.steps.append(0)

    def leave(self, *args):
        self.inside = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = function._schema.name.removeprefix("aten::") in self.NAMES
        self.steps[-1:] = [n + (waits and self.inside) for n in self.steps[-1:]]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_waits(family, monkeypatch):
    """DyPE asks the device for no value, but for the ids, once per image; stock's waits aside."""
    build, draw = FAMILIES[family]
    found, reads, read = [], [], embedders.parse_image_ids
    monkeypatch.setattr(embedders, "parse_image_ids", lambda *a: reads.append(0) or read(*a))
    for config in (None, CONFIG):
        pipe = build()
        if config:
            apply_dype(pipe, config)
        with Waits(pipe.transformer) as waits:
            draw(pipe, 128, 192)
        found.append(waits.steps)
    assert len(found[0]) == 3
    assert found[1][1:] == found[0][1:]
    assert len(reads) == (family not in ("z-image", "qwen-image"))  # whose calls say the sizes


@pytest.mark.parametrize(("family", "cache"), PAIRS)
def test_cache(family, cache, monkeypatch):
    """Work is skipped, DyPE follows every step nevertheless, and afterwards nothing is left."""
    build, draw = FAMILIES[family]
    if cache == "first_block":  # at a threshold that these random weights stay below
        loose = partial(FirstBlockCacheConfig, threshold=9.0)
        monkeypatch.setattr("diffusers.FirstBlockCacheConfig", loose)
    pipe = build()
    apply_dype(pipe, CONFIG)
    expected = draw(pipe, 128, 192, steps=8)
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(0) or attention(*a, **k)
    )
    draw(pipe, 128, 192, steps=8)
    whole, spy = len(calls), Spy(pipe.transformer) if family == "flux" else None
    calls.clear()
    with acceleration.use_feature_cache(pipe, cache, 8):
        found = draw(pipe, 128, 192, steps=8)
    assert 0 < len(calls) < whole
    assert found.isfinite().all()
    assert not torch.equal(found, expected)
    if spy:
        assert len(set(spy.sigmas)) == 8
    with acceleration.use_feature_cache(pipe, cache, 8):
        assert torch.equal(draw(pipe, 128, 192, steps=8), found)  # nothing of the last image
    assert torch.equal(draw(pipe, 128, 192, steps=8), expected)


@pytest.mark.parametrize("family", ["z-image", "krea2", "chroma"])
def test_no_cache_for(family):
    pipe = FAMILIES[family][0]()
    with pytest.raises(ValueError, match="has none in diffusers, expected off"):
        acceleration.use_feature_cache(pipe, "first_block", 4).__enter__()


def test_attention_is_put_back(pipe):
    """Another backend, the same image; then the process has the one that it had."""
    before = Registry.get_active_backend()[0]
    apply_dype(pipe, CONFIG)
    expected = latents(pipe)
    seen = []
    pipe.transformer.register_forward_hook(lambda *_: seen.append(Registry.get_active_backend()[0]))
    with acceleration.use_attention("_native_math"):
        torch.testing.assert_close(latents(pipe), expected, atol=1e-4, rtol=1e-4)
    assert {backend.value for backend in seen} == {"_native_math"}
    with pytest.raises(KeyError), acceleration.use_attention("_native_math"):
        raise KeyError
    assert Registry.get_active_backend()[0] is before


def test_attention_that_is_not_there():
    for name in ("flash", "sage_hub", "_native_cudnn"):
        with pytest.raises(UnavailableError, match=f"--attention {name} cannot be used here: .+"):
            acceleration.check_attention(name, "cpu", "float32")
    acceleration.check_attention("native", "cpu", "float32")
    acceleration.check_attention("_native_flash", "cpu", "float32")
    with pytest.raises(UnavailableError, match="`attn_mask` is not supported"):
        acceleration.check_attention("_native_flash", "cpu", "float32", masked=True)
    assert {"native", "flash_hub", "sage"} <= set(acceleration.attention_backends())


SMALL = ["--model", "demo", "--size", "64", "--steps", "5", "--base_resolution", "32"]


def test_cache_of_the_command_line(own_folder, capsys):
    """Warned of, recorded, with an initial image too; `--from` does it again to the pixel."""
    assert run(*SMALL, "--cache", "taylorseer", "--output", "a.png") == 0
    assert "may reuse features that were made under older frequencies" in capsys.readouterr().out
    assert records.read_record("a.png")["flags"]["cache"] == "taylorseer"
    assert run("--from", "a.png", "--output", "b.png") == 0
    assert run(*SMALL, "--output", "c.png") == 0
    a, b, c = (records.open_image(f"{name}.png").tobytes() for name in "abc")
    assert a == b != c
    words = ["--cache", "magcache", "--init_image", "a.png", "--strength", "0.6"]
    assert run(*SMALL, *words, "--output", "d.png") == 0
    assert "--cache" not in capsys.readouterr().err


MISTAKES = {
    "--attention quick": (2, "--attention is 'quick', expected one of flash, "),
    "--attention flash": (1, "--attention flash cannot be used here: Flash Attention backend"),
    "--attention native --device cuda:9": (1, "this machine has no device cuda:9"),
    "--cache quick": (2, "--cache is 'quick', expected one of off, first_block, taylorseer"),
    "--cache first_block --compile blocks": (2, "--compile is 'blocks', but --cache decides anew"),
    "--compile full --offload model": (2, "but --offload model moves weights within it"),
    "--compile blocks --offload group": (2, "but --offload group moves weights within it"),
    "--model z-image --cache taylorseer": (2, "but a ZImagePipeline has none in diffusers"),
    "--model qwen-image --cache magcache": (2, "a QwenImagePipeline has first_block, taylorseer"),
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes(flags, own_folder, capsys, monkeypatch):
    """One sentence each, before anything is loaded."""
    monkeypatch.setattr("dype.sampling.run.load_pipeline", None)
    code, sentence = MISTAKES[flags]
    assert run("--model", "demo", *flags.split()) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("seeds", ["0", "0-2"])
def test_broken_compiler(seeds, own_folder, capsys, monkeypatch):
    """One sentence, exit code 1, no image, of a sweep too: what torch.compile says."""

    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    compiled = partial(acceleration.compile_transformer, backend=broken)
    monkeypatch.setattr(acceleration, "compile_transformer", compiled)
    assert run(*SMALL, "--compile", "full", "--seed", seeds) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("run_dype.py: cannot compile: backend='broken' raised")
    assert last.endswith("; try --compile off")
    assert not list(Path().rglob("*.png"))


@GPU
@pytest.mark.parametrize("family", FAMILIES)
def test_no_sync_on_a_gpu(family):
    """That CUDA itself sees no wait inside the transformer after the image's first step."""
    build, draw = FAMILIES[family]
    pipe = build().to("cuda")
    apply_dype(pipe, CONFIG)
    calls = []

    def strict(module, args, kwargs):
        calls.append(0)
        torch.cuda.set_sync_debug_mode("error" if len(calls) > 1 else "default")

    pipe.transformer.register_forward_pre_hook(strict, with_kwargs=True, prepend=True)
    pipe.transformer.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    draw(pipe, 128, 192)
    assert len(calls) == 3


@GPU
def test_cuda_graphs():
    """That `mode="reduce-overhead"` captures a step with DyPE, and draws the same image."""
    pipe = flux().to("cuda")
    pipe.dype_offload = "none"
    apply_dype(pipe, CONFIG)
    expected = latents(pipe)
    acceleration.compile_transformer(pipe, "full", mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(latents(pipe), expected, atol=1e-3, rtol=1e-3)


@GPU
def test_extra_memory():
    """That a step with DyPE takes at most its two tables more than one without, at its peak."""
    pipe, peaks = flux().to("cuda"), []
    for config in (None, CONFIG):
        remove_dype(pipe)
        if config:
            apply_dype(pipe, config)
        latents(pipe, 1024, 1024, steps=1)
        torch.cuda.reset_peak_memory_stats()
        latents(pipe, 1024, 1024, steps=1)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] - peaks[0] <= 2 * 4 * (64 * 64 + 16) * 16
