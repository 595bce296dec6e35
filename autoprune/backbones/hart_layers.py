"""HART's llama-like layers and its rotary positions, with the names of the official state dict (arXiv 2410.10812).

Source: official `basic_hart.py`. Its positions are literal: the second half of a head's dimensions holds the x angles and
the first half the y angles, yet the rotation pairs dimension m with m + D / 2, so pairs mix both axes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.backbones.layers import SCALE_LIMIT
from autoprune.backbones.linear import linear
from autoprune.policy import Grid

BASE = 10000.0


def context_angles(positions: Tensor, head_width: int) -> Tensor:
    """Positions [R, L] of text tokens -> angles [R, L, D], theta_k = 10000^(-2k / D), listed twice."""
    angles = positions.float()[..., None] * _frequencies(head_width, 2, positions.device)
    return torch.cat((angles, angles), dim=-1)


def grid_angles(grid: Grid, largest: Grid, offset: Tensor, head_width: int) -> Tensor:
    """Angles [R, h * w, D] of a grid stretched over the largest one, all positions shifted by `offset` [R]."""
    device = offset.device
    y = torch.arange(grid[1], dtype=torch.float32, device=device) / grid[1] * largest[1] + offset[:, None]
    x = torch.arange(grid[2], dtype=torch.float32, device=device) / grid[2] * largest[2] + offset[:, None]
    frequencies = _frequencies(head_width, 4, device)
    y_angles = (y[..., None] * frequencies)[:, :, None].expand(-1, -1, grid[2], -1)
    x_angles = (x[..., None] * frequencies)[:, None].expand(-1, grid[1], -1, -1)
    return torch.cat((y_angles, y_angles, x_angles, x_angles), dim=-1).flatten(1, 2)


def rotary_factors(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Angles [R, N, D] -> factors [2, R, 1, N, D] for `rotate_halves`: cosines, and sines signed by half."""
    half = angles.shape[-1] // 2
    sines = angles.sin()
    signed = torch.cat((-sines[..., :half], sines[..., half:]), dim=-1)
    return torch.stack((angles.cos(), signed))[:, :, None].to(dtype)


def rotate_halves(x: Tensor, factors: Tensor) -> Tensor:
    """Rotates dimension m with m + D / 2, each by its own angle. x [..., R, H, L, D]; factors [2, R, 1, L, D]."""
    return torch.addcmul(x * factors[0], x.roll(x.shape[-1] // 2, dims=-1), factors[1])


def _frequencies(head_width: int, stride: int, device: torch.device) -> Tensor:
    return 1.0 / BASE ** (torch.arange(0, head_width, stride, device=device).float() / head_width)


class LlamaAttention(nn.Module):
    """Self-attention with rotary positions; with `normed` queries and keys have length 1 and every head its own scale."""

    def __init__(self, width: int, heads: int, *, normed: bool) -> None:
        super().__init__()
        self.heads, self.normed = heads, normed
        if normed:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
        self.scale = 0.25 * (width // heads) ** -0.5  # official; 0.25 is no misprint
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """x [R, L, C]; `rotation` [2, R, 1, L, D]; `attention` gets q, k, v [R, H, L, D] and adds the earlier keys."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = linear(x, self.qkv_proj, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.normed:
            q, k = rotate_halves(functional.normalize(qkv[:2], dim=-1, eps=1e-12), rotation)
            q = q * self.scale_mul_1H11.clamp_max(SCALE_LIMIT).exp()
        else:
            q, k = rotate_halves(qkv[:2], rotation)
            q = q * self.scale
        return linear(attention(q, k, qkv[2]).transpose(1, 2).flatten(2), self.proj)


class LlamaFeedForward(nn.Module):
    """The gated feed-forward part: down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[R, L, C] -> [R, L, C]."""
        return linear(functional.silu(linear(x, self.gate_proj)) * linear(x, self.up_proj), self.down_proj)
