"""Say how much of a prompt a pipeline's tokenizers cut off."""

import logging
import textwrap
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

LIBRARY_WARNINGS = (  # logger, part of its message on what we say ourselves
    ("diffusers.pipelines.flux.pipeline_flux", "input was truncated"),
    ("transformers.tokenization_utils_base", "sequence length is longer"),
)


class Cut(NamedTuple):
    """Number of tokens of a text that is too long, and of those that the model reads."""

    tokens: int
    limit: int
    is_pooled: bool  # of CLIP, whose pooled embedding FLUX.1 takes beside the tokens of T5


@contextmanager
def record_cuts(pipe, max_sequence_length: int):
    """Record within a `with` block what the pipeline's tokenizers cut off; yield a list of Cut.

    The pipelines put templates around a prompt, so the calls of the tokenizers are looked at.
    """
    cuts: list[Cut] = []
    limit = None
    if type(pipe).__name__ == "QwenImagePipeline":  # which cuts the embeddings, not the tokens
        limit = pipe.prompt_template_encode_start_idx + max_sequence_length
    with ExitStack() as stack:
        for logger, text in LIBRARY_WARNINGS:
            stack.enter_context(mute(logger, text))
        for name in ("tokenizer", "tokenizer_2"):
            tokenizer = getattr(pipe, name, None)
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
            is_pooled = name == "tokenizer" and getattr(pipe, "tokenizer_2", None) is not None
            if tokenizer is not None:
                stack.enter_context(record_calls(tokenizer, limit, is_pooled, cuts))
        yield cuts


@contextmanager
def record_calls(tokenizer, limit: int | None, is_pooled: bool, cuts: list[Cut]):
    """Record within a `with` block the calls of a tokenizer that cut a text.

    Args:
        tokenizer: of transformers.
        limit: number of tokens that the model reads; None: the `max_length` of the call.
        is_pooled: of the texts, as in Cut.
        cuts: receives a Cut for each call with a longer text.
    """
    kind = type(tokenizer)

    class Recorder(kind):
        """Tokenizer that notes what it cuts."""

        def __call__(self, text=None, *args, **options):
            if options.get("truncation") and options.get("max_length"):
                special = {"add_special_tokens": options.get("add_special_tokens", True)}
                texts = [text] if isinstance(text, str) else text
                whole = kind.__call__(self, texts, verbose=False, **special)["input_ids"]
                end, longest = limit or options["max_length"], max(map(len, whole))
                if longest > end:
                    cuts.append(Cut(longest, end, is_pooled))
            return kind.__call__(self, text, *args, **options)

    tokenizer.__class__ = Recorder  # because Python looks `__call__` up on the class
    try:
        yield
    finally:
        tokenizer.__class__ = kind


@contextmanager
def mute(logger: str, text: str):
    """Keep the messages of a logger with this text back within a `with` block."""

    def is_other(record) -> bool:
        return text not in record.getMessage()

    logging.getLogger(logger).addFilter(is_other)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(is_other)


def describe_cuts(
    text: str, cuts: list[Cut], max_sequence_length: int, max_text_tokens: int
) -> list[str]:
    """Return sentences on what is cut off a prompt.

    Args:
        text: the prompt.
        cuts: as `record_cuts` yields them.
        max_sequence_length: the value of --max_sequence_length.
        max_text_tokens: the largest one of this model.
    """
    sentences, begin = [], textwrap.shorten(text, 40, placeholder="...")
    main = [cut for cut in cuts if not cut.is_pooled]
    for tokens, limit, is_pooled in dict.fromkeys(main or cuts):
        if is_pooled:
            sentences.append(
                f"CLIP reads the first {limit} of {tokens} tokens of {begin!r}, for the pooled "
                "embedding alone; T5 reads all"
            )
            continue
        sentences.append(
            f"the prompt {begin!r} is cut: its last {tokens - limit} of {tokens} tokens are beyond "
            f"--max_sequence_length {max_sequence_length} (at most {max_text_tokens})"
        )
    return sentences
