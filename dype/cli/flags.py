"""The command line's flags: one table, group by group, each with its default."""

import argparse
import re

from dype.config import METHOD_SCALES, PATHS, PRESETS, SHIFTS
from dype.errors import Parser
from dype.pipelines.acceleration import CACHES, COMPILES
from dype.pipelines.catalog import DEFAULT_MODEL, MODELS
from dype.pipelines.devices import DTYPES
from dype.pipelines.loading import OFFLOADS, QUANTIZED
from dype.sampling.multipass import PASSES
from dype.sweep.grid import LISTS, MOST, SWEEPS


def of_model(value) -> str:
    """A default that models bring along: the default model's, then those that differ."""
    known = {name: value(model) for name, model in MODELS.items()}
    usual = known[DEFAULT_MODEL]
    others = [f"{name} {own}" for name, own in known.items() if own != usual]
    return "; ".join([f"(default: {usual}", *others]) + ")"


SCALES = ", ".join(f"{name} {scale:g}" for name, scale in METHOD_SCALES.items() if scale)
SWITCH = {"action": "store_true"}

# group -> (names, metavar, help, more of argparse's arguments). Numbers are parsed in settings.py.
FLAGS = {
    "what to draw": [
        ("--prompt", "TEXT", "one or several (default: the authors' dark-fantasy scene; demo: "
         f"{MODELS['demo'].prompt})", {"nargs": "+", "action": "extend"}),
        ("--prompts_file", "FILE", "one per line, after those of --prompt (default: none)", {}),
        ("--negative_prompt", "TEXT", "needs --true_cfg, or --guidance where that is one (default: "
         "none; qwen-image \" \", demo \"\")", {}),
        ("--magic_suffix", None, "the authors' addition to prompts for qwen-image (default: off)",
         SWITCH),
        ("--size", "WxH,...", "width x height in px, or one number for both (default: --height and "
         "--width)", {}),
        ("--height", "PX", of_model(lambda m: m.height), {}),
        ("--width", "PX", of_model(lambda m: m.width), {}),
        ("--seed", "N,...", "(default: 42)", {}),
        ("--steps", "N,...", of_model(lambda m: m.steps), {}),
        ("--guidance", "X,...", "the pipeline's guidance_scale; 0: it takes none "
         + of_model(lambda m: m.guidance), {}),
        ("--true_cfg", "X,...", "classifier-free guidance by two denoiser calls a step; 1 is off "
         + of_model(lambda m: m.true_cfg), {}),
        ("--max_sequence_length", "N", "text tokens "
         + of_model(lambda m: m.max_sequence_length), {}),
        ("--init_image", "FILE", "enlarge this picture to the size and refine it "
         "(default: start from noise)", {}),
        ("--strength", "X", "with --init_image: the share of the steps, above 0 up to 1 "
         "(default: 0.5)", {}),
    ],
    "several passes": [
        ("--multipass --dype_multipass", "NAME,...", "single; twopass: at half the size, then "
         "enlarged and refined; threepass: at a quarter, at half, in full; progressive (default: "
         "single)",
         {"choices": tuple(PASSES)}),
        ("--progressive", None, "as --multipass progressive: the base resolution first, then at "
         "full size only the steps in which more is to be seen (default: off)", SWITCH),
        ("--pass2_strength", "X,...", "the share of the steps that the second pass runs "
         "(default: 0.5)", {}),
        ("--pass3_strength", "X,...", "(default: 0.4)", {}),
    ],
    "model": [
        ("--model", "NAME", f"{', '.join(MODELS)}, or a diffusers folder or hub id of one of "
         f"their kinds (default: {DEFAULT_MODEL})", {}),
        ("--revision", "REV", "branch, tag or commit on the hub (default: the newest)", {}),
        ("--lora", "PATH[:SCALE]", "adapter file, folder or hub id; repeatable (default: none)",
         {"action": "append"}),
    ],
    "position encoding": [
        ("--method --dype_method", "NAME,...", f"{', '.join(METHOD_SCALES)} "
         + of_model(lambda m: m.dype["method"]), {"choices": METHOD_SCALES}),
        ("--dype", "on|off,...", "follow the noise level (default: on)",
         {"nargs": "?", "const": "on"}),
        ("--no_dype", None, "the static method, as --dype off (default: off)", SWITCH),
        ("--dype_scale", "X,...", f"lambda_s, 0 to 8 (default: the method's, {SCALES})", {}),
        ("--dype_exponent", "X,...", "lambda_t, 0 to 1000 (default: 2)", {}),
        ("--dype_start_sigma", "T,...", "above this noise level the encoding stays as at t = 1 "
         "(default: 1)", {}),
        ("--cutoff", "X,...", "of the method cutoff: the wavelength of its cut at t = 1/2, times "
         "the trained length; above 0 to 1000 (default: 1)", {}),
        ("--attention_scale", "X,...", "a of m = 1 + a ln s, 0 to 2, for any method (default: the "
         "method's own)", {}),
        ("--attention_path", "NAME", "with --attention_scale: a stays (constant), falls with the "
         "noise (falling) or rises as it falls (rising) (default: constant)", {"choices": PATHS}),
        ("--base_resolution", "PX", "side that the model was trained at "
         + of_model(lambda m: m.base_resolution), {}),
        ("--isotropic", None, "stretch every axis by the largest scale (default: each by its own)",
         SWITCH),
        ("--preset", "NAME", "off; auto: off up to 1.5x the base resolution, above it vision_yarn "
         "with exponent 1, from 3x on 2; 4k: vision_yarn 2, 2, 1 (default: none)",
         {"choices": PRESETS}),
    ],
    "noise schedule": [
        ("--shift", "cap|model", "cap: mu = max_shift at every size, as the authors; model: the "
         "scheduler's own rule " + of_model(lambda m: m.family.shift), {"choices": SHIFTS}),
        ("--base_shift", "X", "with --shift model (default: the scheduler's)", {}),
        ("--max_shift", "X", "(default: the scheduler's)", {}),
    ],
    "machine": [
        ("--dtype", "NAME", f"{', '.join(DTYPES)} " + of_model(lambda m: m.dtype),
         {"choices": DTYPES}),
        ("--device", "NAME", "cpu, cuda, cuda:1, mps, ... (default: the accelerator, if any)", {}),
        ("--text_encoder_device", "NAME", "encode there once, then drop the encoders "
         "(default: as --device)", {}),
        ("--vae_device", "NAME", "(default: as --device)", {}),
        ("--offload", "HOW", f"{', '.join(OFFLOADS)} (default: auto, the fastest that fits)",
         {"choices": OFFLOADS}),
        ("--quantize", "HOW", "none, int8, fp8 (needs torchao), nf4 (needs bitsandbytes) "
         "(default: none)", {"choices": QUANTIZED}),
        ("--tiled_vae", "HOW", "auto, on, off (default: auto, on where it would not fit untiled)",
         {"choices": ("auto", "on", "off")}),
        ("--tile_size", "PX", "(default: the autoencoder's)", {}),
    ],
    "speed (docs/performance.md)": [
        ("--compile", "HOW", "off; blocks: each kind of transformer block once; full: the whole "
         "transformer (default: off)", {"choices": COMPILES}),
        ("--attention", "NAME", "diffusers' attention backend, as native, _native_cudnn, "
         "flash_hub, _flash_3_hub, sage_hub, ... (default: diffusers' own)", {}),
        ("--cache", "NAME", "off; first_block, taylorseer, magcache: skip work by reusing features "
         "of earlier steps, made under older frequencies (default: off)", {"choices": CACHES}),
        ("--ulysses", "N", "under torchrun: split each picture's tokens between N GPUs, heads "
         "exchanged (default: 1)", {}),
        ("--ring", "N", "the same, keys and values passed round; needs another --attention "
         "than native (default: 1)", {}),
    ],
    "sweeps: every flag with ,... takes a list, as base,yarn or 0-3 or 1:3:0.5": [
        ("--sweep", "NAME", f"a prepared one: {', '.join(SWEEPS)} (default: none)",
         {"choices": tuple(SWEEPS)}),
        ("--quick", None, "with --sweep methods: 1x and 2x alone; params: 3 x 3 (default: off)",
         SWITCH),
        ("--multipass_only", None, "of --sweep methods only the two-pass picture (default: off)",
         SWITCH),
        ("--cols", "N|NAME", "contact sheets: columns of one, more go to further sheets; or the "
         "setting that goes across (default: 8; seeds and prompts, else the last setting)", {}),
        ("--grid_from", "FOLDER", "draw the contact sheets of a finished sweep again "
         "(default: none)", {}),
        ("--yes", None, f"more than {MOST} pictures are meant (default: off)", SWITCH),
    ],
    "settings from elsewhere": [
        ("--config", "FILE.toml", "its [default] table (default: none)", {}),
        ("--profile", "NAME", "with --config: that table too (default: none)", {}),
        ("--from", "FILE.png", "every setting of a picture of this program (default: none)",
         {"dest": "source"}),
    ],
    "output": [
        ("--output_dir", "FOLDER", "(default: outputs; sweeps: outputs/sweep, or its name)", {}),
        ("--output", "FILE.png", "(default: seed_S_method_M_res_HxW.png in the output folder, with "
         "_2, _3, ... where that is taken)", {}),
        ("--overwrite", None, "(default: off; sweeps: off, a picture drawn with other settings is "
         "an error)", SWITCH),
        ("--dry_run", None, "print settings, mu, sigmas and kappas, or a sweep's plan; load no "
         "weights (default: off)", SWITCH),
    ],
}  # fmt: skip


def name_of(names: str) -> str:
    """`--method --dype_method` -> `method`."""
    return names.split()[0].removeprefix("--")


NAMES = {name_of(names): more for group in FLAGS.values() for names, _, _, more in group}
# flag -> what it accepts, where that is a list and the value a word
CHOICES = {name: more["choices"] for name, more in NAMES.items() if "choices" in more}
# flags that a profile may set, and those of them that have no value; its [NAME.dype] table's
PROFILED = NAMES.keys() - {"config", "profile", "from", "grid_from", "dry_run", "yes"}
SWITCHES = {name for name, more in NAMES.items() if more is SWITCH}
ENCODING = {name_of(names) for names, *_ in FLAGS["position encoding"]} | {"dype"}


def parser() -> Parser:
    made = Parser(
        prog="run_dype.py",
        usage='run_dype.py [--prompt "..."] [--model NAME] [--height PX] [--width PX] [flags]',
        description="Draw a picture beyond the size that a diffusion transformer was trained at, "
        "with DyPE (arXiv 2510.20766).",
        epilog="An explicit flag wins over --sweep, that over --preset, that over --config or "
        "--from, that over the model's own default. Hyphens may stand for a flag's underscores.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=98),
        allow_abbrev=False,
    )
    for title, flags in FLAGS.items():
        group = made.add_argument_group(title)
        for names, metavar, text, more in flags:
            shown = {} if metavar is None else {"metavar": metavar}
            if name_of(names) in LISTS:  # each value is checked by itself
                more = {key: value for key, value in more.items() if key != "choices"}
            group.add_argument(*names.split(), help=text, **shown, **more)
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UserError. Flags may be spelled with hyphens."""

    def spelled(word):
        return re.sub(r"^--[a-z0-9_-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)

    return parser().parse_args([spelled(word) for word in argv])
