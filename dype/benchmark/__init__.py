"""What DyPE costs."""

from dype.pipelines import wait_passively

wait_passively()
