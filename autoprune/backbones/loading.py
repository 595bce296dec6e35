"""Puts released weights into a model that was built without any, tensor by tensor, and refuses what does not fit.

The official loaders ignore missing and unexpected keys and silently keep random weights; here every key must match.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.backbones.checkpoints import UNKNOWN, WeightFiles, looks_like
from autoprune.errors import UserError

SHOWN = 3  # keys that an error lists
Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Placement:
    """Where tensors go: `device`, and the precision of each by its key.

    `stays_mapped`: tensors that fit as they are remain parts of the mapped file. Else they are copied too: a single one left
    would keep its whole file in memory.
    """

    device: torch.device
    dtype_of: Callable[[str], torch.dtype]
    stays_mapped: bool = False

    def place(self, key: str, value: Tensor) -> Tensor:
        """Returns a tensor at its place."""
        dtype = self.dtype_of(key) if value.is_floating_point() else value.dtype
        return value.to(device=self.device, dtype=dtype, copy=not self.stays_mapped)


def load_weights(model: nn.Module, files: WeightFiles, placement: Placement, *, what: str, convert: Convert) -> None:
    """Fills `model`, whose tensors are on the meta device, from released files.

    `convert` renames and drops keys of one shard; `what` names the model in errors. Raises UserError listing the first keys
    that are missing, unexpected or of another shape, and what the file looks like.
    """
    expected = model.state_dict()
    seen: dict[str, None] = {}
    for state in files.states():
        if not seen:
            _check_kind(state, expected, files, what)
        converted = convert(dict(state))
        del state
        _check(expected, converted, files, what)
        for key in list(converted):
            _assign(model, key, placement.place(key, converted.pop(key)))
            seen[key] = None
    missing = [key for key in expected if key not in seen and not _is_alias(model, key, seen)]
    if missing:
        raise UserError(f"{_start(files, what)}: {_listed(missing, 'missing')}; give the complete file.")


def share_weights(model: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Makes a model on the meta device use the very tensors of a state dict, without a copy. Raises UserError as above."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    other = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or unexpected or other:
        listed = [
            _listed(keys, kind) for keys, kind in ((missing, "missing"), (unexpected, "unexpected"), (other, "of other shapes"))
        ]
        raise UserError(f"this is not {what}: {', '.join(filter(None, listed))}; it looks like {looks_like(state)}.")
    for key in expected:
        _assign(model, key, state[key].detach())


def fill_at_random(model: nn.Module, placement: Placement) -> None:
    """Gives a model on the meta device random values of sane size in place: true shapes and speed without any file."""
    generator = None if placement.device.type == "meta" else torch.Generator(placement.device).manual_seed(0)
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            _assign(model, key, torch.zeros_like(tensor, device=placement.device))
            continue
        value = torch.empty(tensor.shape, dtype=placement.dtype_of(key), device=placement.device)
        if key.endswith("scale_mul_1H11"):
            value.fill_(4.0).log_()
        elif key.endswith(("gamma", "scale_learnable_parameters")):
            value.fill_(1.0)
        elif tensor.dim() > 1:
            value.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        else:
            value.fill_(float(key.endswith("weight")))
        _assign(model, key, value)


def _assign(model: nn.Module, key: str, value: Tensor) -> None:
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value


def _check_kind(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], files: WeightFiles, what: str) -> None:
    kind = looks_like(state)
    if kind not in (looks_like(expected), UNKNOWN):
        raise UserError(f"{_start(files, what)}: it looks like {kind}, keys such as {next(iter(state))}; give another file.")


def _check(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], files: WeightFiles, what: str) -> None:
    unexpected = [key for key in state if key not in expected]
    other = [key for key in state if key in expected and state[key].shape != expected[key].shape]
    if unexpected:
        raise UserError(f"{_start(files, what)}: {_listed(unexpected, 'unexpected')}; give the file of this size.")
    if other:
        shapes = f"{tuple(state[other[0]].shape)} where {tuple(expected[other[0]].shape)} is wanted"
        raise UserError(f"{_start(files, what)}: {_listed(other, 'of other shapes')}, {shapes}; give the file of this size.")


def _is_alias(model: nn.Module, key: str, seen: Mapping[str, None]) -> bool:
    """Returns whether a key is a second name of a module whose tensors came under its first one."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    return any(other.rpartition(".")[2] == name and model.get_submodule(other.rpartition(".")[0]) is module for other in seen)


def _start(files: WeightFiles, what: str) -> str:
    return f"weights {str(files.path)!r} do not fit {what}"


def _listed(keys: list[str], kind: str) -> str:
    return f"{len(keys)} keys are {kind}, first {', '.join(keys[:SHOWN])}"
