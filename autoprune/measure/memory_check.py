"""Predicted against measured memory of a small random Infinity or InfinityStar, in a process of its own where memory can be
measured."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median

import torch

from autoprune.backbones import Backbone, Sampling
from autoprune.backbones.bsq_tokenizer import BSQTokenizer, TokenizerConfig
from autoprune.backbones.infinity import Infinity, TransformerConfig
from autoprune.backbones.official import RELEASED
from autoprune.backbones.released import Target, random_backbone
from autoprune.backbones.schedules import pixel_budget_schedules
from autoprune.backbones.t5_text import RandomTextEncoder
from autoprune.generation import generate, generate_latent, resolve
from autoprune.measure.memory import PeakMemory
from autoprune.measure.memory_plan import predicted_peak
from autoprune.measure.placement import PROMPT
from autoprune.policy import Policy
from autoprune.rules import BranchRule, ScalePruning

EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns every tensor of 64 kB or more when it is freed
CHILD = """
import json, sys
from autoprune.measure.memory_check import MemoryCase, check_here
print(json.dumps(check_here(MemoryCase(**json.loads(sys.argv[1])))))
"""


@dataclass(frozen=True)
class MemoryCase:
    """A float32 transformer and the channels of its decoder's finest level, small so that the scales need the most.

    It is Infinity at a pixel budget or, with `frames`, InfinityStar on the scales of 480p. Each policy is measured in `runs`
    runs.
    """

    width: int = 512
    depth: int = 8
    heads: int = 8
    pixel_budget: str = "0.25M"
    decoder_base: int = 16
    runs: int = 3
    frames: int = 0


VIDEO = MemoryCase(width=256, depth=2, heads=2, pixel_budget="", decoder_base=32, runs=1, frames=17)


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
    if case.frames:
        return _check_video(case)
    backbone, rows = random_infinity(case), {}
    generate(backbone, [PROMPT])
    for name, (placed, policy) in _cases(backbone).items():
        predicted = predicted_peak(placed.plan(policy), placed, [PROMPT]).resident
        rows[name] = _row(case, predicted, placed, partial(generate, placed, [PROMPT], policy=policy))
    return rows


def _check_video(case: MemoryCase) -> dict[str, dict[str, float]]:
    """Compares the scales alone, as decoding a small video takes more than they do, and the decoder on one frame."""
    backbone, rows = random_star(case), {}
    still = backbone.sampled(frames=1)

    @torch.inference_mode()
    def scales(placed: Backbone, policy: Policy) -> torch.Tensor:
        return generate_latent(placed, resolve(placed, [PROMPT], placed.plan(policy), seed=0, sampling=placed.sampling))

    @torch.inference_mode()
    def decode() -> torch.Tensor:
        return still.decode(latent)

    latent = scales(still, policies_of(still)["last scale skipped"])
    scales(backbone, policies_of(backbone)["dense"])  # what libraries take once and keep is not a generation's
    for name, (placed, policy) in _cases(backbone).items():
        plan = predicted_peak(placed.plan(policy), placed, [PROMPT])
        rows[f"scales, {name}"] = _row(case, plan.resident_scales, placed, partial(scales, placed, policy))
    plan = predicted_peak(still.plan(None), still, [PROMPT])
    rows["decoding a frame"] = _row(case, plan.decoding - latent.nbytes, still, decode)
    return rows


def _cases(backbone: Backbone) -> dict[str, tuple[Backbone, Policy]]:
    cases = {name: (backbone, policy) for name, policy in policies_of(backbone).items()}
    return cases | {"keys and values in host memory": (backbone.with_keys("host"), cases["dense"][1])}


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


def random_star(case: MemoryCase) -> Backbone:
    """Returns an InfinityStar of the case's sizes with the grids and repetitions of 480p."""
    spec, base = RELEASED["infinitystar_480p"], case.decoder_base
    sizes = {"width": case.width, "heads": case.heads, "key_heads": max(1, case.heads // 4), "depth": case.depth, "chunks": 1}
    bits = {"bits": 16, "semantic_bits": 4}
    transformer = replace(spec.transformer, **sizes, text_width=256, token_bits=16, semantic_bits=4)
    tokenizer = replace(spec.tokenizer, **bits, widths=(base, 2 * base, 4 * base, 4 * base, 4 * base))
    spec = replace(spec, transformer=transformer, tokenizer=tokenizer)
    return random_backbone("random", spec, Target(torch.device("cpu"), torch.float32)).sampled(frames=case.frames)


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


def _row(case: MemoryCase, predicted: int, backbone: Backbone, run: Callable[[], object]) -> dict[str, float]:
    measured = median(_measured(backbone, run) for _ in range(case.runs))
    return {"predicted": predicted / 2**20, "measured": measured, "ratio": predicted / 2**20 / measured}


def _measured(backbone: Backbone, run: Callable[[], object]) -> float:
    with PeakMemory(backbone.device) as before:
        pass
    with PeakMemory(backbone.device) as inside:
        run()
    return inside.megabytes - before.megabytes
