"""Families of transformers: class name -> embedder, arguments, trained size; or a refusal.

The command line reads this table before it imports torch, so embedders are names here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PIXELS_PER_TOKEN = 16  # of every family: factor 8 of the autoencoder, 2 x 2 latents a token
DEMO_WEIGHTS = Path(__file__).parent / "demo" / "weights"
DEMO_RESOLUTION = 512  # px


def sigma_from_timestep(time):
    """Return sigma from a timestep in [0, 1]."""
    return time


def sigma_from_thousandths(time):
    """Return sigma from a timestep in [0, 1000]."""
    return time / 1000


def sigma_from_complement(time):
    """Return sigma from 1 - sigma."""
    return 1 - time


FLUX_TEXT = (("encoder_hidden_states", 1), ("txt_ids", -2))


class Family(NamedTuple):
    """Embedder, arguments and trained size of a class of transformers."""

    attribute: str  # that holds the rotary embedder
    embedder: str  # class of its replacement, a key of `patch.EMBEDDERS`
    base_resolution: int = 1024  # px
    num_pairs: int = 28  # of the axes of height and width, in the family's own checkpoints
    shift: str = "model"  # default of `DyPEConfig.shift`
    timestep_arg: str = "timestep"  # argument of `forward` that carries sigma ...
    to_sigma: Callable = sigma_from_timestep  # ... and its conversion to sigma in [0, 1]
    ids_arg: str = "img_ids"  # argument with the positions of the image tokens, if there is one
    text_ids: str = "flux1"  # where the text's positions are, a key of `embedders.TEXT_IDS`
    image_arg: str = "hidden_states"  # argument with the image's tokens ...
    image_layer: str = "x_embedder"  # ... and the layer that embeds them
    # arguments with the text, and the axis of its tokens; None: copies of it would not be exact
    text_args: tuple[tuple[str, int], ...] | None = FLUX_TEXT
    # (tokens, steps) -> mu, if the pipeline ignores the scheduler's rule
    own_mu_rule: Callable | None = None
    # the pipeline passes no sigmas to a scheduler with `use_flow_sigmas`
    scheduler_makes_sigmas: bool = False


def flux2_mu(tokens: int, steps: int) -> float:
    """Return mu by FLUX.2's rule, which reads nothing from the scheduler."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return compute_empirical_mu(tokens, steps)


def krea2_turbo_mu(tokens: int, steps: int) -> float:
    """Return mu of the distilled Krea 2, the same at every size."""
    return 1.15


FLUX = Family("pos_embed", "DyPEFluxPosEmbed", shift="cap", scheduler_makes_sigmas=True)
BRIA = FLUX._replace(
    to_sigma=sigma_from_thousandths,
    shift="model",
    scheduler_makes_sigmas=False,
    text_args=None,  # Fibo has the text of further layers in every block
)
CHROMA = FLUX._replace(scheduler_makes_sigmas=False, text_args=(*FLUX_TEXT, ("attention_mask", 1)))
FLUX2 = FLUX._replace(num_pairs=16, text_ids="flux2", own_mu_rule=flux2_mu)
KREA2 = CHROMA._replace(
    attribute="rotary_emb",
    ids_arg="position_ids",
    text_ids="krea2",
    image_layer="img_in",
    text_args=(("encoder_hidden_states", 1), ("position_ids", 0), ("encoder_attention_mask", 1)),
)
KREA2_TURBO = KREA2._replace(own_mu_rule=krea2_turbo_mu)
BFL = FLUX._replace(
    attribute="pe_embedder",
    embedder="DyPEEmbedND",
    timestep_arg="timesteps",
    image_arg="img",
    image_layer="img_in",
    text_args=(("txt", 1), ("txt_ids", -2)),
)
QWEN = Family(
    "pos_embed",
    "DyPEQwenEmbedRope",
    1328,
    image_layer="img_in",
    text_args=(("encoder_hidden_states", 1), ("encoder_hidden_states_mask", 1)),
)
NUCLEUS = QWEN._replace(base_resolution=1024)
ZIMAGE = Family(
    "rope_embedder",
    "DyPEZImageRopeEmbedder",
    num_pairs=24,
    timestep_arg="t",
    to_sigma=sigma_from_complement,
    text_args=None,
)

FAMILIES = {
    "FluxTransformer2DModel": FLUX,
    "FluxControlNetModel": FLUX,
    "ChromaTransformer2DModel": CHROMA,
    "Flux2Transformer2DModel": FLUX2,
    "Krea2Transformer2DModel": KREA2,
    "BriaTransformer2DModel": BRIA,
    "BriaFiboTransformer2DModel": BRIA,
    "Flux": BFL,  # Black Forest Labs' own class, and copies of it in host applications
    "QwenImageTransformer2DModel": QWEN,
    "QwenImageControlNetModel": QWEN,
    "NucleusMoEImageTransformer2DModel": NUCLEUS,
    "ZImageTransformer2DModel": ZIMAGE,
    "ZImageControlNetModel": ZIMAGE,
}
TEXT_ON_THE_GRID = (
    "its text positions continue the image's rows and columns, and where they belong after a "
    "stretch is an open question"
)
UNSUPPORTED = {
    "HiDreamImageTransformer2DModel": "its pipeline generates 1024x1024 px alone",
    "ErnieImageTransformer2DModel": "its embedder returns angles, so there is no attention scale",
    "OvisImageTransformer2DModel": TEXT_ON_THE_GRID,
    "LongCatImageTransformer2DModel": TEXT_ON_THE_GRID,
    "BriaFibo2Transformer2DModel": "its image and references share one call of the embedder",
    "Flux3Transformer2DModel": "diffusers has it in modular pipelines alone, never tried",
    "HunyuanImageTransformer2DModel": "its embedder is called with the latent, not with positions",
    "Lumina2Transformer2DModel": "its embedder cuts the image into tokens too",
    "PRXTransformer2DModel": "it embeds rows and columns alone, in a format of its own",
    "QwenImage21Transformer2DModel": "its text, images and cached keys share one table",
}
UNSUPPORTED_PIPELINES = dict.fromkeys(
    ("VisualClozePipeline", "VisualClozeGenerationPipeline"),
    "its examples and its result share one canvas, whose trained size is not that of one image",
)
# configuration entries that make another model of a supported class
UNSUPPORTED_IF = {
    "siglip_feat_dim": "Z-Image-Omni's references share rows and columns with the generated image",
    "use_layer3d_rope": "Qwen-Image-Layered has an embedder of its own",
}


def check_pipeline(pipe) -> None:
    """Raise TypeError if DyPE supports the pipeline's transformer, but not the pipeline."""
    for cls in type(pipe).__mro__:
        if cls.__name__ in UNSUPPORTED_PIPELINES:
            reason = UNSUPPORTED_PIPELINES[cls.__name__]
            raise TypeError(f"{cls.__name__} is not supported: {reason}")


def family_of_pipeline(pipe, family: Family) -> Family:
    """Return the family whose rules make the pipeline's schedule.

    family: of the pipeline's transformer.
    """
    distilled = getattr(pipe, "config", {}).get("is_distilled")
    return KREA2_TURBO if family is KREA2 and distilled else family


def family_of(module) -> Family:
    """Return the family of a transformer or controlnet, by its class.

    Raises:
        TypeError: the class is not supported; with the reason if we know it.
    """
    names = [cls.__name__ for cls in type(module).__mro__]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    reason = next((f": {UNSUPPORTED[name]}" for name in names if name in UNSUPPORTED), "")
    raise TypeError(f"{names[0]} is not supported{reason}; expected one of {', '.join(FAMILIES)}")


def check_text_repeat(config, family: Family) -> None:
    """Raise ValueError if the config repeats the text of a family whose copies are not exact."""
    if config.text_repeat != 1 and family.text_args is None:
        raise ValueError(
            f"text_repeat is {config.text_repeat}, but this model adds to its text within the "
            "transformer, where no copy can be made, expected 1"
        )


def check_pairs(config, count: int) -> None:
    """Raise ValueError if `rdfc_pairs` names a pair that axes of `count` pairs do not have."""
    has_effect = config.method in ("rdfc", "riflex") and config.rdfc_pairs is not None
    if has_effect and max(map(int, config.rdfc_pairs.split(","))) >= count:
        raise ValueError(
            f"rdfc_pairs is {config.rdfc_pairs!r}, expected numbers from 0 to {count - 1}"
        )


def base_resolution(module) -> int:
    """Return the trained size in px: DEMO_RESOLUTION of the demo, else that of the family."""
    name = getattr(module, "config", {}).get("_name_or_path")
    path = Path(name).resolve() if name else None
    if path and path.exists() and path.is_relative_to(DEMO_WEIGHTS.resolve()):
        return DEMO_RESOLUTION
    return family_of(module).base_resolution
