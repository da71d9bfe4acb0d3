"""The benchmark counts correctly, compares equal work, and runs at real size."""

import functools
import json

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dype import DyPEConfig, apply_dype
from dype.benchmark import __main__ as benchmark
from dype.benchmark import embedder as benchmark_embedder
from dype.benchmark import step as benchmark_step
from dype.benchmark.embedder import FAMILIES, reference_table
from dype.pipelines.catalog import MODELS

TRANSFORMERS = {  # model -> class of diffusers; its defaults are the real size
    "flux-krea": "FluxTransformer2DModel",
    "z-image-turbo": "ZImageTransformer2DModel",
}


@pytest.fixture(autouse=True)
def keep_threads(monkeypatch):
    """Keep the threads and the allocator of the tests' process, which the benchmark changes."""
    monkeypatch.setattr(benchmark_embedder, "use_single_thread", lambda device: None)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_flop_are_counted_right(name):
    """The count is within 3 % of torch's at real size and 2048x1024 px."""
    with torch.device("meta"):
        transformer = getattr(diffusers, TRANSFORMERS[name])()
        billions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e9
        assert billions == pytest.approx(MODELS[name].parameters_billion, rel=0.05)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            transformer(**benchmark_step.denoiser_call(transformer, 512, 1024, 2048))
        expected = counter.get_total_flops()
    assert benchmark_step.count_flop(transformer, 512, 1024, 2048) == pytest.approx(
        expected, rel=0.03
    )


def test_reference_table_equals_the_fast_path():
    """The formula, token by token, equals the fast path of every family to 1e-6."""
    for make_family in FAMILIES.values():
        _, ours, args = make_family(96, DyPEConfig("yarn_paper"))
        ours.set_timestep(0.4)
        table = ours(*args)
        if isinstance(table, tuple):
            table = table[0] if table[0].is_complex() else torch.complex(*table)[:, ::2]
        assert (table - reference_table(ours, args)).abs().max() < 1e-6


def test_the_copy_shares_weights_and_only_it_has_dype():
    stock = benchmark_step.make_pipeline("demo", "cpu").transformer
    ours = benchmark_step.copy_sharing_weights(stock)
    apply_dype(ours, DyPEConfig("yarn", base_resolution=128, shift="model"))
    pairs = zip(stock.parameters(), ours.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert type(stock.pos_embed) is not type(ours.pos_embed)
    call = benchmark_step.denoiser_call(stock, 16, 256, 256)
    with torch.no_grad():
        assert not torch.equal(stock(**call)[0], ours(**call)[0])


@pytest.fixture
def run_and_read(tmp_path, capsys):
    """Return a function that runs a benchmark and returns what --save has written.

    Nothing that is printed is JSON.
    """

    def run(*words) -> dict:
        path = tmp_path / "new" / "a.json"
        assert benchmark.main([*words, "--save", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"torch {torch.__version__}" in lines[0]
        assert "{" not in "".join(lines)
        return json.loads(path.read_text())

    return run


def test_step_of_the_demo(run_and_read):
    """A denoiser call takes about as long with DyPE; bounds are loose because of busy machines."""
    result = run_and_read("step", "--sizes", "256", "--repeats", "3")
    row = result["sizes"]["256"]
    assert result["model"] == "demo"
    assert row["low"] <= row["ratio"] <= row["high"]
    assert 0.5 < row["ratio"] < 2
    assert 0 < row["share"] < 2


def test_names_with_dype(run_and_read):
    """--method dy_NAME is NAME, which always has DyPE here."""
    words = ["--families", "flux", "--sizes", "64", "--repeats", "1", "--method"]
    assert run_and_read(*words, "dy_yarn")["families"]["flux"]["64"]["ours"] > 0
    words = ["step", "--sizes", "64", "--repeats", "1", "--method", "dy_yarn_paper"]
    assert run_and_read(*words)["method"] == "dy_yarn_paper"


def shrink_models(monkeypatch) -> None:
    """Give the real-size classes a size for tests, with the same formats."""
    changes = {
        "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1},
        "ZImageTransformer2DModel": {"n_layers": 1, "n_refiner_layers": 1, "dim": 256},
        "AutoencoderKL": {"sample_size": 64, "block_out_channels": (32,) * 4},
    }
    changes["FluxTransformer2DModel"] |= {"num_attention_heads": 2}
    changes["ZImageTransformer2DModel"] |= {"n_heads": 2, "n_kv_heads": 2}
    for name, change in changes.items():
        original = getattr(diffusers, name)
        monkeypatch.setattr(
            diffusers,
            name,
            functools.partial(lambda cls, small, **kw: cls(**kw | small), original, change),
        )


@pytest.mark.parametrize("model", ["flux", "z-image"])
def test_real_size_code(model, monkeypatch, run_and_read):
    """Steps and images of FLUX.1 and Z-Image run with random weights, here with one block."""
    shrink_models(monkeypatch)
    words = ["--model", model, "--device", "cpu", "--sizes", "64", "--repeats", "1"]
    row = run_and_read("step", *words)["sizes"]["64"]
    assert row["stock"] > 0 < row["ours"]
    row = run_and_read("pipeline", *words, "--steps", "2")["sizes"]["64"]
    assert row["steps"] == 2
    assert row["with"] > 0 < row["without"]


MISTAKES = {
    "--sizes 100": (2, "--sizes has 100, expected multiples of 16 px"),
    "--repeats 0": (2, "--repeats is 0, expected at least 1"),
    "step --device xyz": (2, "--device is 'xyz', expected cpu or cuda"),
    "step --attention quick": (2, "--attention is 'quick', expected flash, "),
    "step --attention flash": (1, "--attention flash cannot be used here"),
    "pipeline --steps 0": (2, "--steps is 0, expected at least 1"),
    "step --device cuda:9": (1, "this machine has no device cuda:9"),
    "quick": (2, "invalid choice: 'quick'"),
    "step --save a.csv": (2, "--save is a.csv, expected a name in .json with step"),
    "--method dy_base": (2, "invalid choice: 'dy_base'"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words, capsys):
    code, sentence = MISTAKES[words]
    assert benchmark.main(words.split()) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
