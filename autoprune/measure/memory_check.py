"""Predicted against measured memory on a small random Infinity, in a process of its own where memory can be measured."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import torch

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.schedules import pixel_budget_schedules
from autoprune.backbones.t5_text import RandomTextEncoder
from autoprune.generation import generate
from autoprune.measure.memory import PeakMemory
from autoprune.measure.memory_plan import predicted_peak
from autoprune.policy import Policy
from autoprune.rules import BranchRule, ScalePruning

PROMPT = "a red circle left of a striped blue square"
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns every tensor of 64 kB or more when it is freed
CHILD = """
import json, sys
from autoprune.measure.memory_check import MemoryCase, check_here
print(json.dumps(check_here(MemoryCase(**json.loads(sys.argv[1])))))
"""


@dataclass(frozen=True)
class MemoryCase:
    """A float32 transformer and the channels of its decoder's finest level, small so that the scales need the most.

    Each policy is measured in `runs` runs.
    """

    width: int = 512
    depth: int = 8
    heads: int = 8
    pixel_budget: str = "0.25M"
    decoder_base: int = 16
    runs: int = 3


def check_memory(case: MemoryCase) -> dict[str, dict[str, float]]:
    """Returns MB above the loaded model for dense and a policy of each kind: `predicted`, `measured` (the median of
    its runs), and `ratio`, predicted / measured.

    The process returns freed memory at once. Where it is kept for speed, as after loading a backbone on CPUs, and where
    pieces of it do not fit what comes next, a generation needs more than any sum of its tensors.
    """
    command = [sys.executable, "-c", CHILD, json.dumps(asdict(case))]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | EXACT)
    return json.loads(done.stdout)


def check_here(case: MemoryCase) -> dict[str, dict[str, float]]:
    """Does the same in this process, whatever it does with freed memory."""
    backbone, rows = random_infinity(case), {}
    generate(backbone, [PROMPT])
    for name, policy in policies_of(backbone).items():
        plan = backbone.plan(policy)
        predicted = predicted_peak(plan, backbone, [PROMPT]).resident / 2**20
        measured = median(_measured(backbone, policy) for _ in range(case.runs))
        rows[name] = {"predicted": predicted, "measured": measured, "ratio": predicted / measured}
    return rows


def random_infinity(case: MemoryCase) -> Backbone:
    """Returns a backbone of the case's sizes with seeded random weights on the CPU."""
    config = TransformerConfig(case.width, case.heads, case.depth, chunks=1, token_bits=16, text_width=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Infinity(config)
        tokenizer = BSQTokenizer(TokenizerConfig(bits=16, base=case.decoder_base, norm_groups=8), with_encoder=False)
    text = RandomTextEncoder(config.text_width, device=torch.device("cpu"))
    for part in (model, tokenizer):
        part.eval().requires_grad_(False)
    return Backbone("random", model, tokenizer, text, Sampling(), pixel_budget_schedules(case.pixel_budget))


def policies_of(backbone: Backbone) -> dict[str, Policy]:
    """Returns dense and a policy for everything that changes what is held."""
    schedule = backbone.scale_schedule()
    last, base = len(schedule) - 1, partial(Policy, backbone.name, backbone.depth, schedule)

    def pruned(granularity: str) -> dict[int, ScalePruning]:
        return {scale: ScalePruning(0.4, last - 3, granularity=granularity) for scale in (last - 1, last)}

    granularities = {name: base(pruned(name)) for name in ("sublayer", "chunk", "scale")}
    return {
        "dense": base(),
        **{f"{name} keep 0.4 on the last two scales": policy for name, policy in granularities.items()},
        "one branch on the last two scales": base(guidance=BranchRule("cond", last - 1)),
        "last scale skipped": base(skip_last=1),
    }


def _measured(backbone: Backbone, policy: Policy) -> float:
    with PeakMemory(backbone.device) as before:
        pass
    with PeakMemory(backbone.device) as run:
        generate(backbone, [PROMPT], policy=policy)
    return run.megabytes - before.megabytes
