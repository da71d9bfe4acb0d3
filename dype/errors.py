"""Errors of a command: exceptions, one sentence on stderr, exit codes."""

import argparse
import io
import re
import sys
import textwrap
from collections.abc import Callable
from contextlib import contextmanager
from typing import NoReturn


class UserError(ValueError):
    """A mistake of the user, in one sentence; exit code 2."""


class UnavailableError(Exception):
    """A lack of the machine or the network, with the next thing to try; exit code 1."""


class WideHelp(argparse.RawDescriptionHelpFormatter):
    """Format help in 98 columns, alike in every version of Python."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=98)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Wrap a help text, without a break at the hyphen of a name like flux-dev."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return `--flag, --alias VALUE`; before Python 3.13 argparse repeats VALUE."""
        if action.nargs == 0 or not action.option_strings:
            return super()._format_action_invocation(action)
        metavar = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {metavar}"


class Parser(argparse.ArgumentParser):
    """argparse's parser, which raises UserError instead of exiting and takes no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"formatter_class": WideHelp, "allow_abbrev": False} | kwargs)

    def error(self, message: str) -> NoReturn:
        argument = r"argument (?:-h/)?(--[^/:]+).*: "
        if match := re.match(argument + r"expected (one|at least one) argument$", message):
            message = f"{match[1]} has no value, expected {match[2]}; "
            message += f"a value that begins with a hyphen needs {match[1]}=VALUE"
        elif match := re.match(argument + "ignored explicit argument (.*)", message, re.DOTALL):
            message = f"{match[1]} is {match[2]}, expected no value"
        raise UserError(message)


@contextmanager
def raise_user_errors():
    """Turn a ValueError within the `with` block into a UserError."""
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

    Exit codes: 0 success, 2 a mistake of the user, 1 a lack of the machine or the network, 130
    Ctrl-C. Any other exception is a bug and passes through.

    Args:
        program: begins the sentence.
        command: does the work; returns an exit code, or None for 0.
        out_of_memory: what to try when memory is short.
        interrupted: what to do after Ctrl-C.
        rank: of this process; rank 0 alone reports errors that all processes see.
    """
    escape_unprintable()
    try:
        return command() or 0
    except UserError as error:
        return fail(program, error, 2) if rank == 0 else 2
    except BrokenPipeError:  # for example, of `| head`
        return fail(program, f"nothing reads the output any more; {interrupted or 'it is cut off'}")
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


def escape_unprintable() -> None:
    """Let both streams write letters that their encoding lacks as \\u57ce, without an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def fail(program: str, error, code: int = 1) -> int:
    """Print one sentence on stderr and return the exit code."""
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports a lack of memory, by any allocator."""
    if isinstance(error, MemoryError) or "OutOfMemoryError" in class_names(error):
        return True
    return any(words in str(error) for words in ("out of memory", "allocate memory"))


def is_compiler_error(error: BaseException) -> bool:
    """Return whether an error comes from torch.compile."""
    return "TorchDynamoException" in class_names(error)


def class_names(error: BaseException) -> set[str]:
    """Return the names of an error's classes, which tell torch's errors without its import."""
    return {kind.__name__ for kind in type(error).__mro__}


def first_line(error: Exception) -> str:
    """Return the first line of an error, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(". ")
