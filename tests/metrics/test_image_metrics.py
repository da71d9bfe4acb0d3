"""Metrics of single images equal independent implementations; models have random weights."""

import itertools
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import table
from PIL import Image
from safetensors.torch import load_file, save_file
from scored_sweeps import PROMPT, make_sweep, noise, replace_inception, score, values

from dype.demo import model as demo_model
from dype.metrics import image_metrics

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_glcm():
    """Against plain loops over pixels, within 1e-6; the image's edges fill no patch."""
    image = noise(0, 70, 140)
    gray = np.asarray(image.convert("L")).astype(int) // 4
    scores = []
    for left in (0, 64):
        patch, matrices = gray[:64, left : left + 64], []
        for distance in (1, 2, 3, 4):
            for angle in (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4):
                dy, dx = round(np.sin(angle) * distance), round(np.cos(angle) * distance)
                count = np.zeros((64, 64))
                for y, x in itertools.product(range(64), range(64)):
                    if 0 <= y + dy < 64 and 0 <= x + dx < 64:
                        count[patch[y, x], patch[y + dy, x + dx]] += 1
                matrices.append(count / count.sum())
        shares = np.unique(np.array(matrices), return_counts=True)[1] / (16 * 64 * 64)
        scores.append(-(shares * np.log2(shares)).sum())
    assert image_metrics.measure_glcm(image) == pytest.approx(np.mean(scores), rel=1e-6)


def test_compression():
    """Against the size of the JPEG that Pillow writes to the disk, exactly."""
    image = noise(0)
    image.save("x.jpg", quality=95, subsampling=2)
    ratio = image_metrics.measure_compression(image)
    assert ratio == 96 * 128 * 3 / Path("x.jpg").stat().st_size
    assert ratio < image_metrics.measure_compression(Image.new("RGB", image.size))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Folders like the hub's: a CLIP of 14 tokens, and its vision tower with a predictor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    torch.manual_seed(3)  # because its cosines have both signs
    tokenizer = demo_model.text_encoders()["tokenizer"]
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "projection_dim": 16}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text = small | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 14}
    vision = small | {"image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    aesthetic = CLIPVisionModelWithProjection(clip.config.vision_config)
    aesthetic.predictor = torch.nn.Linear(16, 1)
    shape = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    folders = {}
    for name, model in (("clip", clip), ("aesthetic", aesthetic)):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
        CLIPImageProcessorPil(**shape).save_pretrained(folders[name])
    return folders


def clip_pixels(image: Image.Image) -> torch.Tensor:
    """Return CLIP's input for an image: its middle at 32 px, normalized."""
    side = 32 / min(image.size)
    size = [int(edge * side) for edge in image.size]
    small = np.asarray(image.resize(size, Image.Resampling.BICUBIC)) / 255
    top, left = (small.shape[0] - 32) // 2, (small.shape[1] - 32) // 2
    small = small[top : top + 32, left : left + 32]
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.tensor((small - mean) / deviation).permute(2, 0, 1)[None].float()


@torch.no_grad()
def embeddings(folder: Path, image: Image.Image, prompt: str) -> tuple:
    """Compute unit embeddings of image and prompt and the logit scale from CLIP's towers."""
    from transformers import AutoTokenizer, CLIPModel

    clip = CLIPModel.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]
    text = clip.text_projection(clip.text_model(torch.tensor([ids])).pooler_output)[0]
    vision = clip.visual_projection(clip.vision_model(clip_pixels(image)).pooler_output)[0]
    return vision / vision.norm(), text / text.norm(), clip.logit_scale.exp()


def test_clip_metrics(weights):
    """Against CLIP's two towers and its resizing by hand, cosine by cosine, within 1e-3."""
    folder = make_sweep({}, {"prompt": "a white moon over green mountains"})
    paths = [f"{name}={weights['clip']}" for name in ("clip_score", "pick_score")]
    assert score(folder, "--metrics", "clip_score,pick_score", "--weights", *paths) == 0
    clip_scores, pick_scores = values("clip_score"), values("pick_score")
    for row in table():
        image = Image.open(folder / row["file"])
        vision, text, scale = embeddings(weights["clip"], image, row["prompt"])
        cosine = float(vision @ text)
        assert clip_scores[row["file"]] == pytest.approx(max(100 * cosine, 0), rel=1e-3)
        assert pick_scores[row["file"]] == pytest.approx(float(scale) * cosine, rel=1e-3)
    assert [value > 0 for value in clip_scores.values()] == [True, False]


def test_long_prompts_keep_their_end_token(weights, capsys):
    """CLIP reads 14 tokens here; the last is the end token, and the output counts cut prompts."""
    words = PROMPT.split() * 4
    clip_score = image_metrics.IMAGE_METRICS["clip_score"]
    with clip_score.load(str(weights["clip"]), "cpu") as measure:
        short, long = (measure(noise(0), " ".join(words[:count])) for count in (12, 24))
    assert short == pytest.approx(long, rel=1e-5)
    assert short != 0
    expected = "clip_score: prompts that CLIP cut to 14 tokens: 1\n"
    assert capsys.readouterr().out == expected


@torch.no_grad()
def test_aesthetic(weights):
    """Against the two linear maps by hand, within 1e-3."""
    from transformers import CLIPVisionModelWithProjection

    folder, path = make_sweep({}), weights["aesthetic"]
    assert score(folder, "--metrics", "aesthetic", "--weights", f"aesthetic={path}") == 0
    tensors = load_file(path / "model.safetensors")
    tower = CLIPVisionModelWithProjection.from_pretrained(path)
    vision = tower(clip_pixels(noise(0))).image_embeds[0]
    expected = tensors["predictor.weight"][0] @ (vision / vision.norm()) + tensors["predictor.bias"]
    assert values("aesthetic")["seed_0.png"] == pytest.approx(float(expected), rel=1e-3)


def test_missing_weights(weights, capsys):
    """One sentence names the weights to download; weights without a tensor are refused."""
    folder = make_sweep({})
    empty, incomplete = Path("empty"), Path("incomplete")
    empty.mkdir()
    shutil.copytree(weights["clip"], incomplete)
    tensors = load_file(incomplete / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, incomplete / "model.safetensors", {"format": "pt"})
    cases = {
        "openai/clip-vit-large-patch14": ["clip_score"],
        "shunk031/aesthetics-predictor-v1": ["aesthetic"],
        "hf download yuvalkirstain/PickScore_v1": ["pick_score"],
        "cannot load the weights in": ["clip_score", "--weights", f"clip_score={empty}"],
        "the weights have no visual_projection.weight": [
            "clip_score",
            "--weights",
            f"clip_score={incomplete}",
        ],
        "the weights have no predictor.": [
            "aesthetic",
            "--weights",
            f"aesthetic={weights['clip']}",
        ],
    }
    for words, argv in cases.items():
        assert score(folder, "--metrics", *argv) == 1
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1
    assert not Path("out/metrics.csv").exists()


def test_missing_weights_stop_the_run_first(weights, monkeypatch):
    """The run stops before it computes the metrics whose weights exist."""
    replace_inception(monkeypatch)
    folder = make_sweep({}, {})
    argv = ["--metrics", "clip_score", "pick_score", "is", "--splits", "1", "--weights"]
    assert score(folder, *argv, f"clip_score={weights['clip']}") == 1
    assert not Path("out/metrics.csv").exists()
    assert not Path("out/metrics.json").exists()


def test_prompts(weights, capsys):
    """Line n of the file replaces prompt n of results.csv."""
    files = [f"seed_{seed}_{end}.png" for end in ("a", "b") for seed in (0, 1)]
    prompts = ["a white moon over green mountains"] * 2 + [PROMPT] * 2
    rows = [{"file": f, "prompt": p} for f, p in zip(files, prompts, strict=True)]
    folder = make_sweep(*rows)
    argv = ["--weights", f"clip_score={weights['clip']}", "--metrics", "clip_score"]
    assert score(folder, *argv) == 0
    recorded = values("clip_score")
    Path("same.txt").write_text(f"a white moon over green mountains\n\n{PROMPT}\n")
    assert score(folder, *argv, "--prompts", "same.txt") == 2
    line = capsys.readouterr().err
    assert f"clip_score in metrics.csv has the protocol '{weights['clip']}', this run" in line
    assert "prompts of same.txt (" in line
    assert "--overwrite" in line
    assert score(folder, *argv, "--prompts", "same.txt", "--overwrite") == 0
    assert values("clip_score") == recorded
    Path("other.txt").write_text("a yellow sun\na white moon over green mountains\n")
    assert score(folder, *argv, "--prompts", "other.txt", "--overwrite") == 0
    assert values("clip_score") != recorded
    Path("one.txt").write_text(PROMPT)
    assert score(folder, *argv, "--prompts", "one.txt") == 2
    assert "has 1, the sweep 2 prompts" in capsys.readouterr().err
    make_sweep(*rows, {"file": "seed_9.png", "prompt": "a yellow sun"})
    assert score(folder, *argv, "--prompts", "other.txt") == 2
    assert "has 2, the sweep 3 prompts" in capsys.readouterr().err


class Reward:
    """Stands in for the package's model."""

    def score(self, prompt, image):
        return len(prompt) + image.width / 1e6


def test_image_reward(monkeypatch, capsys):
    """Against a stand-in for the package, within 1e-6: it gets the prompt and image of every row.

    Without the package, one sentence.
    """
    folder = make_sweep({}, {"prompt": 'a "disk", red'})
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    assert score(folder, "--metrics", "image_reward") == 1
    error = capsys.readouterr().err
    assert "cannot import ImageReward" in error
    assert error.count("\n") == 1
    calls = []
    package = types.SimpleNamespace(load=lambda **kwargs: calls.append(kwargs) or Reward())
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    words = [folder, "--metrics", "image_reward", "--device", "cpu"]
    assert score(*words) == 0
    for row, value in zip(table(), values("image_reward").values(), strict=True):
        assert float(value) == pytest.approx(len(row["prompt"]) + 128 / 1e6, rel=1e-6)
    Path("weights").mkdir()
    with_weights = [*words, "--weights", "image_reward=weights"]
    assert score(*with_weights) == 2
    assert "has the protocol" in capsys.readouterr().err
    assert score(*with_weights, "--overwrite") == 0
    weights = Path("weights").absolute()
    files = {"name": f"{weights}/ImageReward.pt", "med_config": f"{weights}/med_config.json"}
    default = {"device": "cpu", "name": "ImageReward-v1.0"}
    local = {"device": "cpu"} | files
    assert calls == [default, local, local]  # --overwrite loads once more, before it deletes
