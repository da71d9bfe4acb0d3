"""The ladder of exceptions and exit codes that all commands share."""

import pytest
import torch

from dype.errors import Parser, UnavailableError, UserError, raise_user_errors, run_command


class TorchDynamoException(RuntimeError):  # noqa: N818
    """Of that name, as torch's own."""


CASES = [  # what is raised, the exit code, what is said after the program's name
    (UserError("--size is 0,\n expected more"), 2, "--size is 0, expected more"),
    (UnavailableError("there is no GPU"), 1, "there is no GPU"),
    (FileNotFoundError(2, "No such file", "a.png"), 1, "[Errno 2] No such file: 'a.png'"),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory; try less"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory; try less"),
    (MemoryError(), 1, "out of memory; try less"),
    (TorchDynamoException("no g++\nand so on"), 1, "cannot compile: no g++; try --compile off"),
    (KeyboardInterrupt(), 130, "interrupted; go on"),
]


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case[0]).__name__)
@pytest.mark.parametrize("rank", [0, 1])
def test_expected_errors(case, rank, capsys):
    """One sentence and its exit code; of several processes the first alone tells of a mistake."""
    error, code, sentence = case
    hints = {"out_of_memory": "try less", "interrupted": "go on", "rank": rank}
    assert run_command("dype.x", raising(error), **hints) == code
    silent = code in (2, 130) and rank
    assert capsys.readouterr().err == ("" if silent else f"dype.x: {sentence}\n")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes"), ValueError("odd")])
def test_bugs_are_raised(error):
    """A ValueError is a mistake only where `raise_user_errors` says so."""
    with pytest.raises(type(error)):
        run_command("dype.x", raising(error))


def test_success_has_no_word(capsys):
    assert run_command("dype.x", lambda: None) == 0
    assert run_command("dype.x", lambda: 1) == 1
    assert capsys.readouterr().err == ""
    assert run_command("dype.x", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "dype.x: interrupted\n"


def test_user_errors():
    """As a context and as a decorator; a UserError says what it said."""
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
