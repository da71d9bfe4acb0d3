"""Tiny FLUX pipelines of diffusers' own classes with random weights, and fixtures for all tests."""

import csv
import os
from itertools import count
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the hub's client reads it at import
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it at import, in every worker

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline
from diffusers import FluxTransformer2DModel as Transformer
from packaging.version import Version

from dype.demo import model as demo_model
from dype.embedders import DyPEFluxPosEmbed
from dype.embedders_complex import DyPEQwenEmbedRope, DyPEZImageRopeEmbedder

LATENT_CHANNELS = 4
FIRST_RELEASE = {  # class -> oldest release of diffusers with which its tests pass
    "FluxTransformer2DModel": "0.32",
    "ChromaTransformer2DModel": "0.34",
    "DPMSolverMultistepScheduler": "0.35",  # in FLUX's pipeline
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
    """Skip the test if the installed diffusers is older than the class's first release."""
    first = FIRST_RELEASE[name]
    if Version(diffusers.__version__) < Version(first):
        pytest.skip(f"{name} needs diffusers {first}, this is {diffusers.__version__}")


def tiny_transformer(**changes) -> Transformer:
    """Return a FLUX transformer of two blocks; `changes` replace arguments of its class."""
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
    """Return a KL autoencoder that reduces each side by 8."""
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


def tiny_taesd() -> AutoencoderTiny:
    """Return a tiny autoencoder as of TAEF1, which reduces each side by 8."""
    torch.manual_seed(0)
    widths = {f"{part}_block_out_channels": (4,) * 4 for part in ("encoder", "decoder")}
    return AutoencoderTiny(
        **widths,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=0.7,
        shift_factor=0.2,
    ).eval()


def tiny_components(**changes) -> dict:
    """Return the components of a FluxPipeline; `changes` go to `tiny_transformer`."""
    torch.manual_seed(0)
    return {
        "scheduler": demo_model.scheduler(),
        "vae": tiny_vae(),
        "transformer": tiny_transformer(**changes),
        **demo_model.text_encoders(),
    }


def quiet(pipe):
    """Return the pipeline with its progress bar off."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> FluxPipeline:
    """Return a tiny FLUX pipeline."""
    return quiet(FluxPipeline(**tiny_components()))


def generate_latents(pipe, height=256, width=192, steps=3, seed=0, **arguments) -> torch.Tensor:
    """Generate with a tiny FLUX pipeline and return packed latents [B, S, 16]."""
    settings = {
        "prompt": "a red sun over blue mountains",
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "max_sequence_length": 16,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipe(**settings | arguments).images


class Spy:
    """Recorder of sigma, grid and token layout at every call of a transformer's embedder."""

    def __init__(self, transformer):
        self.calls = []
        transformer.pos_embed.register_forward_hook(self.record)

    def record(self, embedder, args, output):
        self.calls.append((float(embedder.sigma), embedder.grid, embedder.state.layout))

    @property
    def sigmas(self) -> list[float]:
        return [call[0] for call in self.calls]


@pytest.fixture
def tables(monkeypatch):
    """Record (sigma, table) of every embedder call; a table is complex [S, D / 2]."""
    calls = []

    def spy(cls, name, to_complex):
        original = getattr(cls, name)

        def call_and_record(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            calls.append((float(self.sigma), to_complex(output)))
            return output

        monkeypatch.setattr(cls, name, call_and_record)

    spy(DyPEFluxPosEmbed, "forward", lambda output: torch.complex(*output)[:, ::2])
    spy(DyPEQwenEmbedRope, "forward", lambda output: output[0])
    spy(DyPEZImageRopeEmbedder, "__call__", lambda output: output)
    return calls


# with a base of 32 px, because an image of 64 px then extrapolates
TINY_DEMO = ["--model", "demo", "--steps", "1", "--base_resolution", "32"]


def run(*argv) -> int:
    """Run the command line in this process and return its exit code."""
    import run_dype  # here, because the core's tests run on releases too old for it

    return run_dype.main([str(word) for word in argv])


def table(folder="out") -> list[dict]:
    """Return the rows of results.csv, read without the package."""
    with (Path(folder) / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True, scope="session")
def histories(tmp_path_factory):
    """Let no test write to the user's file of measurements; return names of folders for others."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))  # has its fonts
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield (str(folder / str(number)) for number in count())


@pytest.fixture(autouse=True)
def own_history(monkeypatch, histories):
    """Give each test a file of measurements of its own, in a folder that does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", next(histories))


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """Change to an empty folder."""
    monkeypatch.chdir(tmp_path)
