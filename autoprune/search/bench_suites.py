"""The suites of `python -m autoprune.bench` that are about searching: samplers, simulated workers, storages."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from autoprune.backbones import Backbone
from autoprune.measure.device import device_identity
from autoprune.search.sampler_bench import SamplerCase, measure_samplers
from autoprune.search.sampler_plot import save_sampler_plot
from autoprune.search.scaling_bench import ScalingCase, measure_scaling
from autoprune.search.scaling_plot import save_scaling_plot
from autoprune.search.settings import StorageSettings
from autoprune.search.storage_bench import StorageCase, measure_storages


def search_suite(backbone: Backbone, *, batch: int, plot: Path) -> dict[str, object]:
    """Compares samplers on a real backbone."""
    case = SamplerCase(batch=batch)
    record = measure_samplers(backbone, case)
    save_sampler_plot(record, plot)
    what = "hypervolume after each trial / that of all trials here, median over seeds"
    return record | {"what": what, "machine": device_identity(backbone.device, backbone.dtype), "case": asdict(case)}


def scaling_suite(plot: Path) -> dict[str, object]:
    """Compares what samplers take running trials for, with simulated workers."""
    record = measure_scaling(ScalingCase())
    save_scaling_plot(record, plot)
    return record | {"machine": _processor()}


def storage_suite(url: str) -> dict[str, object]:
    """Times the journal and, where there is a `url` of a PostgreSQL server, that server and the proxy in front of it."""
    storages, left_out = {"journal": StorageSettings()}, []
    if not url:
        left_out = ["storages postgresql and grpc, which need url=postgresql://USER@HOST/DATABASE"]
        return measure_storages(StorageCase(), storages) | {"machine": _processor(), "left_out": left_out}
    with _proxy(url) as port:
        storages["postgresql"] = StorageSettings("postgresql", url)
        storages["grpc"] = StorageSettings("grpc", f"grpc://localhost:{port}")
        return measure_storages(StorageCase(), storages) | {"machine": _processor()}


def _processor() -> dict[str, object]:
    return device_identity(torch.device("cpu"), torch.float32)


@contextmanager
def _proxy(url: str) -> Iterator[int]:
    """A gRPC proxy in front of a server, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "autoprune.storage_proxy", f"url={url}", f"port={port}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        process.stderr.readline()  # it says that it serves, or why it does not
        try:
            yield port
        finally:
            process.kill()
