"""The settings of one image: their flags, which of them decide what is in it, and its name."""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from dype.config import CONFIG_FLAGS, DEFAULT_LAMBDA_S, DyPEConfig, flag, flags_of
from dype.pipelines.acceleration import CACHES, COMPILES
from dype.pipelines.catalog import DEFAULT_MODEL, MODELS, Model
from dype.pipelines.devices import DTYPES
from dype.pipelines.loading import OFFLOADS, QUANTIZE_CHOICES
from dype.sampling.multipass import PASS_SCALES

SIDE_LIMITS = {"metavar": "PX", "low": 64, "high": 16384, "multiple": 16}
STRENGTH_LIMITS = {
    "low": 0,
    "high": 1,
    "exclusive": True,
}  # the share of the steps that a pass runs
MACHINE_ONLY = {"changes_image": False}  # where and how fast, which is no part of what is asked for


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything that one image needs, resolved (`dype.cli.settings.resolve`)."""

    # fmt: off
    prompt: str = flag(
        "one or several (default: the authors' dark-fantasy scene; demo: "
        f"{MODELS['demo'].prompt})", metavar="TEXT", group="what to draw",
        parser_options={"nargs": "+", "action": "extend"},
    )
    negative_prompt: str | None = flag(
        "needs --true_cfg, or --guidance where that is one (default: none; qwen-image \" \", demo "
        "\"\")", metavar="TEXT",
    )
    height: int = flag("", **SIDE_LIMITS)
    width: int = flag("", **SIDE_LIMITS)
    seed: int = flag("", 42, low=0, high=2**63 - 1, label="seed {}")
    steps: int = flag("", low=1, high=1000, label="{} steps")
    guidance: float = flag(
        "the pipeline's guidance_scale; 0: it takes none", low=0, high=100, label="guidance {}"
    )
    true_cfg: float = flag(
        "classifier-free guidance by two denoiser calls a step; 1 is off", low=1, high=100,
        label="true CFG {}",
    )
    max_sequence_length: int = flag("text tokens", low=1, high=1024)
    init_image: str | None = flag(
        "enlarge this image to the size and refine it (default: start from noise)", None,
        metavar="FILE",
    )
    strength: float = flag(
        "with --init_image: the share of the steps, above 0 up to 1", 0.5, **STRENGTH_LIMITS,
        has_effect=lambda settings: settings["init_image"] is not None,
    )
    multipass: str = flag(
        "single; twopass: at half the size, then enlarged and refined; threepass: at a quarter, at "
        "half, in full; progressive", "single", choices=tuple(PASS_SCALES), label="{}",
        group="several passes", aliases=("--dype_multipass",), switches=(
            ("--progressive", "progressive", "as --multipass progressive: the base resolution "
             "first, then at full size only the steps in which more is to be seen"),
        ),
    )
    pass2_strength: float = flag(
        "the share of the steps that the second pass runs", 0.5, label="strength {}", **STRENGTH_LIMITS,
        has_effect=lambda settings: len(PASS_SCALES[settings["multipass"]]) > 1,
    )
    pass3_strength: float = flag(
        "", 0.4, label="third {}", **STRENGTH_LIMITS,
        has_effect=lambda settings: len(PASS_SCALES[settings["multipass"]]) > 2,
    )
    model: str = flag(
        f"{', '.join(MODELS)}, or a diffusers folder or hub id of one of their kinds",
        DEFAULT_MODEL, group="model",
    )
    revision: str | None = flag(
        "branch, tag or commit on the hub (default: the newest)", None, metavar="REV"
    )
    lora: list[str] = flag(
        "adapter file, folder or hub id; repeatable (default: none)", metavar="PATH[:SCALE]",
        parser_options={"action": "append"},
    )
    config: DyPEConfig
    dtype: str = flag(", ".join(DTYPES), choices=DTYPES, group="machine")
    device: str | None = flag(
        "cpu, cuda, cuda:1, mps, ... (default: the accelerator, if any)", None, **MACHINE_ONLY
    )
    text_encoder_device: str | None = flag(
        "encode there once, then drop the encoders (default: as --device)", None, **MACHINE_ONLY
    )
    vae_device: str | None = flag("(default: as --device)", None, **MACHINE_ONLY)
    offload: str = flag(
        f"{', '.join(OFFLOADS)} (default: auto, the fastest that fits)", "auto", metavar="HOW",
        choices=OFFLOADS, **MACHINE_ONLY,
    )
    quantize: str = flag(
        "none, int8, fp8 (needs torchao), nf4 (needs bitsandbytes)", "none", metavar="HOW",
        choices=QUANTIZE_CHOICES,
    )
    tiled_vae: str = flag(
        "auto, on, off (default: auto, on where it would not fit untiled)", "auto", metavar="HOW",
        choices=("auto", "on", "off"), **MACHINE_ONLY,
    )
    tile_size: int | None = flag(
        "(default: the autoencoder's)", None, metavar="PX", low=128, high=4096, multiple=64,
        **MACHINE_ONLY,
    )
    compile: str = flag(
        "off; blocks: each kind of transformer block once; full: the whole transformer", "off",
        metavar="HOW", choices=COMPILES, group="speed (docs/performance.md)", **MACHINE_ONLY,
    )
    attention: str | None = flag(
        "diffusers' attention backend, as native, _native_cudnn, flash_hub, _flash_3_hub, "
        "sage_hub, ... (default: diffusers' own)", None,
    )
    cache: str = flag(
        "off; first_block, taylorseer, magcache: skip work by reusing features of earlier steps, "
        "made under older frequencies", "off", choices=tuple(CACHES),
    )
    ulysses: int = flag(
        "under torchrun: split each image's tokens between N GPUs, heads exchanged", 1,
        low=1, high=64, **MACHINE_ONLY,
    )
    ring: int = flag(
        "the same, keys and values passed round; needs another --attention than native", 1,
        low=1, high=64, **MACHINE_ONLY,
    )
    # fmt: on
    init_sha256: str | None = None  # of the pixels of init_image
    entry: Model  # of the catalog
    passes: list[dict] = field(compare=False)  # height, width, steps, and strength where it refines
    processes: int  # that generate the image together

    @cached_property
    def record(self) -> dict:
        """What the image's record says of its settings."""
        flags = {row.name: getattr(self, row.name) for row in RUN_FLAGS}
        flags["init_sha256"] = self.init_sha256
        return {"prompt": self.prompt, "flags": flags, "config": asdict(self.config)}

    @cached_property
    def identity(self) -> dict:
        """All that decides what is in the image, as `image_settings` says it of a record."""
        return image_settings(self.record)

    @cached_property
    def changed(self) -> dict:
        """What decides the image and is not at its default, but for what every name says."""
        defaults = CONFIG_DEFAULTS | self.entry.dype_defaults
        defaults |= {"dype_scale": DEFAULT_LAMBDA_S[self.config.method]}
        defaults |= {row.name: getattr(self.entry, row.name, row.default) for row in RUN_FLAGS}
        defaults |= {name: getattr(self.entry, name) for name in ("base_resolution", "prompt")}
        return {
            name: value
            for name, value in self.identity.items()
            if name not in ALWAYS_NAMED and value not in (None, [], defaults.get(name))
        }

    @cached_property
    def file_name(self) -> str:
        """The authors' scheme, height first; then every setting that is not at its default."""
        name = f"seed_{self.seed}_method_{self.config.name}"
        name += f"_res_{self.height}x{self.width}"
        name += "".join(f"_{key}_{format_name_part(value)}" for key, value in self.changed.items())
        if len(name) > MAX_NAME_LENGTH:
            name = f"{name[:MAX_NAME_LENGTH]}-{short_hash(name)}"
        return f"{name}.png"


FLAGS = flags_of(RunSettings)
RUN_FLAGS = [row for row in FLAGS if row not in CONFIG_FLAGS and row.name != "prompt"]
CONFIG_DEFAULTS = DyPEConfig().to_dict()
ALWAYS_NAMED = {"seed", "method", "dype", "height", "width"}
MAX_NAME_LENGTH = 160  # letters of a name, without the digest of one that is longer


def image_settings(record: dict) -> dict:
    """Return all that decides what is in an image, by name; None where it has no effect.

    record: of an image, of an earlier version too; or `RunSettings.record`.
    """
    flags, config = record["flags"], CONFIG_DEFAULTS | record["config"]
    rows = [row for row in RUN_FLAGS if row.changes_image]
    settings = {row.name: flags.get(row.name, row.default) for row in rows} | config
    settings["prompt"] = record["prompt"]
    settings["dype"] = config["dype"] and config["method"] != "base"
    if settings["dype_scale"] is None:
        settings["dype_scale"] = DEFAULT_LAMBDA_S[config["method"]]
    if settings["init_image"] is not None:  # wherever it is
        sha256 = flags.get("init_sha256") or "unknown"
        settings["init_image"] = f"{Path(settings['init_image']).stem}-{sha256[:12]}"
    without = [row.name for row in FLAGS if not row.has_effect(settings)]
    return settings | dict.fromkeys(without)


def format_value(value) -> str:
    """1.5 -> 1.5, 2.0 -> 2, True -> on: in full, so that two values never look the same."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def format_name_part(value) -> str:
    """Return a value for a file name: small letters, digits, dots; a digest where it is more."""
    text = "+".join(value) if isinstance(value, list) else format_value(value)
    short = text if " " in text else text.rpartition("/")[2]  # of a path its end
    words = re.sub(r"[^a-z0-9.]+", "-", short.lower()).strip("-.")[:40]
    return words if words == text else f"{words}-{short_hash(text)}".strip("-")


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
