"""Resolve --multipass and an image's size to the passes that generate it."""

import math

from dype.families import PIXELS_PER_TOKEN

# --multipass -> the scale of each pass
PASS_SCALES = {"single": (1.0,), "twopass": (0.5, 1.0), "threepass": (0.25, 0.5, 1.0)}
PASS_SCALES["progressive"] = ()  # because `progressive_passes` computes the scales from the size
STRENGTHS = {2: "pass2_strength", 3: "pass3_strength"}  # number of the pass -> its flag
# classes of which `latents.VAE_ENCODERS` has the functions
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderKLQwenImage", "AutoencoderKLFlux2")


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


def check_autoencoder(pipeline: str, autoencoder: str) -> None:
    """Raise TypeError unless `encode_latents` supports these classes, both by name."""
    is_flux2 = pipeline.startswith("Flux2")
    supported = [kind for kind in AUTOENCODERS if (kind == "AutoencoderKLFlux2") == is_flux2]
    if autoencoder not in supported:
        raise TypeError(
            f"{autoencoder} is not supported by --multipass, --progressive and --init_image, which "
            f"encode images, expected {' or '.join(supported)}"
        )
