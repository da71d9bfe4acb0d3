"""Compilers, attention backends and caches with DyPE in tiny pipelines; waits for the device."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import Spy, generate_latents, quiet, run, tiny_components
from diffusers import FirstBlockCacheConfig, FluxPipeline
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from dype import DyPEConfig, apply_dype, embedders, remove_dype
from dype.benchmark import embedder as benchmark_embedder
from dype.errors import UnavailableError
from dype.pipelines import acceleration, choices
from dype.rope import METHODS
from dype.sampling import records

ROOT = Path(__file__).parents[2]
CONFIG = DyPEConfig("yarn", base_resolution=64)
SEGA = replace(CONFIG, attention_path="sega")
CPU = torch.device("cpu")


def GPU(test):  # noqa: N802
    """Mark a test that needs a GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    return pytest.mark.gpu(skip(test))


def flux() -> FluxPipeline:
    return quiet(FluxPipeline(**tiny_components(num_layers=2, num_single_layers=2)))


FAMILIES = {"flux": (flux, generate_latents)} | tiny.FAMILIES
PIPELINE_CLASSES = {
    "flux": "FluxPipeline",
    "flux2": "Flux2KleinPipeline",
    "qwen-image": "QwenImagePipeline",
}
FAMILY_CACHES = [
    (family, cache)
    for family, pipeline_class in PIPELINE_CLASSES.items()
    for cache, classes in choices.CACHES.items()
    if pipeline_class in classes
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", benchmark_embedder.FAMILIES)
def test_launches(family, method):
    """After an image's first call, a call above the base size launches at most 40 kernels."""
    _, embedder, args = benchmark_embedder.FAMILIES[family](200, DyPEConfig(method))
    embedder.set_timestep(0.6)
    embedder(*args)
    assert 0 < benchmark_embedder.count_launches(lambda: embedder(*args), CPU) <= 40


def test_a_cutoff_costs_what_pi_does():
    """The cutoff adds at most four operations, each on one number per pair and axis."""
    counts = {}
    for method in ("pi", "cutoff"):
        _, embedder, args = benchmark_embedder.FAMILIES["flux"](200, DyPEConfig(method))
        embedder(*args)
        counts[method] = benchmark_embedder.count_launches(partial(embedder, *args), CPU)
    assert 0 < counts["cutoff"] <= counts["pi"] + 4


def test_launches_are_counted():
    """Views and empty tensors launch nothing; padding launches a fill and a copy."""
    x = torch.ones(4, 4)
    cases = {lambda: x.t()[1:]: 0, lambda: torch.empty(3): 0, lambda: x.sin() + 1: 2}
    cases |= {lambda: F.pad(x, (1, 1)): 2, lambda: x.clone(): 1}
    for call, count in cases.items():
        assert benchmark_embedder.count_launches(call, CPU) == count


def keep_one_block(transformer) -> None:
    """Delete all blocks of each kind but the first, so that compilers are fast."""
    for child in transformer.children():
        if isinstance(child, torch.nn.ModuleList):
            del child[1:]


def count_graphs(family: str, mode: str, config: DyPEConfig | None) -> int:
    """Count the graphs of an image of two steps and one of three; check both against uncompiled."""
    build, generate = FAMILIES[family]
    torch._dynamo.reset()
    pipe = build()
    pipe.dype_offload = "none"
    if mode == "full":
        keep_one_block(pipe.transformer)
    if config:
        apply_dype(pipe, config)
    uncompiled = {steps: generate(pipe, 128, 192, steps=steps) for steps in (2, 3)}
    counter = CompileCounter()
    acceleration.compile_transformer(pipe, mode, backend=counter)
    for steps, expected in uncompiled.items():
        compiled = generate(pipe, 128, 192, steps=steps)
        torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)
    return counter.frame_count


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_serves_every_step(family):
    assert count_graphs(family, "full", CONFIG) == 1


@pytest.mark.parametrize("family", ["flux", "qwen-image"])
def test_as_many_sizes_as_stock(family):
    """A compiled transformer takes all sizes with as many graphs as without DyPE.

    The first size has a graph of its own, the second a dynamic one that serves the third.
    """
    build, generate = FAMILIES[family]
    # an image of the trained size has a path of its own in Qwen-Image's embedder
    unstretched = [DyPEConfig()] if family == "qwen-image" else []
    counts = []
    for config in (None, CONFIG, *unstretched):
        torch._dynamo.reset()
        pipe, counter = build(), CompileCounter()
        keep_one_block(pipe.transformer)
        if config:
            apply_dype(pipe, config)
        pipe.transformer.compile(fullgraph=True, backend=counter)
        for rows in (4, 5, 6):
            generate(pipe, 16 * rows, 16 * rows + 16, steps=2)
        counts.append(counter.frame_count)
    is_old = torch.__version__ < (2, 8)  # there Qwen-Image takes one graph more
    assert max(counts) <= counts[0] + is_old
    assert counts[0] <= 3


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "chroma"])
def test_export(family):
    """An exported transformer follows sigma as the eager one, and takes other sizes as stock.

    Two families have the attention scale of the number of tokens too.
    """
    pipe, calls, images = FAMILIES[family][0](), [], []
    path = "proportional" if family in ("krea2", "qwen-image") else "constant"
    apply_dype(pipe, replace(CONFIG, shift="model", attention_path=path))
    transformer = pipe.transformer
    keep_one_block(transformer)
    record = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), prepend=True, with_kwargs=True
    )
    FAMILIES[family][1](pipe, 128, 192, steps=2)
    if family not in ("qwen-image", "z-image"):  # stock's program has one size
        FAMILIES[family][1](pipe, 256, 64, steps=1)
    record.remove()
    args, kwargs = calls[0]
    sizes = tree_map(lambda x: [Dim.AUTO] * x.ndim if isinstance(x, torch.Tensor) else None, kwargs)
    settings = {"strict": False, "dynamic_shapes": sizes if len(calls) > 2 else None}
    with torch.no_grad():
        program = torch.export.export(transformer, args, kwargs, **settings).module()
        for args, kwargs in calls:
            (expected,), (exported,) = (call(*args, **kwargs) for call in (transformer, program))
            torch.testing.assert_close(exported, expected, atol=1e-6, rtol=1e-6)
            images.append(exported[0])
    assert not torch.equal(images[0], images[1])


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="stops before the hook, at stock code")
def test_strict_export_is_refused(pipe):
    apply_dype(pipe)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="strict=False"):
        torch.export.export(pipe.transformer, (torch.zeros(1, 4, 16),), strict=True)


@pytest.mark.parametrize("family", ["flux", "z-image"])
def test_blocks_take_as_many_graphs_as_stock(family):
    """Each kind of block takes one graph, whether the embedder is a module (flux) or not."""
    counts = [count_graphs(family, "blocks", config) for config in (None, CONFIG)]
    assert 1 <= counts[0] == counts[1]


class WaitCounter(TorchDispatchMode):
    """Counts the operations of a transformer's forward for which the host waits for its device."""

    NAMES = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique")

    def __init__(self, transformer):
        super().__init__()
        self.inside, self.steps = False, []
        transformer.register_forward_pre_hook(self.enter, prepend=True)  # to count DyPE's hook
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
    """DyPE, with SEGA's m, adds no wait to stock's but for reading the ids once per image."""
    build, generate = FAMILIES[family]
    waits, reads, read = [], [], embedders.parse_image_ids
    monkeypatch.setattr(embedders, "parse_image_ids", lambda *a: reads.append(0) or read(*a))
    for config in (None, SEGA):
        pipe = build()
        if config:
            apply_dype(pipe, config)
        with WaitCounter(pipe.transformer) as counter:
            generate(pipe, 128, 192)
        waits.append(counter.steps)
    stock, dype = waits
    assert len(stock) == 3
    assert dype[1:] == stock[1:]
    # because the calls of these two pass the sizes, not ids
    assert len(reads) == (family not in ("z-image", "qwen-image"))


@GPU
def test_sega_with_model_offload():
    """On a GPU: SEGA's m is the same if the weights come to the device after the pre-hook."""
    images = []
    for offload in (False, True):
        pipe = flux()
        apply_dype(pipe, SEGA)
        pipe.enable_model_cpu_offload() if offload else pipe.to("cuda")
        images.append(generate_latents(pipe).cpu())
    torch.testing.assert_close(*images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "cache"), FAMILY_CACHES)
def test_cache(family, cache, monkeypatch):
    """A cache skips work, DyPE still follows every step, and the next image is unaffected."""
    build, generate = FAMILIES[family]
    if cache == "first_block":  # random weights need a high threshold before the cache skips work
        loose = partial(FirstBlockCacheConfig, threshold=9.0)
        monkeypatch.setattr("diffusers.FirstBlockCacheConfig", loose)
    pipe = build()
    apply_dype(pipe, CONFIG)
    expected = generate(pipe, 128, 192, steps=8)
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(0) or attention(*a, **k)
    )
    generate(pipe, 128, 192, steps=8)
    uncached_calls, spy = len(calls), Spy(pipe.transformer) if family == "flux" else None
    calls.clear()
    with acceleration.use_feature_cache(pipe, cache, 8):
        cached = generate(pipe, 128, 192, steps=8)
    assert 0 < len(calls) < uncached_calls
    assert cached.isfinite().all()
    assert not torch.equal(cached, expected)
    if spy:
        assert len(set(spy.sigmas)) == 8
    with acceleration.use_feature_cache(pipe, cache, 8):
        assert torch.equal(generate(pipe, 128, 192, steps=8), cached)
    assert torch.equal(generate(pipe, 128, 192, steps=8), expected)


@pytest.mark.parametrize("family", ["z-image", "krea2", "chroma"])
def test_no_cache_for(family):
    pipe = FAMILIES[family][0]()
    with pytest.raises(ValueError, match="has none in diffusers, expected off"):
        acceleration.use_feature_cache(pipe, "first_block", 4).__enter__()


def test_attention_is_restored(pipe):
    """Another backend gives the same image; then the process has its first backend again."""
    initial_backend = Registry.get_active_backend()[0]
    apply_dype(pipe, CONFIG)
    expected = generate_latents(pipe)
    used = []
    pipe.transformer.register_forward_hook(lambda *_: used.append(Registry.get_active_backend()[0]))
    with acceleration.use_attention("_native_math"):
        torch.testing.assert_close(generate_latents(pipe), expected, atol=1e-4, rtol=1e-4)
    assert {backend.value for backend in used} == {"_native_math"}
    with pytest.raises(KeyError), acceleration.use_attention("_native_math"):
        raise KeyError
    assert Registry.get_active_backend()[0] is initial_backend


def test_unusable_attention():
    for name in ("flash", "sage_hub", "_native_cudnn"):
        with pytest.raises(UnavailableError, match=f"--attention {name} cannot be used here: .+"):
            acceleration.check_attention(name, "cpu", "float32")
    acceleration.check_attention("native", "cpu", "float32")
    acceleration.check_attention("_native_flash", "cpu", "float32")
    with pytest.raises(UnavailableError, match="`attn_mask` is not supported"):
        acceleration.check_attention("_native_flash", "cpu", "float32", has_mask=True)
    names = choices.attention_backends()
    assert {"native", "flash_hub", "sage"} <= {*names}
    assert names == [backend.value for backend in AttentionBackendName]


SMALL = ["--model", "demo", "--size", "64", "--steps", "5", "--base_resolution", "32"]


def test_cache_of_the_command_line(in_tmp_path, capsys):
    """--cache warns, is recorded, and works with --init_image; `--from` repeats it to the pixel."""
    assert run(*SMALL, "--cache", "taylorseer", "--output", "a.png") == 0
    assert "may reuse features that were made under older frequencies" in capsys.readouterr().out
    assert records.read_record("a.png")["flags"]["cache"] == "taylorseer"
    assert run("--from", "a.png", "--output", "b.png") == 0
    assert run(*SMALL, "--output", "c.png") == 0
    a, b, c = (records.open_image(f"{name}.png").tobytes() for name in "abc")
    assert a == b != c
    flags = ["--cache", "magcache", "--init_image", "a.png", "--strength", "0.6"]
    assert run(*SMALL, *flags, "--output", "d.png") == 0
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
def test_mistakes(flags, in_tmp_path, capsys, monkeypatch):
    """Each mistake gives one sentence, before anything is loaded."""
    monkeypatch.setattr("dype.sampling.run.load_pipeline", None)
    code, sentence = MISTAKES[flags]
    assert run("--model", "demo", *flags.split()) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("seeds", ["0", "0-2"])
def test_broken_compiler(seeds, in_tmp_path, capsys, monkeypatch):
    """A broken compiler gives one sentence, exit code 1 and no image, for a sweep too."""

    def fail(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    compile_transformer = partial(acceleration.compile_transformer, backend=fail)
    monkeypatch.setattr(acceleration, "compile_transformer", compile_transformer)
    assert run(*SMALL, "--compile", "full", "--seed", seeds) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("run_dype.py: cannot compile: backend='fail' raised")
    assert last.endswith("; try --compile off")
    assert not list(Path().rglob("*.png"))


@GPU
@pytest.mark.parametrize("family", FAMILIES)
def test_no_sync_on_a_gpu(family):
    """CUDA itself sees no wait of DyPE's inside the transformer after the image's first step.

    Stock Chroma waits in every step.
    """
    build, generate = FAMILIES[family]
    stock, dype = (places_of_waits(build, generate, config) for config in (None, SEGA))
    assert dype == stock
    assert stock or family != "chroma"  # so waits are seen at all


def places_of_waits(build, generate, config: DyPEConfig | None) -> list[str]:
    """Return the lines of code where a transformer's forward waits for the GPU, but for step 1."""
    pipe, calls = build().to("cuda"), []
    if config:
        apply_dype(pipe, config)

    def report_waits(*_):
        calls.append(0)
        torch.cuda.set_sync_debug_mode("warn" if len(calls) > 1 else "default")

    pipe.transformer.register_forward_pre_hook(report_waits, prepend=True)  # before DyPE's hook
    pipe.transformer.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            generate(pipe, 128, 192)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 3
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    return [f"{warning.filename}:{warning.lineno}" for warning in waits]


@GPU
@pytest.mark.filterwarnings("ignore")  # of the compiler, which asks for TF32
def test_cuda_graphs():
    """Mode "reduce-overhead" captures a step with DyPE, and generates the same image."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    pipe = flux().to("cuda")
    pipe.dype_offload = "none"
    apply_dype(pipe, CONFIG)
    expected = generate_latents(pipe)
    acceleration.compile_transformer(pipe, "full", mode="reduce-overhead")
    for _ in range(3):
        torch.testing.assert_close(generate_latents(pipe), expected, atol=1e-3, rtol=1e-3)
    assert not counters["inductor"]["cudagraph_skips"]


@GPU
def test_extra_memory():
    """DyPE adds at most its two tables to the peak memory of a step."""
    pipe, peaks = flux().to("cuda"), []
    for config in (None, CONFIG):
        remove_dype(pipe)
        if config:
            apply_dype(pipe, config)
        generate_latents(pipe, 1024, 1024, steps=1)
        torch.cuda.reset_peak_memory_stats()
        generate_latents(pipe, 1024, 1024, steps=1)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] - peaks[0] <= 2 * 4 * (64 * 64 + 16) * 16
