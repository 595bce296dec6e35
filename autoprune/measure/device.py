"""Which machine a number was measured on. A latency without this is not a number."""

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from autoprune.backbones.attention import device_backend


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
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
