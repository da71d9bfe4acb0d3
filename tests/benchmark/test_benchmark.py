"""The benchmark: what it counts, that both sides do the same, and that its real-size code runs."""

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

WHOLE = {  # of diffusers' classes at their default, real size
    "flux-krea": "FluxTransformer2DModel",
    "z-image-turbo": "ZImageTransformer2DModel",
}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """The benchmark sets its whole process to one thread and a warm allocator; not this one."""
    monkeypatch.setattr(benchmark_embedder, "single_thread", lambda device: None)


@pytest.mark.parametrize("name", WHOLE)
def test_flop_are_counted_right(name):
    """Against torch's own count over the real-size transformer, 3 % at 2048x1024 px."""
    with torch.device("meta"):
        transformer = getattr(diffusers, WHOLE[name])()
        billions = sum(part.numel() for part in transformer.parameters()) / 1e9
        assert billions == pytest.approx(MODELS[name].parameters_billion, rel=0.05)
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            transformer(**benchmark_step.denoiser_call(transformer, 512, 1024, 2048))
        expected = counted.get_total_flops()
    assert benchmark_step.count_flop(transformer, 512, 1024, 2048) == pytest.approx(
        expected, rel=0.03
    )


def test_literal_form_is_the_formula():
    """Token by token, the same numbers as the fast path of every family, to 1e-6."""
    for make in FAMILIES.values():
        _, ours, args = make(96, DyPEConfig("yarn_paper"))
        ours.set_timestep(0.4)
        table = ours(*args)
        if isinstance(table, tuple):
            table = table[0] if table[0].is_complex() else torch.complex(*table)[:, ::2]
        assert (table - reference_table(ours, args)).abs().max() < 1e-6


def test_twin_shares_weights_and_has_dype_alone():
    stock = benchmark_step.make_pipeline("demo", "cpu").transformer
    ours = benchmark_step.copy_sharing_weights(stock)
    apply_dype(ours, DyPEConfig("yarn", base_resolution=256))
    pairs = zip(stock.parameters(), ours.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert type(stock.pos_embed) is not type(ours.pos_embed)
    call = benchmark_step.denoiser_call(stock, 16, 512, 512)
    with torch.no_grad():
        assert not torch.equal(stock(**call)[0], ours(**call)[0])


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_step_of_the_demo(capsys):
    """A whole denoiser call with DyPE takes what one without does; loose, for busy machines."""
    assert benchmark.main(["step", "--sizes", "256", "--repeats", "3"]) == 0
    found = last(capsys)
    row = found["sizes"]["256"]
    assert found["model"] == "demo"
    assert row["low"] <= row["ratio"] <= row["high"]
    assert 0.5 < row["ratio"] < 2
    assert 0 < row["share"] < 2


def small(monkeypatch) -> None:
    """The real-size classes at a size for tests, of the same formats."""
    changes = {
        "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1},
        "ZImageTransformer2DModel": {"n_layers": 1, "n_refiner_layers": 1, "dim": 256},
        "AutoencoderKL": {"sample_size": 64, "block_out_channels": (32,) * 4},
    }
    changes["FluxTransformer2DModel"] |= {"num_attention_heads": 2}
    changes["ZImageTransformer2DModel"] |= {"n_heads": 2, "n_kv_heads": 2}
    for name, change in changes.items():
        whole = getattr(diffusers, name)
        monkeypatch.setattr(
            diffusers, name, functools.partial(lambda w, c, **kw: w(**kw | c), whole, change)
        )


@pytest.mark.parametrize("model", ["flux", "z-image"])
def test_real_size_code(model, monkeypatch, capsys):
    """Steps and images of FLUX.1 and Z-Image with random weights, here with a block each."""
    small(monkeypatch)
    words = ["--model", model, "--device", "cpu", "--sizes", "64", "--repeats", "1"]
    assert benchmark.main(["step", *words]) == 0
    row = last(capsys)["sizes"]["64"]
    assert row["stock"] > 0 < row["ours"]
    assert benchmark.main(["pipeline", *words, "--steps", "2"]) == 0
    row = last(capsys)["sizes"]["64"]
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
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words, capsys):
    code, sentence = MISTAKES[words]
    assert benchmark.main(words.split()) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
