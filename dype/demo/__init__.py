"""The demo model: its scenes, its training, and how its images are judged."""

from dype.pipelines import wait_passively

wait_passively()
