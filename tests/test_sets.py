"""FID, KID and CMMD against torchmetrics, scipy and naive loops, with small random networks read from files."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from autoprune.errors import UserError
from autoprune.measure.metrics import METRICS, ImageBatch, MetricContext
from autoprune.measure.metrics.discrepancy import Discrepancy, Kernel, cubic, gaussian
from autoprune.measure.metrics.feature_network import load_network
from autoprune.measure.metrics.frames import frames_of
from autoprune.measure.metrics.frechet import deviations, frechet_distance
from autoprune.measure.metrics.picture_input import PictureInput
from autoprune.measure.metrics.summary import of_sets

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


class Pooled(torch.nn.Module):
    """Mean colours of the four quarters of uint8 images, in [0, 1], and 1: 13 features, as a script would have them."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        if not return_features:
            return torch.zeros(len(x), 13)
        pooled = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)
        return torch.cat([pooled, torch.ones(len(x), 1)], 1)


class Named(torch.nn.Module):
    """What torchmetrics wants of a network."""

    num_features = 13

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Pooled()(x, return_features=True)


@pytest.fixture(scope="module")
def script(tmp_path_factory):  # noqa: ANN001, ANN201
    file = tmp_path_factory.mktemp("network") / "features.pt"
    torch.jit.script(Pooled()).save(file)
    return file


def vision_folder(folder, model):  # noqa: ANN001, ANN201
    model.save_pretrained(folder)
    plain = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    plain |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(plain))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):  # noqa: ANN001, ANN201
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=4, projection_dim=24)
    text = CLIPTextConfig(**sizes, vocab_size=40, projection_dim=24)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    return vision_folder(tmp_path_factory.mktemp("clip"), CLIPModel(config).eval())


def batch(images: torch.Tensor) -> ImageBatch:
    return ImageBatch(images, [""] * len(images))


def everything(count: int) -> list[np.ndarray]:
    return [np.arange(count)]


@pytest.mark.parametrize(("count", "others", "width"), [(40, 60, 6), (9, 7, 20), (30, 5, 12)])
def test_frechet_distance_is_its_closed_form(count: int, others: int, width: int) -> None:
    x, y = RNG.normal(size=(count, width)) * RNG.uniform(0.5, 2, width), RNG.normal(0.3, 1.2, (others, width))
    first, second = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(first @ second).real
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet_distance(deviations(x), deviations(y)) == pytest.approx(wanted, rel=1e-4)
    assert frechet_distance(deviations(x), deviations(x)) == pytest.approx(0, abs=1e-8)


def test_fid_is_torchmetrics_with_the_same_network(script, tmp_path) -> None:  # noqa: ANN001
    images, dense = torch.rand(30, 3, 8, 8), torch.rand(30, 3, 8, 8) ** 1.3
    theirs = FrechetInceptionDistance(Named(), normalize=False)
    for pictures, real in ((images, False), (dense, True)):
        theirs.update((255 * pictures).round().to(torch.uint8), real=real)
    ours = METRICS["fid"](MetricContext(CPU, {"feature_network": script}))
    found = ours.distances(ours.measure(batch(images)), ours.measure(batch(dense)), everything(30))
    assert found == pytest.approx([theirs.compute().item()], rel=1e-3)

    for number, picture in enumerate((255 * dense).round().to(torch.uint8)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:02}.png")
    weights = {"feature_network": script, "reference_images": tmp_path}
    reference = METRICS["fid_reference"](MetricContext(CPU, weights))
    features = reference.measure(batch(images))
    assert reference.distances(features, features, everything(30)) == pytest.approx(found, rel=1e-6)


def test_kid_to_a_reference_is_torchmetrics() -> None:
    x, y = RNG.normal(size=(25, 7)), RNG.normal(0.2, 1.1, (25, 7))
    kid = Discrepancy(cubic, unbiased=True)
    wanted = poly_mmd(torch.from_numpy(y), torch.from_numpy(x)).item()
    assert kid.to_reference(x, y, kid.within(y), everything(25)) == pytest.approx([wanted])


def test_kid_of_pairs_leaves_out_each_prompts_own_pair() -> None:
    x = RNG.normal(size=(12, 5))
    y = x + 0.4 * RNG.normal(size=x.shape)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 5 + 1) ** 3

    rows = np.array([0, 3, 4, 8, 11])
    terms = [k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i in rows for j in rows if i != j]
    kid = Discrepancy(cubic, unbiased=True)
    assert kid.of_pairs(x, y, [rows]) == pytest.approx([np.mean(terms)])
    assert kid.of_pairs(x, x, everything(12)) == pytest.approx([0], abs=1e-12)


def test_kid_of_pairs_is_right_on_average_where_pairs_depend_on_each_other() -> None:
    truth_x, truth_y = np.random.default_rng(1).normal([0, 0], 1, (2, 2000, 2))
    truth_y += 0.7
    kid = Discrepancy(cubic, unbiased=True)
    truth = kid.to_reference(truth_x, truth_y, kid.within(truth_y), everything(2000))[0]
    rng, found = np.random.default_rng(2), []
    for _ in range(400):
        x = rng.normal(size=(20, 2))
        y = 0.9 * x + np.sqrt(1 - 0.9**2) * rng.normal(size=(20, 2)) + 0.7
        found.append(kid.of_pairs(x, y, everything(20))[0])
    assert np.mean(found) == pytest.approx(truth, abs=0.15 * truth + 3 * np.std(found) / 400**0.5)


def test_cmmd_is_the_published_formula_on_unit_clip_embeddings(clip, tmp_path) -> None:  # noqa: ANN001
    from transformers import CLIPModel

    images, dense = torch.rand(2, 5, 3, 24, 16)
    model, prepared = CLIPModel.from_pretrained(clip).eval(), PictureInput.read(clip)
    with torch.inference_mode():
        pooled = [model.vision_model(prepared(x)).pooler_output for x in (images, dense)]
        x, y = (torch.nn.functional.normalize(model.visual_projection(each).double(), dim=1).numpy() for each in pooled)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return np.mean([np.exp(-((u - v) ** 2).sum() / (2 * 10**2)) for u in a for v in b])

    wanted = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    cmmd = METRICS["cmmd"](MetricContext(CPU, {"cmmd_clip": clip}))
    found = cmmd.distances(cmmd.measure(batch(images)), cmmd.measure(batch(dense)), everything(5))
    assert found == pytest.approx([wanted], rel=1e-3) and wanted > 0
    reference = Discrepancy(gaussian, unbiased=False)
    assert 1000 * reference.to_reference(x, y, reference.within(y), everything(5)) == pytest.approx([wanted], rel=1e-3)


@pytest.mark.parametrize("name", ["fid", "kid", "cmmd"])
def test_sets_of_videos_are_the_sets_of_their_frames(name: str, script: Path, clip: Path) -> None:
    metric = METRICS[name](MetricContext(CPU, {"feature_network": script, "cmmd_clip": clip}))
    pair = torch.rand(6, 3, 3, 24, 24), torch.rand(6, 3, 3, 24, 24) ** 1.5
    own, dense = (metric.measure(batch(videos)) for videos in pair)
    frames = [metric.measure(batch(frames_of(videos))) for videos in pair]
    assert own.shape[:2] == (6, 3)
    np.testing.assert_allclose(own.reshape(18, -1), frames[0], rtol=1e-4, atol=1e-6)
    rows = np.array([0, 2, 5])
    places = (3 * rows[:, None] + np.arange(3)).ravel()
    expected = metric.distances(*frames, [np.arange(18), places])
    if name != "kid":  # without the pairs of frames of one video
        np.testing.assert_allclose(metric.distances(own, dense, [np.arange(6), rows]), expected, rtol=1e-3)
    value = of_sets(metric, own, dense)
    assert value.n == 6 and value.interval[0] < value.value < value.interval[1]
    same = metric.distances(own, own, [np.arange(6)])
    assert same == pytest.approx([0], abs=1e-6)


@pytest.mark.parametrize("kernel", [cubic, gaussian])
@pytest.mark.parametrize("unbiased", [True, False])
def test_the_kernel_of_two_videos_is_the_mean_over_their_frames(kernel: Kernel, unbiased: bool) -> None:
    rng = np.random.default_rng(0)
    x, y, reference = rng.normal(size=(5, 2, 4)), rng.normal(0.3, 1, (5, 2, 4)), rng.normal(size=(7, 4))
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j or not unbiased]

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return np.mean([kernel(a[i, s][None], b[j, t][None])[0, 0] for i, j in pairs for s in range(2) for t in range(2)])

    distance = Discrepancy(kernel, unbiased)
    assert distance.of_pairs(x, y, [np.arange(5)]) == pytest.approx([mean(x, x) + mean(y, y) - 2 * mean(x, y)])
    cross = np.mean([kernel(x[i, s][None], row[None])[0, 0] for i in range(5) for s in range(2) for row in reference])
    within = distance.within(reference)
    found = distance.to_reference(x, reference, within, [np.arange(5)])
    assert found == pytest.approx([mean(x, x) + within - 2 * cross])


def test_a_folder_of_another_vision_transformer_gives_its_first_token(tmp_path) -> None:  # noqa: ANN001
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
    model = Dinov2Model(config).eval()
    network = load_network(vision_folder(tmp_path, model), CPU)
    images = torch.rand(2, 3, 20, 30).mul(255).round() / 255
    seen = (images[:, :, 2:18, 7:23] - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
        3, 1, 1
    )
    with torch.inference_mode():
        assert torch.allclose(network(images), model(seen).pooler_output, atol=1e-5)


def test_resizing_is_pils_bicubic() -> None:
    pixels = RNG.integers(0, 256, (48, 36, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(pixels).resize((18, 24), Image.BICUBIC)) / 255
    ours = PictureInput(18, 18, (0.0,) * 3, (1.0,) * 3)(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255)
    assert np.abs(ours[0].permute(1, 2, 0).numpy() - theirs[3:21]).max() < 1.5 / 255


def test_what_cannot_be_read_is_one_sentence(script, clip, tmp_path) -> None:  # noqa: ANN001
    from safetensors.torch import load_file, save_file

    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match="must be a TorchScript file or a folder"):
        load_network(tmp_path / "text.pt", CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_network(tmp_path / "empty", CPU)
    with pytest.raises(UserError, match="at least 2 images, got 0"):
        METRICS["kid_reference"](MetricContext(CPU, {"feature_network": script, "reference_images": tmp_path / "empty"}))
    weights = load_file(clip / "model.safetensors")
    lost = tmp_path / "lost"
    lost.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (lost / name).write_bytes((clip / name).read_bytes())
    save_file({key: value for key, value in weights.items() if key != "visual_projection.weight"}, lost / "model.safetensors")
    with pytest.raises(UserError, match="lacks weights, first visual_projection.weight"):
        load_network(lost, CPU)
    (lost / "preprocessor_config.json").write_text("{}")
    save_file(weights, lost / "model.safetensors")
    with pytest.raises(UserError, match="must give size, image_mean and image_std"):
        load_network(lost, CPU)
