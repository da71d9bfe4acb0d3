"""Generate one image in several passes, each refining the one before."""

import math

from dype.config import check_number
from dype.families import PIXELS_PER_TOKEN
from dype.sampling import sample

# --multipass -> the scale of each pass
PASS_SCALES = {"single": (1.0,), "twopass": (0.5, 1.0), "threepass": (0.25, 0.5, 1.0)}
PASS_SCALES["progressive"] = ()  # see `progressive_passes`, which has its own
STRENGTHS = {2: "pass2_strength", 3: "pass3_strength"}  # by the number of passes that have it


def progressive_passes(height: int, width: int, base_resolution: int, steps: int) -> list[dict]:
    """Passes for `multipass`: an image of the base resolution's area first; then, enlarged, the
    steps alone in which something finer is to be seen. Raises ValueError if the size is no larger.
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
    """The passes of `PASSES[name]`; strengths: of the second, the third. Raises ValueError."""
    if name == "progressive":
        return resolve_pass_sizes(
            progressive_passes(height, width, base_resolution, steps), height, width
        )
    passes = [{"scale": scale, "steps": steps} for scale in PASS_SCALES[name]]
    for later, strength in zip(passes[1:], strengths, strict=False):
        later["strength"] = strength
    return resolve_pass_sizes(passes, height, width)


def multipass(pipe, prompt, height: int, width: int, passes: list[dict], **settings):
    """An image of `height` x `width` px in several passes, each refining the one before.

    passes: dicts with `scale` (of both sides; growing, at last 1), `steps`, and from the second on
    `strength` in (0, 1], or None as in `generate`. settings: the others of `generate`. Raises ValueError
    for passes that make no sense.
    """
    if not passes:
        raise ValueError("passes is empty, expected at least one")
    before, names = 0.0, {"scale", "steps"}
    for part in passes:
        if part.keys() != names:
            raise ValueError(
                f"a pass is {part}, expected scale and steps, and strength from the second on"
            )
        check_number("scale", part["scale"], before, 1, exclusive=True)
        check_number("steps", part["steps"], 1, 1000, integer=True)
        check_number("strength", part.get("strength", 1.0), 0, 1, exclusive=True, optional=True)
        before, names = part["scale"], {"scale", "steps", "strength"}
    if before != 1:
        raise ValueError(f"the last pass has scale {before}, expected 1")
    return run_passes(pipe, prompt, resolve_pass_sizes(passes, height, width), **settings)


def run_passes(pipe, prompt, passes: list[dict], image=None, **settings):
    """The image of the last pass; the first refines `image`, if there is one.

    The image of each pass is enlarged and noised to the level that the next one's schedule has
    there, which depends on the size where the shift does. Hand-over is in pixels: no family's
    autoencoder commutes with enlarging (docs/log/2026-11-21-latent-hand-over.md).
    """
    for one in passes:
        image = sample.generate(pipe, prompt, image=image, **settings | one)
    return image


def resolve_pass_sizes(passes: list[dict], height: int, width: int) -> list[dict]:
    """The passes with their sizes in px instead of scales."""
    return [
        {"height": scaled_side(height, one["scale"]), "width": scaled_side(width, one["scale"])}
        | {name: value for name, value in one.items() if name != "scale"}
        for one in passes
    ]


def scaled_side(side: int, scale: float) -> int:
    """A side in px at a fraction of its length, to the nearest token."""
    return max(
        PIXELS_PER_TOKEN, math.floor(side * scale / PIXELS_PER_TOKEN + 0.5) * PIXELS_PER_TOKEN
    )
