"""Every attention backend against a plain float64 loop."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autoprune.backbones import attention
from autoprune.backbones.kv_buffer import KeyValueBuffer


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 64), (2, 3, 9, 64), (2, 3, 9, 64))
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = torch.zeros_like(q, dtype=torch.float64)
    for row in range(2):
        for head in range(3):
            for i in range(5):
                scores = torch.stack([q[row, head, i].double() @ k[row, head, j].double() * 0.125 for j in range(9)])
                if mask is not None:
                    scores = scores + mask[row, 0, 0].double()
                out[row, head, i] = scores.softmax(0) @ v[row, head].double()
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("function", [attention.attend, attention.explicit_attention, attention.sdpa_attention])
def test_every_form_agrees_with_a_plain_loop(function: Callable[..., Tensor], masked: bool) -> None:
    q, k, v = inputs()
    mask = torch.zeros(2, 1, 1, 9).index_fill(-1, torch.tensor([7, 8]), float("-inf")) if masked else None
    ours = function(q, k, v, scale=0.125, mask=mask)
    torch.testing.assert_close(ours.double(), naive(q, k, v, mask), rtol=0, atol=1e-5)


def test_cpu_never_asks_for_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_flash_function", lambda: attention.sdpa_attention)
    q, _, _ = inputs(dtype=torch.bfloat16)
    assert attention.attention_backend(q, None) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_backend_agrees_with_a_plain_loop() -> None:
    q, k, v = inputs("cuda", torch.bfloat16)
    ours = attention.attend(q, k, v, scale=0.125)
    torch.testing.assert_close(ours.double().cpu(), naive(q.cpu(), k.cpu(), v.cpu(), None), rtol=0, atol=2e-2)


def test_buffer_returns_everything_appended_so_far() -> None:
    buffer = KeyValueBuffer((2, 3, 9, 64), dtype=torch.float32, device=torch.device("cpu"))
    _, k, v = inputs()
    buffer.append(k[:, :, :4], v[:, :, :4])
    keys, values = buffer.append(k[:, :, 4:], v[:, :, 4:])
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    buffer.keep_rows(slice(1, None))
    assert torch.equal(buffer.keys, k[1:])
