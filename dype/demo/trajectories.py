"""What happens along the demo's sampling trajectories: `python -m dype.demo.trajectories`.

Draws a few seeded prompts and writes down, at every step, the radial power spectrum of the latents
x_t (at the base resolution) and the entropy of attention (there, and at larger sizes under `base`
and static and dynamic `yarn_paper`), for `python -m dype.figures fig2a`, `fig2b` and `fig18`.
Every image is saved when it is done, so that an interrupted run goes on where it was.
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
from dype.demo.evaluate import by_rows, go_on, left_there, weights_hash
from dype.demo.experiments import SCALING, setting
from dype.demo.scenes import sample_scene
from dype.errors import Parser, UserError, raise_user_errors, run_command
from dype.patch import apply_dype
from dype.pipelines.catalog import MODELS
from dype.pipelines.devices import autocast
from dype.pipelines.loading import load_pipeline
from dype.sampling import records
from dype.sampling.latents import power_spectrum

DEMO = MODELS["demo"]
SETTINGS = {parsed.name: parsed.config for parsed in map(setting, SCALING)}
COUNTS = {256: 16, 512: 4, 1024: 2}  # px -> prompts
QUERIES = 512  # per head, drawn at random where there are more


def normalized_entropy(query: torch.Tensor, key: torch.Tensor) -> float:
    """-sum p ln p / ln S of p = softmax(q k / sqrt(d)), the mean over batch, heads and queries.

    [B, heads, S, d] each; 1 is uniform attention over the S keys, 0 attention to one of them.
    """
    if query.shape[-2] > QUERIES:
        chosen = torch.randperm(query.shape[-2], generator=torch.Generator().manual_seed(0))
        query = query[..., chosen[:QUERIES].to(query.device), :]
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return float(entropy.mean() / np.log(key.shape[-2]))


class Watch(TorchFunctionMode):
    """Notes x_t and the attention entropies at every step of a pipeline, from its first denoiser
    call there (true CFG makes two: the prompt's, then the negative one's).

    Sees queries and keys as attention gets them: normalized, rotated, times m. After the last call
    nothing else may attend: the pipeline is to return latents.
    """

    def __init__(self, transformer):
        super().__init__()
        self.states, self.entropies, self.open = {}, {}, None
        self.hook = transformer.register_forward_pre_hook(self.enter, with_kwargs=True)

    def enter(self, module, args, kwargs):
        sigma = float(kwargs["timestep"][0])
        self.open = None if sigma in self.states else self.entropies.setdefault(sigma, [])
        self.states.setdefault(sigma, kwargs["hidden_states"].detach().float())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and self.open is not None:
            found = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            self.open.append(normalized_entropy(found["query"], found["key"]))
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error):
        self.hook.remove()
        return super().__exit__(*error)


def trajectory(pipe, caption: str, seed: int, size: int, protocol: dict) -> dict:
    """One image: sigmas [steps + 1] down to 0, spectra of x_t there, and entropy [steps]."""
    with Watch(pipe.transformer) as seen, autocast(pipe.device, protocol["dtype"]):
        last = pipe(
            caption,
            negative_prompt=DEMO.negative_prompt,
            true_cfg_scale=protocol["true_cfg"],
            guidance_scale=DEMO.guidance,
            height=size,
            width=size,
            num_inference_steps=protocol["steps"],
            max_sequence_length=DEMO.max_sequence_length,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
    sigmas = pipe.scheduler.sigmas.tolist()  # what the transformer was given is rounded to bfloat16
    assert len(seen.states) == len(sigmas) - 1
    found = {"sigmas": [round(sigma, 6) for sigma in sigmas]}
    found["entropy"] = [round(float(np.mean(values)), 6) for values in seen.entropies.values()]
    if size == DEMO.base_resolution:
        states = [*seen.states.values(), last.float()]
        pixels = [pipe._unpack_latents(x, size, size, pipe.vae_scale_factor)[0] for x in states]
        rows = [power_spectrum(x).mean(0) for x in pixels]
        found["spectra"] = [[float(f"{s:.5g}") for s in row] for row in rows]
    return found


def plan(counts: dict[int, int], seed: int) -> list[dict]:
    """What is drawn, the small sizes first: size, setting, prompt and seed of each image."""
    rng = np.random.default_rng(seed)
    captions = [sample_scene(rng).caption for _ in range(max(counts.values()))]
    found = []
    for size, count in sorted(counts.items()):
        names = ["base"] if size == DEMO.base_resolution else SETTINGS
        for i, name in product(range(count), names):
            found.append({"size": size, "setting": name, "prompt": captions[i], "seed": i})
    return found


def parser() -> Parser:
    made = Parser(
        prog="python -m dype.demo.trajectories",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--out", type=Path, default=Path("docs/data/trajectories.json"))
    made.add_argument("--sizes", nargs="+", type=int, default=[*COUNTS], help="px")
    made.add_argument("--counts", nargs="+", type=int, default=[*COUNTS.values()], help="prompts")
    made.add_argument("--seed", type=int, default=0, help="of the prompts")
    made.add_argument("--steps", type=int, default=DEMO.steps)
    made.add_argument("--true_cfg", type=float, default=DEMO.true_cfg)
    made.add_argument("--dtype", choices=("bfloat16", "float32"), help="None: as what is there, "
                      "else bfloat16 where the device has it")  # fmt: skip
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 1 for the rest."""
    rest = "run it again for the rest"
    return run_command(
        "dype.demo.trajectories", lambda: run(parser().parse_args(argv)), interrupted=rest
    )


@raise_user_errors()
def run(args: argparse.Namespace) -> None:
    """Draw what is not there yet. Raises UserError, ValueError, OSError."""
    if len(args.sizes) != len(args.counts):
        raise UserError(f"--counts has {len(args.counts)} numbers, expected {len(args.sizes)}")
    check_number("--steps", args.steps, 1, 1000, integer=True)
    for size, count in zip(args.sizes, args.counts, strict=True):
        check_number("--sizes", size, 64, 4096, multiple=16)
        check_number("--counts", count, 1, 1000, integer=True)
    protocol = {"model": "demo", "steps": args.steps, "true_cfg": args.true_cfg, "shift": "cap"}
    protocol |= {"dtype": args.dtype, "prompts_seed": args.seed, "queries": QUERIES}
    protocol["weights"] = weights_hash(Path(DEMO.repo))
    earlier = left_there(args.out, lambda saved: (dict(saved["protocol"]), list(saved["pictures"])))
    known, pictures = earlier or (None, [])
    go_on(args.out, known, protocol)
    wanted = plan(dict(zip(args.sizes, args.counts, strict=True)), args.seed)
    rest = [one for one in wanted if not any(one.items() <= row.items() for row in pictures)]
    there = f"trajectories {len(wanted)}, there already {len(wanted) - len(rest)}"
    print(f"{args.out}: {there}; dtype {protocol['dtype']}")
    if not rest:
        return
    protocol |= {"torch": torch.__version__, "device": platform.machine()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline("demo")
    pipe.set_progress_bar_config(disable=True)
    for one in tqdm(rest):
        apply_dype(pipe, SETTINGS[one["setting"]])
        found = trajectory(pipe, one["prompt"], one["seed"], one["size"], protocol)
        pictures.append(one | found)
        records.write_atomically(
            {args.out: by_rows(json.dumps(protocol, indent=1), pictures=pictures)}
        )


if __name__ == "__main__":
    sys.exit(main())
