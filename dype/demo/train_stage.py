"""A stage of the demo's training, with checkpoints."""

import math
from pathlib import Path

import torch
from torch.nn import ModuleDict
from tqdm import tqdm

from dype.demo.optimizer import Optimizer, learning_rate
from dype.errors import UserError

EMA = 0.999
CHECKPOINT_EVERY = 250  # steps


def save_checkpoint(path: Path, **state) -> None:
    """Write a checkpoint; a killed run leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train_stage(
    name: str,
    modules: ModuleDict,
    loss_at,
    rates: tuple[float, float],
    steps: int,
    decay: int,
    args,
) -> None:
    """Train modules, from the last checkpoint if there is one, and set their averaged weights.

    A checkpoint that began with other weights raises UserError.

    Args:
        name: name of the stage and of its checkpoint.
        modules: modules to train, by name.
        loss_at: takes a step, returns its loss; its random numbers depend on the step alone.
        rates: peak learning rates of AdamW and of Muon.
        steps: steps of the training.
        decay: steps after which the learning rate is zero.
        args: parsed flags.
    """
    path = args.work / f"{name}.pt"
    modules.train()
    optimizer = Optimizer(modules, *rates, args.dtype)
    params = optimizer.params
    average = [p.detach().clone() for p in params]
    first, smooth = 0, None
    start = torch.nn.utils.get_total_norm(params).item()
    if path.exists():
        state = torch.load(path, map_location=args.device)
        if not math.isclose(start, state.get("start", 0), rel_tol=1e-5):
            raise UserError(f"{path} began with other weights, expected another --work")
        first, smooth, average = state["step"], state["loss"], state["average"]
        optimizer.load_state_dict(state["optimizer"])
        for key, module in modules.items():
            module.load_state_dict(state[key])
    progress = tqdm(range(first, steps), name, initial=first, total=steps)
    for step in progress:
        torch.manual_seed(1_000_000 * args.seed + step)
        loss = loss_at(step)
        loss.backward()
        loss = loss.detach()
        optimizer.step(learning_rate(step, decay))
        pace = 1 - min(EMA, step / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in params], pace)
        smooth = loss if smooth is None else smooth.lerp(loss, 0.01)
        if step % 10 == 0:  # reading a number waits for the device
            progress.set_postfix(loss=f"{smooth:.4f}")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            saved = {"optimizer": optimizer.state_dict(), "dtype": args.dtype, "start": start}
            saved |= {key: module.state_dict() for key, module in modules.items()}
            save_checkpoint(path, step=step + 1, loss=smooth, average=average, **saved)
    for param, mean in zip(params, average, strict=True):
        param.data.copy_(mean)
    modules.eval()
