"""The transformer parts of Infinity (arXiv 2412.04431), with the names of the official state dict; VAR shares some."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.backbones.attention import attend
from autoprune.backbones.linear import linear, linear_gelu
from autoprune.backbones.rope import rotate

SCALE_LIMIT = 4.605170185988092  # ln 100, the official bound of the learned q/k scale


def modulate(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Returns LN(x) * gain + shift, LN without weights. x [R, L, C]; gain, shift [R, 1, C]."""
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:], eps=1e-6), gain)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Returns a context in which float32 stays float32; the meta device, where sizes are computed, knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class SelfAttention(nn.Module):
    """Attention with L2-normalised queries and keys and one learned scale per head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor | None, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """x [R, L, C]; `rotation` [2, (R, 1,) L, D] or None; `attention` gets q, k, v [R, H, L, D], adds the earlier keys."""
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = linear(x, self.mat_qkv, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        normalised = functional.normalize(qkv[:2], dim=-1, eps=1e-12)
        q, k = normalised if rotation is None else rotate(normalised, rotation)
        q = q * self.scale_mul_1H11.clamp_max(SCALE_LIMIT).exp()
        return linear(attention(q, k, qkv[2]).transpose(1, 2).flatten(2), self.proj)


class CrossAttention(nn.Module):
    """Attention to the text, without positions or q/k normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def text_keys_values(self, text: Tensor) -> Tensor:
        """Projects the text once per generation: [R, T, C] -> [2, R, H, T, D]."""
        bias = torch.cat((self.zero_k_bias, self.v_bias))
        return linear(text, self.mat_kv, bias).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """x [R, L, C]; `text` from text_keys_values; `mask` hides padding, [R, 1, 1, T] or None."""
        q = linear(x, self.mat_q).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = attend(q, text[0], text[1], scale=q.shape[-1] ** -0.5, mask=mask)
        return linear(out.transpose(1, 2).flatten(2), self.proj)


class FeedForward(nn.Module):
    """Two linear layers around GELU (tanh form)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[R, L, C] -> [R, L, C]."""
        return linear(linear_gelu(x, self.fc1), self.fc2)


class TextPool(nn.Module):
    """One learned query over the prompt's own rows; its output starts the first scale and conditions every norm."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.ca = nn.Module()
        self.heads = max(1, text_width // 128)
        self.ca.mat_q = nn.Parameter(torch.randn(1, self.heads, width // self.heads) * text_width**-0.5 / 3)
        self.ca.v_bias = nn.Parameter(torch.zeros(width))
        self.ca.register_buffer("zero_k_bias", torch.zeros(width))
        self.ca.mat_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.ca.proj = nn.Linear(width, width)

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """text [R, T, text width] -> [R, C]."""
        bias = torch.cat((self.ca.zero_k_bias, self.ca.v_bias))
        kv = functional.linear(text, self.ca.mat_kv.weight, bias).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.ca.mat_q[:, :, None].expand(len(text), -1, -1, -1)
        return self.ca.proj(attend(q, kv[0], kv[1], scale=q.shape[-1] ** -0.5, mask=mask).flatten(1))


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 with a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C] float32."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight
