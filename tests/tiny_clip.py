"""A small random CLIP with its tokenizer and preprocessing in a folder, as transformers saves them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

SPECIAL = {"<|startoftext|>": 0, "<|endoftext|>": 1, "<unk>": 2}
WORDS = ["a", "photo", "of", "red", "blue", "cat", "dog", "-", "colored", "object", "and"]
SIDE = 32


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """Saves a tokenizer of whole words between CLIP's two marks."""
    known = SPECIAL | {word: len(SPECIAL) + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)


def save_clip(folder: Path, *, seed: int = 0, processor: bool = True) -> Path:
    """Saves a CLIP of width 32 that reads 32 pixels and 12 tokens; without `processor`, its weights alone."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": SIDE, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    if processor:
        save_tokenizer(folder)
        size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder
