"""How latents become images within the memory that is free: whole, a few samples at a time, or one in strips of rows."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from autoprune.backbones.allocation_trace import AllocationTrace, on_meta
from autoprune.backbones.allocator import release_freed_memory
from autoprune.backbones.cnn_autoencoder import Decoder, Network
from autoprune.backbones.family import Tokenizer
from autoprune.backbones.strips import decode_in_strips
from autoprune.errors import UserError, unknown_name

COMPILERS = ("auto", "never")
USABLE = 0.7  # of the free memory: on CUDA, GroupNorm and the convolution after it reorder channels_last maps, 1792 MB for 1280
_MOST_MAPS = 4  # a decode never holds more maps of the finest level than this; what it does hold is traced
_MEMORY = Path("/proc/meminfo")
_LOG = logging.getLogger(__name__)
_NEEDS: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Decoding:
    """The user's choices. `memory_mb`: what one decode may take (0: what is free on the device). `compiler`: auto compiles the
    network on CUDA, where the first decode of every shape then waits for the compiler; never does not."""

    memory_mb: float = 0
    compiler: str = "auto"

    def __post_init__(self) -> None:
        if self.memory_mb < 0:
            raise UserError(f"decode_memory_mb must be at least 0, got {self.memory_mb}; 0 takes what is free.")
        if self.compiler not in COMPILERS:
            raise unknown_name("compiler", self.compiler, COMPILERS)


@dataclass(frozen=True)
class DecodePlan:
    """What one decode does: so many `samples` at a time; in `strips`, where not even one fits whole; `compiled`."""

    samples: int
    strips: bool
    compiled: bool


def decode(tokenizer: Tokenizer, latent: Tensor, options: Decoding) -> Tensor:
    """Latents [B, d, H, W] -> float32 images [B, 3, h, w] in [-1, 1]. Slices, strips and the compiled network give what
    the whole batch does but for rounding: on CPUs GroupNorm sums a map of 32 x 32 or larger in an order that depends on the
    batch (1.5e-6 between slices and the whole in float32)."""
    plan = decode_plan(tokenizer, latent, options)
    run = decode_in_strips if plan.strips else _COMPILED if plan.compiled else nn.Module.__call__
    if plan.samples == len(latent):
        return tokenizer.decode(latent, run)
    return torch.cat([tokenizer.decode(part, run) for part in latent.split(plan.samples)])


def decode_plan(tokenizer: Tokenizer, latent: Tensor, options: Decoding) -> DecodePlan:
    """Returns how this decode would run now. On the meta device everything fits. What streams decodes one video after the
    other; other videos [B, d, T, H, W] are sliced as images are, but never cut into strips or compiled."""
    batch, device, image = len(latent), latent.device, latent.dim() == 4
    if tokenizer.streams:
        return DecodePlan(1, strips=False, compiled=False)
    compiled = image and device.type == "cuda" and options.compiler == "auto"
    free = options.memory_mb * 2**20 or USABLE * free_memory(device)
    if batch * _ceiling(tokenizer, latent) <= free:
        return DecodePlan(batch, strips=False, compiled=compiled)
    need = decode_need(tokenizer, latent.shape[1:])
    if batch * need > free and device.type == "cpu" and not options.memory_mb:
        release_freed_memory()
        free = USABLE * free_memory(device)
    if need > free:
        return DecodePlan(1, strips=image, compiled=False)
    slices = math.ceil(batch / int(free // need))
    return DecodePlan(math.ceil(batch / slices), strips=False, compiled=compiled)


@torch.inference_mode()
def decode_need(tokenizer: Tokenizer, size: tuple[int, ...]) -> int:
    """Returns the bytes that decoding one latent [d, H, W] whole takes, latent and image included: a dry run, once a size."""
    known = _NEEDS.setdefault(tokenizer, {})
    if tuple(size) not in known:
        dry = on_meta(tokenizer)
        with AllocationTrace() as trace:
            dry.decode(torch.empty(1, *size, device="meta"))
        known[tuple(size)] = trace.peak
    return known[tuple(size)]


def free_memory(device: torch.device) -> float:
    """Returns the bytes that new tensors may take; infinite where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return math.inf
    try:
        line = next(line for line in _MEMORY.read_text().splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
    return 1024 * int(line.split()[1])


def _ceiling(tokenizer: Tokenizer, latent: Tensor) -> int:
    """Returns bytes that one sample never exceeds, in microseconds."""
    cells = math.prod(latent.shape[2:]) * 4 ** (len(tokenizer.decoder.up) - 1)
    itemsize = next(tokenizer.decoder.parameters()).element_size()
    return _MOST_MAPS * cells * max(*tokenizer.config.widths[:2], 3 * tokenizer.decoder.pixel_patch**2) * itemsize


class _CompiledNetwork:
    """Decoder.forward compiled at its first call, the module itself as it was. Without a working compiler: as it is."""

    def __init__(self) -> None:
        self._forward: Network | None = None

    def __call__(self, decoder: nn.Module, latent: Tensor) -> Tensor:
        self._forward = self._forward or torch.compile(Decoder.forward, dynamic=False)
        try:
            return self._forward(decoder, latent)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _LOG.warning("the decoder runs uncompiled: %s", str(error).strip().partition("\n")[0])
            self._forward = nn.Module.__call__
            return decoder(latent)


_COMPILED = _CompiledNetwork()
