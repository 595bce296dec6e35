"""Configurations of VAR and its tokenizer read off their state dicts."""

import re
from collections.abc import Mapping

from torch import Tensor

from autoprune.backbones.var import SIDES_256, SIDES_512, VARConfig
from autoprune.backbones.vq_tokenizer import VQConfig
from autoprune.errors import UserError

State = Mapping[str, Tensor]


def var_config(state: State) -> VARConfig:
    """Returns the sizes of a VAR transformer. Its scales are told apart by how many positions there are.

    Raises UserError for a number of positions that no released model has.
    """
    classes, width = state["class_emb.weight"].shape
    positions = state["pos_1LC"].shape[1]
    sides = next((sides for sides in (SIDES_256, SIDES_512) if sum(side**2 for side in sides) == positions), None)
    if sides is None:
        raise UserError(f"a VAR model has 680 positions (256 px) or 2240 (512 px), this one {positions}; pass a released size.")
    return VARConfig(
        width=width,
        heads=state["blocks.0.attn.scale_mul_1H11"].shape[1],
        depth=1 + max(int(block) for block in re.findall(r"blocks\.(\d+)\.", " ".join(state))),
        sides=sides,
        shared_aln="blocks.0.ada_gss" in state,
        classes=classes - 1,
        channels=state["word_embed.weight"].shape[1],
        vocabulary=len(state["head.weight"]),
    )


def vq_config(state: State) -> VQConfig:
    """Returns the sizes of the VQ tokenizer with these tensors."""
    vocabulary, channels = state["quantize.embedding.weight"].shape
    levels = 1 + max(int(level) for level in re.findall(r"decoder\.up\.(\d+)\.", " ".join(state)))
    widths = [len(state[f"decoder.up.{level}.block.0.conv2.weight"]) for level in range(levels)]
    blocks = 1 + max(int(block) for block in re.findall(r"decoder\.up\.0\.block\.(\d+)\.", " ".join(state)))
    return VQConfig(
        vocabulary=vocabulary,
        channels=channels,
        base=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        blocks=blocks - 1,
        scales=len(state["quantize.ema_vocab_hit_SV"]),
    )
