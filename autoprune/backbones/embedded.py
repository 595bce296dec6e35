"""The embedded backbone: Infinity in small with its own text encoder, its weights in the package."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autoprune.backbones.backbone import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import TINY as TINY_TOKENIZER
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.caption_encoder import CaptionEncoder, CaptionEncoderConfig
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.released import Target
from autoprune.backbones.schedules import pixel_budget_schedules
from autoprune.errors import UserError

EMBEDDED_WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"


@dataclass(frozen=True)
class EmbeddedSpec:
    """Sizes and sampling defaults of the embedded backbone."""

    transformer: TransformerConfig
    tokenizer: TokenizerConfig
    sampling: Sampling
    pixel_budget: str


TINY = EmbeddedSpec(
    transformer=TransformerConfig(width=192, heads=3, depth=6, chunks=2, token_bits=16, text_width=128, text_max_length=32),
    tokenizer=TINY_TOKENIZER,
    sampling=Sampling(guidance=2.0, temperature=0.5),
    pixel_budget="0.06M",
)


def embedded_backbone(name: str, weights: str | Path | None, target: Target) -> Backbone:
    """Loads the embedded backbone: `weights` is a file of its recipe, None for the shipped one, "random" for fresh values.

    Raises UserError for a file that does not fit.
    """
    with torch.device("cpu"):  # whatever the host program's defaults are
        parts, revision = _embedded_parts(TINY, weights)
    for part in parts.values():
        part.requires_grad_(False).eval().float().to(target.device)
    for block in parts["infinity"].layers():
        block.to(target.dtype)
    for network in (parts["vae"].encoder, parts["vae"].decoder):
        network.to(target.dtype, memory_format=torch.channels_last)
    schedule_for = pixel_budget_schedules(TINY.pixel_budget)
    return Backbone(name, parts["infinity"], parts["vae"], parts["text"], TINY.sampling, schedule_for, revision)


def build_parts(spec: EmbeddedSpec) -> dict[str, nn.Module]:
    """Builds the modules of an embedded backbone with fresh weights, by their prefix in its checkpoint file."""
    return {
        "infinity": Infinity(spec.transformer),
        "vae": BSQTokenizer(spec.tokenizer, with_encoder=True),
        "text": CaptionEncoder(CaptionEncoderConfig(width=spec.transformer.text_width)),
    }


def _embedded_parts(spec: EmbeddedSpec, weights: str | Path | None) -> tuple[dict[str, nn.Module], str]:
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_parts(spec), ""
    path = Path(weights or EMBEDDED_WEIGHTS)
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
