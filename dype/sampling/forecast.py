"""Forecast seconds and memory of an image from what this machine did before.

The last measurement of every kind of run and size stands in speed.json in the user's cache folder,
because folders of images are moved and deleted. A missing or broken file is as good as an empty
one, and one that cannot be written changes nothing.
"""

import json
import math
import os
from contextlib import suppress
from pathlib import Path

from dype.families import PIXELS_PER_TOKEN
from dype.pipelines import devices
from dype.sampling import records
from dype.sampling.sample import num_skipped_steps
from dype.sampling.settings import RunSettings

# settings that decide how long a step takes
SPEED_SETTINGS = ("model", "transformer", "dtype", "offload", "quantize", "compile", "attention")
SPEED_SETTINGS += ("cache", "tiled_vae", "ulysses", "ring")
FAR = 16  # times as many tokens, beyond which a measurement says nothing


def history_path() -> Path:
    """Return the file of the measurements. Raises RuntimeError without a home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dype" / "speed.json"


def read_history() -> dict:
    """Return kind of run -> number of tokens, as text -> measurement; {} without a file."""
    with suppress(OSError, ValueError, RuntimeError):
        history = json.loads(history_path().read_bytes())
        if isinstance(history, dict):
            return history
    return {}


def speed_key(run: RunSettings) -> str:
    """Return a text that is equal for runs of the same speed."""
    settings = {name: getattr(run, name) for name in SPEED_SETTINGS}
    scale = run.guidance if run.entry.cfg_flag == "guidance" else run.true_cfg
    settings["two calls a step"] = scale > run.entry.cfg_disabled_at
    if run.compile != "off":  # because another size in a pass compiles again
        settings["passes"] = run.multipass
    device = devices.device_name(run.device or devices.default_device())
    parts = [f"{name} {value}" for name, value in settings.items() if value is not None]
    return ", ".join([device, *parts])


def count_tokens(settings: RunSettings | dict) -> int:
    """Return the number of image tokens, from settings with height and width."""
    values = settings if isinstance(settings, dict) else vars(settings)
    return values["height"] * values["width"] // PIXELS_PER_TOKEN**2


def work_of_pass(tokens: int, steps: int, channels: int) -> float:
    """Return the work of a pass: steps x tokens, with the part of attention.

    Attention costs as much as the rest at 6 x channels tokens: a block has 24 channels^2 FLOP per
    token, and 4 channels per pair of tokens.

    Args:
        tokens: number of image tokens.
        steps: number of steps that the pass runs.
        channels: of the transformer.
    """
    return steps * tokens * (1 + tokens / (6 * channels))


def count_steps(run: RunSettings) -> list[int]:
    """Return how many steps each pass runs; at most so many where the first pass decides."""
    return [
        settings["steps"] - num_skipped_steps(settings["steps"], settings.get("strength") or 1.0)
        for settings in run.passes
    ]


def work_of(run: RunSettings, steps: list[int] | None = None) -> float:
    """Return the work of an image; steps: that each pass ran, None: `count_steps`."""
    steps = count_steps(run) if steps is None else steps
    tokens, channels = map(count_tokens, run.passes), run.entry.channels
    return sum(work_of_pass(*pair, channels) for pair in zip(tokens, steps, strict=True))


def remember(
    run: RunSettings, steps: list[int], seconds: float, compile_seconds: float, peak: int | None
) -> None:
    """Write what an image took to the history, if that can be written.

    Args:
        run: settings of the image.
        steps: number of steps that each pass ran.
        seconds: of the image, without its text encoders.
        compile_seconds: of these, those of the compiler; an image that compiled nothing keeps
            those of the last one that did.
        peak: bytes at the peak.
    """
    history = read_history()
    sizes = history.setdefault(speed_key(run), {})
    entry = {"rate": (seconds - compile_seconds) / work_of(run, steps), "peak": peak}
    entry["size"] = f"{run.width}x{run.height}"
    with suppress(AttributeError, OSError, TypeError, RuntimeError):
        earlier = sizes.get(str(count_tokens(run)), {})
        entry["compile"] = compile_seconds or earlier.get("compile", 0.0)
        sizes[str(count_tokens(run))] = entry
        history_path().parent.mkdir(parents=True, exist_ok=True)
        records.write_atomically({history_path(): json.dumps(history, indent=1).encode()})


def find_measurement(run: RunSettings) -> tuple[dict, str] | None:
    """Return the measurement nearest in size, and another size than the image's that it is of.

    The size is "" if it is the image's. None: there is no measurement of a similar size.
    """
    tokens = count_tokens(run)
    with suppress(AttributeError, KeyError, TypeError, ValueError):  # a broken file
        sizes = {int(text): entry for text, entry in read_history()[speed_key(run)].items()}
        nearest = min(sizes, key=lambda size: abs(math.log(size / tokens)))
        entry = {name: float(sizes[nearest][name] or 0) for name in ("rate", "peak", "compile")}
        if abs(math.log(nearest / tokens)) <= math.log(FAR):
            size = str(sizes[nearest].get("size", "another size"))  # which old files lack
            return entry, "" if nearest == tokens else size
    return None


def estimate_seconds(run: RunSettings) -> float | None:
    """Return the seconds of an image by what this machine did before; None if it did nothing."""
    measurement = find_measurement(run)
    return measurement and measurement[0]["rate"] * work_of(run)


def estimate_compile_seconds(run: RunSettings) -> float | None:
    """Return the seconds of the compiler for an image of the same size; None if unknown."""
    measurement = find_measurement(run)
    is_known = measurement and not measurement[1] and measurement[0]["compile"]
    return measurement[0]["compile"] if is_known else None


def estimate_peak(run: RunSettings) -> float | None:
    """Return the peak in bytes of an image of the same size; None if unknown."""
    measurement = find_measurement(run)
    is_known = measurement and not measurement[1] and measurement[0]["peak"]
    return measurement[0]["peak"] if is_known else None


def format_duration(seconds: float) -> str:
    """Format a duration as 59 s, 12 min or 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe_origin(runs: list[RunSettings]) -> str:
    """Return where the estimates of seconds come from; every image has one."""
    sizes = {find_measurement(run)[1] for run in runs} - {""}
    if not sizes:
        return "as before on this machine"
    return f"scaled from {sizes.pop() if len(sizes) == 1 else 'other sizes'} on this machine"


def describe_time(run: RunSettings) -> str:
    """Return a text with the expected time of an image."""
    seconds = estimate_seconds(run)
    if seconds is None:
        return "unknown until this machine has generated such an image"
    limit = "at most " if any(item.get("strength", 1) is None for item in run.passes) else ""
    text = f"{limit}about {format_duration(seconds)}, {describe_origin([run])}"
    compile_seconds = estimate_compile_seconds(run) if run.compile != "off" else None
    if compile_seconds:
        text += f", and {format_duration(compile_seconds)} to compile"
    return f"{text}; the text encoders and loading are not counted"
