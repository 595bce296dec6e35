"""The sandwich with FastVAR's settings against FastVAR traces; dropped branches and skipped scales against SkipVAR's."""

import numpy as np
import pytest
import torch
from goldens import Job, Recorder, backbone, jobs, request_of, unpack_bits

from autoprune.generation import generate_latent
from autoprune.policy import BranchRule, Policy, ScalePruning

LAYERS = (3, 27)
SKIPPED_WIDTHS = (48, 64)
PRUNED_WIDTHS = {32: 0.4, 40: 0.5}
CACHE_TOKENS = 576
ADAPTED_WIDTHS, ADAPTED_CACHE = {46: 0.4}, (19, 38)
FASTVAR, SKIPVAR = jobs("fastvar_"), jobs("skipvar_")


@pytest.fixture(scope="module", params=FASTVAR, ids=[f"{job.trace}:{job.name}" for job in FASTVAR])
def pruned_run(request: pytest.FixtureRequest) -> tuple[Job, dict, Recorder, torch.Tensor]:
    job: Job = request.param
    return (job, job.arrays, *_run(job, _fastvar_policy(job)))


def test_there_are_traces_to_compare_with() -> None:
    assert FASTVAR


def test_kept_sets_are_identical(pruned_run: tuple) -> None:
    job, arrays, recorder, _ = pruned_run
    names = [name for name in arrays if name.startswith("kept_idx.")]
    assert names
    for name in names:
        scale = next(i for i, (_, h, w) in enumerate(job.schedule) if name == f"kept_idx.h{h}w{w}")
        ours = torch.stack(recorder.kept_sets[scale]).sort(dim=-1).values
        recorded = torch.from_numpy(arrays[name].astype(np.int64)).sort(dim=-1).values
        assert torch.equal(ours, recorded.view_as(ours)), name


def test_logits_bits_and_latent_are_reproduced(pruned_run: tuple) -> None:
    job, arrays, recorder, latent = pruned_run
    _compare(job, arrays, recorder, latent)


@pytest.mark.parametrize("job", SKIPVAR, ids=[job.name for job in SKIPVAR])
def test_dropped_branch_and_skipped_scales_match_skipvar(job: Job) -> None:
    count, record = len(job.schedule), job.record
    rule = BranchRule("cond", count - record["uncond"]) if record["uncond"] else BranchRule()
    depth = backbone(job.weights).depth
    policy = Policy("golden", depth, job.schedule, guidance=rule, skip_last=record["skip"])
    _compare(job, job.arrays, *_run(job, policy))


def _fastvar_policy(job: Job) -> Policy:
    """The literals of the FastVAR code, expressed by scale index; an adapted job brings its own table and cache grid."""
    schedule, depth = job.schedule, backbone(job.weights).depth
    ratios, is_cache = PRUNED_WIDTHS, [h * w == CACHE_TOKENS for _, h, w in schedule]
    if job.record.get("adapt"):
        ratios = _found_ratios(job.record["adapt"]) or ADAPTED_WIDTHS
        is_cache = [(h, w) == ADAPTED_CACHE for _, h, w in schedule]
    rule = {"cache_scale": is_cache.index(True), "layers": (LAYERS[0], min(LAYERS[1], depth - 1))}
    scales = {i: ScalePruning(keep=1 - ratios[w], **rule) for i, (_, _, w) in enumerate(schedule) if w in ratios}
    return Policy("golden", depth, schedule, scales=scales, skip_last=sum(w in SKIPPED_WIDTHS for _, _, w in schedule))


def _found_ratios(adapt: object) -> dict[int, float]:
    """Collects {"46": 0.4} or {"w46": 0.4} wherever the record holds it."""
    if not isinstance(adapt, dict):
        return {}
    found = {int(key.lstrip("w")): value for key, value in adapt.items() if key.lstrip("w").isdigit()}
    for value in adapt.values():
        found |= _found_ratios(value)
    return found


def _run(job: Job, policy: Policy) -> tuple[Recorder, torch.Tensor]:
    loaded = backbone(job.weights)
    recorder = Recorder(loaded.model)
    request = request_of(job, job.arrays, policy=policy)
    with torch.inference_mode():
        latent = generate_latent(loaded, recorder.watching(request), recorder)
    recorder.remove()
    return recorder, latent


def _compare(job: Job, arrays: dict, recorder: Recorder, latent: torch.Tensor) -> None:
    stride = job.record["raw_token_stride"]
    compared = 0
    for name, recorded in arrays.items():
        if name.startswith("bits."):
            ours = recorder.found[name]
            assert torch.equal(unpack_bits(recorded, ours.shape[1:]), ours), name
        elif name.startswith("logits_raw."):
            ours = recorder.found[name]
            ours = ours if ours.shape[1] == recorded.shape[1] else ours[:, ::stride]
            np.testing.assert_allclose(ours, recorded, rtol=0, atol=2e-4, err_msg=name)
        elif name == "latent":
            np.testing.assert_allclose(latent, recorded, rtol=0, atol=1e-5, err_msg=name)
        elif name == "cond_BD":
            np.testing.assert_allclose(recorder.found[name], recorded, rtol=0, atol=2e-4, err_msg=name)
        else:
            continue
        compared += 1
    assert compared > 5
