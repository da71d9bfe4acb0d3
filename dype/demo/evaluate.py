"""How often the demo model draws what was asked: `python -m dype.demo.evaluate --size 512 pi yarn`.

Each setting draws the same seeded prompts and is judged by `dype.demo.check`, at the schedule of
the demo (mu capped). A setting is METHOD, METHOD:static or METHOD:SCALE:EXPONENT. `spectrum` is the
distance of the log power spectrum from that of the rendered scenes, put through the autoencoder.
Needs the packages of requirements-dev.txt.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dype.config import DyPEConfig
from dype.demo.scenes import HELD_OUT, TRIPLES, render, sample_scene
from dype.models import MODELS
from dype.patch import apply_dype
from dype.pipelines import load_pipeline

try:
    from dype.demo.check import check, spectrum_error
except ModuleNotFoundError as error:
    sys.exit(f"there is no {error.name}; pip install -r requirements-dev.txt")

DEMO = MODELS["demo"]


def setting(text: str) -> DyPEConfig:
    """METHOD[:static | :SCALE[:EXPONENT]] -> a configuration at the demo's base resolution."""
    method, *more = text.split(":")
    config = {"method": method, "base_resolution": DEMO.base_resolution}
    if more == ["static"]:
        config["dype"] = False
    elif more:
        config |= zip(("dype_scale", "dype_exponent"), map(float, more), strict=False)
    return DyPEConfig(**config)


def share(passed: list[bool]) -> dict:
    """The share of passes and its Wilson 95 % interval."""
    n, p, z = len(passed), sum(passed) / len(passed), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    return {"share": round(p, 3), "interval": [round(float(low), 3), round(float(high), 3)]}


def draw_all(pipe, scenes: list, args, name: str) -> list[np.ndarray]:
    """One picture per scene; the i-th starts from noise of seed i, whatever the batch."""
    pictures = []
    for start in tqdm(range(0, len(scenes), args.batch), name, leave=False):
        chunk = scenes[start : start + args.batch]
        seeds = range(start, start + len(chunk))
        reduced = args.dtype == "bfloat16"
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=reduced):
            pictures += pipe(
                [scene.caption for scene in chunk],
                negative_prompt=[DEMO.negative_prompt or ""] * len(chunk),
                true_cfg_scale=args.true_cfg,
                guidance_scale=DEMO.guidance,
                height=args.size,
                width=args.size,
                num_inference_steps=args.steps,
                max_sequence_length=DEMO.max_sequence_length,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images
    return [np.asarray(picture) for picture in pictures]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m dype.demo.evaluate",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("settings", nargs="*", default=["base"], help="METHOD[:static|:SCALE:EXP]")
    made.add_argument("--size", type=int, default=256, help="px")
    made.add_argument("--count", type=int, default=64, help="prompts")
    made.add_argument("--seed", type=int, default=0, help="of the prompts")
    made.add_argument("--held_out", action="store_true", help="only triples never trained on")
    made.add_argument(
        "--truth",
        action="store_true",
        help="judge the same scenes with other leaves, put through the autoencoder, instead",
    )
    made.add_argument("--steps", type=int, default=DEMO.steps)
    made.add_argument("--true_cfg", type=float, default=DEMO.true_cfg)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="autocast or not"
    )
    made.add_argument("--strip", type=Path, help="PNG or JPEG of the first six per setting")
    return made


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        configs = {name: setting(name) for name in args.settings}
    except ValueError as error:
        parser().error(str(error))
    if min(args.count, args.batch, args.steps) < 1 or args.size % 16 or args.size < 64:
        parser().error("--count, --batch and --steps are at least 1, --size a multiple of 16")

    rng = np.random.default_rng(args.seed)
    triples = HELD_OUT if args.held_out else TRIPLES
    scenes = [sample_scene(rng, triples) for _ in range(args.count)]
    pipe = load_pipeline("demo")
    pipe.set_progress_bar_config(disable=True)
    rows, strips = [], {}
    truth = [round_trip(pipe.vae, render(s, args.size)) for s in tqdm(scenes, "truth", leave=False)]
    for name in ["truth"] if args.truth else args.settings:
        if args.truth:
            others = [render(replace(scene, seed=scene.seed + 1), args.size) for scene in scenes]
            pictures = [round_trip(pipe.vae, picture) for picture in others]
            decibels = [psnr(*pair) for pair in zip(others, pictures, strict=True)]
            print(f"round trip {np.mean(decibels):.1f} dB, deviation {np.std(decibels):.1f}")
        else:
            apply_dype(pipe, configs[name])
            pictures = draw_all(pipe, scenes, args, name)
        verdicts = [check(p, s.colour, s.ground) for p, s in zip(pictures, scenes, strict=True)]
        layout = share([verdict.layout for verdict in verdicts])
        shape = share([v.shape == s.shape for v, s in zip(verdicts, scenes, strict=True)])
        error = spectrum_error(pictures, truth)
        low, high = layout["interval"]
        print(
            f"{name:20} {args.size} px  n {args.count}  layout {layout['share']:.2f} "
            f"[{low:.2f}, {high:.2f}]  shape {shape['share']:.2f}  spectrum {error:.2f}",
            flush=True,
        )
        rows.append({"setting": name, "layout": layout, "shape": shape, "spectrum": error})
        strips[name] = pictures[:6]
    if args.strip:
        save_strips(strips, args.strip)
    keys = ("size", "count", "seed", "held_out", "steps", "true_cfg", "dtype")
    print(json.dumps({key: getattr(args, key) for key in keys} | {"rows": rows}))
    return 0


@torch.no_grad()
def round_trip(vae, picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] through encoder and decoder."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    out = vae.decode(vae.encode(x).latent_dist.mode()).sample[0].permute(1, 2, 0)
    return ((out + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, dB."""
    return float(10 * np.log10(255**2 / np.mean((picture.astype(float) - other) ** 2)))


def save_strips(strips: dict[str, list[np.ndarray]], path: Path, side: int = 224) -> None:
    """A labelled row per setting, the same seeds in every row, never picked ones."""
    font, bar = ImageFont.load_default(20), 34
    sheet = Image.new("RGB", (6 * side, len(strips) * (side + bar)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(strips.items()):
        top = row * (side + bar)
        draw.text((4, top + 5), name, "black", font)
        for column, picture in enumerate(pictures):
            small = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (column * side, top + bar))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True, quality=88)


if __name__ == "__main__":
    sys.exit(main())
