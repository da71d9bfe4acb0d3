"""The command line of run_dype.py: flags, their settings, what is refused."""

from dype.pipelines import wait_passively

wait_passively()
