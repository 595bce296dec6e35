"""Configurations read off a state dict, and its keys brought to our layout, for Infinity and its tokenizer."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from autoprune.backbones.bsq_tokenizer import TokenizerConfig, wrapped_keys
from autoprune.backbones.infinity import TransformerConfig
from autoprune.backbones.nested_blocks import Nesting

State = Mapping[str, Tensor]
OBSOLETE = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")
_BLOCK = re.compile(r"(?:block_chunks\.(\d+)\.module|blocks)\.(\d+)\.")


def transformer_config(state: State) -> TransformerConfig:
    """Returns the sizes of an Infinity transformer with these tensors, whichever way its blocks are nested."""
    depth, chunks, first = nesting(state)
    return TransformerConfig(
        width=state["pos_start"].shape[-1],
        heads=state[f"{first}.sa.scale_mul_1H11"].shape[1],
        depth=depth,
        chunks=chunks,
        token_bits=state["head.weight"].shape[0] // 2,
        text_width=state["text_norm.weight"].shape[0],
        text_max_length=len(state["cfg_uncond"]),
        levels=len(state["lvl_embed.weight"]),
    )


def tokenizer_config(state: State, *, token_bits: int) -> TokenizerConfig:
    """Returns the sizes of a BSQ tokenizer whose transformer sees `token_bits` bits a token."""
    levels = 1 + max(int(level) for level in re.findall(r"decoder\.up\.(\d+)\.", " ".join(state)))
    blocks = 1 + max(int(block) for block in re.findall(r"decoder\.up\.0\.block\.(\d+)\.", " ".join(state)))
    widths = [len(state[f"decoder.up.{level}.block.0.conv2.conv.weight"]) for level in range(levels)]
    bits = state["decoder.conv_in.conv.weight"].shape[1]
    return TokenizerConfig(
        bits=bits,
        base=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        encoder_blocks=blocks - 1,
        decoder_blocks=blocks,
        patchify=token_bits == 4 * bits,
    )


def transformer_state(state: dict[str, Tensor], *, config: TransformerConfig) -> dict[str, Tensor]:
    """Returns a state dict (or a shard) in the nesting of `config`, without what old checkpoints carry along.

    The unconditional text takes the length of `config`, as the official loader does: cut, or continued at random.
    """
    kept = {nested_key(key, config): value for key, value in state.items() if key not in OBSOLETE}
    if "cfg_uncond" in kept:
        kept["cfg_uncond"] = resized_text(kept["cfg_uncond"], config.text_max_length)
    return kept


def tokenizer_state(state: dict[str, Tensor], *, expected: State) -> dict[str, Tensor]:
    """Returns a tokenizer's state dict with the two wrappers that some official files leave out."""
    return wrapped_keys(state, expected)


def nesting(state: State) -> tuple[int, int, str]:
    """Returns how many blocks a state dict has, in how many chunks, and the first block's name."""
    places = {(int(chunk or 0), int(block)) for chunk, block in _BLOCK.findall(" ".join(state))}
    first = "block_chunks.0.module.0" if any(key.startswith("block_chunks") for key in state) else "blocks.0"
    return len(places), 1 + max(chunk for chunk, _ in places), first


def nested_key(key: str, config: Nesting) -> str:
    """Returns a key with its block where `config` has it: in one list, or in chunks of blocks."""
    found = _BLOCK.match(key)
    if found is None or (found[1] is None) == (config.chunks == 1):
        return key
    size = config.depth // config.chunks
    layer = int(found[2]) + int(found[1] or 0) * size
    place = f"blocks.{layer}." if config.chunks == 1 else f"block_chunks.{layer // size}.module.{layer % size}."
    return place + key[found.end() :]


def resized_text(rows: Tensor, length: int) -> Tensor:
    """Returns the unconditional text [T, width] with another length: cut, or continued at random."""
    if len(rows) >= length:
        return rows[:length]
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(length - len(rows), rows.shape[1], generator=generator) / rows.shape[1] ** 0.5
    return torch.cat((rows, more.to(rows)))
