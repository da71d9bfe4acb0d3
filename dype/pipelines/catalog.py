"""The models that --model knows by name: repository, steps, guidance, prompt."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import hf_hub_download

from dype.families import DEMO_WEIGHTS, FLUX, FLUX2, KREA2, KREA2_TURBO, QWEN, ZIMAGE, Family

# The authors' defaults (their run_dype.py and run_dype_qwen.py), word for word.
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
    """Defaults that a model brings along; an explicit flag wins over each."""

    repo: str  # hub id or folder
    pipeline: str = "FluxPipeline"
    family: Family = FLUX
    parameters_billion: float = 12  # of the transformer's parameters
    steps: int = 28
    guidance: float = 3.5  # the pipeline's guidance_scale; 0: it takes none
    cfg_flag: str = (
        "true_cfg"  # the flag that makes a negative prompt count, above `cfg_disabled_at`
    )
    cfg_disabled_at: float = 1.0
    true_cfg: float = 1.0
    negative_prompt: str | None = None
    max_sequence_length: int = 512
    max_text_tokens: int = 512  # that the pipeline takes, tokens
    base_resolution: int = 1024
    dtype: str = "bfloat16"
    height: int = 4096
    width: int = 4096
    prompt: str = DARK_FANTASY
    magic_suffix: str = ""  # what --magic_suffix puts behind a prompt
    dype_defaults: dict = field(default_factory=lambda: {"method": "yarn"})  # of DyPEConfig
    scheduler_config: dict = field(default_factory=lambda: DYNAMIC)  # the scheduler's configuration
    is_guess: bool = False  # nothing could be read of it, all this is FLUX.1-dev's


# fmt: off
FLUX_DEV = Model("black-forest-labs/FLUX.1-dev")
FLUX2_DEV = Model(
    "black-forest-labs/FLUX.2-dev", "Flux2Pipeline", FLUX2, parameters_billion=32,
    steps=50, guidance=2.5, cfg_flag="",
)
FLUX2_KLEIN_BASE = replace(
    FLUX2_DEV, repo="black-forest-labs/FLUX.2-klein-base-9B", pipeline="Flux2KleinPipeline",
    parameters_billion=9, guidance=4.0,
)
Z_IMAGE = Model(
    "Tongyi-MAI/Z-Image", "ZImagePipeline", ZIMAGE, parameters_billion=6,
    steps=50, guidance=5.0, cfg_flag="guidance", cfg_disabled_at=0.0,
    scheduler_config={"use_dynamic_shifting": False, "shift": 3.0},
)
KREA_2 = Model(
    "krea/Krea-2-Raw", "Krea2Pipeline", KREA2, guidance=4.5, cfg_flag="guidance", cfg_disabled_at=0.0,
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
        steps=4, guidance=0.0,
    ),
    "flux2-klein-base": FLUX2_KLEIN_BASE,
    "z-image": Z_IMAGE,
    "z-image-turbo": replace(Z_IMAGE, repo="Tongyi-MAI/Z-Image-Turbo", steps=9, guidance=0.0),
    "qwen-image": Model(
        "Qwen/Qwen-Image", "QwenImagePipeline", QWEN, parameters_billion=20, base_resolution=1328,
        steps=40, guidance=0.0, true_cfg=4.0, negative_prompt=" ", max_text_tokens=1024,
        prompt=BEAR, magic_suffix=", Ultra HD, 4K, cinematic composition.",
        scheduler_config=DYNAMIC | {"max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
    ),
    "chroma": Model(
        "lodestones/Chroma1-HD", "ChromaPipeline", parameters_billion=9,
        steps=35, guidance=5.0, cfg_flag="guidance",
    ),
    "krea-2": KREA_2,
    "krea-2-turbo": KREA_2_TURBO,
    "demo": Model(
        str(DEMO_WEIGHTS), parameters_billion=0.007, base_resolution=256, height=512, width=512, dtype="float32",
        steps=20, guidance=0.0, true_cfg=5.0, negative_prompt="", max_sequence_length=16,
        prompt="a red ring on teal leaves",
        # the nearest texture of those that keep the layout at 512 px (docs/demo.md)
        dype_defaults={"method": "yarn_paper"},
        scheduler_config=DYNAMIC | {"base_image_seq_len": 16, "max_image_seq_len": 256},
    ),
}
# fmt: on
DEFAULT_MODEL = "flux-krea"
# Defaults of any other folder or repository: by the class of its pipeline, and if it is distilled.
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


def resolve_model(name: str, revision: str | None = None) -> Model:
    """A model of the table by its name, repository or folder; else its pipeline class's defaults.

    A folder named like a repository of the table, and of its class, counts as that. Of a hub id
    the index and the scheduler's configuration are fetched; without a network FLUX.1-dev's
    defaults are taken. Raises ValueError for a name that is none of these, and for the class of a
    pipeline that needs more than a prompt, or is not supported.
    """
    if name in MODELS:
        return MODELS[name]
    if not name or ("/" not in name and not Path(name).is_dir()):
        raise ValueError(
            f"--model is {name!r}, expected one of {', '.join(MODELS)}, a diffusers folder or a "
            "hub id"
        )
    folder = Path(name).resolve()
    known = {Path(model.repo).resolve(): model for model in MODELS.values()}
    if folder in known:
        return known[folder]
    index = load_hub_json(name, "model_index.json", revision)
    pipeline = index.get("_class_name", FLUX_DEV.pipeline)
    if pipeline not in PIPELINES:
        raise ValueError(
            f"{name} is a {pipeline}, expected {', '.join(PIPELINES)}; others may work from "
            "Python, with apply_dype"
        )
    usual = DISTILLED if index.get("is_distilled") and pipeline in DISTILLED else PIPELINES
    model = usual[pipeline]
    for other in MODELS.values():
        if folder.name == Path(other.repo).name and other.pipeline == pipeline and folder.is_dir():
            model = model if Path(other.repo).is_dir() else other
    if not index:
        return replace(model, repo=name, is_guess=True)
    schedule = load_hub_json(name, "scheduler/scheduler_config.json", revision)
    return replace(model, repo=name, scheduler_config=schedule or model.scheduler_config)


def load_hub_json(repo: str, file: str, revision: str | None = None) -> dict:
    """A JSON file of a folder or a hub id, empty if it can't be had."""
    try:
        here = Path(repo).is_dir()
        path = Path(repo, file) if here else hf_hub_download(repo, file, revision=revision)
        content = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError):  # the hub's errors are OSErrors
        return {}
    return content if isinstance(content, dict) else {}
