"""The processes that torchrun started, and which settings they allow; without torch."""

import os

from dype.families import PIXELS_PER_TOKEN
from dype.pipelines.choices import split_backends

# pipeline class whose transformer has a plan for context parallelism -> whether all processes get
# equal shards. Qwen-Image's shards may differ, because it does not pad its text tokens.
CONTEXT_PARALLEL_PIPELINES = {
    "FluxPipeline": True,
    "Flux2Pipeline": True,
    "Flux2KleinPipeline": True,
    "QwenImagePipeline": False,
}


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes, from torchrun's environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_processes(run, dry_run: bool) -> None:
    """Raise ValueError if a run's settings do not allow its --ulysses, --ring or --device.

    Args:
        run: a `RunSettings`.
        dry_run: nothing is generated, so the number of processes does not matter.
    """
    count, (_, world_size) = run.processes, rank_and_world_size()
    if world_size > 1 and run.device and ":" in run.device:
        raise ValueError(
            f"--device is {run.device!r}, expected no number: each of the {world_size} processes "
            "uses its own GPU"
        )
    if count == 1:
        return
    if run.ulysses > 1 and run.ring > 1:
        raise ValueError("--ulysses and --ring both split the tokens, expected one of them")
    flag, pipeline = "ulysses" if run.ulysses > 1 else "ring", run.entry.pipeline
    if pipeline not in CONTEXT_PARALLEL_PIPELINES:
        raise ValueError(
            f"--{flag} is {count}, but the tokens of a {pipeline} cannot be split, expected "
            f"{', '.join(CONTEXT_PARALLEL_PIPELINES)}"
        )
    if count != world_size and not dry_run:
        raise ValueError(
            f"--{flag} is {count}, but there {'is' if world_size == 1 else 'are'} {world_size} "
            f"process{'es' * (world_size > 1)}, expected torchrun --nproc-per-node={count} "
            "run_dype.py ..."
        )
    if run.cache != "off":
        raise ValueError(f"--cache is {run.cache!r}, expected off with --{flag}")
    if run.compile == "full":
        raise ValueError(f"--compile is 'full', expected blocks or off with --{flag}")
    backends, attention = split_backends(), run.attention or "native"
    if flag == "ring":  # because native attention does not return the log-sum-exp that ring needs
        backends = backends - {"native", "_native_npu"}
    if attention not in backends:
        raise ValueError(
            f"--{flag} is {count}, but --attention {attention} does not support it, expected "
            f"--attention {', '.join(sorted(backends))}"
        )
    sizes = [(image_pass["width"], image_pass["height"]) for image_pass in run.passes]
    tokens = {
        f"{width}x{height} px": width * height // PIXELS_PER_TOKEN**2 for width, height in sizes
    }
    tokens["--max_sequence_length"] = run.max_sequence_length
    for origin, number in tokens.items():
        if CONTEXT_PARALLEL_PIPELINES[pipeline] and number % count:
            raise ValueError(
                f"--{flag} is {count}, expected a divisor of the {number} tokens of {origin}"
            )
