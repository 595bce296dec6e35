"""Presets give the papers' exact numbers on their own backbones, and the same relative setting on any other.

Sections in names are those of the method specification the presets were written from; token counts are computed by hand.
"""

import json
from pathlib import Path

import pytest

from autoprune.backbones.official import RELEASED
from autoprune.backbones.schedules import ASPECT_RATIOS, PIXEL_BUDGETS, scale_schedule
from autoprune.clips import Course
from autoprune.policy import BranchRule, Policy, ScalePruning, kept_count, token_count
from autoprune.pruning.plan import ScalePlan, compile_plan
from autoprune.pruning.selection import anchor_index
from autoprune.search.rank_table import PUBLISHED, rank_table
from autoprune.search.space import Preset, SearchSpace, Target
from autoprune.search.space_file import read_space
from tests.test_space import FILES, TARGETS, calibration, space

HART = Target("hart", 24, tuple((1, side, side) for side in (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)))
INFINITY = {
    "infinity2b": TARGETS["infinity2b"],
    "infinity8b": Target("infinity8b", 40, scale_schedule(1.0, "1M")),
}
both = pytest.mark.parametrize("target", INFINITY.values(), ids=list(INFINITY))


def preset(name: str, target: Target, *, calibrated: bool = False) -> Preset:
    here = SearchSpace(read_space(FILES[0].parent / "unified.yaml"), target, calibration(target) if calibrated else None)
    return next(preset for preset in here.presets() if preset.name == name)


def planned(policy: Policy) -> dict[int, ScalePlan]:
    plan = compile_plan(policy, policy.scale_schedule, policy.depth)
    return {scale.index: scale for scale in plan.scales if scale.pruning}


def kept(policy: Policy) -> dict[int, int]:
    return {index: scale.kept for index, scale in planned(policy).items()}


def test_section_1_2_fastvar_on_infinity_2b_is_the_published_policy() -> None:
    rule = {"cache_scale": 8, "scorer": "dc", "granularity": "sublayer", "layers": (3, 27), "rows": "per_branch"}
    published = Policy(
        backbone="infinity2b",
        depth=32,
        scale_schedule=TARGETS["infinity2b"].scale_schedule,
        scales={9: ScalePruning(keep=0.6, **rule), 10: ScalePruning(keep=0.5, **rule)},
        skip_last=2,
    )
    for name in ("fastvar", "unified"):
        here = space(name, "infinity2b")
        policy = next(preset.policy for preset in here.presets() if preset.name == "fastvar")
        assert policy == published.canonical() and kept(policy) == {9: 615, 10: 800}


def test_section_1_2_fastvar_layers_on_infinity_8b_are_those_of_the_known_port() -> None:
    policy = preset("fastvar", INFINITY["infinity8b"]).policy
    assert policy.scales[9].layers == (4, 34) and kept(policy) == {9: 615, 10: 800} and policy.skip_last == 2


def test_section_1_2_fastvar_on_hart() -> None:
    policy = preset("fastvar-hart", HART).policy
    assert kept(policy) == {12: 1152, 13: 1024} and policy.skip_last == 0
    assert {(rule.cache_scale, rule.layers) for rule in policy.scales.values()} == {(11, None)}


@both
def test_section_2_stepvar_keeps_what_fastvar_keeps_but_once_a_scale(target: Target) -> None:
    step = preset("stepvar", target)
    assert kept(step.policy) == {9: 615, 10: 800} and step.policy.skip_last == 2 and step.inferred
    for rule in step.policy.scales.values():
        assert dict(rule.scorer) == {"structure": 1.0, "texture": 1.0} and rule.normalise == "zscore"
        assert (rule.granularity, rule.restorer, rule.recover_at, rule.layers) == ("scale", "nearest", "head", None)
    assert kept(preset("stepvar-hart", HART).policy) == {12: 1152, 13: 1024}


@both
def test_section_3_2_stagevar_adds_its_steps_one_by_one(target: Target) -> None:
    skipped, single, full = (preset(name, target).policy for name in ("stagevar-a", "stagevar-ab", "stagevar"))
    assert skipped == Policy(target.backbone, target.depth, target.scale_schedule, skip_last=2)
    assert (single.skip_last, single.guidance, dict(single.scales)) == (2, BranchRule("uncond", 10), {})
    assert (full.skip_last, full.guidance, list(full.scales)) == (2, BranchRule("uncond", 10), [10])
    rule = full.scales[10]
    assert (rule.granularity, rule.reducer, rule.select, rule.positions) == ("chunk", "project", "draw", "first")
    assert (rule.restorer, rule.cache_scale, rule.interpolation) == ("cached_state", 9, "area")
    assert dict(rule.scorer) == {"norm": 1.0}
    assert planned(full)[10].kept_chunks == (27, 219, 337, 401, 410, 317, 252, 306)
    assert {len(chunk) for chunk in full.chunk_ranges()} == {target.depth // 8}


def test_section_3_2_calibrated_ranks_replace_the_published_ones() -> None:
    target = INFINITY["infinity2b"]
    ranks = preset("stagevar", target, calibrated=True).policy.scales[10].ranks
    assert ranks == calibration(target).ranks["0.96"] != preset("stagevar", target).policy.scales[10].ranks
    assert rank_table(calibration(target), 6) == rank_table(None, 6), "a table of another number of chunks is no use"


def test_fewer_chunks_take_the_published_ranks_of_the_same_relative_depth() -> None:
    assert rank_table(None, 8) == PUBLISHED
    assert rank_table(None, 4) == PUBLISHED[1::2] and rank_table(None, 1) == PUBLISHED[4:5]
    assert [PUBLISHED.index(share) for share in rank_table(None, 6)] == [0, 2, 3, 4, 6, 7]


@both
def test_section_4_ld_pruning_takes_its_thresholds_from_calibration(target: Target) -> None:
    found = preset("ld-pruning", target, calibrated=True)
    policy, measured = found.policy, calibration(target)
    assert found.inferred and found.vector is not None and policy.skip_last == 0 and list(policy.scales) == [10, 11, 12]
    drop = measured.discrepancy("mse_hidden", 8, 0.9)
    assert policy.guidance == BranchRule("adaptive", 8, threshold=pytest.approx(drop, rel=1e-3))
    assert (policy.stop.from_scale, policy.stop.metric, policy.stop.share) == (10, "latent_cos", 0.05)
    assert policy.stop.threshold == pytest.approx(measured.change("latent_cos", 10, 0.9), rel=1e-3)
    for rule in policy.scales.values():
        assert rule.threshold == pytest.approx(measured.change("latent_cos", 10, 0.5), rel=1e-3)
        assert (rule.select, rule.threshold_of, rule.floor, rule.restorer) == ("threshold", "absolute", 0.05, "zero_residual")


@both
def test_section_5_2_sparsevar_decides_from_40x40_on_by_the_fourth_chunk(target: Target) -> None:
    for name, threshold in (("sparsevar", 0.6), ("sparsevar-0.5", 0.5)):
        policy = preset(name, target).policy
        assert list(policy.scales) == [10, 11, 12] and policy.skip_last == 0 and policy.adaptive
        for rule in policy.scales.values():
            assert (dict(rule.scorer), rule.chunk, rule.similarity) == ({"delta": 1.0}, 3, 0.8)
            assert (rule.select, rule.threshold, rule.threshold_of) == ("threshold", threshold, "maximum")
            assert (rule.granularity, rule.restorer, rule.anchors) == ("scale", "anchor", 4)
        anchors = [len(anchor_index(target.scale_schedule[index], rule.anchors)) for index, rule in policy.scales.items()]
        assert anchors == [121, 169, 289]


def test_section_6_skipvar_exists_only_with_a_fitted_decision() -> None:
    target = INFINITY["infinity2b"]
    found = preset("skipvar", target, calibrated=True)
    assert found.policy.probe == calibration(target).probe and found.vector is not None and not found.policy.scales
    plain = SearchSpace(read_space(FILES[0].parent / "unified.yaml"), target)
    assert {preset.name for preset in plain.presets()}.isdisjoint({"skipvar", "ld-pruning"})
    assert [sentence.split(" is left out")[0] for sentence in plain.missing] == ["preset ld-pruning", "preset skipvar"]
    assert all("run `python -m autoprune.calibrate backbone=infinity2b`." in sentence for sentence in plain.missing)
    assert SearchSpace(plain.definition, target, calibration(target)).missing == ()


@both
def test_section_7_tome_merges_half_of_the_last_two_scales_around_attention(target: Target) -> None:
    policy = preset("tome", target).policy
    assert kept(policy) == {11: 1152, 12: 2048}
    for rule in policy.scales.values():
        assert (rule.reducer, rule.restorer, rule.sublayers, rule.cell) == ("merge", "merged", ("sa",), 2)


@both
def test_section_10_1_lazyvar_decodes_the_last_four_scales_together(target: Target) -> None:
    grouped, alone = (preset(name, target).policy for name in ("lazyvar", "lazyvar-no-group"))
    assert kept(grouped) == kept(alone) == {9: 205, 10: 160, 11: 116, 12: 41}
    assert (grouped.group_from, alone.group_from) == (9, None) and grouped.scales == alone.scales
    for rule in grouped.scales.values():
        assert (dict(rule.scorer), rule.granularity, rule.restorer) == ({"latent_cos": 1.0}, "scale", "zero_residual")


@both
def test_section_10_4_faststar_keeps_its_ratios_on_the_last_four_scales(target: Target) -> None:
    assert kept(preset("faststar", target).policy) == {9: 820, 10: 1120, 11: 1383, 12: 1229}


VIDEOS = {
    name: Target(name, 36, schedule, course=Course((3,) * (len(schedule) // 2 + 12) + tail, by_clip=True), chunks=6)
    for name, tail in (("infinitystar_480p", (2, 1)), ("infinitystar_720p", (2, 1, 1)))
    for schedule in [RELEASED[name].schedule_for(0.571, 81)]
}
LATE = {"infinitystar_480p": (4032, 8064, 12384, 9540), "infinitystar_720p": (9216, 14448, 19080, 21600)}
videos = pytest.mark.parametrize("name", VIDEOS)


@videos
def test_section_1_2_fastvar_on_videos_is_the_known_port(name: str) -> None:
    target = VIDEOS[name]
    policy, first = preset("fastvar-video", target).policy, target.count - 4
    assert kept(policy) == dict(zip(range(first, target.count), LATE[name], strict=True)) and policy.skip_last == 0
    for rule in policy.scales.values():
        assert (rule.layers, rule.cache_scale, rule.interpolation) == ((4, 30), first - 1, "area")
        assert (rule.granularity, dict(rule.scorer), rule.dense_repetitions) == ("sublayer", {"dc": 1.0}, 1)


@videos
def test_sections_2_and_10_4_stepvar_and_faststar_prune_the_same_tokens_of_videos(name: str) -> None:
    target = VIDEOS[name]
    step, fast = (preset(each, target).policy for each in ("stepvar-video", "faststar"))
    assert kept(step) == kept(fast) == dict(zip(range(target.count - 4, target.count), LATE[name], strict=True))
    assert {dict(rule.scorer).popitem() for rule in fast.scales.values()} == {("spatiotemporal", 1.0)}
    assert {(rule.granularity, rule.restorer) for rule in fast.scales.values()} == {("scale", "zero_residual")}
    assert {(rule.granularity, rule.restorer) for rule in step.scales.values()} == {("scale", "nearest")}


@videos
def test_section_3_2_stagevar_on_videos_projects_the_last_scale_and_drops_the_condition_of_three(name: str) -> None:
    target = VIDEOS[name]
    policy, last = preset("stagevar-video", target).policy, target.count - 1
    assert policy.guidance == BranchRule("uncond", target.count - 3) and list(policy.scales) == [last]
    rule, tokens = policy.scales[last], token_count(target.scale_schedule[last])
    assert (rule.reducer, rule.restorer, rule.cache_scale, rule.ranks) == ("project", "cached_state", last - 1, ())
    assert planned(policy)[last].kept_chunks == (int(0.1 * tokens) + 1,) * 6


@videos
def test_videos_have_no_preset_that_decodes_scales_together_and_images_none_of_theirs(name: str) -> None:
    definition = read_space(FILES[0].parent / "unified.yaml")
    own = {setting.name for setting in definition.presets if setting.videos}
    names = {found.name for found in SearchSpace(definition, VIDEOS[name]).presets()}
    assert own and own <= names and "lazyvar" not in names and "lazyvar-no-group" in names
    assert own.isdisjoint(found.name for found in SearchSpace(definition, INFINITY["infinity2b"]).presets())
    once = preset("once-each-4", VIDEOS[name]).policy
    times = VIDEOS[name].course.repetitions
    assert all(times[scale] - fewer == 1 for scale, fewer in once.fewer_repetitions.items())
    assert list(once.fewer_repetitions) == [scale for scale, number in enumerate(times) if number > 1][-3:]


@both
@pytest.mark.parametrize("number", [1, 2, 3])
def test_section_12_4_skips_and_single_branches_count_from_the_end(target: Target, number: int) -> None:
    dense = Policy(target.backbone, target.depth, target.scale_schedule)
    skip, cond = preset(f"skip-{number}", target), preset(f"cond-only-{number}", target)
    assert (skip.policy.skip_last, dict(skip.policy.scales), skip.policy.guidance) == (number, {}, dense.guidance)
    assert (cond.policy.skip_last, cond.policy.guidance) == (0, BranchRule("cond", 13 - number))


def test_random_controls_differ_from_their_presets_in_the_scorer_alone() -> None:
    for name in ("fastvar-hart", "fastvar-no-skip"):
        control, shown = (preset(full, INFINITY["infinity2b"]) for full in (f"{name}-random", name))
        assert control.control and control.vector is None and not shown.control
        plain, random = (json.loads(found.policy.key()) for found in (shown, control))
        for rule in random["scales"].values():
            assert rule.pop("scorer") == {"random": 1.0}
        assert random == plain


def test_fastvar_on_the_embedded_schedule_keeps_its_relative_position() -> None:
    policy = preset("fastvar", TARGETS["tiny"]).policy
    assert policy.skip_last == 1 and list(policy.scales) == [5]
    assert policy.scales[5].cache_scale == 4 and policy.scales[5].layers == (1, 4)
    assert policy.scales[5].keep == kept_count(144, 0.6) / 144


def test_no_step_of_a_method_gets_lost_on_the_embedded_schedule() -> None:
    stage, lazy, sparse = (preset(name, TARGETS["tiny"]).policy for name in ("stagevar", "lazyvar", "sparsevar"))
    assert (stage.skip_last, stage.guidance, list(stage.scales)) == (1, BranchRule("uncond", 5), [5])
    assert len(stage.scales[5].ranks) == len(stage.chunk_ranges()) == 6
    assert lazy.group_from == 5 and list(lazy.scales) == [5, 6] and list(sparse.scales) == [6]
    assert sparse.scales[6].chunk == 2, "the fourth of eight chunks is the third of six"


@pytest.mark.parametrize("budget", PIXEL_BUDGETS)
def test_presets_exist_on_every_schedule_of_infinity(budget: str) -> None:
    definition = read_space(FILES[0].parent / "unified.yaml")
    square = SearchSpace(definition, Target("infinity2b", 32, scale_schedule(1.0, budget))).presets()
    for ratio in ASPECT_RATIOS[::3]:
        others = SearchSpace(definition, Target("infinity2b", 32, scale_schedule(ratio, budget))).presets()
        for here, there in zip(square, others, strict=True):
            assert here.name == there.name and here.policy.skip_last == there.policy.skip_last
            assert list(here.policy.scales) == list(there.policy.scales)


OF_SEVERAL = ("unified", "video")  # files without presets of their own


def test_every_preset_is_written_in_one_file_and_the_unified_space_has_them_all() -> None:
    files = {path.stem: read_space(path) for path in FILES}
    names = [preset.name for stem, definition in files.items() if stem not in OF_SEVERAL for preset in definition.presets]
    assert len(names) == len(set(names)) and set(names) == {preset.name for preset in files["unified"].presets}
    assert all("\npresets:" not in (FILES[0].parent / f"{name}.yaml").read_text() for name in OF_SEVERAL)
    assert all(definition.name == stem for stem, definition in files.items())


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "video"], ids=lambda path: path.stem)
@pytest.mark.parametrize("target", ["tiny", "infinity2b"])
def test_a_method_file_frees_what_its_own_presets_use(path: Path, target: str) -> None:
    for found in space(path.stem, target, calibrated=True).presets():
        assert found.vector is not None or found.control or (found.name, target) == ("skip-3", "tiny")


def test_presets_whose_sources_leave_decisions_open_say_so() -> None:
    shown = read_space(FILES[0].parent / "unified.yaml").presets
    stated = {preset.name for preset in shown if not preset.inferred and not preset.control}
    skips = {f"{kind}-{number}" for kind in ("skip", "cond-only") for number in (1, 2, 3)}
    own = {"fastvar", "fastvar-hart", "stagevar-video", "stagevar-a", "stagevar-ab", "stagevar", "sparsevar", "sparsevar-0.5"}
    assert stated == own | skips


@pytest.mark.parametrize("name", RELEASED)
def test_presets_of_every_file_instantiate_on_every_released_backbone(name: str) -> None:
    spec = RELEASED[name]
    target = Target(name, spec.transformer.depth, spec.schedule_for(1.0))
    for path in FILES:
        for preset in SearchSpace(read_space(path), target).presets():
            plan = compile_plan(preset.policy, target.scale_schedule, target.depth)
            assert plan.scales and preset.policy.backbone == name
