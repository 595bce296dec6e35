"""The text side of the embedded backbone: a closed vocabulary, and a small learned encoder in place of Flan-T5."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.backbones.attention import attend
from autoprune.backbones.text import TextFeatures
from autoprune.errors import UserError

VOCABULARY = (
    "<pad>", "<null>",
    "a", "photo", "of", "on", "and", "above", "below", "left", "right", "two", "three", "four",
    "circle", "square", "triangle", "cross", "ring",
    "circles", "squares", "triangles", "crosses", "rings",
    "red", "yellow", "green", "cyan", "blue", "magenta",
    "plain", "striped", "dotted", "checkered", "noisy",
    "dark", "gray", "light", "gradient", "background",
)  # fmt: skip
MOTION_VOCABULARY = (*VOCABULARY, "still", "moving", "up", "down", "growing", "shrinking", "rotating", "becoming")
MAX_WORDS = 28


def tokenize(prompt: str, vocabulary: tuple[str, ...] = VOCABULARY) -> list[int]:
    """Vocabulary indices of the words of `prompt`, ignoring case and punctuation; an empty prompt is `<null>`.

    Raises UserError for a word outside the vocabulary and for a prompt of more than MAX_WORDS words.
    """
    words = re.findall(r"\w+", prompt.lower())
    places = {word: index for index, word in enumerate(vocabulary)}
    unknown = [word for word in dict.fromkeys(words) if word not in places]
    if unknown:
        raise UserError(
            f"the embedded text encoder knows a closed vocabulary, got {', '.join(map(repr, unknown))}; "
            f"use the words: {', '.join(vocabulary[2:])}."
        )
    if len(words) > MAX_WORDS:
        raise UserError(f"a prompt must have at most {MAX_WORDS} words, got {len(words)}; shorten it.")
    return [places[word] for word in words] or [places["<null>"]]


@dataclass(frozen=True)
class CaptionEncoderConfig:
    """`width` is the transformer's text width; `max_words` is the number of learned positions."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    max_words: int = MAX_WORDS
    vocabulary: tuple[str, ...] = VOCABULARY


class CaptionEncoder(nn.Module):
    """Pre-norm transformer over words: prompts -> TextFeatures of `width` channels, one row per word."""

    def __init__(self, config: CaptionEncoderConfig = CaptionEncoderConfig()) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(len(config.vocabulary), config.width)
        self.positions = nn.Parameter(torch.randn(config.max_words, config.width) * 0.02)
        self.layers = nn.ModuleList(_Layer(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.words.weight, std=0.1)

    def forward(self, prompts: Sequence[str]) -> TextFeatures:
        """Raises UserError for a prompt that `tokenize` refuses."""
        rows = [self.tokenize(prompt) for prompt in prompts]
        words = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device="cpu")
        for index, row in enumerate(rows):
            words[index, : len(row)] = torch.tensor(row, device="cpu")
        return self.encode(words.to(self.positions.device), tuple(map(len, rows)))

    def tokenize(self, prompt: str) -> list[int]:
        """The words of a prompt in this encoder's vocabulary."""
        return tokenize(prompt, self.config.vocabulary)

    def encode(self, words: Tensor, lengths: tuple[int, ...]) -> TextFeatures:
        """Vocabulary indices `words` [B, T], 0 beyond `lengths` -> features with zeros there."""
        embedded = self.words(words) + self.positions[: words.shape[1]]
        mask = TextFeatures(embedded, lengths).padding_mask()
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return TextFeatures(self.norm(hidden).float() * (words != 0)[..., None], lengths)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attend(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.mlp_norm(x)), approximate="tanh"))
