"""The models that --model accepts by name: repository, steps, guidance, prompt."""

import difflib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from dype.families import (
    CHROMA,
    DEMO_RESOLUTION,
    DEMO_WEIGHTS,
    FLUX,
    FLUX2,
    KREA2,
    KREA2_TURBO,
    QWEN,
    ZIMAGE,
    Family,
)
from dype.pipelines.hub import load_hub_json
from dype.pipelines.model_paths import FILE_ENDINGS, INDEX, check_model_path

# The authors' default prompts, word for word (their run_dype.py and run_dype_qwen.py).
DARK_FANTASY = (
    "A mysterious woman stands confidently in elaborate, dark armor adorned with intricate designs,"
    " holding a staff, against a backdrop of smoke and an ominous red sky, with shadowy, gothic"
    " buildings in the distance."
)
BEAR = (
    "A woman kneels on the forest floor, smiling as she offers grapes to a large brown bear beside"
    " her, surrounded by tall birch trees."
)
DYNAMIC = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@dataclass(frozen=True)
class Model:
    """The defaults of a model; an explicit flag overrides each."""

    repo: str  # hub id or folder
    pipeline: str = "FluxPipeline"
    family: Family = FLUX
    parameters_billion: float = 12  # of the transformer
    channels: int = 3072  # of the transformer
    steps: int = 28
    guidance: float = 3.5  # the pipeline's guidance_scale; 0: the model takes none
    cfg_flag: str = "true_cfg"  # the scale that a negative prompt needs; "": it has no effect
    cfg_disabled_at: float = 1.0  # a negative prompt needs a scale above this
    true_cfg: float = 1.0
    negative_prompt: str | None = None
    max_sequence_length: int = 512  # text tokens
    max_text_tokens: int = 512  # the pipeline's limit of max_sequence_length
    base_resolution: int = 1024  # px
    dtype: str = "bfloat16"
    height: int = 4096  # px
    width: int = 4096  # px
    prompt: str = DARK_FANTASY
    magic_suffix: str = ""  # the text that --magic_suffix appends to the prompt
    dype_defaults: dict = field(default_factory=lambda: {"method": "yarn"})  # DyPEConfig's fields
    scheduler_config: dict = field(default_factory=lambda: DYNAMIC)
    autoencoder: str = ""  # class in the index of a folder or repository; "": the pipeline's own
    is_guess: bool = False  # no file of the model could be read; these are FLUX.1-dev's defaults

    def config_defaults(self, method: str) -> dict:
        """Return `dype_defaults`, or the method alone if they may not suit it."""
        is_default = method == self.dype_defaults["method"]
        return self.dype_defaults if is_default else {"method": method}


# fmt: off
FLUX_DEV = Model("black-forest-labs/FLUX.1-dev")
FLUX2_DEV = Model(
    "black-forest-labs/FLUX.2-dev", "Flux2Pipeline", FLUX2, parameters_billion=32, channels=6144,
    steps=50, guidance=2.5, cfg_flag="",
)
FLUX2_KLEIN_BASE = replace(
    FLUX2_DEV, repo="black-forest-labs/FLUX.2-klein-base-9B", pipeline="Flux2KleinPipeline",
    parameters_billion=9, channels=4096, guidance=4.0,
)
Z_IMAGE = Model(
    "Tongyi-MAI/Z-Image", "ZImagePipeline", ZIMAGE, parameters_billion=6, channels=3840,
    steps=50, guidance=5.0, cfg_flag="guidance", cfg_disabled_at=0.0,
    scheduler_config={"use_dynamic_shifting": False, "shift": 3.0},
)
KREA_2 = Model(
    "krea/Krea-2-Raw", "Krea2Pipeline", KREA2, channels=6144,
    guidance=4.5, cfg_flag="guidance", cfg_disabled_at=0.0,
    scheduler_config=DYNAMIC | {"max_image_seq_len": 6400},
)
KREA_2_TURBO = replace(KREA_2, repo="krea/Krea-2-Turbo", family=KREA2_TURBO, steps=8, guidance=0.0)

MODELS = {
    "flux-krea": replace(FLUX_DEV, repo="black-forest-labs/FLUX.1-Krea-dev", guidance=4.5),
    "flux-dev": FLUX_DEV,
    "flux-schnell": replace(
        FLUX_DEV, repo="black-forest-labs/FLUX.1-schnell", steps=4, guidance=0.0,
        max_sequence_length=256, scheduler_config={"use_dynamic_shifting": False, "shift": 1.0},
    ),
    "flux2-dev": FLUX2_DEV,
    "flux2-klein": replace(
        FLUX2_KLEIN_BASE, repo="black-forest-labs/FLUX.2-klein-4B", parameters_billion=4,
        channels=3072, steps=4, guidance=0.0,
    ),
    "flux2-klein-base": FLUX2_KLEIN_BASE,
    "z-image": Z_IMAGE,
    "z-image-turbo": replace(Z_IMAGE, repo="Tongyi-MAI/Z-Image-Turbo", steps=9, guidance=0.0),
    "qwen-image": Model(
        "Qwen/Qwen-Image", "QwenImagePipeline", QWEN, parameters_billion=20, base_resolution=1328,
        steps=40, guidance=0.0, true_cfg=4.0, negative_prompt=" ", max_text_tokens=1024,
        prompt=BEAR, magic_suffix=", Ultra HD, 4K, cinematic composition.",
        scheduler_config=DYNAMIC
        | {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
    ),
    "chroma": Model(
        "lodestones/Chroma1-HD", "ChromaPipeline", CHROMA, parameters_billion=9,
        steps=35, guidance=5.0, cfg_flag="guidance",
    ),
    "krea-2": KREA_2,
    "krea-2-turbo": KREA_2_TURBO,
    "demo": Model(
        str(DEMO_WEIGHTS), parameters_billion=0.007, channels=256, base_resolution=DEMO_RESOLUTION,
        height=1024, width=1024, dtype="float32", steps=20, guidance=2.5, max_sequence_length=24,
        prompt="a low red sun over snowy blue mountains and a lake at dusk",
        scheduler_config=DYNAMIC | {"base_image_seq_len": 64, "max_image_seq_len": 1024},
        dype_defaults={"method": "yarn_paper", "alpha": 8.0},  # by docs/demo.md
    ),
}
# fmt: on
DEFAULT_MODEL = "flux-krea"
# A folder or repository outside the table gets the defaults of its pipeline class's representative;
# a distilled model gets those of DISTILLED.
REPRESENTATIVES = (
    "flux-dev",
    "flux2-dev",
    "flux2-klein-base",
    "z-image",
    "qwen-image",
    "chroma",
    "krea-2",
)
PIPELINES = {MODELS[name].pipeline: MODELS[name] for name in REPRESENTATIVES}
DISTILLED = {MODELS[name].pipeline: MODELS[name] for name in ("flux2-klein", "krea-2-turbo")}
# The transformers of these pipelines embed the guidance if their configuration says so; the value
# is the default of their class. In the other pipelines, guidance is classifier-free guidance.
GUIDANCE_EMBEDS = {"FluxPipeline": False, "Flux2Pipeline": True, "QwenImagePipeline": False}


def resolve_model(name: str, revision: str | None = None) -> Model:
    """Return the table's entry for a model, or else its pipeline class's defaults.

    A folder with the name and the pipeline class of a repository in the table gets its entry.
    For a hub id, the function downloads the index and the configurations of the scheduler and the
    transformer. Without a network it returns FLUX.1-dev's defaults.

    Args:
        name: a name of the table, a repository or a folder.
        revision: branch, tag or commit of a repository; None: the newest.

    Raises:
        ValueError: the name is none of these, or its pipeline class is not supported (for example,
            because it needs more than a prompt).
        UnavailableError: the hub answers that there is no such repository or revision, or that its
            license must be accepted.
    """
    if name in MODELS:
        return MODELS[name]
    is_word = not {"/", "\\"} & {*name} and not name.lower().endswith(FILE_ENDINGS)
    if not name or (is_word and not os.path.exists(name)):
        near = ", ".join(difflib.get_close_matches(name.lower(), MODELS, 3))
        names = f"{near}, another name that --help lists" if near else ", ".join(MODELS)
        raise ValueError(f"--model is {name!r}, expected {names}, a diffusers folder or a hub id")
    check_model_path(name)
    folder = Path(name).resolve()
    model_by_path = {Path(model.repo).resolve(): model for model in MODELS.values()}
    if folder in model_by_path:
        return model_by_path[folder]
    index = load_hub_json(name, INDEX, revision)
    pipeline = str(index.get("_class_name", FLUX_DEV.pipeline))
    if pipeline not in PIPELINES:
        raise ValueError(
            f"{name} is a {pipeline}, expected {', '.join(PIPELINES)}; others may work from "
            "Python, with apply_dype"
        )
    is_distilled = pipeline in DISTILLED and bool(index.get("is_distilled"))
    model = (DISTILLED if is_distilled else PIPELINES)[pipeline]
    for entry in MODELS.values():
        fits = pipeline not in DISTILLED or is_distilled == (entry.guidance == 0)
        same_name = folder.name == Path(entry.repo).name and entry.pipeline == pipeline
        if fits and same_name and folder.is_dir() and not Path(entry.repo).is_dir():
            model = entry
    if not index and folder.parent.is_dir() and not folder.is_dir():
        raise ValueError(
            f"--model is {name!r}, but there is no such folder, expected one that exists"
        )
    if not index:
        return replace(model, repo=name, is_guess=True)
    if pipeline in GUIDANCE_EMBEDS:
        model = set_guidance(model, load_hub_json(name, "transformer/config.json", revision))
    scheduler_config = load_hub_json(name, "scheduler/scheduler_config.json", revision)
    match index.get("vae"):
        case [str(), str(autoencoder)]:
            model = replace(model, autoencoder=autoencoder)
    return replace(model, repo=name, scheduler_config=scheduler_config or model.scheduler_config)


def takes_guidance(model: Model, config: dict) -> bool:
    """Return whether guidance_scale has an effect on a transformer.

    Args:
        model: of the catalog; a guidance of 0 says that a distilled model takes none.
        config: configuration of the transformer; {} if it is not known.
    """
    if not config or model.pipeline not in GUIDANCE_EMBEDS:
        return model.guidance > 0
    return bool(config.get("guidance_embeds", GUIDANCE_EMBEDS[model.pipeline]))


def set_guidance(model: Model, config: dict) -> Model:
    """Return the model with guidance 0 if its transformer takes none, else with its default.

    Args:
        model: of the catalog.
        config: configuration of the transformer; {} if it is not known.
    """
    if not takes_guidance(model, config):
        return replace(model, guidance=0.0)
    return model if model.guidance else replace(model, guidance=FLUX_DEV.guidance)
