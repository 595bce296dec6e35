"""Infinity as its authors' code generates (arXiv 2412.04431), in plain PyTorch: what the runtime must equal and outrun.

It takes nothing from the runtime but a model's weights, and does what the official loop does: keys and values concatenated
anew at every scale, the text's keys and values recomputed at every scale and layer, all rows doubled under guidance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

Grid = tuple[int, int, int]
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ReferenceRequest:
    """`text` [B, T, width], prompts of one length; guidance weight and temperature of every scale of `schedule`.

    `frame` is the grid in which positions count: the last one of the 1M template. `draw(logits [B, N, d, 2], scale)`
    returns bits [B, N, d]; a token has d bits, as the tokenizer has channels (no patchified tokens).
    """

    text: Tensor
    schedule: tuple[Grid, ...]
    frame: Grid
    guidance: tuple[float, ...]
    temperature: tuple[float, ...]
    draw: Callable[[Tensor, int], Tensor]


@dataclass
class ReferenceRun:
    """`latent` [B, d, H, W] to decode, and of every scale the guided logits [B, N, d, 2] and the bits [B, N, d]."""

    latent: Tensor
    logits: list[Tensor] = field(default_factory=list)
    bits: list[Tensor] = field(default_factory=list)


@torch.inference_mode()
def reference_run(model: nn.Module, blocks: Sequence[nn.Module], request: ReferenceRequest) -> ReferenceRun:
    """Generates with the weights of an Infinity `model` and its `blocks` in order.

    Blocks in a lower precision run as the official ones do: everything else in float32, the whole under autocast.
    """
    dtype = blocks[0].ada_gss.dtype
    with torch.autocast(request.text.device.type, dtype=dtype, enabled=dtype is not torch.float32):
        return _generate(model, blocks, request)


def _generate(model: nn.Module, blocks: Sequence[nn.Module], request: ReferenceRequest) -> ReferenceRun:
    schedule, batch = request.schedule, len(request.text)
    text = _both_branches(model, request.text) if any(weight != 1 for weight in request.guidance) else request.text
    text = text * torch.rsqrt(text.square().mean(dim=-1, keepdim=True) + 1e-6) * model.text_norm.weight
    pooled, words = _pooled(model.text_proj_for_sos.ca, text), model.text_proj_for_ca(text)
    condition = _Condition(words, model.shared_ada_lin(pooled).float().view(len(text), 1, 6, -1))
    x = pooled[:, None] + model.pos_start
    caches: list[KeysValues | None] = [None] * len(blocks)
    channels = model.word_embed.in_features
    run = ReferenceRun(torch.zeros(batch, channels, *schedule[-1][1:], device=text.device))
    for scale, grid in enumerate(schedule):
        x = x + model.lvl_embed.weight[scale]
        turns = _turns(grid, request.frame, model.config.width // model.config.heads, text.device)
        for layer, block in enumerate(blocks):
            x, caches[layer] = _block(block, x, condition, turns, caches[layer])
        logits = _guided(model, x, pooled, request, scale)
        bits = request.draw(logits, scale)
        codes = (2 * bits.float() - 1) / math.sqrt(channels)
        codes = codes.transpose(1, 2).reshape(batch, channels, *grid[1:])
        run.logits.append(logits)
        run.bits.append(bits)
        run.latent = run.latent + _resized(codes, schedule[-1][1:])
        if scale + 1 < len(schedule):
            tokens = _resized(run.latent, schedule[scale + 1][1:]).flatten(2).transpose(1, 2)
            x = model.word_embed(tokens).repeat(len(text) // batch, 1, 1)
    return run


def _both_branches(model: nn.Module, text: Tensor) -> Tensor:
    return torch.cat((text, model.cfg_uncond[: text.shape[1]].expand_as(text)))


def _pooled(pool: nn.Module, text: Tensor) -> Tensor:
    """One learned query attends to the text, [R, T, width] -> [R, C]."""
    heads = pool.mat_q.shape[1]
    keys = functional.linear(text, pool.mat_kv.weight).unflatten(-1, (2, heads, -1))
    k, v = keys[:, :, 0], keys[:, :, 1] + pool.v_bias.view(heads, -1)
    scores = torch.einsum("hd,rthd->rht", pool.mat_q[0], k) / math.sqrt(k.shape[-1])
    return pool.proj(torch.einsum("rht,rthd->rhd", scores.softmax(dim=-1), v).flatten(1)).float()


@dataclass(frozen=True)
class _Condition:
    """`words` [R, T, C] for cross-attention and the part [R, 1, 6, C] of every block's modulation that they share."""

    words: Tensor
    shared: Tensor


def _block(
    block: nn.Module, x: Tensor, condition: _Condition, turns: KeysValues, cache: KeysValues | None
) -> tuple[Tensor, KeysValues]:
    gate1, gate2, gain1, gain2, shift1, shift2 = (block.ada_gss.float() + condition.shared).unbind(2)
    attended, cache = _self_attention(block.sa, _norm(x) * (1 + gain1) + shift1, turns, cache)
    x = x + attended * gate1
    x = x + _cross_attention(block.ca, _norm(x) * block.ca_norm.weight.float() + block.ca_norm.bias.float(), condition.words)
    hidden = functional.gelu(block.ffn.fc1(_norm(x) * (1 + gain2) + shift2), approximate="tanh")
    return x + block.ffn.fc2(hidden) * gate2, cache


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x.float(), x.shape[-1:], eps=1e-6)


def _self_attention(part: nn.Module, x: Tensor, turns: KeysValues, cache: KeysValues | None) -> tuple[Tensor, KeysValues]:
    bias = torch.cat((part.q_bias, torch.zeros_like(part.q_bias), part.v_bias))
    qkv = functional.linear(x, part.mat_qkv.weight, bias).unflatten(-1, (3, part.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q = functional.normalize(q, dim=-1) * part.scale_mul_1H11.clamp_max(math.log(100)).exp()
    q, k = _turned(q, turns), _turned(functional.normalize(k, dim=-1), turns)
    if cache is not None:
        k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
    out = functional.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, scale=1.0)
    return part.proj(out.transpose(1, 2).flatten(2)), (k, v)


def _cross_attention(part: nn.Module, x: Tensor, words: Tensor) -> Tensor:
    q = part.mat_q(x).unflatten(-1, (part.heads, -1)).transpose(1, 2)
    bias = torch.cat((torch.zeros_like(part.v_bias), part.v_bias))
    k, v = functional.linear(words, part.mat_kv.weight, bias).unflatten(-1, (2, part.heads, -1)).permute(2, 0, 3, 1, 4)
    return part.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _turns(grid: Grid, frame: Grid, head_width: int, device: torch.device) -> KeysValues:
    """Cosines and sines [N, D / 2] of a grid: the first half of a token's angles counts rows, the second columns."""
    half = head_width // 2
    speeds = 10000.0 ** (-torch.arange(0, half, 2, device=device) / half)
    rows = torch.round(torch.arange(grid[1], device=device) * (frame[1] / grid[1])).repeat_interleave(grid[2])
    columns = torch.round(torch.arange(grid[2], device=device) * (frame[2] / grid[2])).repeat(grid[1])
    angles = torch.cat((rows[:, None] * speeds, columns[:, None] * speeds), dim=1)
    return angles.cos(), angles.sin()


def _turned(x: Tensor, turns: KeysValues) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cosine, sine = turns
    return torch.stack((cosine * even - sine * odd, sine * even + cosine * odd), dim=-1).flatten(-2)


def _guided(model: nn.Module, x: Tensor, pooled: Tensor, request: ReferenceRequest, scale: int) -> Tensor:
    """Float32 logits [B, N, d, 2] of the conditional rows, guided away from the others unless the weight is 1."""
    batch, weight, temperature = len(request.text), request.guidance[scale], request.temperature[scale]
    rows = slice(None) if weight != 1 else slice(0, batch)
    with torch.autocast(x.device.type, enabled=False):
        gain, shift = model.head_nm.ada_lin(pooled[rows])[:, None].chunk(2, dim=-1)
        logits = model.head(_norm(x[rows]) * (1 + gain) + shift).unflatten(-1, (-1, 2)) / temperature
    return logits if weight == 1 else weight * logits[:batch] + (1 - weight) * logits[batch:]


def _resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
