"""The map from flat vectors to canonical policies: no vector is invalid, what is not read changes nothing."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from autoprune.backbones.schedules import scale_schedule
from autoprune.policy import BranchRule, Policy, ScalePruning, fingerprint, token_count
from autoprune.rules import DISCREPANCIES, LATENT_SCORERS, KeyRule, ProbeRule
from autoprune.search.calibration import LEVELS, Calibration
from autoprune.search.dimensions import KNOBS
from autoprune.search.neighbour import random_vector, unseen_neighbour
from autoprune.search.space import SearchSpace, Target
from autoprune.search.space_file import read_space

FILES = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))
TARGETS = {
    "tiny": Target("tiny", 6, scale_schedule(1.0, "0.06M")),
    "infinity2b": Target("infinity2b", 32, scale_schedule(1.0, "1M")),
    "infinity8b-quarter": Target("infinity8b", 40, scale_schedule(1.0, "0.25M")),
    "infinity8b-portrait": Target("infinity8b", 40, scale_schedule(1.5, "1M")),
    "three scales": Target("small", 3, ((1, 1, 1), (1, 2, 3), (1, 4, 6))),
}


def space(name: str, target: str, *, calibrated: bool = False) -> SearchSpace:
    target = TARGETS[target]
    return SearchSpace(read_space(FILES[0].parent / f"{name}.yaml"), target, calibration(target) if calibrated else None)


def calibration(target: Target) -> Calibration:
    """Returns made-up measurements: the median of every metric at scale k is 2 ** -k, its 90 % quantile three times that."""
    count, rows = target.count, [level / 0.5 if level <= 0.5 else 1 + (level - 0.5) * 5 for level in LEVELS]
    table = {scale: tuple(row * 2.0**-scale for row in rows) for scale in range(count)}
    return Calibration(
        backbone=target.backbone,
        scale_schedule=fingerprint(target.scale_schedule),
        weights="made up",
        prompts=1,
        rank_scale=count - 2,
        ranks={"0.96": tuple(0.1 + 0.05 * chunk for chunk in range(min(8, target.depth)))},
        probe=ProbeRule(max(1, count - 4), 0, (0.0, 0.0), (1.0, 1.0), (1.0, -1.0), (0.0, 1.0)) if count > 4 else None,
        discrepancies=dict.fromkeys(DISCREPANCIES, table),
        changes=dict.fromkeys(LATENT_SCORERS, table),
    )


def random_vectors(flat: dict, count: int) -> list[dict]:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask(fixed_distributions=flat).params for _ in range(count)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_preset_round_trips_through_its_vector(path: Path, target: str, calibrated: bool) -> None:
    here = space(path.stem, target, calibrated=calibrated)
    flat = here.distributions
    for preset in here.presets():
        assert preset.policy == preset.policy.canonical()
        if preset.vector is None:
            continue
        assert set(preset.vector) == set(flat)
        for name, value in preset.vector.items():
            assert flat[name]._contains(flat[name].to_internal_repr(value))
        assert here.policy(preset.vector).key() == preset.policy.key()
        assert here.normal(preset.vector) == preset.vector
    assert here.presets()[0].name == "dense" and here.presets()[0].policy.is_dense()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_vector_is_a_valid_canonical_policy(path: Path, target: str, calibrated: bool) -> None:
    here = space(path.stem, target, calibrated=calibrated)
    for vector in random_vectors(here.distributions, 400 if path.stem == "unified" else 60):
        policy = here.policy(vector)
        assert policy == policy.canonical() and Policy.from_json(policy.to_json()) == policy
        for index, pruning in policy.scales.items():
            tokens = token_count(policy.scale_schedule[index])
            assert pruning.keep * tokens == pytest.approx(round(pruning.keep * tokens)) and 0 < pruning.keep < 1
            assert (pruning.cache_scale is not None) == pruning.cached
            assert not pruning.cached or pruning.cache_scale < min(policy.scales)


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_policy_does_not_read_changes_nothing(target: str) -> None:
    here, rng = space("unified", target, calibrated=True), np.random.default_rng(0)
    for _ in range(200):
        vector, other = random_vector(here, rng), random_vector(here, rng)
        normal = here.normal(vector)
        assert here.policy(normal) == here.policy(vector) and here.normal(normal) == normal
        unread = {name for name in vector if normal[name] != vector[name]}
        assert here.policy(vector | {name: other[name] for name in unread}) == here.policy(vector)


def test_every_dimension_matters_to_some_policy() -> None:
    here, rng = space("unified", "infinity2b", calibrated=True), np.random.default_rng(1)
    idle, choices = set(here.distributions), {}
    for _ in range(600):
        vector, other = random_vector(here, rng), random_vector(here, rng)
        before = here.policy(vector)
        for name in sorted(idle):
            if here.policy(vector | {name: other[name]}) != before:
                idle.remove(name)
        for name, value in here.normal(vector).items():
            choices.setdefault(name, set()).add(value)
    assert not idle
    assert not [name for name, entry in here.distributions.items() if not set(getattr(entry, "choices", ())) <= choices[name]]


def test_the_unified_space_frees_every_knob_that_a_trial_can_decide() -> None:
    free = read_space(FILES[0].parent / "unified.yaml").dimensions
    assert set(KNOBS) - set(free) == {"batch"}, "how a batch follows data-dependent decisions is the user's choice"


def test_uniform_draws_are_mostly_sane() -> None:
    here, rng = space("unified", "infinity2b", calibrated=True), np.random.default_rng(2)
    policies = [here.policy(random_vector(here, rng)) for _ in range(1000)]
    rules = [next(iter(policy.scales.values())) for policy in policies if policy.scales]
    for share, most in (
        (np.mean([policy.adaptive for policy in policies]), 0.4),
        (np.mean([policy.group_from is not None for policy in policies]), 0.15),
        (np.mean([policy.keys != KeyRule() for policy in policies]), 0.7),
        (np.mean([rule.reducer == "project" for rule in rules]), 0.25),
        (np.mean([rule.restorer == "anchor" for rule in rules]), 0.1),
        (np.mean([rule.select == "threshold" for rule in rules]), 0.1),
    ):
        assert 0 < share < most
    for policy in policies:
        assert policy.run >= 10 and (policy.stop is None or policy.stop.from_scale >= 10)


def test_inactive_fields_do_not_change_the_policy() -> None:
    here = space("unified", "tiny")
    dense = dict(here.presets()[0].vector)
    for changes in (
        {"branch": "uncond"},
        {"cache_before": 3},
        {"rows": "shared"},
        {"exempt_first": 2},
        {"interpolation": "nearest"},
    ):
        assert here.policy(dense | changes).is_dense()
    pruned = dense | {"keep_6": 0.5, "skip_last": 1}
    assert here.policy(pruned).key() == here.policy(dense | {"skip_last": 1}).key()
    scale = dense | {"pruned_scales": 1, "keep_6": 0.5, "granularity": "scale"}
    assert here.policy(scale).key() == here.policy(scale | {"exempt_last": 2, "rows": "shared"}).key()
    single = dense | {"pruned_scales": 1, "keep_6": 0.5, "single_branch_scales": 1}
    assert here.policy(single).key() == here.policy(single | {"rows": "shared"}).key()
    latent = dense | {"pruned_scales": 1, "keep_6": 0.5, "scorer": "latent_cos"}
    assert here.policy(latent).key() == here.policy(latent | {"rows": "shared", "delta_chunk": 7}).key()


def test_single_branch_counts_from_the_last_scale_that_runs() -> None:
    here = space("unified", "tiny")
    dense = dict(here.presets()[0].vector)
    assert here.policy(dense | {"single_branch_scales": 2, "skip_last": 1}).guidance == BranchRule("cond", 4)


def test_the_cache_scale_never_reaches_below_the_first_scale() -> None:
    short = space("unified", "three scales")
    vector = {f"keep_{scale}": 0.5 for scale in short.prunable} | {"cache_before": 3, "pruned_scales": 2}
    assert {pruning.cache_scale for pruning in short.policy(vector).scales.values()} == {0}


def test_different_active_choices_have_different_keys() -> None:
    here = space("unified", "tiny")
    dense = dict(here.presets()[0].vector)
    variants = [
        dense | {"pruned_scales": 1, "keep_6": 0.5, "interpolation": mode, "rows": rows, "cache_before": cache}
        for mode, rows, cache in itertools.product(("area", "nearest"), ("per_branch", "shared"), (1, 2))
    ]
    assert len({here.policy(vector).key() for vector in variants}) == len(variants)


def test_a_preset_outside_the_space_is_measured_but_has_no_vector() -> None:
    definition = space("fastvar", "tiny").definition
    setting = definition.presets[0]
    for change in ({"keep": (0.05,), "of_scales": None}, {"values": {"granularity": "scale"}}):
        wide = SearchSpace(replace(definition, presets=(replace(setting, **change),)), TARGETS["tiny"])
        preset = wide.presets()[1]
        assert preset.vector is None and not preset.control and not preset.policy.is_dense()
    assert preset.policy.scales[5].granularity == "scale"


def test_neighbours_are_unseen_valid_vectors() -> None:
    here = space("unified", "tiny")
    flat, front = here.distributions, [dict(preset.vector) for preset in here.presets() if preset.vector]
    known = {here.policy(vector).key() for vector in front}
    for seed in range(30):
        vector = unseen_neighbour(here, front, known=known, seed=seed)
        assert all(flat[name]._contains(flat[name].to_internal_repr(value)) for name, value in vector.items())
        key = here.policy(vector).key()
        assert key not in known
        known.add(key)
    assert np.unique(list(known)).size == len(known)


def test_one_dimension_says_how_many_scales_are_pruned() -> None:
    here = space("unified", "tiny")
    vector = dict(here.presets()[0].vector) | {"keep_4": 0.5, "keep_5": 0.5, "keep_6": 0.5}
    pruned = [sorted(here.policy(vector | {"pruned_scales": count}).scales) for count in range(4)]
    assert pruned == [[], [6], [5, 6], [4, 5, 6]]
    assert sorted(here.policy(vector | {"pruned_scales": 1, "skip_last": 1}).scales) == [5]


def test_a_group_takes_only_scales_that_can_be_decoded_together() -> None:
    here = space("unified", "tiny")
    vector = dict(here.presets()[0].vector) | {"pruned_scales": 2, "keep_5": 0.5, "keep_6": 0.5, "ending": "group"}
    assert here.policy(vector).group_from is None
    lazy = vector | {
        "adaptive": "allowed",
        "granularity": "scale",
        "restorer": "zero_residual",
        "scorer": "delta",
        "select": "threshold",
    }
    policy = here.policy(lazy | {"group_scales": 2, "single_branch_scales": 1})
    assert policy.group_from == 5 and {rule.select for rule in policy.scales.values()} == {"top"}
    assert [dict(policy.scales[scale].scorer) for scale in (5, 6)] == [{"delta": 1.0}, {"latent_cos": 1.0}]
    assert policy.guidance == BranchRule("cond", 5), "within a group the branch is dropped with its first scale"
    assert here.policy(lazy | {"single_branch_scales": 1, "branch": "adaptive"}).group_from is None


def test_impossible_pieces_take_the_nearest_meaning() -> None:
    here = space("unified", "infinity2b")
    dense = dict(here.presets()[0].vector) | {"pruned_scales": 1, "keep_12": 0.5, "adaptive": "allowed"}

    def rule(**values: object) -> ScalePruning:
        return here.policy(dense | values).scales[12]

    assert rule(restorer="cached_state").restorer == "cached"
    assert rule(restorer="anchor").restorer == rule(restorer="anchor", granularity="chunk").restorer == "nearest"
    assert rule(restorer="zero_residual").restorer == "identity"
    assert rule(reducer="project").reducer == "gather" and rule(reducer="merge", granularity="chunk").reducer == "gather"
    assert rule(granularity="scale", restorer="anchor", anchors=0).anchors == 4
    assert rule(granularity="scale", restorer="anchor", select="draw").select == "top"
    assert rule(granularity="chunk", select="threshold").select == "top"
    assert rule(granularity="scale", select="threshold", floor=0.3, keep_12=0.2).floor == 0.2
    assert dict(rule(scorer="cond_uncond", single_branch_scales=3).scorer) == {"dc": 1.0}
    assert here.policy(dense | {"keys": "ends", "keys_first": 6, "keys_last": 5}).keys == KeyRule(6, 5)
    assert here.policy(dense | {"keys": "ends", "keys_first": 6, "keys_last": 5, "skip_last": 1}).keys == KeyRule()


def test_thresholds_count_in_calibrated_medians() -> None:
    plain, known = (space("unified", "tiny", calibrated=calibrated) for calibrated in (False, True))
    vector = dict(plain.presets()[0].vector) | {"adaptive": "allowed", "single_branch_scales": 2, "branch": "adaptive"}
    vector |= {"log10_drop_threshold": 0.301}
    assert (plain.policy(vector).guidance.threshold, known.policy(vector).guidance.threshold) == (2.0, 2.0 * 2**-4)
    vector |= {"ending": "stop", "stop_scales": 2, "log10_stop_threshold": -0.301}
    assert (plain.policy(vector).stop.threshold, known.policy(vector).stop.threshold) == (0.5, pytest.approx(0.5 * 2**-5, 1e-3))
    vector |= {"pruned_scales": 1, "granularity": "scale", "keep_6": 0.5, "select": "threshold", "scorer": "latent_l2"}
    relative, absolute = (known.policy(vector | {"threshold_of": of}).scales[6].threshold for of in ("maximum", "absolute"))
    assert relative == 0.1 and absolute == pytest.approx(0.1 * 2**-6, 1e-3)


def test_a_probe_can_be_searched_only_where_it_was_fitted() -> None:
    assert "probe" not in space("unified", "tiny").distributions["ending"].choices
    known = space("unified", "tiny", calibrated=True)
    probing = dict(known.presets()[0].vector) | {"adaptive": "allowed", "ending": "probe"}
    assert known.policy(probing).probe == calibration(TARGETS["tiny"]).probe
    assert known.policy(probing | {"single_branch_scales": 1, "branch": "uncond"}).probe is None
    assert space("skipvar", "tiny").policy({"ending": "probe"}).probe is None


def test_one_dimension_forbids_everything_that_depends_on_the_data() -> None:
    here, rng = space("unified", "infinity2b", calibrated=True), np.random.default_rng(3)
    vectors = [random_vector(here, rng) for _ in range(300)]
    assert not any(here.policy(vector | {"adaptive": "never"}).adaptive for vector in vectors)
    assert any(here.policy(vector | {"adaptive": "allowed"}).adaptive for vector in vectors)
