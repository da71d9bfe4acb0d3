"""What a denoiser step takes, by counting: tokens -> FLOP, bytes, and seconds on known cards.

Nothing here is measured but what `steps` of `python -m dype.benchmark step` sets beside it.
"""

import argparse
from typing import NamedTuple

from dype.families import TOKEN
from dype.pipelines import memory
from dype.pipelines.catalog import MODELS

# of a card's peak: FLUX.1 at 1024 px on an H100, eager and compiled, from xDiT's report
EAGER, COMPILED = 0.31, 0.49
FREE = 0.95  # share of a card's memory that a process can have


class Architecture(NamedTuple):
    """A transformer whose blocks all attend over text and picture together."""

    width: int  # D
    blocks: int
    per_token: int  # parameters of a block's linear layers that one token meets, in D^2
    text: int  # tokens
    encoders: float  # billions of parameters of the text encoders
    calls: int = 1  # of the denoiser per step
    row: int = 1024  # bytes of DyPE's table per token: cos and sin in float32; complex64 has half

    def flop(self, height: int, width: int) -> tuple[float, float]:
        """Of one denoiser call, in linear layers and in attention.

        2 blocks per_token D^2 S and 4 blocks D S^2, S the tokens of picture (px / 16) and text.
        """
        tokens = height * width / TOKEN**2 + self.text
        linear = 2 * self.blocks * self.per_token * self.width**2 * tokens
        return linear, 4 * self.blocks * self.width * tokens**2

    def table(self, height: int, width: int) -> int:
        """Bytes that DyPE writes in a denoiser call."""
        return self.row * (height * width // TOKEN**2 + self.text)


ARCHITECTURES = {  # by the names of models.MODELS
    "flux-krea": Architecture(3072, 57, 12, 512, 4.9),
    "flux2-dev": Architecture(6144, 56, 13, 512, 24),
    "z-image-turbo": Architecture(3840, 32, 12, 512, 4, row=512),
    "qwen-image": Architecture(3072, 60, 12, 64, 8.3, calls=2, row=512),
}
CARDS = {  # card -> dense bfloat16 TFLOP/s and GiB, from the makers' data sheets
    "RTX 4090": (165, 24),
    "RTX 5090": (210, 32),
    "L40S": (362, 48),
    "A100 80 GB": (312, 80),
    "H100 SXM": (989, 80),
    "H200": (989, 141),
    "B200": (2250, 180),
}


def setting(gib: float, name: str, pixels: int) -> str:
    """The fastest --offload that fits a card, in bfloat16 or, where only layers would, in int8."""
    shape, free = ARCHITECTURES[name], FREE * gib * memory.GIB
    for quantize, size in (("", 2), ("int8, ", 1)):
        parts = {"transformer": 1e9 * MODELS[name].billions * size, "vae": 0.2 * memory.GIB}
        parts["text_encoder"] = 1e9 * shape.encoders * size
        offload, _ = memory.choose_offload("cuda", free, parts, pixels)
        if offload != "group":
            return quantize + offload
    return "group" if memory.ACTIVATIONS * pixels < free else "does not fit"


def run(args: argparse.Namespace) -> dict:
    """Print FLOP per model and size, then seconds per picture and card; returns both."""
    found = {"flop": {}, "seconds": {}}
    print("model           px   image tokens  PFLOP/call  attention  table MB")
    for name, shape in ARCHITECTURES.items():
        for size in args.sizes:
            linear, attention = shape.flop(size, size)
            total, table = linear + attention, shape.table(size, size)
            row = {"linear": linear, "attention": attention, "table_bytes": table}
            found["flop"].setdefault(name, {})[str(size)] = row
            print(f"{name:14} {size:<5} {size**2 // TOKEN**2:12} {total / 1e15:10.3f} "
                  f"{attention / total:9.0%} {table / 1e6:9.1f}")  # fmt: skip
    print(f"\nseconds per picture, at {EAGER:.0%} (eager) and {COMPILED:.0%} (compiled) of the "
          "card's peak")  # fmt: skip
    print("card         model           px   steps    eager  compiled  quantization, offload")
    for card, (tflops, gib) in CARDS.items():
        for name, shape in ARCHITECTURES.items():
            for size in args.sizes:
                steps = MODELS[name].steps * shape.calls
                ideal = steps * sum(shape.flop(size, size)) / (tflops * 1e12)
                row = {"eager": round(ideal / EAGER, 1), "compiled": round(ideal / COMPILED, 1)}
                row["setting"] = setting(gib, name, size * size)
                found["seconds"].setdefault(card, {}).setdefault(name, {})[str(size)] = row
                print(f"{card:12} {name:14} {size:<5} {MODELS[name].steps:5} {row['eager']:9.1f} "
                      f"{row['compiled']:9.1f}  {row['setting']}")  # fmt: skip
    return found
