"""The paper's figures, and some that it lacks."""

from dype.pipelines import wait_passively

wait_passively()
