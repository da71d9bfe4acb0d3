"""Errors that all commands share, with their sentences and exit codes."""

import io
import sys

import pytest
import torch

from dype.errors import Parser, UnavailableError, UserError, raise_user_errors, run_command


class TorchDynamoException(RuntimeError):  # noqa: N818
    """Error with the name of torch's own."""


CASES = [  # error, exit code, sentence after the program's name
    (UserError("--size is 0,\n expected more"), 2, "--size is 0, expected more"),
    (UnavailableError("there is no GPU"), 1, "there is no GPU"),
    (FileNotFoundError(2, "No such file", "a.png"), 1, "[Errno 2] No such file: 'a.png'"),
    (BrokenPipeError(32, "Broken pipe"), 1, "nothing reads the output any more; go on"),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory; try less"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; try less"),
    (MemoryError(), 1, "out of memory; try less"),
    (TorchDynamoException("no g++\nand so on"), 1, "cannot compile: no g++; try --compile off"),
    (KeyboardInterrupt(), 130, "interrupted; go on"),
]


def command_that_raises(error):
    """Return a command that raises this error."""

    def command():
        raise error

    return command


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case[0]).__name__)
@pytest.mark.parametrize("rank", [0, 1])
def test_expected_errors(case, rank, capsys):
    """An expected error gives one sentence and its exit code.

    For a mistake or an interruption only the process of rank 0 prints it.
    """
    error, code, sentence = case
    hints = {"out_of_memory": "try less", "interrupted": "go on", "rank": rank}
    assert run_command("dype.x", command_that_raises(error), **hints) == code
    is_silent = code in (2, 130) and rank
    assert capsys.readouterr().err == ("" if is_silent else f"dype.x: {sentence}\n")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes"), ValueError("odd")])
def test_bugs_are_raised(error):
    """Unexpected errors are raised; a ValueError counts as expected only in `raise_user_errors`."""
    with pytest.raises(type(error)):
        run_command("dype.x", command_that_raises(error))


def test_exit_code_and_silence(capsys):
    assert run_command("dype.x", lambda: None) == 0
    assert run_command("dype.x", lambda: 1) == 1
    assert capsys.readouterr().err == ""
    assert run_command("dype.x", command_that_raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "dype.x: interrupted\n"


def test_raise_user_errors():
    """`raise_user_errors` works as a context and as a decorator, and keeps a UserError's text."""
    for error in (ValueError("odd"), UserError("odd")):
        with pytest.raises(UserError, match=r"^odd$"), raise_user_errors():
            raise error
    with pytest.raises(KeyError), raise_user_errors():
        raise KeyError("x")
    decorated = raise_user_errors()(int)
    assert [decorated("1"), decorated("2")] == [1, 2]
    with pytest.raises(UserError, match="invalid literal"):
        decorated("x")


def test_parser_raises():
    with pytest.raises(UserError, match="unrecognized arguments: --x"):
        Parser().parse_args(["--x"])


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_letters_that_an_encoding_lacks_are_escaped(encoding, monkeypatch):
    """A redirect to a file of a code page raises no error, on neither stream."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def command():
        print("\u57ce \udce9")
        raise UserError("--model is '\u57ce'")

    assert run_command("dype.x", command) == 2
    for stream in streams.values():
        stream.flush()
    assert streams["stdout"].buffer.getvalue().split() == [rb"\u57ce", rb"\udce9"]
    assert streams["stderr"].buffer.getvalue() == b"dype.x: --model is '\\u57ce'\n"


def test_a_missing_value_names_the_form_with_an_equals_sign():
    parser = Parser()
    parser.add_argument("--text", "--words")
    parser.add_argument("--texts", nargs="+")
    for flag in ("--text", "--texts"):
        with pytest.raises(UserError, match=f"^{flag} has no value.* hyphen needs {flag}=VALUE$"):
            parser.parse_args([flag, "-x"])
