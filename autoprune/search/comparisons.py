"""Comparing a trial's images with the dense ones, in line or beside the next generation."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class Comparisons(Generic[Batch, Result]):
    """The comparisons of one trial in order, each computed when it is added, or `beside` what follows by one thread."""

    def __init__(self, compare: Callable[[Tensor, Batch], Result], *, device: torch.device, beside: bool) -> None:
        self._compare, self._device = compare, device
        self._results: list[Future[Result]] = []
        self._worker = ThreadPoolExecutor(1) if beside else None
        self._stream = torch.cuda.Stream(device) if beside and device.type == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Returns whether the thread has work left."""
        return not all(result.done() for result in self._results)

    def add(self, images: Tensor, batch: Batch) -> None:
        """Compares images of a batch, or lets the thread do it when they are there."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if self._worker is not None:
            self._results.append(self._worker.submit(self._run, images, batch))
            return
        result: Future[Result] = Future()
        result.set_result(self._compare(images, batch))
        self._results.append(result)

    def results(self) -> list[Result]:
        """Waits for everything added so far and returns it. Raises what a comparison raised."""
        return [result.result() for result in self._results]

    def _run(self, images: Tensor, batch: Batch) -> Result:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            return self._compare(images, batch)
