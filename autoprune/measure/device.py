"""Which machine a number was measured on. A latency without this is not a number."""

import platform
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import torch

from autoprune.backbones.attention import device_backend

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm", "sve")  # what products are made of


def device_identity(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Returns type, name, threads, dtype, torch version and, on CUDA, the attention kernel as JSON values."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else _processor_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    } | ({"attention": device_backend(device, dtype)} if cuda else {})


def device_conditions(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Returns device_identity and what else a latency depends on, as far as it is known.

    `attention` is the kernel; on CPUs `instructions` are those of INSTRUCTIONS that the processor has; on CUDA `capability`
    is the compute capability, `driver` the version of the kernel module and `cuda` what torch was built with. None of this
    is in device_identity: a study may go on under another driver.
    """
    conditions = {**device_identity(device, dtype), "attention": device_backend(device, dtype)}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        known = {"capability": f"{major}.{minor}", "driver": _driver(), "cuda": torch.version.cuda}
    else:
        flags = _processor_entry("flags", "Features").split()
        known = {"instructions": " ".join(name for name in INSTRUCTIONS if name in flags)}
    return conditions | {name: value for name, value in known.items() if value}


def synchronise(device: torch.device) -> None:
    """Waits until the device has finished everything queued so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """A context for small matrices: beside other work, two threads made those of a Gaussian process fifteen times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_blas_thread() -> AbstractContextManager:
    """Returns a context in which numpy's matrix products use the calling thread only.

    OpenBLAS threads keep spinning after a product: on two Xeon cores a generation of 150 ms that follows takes 240 ms.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")


def _processor_name() -> str:
    return _processor_entry("model name") or platform.processor() or platform.machine()


@cache
def _processor_entry(*names: str) -> str:
    """Returns an entry of the first processor in Linux's list, empty where there is none."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return ""
    return next((value.strip() for name, _, value in lines if name.strip() in names), "")


@cache
def _driver() -> str:
    """Returns the version of NVIDIA's kernel module, empty where Linux does not tell it."""
    try:
        found = re.search(r"Module\s+.*?(\d+\.\d+(\.\d+)?)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return found[1] if found else ""
