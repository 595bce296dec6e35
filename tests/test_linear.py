"""Linear layers of inference say what torch's own say, in every precision and for every layout of their input."""

import pytest
import torch
from torch.nn import functional

from autoprune.backbones.linear import linear, linear_gelu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def operands(dtype: torch.dtype, rows: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, 48), (80, 48), (80,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight / 48**0.5, bias


@pytest.mark.parametrize("rows", [(1,), (2, 1), (2, 33), (3, 2, 7)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_torch(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    x, weight, bias = operands(dtype, rows)
    plain = functional.linear(x.double(), weight.double(), bias.double())
    with torch.inference_mode():
        found, activated = linear(x, weight, bias), linear_gelu(x, weight, bias)
    assert found.dtype is activated.dtype is dtype
    torch.testing.assert_close(found.double(), plain, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(activated.double(), functional.gelu(plain, approximate="tanh"), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_parts_and_transposed_inputs_are_read_as_they_are(dtype: torch.dtype) -> None:
    x, weight, bias = operands(dtype, (4, 9))
    swapped = x.transpose(0, 1)
    with torch.inference_mode():
        assert torch.equal(linear(swapped, weight, bias), linear(swapped.contiguous(), weight, bias))
        assert torch.equal(linear_gelu(x[:, 2:5], weight, bias), linear_gelu(x[:, 2:5].contiguous(), weight, bias))


def test_gradients_flow_and_autocast_is_obeyed() -> None:
    x, weight, bias = operands(torch.float32, (2, 3))
    weight.requires_grad_()
    linear_gelu(x, weight, bias).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype is torch.bfloat16
