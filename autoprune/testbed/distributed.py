"""Data-parallel training in a few single-thread processes of one machine.

Under contention one process with two OpenMP threads waits at a barrier in every operator (2.7 s per step measured);
two processes with one all-reduce per step do not (0.43 s under the same load).
"""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, multiprocessing, nn

Payload = TypeVar("Payload")


@dataclass(frozen=True)
class Team:
    """The place of one process among `size`; a team of one communicates with nobody."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """True in the one process that prints and writes files."""
        return self.rank == 0

    def average(self, values: Tensor) -> Tensor:
        """Mean over the team, in place, of a float tensor that lies on the CPU when size > 1."""
        if self.size > 1:
            distributed.all_reduce(values)
            values /= self.size
        return values

    def average_gradients(self, parameters: Sequence[nn.Parameter], extra: Tensor) -> Tensor:
        """Average all gradients and the vector `extra` [n] in one message; returns the averaged `extra`.

        Whatever steers training (elapsed time, running statistics) belongs in `extra`, so that all processes take
        the same decisions. Parameters without a gradient count as zero in a team.
        """
        if self.size == 1:
            return extra
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.average(torch.cat([extra.float(), *(gradient.flatten().float() for gradient in gradients)]))
        averaged, *parts = flat.split([extra.numel(), *(gradient.numel() for gradient in gradients)])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return averaged

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            distributed.barrier()


def run_team(work: Callable[[Team, Payload], None], payload: Payload, *, processes: int) -> None:
    """Call `work(team, payload)` in so many processes (1: in this one) and return when all have ended.

    `work` must be importable, `payload` picklable. An error or Ctrl-C in one process ends the others.
    """
    if processes == 1:
        work(Team(), payload)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "rendezvous")
        multiprocessing.spawn(_member, args=(processes, store, work, payload), nprocs=processes)


def _member(rank: int, size: int, store: str, work: Callable[[Team, Payload], None], payload: Payload) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # sent when the first process dies; `nohup &` ignores it
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        work(Team(rank, size), payload)
    except BaseException:
        distributed.destroy_process_group()
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # one was seen to end with SIGABRT, perhaps as the interpreter ends beside threads of torch: skip that
