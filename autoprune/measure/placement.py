"""What fits where: keys and values on the device or in host memory, and random weights on it or nowhere, as shapes alone."""

from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from autoprune.backbones import Backbone, LoadArguments
from autoprune.backbones.catalogue import target_for
from autoprune.backbones.decoding import free_memory
from autoprune.backbones.official import RELEASED
from autoprune.errors import UserError
from autoprune.measure.flops import transformer_shape
from autoprune.measure.memory_plan import key_value_bytes, predicted_peak

USABLE = 0.8  # of the free memory: allocators lose some, and trials of a search share early scales in what is left
WORTH = 0.1  # of the free memory: keys and values that take less are not what does not fit
PROMPT, CLASS_PROMPT = "a red circle left of a striped blue square", "7"
_PLACES: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], str]] = WeakKeyDictionary()


def with_fitting_keys(backbone: Backbone, *, batch: int) -> Backbone:
    """Returns the backbone with `auto` decided: keys and values lie in host memory where a dense generation of so many
    prompts does not fit what is free on the device. Decided once a model, batch and schedule, and where keys and values are
    a small part of what is free without the dry run, which takes seconds."""
    if backbone.keys != "auto":
        return backbone
    known, size = _PLACES.setdefault(backbone.model, {}), (batch, backbone.scale_schedule())
    if size not in known:
        free = free_memory(backbone.device) + (backbone.graphs.key_bytes if backbone.graphs else 0)
        small = _key_bytes(backbone, batch=batch) < WORTH * free
        known[size] = "device" if small or _dense_bytes(backbone, batch=batch) <= USABLE * free else "host"
    return replace(backbone, keys=known[size])


def _key_bytes(backbone: Backbone, *, batch: int) -> int:
    shape = transformer_shape(backbone.model)
    width, rows = shape.key_width or shape.width, 2 * batch
    return key_value_bytes(backbone.plan(None), width=width, rows=rows, itemsize=backbone.dtype.itemsize)


def _dense_bytes(backbone: Backbone, *, batch: int) -> int:
    need = predicted_peak(backbone.plan(None), backbone, [readable_prompt(backbone)] * batch)
    return need.above_loaded(backbone.device)


def loaded_or_planned(arguments: LoadArguments, *, batch: int) -> tuple[Backbone, list[str]]:
    """Returns the backbone, of random weights that do not fit the device its shapes alone, and a sentence that says so."""
    if arguments.device == "meta":
        return arguments.load(), ["times, as device=meta has shapes only"]
    if arguments.weights == "random" and arguments.backbone in RELEASED:
        target = target_for(arguments.device, arguments.dtype)
        shapes = replace(arguments, device="meta", dtype=str(target.dtype).removeprefix("torch.")).load()
        hosts = arguments.keys == "host" or (arguments.keys == "auto" and target.device.type == "cuda")
        placed, prompts = shapes.with_keys("host" if hosts else "device"), [readable_prompt(shapes)] * batch
        memory, free = predicted_peak(placed.plan(None), placed, prompts), USABLE * free_memory(target.device)
        need = memory.weights + memory.above_loaded(target.device)
        if need > free:
            much = f"weights and a dense generation take {need / 2**30:.1f} GB, {free / 2**30:.1f} are free on {target.device}"
            return shapes, [f"times, as {much}"]
    return with_fitting_keys(arguments.load(), batch=batch), []


def readable_prompt(backbone: Backbone, prompt: str = PROMPT) -> str:
    """Returns the prompt, or a class number for a backbone that reads nothing else."""
    try:
        backbone.encode_text([prompt])
    except UserError:
        backbone.encode_text([CLASS_PROMPT])
        return CLASS_PROMPT
    return prompt
