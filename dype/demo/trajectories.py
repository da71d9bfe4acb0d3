"""Measure the demo model while it samples: `python -m dype.demo.trajectories`.

The command generates images of a few seeded prompts. At every step it measures the entropy of
attention and, at the base resolution, the radial power spectrum of the latents x_t. Larger sizes
are measured under base and the demo's method, static and with DyPE. `python -m dype.figures` draws
the results as fig2a, fig2b, fig18 and eq11. The measurements of every finished image are saved, so
that a stopped run continues.
"""

import argparse
import json
import platform
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from dype.config import check_number
from dype.demo.evaluate import (
    DTYPES,
    read_earlier,
    reconcile_protocol,
    tables_to_json,
    weights_hash,
)
from dype.demo.experiments import BASE, DEMO, SCALING_SETTINGS, parse_setting
from dype.demo.scenes import sample_scene
from dype.errors import Parser, UserError, raise_user_errors, run_command
from dype.patch import apply_dype
from dype.pipelines.devices import autocast
from dype.pipelines.loading import load_pipeline
from dype.sampling import records
from dype.sampling.latents import power_spectrum

CONFIGS = {setting.name: setting.config for setting in map(parse_setting, SCALING_SETTINGS)}
COUNTS = {BASE: 16, 2 * BASE: 4, 4 * BASE: 2}  # px -> number of prompts
QUERIES = 512  # per head, at most; a random subset where there are more
EXAMPLES = """examples:
  python -m dype.demo.trajectories --out outputs/trajectories.json
  python -m dype.demo.trajectories --sizes 512 --counts 16 --guidance 1 --out outputs/unguided.json
  python -m dype.figures fig18 --trajectories outputs/trajectories.json
"""


def normalized_entropy(query: torch.Tensor, key: torch.Tensor) -> float:
    """Return -sum p ln p / ln S of p = softmax(q k / sqrt(d)), the mean over all queries.

    1 is uniform attention over the S keys, 0 attention to one of them.

    Args:
        query: [B, heads, S, d].
        key: [B, heads, S, d].
    """
    if query.shape[-2] > QUERIES:
        index = torch.randperm(query.shape[-2], generator=torch.Generator().manual_seed(0))
        query = query[..., index[:QUERIES].to(query.device), :]
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return float(entropy.mean() / np.log(key.shape[-2]))


class TrajectoryRecorder(TorchFunctionMode):
    """Record x_t and the attention entropies at every step of a pipeline.

    Of the denoiser calls at one sigma it records the first, which has the positive prompt under
    true CFG. It sees queries and keys as attention gets them: normalized, rotated, times m. Nothing
    may call attention after the last denoiser call, so the pipeline has to return latents.

    Attributes:
        states: x_t by sigma.
        entropies: by sigma, one value per attention layer.
        current_entropies: the list of the current denoiser call, or None if it is not recorded.
    """

    def __init__(self, transformer):
        super().__init__()
        self.states, self.entropies, self.current_entropies = {}, {}, None
        self.hook = transformer.register_forward_pre_hook(self.on_call, with_kwargs=True)

    def on_call(self, module, args, kwargs):
        """Record x_t if its sigma is new; a pre-hook of the transformer."""
        sigma = float(kwargs["timestep"][0])
        is_new = sigma not in self.states
        self.current_entropies = self.entropies.setdefault(sigma, []) if is_new else None
        self.states.setdefault(sigma, kwargs["hidden_states"].detach().float())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and self.current_entropies is not None:
            inputs = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            self.current_entropies.append(normalized_entropy(inputs["query"], inputs["key"]))
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error):
        self.hook.remove()
        return super().__exit__(*error)


def measure_trajectory(pipe, caption: str, seed: int, size: int, protocol: dict) -> dict:
    """Generate an image and return the measurements.

    Args:
        pipe: demo pipeline with DyPE applied.
        caption: the prompt.
        seed: seed of the noise.
        size: side of the square image, px.
        protocol: steps, guidance and dtype.

    Returns:
        sigmas [steps + 1] down to 0 and entropy [steps]; at the base resolution also the spectra of
        x_t [steps + 1, rings].
    """
    with TrajectoryRecorder(pipe.transformer) as recorder, autocast(pipe.device, protocol["dtype"]):
        latents = pipe(
            caption,
            guidance_scale=protocol["guidance"],
            height=size,
            width=size,
            num_inference_steps=protocol["steps"],
            max_sequence_length=DEMO.max_sequence_length,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
    # The recorder's sigmas are not exact, because the transformer gets them in bfloat16.
    sigmas = pipe.scheduler.sigmas.tolist()
    assert len(recorder.states) == len(sigmas) - 1
    result = {"sigmas": [round(sigma, 6) for sigma in sigmas]}
    result["entropy"] = [round(float(np.mean(row)), 6) for row in recorder.entropies.values()]
    if size == BASE:
        states = [*recorder.states.values(), latents.float()]
        states = [pipe._unpack_latents(x, size, size, pipe.vae_scale_factor)[0] for x in states]
        spectra = [power_spectrum(x).mean(0) for x in states]
        result["spectra"] = [[float(f"{s:.5g}") for s in spectrum] for spectrum in spectra]
    return result


def plan_images(counts: dict[int, int], seed: int) -> list[dict]:
    """Return size, setting, prompt and seed of each image, small sizes first.

    Args:
        counts: px -> number of prompts.
        seed: seed of the prompts.
    """
    rng = np.random.default_rng(seed)
    captions = [sample_scene(rng).caption for _ in range(max(counts.values()))]
    images = []
    for size, count in sorted(counts.items()):
        names = ["base"] if size == BASE else CONFIGS
        for i, name in product(range(count), names):
            images.append({"size": size, "setting": name, "prompt": captions[i], "seed": i})
    return images


def parser() -> Parser:
    """Return the parser of the command line."""
    argument_parser = Parser(
        prog="python -m dype.demo.trajectories", description=__doc__, epilog=EXAMPLES
    )
    flag = argument_parser.add_argument
    flag("--out", type=Path, default=Path("docs/data/trajectories.json"), metavar="FILE",
         help="JSON file of the measurements; continues it if it exists "
         "(default: %(default)s)")  # fmt: skip
    flag("--sizes", nargs="+", type=int, default=[*COUNTS], metavar="PX", help="sides of square "
         "images; 64 to 4096, multiples of 16 "
         f"(default: {' '.join(map(str, COUNTS))})")  # fmt: skip
    flag("--counts", nargs="+", type=int, default=[*COUNTS.values()], metavar="N", help="number "
         "of prompts for each of --sizes; 1 to 1000 "
         f"(default: {' '.join(map(str, COUNTS.values()))})")  # fmt: skip
    flag("--seed", type=int, default=0, metavar="N", help="seed of the prompts; image i has noise "
         "of seed i (default: %(default)s)")  # fmt: skip
    flag("--steps", type=int, default=DEMO.steps, metavar="N", help="sampling steps; 1 to 1000 "
         "(default: %(default)s)")  # fmt: skip
    flag("--guidance", type=float, default=DEMO.guidance, metavar="X", help="guidance_scale of the "
         "pipeline; 1 is off (default: %(default)g)")  # fmt: skip
    flag("--dtype", choices=DTYPES, metavar="DTYPE", help="number format of matrix products; "
         f"{', '.join(DTYPES)} (default: as in --out, else the faster one)")  # fmt: skip
    return argument_parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Exit codes: 0, 2 for a mistake of the user, 1 for other failures, 130 after Ctrl-C.
    """
    next_step = "the same command generates the rest"
    return run_command(
        "dype.demo.trajectories", lambda: run(parser().parse_args(argv)), interrupted=next_step
    )


@raise_user_errors()
def run(args: argparse.Namespace) -> None:
    """Generate and measure the missing images. Raises UserError and OSError."""
    if len(args.sizes) != len(args.counts):
        raise UserError(f"--counts has {len(args.counts)} numbers, expected {len(args.sizes)}")
    check_number("--steps", args.steps, 1, 1000, integer=True)
    check_number("--guidance", args.guidance, 0, 100)
    for size, count in zip(args.sizes, args.counts, strict=True):
        check_number("--sizes", size, 64, 4096, multiple=16)
        check_number("--counts", count, 1, 1000, integer=True)
    protocol = {"model": "demo", "steps": args.steps, "guidance": args.guidance, "shift": "cap"}
    protocol |= {"dtype": args.dtype, "prompts_seed": args.seed, "queries": QUERIES}
    protocol["weights"] = weights_hash(Path(DEMO.repo))
    earlier = read_earlier(args.out, lambda file: (dict(file["protocol"]), list(file["pictures"])))
    earlier_protocol, rows = earlier or (None, [])
    if not CONFIGS.keys() >= {row.get("setting") for row in rows}:
        raise UserError(f"{args.out} was written by an earlier version, expected another --out")
    reconcile_protocol(args.out, earlier_protocol, protocol)
    images = plan_images(dict(zip(args.sizes, args.counts, strict=True)), args.seed)
    missing = [image for image in images if not any(image.items() <= row.items() for row in rows)]
    counts = f"trajectories {len(images)}, finished {len(images) - len(missing)}"
    print(f"{args.out}: {counts}; dtype {protocol['dtype']}")
    if not missing:
        return
    protocol |= {"base_resolution": BASE}
    protocol |= {"torch": torch.__version__, "device": platform.machine()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline("demo")
    pipe.set_progress_bar_config(disable=True)
    for image in tqdm(missing):
        apply_dype(pipe, CONFIGS[image["setting"]])
        result = measure_trajectory(pipe, image["prompt"], image["seed"], image["size"], protocol)
        rows.append(image | result)
        content = tables_to_json(json.dumps(protocol, indent=1), pictures=rows)
        records.write_atomically({args.out: content})


if __name__ == "__main__":
    sys.exit(main())
