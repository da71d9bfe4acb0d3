"""Tiny random pipelines of the real diffusers classes, offline."""

import csv
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's client is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each worker, before torch is

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers import FluxTransformer2DModel as Transformer
from packaging.version import Version

from dype.demo import model as demo_model
from dype.embedders import DyPEFluxPosEmbed
from dype.embedders_complex import DyPEQwenEmbedRope, DyPEZImageRopeEmbedder

LATENT_CHANNELS = 4
FIRST_RELEASE = {  # of diffusers on which the tests of a class pass
    "FluxTransformer2DModel": "0.32",
    "ChromaTransformer2DModel": "0.34",
    "FluxIPAdapterAttnProcessor": "0.35",
    "FluxKontextPipeline": "0.35",
    "BriaFiboTransformer2DModel": "0.36",
    "BriaTransformer2DModel": "0.36",
    "Flux2Transformer2DModel": "0.37",
    "QwenImageTransformer2DModel": "0.37",
    "NucleusMoEImageTransformer2DModel": "0.38",
    "Krea2Transformer2DModel": "0.39",
    "ZImageTransformer2DModel": "0.39",
}


def needs(name: str) -> None:
    """Skip the test where diffusers is older than the first release on which a class passes."""
    first = FIRST_RELEASE[name]
    if Version(diffusers.__version__) < Version(first):
        pytest.skip(f"{name} needs diffusers {first}, this is {diffusers.__version__}")


def tiny_transformer(**changes) -> Transformer:
    torch.manual_seed(0)
    settings = {
        "patch_size": 1,
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": demo_model.TEXT_WIDTH,
        "pooled_projection_dim": demo_model.TEXT_WIDTH,
        "guidance_embeds": False,
        "axes_dims_rope": (4, 6, 6),
    }
    return Transformer(**settings | changes).eval()


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    ).eval()


def tiny_components(**changes) -> dict:
    torch.manual_seed(0)
    return {
        "scheduler": demo_model.scheduler(),
        "vae": tiny_vae(),
        "transformer": tiny_transformer(**changes),
        **demo_model.text_encoders(),
    }


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> FluxPipeline:
    return quiet(FluxPipeline(**tiny_components()))


def latents(pipe, height=256, width=192, steps=3, seed=0, **more) -> torch.Tensor:
    """Draw with a tiny pipeline; packed latents."""
    settings = {
        "prompt": "a red ring on teal leaves",
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "max_sequence_length": 16,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipe(**settings | more).images


class Spy:
    """What the embedder of a transformer sees: noise level, grid, layout at every call."""

    def __init__(self, transformer):
        self.calls = []
        transformer.pos_embed.register_forward_hook(self.note)

    def note(self, embedder, args, output):
        self.calls.append((float(embedder.sigma), embedder.grid, embedder.token_layout))

    @property
    def sigmas(self) -> list[float]:
        return [call[0] for call in self.calls]


@pytest.fixture
def tables(monkeypatch):
    """(sigma, table) of every call of an embedder; a table is complex, [S, D / 2]."""
    seen = []

    def spy(cls, name, read):
        original = getattr(cls, name)

        def noted(self, *args, **kwargs):
            out = original(self, *args, **kwargs)
            seen.append((float(self.sigma), read(out)))
            return out

        monkeypatch.setattr(cls, name, noted)

    spy(DyPEFluxPosEmbed, "forward", lambda out: torch.complex(*out)[:, ::2])
    spy(DyPEQwenEmbedRope, "forward", lambda out: out[0])
    spy(DyPEZImageRopeEmbedder, "__call__", lambda out: out)
    return seen


TINY = ["--model", "demo", "--steps", "1", "--base_resolution", "32"]  # the demo, as fast as can be


def run(*argv) -> int:
    """The command line, in this process."""
    import run_dype  # not above: the core's tests run on versions too old for it

    return run_dype.main([str(word) for word in argv])


def table(folder="out") -> list[dict]:
    """results.csv as a stranger would read it."""
    with (Path(folder) / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
