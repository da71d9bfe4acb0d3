"""What goes wrong in a command: its exceptions, its one sentence on stderr, its exit code."""

import argparse
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import torch


class UserError(ValueError):
    """A mistake in what the user asked for, as one sentence: exit code 2."""


class UnavailableError(Exception):
    """What the machine or the network lacks, as one sentence with the next thing to try: 1."""


WideHelp = partial(argparse.HelpFormatter, max_help_position=30, width=98)


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse prints its usage and exits; flags are not abbreviated."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"formatter_class": WideHelp, "allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@contextmanager
def raise_user_errors():
    """Within, a ValueError is the user's mistake."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def run_command(
    program: str,
    command: Callable[[], int | None],
    *,
    out_of_memory: str = "try smaller sizes",
    interrupted: str = "",
    rank: int = 0,
) -> int:
    """Run a command and return its exit code; an expected error is one sentence on stderr.

    0 is success, 2 a user's mistake, 1 what the machine or the network lacks, 130 Ctrl-C.

    Args:
        program: begins the sentence.
        command: the work; returns an exit code, or None for 0.
        out_of_memory: what to try then.
        interrupted: what Ctrl-C leaves to do.
        rank: of this process; the first one alone tells of what all of them see.

    Raises:
        Whatever is none of these: a bug.
    """
    try:
        return command() or 0
    except UserError as error:
        return fail(program, error, 2) if rank == 0 else 2
    except (UnavailableError, OSError) as error:
        return fail(program, error)
    except (RuntimeError, MemoryError) as error:
        if is_compiler_error(error):
            return fail(program, f"cannot compile: {first_line(error)}; try --compile off")
        if not is_out_of_memory(error):
            raise
        return fail(program, f"out of memory; {out_of_memory}")
    except KeyboardInterrupt:
        sentence = f"interrupted; {interrupted}" if interrupted else "interrupted"
        return fail(program, sentence, 130) if rank == 0 else 130


def fail(program: str, error, code: int = 1) -> int:
    """Print one sentence on stderr; returns the exit code."""
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is gone, whichever allocator says it."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(w in str(error) for w in ("out of memory", "allocate memory"))


def is_compiler_error(error: BaseException) -> bool:
    """Whether torch.compile says that it cannot."""
    return any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__)


def first_line(error: Exception) -> str:
    """The first line of an error, at most 200 characters of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(". ")
