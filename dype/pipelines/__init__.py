"""Get a pipeline ready: what it is, where it fits, what makes its steps cheaper."""

import os


def wait_passively() -> None:
    """Let OpenMP's threads sleep where they wait, unless the environment says otherwise.

    For programs, before torch is imported. Threads that spin make a command beside other work many
    times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
