"""Every attention backend against a plain float64 loop."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autoprune.backbones import attention
from autoprune.backbones.kv_buffer import KeyValueBuffer

PACKAGE = """
import torch


def flash_attn_func(q, k, v, *, softmax_scale=None, causal=False):
    assert not causal
    weights = torch.einsum("rlhd,rkhd->rhlk", q.double(), k.double()) * softmax_scale
    out = torch.einsum("rhlk,rkhd->rlhd", weights.softmax(-1), v.double())
    return {result}
"""


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


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Puts a module with flash-attn's documented signature, tensors [R, L, H, D], on the path; it returns `result`."""

    def write(name: str, result: str) -> None:
        (tmp_path / f"{name}.py").write_text(PACKAGE.format(result=result))
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    for module, *_ in attention.FLASH.values():
        monkeypatch.delitem(sys.modules, module, raising=False)
    _forget()
    yield write
    for module, *_ in attention.FLASH.values():
        sys.modules.pop(module, None)
    _forget()


def _forget() -> None:
    attention._flash_function.cache_clear()
    attention.installed_backend.cache_clear()


@pytest.mark.parametrize("result", ["out.to(q.dtype)", "(out.to(q.dtype), weights.logsumexp(-1))"])
@pytest.mark.parametrize("name", list(attention.FLASH))
def test_a_flash_package_gets_positions_before_heads_and_our_scale(install, name: str, result: str) -> None:
    install(attention.FLASH[name][0], result)
    q, k, v = inputs()
    ours = attention.flash_attention(q, k, v, scale=0.125, name=name)
    torch.testing.assert_close(ours.double(), naive(q, k, v, None), rtol=0, atol=1e-5)


def test_the_best_installed_kernel_that_the_gpu_can_run_is_taken(install) -> None:
    hopper, ampere, turing, blackwell = (9, 0), (8, 6), (7, 5), (10, 0)
    install("flash_attn", "out")
    taken = [attention.installed_backend(each) for each in (hopper, ampere, turing, blackwell)]
    assert taken == ["flash_attn_2", "flash_attn_2", "sdpa", "flash_attn_2"]
    install("flash_attn_interface", "out")
    _forget()
    taken = [attention.installed_backend(each) for each in (hopper, ampere, turing, blackwell)]
    assert taken == ["flash_attn_3", "flash_attn_2", "sdpa", "flash_attn_2"]


def test_a_package_that_does_not_load_is_passed_over(install, tmp_path: Path) -> None:
    install("flash_attn", "out")
    (tmp_path / "flash_attn_interface.py").write_text("import no_such_extension")
    assert attention.installed_backend((9, 0)) == "flash_attn_2"


def test_cpu_never_asks_for_flash(install) -> None:
    install("flash_attn", "out")
    q, _, _ = inputs(dtype=torch.bfloat16)
    assert attention.attention_backend(q, None) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sdpa", *attention.FLASH])
def test_every_installed_cuda_backend_agrees_with_a_plain_loop(name: str) -> None:
    capability = torch.cuda.get_device_capability()
    q, k, v = inputs("cuda", torch.bfloat16)
    if name == "sdpa":
        ours = attention.sdpa_attention(q, k, v, scale=0.125)
    else:
        _, least, end = attention.FLASH[name]
        if not least <= capability < end or attention._flash_function(name) is None:
            pytest.skip(f"{name} is not installed or not for this GPU")
        ours = attention.flash_attention(q, k, v, scale=0.125, name=name)
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
