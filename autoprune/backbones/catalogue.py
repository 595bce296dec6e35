"""Every backbone's configuration in one place, and how its weights are found."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from autoprune.backbones.allocator import keep_freed_memory
from autoprune.backbones.backbone import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import TINY as TINY_TOKENIZER
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.caption_encoder import CaptionEncoder, CaptionEncoderConfig
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.schedules import scale_schedule
from autoprune.errors import UserError, unknown_name

EMBEDDED_WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BackboneSpec:
    """Sizes and sampling defaults of a backbone."""

    transformer: TransformerConfig
    tokenizer: TokenizerConfig
    sampling: Sampling
    pixel_budget: str


TINY = BackboneSpec(
    transformer=TransformerConfig(width=192, heads=3, depth=6, chunks=2, token_bits=16, text_width=128, text_max_length=32),
    tokenizer=TINY_TOKENIZER,
    sampling=Sampling(guidance=2.0, temperature=0.5),
    pixel_budget="0.06M",
)
INFINITY_2B = BackboneSpec(
    transformer=TransformerConfig(width=2048, heads=16, depth=32, chunks=8, token_bits=32),
    tokenizer=TokenizerConfig(bits=32, channel_multipliers=(1, 2, 4, 4, 4)),
    sampling=Sampling(guidance=4.0, temperature=0.5),
    pixel_budget="1M",
)
INFINITY_8B = BackboneSpec(
    transformer=TransformerConfig(width=3584, heads=28, depth=40, chunks=8, token_bits=56),
    tokenizer=TokenizerConfig(bits=14, channel_multipliers=(1, 2, 4, 4), patchify=True),
    sampling=Sampling(guidance=3.0, temperature=1.0),
    pixel_budget="1M",
)
BACKBONES = {"tiny": TINY}


def load_backbone(
    name: str, *, weights: str | Path | None = None, device: str | torch.device | None = None, dtype: str = "auto"
) -> Backbone:
    """Loads a backbone for inference.

    `weights` is a safetensors file, None for the one shipped in the package, or "random" for the true shapes with
    seeded random values. `dtype` is the precision of the blocks: "auto" takes bfloat16 where the device computes it
    natively. On CPUs the process keeps freed memory from then on (backbones/allocator.py). Raises UserError for an
    unknown name or dtype and for a file that does not fit.
    """
    if name not in BACKBONES:
        raise unknown_name("backbone", name, BACKBONES)
    spec = BACKBONES[name]
    device = _device(device)
    compute_dtype = _compute_dtype(dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    parts, revision = _embedded_parts(spec, weights)
    for part in parts.values():
        part.requires_grad_(False).eval().to(device)
    for block in parts["infinity"].layers():
        block.to(compute_dtype)
    for network in (parts["vae"].encoder, parts["vae"].decoder):
        network.to(compute_dtype, memory_format=torch.channels_last)
    return Backbone(
        name=name,
        model=parts["infinity"],
        tokenizer=parts["vae"],
        text_encoder=parts["text"],
        sampling=spec.sampling,
        schedule_for=partial(scale_schedule, pixel_budget=spec.pixel_budget),
        revision=revision,
    )


def build_parts(spec: BackboneSpec) -> dict[str, nn.Module]:
    """Builds the modules of an embedded backbone with fresh weights, by their prefix in its checkpoint file."""
    return {
        "infinity": Infinity(spec.transformer),
        "vae": BSQTokenizer(spec.tokenizer, with_encoder=True),
        "text": CaptionEncoder(CaptionEncoderConfig(width=spec.transformer.text_width)),
    }


def _embedded_parts(spec: BackboneSpec, weights: str | Path | None) -> tuple[dict[str, nn.Module], str]:
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


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"device {str(name)!r} cannot be used here; set device to cpu, or install what it needs.") from None


def _compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        native = device.type == "cuda" or _cpu_has_bfloat16()
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise unknown_name("dtype", name, ("auto", *DTYPES))
    return DTYPES[name]


def _cpu_has_bfloat16() -> bool:
    probe: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())
