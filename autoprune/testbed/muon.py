"""Muon: momentum whose update is brought near the closest orthogonal matrix, the optimiser of the block matrices.

Keller Jordan 2024 (https://kellerjordan.github.io/posts/muon/); update size as in Moonlight (arXiv 2502.16982).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoprune.backbones.catalogue import native_bfloat16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic of the reference implementation
UPDATE_RMS = 0.2  # Moonlight section 2.2: the root mean square of an AdamW update


@dataclass(frozen=True)
class MuonMatrix:
    """A parameter [parts * rows, columns] that holds `parts` independent matrices (fused q/k/v: 3)."""

    parameter: nn.Parameter
    parts: int = 1


class Muon(torch.optim.Optimizer):
    """Every process must hold the same reduced gradients; each orthogonalises its share and sends it to the others."""

    def __init__(
        self, matrices: Iterable[MuonMatrix], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        matrices = list(matrices)
        self._parts = [matrix.parts for matrix in matrices]
        super().__init__(
            [matrix.parameter for matrix in matrices],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step on the gradients present; `closure` is refused because nothing here needs one."""
        if closure is not None:
            raise ValueError("Muon takes no closure, got one; compute the gradients before step().")
        group = self.param_groups[0]
        updates = self._shared_updates([self._momentum(p, group["momentum"]) for p in group["params"]])
        for parameter, update in zip(group["params"], updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)

    def _shared_updates(self, directions: list[Tensor]) -> list[Tensor]:
        owners = _owners([direction.numel() for direction in directions], _world_size())
        updates = [torch.empty_like(direction) for direction in directions]
        for index, direction in enumerate(directions):
            if owners[index] == _rank():
                updates[index] = scaled_orthogonal(direction, self._parts[index])
        for rank in range(_world_size() if _world_size() > 1 else 0):
            owned = [updates[index] for index, owner in enumerate(owners) if owner == rank]
            flat = torch.cat([update.flatten() for update in owned])
            dist.broadcast(flat, src=rank)
            for update, part in zip(owned, flat.split([update.numel() for update in owned]), strict=True):
                update.copy_(part.view_as(update))
        return updates


def scaled_orthogonal(direction: Tensor, parts: int = 1) -> Tensor:
    """Direction [parts * rows, columns] -> update of the same shape with root mean square about `UPDATE_RMS`."""
    matrices = direction.unflatten(0, (parts, -1))
    scale = UPDATE_RMS * max(matrices.shape[-2:]) ** 0.5
    return (orthogonalise(matrices) * scale).flatten(0, 1).to(direction.dtype)


def orthogonalise(matrices: Tensor, *, steps: int = 4) -> Tensor:
    """Matrices [N, rows, columns] -> the same with singular values in about [0.7, 1.2] (Newton-Schulz), in bfloat16 where the
    device computes it."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if native_bfloat16(matrices.device) else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.transpose(-1, -2) if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-1, -2) if tall else x


def _owners(sizes: list[int], processes: int) -> list[int]:
    """Share out matrices so that the processes get about equal element counts, largest first."""
    loads, owners = [0] * processes, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
