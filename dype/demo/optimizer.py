"""The optimizer of the demo's training, and its learning rate."""

import math
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode

# parts of the names of weights that AdamW trains: first and last layers, and modulation
OUTER_LAYERS = ("embed", "shared", "bias", "conv_in", "conv_out", "norm", "transformer.proj_out")


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Return the factor of the peak rate: a linear warm-up, then half a cosine to zero.

    Args:
        step: number of finished steps.
        steps: length of the cosine.
        warmup: length of the warm-up, steps.
    """
    done = min(step / steps, 1)
    return min((step + 1) / warmup, 1) * (0.5 + 0.5 * math.cos(math.pi * done))


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as a matrix [out, in]; of a channels-last convolution a view of it."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


class KeepFloat32(TorchFunctionMode):
    """Leave tensors as they are where Muon converts them to bfloat16."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16:
            return args[0]
        return function(*args, **(kwargs or {}))


class Optimizer:
    """Muon (Jordan et al. 2024) for the matrices of hidden layers, AdamW for the other weights.

    Muon needs fewer steps than AdamW alone (docs/log/2026-11-26-muon.md). It multiplies matrices in
    `dtype`, since a step in bfloat16 takes over 20 times as long on CPUs with AVX2 alone.

    Attributes:
        params: all weights.
        hidden: weights of Muon; `matrices` are views of them.
    """

    def __init__(self, modules: torch.nn.Module, rate: float, muon_rate: float, dtype: str):
        self.precision = KeepFloat32() if dtype == "float32" else nullcontext()
        self.params, self.hidden, outer = list(modules.parameters()), [], []
        for name, weight in modules.named_parameters():
            is_outer = weight.ndim == 1 or any(part in name for part in OUTER_LAYERS)
            (outer if is_outer else self.hidden).append(weight)
        self.matrices = [torch.nn.Parameter(as_matrix(p.detach())) for p in self.hidden]
        for matrix, weight in zip(self.matrices, self.hidden, strict=True):
            assert matrix.data_ptr() == weight.data_ptr()  # a copy would leave the weight as it is
        self.parts = (
            torch.optim.Muon(self.matrices, muon_rate, weight_decay=0.01, momentum=0.9),
            torch.optim.AdamW(outer, rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        )
        self.rates = (muon_rate, rate)

    def step(self, factor: float) -> None:
        """Take a step at `factor` times the peak rates, with clipped gradients; clear these."""
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for matrix, weight in zip(self.matrices, self.hidden, strict=True):
            matrix.grad = as_matrix(weight.grad).contiguous()
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * factor
            with self.precision:
                part.step()
        for weight in self.params:
            weight.grad = None

    def state_dict(self) -> list[dict]:
        """Return the states of both parts."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Set the states of both parts."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
