"""Estimate the time that a sweep still takes, and label the bars of its images."""

import time

from dype.sampling.forecast import format_duration, work_of
from dype.sampling.settings import RunSettings


class SweepClock:
    """Clock of a sweep: the time left is proportional to the work left, as `work_of` counts it."""

    def __init__(self, runs: list[RunSettings]):
        """Start the clock; runs: settings of the images to generate."""
        self.total = sum(map(work_of, runs))
        self.start, self.done, self.overhead = time.perf_counter(), 0.0, 0.0

    def seconds_left(self, done: float, overhead: float = 0.0) -> float:
        """Return the seconds left.

        Args:
            done: work that is finished, above 0.
            overhead: seconds of the present image that are no work, as of the compiler.
        """
        elapsed = time.perf_counter() - self.start - self.overhead - overhead
        return elapsed * (self.total - done) / done

    def describe(self, run: RunSettings, fraction: float, overhead: float) -> str:
        """Return the time left, for the bar of an image.

        Args:
            run: settings of the image.
            fraction: of its steps that are finished, above 0.
            overhead: as in `seconds_left`.
        """
        seconds = self.seconds_left(self.done + fraction * work_of(run), overhead)
        return f"sweep {format_duration(seconds)} left"

    def finish(self, run: RunSettings, overhead: float) -> str:
        """Count a finished image, and return the time left for its line; "" after the last one.

        Args:
            run: settings of the image.
            overhead: as in `seconds_left`.
        """
        self.done += work_of(run)
        self.overhead += overhead
        if self.done > self.total * (1 - 1e-9):
            return ""
        return f", about {format_duration(self.seconds_left(self.done))} left"


def bar_labels(runs: list[RunSettings], labels: list[str]) -> list[str]:
    """Return a short label for the bar of each image: method, seed, and the size if it varies.

    Args:
        runs: settings of the images.
        labels: beginnings, such as [3/12].
    """
    several_sizes = len({(run.height, run.width) for run in runs}) > 1
    texts = []
    for label, run in zip(labels, runs, strict=True):
        size = f" {run.width}x{run.height}" * several_sizes
        texts.append(f"{label} {run.config.name}{size} seed {run.seed}")
    return texts
