"""ImageReward against the official computation written anew here, on a small checkpoint of the published layout."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from autoprune.errors import UserError
from autoprune.measure.metrics.contract import ImageBatch, MetricContext
from autoprune.measure.metrics.image_reward import ImageReward

CPU = torch.device("cpu")
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "red", "cat", "blue", "dog"]
PATCH, GRID, EYES, MIND, HEAD = 8, 3, 128, 64, 64
NORMALISATION = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
PROMPTS = ["a red cat", "dog", "a blue dog a red cat a blue"]


def linear(name: str, inner: int, outer: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.randn(outer, inner) / math.sqrt(inner), f"{name}.bias": 0.1 * torch.randn(outer)}


def norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.1 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}


def checkpoint() -> dict[str, Tensor]:
    """Returns random weights under the names of the published file, two layers a tower."""
    torch.manual_seed(0)
    eye, mind = "blip.visual_encoder", "blip.text_encoder"
    state = {f"{eye}.cls_token": torch.randn(1, 1, EYES), f"{eye}.pos_embed": torch.randn(1, GRID**2 + 1, EYES)}
    state |= {f"{eye}.patch_embed.proj.weight": torch.randn(EYES, 3, PATCH, PATCH) / 14}
    state |= {f"{eye}.patch_embed.proj.bias": torch.randn(EYES)}
    for block in (f"{eye}.blocks.{index}" for index in (0, 1)):
        state |= norm(f"{block}.norm1", EYES) | norm(f"{block}.norm2", EYES)
        state |= linear(f"{block}.attn.qkv", EYES, 3 * EYES) | linear(f"{block}.attn.proj", EYES, EYES)
        state |= linear(f"{block}.mlp.fc1", EYES, 160) | linear(f"{block}.mlp.fc2", 160, EYES)
    state |= norm(f"{eye}.norm", EYES) | norm(f"{mind}.embeddings.LayerNorm", MIND)
    state |= {f"{mind}.embeddings.word_embeddings.weight": torch.randn(len(WORDS), MIND)}
    state |= {f"{mind}.embeddings.position_embeddings.weight": torch.randn(40, MIND)}
    state |= {f"{mind}.embeddings.position_ids": torch.arange(40)[None]}
    for layer in (f"{mind}.encoder.layer.{index}" for index in (0, 1)):
        for attention, width in (("attention", MIND), ("crossattention", EYES)):
            state |= linear(f"{layer}.{attention}.self.query", MIND, MIND) | linear(
                f"{layer}.{attention}.self.key", width, MIND
            )
            state |= linear(f"{layer}.{attention}.self.value", width, MIND)
            state |= linear(f"{layer}.{attention}.output.dense", MIND, MIND) | norm(
                f"{layer}.{attention}.output.LayerNorm", MIND
            )
        state |= linear(f"{layer}.intermediate.dense", MIND, 96) | linear(f"{layer}.output.dense", 96, MIND)
        state |= norm(f"{layer}.output.LayerNorm", MIND)
    widths = {0: (MIND, 24), 2: (24, 12), 4: (12, 8), 6: (8, 4), 7: (4, 1)}
    for index, (inner, outer) in widths.items():
        state |= linear(f"mlp.layers.{index}", inner, outer)
    return state | linear("blip.vision_proj", EYES, 16) | linear("blip.text_proj", MIND, 16)


class Reference:
    """The official computation on a state dict, one image and prompt at a time, without padding."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, HEAD)).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.transpose(1, 2) / math.sqrt(HEAD)).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def see(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).reshape(GRID**2, -1)
        kernel = self.state[f"{name}.patch_embed.proj.weight"].flatten(1)
        x = patches @ kernel.T + self.state[f"{name}.patch_embed.proj.bias"]
        x = torch.cat([self.state[f"{name}.cls_token"][0], x]) + self.state[f"{name}.pos_embed"][0]
        for block in (f"{name}.blocks.{index}" for index in (0, 1)):
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v))
            inner = functional.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", inner)
        return self.norm(f"{name}.norm", x, 1e-6)

    def reward(self, pixels: Tensor, tokens: list[int]) -> float:
        name, seen = "blip.text_encoder", self.see(pixels)
        x = self.state[f"{name}.embeddings.word_embeddings.weight"][tokens]
        x = x + self.state[f"{name}.embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
        for layer in (f"{name}.encoder.layer.{index}" for index in (0, 1)):
            for part in (f"{layer}.attention", f"{layer}.crossattention"):
                other = seen if "cross" in part else x
                q, k, v = (self.linear(f"{part}.self.{one}", y) for one, y in (("query", x), ("key", other), ("value", other)))
                found = self.linear(f"{part}.output.dense", self.attend(q, k, v))
                x = self.norm(f"{part}.output.LayerNorm", found + x, 1e-12)
            inner = functional.gelu(self.linear(f"{layer}.intermediate.dense", x))
            x = self.norm(f"{layer}.output.LayerNorm", self.linear(f"{layer}.output.dense", inner) + x, 1e-12)
        found = x[0]
        for index in (0, 2, 4, 6, 7):
            found = self.linear(f"mlp.layers.{index}", found)
        return (float(found) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reward")
    torch.save(checkpoint(), folder / "ImageReward.pt")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "bert")
    return {"image_reward": folder / "ImageReward.pt", "bert_tokenizer": folder / "bert"}


def images(count: int = 3) -> Tensor:
    """Images of the model's own size, 8 bits a pixel, so that no resizing comes between."""
    side = PATCH * GRID
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255


def test_rewards_are_those_of_the_official_computation(weights: dict[str, Path]) -> None:
    batch = ImageBatch(images(), PROMPTS)
    found = ImageReward(MetricContext(CPU, weights)).measure(batch)
    reference = Reference(checkpoint())
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALISATION)
    tokens = [[1, *(WORDS.index(word) for word in prompt.split()), 2] for prompt in PROMPTS]
    expected = [reference.reward((image - mean) / std, ids) for image, ids in zip(batch.images, tokens, strict=True)]
    assert found.shape == (3,) and found.dtype == np.float64 and np.ptp(expected) > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_prompts_are_cut_at_35_tokens(weights: dict[str, Path]) -> None:
    metric, same = ImageReward(MetricContext(CPU, weights)), images(1).expand(3, -1, -1, -1)
    cut, long, shorter = metric.measure(ImageBatch(same, ["cat " * 33, "cat " * 90, "cat " * 32]))
    assert cut == long != shorter


def test_the_reward_of_a_video_is_the_mean_over_its_frames(weights: dict[str, Path]) -> None:
    metric, frames = ImageReward(MetricContext(CPU, weights)), images(6)
    alone = metric.measure(ImageBatch(frames, [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3)).reshape(2, 3)
    video = metric.measure(ImageBatch(frames.unflatten(0, (2, 3)).transpose(1, 2), PROMPTS[:2]))
    np.testing.assert_allclose(video, alone.mean(1), rtol=1e-4)


def test_the_folder_of_the_file_will_do(weights: dict[str, Path]) -> None:
    batch, folder = ImageBatch(images(1), PROMPTS[:1]), weights | {"image_reward": weights["image_reward"].parent}
    whole, file = (ImageReward(MetricContext(CPU, given)).measure(batch) for given in (folder, weights))
    assert whole == file


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop("mlp.layers.7.bias"), "must be the published ImageReward.pt"),
        (lambda state: state.pop("blip.visual_encoder.blocks.1.norm1.bias"), "Missing key"),
        (lambda state: state.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"), "Missing key"),
        (lambda state: state.update({"blip.visual_encoder.extra.weight": torch.ones(1)}), "visual_encoder.extra.weight"),
        (lambda state: state.update({"other.weight": torch.ones(1)}), "must be the published ImageReward.pt"),
        (lambda state: state.update({"mlp.layers.0.weight": torch.ones(24)}), "must be the published ImageReward.pt"),
        (lambda state: state.update({"blip.visual_encoder.norm.weight": torch.ones(3)}), "size mismatch"),
        (lambda state: state.clear(), "must be the published ImageReward.pt"),
    ],
)
def test_any_other_file_is_one_sentence(tmp_path: Path, weights: dict[str, Path], change: object, match: str) -> None:
    state = checkpoint()
    change(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=match):
        ImageReward(MetricContext(CPU, weights | {"image_reward": tmp_path / "other.pt"}))


def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path, weights: dict[str, Path]) -> None:
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "text.pt").write_bytes(content)
        with pytest.raises(UserError, match="must be the published ImageReward.pt, got .*; copy it from huggingface.co/THUDM"):
            ImageReward(MetricContext(CPU, weights | {"image_reward": tmp_path / "text.pt"}))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="must be the published"):
        ImageReward(MetricContext(CPU, weights | {"image_reward": tmp_path / "list.pt"}))
    with pytest.raises(UserError, match=r"metric image_reward needs weights\.bert_tokenizer, got nothing; .*bert-base-uncased"):
        ImageReward(MetricContext(CPU, {"image_reward": weights["image_reward"]}))
