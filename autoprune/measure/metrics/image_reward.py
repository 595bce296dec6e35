"""ImageReward (arXiv 2304.05977): BLIP reads image and prompt together, five linear layers turn that into a reward.

Official file: ImageReward/ImageReward.py. The published checkpoint is mapped, key by key, onto transformers' BLIP.
"""

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from autoprune.backbones.checkpoints import reason
from autoprune.errors import UserError
from autoprune.measure.metrics.contract import ImageBatch, MetricContext, MetricInfo, WeightNeed
from autoprune.measure.metrics.frames import mean_score
from autoprune.measure.metrics.picture_input import PictureInput
from autoprune.measure.metrics.pretrained import PretrainedFolder

FILE = "ImageReward.pt"
MODEL = WeightNeed("image_reward", f"{FILE} or its folder", "huggingface.co/THUDM/ImageReward")
TOKENIZER = WeightNeed("bert_tokenizer", "the tokenizer of bert-base-uncased", "huggingface.co/google-bert/bert-base-uncased")
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards of its authors' validation set
TOKENS = 35
HEAD_WIDTH = 64  # of both transformers, as in BERT-base and ViT-L
LAYERS = (0, 2, 4, 6, 7)  # the linear ones of the reward's head; dropouts lie between them
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.norm(\d)", r"encoder.layers.\1.layer_norm\2"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
    (r"norm", "post_layernorm"),
)
Weights = Mapping[str, Tensor]


class ImageReward:
    """The reward people's rankings taught, 0 on average and 1 in spread over its authors' validation set."""

    info = MetricInfo("image_reward", "absolute", lower=False, source="arXiv 2304.05977", needs=(MODEL, TOKENIZER))

    def __init__(self, context: MetricContext) -> None:
        self._tokenizer = PretrainedFolder(self.info.name, TOKENIZER, context).processor("AutoTokenizer")
        self._blip = read_blip(context.path(self.info.name, MODEL), context.device)
        self._prepared = PictureInput(self._blip.side, self._blip.side)
        self._device = context.device

    @torch.inference_mode()
    def measure(self, batch: ImageBatch) -> np.ndarray:
        """Returns the reward, float64 [B]; a prompt is cut at 35 tokens, as published."""
        return (mean_score(self._raw, batch.images, batch.prompts) - MEAN) / STD

    def _raw(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        tokens = self._tokenizer(list(prompts), **options)
        pixels = self._prepared(images.to(self._device))
        return self._blip(pixels, tokens.input_ids.to(self._device), tokens.attention_mask.to(self._device))


@dataclass(frozen=True)
class RewardBlip:
    """Image tower, text tower that attends to it, and (weight, bias) of the linear layers; `side` in pixels."""

    vision: torch.nn.Module
    text: torch.nn.Module
    head: tuple[tuple[Tensor, Tensor], ...]
    side: int

    def __call__(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns raw rewards [B] of pixels [B, 3, side, side] and tokens [B, L] with their mask."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        everything = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        states = self.text(tokens, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=everything)
        found = states.last_hidden_state[:, 0]
        for weight, bias in self.head:
            found = functional.linear(found, weight, bias)
        return found[:, 0]


def read_blip(path: Path, device: torch.device) -> RewardBlip:
    """Reads the published checkpoint; its sizes follow from its weights. Raises UserError unless it has exactly its keys."""
    path = path / FILE if path.is_dir() else path
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return _blip({key: value.float() for key, value in state.items() if not UNUSED.fullmatch(key)}, device)
    except (OSError, RuntimeError, KeyError, AttributeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        said = f"{type(error).__name__}: {reason(error)}"
        raise UserError(
            f"weights.{MODEL.key} must be the published {FILE}, got {str(path)!r} ({said}); copy it from {MODEL.source}."
        ) from None


def _blip(state: Weights, device: torch.device) -> RewardBlip:
    """Builds the towers, every weight filled. Raises KeyError, RuntimeError or ValueError for other keys or shapes."""
    import transformers

    vision, text, head = (_below(state, f"{part}.") for part in ("blip.visual_encoder", "blip.text_encoder", "mlp.layers"))
    if len(vision) + len(text) + len(head) != len(state) or len(head) != 2 * len(LAYERS):
        raise ValueError(f"{len(state)} keys, of which {len(vision)} of the image tower, {len(text)} of the text tower")
    vision = {_vision_key(key): value for key, value in vision.items()}
    config = _vision_config(vision)
    towers = (
        transformers.BlipVisionModel(transformers.BlipVisionConfig(**config)),
        transformers.BlipTextModel(transformers.BlipTextConfig(**_text_config(text)), add_pooling_layer=False),
    )
    for tower, weights in zip(towers, (vision, text), strict=True):
        tower.load_state_dict(weights)
        tower.to(device).eval().requires_grad_(False)
    return RewardBlip(*towers, _linear(head, towers[1].config.hidden_size), config["image_size"])


def _linear(head: Weights, width: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Returns (weight, bias) of the layers from `width` to 1. Raises ValueError when they do not fit together."""
    layers = tuple((head[f"{layer}.weight"], head[f"{layer}.bias"]) for layer in LAYERS)
    widths = [width, *(len(bias) for _, bias in layers)]
    if widths[-1] != 1 or any(
        weight.shape != (outer, inner) for (weight, _), (inner, outer) in zip(layers, pairwise(widths), strict=True)
    ):
        raise ValueError("the linear layers of its head do not fit together")
    return layers


def _below(state: Weights, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _vision_key(key: str) -> str:
    """Returns transformers' name of a weight of the published image tower. Raises KeyError for one it does not know."""
    for pattern, name in VISION:
        found = re.match(rf"{pattern}(?=\.|$)", key)
        if found:
            return found.expand(name) + key[found.end() :]
    raise KeyError(f"blip.visual_encoder.{key}")


def _vision_config(weights: Weights) -> dict[str, object]:
    places, patch = weights["embeddings.position_embedding"].shape[1], weights["embeddings.patch_embedding.weight"].shape[-1]
    sizes = _sizes(weights, "encoder.layers.{}.mlp.fc1.weight")
    return sizes | {"image_size": math.isqrt(places - 1) * patch, "patch_size": patch, "layer_norm_eps": 1e-6}


def _text_config(weights: Weights) -> dict[str, object]:
    sizes = _sizes(weights, "encoder.layer.{}.intermediate.dense.weight")
    return sizes | {
        "vocab_size": len(weights["embeddings.word_embeddings.weight"]),
        "max_position_embeddings": len(weights["embeddings.position_embeddings.weight"]),
        "encoder_hidden_size": weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        "is_decoder": True,  # has cross-attention; it reads its text in both directions all the same
    }


def _sizes(weights: Weights, widening: str) -> dict[str, int]:
    """Returns the sizes of a transformer whose layer i has the weight `widening` [inner width, width]."""
    inner, width = weights[widening.format(0)].shape
    depth = next(layer for layer in count() if widening.format(layer) not in weights)
    heads = width // HEAD_WIDTH
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": depth, "num_attention_heads": heads}
