"""Training data of the generator: scenes encoded once, quantised again at every step so that bits can be corrupted."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.backbones.bsq_tokenizer import BSQTokenizer
from autoprune.backbones.caption_encoder import MAX_WORDS, tokenize
from autoprune.files import write_whole
from autoprune.policy import Grid
from autoprune.testbed.distributed import Team
from autoprune.testbed.precision import mixed
from autoprune.testbed.stored import weights_hash
from autoprune.testbed.worlds import IMAGES, World

ENCODE_BATCH = 32


@dataclass(frozen=True)
class LatentSet:
    """Memory-mapped arrays: `features` [N, bits, (T,) H, W] float16, `words` [N, MAX_WORDS] int16, `lengths` [N] uint8."""

    features: np.ndarray
    words: np.ndarray
    lengths: np.ndarray

    @staticmethod
    def create(folder: Path, count: int, feature_shape: tuple[int, ...]) -> "LatentSet":
        """Lays out empty arrays in `folder`, replacing what is there."""
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {
            "features": ((count, *feature_shape), np.float16),
            "words": ((count, MAX_WORDS), np.int16),
            "lengths": ((count,), np.uint8),
        }
        return LatentSet(
            **{
                name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
                for name, (shape, dtype) in shapes.items()
            }
        )

    @staticmethod
    def open(folder: Path) -> "LatentSet":
        """Maps the arrays that `create` laid out, writable and shared between processes."""
        return LatentSet(*(np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("features", "words", "lengths")))

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """(features [B, bits, (T,) H, W] float32, words [B, T] int64 cut to the longest, lengths)."""
        rows = np.sort(rows)
        lengths = tuple(int(length) for length in self.lengths[rows])
        words = torch.from_numpy(self.words[rows][:, : max(lengths)].astype(np.int64))
        return torch.from_numpy(self.features[rows].astype(np.float32)), words, lengths


@torch.no_grad()
def encode_scenes(latents: LatentSet, tokenizer: nn.Module, rows: Sequence[int], *, seed: int, world: World = IMAGES) -> None:
    """Renders `world.pair(seed, row)` for every row and writes its features and caption into the set."""
    device = next(tokenizer.parameters()).device
    for start in range(0, len(rows), ENCODE_BATCH):
        chunk = list(rows[start : start + ENCODE_BATCH])
        pairs = [world.pair(seed, row) for row in chunk]
        images = world.batch(np.stack([pair[0] for pair in pairs]), device)
        with mixed(device.type):
            features = tokenizer.encode(images)
        latents.features[chunk] = features.half().cpu().numpy()
        for row, (_, caption, *_rest) in zip(chunk, pairs, strict=True):
            words = tokenize(caption, world.vocabulary)
            latents.lengths[row] = len(words)
            latents.words[row, : len(words)] = words


@dataclass(frozen=True)
class TeacherForcing:
    """Per scale: `targets` [B, h * w, token_bits] 0/1; `inputs` (scales 1..k) [B, h * w, token_bits]."""

    targets: list[Tensor]
    inputs: list[Tensor]


def teacher_forcing(
    tokenizer: BSQTokenizer, features: Tensor, schedule: Sequence[Grid], *, max_flip: float, generator: torch.Generator
) -> TeacherForcing:
    """Quantises features [B, bits, H, W] scale by scale with self-correction (Infinity, arXiv 2412.04431, section 3.4).

    Each scale of each sample flips a share U(0, max_flip) of its bits; later residuals are computed from the flipped
    codes, so their targets repair the damage, and the inputs are those that inference would compute.
    """
    if tokenizer.config.patchify:
        raise NotImplementedError("teacher forcing needs a tokenizer without patchify, got one with it; set it to False.")
    latent = torch.zeros_like(features)
    targets, inputs = [], []
    for scale, grid in enumerate(schedule):
        if scale:
            inputs.append(tokenizer.next_tokens(latent, grid))
        residual = F.adaptive_avg_pool2d(features - latent, grid[1:])
        bits = residual.permute(0, 2, 3, 1) > 0
        targets.append(bits.flatten(1, 2))
        rate = torch.rand(len(bits), 1, 1, 1, generator=generator, device=bits.device) * max_flip
        flips = torch.rand(bits.shape, generator=generator, device=bits.device) < rate
        codes = tokenizer.codes(bits ^ flips, scale)
        latent = tokenizer.accumulate(latent, codes, scale, len(schedule))
    return TeacherForcing(targets, inputs)


def open_latents(folder: Path, tokenizer: nn.Module, count: int, *, seed: int, team: Team, world: World = IMAGES) -> LatentSet:
    """Scenes 0 .. count - 1 of a seed as seen by this tokenizer; made by the team, or found again if complete."""
    key = hashlib.sha256(f"{world.version} {seed} {count} {weights_hash(tokenizer.encoder)}".encode()).hexdigest()[:16]
    path = folder / key
    done = path / "done"
    if done.exists():
        return LatentSet.open(path)
    if team.leads:
        blank = world.batch(np.zeros((1, *world.shape), np.uint8), next(tokenizer.parameters()).device)
        LatentSet.create(path, count, tuple(tokenizer.encode(blank)[0].shape))
    team.wait()
    latents = LatentSet.open(path)
    encode_scenes(latents, tokenizer, range(team.rank, count, team.size), seed=seed, world=world)
    team.wait()
    if team.leads:
        write_whole(done, "")
    return latents
