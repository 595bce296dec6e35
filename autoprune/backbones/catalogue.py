"""Every backbone by name, and how it is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from autoprune.backbones.allocator import keep_freed_memory
from autoprune.backbones.backbone import Backbone
from autoprune.backbones.decoding import Decoding
from autoprune.backbones.embedded import EMBEDDED, embedded_backbone
from autoprune.backbones.forks import check_process
from autoprune.backbones.linear import pack_linears
from autoprune.backbones.official import RELEASED
from autoprune.backbones.released import Target, TextOptions, random_backbone, released_backbone
from autoprune.errors import UserError, unknown_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BACKBONES = (*EMBEDDED, *RELEASED)


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    text: TextOptions | str | None = None,
    graphs: str = "auto",
    keys: str = "auto",
) -> Backbone:
    """Loads a backbone for inference.

    `weights` is the folder with the released files, or "random" for the true shapes with seeded random values; of the embedded
    ones a safetensors file, None for the one shipped in the package. `dtype` is the precision of the blocks: "auto" takes
    bfloat16 where the device computes it natively. `text` says where a text encoder is: its folder, or more options. `graphs`:
    "auto" uses CUDA graphs on a CUDA device (graphs.py), "none" never. `keys`: keys and values lie on the "device", in "host"
    memory, or there where they do not fit a CUDA device ("auto"). On CPUs the process keeps freed memory from then on
    (allocator.py), and a small model its weights twice (linear.py).
    Raises UserError for an unknown name or dtype and for files that do not fit.
    """
    if name not in BACKBONES:
        raise unknown_name("backbone", name, BACKBONES)
    check_process()
    target = target_for(device, dtype)
    if target.device.type == "cpu":
        keep_freed_memory()
    options = text if isinstance(text, TextOptions) else TextOptions(folder=text or None)
    backbone = _built(name, weights, target, options).with_graphs(graphs).with_keys(keys)
    pack_linears(backbone.model)
    return backbone


def target_for(device: str | torch.device | None, dtype: str) -> Target:
    """Returns the device and the precision that these arguments of `load_backbone` mean here. Raises UserError."""
    place = _device(device)
    return Target(place, _compute_dtype(dtype, place))


def native_bfloat16(device: torch.device) -> bool:
    """Returns whether a device computes in bfloat16 by itself."""
    probe: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cuda" or bool(probe and probe())


@dataclass(frozen=True)
class LoadArguments:
    """What every command takes to load a backbone; `text` is the folder of a text encoder, `graphs` auto or none, `keys` auto,
    device or host, `decode_memory_mb` and `compiler` are those of backbones/decoding.py."""

    backbone: str = "tiny"
    weights: str | None = None
    text: str = ""
    dtype: str = "auto"
    device: str | None = None
    graphs: str = "auto"
    keys: str = "auto"
    decode_memory_mb: int = 0
    compiler: str = "auto"

    def load(self) -> Backbone:
        """Returns the loaded backbone. Raises UserError."""
        decoding = Decoding(self.decode_memory_mb, self.compiler)
        options = {"device": self.device, "dtype": self.dtype, "text": self.text, "graphs": self.graphs, "keys": self.keys}
        return replace(load_backbone(self.backbone, weights=self.weights, **options), decoding=decoding)


def _built(name: str, weights: str | Path | None, target: Target, text: TextOptions) -> Backbone:
    if name in EMBEDDED:
        return embedded_backbone(name, weights, target)
    spec = RELEASED[name]
    if weights == "random":
        return random_backbone(name, spec, target)
    if weights is None:
        wanted = ", ".join((*spec.files.transformer[:1], *spec.files.tokenizer[:1], *spec.files.text[:1]))
        raise UserError(
            f"backbone {name} needs weights=DIR with {wanted} from {spec.files.source}; weights=random gives its shapes."
        )
    return released_backbone(name, spec, Path(weights), target, text)


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"device {str(name)!r} cannot be used here; set device to cpu, or install what it needs.") from None


def _compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise unknown_name("dtype", name, ("auto", *DTYPES))
    return DTYPES[name]
