"""Linear layers of inference say what torch's own say, in every precision, for every layout of their input, packed or not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autoprune.backbones import linear as module
from autoprune.backbones.linear import linear, linear_gelu, pack_linears

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def operands(dtype: torch.dtype, rows: tuple[int, ...], *, packed: bool = False) -> tuple[Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((*rows, 48), (80, 48), (80,)))
    layer = nn.Linear(48, 80).to(dtype)
    layer.load_state_dict({"weight": weight / 48**0.5, "bias": bias})
    if packed:
        pack_linears(layer)
    return x, layer


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [(1,), (2, 1), (2, 33), (3, 2, 7)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_torch(dtype: torch.dtype, rows: tuple[int, ...], packed: bool) -> None:
    x, layer = operands(dtype, rows, packed=packed)
    other = torch.linspace(-1, 1, 80).to(dtype)
    plain = functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.inference_mode():
        found, activated, moved = linear(x, layer), linear_gelu(x, layer), linear(x, layer, other)
    assert found.dtype is activated.dtype is dtype
    torch.testing.assert_close(found.double(), plain, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(activated.double(), functional.gelu(plain, approximate="tanh"), rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(moved.double(), plain - layer.bias.double() + other.double(), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_parts_and_transposed_inputs_are_read_as_they_are(dtype: torch.dtype, packed: bool) -> None:
    x, layer = operands(dtype, (4, 9), packed=packed)
    swapped = x.transpose(0, 1)
    close = {"rtol": 0, "atol": TOLERANCE[dtype]}  # which kernel takes which strides depends on the processor
    with torch.inference_mode():
        torch.testing.assert_close(linear(swapped, layer), linear(swapped.contiguous(), layer), **close)
        torch.testing.assert_close(linear_gelu(x[:, 2:5], layer), linear_gelu(x[:, 2:5].contiguous(), layer), **close)


def test_gradients_flow_and_autocast_is_obeyed() -> None:
    x, layer = operands(torch.float32, (2, 3))
    linear_gelu(x, layer).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x, layer).dtype is torch.bfloat16


def changed_in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


CHANGES = {
    "in place": changed_in_place,
    "loaded": lambda layer: layer.load_state_dict({key: value * 2 for key, value in layer.state_dict().items()}),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 2)),
    "moved": lambda layer: layer.to(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_are_not_used_once_the_layer_has_others(change: str) -> None:
    x, layer = operands(torch.bfloat16, (2, 3), packed=True)
    CHANGES[change](layer)
    x = x.to(layer.weight.dtype)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, layer), functional.linear(x, layer.weight, layer.bias), rtol=0.02, atol=0.05)


def test_models_above_the_limit_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(module._PACKED)
    monkeypatch.setattr(module, "PACKED_BYTES", 80 * 48 * 2 - 1)
    kept = operands(torch.bfloat16, (2, 3), packed=True)
    assert len(module._PACKED) == before
    monkeypatch.setattr(module, "PACKED_BYTES", 80 * 48 * 2)
    kept = operands(torch.bfloat16, (2, 3), packed=True)
    assert len(module._PACKED) == before + module._runs_here(torch.bfloat16)
    del kept
    assert len(module._PACKED) == before
