"""What the images of a finished sweep score."""

from dype.pipelines import wait_passively

wait_passively()
