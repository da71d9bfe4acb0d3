"""What is known of each transformer family and of each model that has a name of its own."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from dype.embedders import FluxDyPE

TOKEN = 16  # px per token: the VAE's factor 8 times the 2 x 2 packing


class Family(NamedTuple):
    """How DyPE enters a class of transformers."""

    attribute: str  # where the rotary embedder sits
    embedder: type  # what takes its place
    base_resolution: int  # px
    shift: str  # the schedule that the authors used


FLUX = Family("pos_embed", FluxDyPE, 1024, "cap")
FAMILIES = {"FluxTransformer2DModel": FLUX, "FluxControlNetModel": FLUX}

# The authors' default (their run_dype.py), word for word.
DARK_FANTASY = (
    "A mysterious woman stands confidently in elaborate, dark armor adorned with intricate designs,"
    " holding a staff, against a backdrop of smoke and an ominous red sky, with shadowy, gothic"
    " buildings in the distance."
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
    steps: int = 28
    guidance: float = 3.5
    true_cfg: float = 1.0
    negative_prompt: str | None = None
    max_sequence_length: int = 512
    base_resolution: int = 1024
    dtype: str = "bfloat16"
    height: int = 4096
    width: int = 4096
    prompt: str = DARK_FANTASY
    dype: dict = field(default_factory=lambda: {"method": "yarn"})  # of DyPEConfig
    schedule: dict = field(default_factory=lambda: DYNAMIC)  # for a dry run without the model
    family: Family = FLUX


MODELS = {
    "flux-krea": Model("black-forest-labs/FLUX.1-Krea-dev", guidance=4.5),
    "flux-dev": Model("black-forest-labs/FLUX.1-dev"),
    "flux-schnell": Model(
        "black-forest-labs/FLUX.1-schnell",
        steps=4,
        guidance=0.0,
        max_sequence_length=256,
        schedule={"use_dynamic_shifting": False, "shift": 1.0},
    ),
    "demo": Model(
        str(Path(__file__).parent / "demo" / "weights"),
        guidance=0.0,
        max_sequence_length=16,
        base_resolution=256,
        dtype="float32",
        height=512,
        width=512,
        prompt="a red ring on teal leaves",
        # one of those that keep the layout at 512 px (docs/log.md); `yarn` does not at 16 tokens
        dype={"method": "pi", "dype_scale": 1.0, "dype_exponent": 0.5},
        steps=20,
        true_cfg=3.0,
        negative_prompt="",
        schedule=DYNAMIC | {"base_image_seq_len": 16, "max_image_seq_len": 256},
    ),
}


DEFAULT_MODEL = "flux-krea"


def resolve_model(name: str) -> Model:
    """A model of the table by its name, repository or folder; else FLUX.1-dev's defaults."""
    for model in MODELS.values():
        if name == model.repo or Path(name).resolve() == Path(model.repo).resolve():
            return model
    return MODELS[name] if name in MODELS else Model(name)


def hub_folder(repo: str) -> str:
    """The name of a repository's folder in the hub's cache."""
    return "models--" + repo.replace("/", "--")


def family_of(module) -> Family:
    """The family of a transformer or controlnet, by its class. Raises TypeError if unknown."""
    for cls in type(module).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise TypeError(
        f"{type(module).__name__} is not supported, expected one of {', '.join(FAMILIES)}"
    )


def base_resolution(module: torch.nn.Module) -> int:
    """Trained size in px of what was loaded: its model's in the table, else its family's."""
    loaded = str(module.config.get("_name_or_path") or "")
    paths = (loaded, str(Path(loaded).resolve())) if loaded else ()
    for model in MODELS.values():
        if any(name in path for path in paths for name in (model.repo, hub_folder(model.repo))):
            return model.base_resolution
    return family_of(module).base_resolution
