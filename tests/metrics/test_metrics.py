"""Metrics of finished sweeps: against independent implementations, resumed, and of bad input."""

import itertools
import json
import shutil
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from conftest import table
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from dype.demo import model as demo_model
from dype.metrics import __main__ as metrics
from dype.metrics import image_metrics, inception_features, intervals, set_metrics
from dype.metrics import scores as metric_scores
from dype.metrics.image_metrics import Picture
from dype.sweep import results

pytestmark = pytest.mark.usefixtures("own_folder")

PROMPT = "a red ring on teal leaves"
FEATURES, CLASSES = 12, 5


def noise(seed: int, height: int = 96, width: int = 128) -> Image.Image:
    """A picture with coarse and fine structure."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    fine = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.asarray(coarse.resize((width, height))) // 2 + fine)


def sweep(*given: dict, folder: str = "out") -> Path:
    """A folder as a sweep leaves it; a row per picture, of what differs from the usual."""
    path = Path(folder)
    path.mkdir(exist_ok=True)
    rows = []
    for number, one in enumerate(given):
        usual = dict.fromkeys(results.COLUMNS, "") | {"file": f"seed_{number}.png"}
        usual |= {"height": "96", "width": "128", "method": "dy_yarn", "seed": str(number)}
        row = usual | {"prompt": PROMPT, "seconds": "1.0", "peak_memory": "1"} | one
        if not row["error"]:
            noise(number, int(row["height"]), int(row["width"])).save(path / row["file"])
        rows.append(row)
    metric_scores.write_rows(path, rows)
    return path


def reals(count: int, folder: str = "real") -> Path:
    Path(folder).mkdir()
    for number in range(count):
        noise(100 + number, 120, 140).save(f"{folder}/{number}.png")
    return Path(folder)


def score(*argv) -> int:
    return metrics.main([str(word) for word in argv])


def report(folder: str = "out") -> dict:
    return json.loads(Path(folder, "metrics.json").read_text())


@contextmanager
def projection(weights, device, antialias):
    """In the place of Inception: a fixed random projection of a picture at 8 x 8."""
    rng = np.random.default_rng(5)
    to_features = rng.normal(size=(192, FEATURES))
    to_logits = rng.normal(size=(FEATURES, CLASSES))

    def extract(pictures):
        small = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(pictures).double(), 8)
        features = small.flatten(1).numpy() / 255 @ to_features
        return features, features @ to_logits

    yield extract


@pytest.fixture
def inception(monkeypatch):
    monkeypatch.setattr(metrics, "inception", projection)


# the mathematics


@pytest.mark.parametrize(("real", "drawn"), [(9, 7), (60, 11), (11, 60), (80, 70)])
def test_frechet_distance(real, drawn):
    """Against scipy's matrix root, with fewer and with more pictures than features."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(real, 20)), rng.normal(0.5, rng.random(20), size=(drawn, 20))
    c, d = np.cov(a.T), np.cov(b.T)
    eps = 1e-9 * np.eye(20)  # the root of a singular matrix is not exact
    root = scipy.linalg.sqrtm((c + eps) @ (d + eps)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root)
    (found,) = set_metrics.frechet(a, b, [np.arange(drawn)])
    assert found == pytest.approx(expected, rel=1e-4)
    assert set_metrics.frechet(a, a, [np.arange(real)])[0] == pytest.approx(0, abs=1e-5)


def plain_kid(real: np.ndarray, drawn: np.ndarray, patches: int = 1) -> float:
    """Pair by pair, of different pictures."""

    def mean(pairs):
        return np.mean([(np.dot(x, y) / len(x) + 1) ** 3 for x, y in pairs])

    def within(some):
        pairs = itertools.permutations(enumerate(some), 2)
        return mean((x, y) for (i, x), (j, y) in pairs if i // patches != j // patches)

    return within(real) + within(drawn) - 2 * mean(itertools.product(real, drawn))


@pytest.mark.parametrize("patches", [1, 3])
def test_kernel_distance(patches):
    """Against a plain transcription; of a resample that repeats nothing, of those pictures."""
    rng = np.random.default_rng(1)
    real, drawn = rng.normal(size=(8 * patches, 4)), rng.normal(0.3, 1, size=(6 * patches, 4))
    some = np.array([1, 1, 0, 1, 0, 1.0])
    found = set_metrics.kernel_distance(real, drawn, patches, [np.ones(6), some])
    rows = set_metrics.rows_of(np.flatnonzero(some), patches)
    expected = [plain_kid(real, drawn, patches), plain_kid(real, drawn[rows], patches)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_a_resample():
    """A picture drawn twice is paired with every other one twice, and never with its copy."""
    rng = np.random.default_rng(1)
    real, drawn = rng.normal(size=(5 * 2, 4)), rng.normal(0.3, 1, size=(3 * 2, 4))
    copies = [0, 0, 2]
    pairs = [
        (drawn[2 * picture + patch], drawn[2 * other + also])
        for picture, other in itertools.permutations(copies, 2)
        for patch, also in itertools.product((0, 1), repeat=2)
        if picture != other
    ]
    rows = set_metrics.rows_of(np.array(copies), 2)
    value = np.mean([(x @ y / 4 + 1) ** 3 for x, y in pairs])
    others = itertools.permutations(range(len(real)), 2)
    value += np.mean([(real[i] @ real[j] / 4 + 1) ** 3 for i, j in others if i // 2 != j // 2])
    value -= 2 * np.mean([(x @ y / 4 + 1) ** 3 for x, y in itertools.product(real, drawn[rows])])
    (found,) = set_metrics.kernel_distance(real, drawn, 2, [[2, 0, 1]])
    assert found == pytest.approx(value, rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Pictures of one law are at 0 in the mean, however alike a picture's own patches are."""
    rng, found = np.random.default_rng(5), []

    def sampled(count):
        return (rng.normal(size=(count, 1, 8)) + 0.3 * rng.normal(size=(count, 6, 8))).reshape(
            -1, 8
        )

    for _ in range(300):
        found += list(set_metrics.kernel_distance(sampled(10), sampled(12), 6, [np.ones(12)]))
    assert abs(np.mean(found)) < 3 * np.std(found) / len(found) ** 0.5


def test_inception_score():
    """Against scipy's entropies; unequal splits, torch-fidelity's order."""
    logits = np.random.default_rng(2).normal(0, 3, size=(11, 2, CLASSES))
    found, _ = set_metrics.score(None, {"logits": logits}, 3)
    shares = scipy.special.softmax(logits.reshape(22, -1), 1)
    shares = shares[np.random.RandomState(2020).permutation(22)]
    parts = [shares[:7], shares[7:14], shares[14:]]
    each = [np.exp(scipy.special.rel_entr(p, p.mean(0)).sum(1).mean()) for p in parts]
    assert found == pytest.approx(np.mean(each), rel=1e-9)


def test_intervals_of_means_cover():
    """95 of 100 intervals hold the true mean; the harmonic one that of its own statistic."""
    rng = np.random.default_rng(3)
    edges = [intervals.interval(rng.exponential(size=60)) for _ in range(400)]
    assert 0.90 < np.mean([low < 1 < high for low, high in edges]) < 0.97
    values = rng.uniform(1, 9, size=200)
    low, high = intervals.interval(values, intervals.harmonic_mean)
    assert low < 1 / np.mean(1 / values) < high < values.mean()
    assert intervals.interval(values[:1]) is None


@pytest.mark.parametrize("name", ["fid", "kid", "is"])
def test_intervals_of_sets_spread(name):
    """As wide as the spread of the metric over fresh pictures, within a half; value inside."""
    rng = np.random.default_rng(4)
    real = {"features": rng.normal(size=(80, 1, 6))}
    values, widths = [], []
    for _ in range(40):
        features = rng.normal(0.4, 1.3, size=(50, 1, 6))
        drawn = {"features": features, "logits": features}
        value, (low, high) = metric_scores.SETS[name].compute(real, drawn, 2)
        assert low < value < high
        values.append(value)
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.35)


def test_interval_is_wider_for_correlated_patches():
    """Patches of one picture are no new pictures."""
    rng = np.random.default_rng(6)
    real = {"features": rng.normal(size=(40, 1, 4))}
    same = np.repeat(rng.normal(0.5, 1, size=(20, 1, 4)), 8, axis=1)
    apart = rng.normal(0.5, 1, size=(20, 8, 4))
    for name in ("fid", "kid"):
        wide, narrow = (
            np.diff(metric_scores.SETS[name].compute(real, {"features": one}, 0)[1])
            for one in (same, apart)
        )
        assert wide > 1.5 * narrow


def test_glcm():
    """Against plain loops over pixels, for a picture with edges that fill no patch."""
    image = noise(0, 70, 140)
    grey = np.asarray(image.convert("L")).astype(int) // 4
    scores = []
    for left in (0, 64):
        patch, matrices = grey[:64, left : left + 64], []
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
    found = image_metrics.measure_glcm(Picture(Path("x"), image, ""))
    assert found == pytest.approx(np.mean(scores), rel=1e-6)


def test_compression():
    image = noise(0)
    image.save("x.jpg", quality=95, subsampling=2)
    found = image_metrics.measure_compression(Picture(Path("x"), image, ""))
    assert found == 96 * 128 * 3 / Path("x.jpg").stat().st_size
    plain = Image.new("RGB", image.size)
    assert found < image_metrics.measure_compression(Picture(Path("x"), plain, ""))


# models, of tiny random weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Folders as the hub's: a CLIP of 14 tokens, and its vision tower with a predictor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    torch.manual_seed(27)  # whose cosines have both signs
    tokenizer = demo_model.text_encoders()["tokenizer"]
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "projection_dim": 16}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    words = small | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 14}
    sights = small | {"image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=words, vision_config=sights, projection_dim=16))
    vision = CLIPVisionModelWithProjection(clip.config.vision_config)
    vision.predictor = torch.nn.Linear(16, 1)
    shape = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    found = {"clip": clip, "aesthetic": vision}
    for name, model in found.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
        CLIPImageProcessorPil(**shape).save_pretrained(found[name])
    return found


def shown(image: Image.Image) -> torch.Tensor:
    """What CLIP sees of a picture: its middle at 32 px, in CLIP's units."""
    side = 32 / min(image.size)
    size = [int(edge * side) for edge in image.size]
    small = np.asarray(image.resize(size, Image.Resampling.BICUBIC)) / 255
    top, left = (small.shape[0] - 32) // 2, (small.shape[1] - 32) // 2
    small = small[top : top + 32, left : left + 32]
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.tensor((small - mean) / deviation).permute(2, 0, 1)[None].float()


@torch.no_grad()
def embeddings(folder: Path, image: Image.Image, prompt: str) -> tuple:
    """Unit embeddings of picture and prompt, and the scale of the logits, tower by tower."""
    from transformers import AutoTokenizer, CLIPModel

    clip = CLIPModel.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]
    text = clip.text_projection(clip.text_model(torch.tensor([ids])).pooler_output)[0]
    sight = clip.visual_projection(clip.vision_model(shown(image)).pooler_output)[0]
    return sight / sight.norm(), text / text.norm(), clip.logit_scale.exp()


def test_clip_metrics(weights):
    """Columns against CLIP's towers by hand, cosine by cosine."""
    folder = sweep({}, {"prompt": "a blue disk on red leaves"})
    given = [f"{name}={weights['clip']}" for name in ("clip_score", "pick_score")]
    assert score(folder, "--metrics", "clip_score,pick_score", "--weights", *given) == 0
    for row in table():
        image = Image.open(folder / row["file"])
        sight, text, scale = embeddings(weights["clip"], image, row["prompt"])
        cosine = float(sight @ text)
        assert float(row["clip_score"]) == pytest.approx(max(100 * cosine, 0), rel=1e-3)
        assert float(row["pick_score"]) == pytest.approx(float(scale) * cosine, rel=1e-3)
    assert [float(row["clip_score"]) > 0 for row in table()] == [False, True]


def test_long_prompts_keep_their_end_token(weights, capsys):
    """CLIP reads 14 tokens here, the last of which must be the end token, and says so."""
    words = PROMPT.split() * 4
    with image_metrics.clip_score(str(weights["clip"]), "cpu", "") as measure:
        found = [
            measure(Picture(Path("x"), noise(0), " ".join(words[:count]))) for count in (12, 24)
        ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    expected = "clip_score: CLIP reads 14 tokens; longer, and read in part: 1 prompts\n"
    assert capsys.readouterr().out == expected


@torch.no_grad()
def test_aesthetic(weights):
    """Against the two linear maps by hand; a checkpoint without a predictor is refused."""
    from transformers import CLIPVisionModelWithProjection

    folder = sweep({})
    assert (
        score(folder, "--metrics", "aesthetic", "--weights", f"aesthetic={weights['aesthetic']}")
        == 0
    )
    tensors = load_file(weights["aesthetic"] / "model.safetensors")
    tower = CLIPVisionModelWithProjection.from_pretrained(weights["aesthetic"])
    sight = tower(shown(noise(0))).image_embeds[0]
    expected = tensors["predictor.weight"][0] @ (sight / sight.norm()) + tensors["predictor.bias"]
    assert float(table()[0]["aesthetic"]) == pytest.approx(float(expected), rel=1e-3)


REWARD = """
import json, pathlib
class Model:
    def score(self, prompt, picture):
        print("the package prints")
        return len(prompt) + pathlib.Path(picture).stat().st_size / 1e6
def load(name="ImageReward-v1.0", device=None, med_config=None):
    print("so it does here", name, med_config)
    return Model()
"""


def test_image_reward(monkeypatch, capsys):
    """In a process of its own, with prompt and picture of every row; no package, no score."""
    folder = sweep({}, {"prompt": "a disk"})
    assert score(folder, "--metrics", "image_reward") == 1
    line = capsys.readouterr().err
    assert "No module named 'ImageReward'" in line
    assert line.count("\n") == 1
    Path("ImageReward.py").write_text(REWARD)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    own = ["--metrics", "image_reward", "--python", sys.executable]
    Path("other").mkdir()
    assert score(folder, *own, "--weights", "image_reward=other") == 0
    assert score(folder, *own) == 2  # other weights than those of the column
    assert "image_reward in results.csv is by weights" in capsys.readouterr().err
    assert score(folder, *own, "--overwrite") == 0
    for row in table():
        size = (folder / row["file"]).stat().st_size
        assert float(row["image_reward"]) == pytest.approx(len(row["prompt"]) + size / 1e6)


def test_missing_weights(weights, capsys):
    """One sentence that says what to fetch; weights that lack a part are no weights."""
    folder = sweep({})
    empty, partly = Path("empty"), Path("partly")
    empty.mkdir()
    shutil.copytree(weights["clip"], partly)
    tensors = load_file(partly / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, partly / "model.safetensors", {"format": "pt"})
    given = {
        "openai/clip-vit-large-patch14": ["clip_score"],
        "shunk031/aesthetics-predictor-v1": ["aesthetic"],
        "hf download yuvalkirstain/PickScore_v1": ["pick_score"],
        "cannot load the weights in": ["clip_score", "--weights", f"clip_score={empty}"],
        "it has no visual_projection.weight": ["clip_score", "--weights", f"clip_score={partly}"],
    }
    for words, argv in given.items():
        assert score(folder, "--metrics", *argv) == 1
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1
    assert not table()[0].get("clip_score")


def test_what_is_missing_is_said_first(weights, inception):
    """Before the metrics that could be computed are."""
    folder = sweep({}, {})
    argv = ["--metrics", "clip_score", "pick_score", "is", "--splits", "1", "--weights"]
    assert score(folder, *argv, f"clip_score={weights['clip']}") == 1
    assert not table()[0].get("clip_score")
    assert report()["sets"] == []


def test_missing_inception(monkeypatch, capsys):
    """Without the packages, or with broken weights, one sentence; before anything is computed."""
    for name in ("torchmetrics", "torchmetrics.image", "torchmetrics.image.fid"):
        monkeypatch.setitem(sys.modules, name, None)
    folder = sweep({}, {})
    assert score(folder, "--metrics", "glcm", "is", "--splits", 1) == 1
    assert "pip install torchmetrics==1.9.0 torch-fidelity==0.4.0" in capsys.readouterr().err
    assert not table()[0].get("glcm")


def test_inception_is_torchmetrics(monkeypatch):
    """As its FID is given it: 2048 features, its resizing, a weights file; logits without bias."""
    asked = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2048, CLASSES)

        def forward(self, pictures):
            assert pictures.dtype == torch.uint8
            return pictures.float().mean((2, 3)) @ torch.ones(3, 2048)

    network = Network()

    class FrechetInceptionDistance:
        def __init__(self, *given, **named):
            asked.append((given, named))
            self.inception = network

    stub = types.SimpleNamespace(FrechetInceptionDistance=FrechetInceptionDistance)
    for name in ("torchmetrics", "torchmetrics.image", "torchmetrics.image.fid"):
        monkeypatch.setitem(sys.modules, name, stub)
    pictures = np.full((2, 3, 8, 8), 5, np.uint8)
    for weights, more in ((None, {}), ("a.pth", {"feature_extractor_weights_path": "a.pth"})):
        with inception_features.inception(weights, "cpu", False) as extract:
            features, logits = extract(pictures)
        assert asked[-1] == ((2048,), {"antialias": False} | more)
        assert (features == 15).all()
        assert features.shape == (2, 2048)
        assert logits.shape == (2, CLASSES)
        np.testing.assert_allclose(
            logits, features @ network.fc.weight.detach().numpy().T, rtol=1e-5
        )


def test_resampled_scores_are_of_the_value(monkeypatch):
    """The Inception score of a resample that is the set itself is computed as the value is."""
    seen, logits = [], np.random.default_rng(0).normal(size=(6, 3, CLASSES))
    monkeypatch.setattr(set_metrics, "draws", lambda count, _: [np.arange(count)] * 2)
    monkeypatch.setattr(set_metrics, "inception_score", lambda x, splits: seen.append(x) or 1.0)
    set_metrics.score(None, {"logits": logits}, 2)
    assert len(seen) == 3
    assert all((one == seen[0]).all() for one in seen)


def test_torch_fidelity_agrees(inception_weights):
    """FID, KID and Inception score of the real network, random weights, against torch-fidelity's
    own run on the same PNGs."""
    import torch_fidelity

    folder, real = sweep({}, {}, {}), reals(3)
    for path in real.glob("*.png"):
        ImageOps.fit(Image.open(path), (128, 96), Image.Resampling.BILINEAR).save(path)
    argv = ["--metrics", "fid", "kid", "is", "--real", real, "--resize", "tf1", "--splits", 1]
    assert score(folder, *argv, "--weights", f"inception={inception_weights}") == 0
    expected = torch_fidelity.calculate_metrics(
        input1="out", input2="real", cuda=False, fid=True, kid=True, isc=True, isc_splits=1,
        kid_subsets=1, kid_subset_size=3, feature_extractor_weights_path=str(inception_weights),
        verbose=False, cache=False, save_cpu_ram=True,
    )  # fmt: skip
    values = [one["value"] for one in report()["sets"]]
    names = "frechet_inception_distance", "kernel_inception_distance_mean", "inception_score_mean"
    assert values == pytest.approx([expected[name] for name in names], rel=1e-3)


@pytest.fixture
def inception_weights(monkeypatch) -> Path:
    """Random weights for torch-fidelity's Inception, which is not among the tests' packages."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs torch-fidelity and a torchvision for this torch: {error}")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], "")
    for values in network.parameters():
        if values.ndim > 1:
            torch.nn.init.kaiming_normal_(values)
    torch.save(network.state_dict(), "inception.pth")
    return Path("inception.pth")


# sweeps


def test_columns_and_means():
    """Added to what is there, failed pictures left out, per setting, and written down twice."""
    folder = sweep({}, {"method": "base"}, {"error": "out of memory", "seconds": ""}, {})
    before = table()
    assert score(folder) == 0
    after = table()
    assert [{n: row[n] for n in results.COLUMNS} for row in after] == before
    assert after[2]["glcm"] == after[2]["compression"] == ""
    means = {(one["metric"], one["setting"]): one for one in report()["means"]}
    one = means["glcm", "96x128, dy_yarn"]
    values = [float(after[i]["glcm"]) for i in (0, 3)]
    assert one["pictures"] == 2
    assert one["value"] == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= one["interval"][0] < one["interval"][1] <= max(values) + 1e-9
    ratios = [1 / float(after[i]["compression"]) for i in (0, 3)]
    assert means["compression", "96x128, dy_yarn"]["value"] == pytest.approx(1 / np.mean(ratios))
    assert means["glcm", "96x128, base"]["interval"] is None
    text = Path("out/metrics.txt").read_text()
    assert f"{one['value']:.5g}" in text
    assert "96x128, base" in text


def test_a_spoiled_column(capsys):
    folder = sweep({"glcm": "much"})
    assert score(folder, "--metrics", "compression") == 2
    assert "glcm 'much' of" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(monkeypatch, capsys):
    """What was computed stays, to the digit, and is not computed again; a later picture is."""
    folder = sweep({}, {}, {}, {})
    calls, measure = [], image_metrics.measure_glcm

    def counted(picture):
        calls.append(picture.path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(picture)

    monkeypatch.setattr(image_metrics, "measure_glcm", counted)
    assert score(folder, "--metrics", "glcm") == 130
    assert "the same command" in capsys.readouterr().err
    first = [row["glcm"] for row in table()]
    assert [bool(value) for value in first] == [True, True, False, False]
    assert score(folder, "--metrics", "glcm") == 0
    assert calls == [f"seed_{i}.png" for i in (0, 1, 2, 2, 3)]
    assert [row["glcm"] for row in table()][:2] == first[:2]
    noise(9).save("out/seed_9.png")
    results.append(folder / "results.csv", table()[0] | {"file": "seed_9.png", "glcm": ""})
    assert score(folder, "--metrics", "glcm") == 0
    assert calls[5:] == ["seed_9.png"]
    assert score(folder, "--metrics", "glcm", "--overwrite") == 0
    assert len(calls) == 11


def test_an_interrupted_overwrite_leaves_no_old_values(monkeypatch):
    """Else the next run would take them for values made in the new way."""
    folder = sweep({}, {})
    assert score(folder, "--metrics", "glcm") == 0

    def interrupted(picture):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_metrics, "measure_glcm", interrupted)
    assert score(folder, "--metrics", "glcm", "--overwrite") == 130
    assert [row["glcm"] for row in table()] == ["", ""]


def test_set_metrics(inception, capsys):
    """Of whole pictures and of patches, per setting, against scipy on the same features."""
    folder, real = sweep(*[{}] * 5, *[{"method": "base"}] * 4), reals(6)
    argv = ["--metrics", "fid", "patch_fid", "patch_kid", "--patch", 40, "--patches", 3]
    assert score(folder, *argv, "--real", real) == 0
    with projection(None, "", True) as extract:
        shapes = [inception_features.cut(noise(i), 40, 3, f"seed_{i}.png") for i in range(5)]
        ours = extract(np.concatenate(shapes))[0]
        fitted = [ImageOps.fit(noise(100 + i, 120, 140), (128, 96), 2) for i in range(6)]
        cuts = [inception_features.cut(one, 40, 3, f"{i}.png") for i, one in enumerate(fitted)]
        theirs = extract(np.concatenate(cuts))[0]
    entries = {(one["metric"], one["setting"]): one for one in report()["sets"]}
    assert len(entries) == 6
    one = entries["patch_kid", "96x128, dy_yarn"]
    assert one["value"] == pytest.approx(plain_kid(theirs, ours, 3), rel=1e-6)
    assert (one["pictures"], one["reals"]) == (5, 6)
    root = scipy.linalg.sqrtm(np.cov(ours.T) @ np.cov(theirs.T)).real
    distance = ((ours.mean(0) - theirs.mean(0)) ** 2).sum()
    distance += np.trace(np.cov(ours.T) + np.cov(theirs.T) - 2 * root)
    assert entries["patch_fid", "96x128, dy_yarn"]["value"] == pytest.approx(distance, rel=1e-3)
    out = capsys.readouterr().out
    assert "3 patches of 40 px" in out
    assert "biased upward" in out


def test_set_metrics_go_on(inception, monkeypatch, capsys):
    """Features stay over a kill; numbers stay while their pictures do, and no longer."""
    seen, original = [], inception_features.seen
    folder, real = sweep({}, {}, {}), reals(3)

    def counted(path, *more):
        seen.append(path.name)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return original(path, *more)

    monkeypatch.setattr(inception_features, "seen", counted)
    argv = [folder, "--metrics", "kid", "--real", real]
    assert score(*argv) == 130
    assert score(*argv) == 0
    assert len(seen) == 7
    first = report()["sets"]
    assert score(folder, "--metrics", "compression") == 0
    assert report()["sets"] == first
    noise(50).save("out/seed_1.png")
    assert score(folder, "--metrics", "compression") == 0
    assert report()["sets"] == []
    assert score(*argv) == 0
    assert len(seen) == 8
    assert report()["sets"][0]["value"] != first[0]["value"]
    assert score(*argv, "--overwrite") == 0
    assert len(seen) == 14


def test_patches_are_of_the_picture():
    image = noise(0, 40, 60)
    assert (inception_features.cut(image, 40, 2, "a")[0].shape) == (3, 40, 40)
    square = noise(0, 40, 40)
    assert np.array_equal(
        inception_features.cut(square, 40, 1, "a")[0], np.asarray(square).transpose(2, 0, 1)
    )
    one, same, other = (inception_features.cut(image, 8, 3, name) for name in ("a", "a", "b"))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_real_pictures_keep_their_shape():
    """A wide picture loses its sides; it is not squeezed."""
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste(Image.new("RGB", (100, 100), "blue"), (100, 0))
    wide.save("wide.png")
    how = {"patch": None, "patches": 1, "filter": "lanczos"}
    (found,) = inception_features.seen(Path("wide.png"), how, (50, 50), True)
    assert found.shape == (3, 50, 50)
    assert found[2].min() > 200
    assert found[0].max() < 60


# what goes wrong


def test_a_corrupt_picture_is_skipped_and_counted(inception, capsys):
    folder, real = sweep(*[{}] * 5), reals(4)
    whole = Path("out/seed_2.png").read_bytes()
    Path("out/seed_2.png").write_bytes(whole[: len(whole) // 2])
    Path("real/1.png").write_bytes(b"no picture")
    for _ in range(2):
        assert score(folder, "--metrics", "compression", "glcm", "kid", "--real", real) == 1
        captured = capsys.readouterr()
        assert "skipped 2" in captured.err
        assert captured.err.count("\n") == 1
        assert "Skipped seed_2.png: " in captured.out
        assert "Skipped 1.png: " in captured.out
    assert [bool(row["glcm"]) for row in table()] == [True, True, False, True, True]
    assert report()["means"][0]["pictures"] == 4
    assert (report()["sets"][0]["pictures"], report()["sets"][0]["reals"]) == (4, 3)
    Path("out/seed_2.png").write_bytes(whole)
    noise(3).save("real/1.png")
    assert score(folder, "--metrics", "compression", "glcm", "kid", "--real", real) == 0
    assert report()["sets"][0]["pictures"] == 5


def test_mixed_sizes(inception, capsys):
    """Settings never mix sizes; a picture too small for GLCM has the other metrics."""
    folder = sweep({}, {}, {}, *[{"height": "40", "width": "48"}] * 3)
    argv = ["--metrics", "kid", "glcm", "compression", "--real", reals(3)]
    assert score(folder, *argv) == 1
    out = capsys.readouterr().out
    assert "2 sizes" in out
    assert "Skipped seed_3.png, glcm: it is smaller than a patch of 64 px" in out
    assert [one["setting"] for one in report()["sets"]] == ["96x128, dy_yarn", "40x48, dy_yarn"]
    assert all(row["compression"] for row in table())
    assert [one["how"]["patch"] for one in report()["sets"]] == [None, None]
    noise(0, 50, 50).save("out/seed_0.png")
    assert score(folder, "--metrics", "compression", "--overwrite") == 1
    assert "it is 50x50, its row says 96x128" in capsys.readouterr().out


def test_few_pictures(inception, capsys):
    """Too few for a set metric is said in its place; fewer real than drawn ones is noted."""
    folder = sweep({"method": "base"}, {}, {}, {})
    assert score(folder, "--metrics", "kid", "is", "--splits", 4, "--real", reals(2)) == 0
    out = capsys.readouterr().out
    assert "96x128, base: needs 2 readable pictures, there are 1" in out
    assert "needs 4 pictures or patches, as many as --splits, there are 3" in out
    assert "only 2 real pictures for 3 drawn ones" in out
    assert [one["value"] is None for one in report()["sets"]] == [True, True, False, True]


def test_enlarged_real_pictures_are_counted(inception, capsys):
    folder = sweep({"height": "200"}, {"height": "200"})
    assert score(folder, "--metrics", "kid", "--real", reals(3)) == 0
    assert "3 of the real pictures are smaller than 200x128" in capsys.readouterr().out


def test_prompts(weights, capsys):
    """The n-th line for the sweep's n-th prompt, whatever the order of its pictures."""
    names = [f"seed_{seed}_{end}.png" for end in ("b_prompt_2", "a") for seed in (0, 1)]
    prompts = ["a blue disk on red leaves"] * 2 + [PROMPT] * 2
    rows = [{"file": f, "prompt": p} for f, p in zip(names, prompts, strict=True)]
    folder = sweep(*rows)
    argv = ["--weights", f"clip_score={weights['clip']}", "--metrics", "clip_score"]
    assert score(folder, *argv) == 0
    own = [row["clip_score"] for row in table()]
    Path("same.txt").write_text(f"{PROMPT}\n\na blue disk on red leaves\n")
    assert score(folder, *argv, "--prompts", "same.txt") == 2
    assert "is by prompts None, asked for 'same.txt" in capsys.readouterr().err
    assert score(folder, *argv, "--prompts", "same.txt", "--overwrite") == 0
    assert [row["clip_score"] for row in table()] == own
    Path("other.txt").write_text("a blue disk on red leaves\na green cross\n")
    assert score(folder, *argv, "--prompts", "other.txt", "--overwrite") == 0
    assert [row["clip_score"] for row in table()] != own
    Path("one.txt").write_text(PROMPT)
    assert score(folder, *argv, "--prompts", "one.txt") == 2
    assert "has 1, the sweep 2 prompts" in capsys.readouterr().err
    sweep(*rows, {"file": "seed_9_prompt_2.png", "prompt": "a green cross"})
    assert score(folder, *argv, "--prompts", "other.txt") == 2
    assert "several lists" in capsys.readouterr().err


BAD = {
    "--metrics is 'beauty', expected clip_score": ["out", "--metrics", "beauty"],
    "fid compares with real pictures, expected --real": ["out", "--metrics", "fid"],
    "--real is for fid": ["out", "--metrics", "glcm", "--real", "out"],
    "--real is 'nowhere', expected a folder": ["out", "--real", "nowhere"],
    "holds 0 pictures, expected two or more": ["out", "--real", "bare"],
    "bare has no results.csv with pictures": ["bare"],
    "nowhere has no results.csv with pictures": ["nowhere"],
    "text/results.csv is no table of a sweep": ["text"],
    "failed has no results.csv with pictures": ["failed"],
    "--prompts is for clip_score": ["out", "--metrics", "glcm", "--prompts", "p.txt"],
    "--prompts p.txt cannot be read: No such file": ["out", "--prompts", "p.txt"],
    "--weights is 'clip', expected NAME=PATH": ["out", "--weights", "clip"],
    "--weights is 'glcm=x', expected": ["out", "--weights", "glcm=x"],
    "--weights clip_score is 'x', expected a folder": ["out", "--weights", "clip_score=x"],
    "--weights inception is 'bare', expected a file": ["out", "--weights", "inception=bare"],
    "--patches is 0, expected 1 or more": ["out", "--metrics", "patch_is", "--patches", "0"],
    "--splits is -1, expected 1 or more": ["out", "--metrics", "is", "--splits", "-1"],
    "--patch is 97, expected 1 to 96": ["out", "--metrics", "patch_is", "--patch", "97"],
    "argument --patch: invalid int value: 'x'": ["out", "--patch", "x"],
    "argument --filter: invalid choice: 'box'": ["out", "--filter", "box"],
    "the following arguments are required: FOLDER": [],
}


@pytest.mark.parametrize("words", BAD)
def test_a_mistake_is_one_sentence(words, capsys):
    sweep({})
    sweep({"error": "out of memory", "seconds": ""}, folder="failed")
    Path("bare").mkdir()
    Path("text").mkdir()
    Path("text/results.csv").write_text("no,table\n1,2\n")
    before = Path("out/results.csv").read_bytes()
    assert score(*BAD[words]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert Path("out/results.csv").read_bytes() == before
    assert not Path("out/metrics.json").exists()


def test_what_the_machine_lacks(capsys):
    folder = sweep({})
    assert score(folder, "--device", "tpu") == 1
    assert "no device tpu" in capsys.readouterr().err
    assert score(folder, "--metrics", "image_reward", "--python", "nowhere/python") == 1
    assert "nowhere/python cannot be run" in capsys.readouterr().err
    Path("out/metrics.json").write_text("[1]")
    assert score(folder) == 2
    assert "metrics.json is no report" in capsys.readouterr().err


def test_what_a_kill_left_is_swept():
    folder = sweep({})
    Path("out/.results.csv.17.part").write_text("file,mod")
    assert score(folder, "--metrics", "compression") == 0
    assert not list(folder.glob(".*.part"))


def test_one_run_at_a_time(capsys):
    folder = sweep({})
    with results.locked(folder):
        assert score(folder) == 1
    assert "another run is at work in out; wait for it" in capsys.readouterr().err
