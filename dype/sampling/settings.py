"""Define the settings of one image with their flags, its identity and its file name."""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from dype.config import CONFIG_FLAGS, DEFAULT_LAMBDA_S, DyPEConfig, flag, flags_of
from dype.pipelines.catalog import DEFAULT_MODEL, MODELS, Model
from dype.pipelines.choices import (
    CACHES,
    COMPILES,
    DTYPE_SPELLINGS,
    DTYPES,
    OFFLOADS,
    QUANTIZE_CHOICES,
)
from dype.sampling.passes import PASS_SCALES

SIDE_LIMITS = {"metavar": "PX", "low": 64, "high": 16384, "multiple": 16}
STRENGTH_LIMITS = {"low": 0, "high": 1, "exclusive": True}
# flags that say where or how fast to compute, which does not decide what is in the image
MACHINE_ONLY = {"changes_image": False}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of one image, as `dype.cli.settings.resolve` returns them."""

    # fmt: off
    prompt: str = flag(
        "one or more prompts", metavar="TEXT", group="image",
        parser_options={"nargs": "+"},
        default_help=f"the authors' dark-fantasy scene (demo: {MODELS['demo'].prompt})",
    )
    negative_prompt: str | None = flag(
        "negative prompt; needs classifier-free guidance, by --true_cfg or by a model's --guidance",
        metavar="TEXT",
        default_help="none (qwen-image \" \")",
    )
    height: int = flag("image height in px; 64 to 16384, multiple of 16", **SIDE_LIMITS)
    width: int = flag("image width in px; 64 to 16384, multiple of 16", **SIDE_LIMITS)
    seed: int = flag(
        "seed of the noise; 0 to 2^63 - 1, or random", 42, low=0, high=2**63 - 1, label="seed {}"
    )
    steps: int = flag(
        "number of steps; 1 to 1000", low=1, high=1000, label="{} steps",
        aliases=("--num_inference_steps",),
    )
    guidance: float = flag(
        "guidance_scale of the pipeline; 0 to 100, 0 for models without guidance", low=0, high=100,
        label="guidance {}", aliases=("--guidance_scale",),
    )
    true_cfg: float = flag(
        "scale of classifier-free guidance, two denoiser calls a step; 1 (off) to 100", low=1,
        high=100, label="true CFG {}", aliases=("--true_cfg_scale",),
    )
    max_sequence_length: int = flag(
        "maximum number of text tokens; 1 to the model's limit", low=1, high=1024
    )
    init_image: str | None = flag(
        "image to upscale to the size and refine; transparent parts become white, colors sRGB",
        None, metavar="FILE",
        default_help="none, start from noise",
    )
    strength: float = flag(
        "fraction of --steps, the last ones, that refine --init_image; 0 < X <= 1", 0.5,
        **STRENGTH_LIMITS, has_effect=lambda settings: settings["init_image"] is not None,
        needs="--init_image FILE",
    )
    multipass: str = flag(
        "passes; single, twopass (half the size, then upscale and refine), threepass (a quarter, "
        "half, full), progressive", "single", choices=tuple(PASS_SCALES), label="{}",
        group="multi-pass", aliases=("--dype_multipass",), switches=(
            ("--progressive", "progressive", "same as --multipass progressive; the base "
             "resolution first, then only the full-size steps that add visible detail"),
        ),
    )
    pass2_strength: float = flag(
        "fraction of --steps, the last ones, that pass 2 runs; 0 < X <= 1", 0.5,
        label="pass 2 strength {}", **STRENGTH_LIMITS,
        has_effect=lambda settings: len(PASS_SCALES[settings["multipass"]]) > 1,
    )
    pass3_strength: float = flag(
        "fraction of --steps, the last ones, that pass 3 runs; 0 < X <= 1", 0.4,
        label="pass 3 strength {}", **STRENGTH_LIMITS,
        has_effect=lambda settings: len(PASS_SCALES[settings["multipass"]]) > 2,
    )
    model: str = flag(
        f"model; {', '.join(MODELS)}, or a diffusers folder or hub id of a supported pipeline",
        DEFAULT_MODEL, group="model",
    )
    revision: str | None = flag(
        "branch, tag or commit on the hub", None, metavar="REV",
        default_help="the newest",
    )
    variant: str | None = flag(
        "variant of the weight files; fp16, bf16, ...", None,
        default_help="none, files without a variant in their names",
    )
    transformer: str | None = flag(
        "single file of the model's transformer; .safetensors (also fp8, and the layouts of "
        "Black Forest Labs and ComfyUI) or .gguf", None, metavar="FILE",
        default_help="the model's",
    )
    lora: list[str] = flag(
        "LoRA adapter; file, folder, hub id or OWNER/REPO/FILE.safetensors, repeatable",
        metavar="PATH[:SCALE]",
        parser_options={"action": "append"},
        default_help="none",
    )
    config: DyPEConfig
    dtype: str = flag(
        f"number format of the weights; {', '.join(DTYPES)}", choices=DTYPES, group="machine",
        aliases=("--torch_dtype",), spellings=DTYPE_SPELLINGS,
    )
    device: str | None = flag(
        "device; cpu, cuda, cuda:1, mps, ...", None, **MACHINE_ONLY,
        default_help="the accelerator, if any",
    )
    text_encoder_device: str | None = flag(
        "device of the text encoders, which then encode all prompts first and are dropped",
        None, **MACHINE_ONLY,
        default_help="as --device",
    )
    vae_device: str | None = flag(
        "device of the autoencoder; FLUX.1 pipelines only", None, **MACHINE_ONLY,
        default_help="as --device",
    )
    offload: str = flag(
        "place of the weights; none: on the device, model: one model at a time on it, group: one "
        "layer at a time, sequential: the same but slower", "auto", metavar="HOW",
        choices=("auto", *OFFLOADS), **MACHINE_ONLY,
        default_help="auto, the first of none, model and group that fits",
    )
    quantize: str = flag(
        "number format of quantized weights; none, int8, fp8 (both need torchao), nf4 (needs "
        "bitsandbytes)", "none", metavar="HOW", choices=QUANTIZE_CHOICES,
    )
    tiled_vae: str = flag(
        "decoding in tiles; auto, on, off", "auto", metavar="HOW", choices=("auto", "on", "off"),
        **MACHINE_ONLY,
        default_help="auto, on if an untiled decode does not fit",
    )
    tile_size: int | None = flag(
        "side of a tile in px; 128 to 4096, multiple of 64", None,
        metavar="PX", low=128, high=4096, multiple=64, **MACHINE_ONLY,
        default_help="per autoencoder",
        has_effect=lambda settings: settings["tiled_vae"] != "off", needs="tiles",
    )
    compile: str = flag(
        "torch.compile; off, blocks (each kind of transformer block once), full (the whole "
        "transformer)", "off", metavar="HOW", choices=COMPILES,
        group="speed (docs/performance.md)", **MACHINE_ONLY,
    )
    attention: str | None = flag(
        "attention backend of diffusers; native, _native_cudnn, flash_hub, _flash_3_hub, "
        "sage_hub, ...", None,
        default_help="diffusers' own",
    )
    cache: str = flag(
        "reuse of the transformer's results of earlier steps: faster, but another image; off, "
        "first_block, taylorseer, magcache", "off", choices=tuple(CACHES),
    )
    ulysses: int = flag(
        "number of GPUs that generate one image together, started by torchrun, with attention "
        "divided by heads; 1 to 64",
        1, low=1, high=64, **MACHINE_ONLY,
    )
    ring: int = flag(
        "number of GPUs that generate one image together, started by torchrun, with attention "
        "divided by tokens; 1 to 64, needs another --attention than native", 1, low=1, high=64,
        **MACHINE_ONLY,
    )
    # fmt: on
    init_sha256: str | None = None  # SHA-256 of the pixels of init_image
    entry: Model  # from the catalog
    passes: list[dict] = field(compare=False)  # height, width, steps; strength if it refines
    processes: int  # number of processes that share one image

    @property
    def encodes_images(self) -> bool:
        """Return whether a pass refines an image, which the autoencoder must encode."""
        return any("strength" in settings for settings in self.passes)

    @property
    def files(self) -> dict:
        """Return what names files of the weights, by argument of `check_sources`."""
        files = {name: getattr(self, name) for name in ("revision", "variant", "transformer")}
        return files | {"loras": lora_pairs(self)}

    @cached_property
    def record(self) -> dict:
        """Return the record entries for the settings."""
        flags = {row.name: getattr(self, row.name) for row in RUN_FLAGS}
        flags["init_sha256"] = self.init_sha256
        return {"prompt": self.prompt, "flags": flags, "config": asdict(self.config)}

    @cached_property
    def weight_sources(self) -> dict[str, tuple]:
        """Return source and revision of each part of the weights, by its name in the record."""
        return weight_sources(self.entry.repo, vars(self))

    @cached_property
    def identity(self) -> dict:
        """Return all values that decide what is in the image; see `image_settings`."""
        return image_settings(self.record)

    @cached_property
    def non_defaults(self) -> dict:
        """Return the values of `identity` that differ from the model's defaults.

        The settings that every file name contains are left out.
        """
        defaults = CONFIG_DEFAULTS | self.entry.config_defaults(self.config.method)
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
        """Return the name of the PNG: the authors' scheme, height first, then `non_defaults`."""
        name = f"seed_{self.seed}_method_{self.config.name}"
        name += f"_res_{self.height}x{self.width}"
        items = self.non_defaults.items()
        name += "".join(f"_{key}_{format_name_part(key, value)}" for key, value in items)
        if len(name) > MAX_NAME_LENGTH:
            name = f"{name[:MAX_NAME_LENGTH]}-{short_hash(name)}"
        return f"{name}.png"


FLAGS = flags_of(RunSettings)
RUN_FLAGS = [row for row in FLAGS if row not in CONFIG_FLAGS and row.name != "prompt"]
CONFIG_DEFAULTS = DyPEConfig().to_dict()
ALWAYS_NAMED = {"seed", "method", "dype", "height", "width"}
MAX_NAME_LENGTH = 160  # letters of a name; a longer name is cut and gets a hash


def image_settings(record: dict) -> dict:
    """Return all values that decide what is in an image, by name; None if a value has no effect.

    record: record of an image, also of an earlier version, or `RunSettings.record`.
    """
    flags, config = record["flags"], CONFIG_DEFAULTS | record["config"]
    rows = [row for row in RUN_FLAGS if row.changes_image]
    settings = {row.name: flags.get(row.name, row.default) for row in rows} | config
    settings["prompt"] = record["prompt"]
    settings["dype"] = config["dype"] and config["method"] != "base"
    if settings["dype_scale"] is None:
        settings["dype_scale"] = DEFAULT_LAMBDA_S[config["method"]]
    if settings["init_image"] is not None:  # the hash, because the file may have moved
        sha256 = flags.get("init_sha256") or "unknown"
        settings["init_image"] = f"{Path(settings['init_image']).stem}-{sha256[:12]}"
    rows = [row for row in FLAGS if row.changes_image]
    without_effect = [row.name for row in rows if not row.has_effect(settings)]
    return settings | dict.fromkeys(without_effect)


def lora_pairs(run: RunSettings) -> list[tuple[str, float]]:
    """Return path and scale of each LoRA of a run."""
    parts = [text.rpartition(":") for text in run.lora]
    return [(path, float(scale)) for path, _, scale in parts]


def weight_sources(repo: str, flags: dict) -> dict[str, tuple]:
    """Return where weights come from: name of the part in a record -> arguments of `fingerprint`.

    Args:
        repo: folder or hub id of the model.
        flags: loading settings of a run or of a record; some may be missing.
    """
    sources = {"model": (repo, flags.get("revision"), flags.get("variant"))}
    if flags.get("transformer"):
        sources["model"] += ("transformer",)  # whose weights in the folder have no effect
        sources["transformer"] = (flags["transformer"],)
    paths = (text.rpartition(":")[0] for text in flags.get("lora") or [])
    return sources | {f"lora {i}": (path,) for i, path in enumerate(paths, 1)}


def format_value(value) -> str:
    """Return a value as text, unambiguously: 1.5 -> 1.5, 2.0 -> 2, True -> on."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def format_name_part(name: str, value) -> str:
    """Return a value for a file name: lowercase letters, digits, dots; else with a hash added.

    name: of the setting; only an init_image ends in a hash already.
    """
    text = "+".join(value) if isinstance(value, list) else format_value(value)
    short = text if " " in text else text.rpartition("/")[2]  # the last part of a path
    words = re.sub(r"[^a-z0-9.]+", "-", short.lower()).strip("-.")[:40]
    looks_hashed = name != "init_image" and re.search(r"(^|-)[0-9a-f]{12}$", text)
    is_unique = words == text and not looks_hashed
    return words if is_unique else f"{words}-{short_hash(text)}".strip("-")


def short_hash(text: str) -> str:
    """Return the first 12 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
