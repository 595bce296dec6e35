"""CLIPScore and PickScore against transformers' own forward pass on pictures that PIL resized."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import SIDE, save_clip
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from autoprune.errors import UserError
from autoprune.measure.metrics.clip_score import ClipScore
from autoprune.measure.metrics.contract import ImageBatch, MetricContext
from autoprune.measure.metrics.pick_score import PickScore
from autoprune.measure.metrics.picture_input import PictureInput

PROMPTS = ["a red cat", "a photo of a blue dog and a red dog", "dog"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def pictures(count: int = 3, height: int = 80, width: int = 96) -> Tensor:
    """Smooth coloured noise of 8 bits, so that a file holds it exactly."""
    coarse = torch.rand(count, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").mul(255).round() / 255


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def cosines(folder: Path, images: Tensor, prompts: list[str]) -> tuple[np.ndarray, float]:
    """Returns the cosines of each image and its prompt, and the scale, from transformers' forward pass, one at a time."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    processor, found = CLIPImageProcessorPil.from_pretrained(folder), []
    scale = float(model.logit_scale.detach().exp())
    for image, prompt in zip(images, prompts, strict=True):
        pixels = processor(pil(image), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            logits = model(input_ids=tokenizer([prompt], return_tensors="pt").input_ids, pixel_values=pixels).logits_per_image
        found.append(float(logits[0, 0]) / scale)
    return np.array(found), scale


@pytest.mark.parametrize("shape", [(80, 96), (97, 64), (20, 20)])
def test_preprocessing_is_that_of_pil(folder: Path, shape: tuple[int, int]) -> None:
    images = pictures(2, *shape)
    ours = PictureInput.read(folder)(images)
    theirs = CLIPImageProcessorPil.from_pretrained(folder)([pil(image) for image in images], return_tensors="pt")[
        "pixel_values"
    ]
    one_step = 1 / 255 / 0.26
    assert ours.shape == (2, 3, SIDE, SIDE) and (ours - theirs).abs().max() < 1.01 * one_step
    assert (ours - theirs).abs().mean() < 0.05 * one_step


def test_scores_are_transformers_own(folder: Path) -> None:
    images = pictures()
    expected, scale = cosines(folder, images, PROMPTS)
    assert (expected > 0).any() and np.ptp(expected) > 1e-3
    clip = ClipScore(MetricContext(CPU, {"clip": folder})).measure(ImageBatch(images, PROMPTS))
    pick = PickScore(MetricContext(CPU, {"pickscore": folder})).measure(ImageBatch(images, PROMPTS))
    assert clip.dtype == pick.dtype == np.float64 and clip.shape == (3,)
    np.testing.assert_allclose(clip, 100 * expected.clip(min=0), atol=0.05)
    np.testing.assert_allclose(pick, scale * expected, atol=0.01)


def test_opposed_features_score_zero_and_not_less(folder: Path, tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(folder)
    images, prompts = pictures(1), ["a red cat"]
    cosine = cosines(folder, images, prompts)[0][0]
    with torch.no_grad():
        model.text_projection.weight *= -np.sign(cosine)
    save_clip(tmp_path)
    model.save_pretrained(tmp_path)
    assert ClipScore(MetricContext(CPU, {"clip": tmp_path})).measure(ImageBatch(images, prompts)) == 0
    pick = PickScore(MetricContext(CPU, {"pickscore": tmp_path})).measure(ImageBatch(images, prompts))
    np.testing.assert_allclose(pick, -abs(cosine) * float(model.logit_scale.detach().exp()), atol=0.01)


def test_long_prompts_are_cut(folder: Path) -> None:
    metric, images = ClipScore(MetricContext(CPU, {"clip": folder})), pictures(2)
    long, cut = metric.measure(ImageBatch(images[:1].expand(2, -1, -1, -1), ["cat " * 99, "cat " * 10]))
    assert long == pytest.approx(cut, abs=1e-4)


def test_the_processor_of_pick_score_may_be_another_folder(folder: Path, tmp_path: Path) -> None:
    alone = save_clip(tmp_path, processor=False)
    images = pictures()
    with pytest.raises(UserError, match="metric pick_score cannot use weights.pickscore "):
        PickScore(MetricContext(CPU, {"pickscore": alone}))
    both = PickScore(MetricContext(CPU, {"pickscore": alone, "pickscore_processor": folder}))
    whole = PickScore(MetricContext(CPU, {"pickscore": folder}))
    batch = ImageBatch(images, PROMPTS)
    np.testing.assert_array_equal(both.measure(batch), whole.measure(batch))


def test_missing_weights_are_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"metric clip_score needs weights\.clip, got nothing; give weights\.clip=PATH: .*openai"
    ):
        ClipScore(MetricContext(CPU))
    with pytest.raises(
        UserError, match=r"needs weights\.pickscore, but 'nowhere' does not exist; .*yuvalkirstain/PickScore_v1"
    ):
        PickScore(MetricContext(CPU, {"pickscore": Path("nowhere")}))
    with pytest.raises(UserError, match=r"cannot use weights\.clip .*copy a CLIPModel folder"):
        ClipScore(MetricContext(CPU, {"clip": tmp_path}))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers, which is not installed; pip install 'autoprune\[text\]'"):
        ClipScore(MetricContext(CPU, {"clip": folder}))


def test_a_folder_that_lacks_weights_is_refused_not_filled_at_random(tmp_path: Path) -> None:
    save_clip(tmp_path)
    model = CLIPModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "text_projection" not in k})
    with pytest.raises(
        UserError, match=r"\(1 weights of CLIPModel are missing or of another shape, first text_projection.weight\)"
    ):
        ClipScore(MetricContext(CPU, {"clip": tmp_path}))


def test_a_broken_file_of_weights_is_one_sentence(tmp_path: Path) -> None:
    save_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"metric clip_score cannot use weights\.clip "):
        ClipScore(MetricContext(CPU, {"clip": tmp_path}))


def test_a_folder_without_preprocessing_is_refused(tmp_path: Path) -> None:
    save_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json must give size"):
        ClipScore(MetricContext(CPU, {"clip": tmp_path}))
