"""Generate one image in multiple passes: each pass refines the image of the previous one."""

import math

from dype.config import check_number
from dype.families import PIXELS_PER_TOKEN
from dype.sampling import sample
from dype.sampling.latents import check_refining

# --multipass -> the scale of each pass
PASS_SCALES = {"single": (1.0,), "twopass": (0.5, 1.0), "threepass": (0.25, 0.5, 1.0)}
PASS_SCALES["progressive"] = ()  # because `progressive_passes` computes the scales from the size
STRENGTHS = {2: "pass2_strength", 3: "pass3_strength"}  # number of the pass -> its flag


def progressive_passes(height: int, width: int, base_resolution: int, steps: int) -> list[dict]:
    """Return the passes of --multipass progressive, as `multipass` takes them.

    The first pass generates an image with the area of the base resolution. The second one upscales
    it and runs only the steps in which new detail becomes visible.

    Args:
        height: px of the final image.
        width: px of the final image.
        base_resolution: training size in px.
        steps: number of steps of each schedule.

    Raises:
        ValueError: the final image is not larger than the base resolution.
    """
    scale = base_resolution / math.sqrt(height * width)
    if scale >= 1:
        raise ValueError(
            f"progressive passes begin at {base_resolution}x{base_resolution} px, expected a "
            f"larger image than {width}x{height}"
        )
    return [{"scale": scale, "steps": steps}, {"scale": 1.0, "steps": steps, "strength": None}]


def resolve_passes(
    name: str, height: int, width: int, steps: int, strengths: tuple, base_resolution: int
) -> list[dict]:
    """Return the passes of a --multipass value, as `run_passes` takes them.

    Args:
        name: key of `PASS_SCALES`.
        height: px of the final image.
        width: px of the final image.
        steps: number of steps of each schedule.
        strengths: strengths of the second and the third pass, each in (0, 1].
        base_resolution: training size in px.

    Raises:
        ValueError: the image is too small for progressive passes.
    """
    if name == "progressive":
        return resolve_pass_sizes(
            progressive_passes(height, width, base_resolution, steps), height, width
        )
    passes = [{"scale": scale, "steps": steps} for scale in PASS_SCALES[name]]
    for settings, strength in zip(passes[1:], strengths, strict=False):
        settings["strength"] = strength
    return resolve_pass_sizes(passes, height, width)


def multipass(pipe, prompt, height: int, width: int, passes: list[dict], **settings):
    """Generate an image in multiple passes, each refining the image of the previous one.

    Args:
        pipe: text-to-image pipeline.
        prompt: text, or the embeddings that `sample.encode_prompt` returns.
        height: px of the final image.
        width: px of the final image.
        passes: a dict per pass. `scale` is the fraction of both sides; it grows and ends with 1.
            `steps` is the number of steps of the schedule. From the second pass on, `strength` in
            (0, 1] or None has the meaning that it has in `sample.generate`.
        settings: further arguments of `sample.generate`.

    Raises:
        ValueError: `passes` is empty or has invalid values.
        TypeError: there are several passes, and `check_refining` refuses the pipeline.
    """
    if not passes:
        raise ValueError("passes is empty, expected at least one")
    previous_scale, names = 0.0, {"scale", "steps"}
    for pass_settings in passes:
        if pass_settings.keys() != names:
            raise ValueError(
                f"a pass is {pass_settings}, expected scale and steps, and strength from the "
                "second on"
            )
        strength = pass_settings.get("strength", 1.0)
        check_number("scale", pass_settings["scale"], previous_scale, 1, exclusive=True)
        check_number("steps", pass_settings["steps"], 1, 1000, integer=True)
        check_number("strength", strength, 0, 1, exclusive=True, optional=True)
        previous_scale, names = pass_settings["scale"], {"scale", "steps", "strength"}
    if previous_scale != 1:
        raise ValueError(f"the last pass has scale {previous_scale}, expected 1")
    if len(passes) > 1:
        check_refining(pipe)
    return run_passes(pipe, prompt, resolve_pass_sizes(passes, height, width), **settings)


def run_passes(pipe, prompt, passes: list[dict], image=None, **settings):
    """Run the passes one after the other and return the image of the last one.

    Each image is upscaled and gets noise of the sigma at which the next schedule starts. The passes
    exchange pixels because no family's autoencoder commutes with upscaling (docs/log).

    Args:
        pipe: text-to-image pipeline.
        prompt: text, or the embeddings that `sample.encode_prompt` returns.
        passes: arguments of `sample.generate` for each pass, as `resolve_pass_sizes` returns them.
        image: image that the first pass refines; None starts from noise.
        settings: arguments of `sample.generate` for all passes.
    """
    for pass_settings in passes:
        image = sample.generate(pipe, prompt, image=image, **settings | pass_settings)
    return image


def resolve_pass_sizes(passes: list[dict], height: int, width: int) -> list[dict]:
    """Replace the scale of each pass by its height and width in px."""
    return [
        {
            "height": scaled_side(height, settings["scale"]),
            "width": scaled_side(width, settings["scale"]),
        }
        | {name: value for name, value in settings.items() if name != "scale"}
        for settings in passes
    ]


def scaled_side(side: int, scale: float) -> int:
    """Scale a side in px and round it to the nearest token."""
    return max(
        PIXELS_PER_TOKEN, math.floor(side * scale / PIXELS_PER_TOKEN + 0.5) * PIXELS_PER_TOKEN
    )
