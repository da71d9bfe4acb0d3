"""Show on a terminal how far an image is: one bar for all its steps, words for longer waits.

Elsewhere, as in a pipe or a log, nothing of this is written.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


@contextmanager
def show_word(word: str, visible: bool = True) -> Iterator[None]:
    """Show a word on the terminal within the context; what is printed meanwhile replaces it."""
    visible = visible and sys.stderr.isatty()
    if visible:
        print(word, end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if visible:
            print(" " * len(word), end="\r", file=sys.stderr, flush=True)


class ImageBar:
    """Bar of all steps of all passes of an image; a context manager that removes it at the end."""

    def __init__(
        self,
        label: str,
        steps: list[int],
        *,
        visible: bool = True,
        time_left: Callable[[float, float], str] = lambda fraction, compile_seconds: "",
    ):
        """Show the bar, on a terminal alone.

        Args:
            label: short text before the bar.
            steps: number of steps of each pass. A pass may turn out to be shorter.
            visible: this process shows it.
            time_left: function from the finished fraction of the image, and the seconds of the
                compiler, to a text behind the bar.
        """
        self.steps, self.time_left = [*steps], time_left
        self.finished_passes, self.compile_seconds, self.compile_start = 0, 0.0, 0.0
        self.bar = tqdm(
            total=sum(steps),
            desc=label,
            disable=None if visible else True,
            leave=False,
            delay=1e-9,  # not before the first word or step, because lines may be printed
            dynamic_ncols=True,
            bar_format=BAR_FORMAT,
        )

    def __enter__(self):
        """Return the bar."""
        return self

    def __exit__(self, *error) -> None:
        """Remove the bar from the terminal."""
        self.bar.close()

    def say(self, word: str) -> None:
        """Show a word behind the bar, in place of the time left; "" removes it."""
        self.bar.set_postfix_str(word)

    def finish_step(self, number: int, count: int) -> None:
        """Count a finished step.

        Args:
            number: of the step in its pass, from 1.
            count: steps of the pass.
        """
        self.steps[self.finished_passes] = count
        self.bar.total = sum(self.steps)
        before = sum(self.steps[: self.finished_passes])
        word = self.time_left((before + number) / self.bar.total, self.compile_seconds)
        if number == count:  # the pass ends in pixels
            self.finished_passes += 1
            word = "decoding"
        self.bar.set_postfix_str(word, refresh=False)
        self.bar.update()
        if number == count:  # because `update` waits for the next step that is due on the screen
            self.bar.refresh()

    def begin_compiling(self, expected: str) -> None:
        """Say that the compiler works; expected: how long, ", about 2 min", or ""."""
        self.compile_start = time.perf_counter()
        self.say(f"compiling{expected}")

    def end_compiling(self) -> None:
        """Add the seconds of the compiler to `compile_seconds`."""
        self.compile_seconds += time.perf_counter() - self.compile_start
        self.say("")
