"""How one process takes part in a study: alone, as one of several started together, or as help for a study led elsewhere."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

SUPERVISED = "AUTOPRUNE_WORKER"  # RANK/RUN/PARENT, set by workers.py for the processes it starts
TERMINAL = "AUTOPRUNE_TERMINAL"  # and the number of its standard error, for who leads


@dataclass(frozen=True)
class Crew:
    """`token` is what processes that were started together have in common, empty where nothing is known to be unique.

    `shared`: other processes take part, each may come to lead unless `may_lead` forbids it. `local` is the place among those
    on this machine, None without one. `parent` is the process without which this one is to stop.
    """

    rank: int = 0
    token: str = ""
    shared: bool = False
    may_lead: bool = True
    local: int | None = None
    parent: int | None = None

    @property
    def name(self) -> str:
        """Returns what logs and records call this process."""
        return f"worker-{self.rank}" if self.shared else ""

    def is_left(self) -> bool:
        """Returns whether the process that started this one is gone."""
        return self.parent is not None and os.getppid() != self.parent


def crew_here(environment: Mapping[str, str], *, join: bool) -> Crew:
    """Returns how this process takes part, by what started it: workers=N, torchrun, Slurm, submitit, nobody.

    `join` says that it helps a study that another command leads.
    """
    if SUPERVISED in environment:
        rank, token, parent = environment[SUPERVISED].split("/")
        return Crew(int(rank), token, shared=True, may_lead=not join, parent=int(parent))
    for launched in (_torchrun, _slurm, _submitit_local):
        crew = launched(environment)
        if crew is not None:
            return replace(crew, may_lead=not join)
    return Crew(rank=os.getpid(), shared=True, may_lead=False) if join else Crew()


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them."""
    return (environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")


def use_own_device(crew: Crew, environment: dict[str, str]) -> None:
    """Leaves of several visible GPUs the one at this process's place; to be called before CUDA is used."""
    if crew.local is None or not torch.cuda.is_available():
        return
    devices = visible_gpus(environment)
    if len(devices) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices[crew.local % len(devices)]


def _torchrun(environment: Mapping[str, str]) -> Crew | None:
    if "TORCHELASTIC_RUN_ID" not in environment or int(environment["WORLD_SIZE"]) == 1:
        return None
    token = environment["TORCHELASTIC_RUN_ID"]  # `none` unless --standalone or --rdzv-id was given
    return Crew(
        int(environment["RANK"]),
        "" if token == "none" else token,
        shared=True,
        local=int(environment["LOCAL_RANK"]),
    )


def _slurm(environment: Mapping[str, str]) -> Crew | None:
    if int(environment.get("SLURM_NTASKS", 1)) == 1 or "SLURM_PROCID" not in environment:
        return None
    token = f"slurm-{environment['SLURM_JOB_ID']}-{environment.get('SLURM_STEP_ID', '')}"
    return Crew(int(environment["SLURM_PROCID"]), token, shared=True, local=int(environment["SLURM_LOCALID"]))


def _submitit_local(environment: Mapping[str, str]) -> Crew | None:
    if int(environment.get("SUBMITIT_LOCAL_NTASKS", 1)) == 1:
        return None
    place = int(environment["SUBMITIT_LOCAL_GLOBALID"])
    token = f"submitit-{environment['SUBMITIT_LOCAL_JOB_ID']}"
    return Crew(place, token, shared=True, local=int(environment["SUBMITIT_LOCAL_LOCALID"]))
