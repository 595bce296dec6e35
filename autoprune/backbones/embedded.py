"""The embedded backbones: Infinity and InfinityStar in small, with text encoders of their own, weights in the package."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoprune.backbones import tiny_video
from autoprune.backbones.backbone import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import TINY as TINY_TOKENIZER
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.caption_encoder import MOTION_VOCABULARY, VOCABULARY, CaptionEncoder, CaptionEncoderConfig
from autoprune.backbones.clip_tokenizer import ClipTokenizer, ClipTokenizerConfig
from autoprune.backbones.family import Schedule
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.infinitystar import InfinityStar, StarConfig
from autoprune.backbones.released import Target
from autoprune.backbones.schedules import pixel_budget_schedules
from autoprune.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class EmbeddedSpec:
    """Sizes and sampling defaults of an embedded backbone; one with a pixel budget makes images, the other one videos."""

    transformer: TransformerConfig | StarConfig
    tokenizer: TokenizerConfig | ClipTokenizerConfig
    sampling: Sampling
    pixel_budget: str | None = None
    vocabulary: tuple[str, ...] = VOCABULARY

    @property
    def schedule_for(self) -> Callable[..., Schedule]:
        """The function from an aspect ratio (and a number of frames) to a schedule."""
        return pixel_budget_schedules(self.pixel_budget) if self.pixel_budget else tiny_video.clip_schedule


TINY = EmbeddedSpec(
    transformer=TransformerConfig(width=192, heads=3, depth=6, chunks=2, token_bits=16, text_width=128, text_max_length=32),
    tokenizer=TINY_TOKENIZER,
    sampling=Sampling(guidance=2.0, temperature=0.5),
    pixel_budget="0.06M",
)
TINY_VIDEO = EmbeddedSpec(
    transformer=tiny_video.TRANSFORMER,
    tokenizer=tiny_video.TOKENIZER,
    sampling=Sampling(guidance=2.0, temperature=0.5, frames=tiny_video.FRAMES),
    vocabulary=MOTION_VOCABULARY,
)
EMBEDDED = {"tiny": TINY, "tiny_video": TINY_VIDEO}


def embedded_backbone(name: str, weights: str | Path | None, target: Target) -> Backbone:
    """Loads an embedded backbone: `weights` is a file of its recipe, None for the shipped one, "random" for fresh values.

    Raises UserError for a file that does not fit.
    """
    spec, shipped = EMBEDDED[name], WEIGHTS / f"{name}.safetensors"
    with torch.device("cpu"):  # whatever the host program's defaults are
        parts, revision = embedded_parts(spec, weights or shipped)
    for part in parts.values():
        part.requires_grad_(False).eval().float().to(target.device)
    transformer, tokenizer, text = parts.values()
    for block in transformer.layers():
        block.to(target.dtype)
    for network in (tokenizer.encoder, tokenizer.decoder):
        network.to(target.dtype, memory_format=torch.channels_last)
    return Backbone(name, transformer, tokenizer, text, spec.sampling, spec.schedule_for, revision)


def build_parts(spec: EmbeddedSpec) -> dict[str, nn.Module]:
    """Builds transformer, tokenizer and text encoder with fresh weights, by their prefix in the checkpoint file."""
    text = CaptionEncoder(CaptionEncoderConfig(width=spec.transformer.text_width, vocabulary=spec.vocabulary))
    if spec.pixel_budget:
        return {"infinity": Infinity(spec.transformer), "vae": BSQTokenizer(spec.tokenizer), "text": text}
    return {"star": InfinityStar(spec.transformer), "vae": ClipTokenizer(spec.tokenizer), "text": text}


def embedded_parts(spec: EmbeddedSpec, weights: str | Path) -> tuple[dict[str, nn.Module], str]:
    """Returns build_parts with the values of a file, and its hash; "random" gives fresh values and "". Raises UserError for a
    file that does not fit."""
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_parts(spec), ""
    path = Path(weights)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"weights {str(path)!r} cannot be read ({error.__class__.__name__}); check the path.") from None
    parts = build_parts(spec)
    _load_prefixed(parts, content, path)
    return parts, hashlib.sha256(content).hexdigest()


def _load_prefixed(parts: dict[str, nn.Module], content: bytes, path: Path) -> None:
    from safetensors.torch import load

    try:
        tensors = load(content)
    except Exception as error:
        raise UserError(f"weights {str(path)!r} are not a safetensors file ({error}); copy the file again.") from None
    for prefix, part in parts.items():
        start = prefix + "."
        state = {key.removeprefix(start): value.float() for key, value in tensors.items() if key.startswith(start)}
        expected = part.state_dict()
        wrong = [key for key in {**expected, **state} if _shape(expected, key) != _shape(state, key)]
        if wrong:
            first = f"{len(wrong)} tensors differ, first {start}{wrong[0]}"
            raise UserError(f"weights {str(path)!r} do not fit: {first}; check the file.")
        part.load_state_dict(state)


def _shape(state: dict[str, torch.Tensor], key: str) -> torch.Size | None:
    return state[key].shape if key in state else None
