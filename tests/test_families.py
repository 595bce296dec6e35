"""A whole study on every family: small random models, own prompts, the unified space with the papers' presets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_star import star

from autoprune.backbones import Backbone
from autoprune.backbones.bsq_tokenizer import TokenizerConfig
from autoprune.backbones.hart import HartConfig
from autoprune.backbones.infinity import TransformerConfig
from autoprune.backbones.official import RELEASED, hart_sized
from autoprune.backbones.released import Target, random_backbone
from autoprune.backbones.schedules import pixel_budget_schedules
from autoprune.backbones.var import VARConfig
from autoprune.backbones.vq_tokenizer import VQConfig
from autoprune.generation import generate
from autoprune.measure.latency import plan_keys
from autoprune.policy import Policy
from autoprune.prefix import Recorder, Recording, record_prefix
from autoprune.search.neighbour import mutated, random_vector
from autoprune.search.progress import NullProgress
from autoprune.search.prompt_files import read_prompts
from autoprune.search.settings import BudgetSettings, LatencySettings, QualitySettings, StudySettings
from autoprune.search.shared_prefixes import SharedPrefixes
from autoprune.search.space import space_for
from autoprune.search.space_file import read_space
from autoprune.search.study import run_study
from autoprune.search.tracking import NullTracker

SPACES = Path(__file__).parent.parent / "search_spaces"
SIDES = (1, 2, 3, 4, 6, 8)
VQ = VQConfig(vocabulary=60, channels=8, base=32, channel_multipliers=(1, 2), blocks=1)
CPU = Target(torch.device("cpu"), torch.float32)


def infinity() -> Backbone:
    spec = replace(
        RELEASED["infinity2b"],
        transformer=TransformerConfig(width=64, heads=2, depth=4, chunks=2, token_bits=8, text_width=128),
        tokenizer=TokenizerConfig(bits=8, base=32, channel_multipliers=(1, 2), encoder_blocks=1, decoder_blocks=2),
        schedule_for=pixel_budget_schedules("0.06M"),
    )
    return random_backbone("infinity2b", spec, CPU)


def var() -> Backbone:
    config = VARConfig(width=64, heads=2, depth=4, sides=SIDES, channels=8, vocabulary=60)
    spec = replace(RELEASED["var_d16"], transformer=config, tokenizer=VQ, schedule_for=config.schedule_for)
    return random_backbone("var_d16", spec, CPU)


def hart() -> Backbone:
    config = HartConfig(
        width=48, heads=2, depth=4, sides=SIDES, context_tokens=6, context_width=20, vocabulary=60, channels=8,
        diffusion_width=32, diffusion_depth=2,
    )  # fmt: skip
    tokenizer = replace(VQ, scales=len(SIDES), phi_at_last=False)
    spec = replace(hart_sized(RELEASED["hart"], config), tokenizer=tokenizer)
    return random_backbone("hart", spec, CPU)


@pytest.mark.parametrize("family", [infinity, var, hart, star], ids=lambda family: family.__name__)
def test_trials_that_start_where_others_were_are_bit_identical_in_the_family(family) -> None:  # noqa: ANN001
    backbone, shared, later = family(), SharedPrefixes(1000, device=torch.device("cpu")), 0
    space, rng = space_for(read_space(SPACES / "unified.yaml"), backbone), np.random.default_rng(2)
    vector, dense = random_vector(space, rng), record_prefix(backbone, ["7", "8"], seed=1, sampling=backbone.sampling)
    for _ in range(12):
        policy, recorder = space.policy(vector), Recorder()
        plan = backbone.plan(policy)
        start = shared.start(0, plan, lambda: dense)
        options = {"seed": 1, "observer": recorder, "start": start and start.snapshot}
        images = generate(backbone, ["7", "8"], policy=policy, **options)
        assert torch.equal(images, generate(backbone, ["7", "8"], policy=policy, seed=1)), policy.key()
        if not (policy.adaptive and policy.batch == "split"):
            shared.keep(0, Recording(plan, tuple(recorder.snapshots)), plan_keys(plan))
        alone = dense.start(plan)
        later += start is not None and start.snapshot.scales > (alone.scales if alone else 0)
        vector = mutated(space, vector, rng)
    assert later > 0


@pytest.mark.parametrize("family", [infinity, var, hart, star], ids=lambda family: family.__name__)
def test_a_study_measures_the_presets_and_exports_policies_of_the_family(tmp_path: Path, family) -> None:  # noqa: ANN001
    backbone = family()
    (tmp_path / "prompts.txt").write_text("\n".join(map(str, range(40))))
    config = StudySettings(
        tmp_path,
        "study",
        read_space(SPACES / "unified.yaml"),
        quality=QualitySettings(name="fidelity", prompts=4, held_out_prompts=4, max_loss=1.0),
        latency=LatencySettings(batch=2, rounds=1),
        budget=BudgetSettings(trials=34, minutes=None, front=5),
        prompts=read_prompts(tmp_path / "prompts.txt"),
    )
    result = run_study(config, backbone=backbone, tracker=NullTracker(), progress=NullProgress())
    assert {trial.state for trial in result.trials} <= {"complete", "discarded"}
    presets = {trial.preset for trial in result.trials}
    assert {"fastvar", "stepvar", "cond-only-1", "tome"} <= presets
    exported = [Policy.load(member.policy_path) for member in result.front if member.policy_path]
    assert exported and all(policy.backbone == backbone.name for policy in exported)
    if not backbone.skippable:
        assert not any(trial.policy.skip_last for trial in result.trials)
