"""Blocks as official checkpoints of the Infinity family nest them: in one list, or in chunks of as many each."""

from typing import Protocol

from torch import nn


class Nesting(Protocol):
    """How many blocks there are, in how many chunks."""

    depth: int
    chunks: int


class BlockChunk(nn.Module):
    """A group of blocks."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)


class NestedBlocks:
    """What transformers with such blocks have in common; their `config` says how many there are, in how many chunks."""

    config: Nesting

    def nest(self, blocks: list[nn.Module]) -> None:
        """Registers the blocks as modules of this one."""
        if self.config.chunks == 1:
            self.blocks = nn.ModuleList(blocks)
        else:
            size = self.config.depth // self.config.chunks
            self.block_chunks = nn.ModuleList(
                BlockChunk(blocks[start : start + size]) for start in range(0, self.config.depth, size)
            )

    def layers(self) -> list[nn.Module]:
        """Returns the blocks in order, whatever their nesting."""
        if self.config.chunks == 1:
            return list(self.blocks)
        return [block for chunk in self.block_chunks for block in chunk.module]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.config.depth
