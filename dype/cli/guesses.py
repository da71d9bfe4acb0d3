"""Answer a flag that does not exist with those that it may mean."""

import difflib
from collections.abc import Collection

from dype.config import DyPEConfig

CUTOFF = 0.75  # of difflib; below it names of other meaning come up
# names that people try first, from other programs -> what to write here; each part is a flag
GUESSES = {
    "batch_size": "--num_images",
    "bf16": "--dtype bfloat16",
    "cfg": "--guidance or --true_cfg",
    "cfg_scale": "--guidance or --true_cfg",
    "checkpoint": "--model or --transformer",
    "ckpt": "--model or --transformer",
    "count": "--num_images",
    "cpu": "--device cpu",
    "cuda": "--device cuda",
    "cpu_offload": "--offload model",
    "denoise": "--strength",
    "denoising_strength": "--strength",
    "fp16": "--dtype float16",
    "fp8": "--quantize fp8",
    "exponent": "--dype_exponent",
    "gpu": "--device cuda",
    "image": "--init_image",
    "image_size": "--size",
    "input_image": "--init_image",
    "int8": "--quantize int8",
    "lambda_s": "--dype_scale",
    "lambda_t": "--dype_exponent",
    "list_models": "--help with the models, or --model NAME",
    "lora_path": "--lora PATH:SCALE",
    "lora_scale": "--lora PATH:SCALE",
    "lora_weights": "--lora PATH:SCALE",
    "low_vram": "--offload group",
    "lowvram": "--offload group",
    "m": "--model",
    "model_id": "--model",
    "model_path": "--model",
    "models": "--help with the models, or --model NAME",
    "n": "--num_images",
    "nf4": "--quantize nf4",
    "negative": "--negative_prompt",
    "neg_prompt": "--negative_prompt",
    "num": "--num_images",
    "num_samples": "--num_images",
    "o": "--output or --output_dir",
    "out": "--output or --output_dir",
    "out_dir": "--output_dir",
    "outdir": "--output_dir",
    "outfile": "--output",
    "output_file": "--output",
    "output_path": "--output or --output_dir",
    "p": "--prompt",
    "precision": "--dtype",
    "pretrained_model_name_or_path": "--model",
    "prompts": "--prompt or --prompts_file",
    "prompt_file": "--prompts_file",
    "quant": "--quantize",
    "quantization": "--quantize",
    "quiet": "output to a file, which has no bar",
    "res": "--size",
    "resolution": "--size",
    "resume": "the same command, which continues a sweep",
    "s": "--seed or --steps",
    "samples": "--num_images",
    "scale": "--dype_scale",
    "static": "--no_dype",
    "t_start": "--dype_start_sigma",
    "upscale": "--init_image with --size",
    "v": "--version",
    "vae_tiling": "--tiled_vae",
}


def describe_unknown(name: str, names: Collection[str], dashes: str = "--") -> str:
    """Return the end of a sentence on a flag that does not exist: what it may mean.

    Args:
        name: of the flag as the user wrote it, without its dashes.
        names: of the flags that exist.
        dashes: before the name; "" in a TOML file.
    """
    begin, name = f"there is no {dashes}{name}", name.replace("-", "_")
    if name in vars(DyPEConfig()) and name not in names:
        return f"{begin}: it is a field of DyPEConfig, for Python alone"
    guess = GUESSES.get(name.lower())
    if guess is None:
        near = difflib.get_close_matches(name.lower(), sorted(names), 2, CUTOFF)
        guess = " or ".join(f"--{flag}" for flag in near)
    if not guess:
        hint = ", or FLAG=VALUE for a value that begins with a hyphen" if dashes else ""
        return f"{begin}, expected a flag that --help lists{hint}"
    return f"{begin}, expected {guess if dashes else guess.replace('--', '')}"
