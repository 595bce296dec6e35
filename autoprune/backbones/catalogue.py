"""Every backbone by name: its configuration, its files, and how it is loaded."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from autoprune.backbones.allocator import keep_freed_memory
from autoprune.backbones.backbone import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.embedded import embedded_backbone
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.released import (
    BackboneSpec,
    Family,
    ReleasedFiles,
    Target,
    TextOptions,
    random_backbone,
    released_backbone,
)
from autoprune.backbones.schedules import pixel_budget_schedules
from autoprune.backbones.sizes import tokenizer_state, transformer_state
from autoprune.backbones.t5_text import RandomTextEncoder, t5_encoder
from autoprune.errors import UserError, unknown_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INFINITY = Family(
    transformer=Infinity,
    tokenizer=BSQTokenizer,
    transformer_state=lambda config: partial(transformer_state, config=config),
    tokenizer_state=lambda model: partial(tokenizer_state, expected=model.state_dict()),
    text=lambda spec, folder, target, options: t5_encoder(folder, target, options),
    random_text=lambda spec, target: RandomTextEncoder(spec.transformer.text_width, device=target.device),
)
_INFINITY_SOURCE = "FoundationVision/Infinity on Hugging Face"
_T5 = ("flan-t5-xl", "flan-t5-xl-official", "text_encoder")
_LARGE = TransformerConfig(width=3584, heads=28, depth=40, chunks=8, token_bits=56)
_PATCHIFIED = TokenizerConfig(bits=14, channel_multipliers=(1, 2, 4, 4), patchify=True)
_PATCHIFIED_FILE = ("infinity_vae_d56_f8_14_patchify.pth",)

INFINITY_2B = BackboneSpec(
    family=INFINITY,
    transformer=TransformerConfig(width=2048, heads=16, depth=32, chunks=8, token_bits=32),
    tokenizer=TokenizerConfig(bits=32, channel_multipliers=(1, 2, 4, 4, 4)),
    sampling=Sampling(guidance=4.0, temperature=0.5, top_p=0.97),
    schedule_for=pixel_budget_schedules("1M"),
    files=ReleasedFiles(
        transformer=("infinity_2b_reg.pth",),
        tokenizer=("infinity_vae_d32reg.pth", "infinity_vae_d32_reg.pth"),
        source=_INFINITY_SOURCE,
        text=_T5,
    ),
)
INFINITY_8B = BackboneSpec(
    family=INFINITY,
    transformer=_LARGE,
    tokenizer=_PATCHIFIED,
    sampling=Sampling(guidance=3.0, temperature=1.0, top_p=0.97),
    schedule_for=pixel_budget_schedules("1M"),
    files=ReleasedFiles(("infinity_8b_weights",), _PATCHIFIED_FILE, _INFINITY_SOURCE, _T5),
)
INFINITY_8B_512 = BackboneSpec(
    family=INFINITY,
    transformer=_LARGE,
    tokenizer=_PATCHIFIED,
    sampling=Sampling(guidance=3.0, temperature=1.0, top_p=0.97),
    schedule_for=pixel_budget_schedules("0.25M"),
    files=ReleasedFiles(("infinity_8b_512x512_weights",), _PATCHIFIED_FILE, _INFINITY_SOURCE, _T5),
)
RELEASED = {"infinity2b": INFINITY_2B, "infinity8b": INFINITY_8B, "infinity8b_512": INFINITY_8B_512}
BACKBONES = ("tiny", *RELEASED)


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    text: TextOptions | None = None,
) -> Backbone:
    """Loads a backbone for inference.

    `weights` is the folder with the released files, or "random" for the true shapes with seeded random values; of `tiny` a
    safetensors file, None for the one shipped in the package. `dtype` is the precision of the blocks: "auto" takes bfloat16
    where the device computes it natively. `text` says where a text encoder is. On CPUs the process keeps freed memory from
    then on (backbones/allocator.py). Raises UserError for an unknown name or dtype and for files that do not fit.
    """
    if name not in BACKBONES:
        raise unknown_name("backbone", name, BACKBONES)
    place = _device(device)
    target = Target(place, _compute_dtype(dtype, place))
    if place.type == "cpu":
        keep_freed_memory()
    if name == "tiny":
        return embedded_backbone(name, weights, target)
    spec = RELEASED[name]
    if weights == "random":
        return random_backbone(name, spec, target)
    if weights is None:
        wanted = ", ".join((*spec.files.transformer[:1], *spec.files.tokenizer[:1], *spec.files.text[:1]))
        raise UserError(
            f"backbone {name} needs weights=DIR with {wanted} from {spec.files.source}; weights=random gives its shapes."
        )
    return released_backbone(name, spec, Path(weights), target, text or TextOptions())


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
