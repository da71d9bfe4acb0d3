"""Generate one image in multiple passes: each pass refines the image of the previous one."""

from dype.config import check_number
from dype.sampling import sample
from dype.sampling.latents import check_refining
from dype.sampling.passes import resolve_pass_sizes


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
