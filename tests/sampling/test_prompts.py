"""What is cut off a prompt is said, once and exactly."""

import logging
from types import SimpleNamespace

import pytest
from conftest import TINY_DEMO, quiet, run, tiny_components
from diffusers import FluxPipeline
from tiny import qwen3, zimage

from dype.sampling import sample
from dype.sampling.prompts import Cut, describe_cuts, record_cuts

SUNS = " ".join(["sun"] * 40)


def cuts_of(pipe, text, length):
    """Return what `record_cuts` records while a prompt is encoded."""
    tokenizer = type(pipe.tokenizer)
    with record_cuts(pipe, length) as cuts:
        sample.encode_prompt(pipe, text, length)
    assert type(pipe.tokenizer) is tokenizer
    return cuts


def test_flux_has_two_limits():
    """T5's is --max_sequence_length, and CLIP's that of its tokenizer."""
    pipe = quiet(FluxPipeline(**tiny_components()))
    clip = pipe.tokenizer_max_length
    assert clip < 42
    assert cuts_of(pipe, SUNS, 30) == [Cut(42, clip, True), Cut(41, 30, False)]
    assert cuts_of(pipe, SUNS, 41) == [Cut(42, clip, True)]
    assert cuts_of(pipe, "sun", 2) == []


def test_a_template_counts():
    pipe = quiet(zimage(**qwen3()))
    [cut] = cuts_of(pipe, SUNS, 16)
    assert cut == Cut(len(pipe.tokenizer(SUNS)["input_ids"]), 16, False)


def test_qwen_image_cuts_the_embeddings():
    """Its tokenizer takes 1024 tokens and the template's, whatever the length is."""
    kind = type("QwenImagePipeline", (), {"prompt_template_encode_start_idx": 2})
    pipe = kind()
    pipe.tokenizer = qwen3()["tokenizer"]
    with record_cuts(pipe, 16) as cuts:
        pipe.tokenizer([SUNS], max_length=1026, truncation=True)
    assert cuts == [Cut(len(pipe.tokenizer(SUNS)["input_ids"]), 18, False)]


def test_sentences():
    assert describe_cuts("a sun", [], 512, 512) == []
    assert describe_cuts("a sun", [Cut(80, 77, True)], 512, 512) == [
        "CLIP reads the first 77 of 80 tokens of 'a sun', for the pooled embedding alone; "
        "T5 reads all"
    ]
    assert describe_cuts("a sun", [Cut(42, 24, True), Cut(41, 30, False)], 30, 512) == [
        "the prompt 'a sun' is cut: its last 11 of 41 tokens are beyond --max_sequence_length 30 "
        "(at most 512)"
    ]


def test_each_prompt_is_reported_once(in_tmp_path, capsys, caplog):
    """A sweep that encodes a prompt again repeats nothing, and the library is silent."""
    words = [*TINY_DEMO, "--size", "64", "--seed", "0,1", "--max_sequence_length", "8"]
    with caplog.at_level(logging.WARNING):
        assert run(*words, "--prompt", SUNS) == 0
    assert capsys.readouterr().out.count("33 of 41 tokens are beyond --max_sequence_length 8") == 1
    assert "truncated" not in caplog.text


@pytest.mark.parametrize("overrides", [{}, {"text_encoder": "cpu", "text_encoder_2": "cpu"}])
def test_an_evicted_prompt_is_not_reported_again(overrides, capsys):
    pipe = quiet(FluxPipeline(**tiny_components()))
    pipe.dype_device_overrides = overrides
    image = SimpleNamespace(prompt=SUNS, negative_prompt=None, guidance=1, max_sequence_length=16)
    image.entry = SimpleNamespace(max_text_tokens=512)
    encode = sample.prompt_encoder(pipe, [image])
    for text in [SUNS, *("a" * n for n in range(1, 10)), SUNS][: 1 if overrides else None]:
        encode(text)
    assert capsys.readouterr().out.count("is cut") == 1
