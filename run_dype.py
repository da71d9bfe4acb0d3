"""Draw pictures beyond the training resolution with DyPE: `python run_dype.py --prompt "..."`."""

import sys
import time
from pathlib import Path

import torch

from dype import apply_dype, generate, load_pipeline, records, rope
from dype.flags import UserError, parse
from dype.pipelines import UnavailableError, local_scheduler, set_tiling
from dype.settings import CITATION, Settings, resolve


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 1 for the rest."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.cite:
            print(CITATION)
            return 0
        settings = resolve(args)
        if args.dry_run:
            return dry_run(settings)
        paths = output_paths(args, settings)
        return run(args, settings, paths)
    except UserError as error:
        return failed(2, error)
    except (UnavailableError, OSError) as error:
        return failed(1, error)
    except (RuntimeError, MemoryError) as error:
        if not any(word in str(error) for word in ("out of memory", "allocate memory")):
            raise
        return failed(1, "out of memory; try --offload model or group, --tiled_vae on, or a size")
    except KeyboardInterrupt:
        return failed(130, "interrupted")


def failed(code: int, error) -> int:
    print(f"run_dype.py: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def run(args, settings: Settings, paths: list[Path]) -> int:
    """Load once, draw every prompt, save each picture as soon as it is drawn."""
    flags, config = settings.flags, settings.config
    size = {"height": flags["height"], "width": flags["width"]}
    pixels = size["height"] * size["width"]
    pipe = load_pipeline(
        flags["model"],
        revision=flags["revision"],
        dtype=flags["dtype"],
        device=flags["device"],
        text_encoder_device=flags["text_encoder_device"],
        vae_device=flags["vae_device"],
        offload=flags["offload"],
        loras=settings.loras,
        pixels=pixels,
    )
    tiled = set_tiling(pipe.vae, flags["tiled_vae"], flags["tile_size"], pixels)
    try:
        apply_dype(pipe, config)
    except (TypeError, ValueError) as error:  # what only the loaded checkpoint can tell
        raise UserError(f"{flags['model']}: {error}") from error
    schedule = describe_schedule(pipe.scheduler, settings)
    print(headline(settings, schedule))
    drawn = ("steps", "guidance", "seed", "max_sequence_length", "negative_prompt", "true_cfg")
    for prompt, path in zip(settings.prompts, paths, strict=True):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        image = generate.draw(pipe, prompt, **size, **{name: flags[name] for name in drawn})
        seconds = time.perf_counter() - start
        record = {
            "prompt": prompt,
            "flags": flags,
            "config": config.to_dict(),
            **schedule,
            "tiled_vae": tiled,
            **records.machine(pipe, seconds),
        }
        print(f"{records.save(image, path, record, args.overwrite)}  {seconds:.1f} s")
    return 0


def describe_schedule(scheduler, settings: Settings) -> dict:
    """mu, the sigmas and kappa at each denoiser call; the scheduler has the shift set already."""
    size = [settings.flags[name] for name in ("height", "width", "steps")]
    mu, sigmas = generate.noise_schedule(scheduler, *size, settings.model.family)
    called = torch.tensor(sigmas[:-1], dtype=torch.float64)
    kappa, _ = rope.schedule(called, settings.config)
    shift = settings.config.shift or settings.model.family.shift
    used = {"shift": "static" if mu is None else shift, "lambda_s": settings.config.lambda_s}
    return used | {"mu": mu, "sigmas": sigmas, "kappas": kappa.tolist()}


def headline(settings: Settings, schedule: dict) -> str:
    """One line that says what is about to be drawn."""
    flags, config = settings.flags, settings.config
    mu = "static shift" if schedule["mu"] is None else f"mu {schedule['mu']:.2f}"
    method = records.method_name(config.method, config.dype)
    return (
        f"{flags['model']}  {flags['height']}x{flags['width']}  {method}  "
        f"{flags['steps']} steps  {mu}  seed {flags['seed']}"
    )


def dry_run(settings: Settings) -> int:
    """Print every resolved setting and the schedule, without loading weights."""
    scheduler = local_scheduler(settings.model, settings.config)
    schedule = describe_schedule(scheduler, settings)
    print(headline(settings, schedule))
    if settings.model.assumed:
        print(f"  nothing could be read of {settings.model.repo}: defaults as FLUX.1-dev's")
    used = {name: schedule[name] for name in ("shift", "lambda_s")}
    for name, value in (settings.flags | settings.config.to_dict() | used).items():
        print(f"  {name:20} {value}")
    for prompt in settings.prompts:
        print(f"  {'prompt':20} {prompt}")
    print("  step   sigma   kappa")
    for step, (sigma, kappa) in enumerate(
        zip(schedule["sigmas"], schedule["kappas"], strict=False)
    ):
        print(f"  {step:4}  {sigma:.4f}  {kappa:.4f}")
    return 0


def output_paths(args, settings: Settings) -> list[Path]:
    """Where the pictures go, checked before anything is loaded. Raises UserError, OSError."""
    flags, config = settings.flags, settings.config
    if args.output:
        named = Path(args.output)
        if named.suffix.lower() != ".png":
            raise UserError(f"--output is {args.output!r}, expected a name ending in .png")
        if len(settings.prompts) > 1:
            raise UserError("--output names one file, expected one prompt or --output_dir")
        for taken in (named, named.with_suffix(".json")):
            if taken.is_dir() or (taken.exists() and not args.overwrite):
                raise UserError(f"--output: {taken} exists, expected --overwrite or another name")
        paths = [named]
    else:
        size = flags["seed"], config.method, config.dype, flags["height"], flags["width"]
        names = [records.file_name(*size, i) for i in range(len(settings.prompts))]
        paths = [Path(args.output_dir or "outputs") / name for name in names]
        if not args.overwrite:
            paths = [records.free_path(path) for path in paths]
    records.check_writable(paths[0].parent)
    return paths


if __name__ == "__main__":
    sys.exit(main())
